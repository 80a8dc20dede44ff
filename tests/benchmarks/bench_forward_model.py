"""Does the true depth have the lowest loss? Truth against a smoothed truth and our own estimates, for every renderer.

    python -m tests.benchmarks forward_model

Stacks are aperture-sampled (`capture/optics.py`), which no renderer here shares. Every candidate depth gets the sharp
image that suits it best: STEPS of `refine`'s own image descent from the plane sweep's image, depth fixed
(`notes/forward-model.md` section 1); under `occlusion` background that near edges hide, derived from every candidate
the same way, is fitted along. Judged is the window of each scene with most depth edges, where the models differ;
a margin as wide as the widest blur does not count, since light from outside the window reaches it.

Wins are counted over everything. The last column leaves out, for every candidate alike, values with light that reached
the lens round a near surface from background that the sharp view does not show. It tells how much of a loss is due to
that, and is no goal: only the simulator knows where such light is, and as it lies beside the truth's own edges, leaving
it out favours the truth. `--without-hidden` has one layer of depth and image only, which cannot give such light.

Self-supervision is worth as much as this table says. Results go to bench-results/forward_model.json.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch import Tensor

from capture.optics import CONDITIONS as CAMERA_CONDITIONS
from capture.optics import ApertureRenderer, Condition
from reconstruct.denoise import root_of
from reconstruct.estimate import Estimate
from reconstruct.misfit import Misfit
from reconstruct.plane_sweep import plane_sweep
from reconstruct.predict import load_network, predict
from reconstruct.render import Model
from reconstruct.spectrum import PsfShape
from tests.benchmarks import foundation_stacks
from tests.benchmarks.foundation_stacks import (
    DSLR_MAX_COC_PX,
    FoundationStack,
    foundation_stack,
    half_size_scene,
    scene_names,
)

STEPS = 12
SMOOTHING_PX = 2.0
WINDOW_PX = (136, 176)
MARGIN_PX = math.ceil(DSLR_MAX_COC_PX / 2)
HIDDEN_SHARE = 0.01  # of a value's light
GOAL = 0.9
# name: how the stack was taken, and the point spread function that the renderer believes in
CONDITIONS: dict[str, tuple[Condition, PsfShape]] = {
    "disc": (Condition(noise_std=0.01, bits=8), "disc"),
    "gaussian": (CAMERA_CONDITIONS["noisy"], "gaussian"),
    "disc as gaussian": (Condition(noise_std=0.01, bits=8), "gaussian"),
    "2 % focus error": (Condition(noise_std=0.01, bits=8, focus_error=0.02), "disc"),
}
MODELS: tuple[Model, ...] = ("gather", "scatter", "occlusion")


def best_misfit(
    frames: Tensor,
    start: Tensor,
    depth: Tensor,
    focus: Tensor,
    kappa: Tensor,
    model: Model,
    psf: PsfShape,
    hidden: bool,
) -> Tensor:
    """Charbonnier difference of the stack at this depth with the sharp image fitted to it, (S, 3, H, W)."""
    misfit = Misfit(frames, focus, kappa, model=model, psf=psf)
    root = root_of(start)
    if hidden and model == "occlusion":
        root = misfit.with_hidden(root, depth)
    return misfit.fitted(root, depth, STEPS)[1]


def hidden_share(stack: FoundationStack, taken: Condition) -> np.ndarray:
    """Share of each value's light that came from background hidden in the sharp view, (S, H, W)."""
    renderer = ApertureRenderer(stack.scene, float(stack.kappa.max()))
    renderer.fine, renderer.hidden_aif = np.zeros_like(renderer.fine), np.ones_like(renderer.hidden_aif)
    settings = zip(stack.focus_dpt, stack.kappa, strict=True)
    return np.stack([renderer.frame(float(q), float(k), psf=taken.psf)[..., 0] for q, k in settings])


