"""Trains the network that ends a refinement (`settle.py`): simulated stacks are refined, and their truth is known.

`daif train --recipe refinement` makes the shipped weights: the stacks take some ten seconds each, are kept in the pool
and are not made again; learning from them takes minutes.
"""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from reconstruct.checkpoint import load_weights, save_weights
from reconstruct.dataset import PHOTOGRAPHS, render_scene, training_stack, turned
from reconstruct.predict import load_network, predict
from reconstruct.refine import refine
from reconstruct.settle import Closing, SettlingNet, stay
from reconstruct.train import Average, display

FRAMES, FRAMES_SHARE = (3, 4, 5, 6, 7), (0.14, 0.2, 0.42, 0.14, 0.1)
LOG_EVERY = 20
LEAST_ERROR_PX = 0.05  # a stack's errors count relative to its start's, and to no less than this


class SettleRecipe(BaseModel):
    """Everything the weights depend on, apart from the network that refinement starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 77
    scenes: int = Field(440, ge=2, description="simulated stacks")
    held_out: int = Field(12, ge=1, description="of them, the first, for validation only")
    scene_px: int = Field(208, ge=32)
    stack_px: int = Field(144, ge=32, description="side of the refined stacks")
    crop_px: int = Field(112, ge=32)
    refine_steps: int = Field(25, ge=1)
    steps: int = Field(2500, ge=1)
    batch: int = Field(4, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    warmup_steps: int = Field(50, ge=1)
    weight_decay: float = Field(1e-3, ge=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    width: int = Field(16, ge=1)
    members: int = Field(3, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> SettleRecipe:
        if self.scenes <= self.held_out:
            raise ValueError(f"scenes ({self.scenes}) must be more than held_out ({self.held_out})")
        if not self.crop_px <= self.stack_px <= self.scene_px:
            raise ValueError("crop_px must be at most stack_px, and that at most scene_px")
        return self


class Ending(NamedTuple):
    """One refined stack: what the network sees, what it chooses among, the truth, and the error of the start.

    Depths in px of blur std; `signs` (C, H, W), `candidates_px` (K + 2, H, W), `true_px` (H, W).
    """

    signs: Tensor
    candidates_px: Tensor
    true_px: Tensor
    start_error_px: float

    def error_px(self, depth_px: Tensor) -> float:
        """Mean absolute error of a depth map."""
        return float((depth_px - self.true_px).abs().mean())


def refined_stack(recipe: SettleRecipe, pool: Path, index: int) -> Path:
    """Simulate stack `index` and refine it; the end of that is kept in `pool`."""
    path = pool / f"seed{recipe.seed}-{recipe.stack_px}px-{recipe.refine_steps}" / f"{index:06d}.safetensors"
    if path.with_suffix(".json").exists():
        return path
    rng = np.random.default_rng([recipe.seed, index, 5])
    count = int(rng.choice(FRAMES, p=FRAMES_SHARE))
    scene = render_scene((recipe.seed, index), recipe.scene_px)
    stack = training_stack(scene, rng, count, recipe.stack_px)
    frames, focus, kappa, true, _ = (torch.from_numpy(x) for x in stack)
    start = predict(load_network("default", frames.device), frames, focus, kappa)
    ends: list[Closing] = []

    def keep(closing: Closing) -> Tensor:
        ends.append(closing)
        return stay(closing)

    refine(frames, focus, kappa, start, steps=recipe.refine_steps, conclude=keep)
    px_per_dpt = kappa.abs().mean() / 4
    maps = ends[0]._asdict() | {"true_px": true[0] * px_per_dpt, "start_px": start.inverse_depth_dpt * px_per_dpt}
    save_weights(path, {name: x.contiguous() for name, x in maps.items()}, {"preset": "closing"})
    return path


def read_ending(path: Path) -> Ending:
    """What `refined_stack` kept."""
    maps, _ = load_weights(path, "closing")
    true, start = maps.pop("true_px"), maps.pop("start_px")
    closing = Closing(**maps)
    return Ending(closing.signs(), closing.candidates_px(), true, float((start - true).abs().mean()))


def train_settling(recipe: SettleRecipe, run: Path, pool: Path) -> Path:
    """Train a new network; returns the weights file in `run`. Stacks that `pool` lacks are made first, on all cores."""
    endings = [read_ending(path) for path in _refined_stacks(recipe, pool)]
    held_out, own = endings[: recipe.held_out], endings[recipe.held_out :]
    torch.manual_seed(recipe.seed)
    net = SettlingNet(recipe.width, recipe.members)
    optimizer = torch.optim.AdamW(net.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    average = Average(net, recipe.ema_decay)
    rng = np.random.default_rng([recipe.seed, 6])
    with display(recipe.steps, 0, quiet=False) as show:
        for step in range(recipe.steps):
            falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * falling * min(1.0, (step + 1) / recipe.warmup_steps)
            losses = []
            for member in net.members:
                signs, candidates, true, scale = _batch(own, rng, recipe)
                losses.append(((member(signs, candidates) - true).abs() / scale[:, None, None]).mean())
            loss = torch.stack(losses).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            average.update(net, step)
            show.step(step + 1, {"error": float(loss.detach())}, recipe.batch, log=(step + 1) % LOG_EVERY == 0)
    net.load_state_dict(average.tensors)
    about = {
        "preset": "settle",
        "teacher": "supervised by simulated truth; no captured stack, no photograph with depth",
        "data": f"procedural scenes; textures: drawn patterns and scikit-image's {', '.join(PHOTOGRAPHS)}",
        "started_from": load_network("default", torch.device("cpu")).identity,
        "recipe": recipe.model_dump(),
        "validation": validate(net, held_out),
    }
    save_weights(run / "settle.safetensors", average.tensors, about)
    return run / "settle.safetensors"


@torch.no_grad()
def validate(net: SettlingNet, endings: Sequence[Ending]) -> dict[str, float]:
    """Mean over stacks of the error relative to the start's: of the refinement alone, and with the network's choice."""
    alone = [e.error_px(e.candidates_px[0]) / e.start_error_px for e in endings]
    chosen = [e.error_px(net(e.signs[None], e.candidates_px[None])[0]) / e.start_error_px for e in endings]
    return {"refined_to_start": float(np.mean(alone)), "chosen_to_start": float(np.mean(chosen))}


def _refined_stacks(recipe: SettleRecipe, pool: Path) -> Iterator[Path]:
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(os.cpu_count(), context, _single_threaded)
    with workers as processes, display(recipe.scenes, 0, quiet=False) as show:
        paths = processes.map(partial(refined_stack, recipe, pool), range(recipe.scenes))
        for done, path in enumerate(paths, 1):
            show.step(done, {}, 1, log=done % LOG_EVERY == 0)
            yield path


def _single_threaded() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def _batch(endings: Sequence[Ending], rng: np.random.Generator, recipe: SettleRecipe) -> Sequence[Tensor]:
    """Crops of random stacks, mirrored and turned: signs, candidates, truth, and what errors count relative to."""
    crops = []
    for ending in (endings[i] for i in rng.integers(0, len(endings), recipe.batch)):
        top, left = rng.integers(0, recipe.stack_px - recipe.crop_px + 1, 2)
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        maps = []
        for x in ending[:3]:
            maps.append(turned(x[..., top : top + recipe.crop_px, left : left + recipe.crop_px], turns, mirrored))
        crops.append([*maps, torch.tensor(ending.start_error_px + LEAST_ERROR_PX)])
    return [torch.stack(x) for x in zip(*crops, strict=True)]
