"""What three times the noise costs on the 15 RGB-D scenes: the plane sweep, the network, and who knows the sharp image.

    python -m tests.benchmarks noise        (half a minute of one core)

The last compares each frame with the true all-in-focus image, blurred to what it would be at every depth: of the noisy
frames it asks nothing but that. It is smoothed as the plane sweep's comparison is, with the weight that makes its error
least at each noise, which only the truth tells. Means over scenes; bench-results/noise.json.
"""

from __future__ import annotations

import argparse
import json

import cv2
import numpy as np
import torch
from torch import Tensor

from reconstruct.metrics import depth_errors
from reconstruct.plane_sweep import GREY, SweepConfig, hypotheses, peak, smoothed
from reconstruct.predict import TrainedNetwork, load_network
from tests.benchmarks.bench_foundation import tensors
from tests.benchmarks.bench_network import CPU, by_network, by_sweep
from tests.benchmarks.foundation_stacks import ROOT, FoundationStack, foundation_stack, half_size_scene, scene_names

NOISES = {"1 %": "noisy", "3 %": "noisy3"}
CONFIG = SweepConfig(hypotheses=48)
WEIGHTS = (30.0, 100.0, 300.0, 1e3, 3e3, 1e4)  # of squared differences, beside the prices of a change of depth
MOST_COST = 30.0
GOAL = 1.1


def knowing(stack: FoundationStack) -> tuple[Tensor, Tensor, Tensor]:
    """Squared differences (N, H, W) from the true image, the hypotheses (N,) and the guide (H, W) of the smoothing."""
    _, focus, kappa = tensors(stack)
    tested = hypotheses(focus, kappa, CONFIG.hypotheses, CONFIG.beyond_px)
    sharp = stack.scene.aif.astype(np.float32)
    cost = []
    for sigmas in (tested[:, None] - focus).abs() * kappa / 4:
        blurred = [cv2.GaussianBlur(sharp, (0, 0), s) if s > 0.05 else sharp for s in sigmas.tolist()]
        square = sum(np.square(b - frame).sum(2) for b, frame in zip(blurred, stack.frames, strict=True))
        cost.append(cv2.blur(square, (CONFIG.window_px, CONFIG.window_px)))
    luma = torch.from_numpy(sharp.mean(2)).clamp_min(0)
    return torch.from_numpy(np.stack(cost)), tested, (luma * (GREY / luma.mean())).sqrt()


def abs_rel(stack: FoundationStack, inverse_depth_dpt: Tensor) -> float:
    """Mean relative error of depth."""
    return depth_errors(inverse_depth_dpt.numpy(), stack.scene.depth_m, float(stack.kappa.mean()))["abs_rel"]


def scene_errors(network: TrainedNetwork, stack: FoundationStack) -> list[float]:
    """AbsRel of the plane sweep, of the network, and with the sharp image known, by WEIGHTS."""
    cost, tested, guide = knowing(stack)
    known = [peak(smoothed((weight * cost).clamp_max(MOST_COST), guide, CONFIG), tested) for weight in WEIGHTS]
    first = by_sweep(stack)["sweep"]["abs_rel"], abs_rel(stack, by_network(network, stack)[0].inverse_depth_dpt)
    return [*first, *(abs_rel(stack, depth) for depth in known)]


def main(argv: list[str]) -> None:
    """Prints and stores the table; see the module's docstring."""
    argparse.ArgumentParser(prog="noise", description=__doc__).parse_args(argv)
    torch.set_num_threads(1)
    network, rows = load_network("default", CPU), {}
    for noise, condition in NOISES.items():
        stacks = (foundation_stack(half_size_scene(name), "dslr", condition) for name in scene_names())
        sweep, net, *known = np.mean([scene_errors(network, stack) for stack in stacks], axis=0).tolist()
        rows[noise] = {"plane sweep": sweep, "network": net, "sharp image known": min(known)}
    print(f"AbsRel, means of {len(scene_names())} scenes\n{'':18}" + "".join(f"{noise:>8}" for noise in NOISES))
    for method in rows["1 %"]:
        low, high = (rows[noise][method] for noise in NOISES)
        print(f"{method:18}{low:8.4f}{high:8.4f}   times {high / low:.3f} (goal {GOAL})")
    result = ROOT / "bench-results" / "noise.json"
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
