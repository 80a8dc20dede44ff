"""What wrong focus distances cost, and what `fitted_focus` wins back, on the 15 RGB-D scenes.

    python -m tests.benchmarks focus        (two conditions, three kinds of reports, 15 scenes: ten minutes of one core)

The frames are those of the other tables; only what is said of their focus differs. "as set" is the truth, "5 % off"
what a camera's notes may be, "uneven" says that steps which are alike are not (by a factor of 1.6, one std), as an
uncalibrated sweep says that steps which are not are alike.

"off" is the root mean square error of the settings in px of blur std (CoC / 4), less a shift and stretch of all of
them, which no stack tells. Depth errors are the network's, in px of blur std, mean over pixels, after the same shift
and stretch of depth (robustly fitted): with the reported settings, the fitted ones, and the true ones.
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
from reconstruct.lens_fit import fitted_focus
from reconstruct.predict import load_network, predict
from tests.benchmarks.bench_foundation import tensors
from tests.benchmarks.foundation_stacks import ROOT, FoundationStack, foundation_stack, half_size_scene, scene_names

CONDITIONS = ("disc", "noisy")
REPORTS = ("as set", "5 % off", "uneven")
WINDOW = 160, 208


def reported(kind: str, true_dpt: NDArray[np.float64], rng: np.random.Generator) -> NDArray[np.float64]:
    """What is said of frames that were focused at `true_dpt`."""
    if kind == "as set":
        return true_dpt
    if kind == "5 % off":
        return true_dpt * (1 + 0.05 * rng.standard_normal(true_dpt.shape))
    steps = np.exp(0.5 * rng.standard_normal(len(true_dpt) - 1))
    along = np.concatenate([[0.0], np.cumsum(steps) / steps.sum()])
    return np.asarray(true_dpt[0] + (true_dpt[-1] - true_dpt[0]) * along)


def beside_line(values: NDArray[np.float64], x: NDArray[np.float64]) -> float:
    """Root mean square of what of `values` no straight line over `x` explains."""
    line = np.polynomial.Polynomial.fit(x, values, 1)
    return float(np.sqrt(np.mean((values - line(x)) ** 2)))


def depth_error_px(estimate: Estimate, stack: FoundationStack) -> float:
    """Mean absolute error of inverse depth after the shift and stretch that make it least, px of blur std."""
    true = stack.scene.depth_m
    known = np.isfinite(true) & (true > 0)
    found, wanted = estimate.inverse_depth_dpt.numpy()[known].astype(np.float64), 1 / true[known]
    weight = np.ones_like(found)
    for _ in range(20):  # least absolute differences by reweighted squares
        slope, offset = np.polyfit(found, wanted, 1, w=weight)
        left = np.abs(slope * found + offset - wanted)
        weight = 1 / np.sqrt(left + 1e-3)
    return float(left.mean() * stack.kappa.mean() / 4)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="focus", description=__doc__)
    parser.add_argument("--scenes", nargs="+", default=None)
    parser.add_argument("--conditions", nargs="+", default=CONDITIONS)
    parser.add_argument("--output", type=Path, default=ROOT / "bench-results" / "focus.json")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    network = load_network("default", torch.device("cpu"))
    table = []
    for condition in options.conditions:
        for kind in REPORTS:
            print(f"\n{condition}, settings {kind}")
            print(f"{'scene':18s} off px reported  fitted   depth error px reported  fitted    true   CPU s")
            rows = []
            for i, name in enumerate(options.scenes or scene_names()):
                stack = foundation_stack(half_size_scene(name), "dslr", condition).middle(*WINDOW)
                frames, true, kappa = tensors(stack)
                per_px = 4 / float(kappa.mean())
                said = torch.tensor(reported(kind, stack.focus_dpt, np.random.default_rng(i)), dtype=torch.float32)
                begun = time.process_time()
                fitted = fitted_focus([(frames, torch.tensor(stack.valid))], said, kappa)
                seconds = time.process_time() - begun
                off = [beside_line(x.numpy() - stack.focus_dpt, stack.focus_dpt) / per_px for x in (said, fitted)]
                error = [depth_error_px(predict(network, frames, x, kappa), stack) for x in (said, fitted, true)]
                rows.append([*off, *error, seconds])
                table.append({"condition": condition, "reported": kind, "scene": name, "row": rows[-1]})
                print(_line(name, rows[-1]), flush=True)
            print(_line("mean", np.mean(rows, 0)))
            print(_line("median", np.median(rows, 0)))
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(table, indent=1))


def _line(name: str, row: list[float] | NDArray[np.float64]) -> str:
    off, fitted, *errors, seconds = row
    return f"{name:18s} {off:15.3f} {fitted:7.3f} {errors[0]:24.3f} {errors[1]:7.3f} {errors[2]:7.3f} {seconds:7.1f}"


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
