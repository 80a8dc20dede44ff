"""How much could a confidence know? What the surest 70 % of the network's pixels spare, ranked by the truth and less.

    python -m tests.benchmarks confidence        (two minutes)

The 15 RGB-D scenes, DSLR optics. `own` ranks by the network's confidence. The other columns rank by the true error
itself: averaged over a square window around each pixel, and last pixel by pixel, which nothing can beat. A confidence
that reached GOAL would tell errors apart as finely as a window that does. Results go to bench-results/confidence.json.
"""

from __future__ import annotations

import argparse
import json

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from reconstruct.even import evened
from reconstruct.metrics import confidence_errors
from reconstruct.predict import TrainedNetwork, load_network, predict
from tests.benchmarks.bench_foundation import tensors
from tests.benchmarks.foundation_stacks import ROOT, FoundationStack, foundation_stack, half_size_scene, scene_names

RESULT = ROOT / "bench-results" / "confidence.json"
CONDITIONS = ("disc", "noisy", "mismatched")
WINDOWS_PX = (33, 17, 9, 5, 1)
GOAL = 0.6


def cuts(network: TrainedNetwork, stack: FoundationStack) -> dict[str, float]:
    """Share of the mean error that the surest 70 % are spared, by what ranks them."""
    answer = evened(predict(network, *tensors(stack), torch.tensor(stack.valid)), torch.tensor(stack.kappa))
    found, truth_m = answer.inverse_depth_dpt.numpy(), stack.scene.depth_m
    known = np.isfinite(truth_m) & (truth_m > 0)
    error = np.where(known, np.abs(found - 1 / np.where(known, truth_m, 1)), 0)

    def cut(doubt: NDArray[np.floating]) -> float:
        return confidence_errors(found, doubt, -doubt, truth_m)["kept70_cut"]

    cut_by = {"own": cut(-answer.confidence.numpy())}
    for side in WINDOWS_PX:
        seen, total = (cv2.blur(x.astype(np.float64), (side, side)) for x in (known, error))
        cut_by[f"{side} px"] = cut(total / np.maximum(seen, 1e-9))
    return cut_by


def main(argv: list[str]) -> None:
    """Prints and stores the table; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="confidence", description=__doc__)
    parser.add_argument("--conditions", nargs="+", choices=CONDITIONS, default=CONDITIONS)
    chosen = parser.parse_args(argv)
    network = load_network("default", torch.device("cpu"))
    answers: dict[str, dict[str, dict[str, float]]] = {}
    for condition in chosen.conditions:
        rows = {n: cuts(network, foundation_stack(half_size_scene(n), "dslr", condition)) for n in scene_names()}
        answers[condition] = rows
        print(f"\n{condition}: the error falls by, when 70 % are kept by (goal {GOAL})")
        mean = {
            by: float(np.mean([row[by] for row in rows.values()])) for by in ("own", *map("{} px".format, WINDOWS_PX))
        }
        print(f"{'':16}" + "".join(f"{by:>8}" for by in mean))
        for name, row in {**rows, "mean": mean}.items():
            print(f"{name:16}" + "".join(f"{value:8.2f}" for value in row.values()), flush=True)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"weights": network.identity, "answers": answers}, indent=1) + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
