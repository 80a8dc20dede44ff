"""What `refine` gains on the 15 RGB-D scenes, from the plane sweep's answer and from the network's.

    python -m tests.benchmarks refine        (three conditions, two starts, 15 scenes: an hour of one core)
    python -m tests.benchmarks.bench_refine --conditions noisy --starts network --window 160 208    (ten minutes)

Errors are in px of blur std (CoC / 4); the change is that of the mean error, the median error and the root mean square.
"cut" is by how much the mean error falls when only the most confident 70 % of the pixels are kept, start and refined.
A shift and stretch of depth is what wrong foci bring and no stack tells, so the mean error is told after it, too.
TUNED_ON were used to choose the settings, so their mean stands apart. Everything goes to bench-results/refine.json.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from reconstruct.estimate import Estimate
from reconstruct.metrics import confidence_errors
from reconstruct.plane_sweep import plane_sweep
from reconstruct.predict import TrainedNetwork, load_network, predict
from reconstruct.refine import refine
from tests.benchmarks.bench_focus import depth_error_px
from tests.benchmarks.bench_foundation import Goal, tensors
from tests.benchmarks.foundation_stacks import ROOT, FoundationStack, foundation_stack, half_size_scene, scene_names

CONDITIONS = ("disc", "noisy", "mismatched")
STARTS = ("network", "sweep")
STEPS = 25
TUNED_ON = (
    "icl_livingroom",
    "mb03_cones",
    "mb14_adirondack",
    "mb14_motorcycle",
    "nyu_bathroom",
    "redwood_chair",
    "tum_office",
)


def started(start: str, stack: FoundationStack, network: TrainedNetwork) -> Estimate:
    """The answer that refinement begins with."""
    valid = torch.tensor(stack.valid)
    if start == "sweep":
        return plane_sweep(*tensors(stack), valid=valid)
    return predict(network, *tensors(stack), valid)


def errors(estimate: Estimate, stack: FoundationStack) -> NDArray[np.float64]:
    """Mean, median and root mean square error in px of blur, the share of pixels within one std, the cut, and the mean
    error after the shift and stretch of depth that make it least.
    """
    true = stack.scene.depth_m
    known = np.isfinite(true) & (true > 0)
    px = np.abs(estimate.inverse_depth_dpt.numpy()[known] - 1 / true[known]) * stack.kappa.mean() / 4
    doubt = confidence_errors(*(x.numpy() for x in estimate[:3]), true)
    size = px.mean(), np.median(px), np.sqrt(np.square(px).mean())
    return np.array([*size, doubt["coverage"], doubt["kept70_cut"], depth_error_px(estimate, stack)])


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="refine", description=__doc__)
    parser.add_argument("--scenes", nargs="+", default=None)
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS)
    parser.add_argument("--starts", nargs="+", default=STARTS, choices=STARTS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--window", type=int, nargs=2, metavar=("HEIGHT", "WIDTH"), help="only the middle of a scene")
    parser.add_argument("--weights", default="default", help="of the network: a file, such as a training run's")
    parser.add_argument("--output", type=Path, default=ROOT / "bench-results" / "refine.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = options.scenes or scene_names()
    network = load_network(options.weights, torch.device("cpu"))
    goals: list[Goal] = []
    table = []
    for condition in options.conditions:
        for start in options.starts:
            print(f"\n{condition}, from the {start}, {options.steps} steps")
            print(f"{'scene':18s} MAE px start -> refined  change  median     RMSE   1 std         cut          CPU s")
            rows = {}
            for name in names:
                stack = foundation_stack(half_size_scene(name), "dslr", condition)
                if options.window:
                    stack = stack.middle(*options.window)
                first = started(start, stack, network)
                begun = time.process_time()
                refined = refine(*tensors(stack), first, steps=options.steps, valid=torch.tensor(stack.valid))
                seconds = time.process_time() - begun
                before, after = errors(first, stack), errors(refined, stack)
                rows[name] = np.stack([before, after])
                change = 100 * (after / before - 1)
                print(
                    f"{name:18s} {before[0]:12.3f} -> {after[0]:7.3f} {change[0]:+6.1f} % {change[1]:+6.1f} %"
                    f" {change[2]:+6.1f} %  {before[3]:.2f} > {after[3]:.2f}"
                    f"  {before[4]:.2f} > {after[4]:.2f} {seconds:6.1f}",
                    flush=True,
                )
                table.append(
                    {"condition": condition, "start": start, "scene": name, "seconds": seconds}
                    | {"before": before.tolist(), "after": after.tolist()}
                )
            for what, chosen in (("all", names), ("not tuned on", [n for n in names if n not in TUNED_ON])):
                if not chosen:
                    continue
                both = np.stack([rows[name] for name in chosen])
                ratio = float(np.mean(both[:, 1, 0] / both[:, 0, 0]))
                better = float(np.mean(both[:, 1, 0] < both[:, 0, 0]))
                label = f"({condition}, {start}, {what}: {len(chosen)} scenes)"
                (start_mae, *_, start_beside), (refined_mae, *_, cut, refined_beside) = both.mean(0)
                found = [
                    Goal(f"refined MAE / start, mean of scenes {label}", ratio, 0.75),
                    Goal(f"mean refined MAE / mean start {label}", float(refined_mae / start_mae), 0.75),
                    Goal(f"the same after a shift and stretch {label}", float(refined_beside / start_beside), 0.75),
                    Goal(f"share of scenes that got better {label}", better, 0.9, at_least=True),
                    Goal(f"most confident 70 % cut the refined MAE by {label}", float(cut), 0.6, at_least=True),
                ]
                goals += found
                print(*found, sep="\n", flush=True)
    options.output.parent.mkdir(exist_ok=True)
    summary = [vars(goal) | {"met": goal.met} for goal in goals]
    options.output.write_text(json.dumps({"goals": summary, "rows": table}, indent=1) + "\n")


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
