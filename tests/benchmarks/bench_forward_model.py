"""Does the true depth have the lowest loss? Truth against a smoothed truth and the plane sweep, for every renderer.

Stacks are aperture-sampled (`capture/optics.py`), which no renderer here shares. Every candidate depth gets the sharp
image that suits it best: STEPS of Adam on the image alone, depth fixed (`notes/forward-model.md` section 1).
Self-supervision is worth as much as this table says.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from capture.optics import Condition
from reconstruct.losses import charbonnier
from reconstruct.plane_sweep import plane_sweep
from reconstruct.render import Model, PsfShape, render_stack
from tests.benchmarks import foundation_stacks
from tests.benchmarks.foundation_stacks import foundation_stack, half_size_scene, scene_names

STEPS = 15
STEP_SIZE = 0.006
SMOOTHING_PX = 2.0
GOAL = 0.9
# name: how the stack was taken, and the point spread function that the renderer believes in
CONDITIONS: dict[str, tuple[Condition, PsfShape]] = {
    "clean": (Condition(bits=16), "disc"),
    "disc": (Condition(noise_std=0.01, bits=8), "disc"),
    "disc as gaussian": (Condition(noise_std=0.01, bits=8), "gaussian"),
    "2 % focus error": (Condition(noise_std=0.01, bits=8, focus_error=0.02), "disc"),
}
MODELS: tuple[Model, ...] = ("gather", "scatter", "occlusion")


def best_loss(
    frames: Tensor, aif: Tensor, depth: Tensor, focus: Tensor, kappa: Tensor, model: Model, psf: PsfShape
) -> float:
    """Charbonnier loss of the stack at this depth with the sharp image fitted to it."""
    aif = aif.clone().requires_grad_()
    optimizer = torch.optim.Adam([aif], lr=STEP_SIZE)
    least = float("inf")
    for step in range(STEPS + 1):
        rendered = render_stack(aif[None], depth[None, None], focus[None], kappa[None], model=model, psf=psf)[0]
        loss = charbonnier(rendered, frames)
        least = min(least, float(loss.detach()))
        if step < STEPS:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return least


def losses_of(name: str, condition: str, models: tuple[Model, ...]) -> dict[str, dict[str, float]]:
    """Loss of every candidate depth under every model, for one scene."""
    taken, psf = CONDITIONS[condition]
    foundation_stacks.STACK_CONDITIONS[condition] = taken
    stack = foundation_stack(half_size_scene(name), "dslr", condition)
    frames = torch.from_numpy(np.ascontiguousarray(stack.frames.transpose(0, 3, 1, 2)))
    focus, kappa = (torch.tensor(values, dtype=torch.float32) for values in (stack.focus_dpt, stack.kappa))
    swept = plane_sweep(frames, focus, kappa)
    truth = stack.scene.filled_inverse_depth_dpt().astype(np.float32)
    candidates = {
        "truth": torch.from_numpy(truth),
        "smoothed": torch.from_numpy(cv2.GaussianBlur(truth, (0, 0), SMOOTHING_PX)),
        "sweep": swept.inverse_depth_dpt,
    }
    return {
        model: {
            candidate: best_loss(frames, swept.aif, depth, focus, kappa, model, psf)
            for candidate, depth in candidates.items()
        }
        for model in models
    }


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", nargs="*", default=None)
    parser.add_argument("--conditions", nargs="*", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--output", type=Path, default=Path("bench-results/forward_model.json"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = options.scenes or scene_names()
    print("truth has the lowest loss (scenes), and by how much the best other candidate is worse (mean)")
    print(f"{'condition':18s} {'model':10s} {'wins':>7s} {'margin':>8s}  goal >= {GOAL:.0%} for scatter and occlusion")
    rows = []
    for condition in options.conditions:
        found = []
        for name in names:
            start = time.process_time()
            found.append(losses_of(name, condition, tuple(options.models)))
            print(f"# {condition}, {name}: {time.process_time() - start:.0f} CPU s", flush=True)
        for model in options.models:
            margins = [
                min(loss for other, loss in scene[model].items() if other != "truth") / scene[model]["truth"] - 1
                for scene in found
            ]
            wins = sum(margin > 0 for margin in margins)
            met = "" if model == "gather" else ("met" if wins >= GOAL * len(names) else "MISSED")
            lost = ", ".join(name for name, margin in zip(names, margins, strict=True) if margin <= 0)
            print(
                f"{condition:18s} {model:10s} {wins:3d}/{len(names):2d} {np.mean(margins):+8.1%}  {met}"
                + (f"; lost: {lost}" if lost and model != "gather" else ""),
                flush=True,
            )
            rows.append({"condition": condition, "model": model, "wins": wins, "margins": margins, "scenes": names})
            losses = {name: scene[model] for name, scene in zip(names, found, strict=True)}
            rows[-1]["losses"] = losses
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
