"""A trained network applied to one stack of any size, with calibrated spread.

model = load_network("default", pick_device("auto"))
estimate = predict(model, frames, focus_dpt, kappa)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capture.errors import DataError
from reconstruct.checkpoint import DEFAULT_WEIGHTS, load_weights, weights_file
from reconstruct.estimate import Estimate
from reconstruct.fusion import fuse
from reconstruct.memory import keep_freed_memory
from reconstruct.network import DefaultNet, PaperNet, Prior, build, sweep_prior
from reconstruct.plane_sweep import Evidence, Photometry, far_to_near, quietened

MULTIPLE = 16  # both networks halve the image four times at most


@dataclass(frozen=True)
class TrainedNetwork:
    """A network with what its weights file says about it.

    Attributes:
        identity: "default" or the file's name, and the first digits of the weights' SHA-256.
        std_gain, std_floor_px: calibration, std = hypot(gain * the network's spread, floor) in px of CoC.
        about: the whole JSON beside the weights.
    """

    net: DefaultNet | PaperNet
    preset: str
    identity: str
    std_gain: float
    std_floor_px: float
    about: dict[str, Any]


def load_network(weights: str | Path, device: torch.device, preset: str | None = None) -> TrainedNetwork:
    """The network stored in `weights` ("default" for the shipped one, else a `weights_file`), ready for `device`.

    From then on this process keeps memory that was freed (`keep_freed_memory`).

    Raises DataError if the file is missing, damaged, of another preset, or does not fit the network.
    """
    keep_freed_memory()
    path = DEFAULT_WEIGHTS if str(weights) == "default" else weights_file(weights)
    tensors, about = load_weights(path, preset)
    if about.get("preset") not in ("default", "paper"):
        raise DataError(f"{path}: weights of an unknown preset, {about.get('preset')!r}; update daif or train anew")
    _check_calibration(path.with_suffix(".json"), about.get("calibration", {}))
    network = wrap(build(about["preset"]), about, f"{weights if str(weights) == 'default' else path.name}")
    try:
        network.net.load_state_dict(tensors)
    except RuntimeError as error:
        detail = str(error).splitlines()[-1].strip()
        raise DataError(
            f"{path}: these weights do not fit this version's {about['preset']} network ({detail})"
        ) from None
    network.net.to(device).eval()
    return network


def wrap(net: DefaultNet | PaperNet, about: dict[str, Any], name: str) -> TrainedNetwork:
    """`net` with the calibration in `about`; without one its spread is taken as it is."""
    calibration = about.get("calibration", {})
    return TrainedNetwork(
        net=net,
        preset="paper" if isinstance(net, PaperNet) else "default",
        identity=f"{name} {str(about.get('sha256', 'unsaved'))[:12]}",
        std_gain=float(calibration.get("std_gain", 1.0)),
        std_floor_px=float(calibration.get("std_floor_px", 0.0)),
        about=about,
    )


def _check_calibration(path: Path, calibration: Any) -> None:
    """DataError unless `calibration`, of the JSON file `path`, holds numbers where `wrap` takes them."""
    names = "std_gain", "std_floor_px"
    values = [calibration.get(name, 0.0) for name in names] if isinstance(calibration, dict) else [None]
    if not all(isinstance(value, int | float) and 0 <= value < math.inf for value in values):
        raise DataError(
            f"{path}: calibration: expected numbers as {' and '.join(names)}, found {str(calibration)[:80]}; restore "
            "the file as it was saved"
        )


@torch.inference_mode()
def predict(
    model: TrainedNetwork,
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    valid: Tensor | None = None,
    *,
    metric: bool = True,
    context: Photometry | None = None,
    evidence: Evidence | None = None,
) -> Estimate:
    """What the network makes of one stack.

    The all-in-focus image of the `default` preset is fused from the frames at the network's depth; its own image head
    serves training (1.7 dB behind on 8 scenes).

    Args:
        model: from `load_network`.
        frames: linear RGB, (S, 3, H, W), S >= 2, on the network's device.
        focus_dpt: focus settings, (S,).
        kappa: CoC pixels per dioptre, (S,).
        valid: (S, H, W), False where a frame has no data; None means everywhere.
        metric: whether `focus_dpt` are dioptres.
        context, evidence: where `frames` are a tile of a larger picture (`reconstruct/infer.py`).
    """
    height, width = frames.shape[-2:]
    if context is None:
        frames, focus_dpt, kappa, valid = far_to_near(frames, focus_dpt, kappa, valid)
    frames = torch.nan_to_num(frames)
    partly = None if valid is None or bool(valid.all()) else valid
    rest = focus_dpt[None], kappa[None], None if partly is None else _padded(partly)[None]
    if isinstance(model.net, DefaultNet):
        quiet, context = quietened(frames, partly, context)
        prior = sweep_prior(quiet, focus_dpt, kappa, partly, context=context, evidence=evidence)
        prior = Prior(*map(_padded, prior.maps), *prior.scalars)
        output = model.net(_padded(quiet)[None], *rest, prior, with_aif=False)
    else:
        output = model.net(_padded(frames)[None], *rest)
    depth, std = (x[0, 0, :height, :width] for x in (output.inverse_depth_dpt, output.std_dpt))
    if output.aif is None:
        std = torch.hypot(model.std_gain * std, model.std_floor_px / kappa.mean())
        aif = fuse(frames, focus_dpt, kappa, depth, std, valid=valid, noise=None if context is None else context.noise)
    else:
        aif = output.aif[0, :, :height, :width]
    confidence = torch.nan_to_num(1.0 / (1.0 + std * kappa.mean()))  # no spread, no confidence
    return Estimate(depth.clamp_min(0.0) if metric else depth, std, confidence, aif.clamp_min(0.0), metric)


def _padded(x: Tensor) -> Tensor:
    """`x` (..., H, W) mirrored at the lower and right edge up to multiples of 16."""
    if all(length % MULTIPLE == 0 for length in x.shape[-2:]):
        return x
    rows, cols = (_mirrored(length, x.device) for length in x.shape[-2:])
    return x.index_select(-2, rows).index_select(-1, cols)


def _mirrored(length: int, device: torch.device) -> Tensor:
    """Indices 0, 1, ... length - 1, length - 2, ... up to a multiple of 16."""
    index = torch.arange(-(-length // MULTIPLE) * MULTIPLE, device=device)
    if length == 1:
        return index * 0
    period = 2 * (length - 1)
    return (index % period).minimum(period - index % period)
