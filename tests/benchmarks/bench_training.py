"""Steps per CPU second of the `default` and the published network, on the same crops in one run, one thread.

    python -m tests.benchmarks training

The published step is its network, its operator in plain torch (window 7) and its losses, forward and backward; the
`default` step is supervised by a map (distillation or simulated truth). Interleaved, medians; process CPU time,
because machines are shared. Goal: the default step >= 15 x faster. Goes to bench-results/training.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from reconstruct.dataset import CapturedStack, ScenePool, SimulatedBatches, StackBatch
from reconstruct.finetune import PAPER, PhotometricTask
from reconstruct.network import build
from reconstruct.train import TrainConfig, supervised_terms
from tests.benchmarks.bench_foundation import Goal
from tests.benchmarks.foundation_stacks import ROOT

RESULT = ROOT / "bench-results" / "training.json"


def five_frames(pool: Path, batch: int, crop: int) -> StackBatch:
    """The first batch of simulated stacks with five frames."""
    data = SimulatedBatches(ScenePool(pool, 1, 144), scenes=4, first=4, batch=batch, crop=crop)
    return next(found for step in range(1000) if (found := data.batch(step)).frames.shape[1] == 5)


def main(argv: list[str]) -> None:
    """Runs the comparison; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=3)
    parser.add_argument("--crop", type=int, default=112)
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        batch = five_frames(Path(folder), chosen.batch, chosen.crop)
    nets: dict[str, nn.Module] = {"default": build("default"), "paper": build("paper")}
    optimizers = {name: torch.optim.AdamW(net.parameters(), 1e-4) for name, net in nets.items()}
    stack = CapturedStack(
        "bench", batch.frames[0], torch.ones_like(batch.frames[0, :, 0], dtype=torch.bool), batch.focus_dpt[0],
        batch.kappa[0], True,
    )  # fmt: skip
    published = PhotometricTask([stack], PAPER)
    seconds: dict[str, list[float]] = {name: [] for name in nets}
    for _ in range(chosen.rounds + 1):
        for name, net in nets.items():
            start = time.process_time()
            output = net(batch.frames, batch.focus_dpt, batch.kappa)
            terms = (
                supervised_terms(output, batch, TrainConfig()) if name == "default" else published.terms(output, batch)
            )
            optimizers[name].zero_grad()
            torch.stack(list(terms)).sum().backward()
            optimizers[name].step()
            seconds[name].append(time.process_time() - start)
    median = {name: float(np.median(values[1:])) for name, values in seconds.items()}  # the first warms up
    print(f"{chosen.batch} crops of {chosen.crop} px, 5 frames, one thread")
    for name, value in median.items():
        print(f"{name:8} {value:6.2f} CPU s a step  {chosen.batch / value:5.2f} stacks/s")
    goal = Goal("published step / default step", median["paper"] / median["default"], 15.0, at_least=True)
    print(goal)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps({"seconds": median, "goal": vars(goal) | {"met": goal.met}}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
