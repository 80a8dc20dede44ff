"""The plane sweep and the trained network behind one face, for whole pictures and for tiles of them.

Depth at a pixel depends on its surroundings, and where there is no texture on surroundings far away: the comparison of
the frames is smoothed along whole rows and columns. A picture too large to be worked on at once therefore takes three
steps: `compare` tile by tile, `smooth` the whole, `estimate` tile by tile. Every step sees what it would see untiled.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reconstruct.estimate import Estimate
from reconstruct.even import evened
from reconstruct.network import DefaultNet
from reconstruct.plane_sweep import Evidence, Photometry, SweepConfig, plane_sweep, quietened, smoothed, sweep_cost
from reconstruct.predict import load_network, predict


class PlaneSweep:
    """`reconstruct/plane_sweep.py` on one stack, whose `focus_dpt` and `kappa` (S,) it knows.

    Attributes:
        description: for the record.
        hypotheses: their number, 0 if nothing is to be smoothed.
        halo_px: how far around a pixel `estimate` looks.
        context: exposure, noise and brightness of the whole picture.
    """

    halo_px = 64
    context: Photometry | None = None

    def __init__(self, focus_dpt: Tensor, kappa: Tensor) -> None:
        self.focus_dpt, self.kappa, self.config = focus_dpt, kappa, SweepConfig()
        self.hypotheses = self.config.hypotheses
        self.description: dict[str, Any] = {"name": "plane-sweep"}

    def compare(self, frames: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Cost of each hypothesis (N, H, W) and guide (H, W) for `smooth`; frames (S, 3, H, W), valid (S, H, W)."""
        assert self.context is not None
        quiet, _ = quietened(frames, valid, self.context)
        return sweep_cost(quiet, self.focus_dpt, self.kappa, valid, self.config, self.context)

    def smooth(self, cost: Tensor, guide: Tensor, out: Tensor, device: torch.device) -> None:
        """Smooth `cost` of the whole picture, strip by strip on `device`, into `out`."""
        smoothed(cost, guide, self.config, out=out, device=device)

    def estimate(self, frames: Tensor, valid: Tensor, evidence: Evidence | None) -> Estimate:
        """Depth and all-in-focus image; `evidence` for these pixels where they are a tile."""
        more = {"config": self.config, "context": self.context, "evidence": evidence}
        return plane_sweep(frames, self.focus_dpt, self.kappa, valid=valid, **more)  # type: ignore[arg-type]

    def finished(self, estimate: Estimate) -> Estimate:
        """What is shown of an estimate that nothing refines."""
        return estimate


class Network(PlaneSweep):
    """`reconstruct/predict.py`, with weights loaded once; it is told what the plane sweep knows.

    Attributes:
        metric: whether `focus_dpt` are dioptres.
    """

    halo_px = 128  # its receptive field

    def __init__(self, focus_dpt: Tensor, kappa: Tensor, weights: str | Path, metric: bool) -> None:
        super().__init__(focus_dpt, kappa)
        self.metric = metric
        self.model = load_network(weights, focus_dpt.device)
        if not isinstance(self.model.net, DefaultNet):
            self.hypotheses = 0  # the published network makes no use of them
        self.description = {"name": "network", "weights": self.model.identity}

    def estimate(self, frames: Tensor, valid: Tensor, evidence: Evidence | None) -> Estimate:
        more = {"metric": self.metric, "context": self.context, "evidence": evidence}
        return predict(self.model, frames, self.focus_dpt, self.kappa, valid, **more)  # type: ignore[arg-type]

    def finished(self, estimate: Estimate) -> Estimate:
        return evened(estimate, self.kappa)


METHODS: dict[str, type[PlaneSweep]] = {"plane-sweep": PlaneSweep, "network": Network}
