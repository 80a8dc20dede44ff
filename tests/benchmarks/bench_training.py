"""CPU seconds of a self-supervised step of `default` and of the published network, on the same crops in one run.

    python -m tests.benchmarks training

A `default` step is one of fine-tuning: crops of captured stacks with the plane sweep's evidence and their refined maps
(`DistilTask`), network, loss, backward, optimiser, as `fit` does it: the U-Net in bf16 where the CPU has units for it;
beside it the same in float32. The published step is its network, its operator (window 7) written in plain torch, its
losses, backward, optimiser; beside it the same with our own fused operator. Interleaved, medians of process CPU time on
one thread. Goal: a `default` step >= 15 x faster. Beside it, what the convolutions and matrix products of both steps
allow: their operations as torch counts them, at the rate that one 3x3 convolution of 32 channels in float32 reaches
here; a step of nothing else would be the ceiling times faster. Goes to bench-results/training.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from capture.lens import coc_diameter_px
from reconstruct.dataset import CapturedStack, RenderedScene, ScenePool, StackBatch
from reconstruct.device import has_bf16
from reconstruct.finetune import FINETUNE, PAPER, DistilTask, Lesson, PhotometricTask, only_adaptable
from reconstruct.losses import PUBLISHED, published_terms
from reconstruct.network import DefaultNet, NetworkOutput, build
from reconstruct.render import published_blur
from tests.benchmarks.bench_foundation import Goal
from tests.benchmarks.foundation_stacks import ROOT

RESULT = ROOT / "bench-results" / "training.json"
CPU = torch.device("cpu")
FRAMES = 6  # one of them is withheld


def stack_of(scene: RenderedScene) -> CapturedStack:
    """FRAMES frames of a simulated scene as if they had been captured."""
    chosen = np.rint(np.linspace(0, len(scene.frames) - 1, FRAMES)).astype(int)
    frames = np.square(scene.frames[chosen].astype(np.float32) / 65535).transpose(0, 3, 1, 2)
    optics = (torch.from_numpy(x[chosen]) for x in (scene.focus_dpt, scene.kappa))
    return CapturedStack(
        "bench", torch.from_numpy(frames), torch.ones(frames[:, 0].shape, dtype=torch.bool), *optics, True
    )


def plain_operator(image: Tensor, radius_px: Tensor, window: int = 7) -> Tensor:
    """`published_blur` as one writes it in torch: a loop over the taps, the gradient left to autograd."""
    half, (height, width) = window // 2, image.shape[-2:]
    gate = radius_px > 1
    c, mask, light = (F.pad(x, (half,) * 4) for x in (torch.where(gate, radius_px, 1.0), gate.float(), image[:, None]))
    total, norm = torch.zeros(()), torch.full_like(radius_px, 1e-12)
    for y in range(window):
        for x in range(window):
            near = (..., slice(y, y + height), slice(x, x + width))
            distance2 = (y - half) ** 2 + (x - half) ** 2
            spread = c[near].clamp_min(1.0)
            weight = torch.exp(-2 * distance2 / spread.square()) / spread.square() * mask[near]
            total, norm = total + weight[:, :, None] * light[near], norm + weight
    return torch.where(gate[:, :, None], total / norm[:, :, None], image[:, None])


def published_loss(output: NetworkOutput, batch: StackBatch) -> Tensor:
    """The published terms through `plain_operator`; `PhotometricTask.terms` with another operator."""
    inverse_depth = output.inverse_depth_dpt
    assert output.aif is not None
    coc_px = coc_diameter_px(batch.kappa[..., None, None], batch.focus_dpt[..., None, None], inverse_depth)
    rendered = plain_operator(output.aif, coc_px.abs() / 2)
    terms = published_terms(rendered, batch.frames, output.aif, 1.0 / inverse_depth, coc_px)
    return torch.stack([getattr(PUBLISHED, name) * term for name, term in terms._asdict().items()]).sum()


class Clock:
    """CPU seconds of the parts of a step."""

    def __init__(self) -> None:
        self.parts: dict[str, list[float]] = {}
        self.since = time.process_time()

    def lap(self, part: str) -> None:
        now = time.process_time()
        self.parts.setdefault(part, []).append(now - self.since)
        self.since = now

    def start(self) -> None:
        self.since = time.process_time()

    def medians(self) -> dict[str, float]:
        """Per part, and their sum as `step`; the first turn warms up."""
        found = {part: float(np.median(seconds[1:])) for part, seconds in self.parts.items()}
        return found | {"step": sum(found.values())}


def convolution_rates(crop: int, turns: int = 15) -> dict[str, float]:
    """Operations a second of a 3x3 convolution of 32 channels on `crop`, forward alone and with its backward."""
    net = nn.Conv2d(32, 32, 3, padding=1)
    image = torch.rand(1, 32, crop, crop).contiguous(memory_format=torch.channels_last).requires_grad_()
    clock, operations = Clock(), 2 * 9 * 32 * 32 * crop**2
    for _ in range(turns + 1):
        clock.start()
        output = net(image)
        clock.lap("forward")
        output.backward(output.detach())
        clock.lap("backward")
    seconds = clock.medians()
    return {"forward": operations / seconds["forward"], "both": 3 * operations / seconds["step"]}


def compare(
    lesson: Lesson, folder: Path, batch: int, crop: int, rounds: int
) -> tuple[dict[str, dict[str, float]], dict[str, int]]:
    """Medians of the parts of every kind of step, and its operations in convolutions and matrix products."""
    config = FINETUNE.model_copy(update={"batch": batch, "crop_px": crop})
    task = DistilTask([lesson], config, CPU, folder)
    photometric = PhotometricTask([lesson.stack], PAPER.model_copy(update={"batch": batch, "crop_px": crop}))
    kinds: dict[str, tuple[nn.Module, bool, Callable[[NetworkOutput, StackBatch], Tensor]]] = {
        "default": (build("default"), True, lambda o, b: torch.stack(list(task.terms(o, b))).sum()),
        "default, float32": (build("default"), True, lambda o, b: torch.stack(list(task.terms(o, b))).sum()),
        "default, evidence anew": (build("default"), False, lambda o, b: torch.stack(list(task.terms(o, b))).sum()),
        "published": (build("paper"), True, published_loss),
        "published, our operator": (
            build("paper"), True, lambda o, b: torch.stack(list(photometric.terms(o, b))).sum()
        ),
    }  # fmt: skip
    for kind, (net, *_) in kinds.items():
        if isinstance(net, DefaultNet):
            only_adaptable(net)
            net.bf16 = has_bf16(CPU) and kind != "default, float32"
    optimizers = {kind: torch.optim.AdamW(net.parameters(), 1e-5, fused=True) for kind, (net, *_) in kinds.items()}
    clocks = {kind: Clock() for kind in kinds}
    operations = {}
    for kind, (net, _, loss) in kinds.items():
        found = task.batch(0)
        with FlopCounterMode(display=False) as counter:
            loss(net(found.frames, found.focus_dpt, found.kappa, prior=found.prior, with_aif=False), found).backward()
        operations[kind] = counter.get_total_flops()
    for turn in range(rounds + 1):
        for kind, (net, kept, loss) in kinds.items():
            clock = clocks[kind]
            clock.start()
            found = task.batch(turn)
            if not kept:
                found = replace(found, prior=None)
            clock.lap("batch")
            output = net(found.frames, found.focus_dpt, found.kappa, prior=found.prior, with_aif=False)
            clock.lap("network")
            value = loss(output, found)
            clock.lap("loss")
            optimizers[kind].zero_grad()
            value.backward()
            clock.lap("backward")
            optimizers[kind].step()
            clock.lap("optimiser")
    return {kind: clock.medians() for kind, clock in clocks.items()}, operations


def check_operator() -> None:
    """Both operators are the same function."""
    rng = torch.Generator().manual_seed(0)
    image, radius = torch.rand(1, 3, 40, 40, generator=rng), 4 * torch.rand(1, 2, 40, 40, generator=rng)
    assert torch.allclose(plain_operator(image, radius), published_blur(image, radius), atol=1e-5)


def main(argv: list[str]) -> None:
    """Runs the comparison; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="training", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sizes", type=int, nargs="+", default=[3, 112, 4, 160], help="batch and crop, in pairs")
    chosen = parser.parse_args(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    check_operator()
    goals, tables, ceilings = [], {}, {}
    with tempfile.TemporaryDirectory() as folder:
        stack = stack_of(ScenePool(Path(folder), 1, 208)[0])
        lesson = Lesson.prepare(stack, None, 0, CPU, Path(folder))
        for batch, crop in zip(chosen.sizes[::2], chosen.sizes[1::2], strict=True):
            medians, operations = compare(lesson, Path(folder), batch, crop, chosen.rounds)
            tables[f"{batch} x {crop}"] = medians
            print(f"\n{batch} crops of {crop} px, 5 frames, one thread; CPU ms")
            print(f"{'':25}" + " ".join(f"{part:>9}" for part in medians["default"]) + "   stacks/s")
            for kind, parts in medians.items():
                row = " ".join(f"{1000 * seconds:9.0f}" for seconds in parts.values())
                print(f"{kind:25}{row}   {batch / parts['step']:8.2f}")
            ratio = medians["published"]["step"] / medians["default"]["step"]
            goals.append(Goal(f"published / default, {batch} x {crop} px", ratio, 15.0, at_least=True))
            most, least = operations["published"] / 1e9, operations["default"] / 1e9
            print(f"operations a step: default {least:.1f} G, published {most:.1f} G")
            for kind, rate in convolution_rates(crop).items():
                ceilings[f"{batch} x {crop}, {kind}"] = medians["published"]["step"] / operations["default"] * rate
                what = "one convolution, forward only" if kind == "forward" else "the same with its backward"
                print(f"ceiling at {rate / 1e9:.0f} G/s ({what}): {ceilings[f'{batch} x {crop}, {kind}']:.1f} x")
    print()
    for goal in goals:
        print(goal)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(
        json.dumps(
            {"seconds": tables, "ceilings": ceilings, "goals": [vars(g) | {"met": g.met} for g in goals]}, indent=1
        )
        + "\n"
    )


if __name__ == "__main__":
    main(sys.argv[1:])