def busiest_window(inverse_depth: np.ndarray) -> tuple[slice, slice]:
    """Where a window of WINDOW_PX holds most depth edges."""
    height, width = WINDOW_PX
    steps = np.abs(cv2.Sobel(inverse_depth, cv2.CV_32F, 1, 0)) + np.abs(cv2.Sobel(inverse_depth, cv2.CV_32F, 0, 1))
    edges = np.pad(np.minimum(steps, np.quantile(steps, 0.98)).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    inside = edges[height:, width:] - edges[:-height, width:] - edges[height:, :-width] + edges[:-height, :-width]
    top, left = np.unravel_index(np.argmax(inside), inside.shape)
    return slice(int(top), int(top) + height), slice(int(left), int(left) + width)


def losses_of(name: str, condition: str, models: tuple[Model, ...], hidden: bool) -> dict[str, dict[str, list[float]]]:
    """Loss of every candidate depth under every model, for one scene: of all values, and without hidden light."""
    taken, psf = CONDITIONS[condition]
    foundation_stacks.STACK_CONDITIONS[condition] = taken
    stack = foundation_stack(half_size_scene(name), "dslr", condition)
    frames = torch.from_numpy(np.ascontiguousarray(stack.frames.transpose(0, 3, 1, 2)))
    focus, kappa = (torch.tensor(values, dtype=torch.float32) for values in (stack.focus_dpt, stack.kappa))
    answers: dict[str, Estimate] = {
        "sweep": plane_sweep(frames, focus, kappa),
        "network": predict(load_network("default", torch.device("cpu")), frames, focus, kappa),
    }
    truth = stack.scene.filled_inverse_depth_dpt().astype(np.float32)
    candidates = {
        "truth": torch.from_numpy(truth),
        "smoothed": torch.from_numpy(cv2.GaussianBlur(truth, (0, 0), SMOOTHING_PX)),
    } | {name: answer.inverse_depth_dpt for name, answer in answers.items()}
    window = (..., *busiest_window(truth))
    aif = answers["sweep"].aif[window]
    shown = torch.from_numpy(hidden_share(stack, taken)[window] < HIDDEN_SHARE)
    inner = (..., slice(MARGIN_PX, -MARGIN_PX), slice(MARGIN_PX, -MARGIN_PX))
    losses: dict[str, dict[str, list[float]]] = {model: {} for model in models}
    for model in models:
        for candidate, depth in candidates.items():
            misfit = best_misfit(frames[window], aif, depth[window], focus, kappa, model, psf, hidden)[inner].mean(1)
            losses[model][candidate] = [float(misfit.mean()), float(misfit[shown[inner]].mean())]
    return losses


def margins_of(losses: dict[str, list[float]]) -> list[float]:
    """By how much the best other candidate is worse than the truth, for both losses."""
    others = zip(*(both for candidate, both in losses.items() if candidate != "truth"), strict=True)
    return [min(other) / truth - 1 for other, truth in zip(others, losses["truth"], strict=True)]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--scenes", nargs="*", default=None)
    parser.add_argument("--conditions", nargs="*", default=list(CONDITIONS), choices=list(CONDITIONS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--without-hidden", action="store_true", help="occlusion as one layer of depth and image")
    parser.add_argument("--output", type=Path, default=Path("bench-results/forward_model.json"))
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = options.scenes or scene_names()
    print("truth has the lowest loss (scenes), and by how much the best other candidate is worse (mean)")
    print(f"{'condition':18s} {'model':10s} {'wins':>7s} {'margin':>8s}  goal >= {GOAL:.0%} for occlusion")
    rows = []
    for condition in options.conditions:
        found = []
        for name in names:
            start = time.process_time()
            found.append(losses_of(name, condition, tuple(options.models), not options.without_hidden))
            print(f"# {condition}, {name}: {time.process_time() - start:.0f} CPU s", flush=True)
        for model in options.models:
            margins, shown = zip(*(margins_of(scene[model]) for scene in found), strict=True)
            wins, wins_shown = (sum(margin > 0 for margin in over) for over in (margins, shown))
            met = "" if model != "occlusion" else ("met" if wins >= GOAL * len(names) else "MISSED")
            lost = ", ".join(name for name, margin in zip(names, margins, strict=True) if margin <= 0)
            print(
                f"{condition:18s} {model:10s} {wins:3d}/{len(names):2d} {np.mean(margins):+8.1%}  {met:6s}"
                f"  without hidden light {wins_shown:2d}, {np.mean(shown):+.1%}"
                + (f"; lost: {lost}" if lost and model == "occlusion" else ""),
                flush=True,
            )
            rows.append({"condition": condition, "model": model, "wins": wins, "margins": margins, "scenes": names})
            rows[-1]["margins_without_hidden_light"] = shown
            losses = {name: scene[model] for name, scene in zip(names, found, strict=True)}
            rows[-1]["losses"] = losses
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    import sys

    main(sys.argv[1:])
