"""Trains the networks that choose depths in a refinement (`settle.py`) on simulated stacks, whose truth is known.

`daif train --recipe refinement` makes the shipped weights of the one that chooses in the end; with `midway: false` and
the rest of `configs/train/refinement_midway.yaml`, those of the one on the way, which comes first, as the stacks of the
other are refined with its help. Those take some ten seconds each, crowded ones twenty; of the one on the way they are
refined to where it chooses, in half the time. They are kept in the pool and are not made again; learning from
them takes less than an hour. What each part of a network learned is kept in the run, so an interrupted run goes on with
the next part.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from capture.errors import UsageError
from reconstruct.checkpoint import load_weights, save_weights
from reconstruct.dataset import PHOTOGRAPHS, render_scene, training_stack, turned
from reconstruct.losses import laplace_surprise
from reconstruct.metrics import confidence_errors
from reconstruct.plane_sweep import plane_sweep
from reconstruct.predict import load_network, predict
from reconstruct.refine import EDGE_PX, RefineConfig, refine
from reconstruct.settle import MIDWAY_WEIGHTS, Closing, SettlingNet, load_settling, settle_midway, stay
from reconstruct.train import Average, display

FRAMES, FRAMES_SHARE = (3, 4, 5, 6, 7), (0.14, 0.2, 0.42, 0.14, 0.1)
LOG_EVERY = 20
LEAST_ERROR_PX = 0.05  # a stack's errors count relative to its start's, and to no less than this
LEAST_DOUBT_PX = 0.01  # added to every error that the std is learned from
UNTOLD_SHARE = 0.1  # of the crops: the start does not say how sure it is
PART = "part of settle"  # preset of what an unfinished run keeps
FEW_EDGES = 0.01  # share of a stack's pixels: of stacks with far fewer, edges do not decide how often they are seen
UNSEEN_SHARE = 0.1  # of the signs, for a member in training: it shall not rely on single ones


class SettleRecipe(BaseModel):
    """Everything the weights depend on, apart from the network that refinement starts from."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    seed: int = 78
    scenes: int = Field(350, ge=2, description="simulated stacks, refined from the network's answer")
    from_sweep: int = Field(50, ge=0, description="more of them, refined from the plane sweep's")
    crowded: int = Field(120, ge=0, description="more of them, from the network's, with much in each picture")
    held_out: int = Field(12, ge=1, description="of them, the first, for validation only")
    scene_px: int = Field(208, ge=32)
    stack_px: int = Field(144, ge=32, description="side of the refined stacks")
    crop_px: int = Field(112, ge=32)
    refine_steps: int = Field(25, ge=2)
    midway: bool = Field(True, description="the shipped network chooses once on the way; false makes that network")
    steps: int = Field(1200, ge=1)
    batch: int = Field(4, ge=1)
    learning_rate: float = Field(3e-3, gt=0)
    warmup_steps: int = Field(50, ge=1)
    weight_decay: float = Field(1e-3, ge=0)
    ema_decay: float = Field(0.998, ge=0, lt=1)
    width: int = Field(24, ge=1)
    members: int = Field(5, ge=1)

    @property
    def stacks(self) -> int:
        """How many are simulated."""
        return self.scenes + self.from_sweep + self.crowded

    @model_validator(mode="after")
    def _fits(self) -> SettleRecipe:
        if self.scenes <= self.held_out:
            raise ValueError(f"scenes ({self.scenes}) must be more than held_out ({self.held_out})")
        if not self.crop_px <= self.stack_px <= self.scene_px:
            raise ValueError("crop_px must be at most stack_px, and that at most scene_px")
        return self


class Ending(NamedTuple):
    """One refined stack: what the network sees, what it chooses among, the start, the truth.

    Depths in px of blur std; `signs` (C, H, W), `candidates_px` (K + 2, H, W), `start` as `Closing.start`, `true_px`
    (H, W).
    """

    signs: Tensor
    candidates_px: Tensor
    start: Tensor
    true_px: Tensor


class _Kept(Exception):
    """Raised to end a refinement where its choice would be made."""

    def __init__(self, closing: Closing) -> None:
        self.closing = closing


def _keep(closing: Closing) -> NoReturn:
    raise _Kept(closing)


def refined_stack(recipe: SettleRecipe, pool: Path, index: int) -> Path:
    """Simulate stack `index` and refine it to where the network will choose, which is kept in `pool`."""
    crowded = index >= recipe.scenes + recipe.from_sweep
    swept = index >= recipe.scenes and not crowded
    network = None if swept else load_network("default", torch.device("cpu"))
    begun = "sweep" if network is None else network.identity.replace(" ", "-")
    name = f"{'crowded-' if crowded else ''}{begun}-{index:06d}.safetensors"
    path = pool / _pool_name(recipe) / name
    if path.with_suffix(".json").exists():
        return path
    rng = np.random.default_rng([recipe.seed, index, 5])
    count = int(rng.choice(FRAMES, p=FRAMES_SHARE))
    scene = render_scene((recipe.seed, index), recipe.scene_px, crowded=crowded)
    stack = training_stack(scene, rng, count, recipe.stack_px)
    frames, focus, kappa, true, _ = (torch.from_numpy(x) for x in stack)
    start = plane_sweep(frames, focus, kappa) if network is None else predict(network, frames, focus, kappa)
    choices = (settle_midway, _keep) if recipe.midway else (_keep, stay)
    try:
        refine(frames, focus, kappa, start, steps=recipe.refine_steps, choices=choices)
    except _Kept as kept:
        maps = kept.closing._asdict() | {"true_px": true[0] * kappa.abs().mean() / 4}
    save_weights(path, {name: x.contiguous() for name, x in maps.items()}, {"preset": "closing"})
    return path


def _pool_name(recipe: SettleRecipe) -> str:
    """Of the folder that holds the stacks of this recipe; it tells apart all settings of refinement."""
    settings = hashlib.sha256(repr(RefineConfig()).encode()).hexdigest()[:12]
    where = f"after-{_midway_identity()}" if recipe.midway else "midway"
    return f"seed{recipe.seed}-{recipe.stack_px}px-{recipe.refine_steps}-settings-{settings}-{where}"


def read_closing(path: Path) -> tuple[Closing, Tensor]:
    """What `refined_stack` kept: the refinement's end and the true depth, px of blur std."""
    maps, _ = load_weights(path, "closing")
    true_px = maps.pop("true_px")
    return Closing(**maps), true_px


def train_settling(recipe: SettleRecipe, run: Path, pool: Path) -> Path:
    """Train a new network; returns the weights file in `run`. Stacks that `pool` lacks are made first, on all cores."""
    made = run / "settle.safetensors"
    if made.exists() and load_weights(made, "settle")[1].get("recipe") != recipe.model_dump():
        raise UsageError(f"{made} was made by another recipe; use another -o")
    torch.manual_seed(recipe.seed)
    net = SettlingNet(recipe.width, recipe.members)
    if recipe.midway:
        _go_on_from_midway(net, recipe)
    paths = _refined_stacks(recipe, pool)
    held_out = [read_closing(path) for path in itertools.islice(paths, recipe.held_out)]
    closings = map(read_closing, paths)
    own = [Ending(x.signs(), x.candidates_px(), x.start(), true_px) for x, true_px in closings]
    about = {
        "teacher": "supervised by simulated truth; no captured stack, no photograph with depth",
        "data": f"procedural scenes; textures: drawn patterns and scikit-image's {', '.join(PHOTOGRAPHS)}",
        "started_from": load_network("default", torch.device("cpu")).identity,
        "midway": _midway_identity() if recipe.midway else None,
        "recipe": recipe.model_dump(),
    }
    for index, member in enumerate(net.members):
        rng = np.random.default_rng([recipe.seed, 6, index])
        learn = partial(learn_to_choose, member, own, rng, recipe)
        _once(learn, member, run / "parts" / f"member-{index}.safetensors", about)
    learn = partial(learn_to_doubt, net, own, np.random.default_rng([recipe.seed, 7]), recipe)
    _once(learn, net.doubt, run / "parts" / "doubt.safetensors", about)
    about = {"preset": "settle", **about, "validation": validate(net, held_out)}
    save_weights(made, net.state_dict(), about)
    return made


def learn_to_choose(member: nn.Module, own: Sequence[Ending], rng: np.random.Generator, recipe: SettleRecipe) -> None:
    """Train one member, which must do without some of the signs at every crop; most errors lie beside depth edges."""
    often = edge_shares(own)

    def depth_error() -> Tensor:
        """Relative to the start's."""
        crops, scale_px = _batch(own, rng, recipe, often)
        seen = torch.from_numpy(rng.random(crops.signs.shape[:2]) >= UNSEEN_SHARE)
        signs = crops.signs * seen[..., None, None] / (1 - UNSEEN_SHARE)
        off_px = member(signs, crops.candidates_px) - crops.true_px
        return (off_px.abs() / scale_px[:, None, None]).mean()

    _descend(member, depth_error, recipe)


def learn_to_doubt(net: SettlingNet, own: Sequence[Ending], rng: np.random.Generator, recipe: SettleRecipe) -> None:
    """Train what says how wrong the members' mean may be; some starts do not say how sure they are."""

    def surprise() -> Tensor:
        """At the errors that the members leave."""
        crops, _ = _batch(own, rng, recipe)
        untold = torch.from_numpy(rng.random(recipe.batch) < UNTOLD_SHARE)
        crops.start[untold, 1] = torch.inf
        with torch.no_grad():
            depths_px = net.depths_px(crops.signs, crops.candidates_px)
        std_px = net.doubt(crops.signs, crops.candidates_px, crops.start, depths_px)
        return laplace_surprise((depths_px.mean(0) - crops.true_px).abs() + LEAST_DOUBT_PX, std_px).mean()

    _descend(net.doubt, surprise, recipe)


def _go_on_from_midway(net: SettlingNet, recipe: SettleRecipe) -> None:
    """What chooses on the way has learned most of what choosing in the end takes."""
    known = load_settling(MIDWAY_WEIGHTS, torch.device("cpu"))
    width, members = known.doubt.first.out_channels, len(known.members)
    if recipe.width != width or recipe.members > members:
        raise UsageError(
            f"the recipe asks for {recipe.members} networks of width {recipe.width}; the shipped ones that it goes on"
            f" from are {members} of width {width}: set these, or midway: false"
        )
    state = known.state_dict()
    net.load_state_dict({name: state[name] for name in net.state_dict()})


@cache
def _midway_identity() -> str:
    return str(load_weights(MIDWAY_WEIGHTS, "settle")[1]["sha256"])[:12]


def _once(learn: Callable[[], None], part: nn.Module, path: Path, about: dict[str, Any]) -> None:
    """Let `part` learn, unless an earlier start of the same run has kept in `path` what it learned."""
    about = {"preset": PART, **about}
    if path.with_suffix(".json").exists():
        tensors, known = load_weights(path, PART)
        if about.items() <= known.items():
            part.load_state_dict(tensors)
            return
    learn()
    save_weights(path, part.state_dict(), about)


def _descend(part: nn.Module, loss_of: Callable[[], Tensor], recipe: SettleRecipe) -> None:
    """Leave `part` with the running average of its weights on the way down."""
    optimizer = torch.optim.AdamW(part.parameters(), recipe.learning_rate, weight_decay=recipe.weight_decay)
    average = Average(part, recipe.ema_decay)
    with display(recipe.steps, 0, quiet=False) as show:
        for step in range(recipe.steps):
            falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate * falling * min(1.0, (step + 1) / recipe.warmup_steps)
            loss = loss_of()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(part.parameters(), 1.0)
            optimizer.step()
            average.update(part, step)
            done = step + 1
            show.step(done, {loss_of.__name__: float(loss.detach())}, recipe.batch, log=done % LOG_EVERY == 0)
    part.load_state_dict(average.tensors)


@torch.no_grad()
def validate(net: SettlingNet, ends: Sequence[tuple[Closing, Tensor]]) -> dict[str, float]:
    """Means over stacks: the error relative to the start's, without and with the network's choice in the end; the
    share of errors within one std; the share of the error that the surest 70 % of the pixels are spared.
    """
    rows = []
    for closing, true_px in ends:
        settled = net(closing)
        start, alone, chosen = (
            (x - true_px).abs().mean() for x in (closing.start_px, closing.settled_px, settled.depth_px)
        )
        maps = settled.depth_px, settled.std_px, -settled.std_px, 1 / true_px
        doubt = confidence_errors(*(x.numpy() for x in maps))
        rows.append([float(alone / start), float(chosen / start), doubt["coverage"], doubt["kept70_cut"]])
    names = "refined_to_start", "chosen_to_start", "coverage", "kept70_cut"
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def _refined_stacks(recipe: SettleRecipe, pool: Path) -> Iterator[Path]:
    context = multiprocessing.get_context("spawn")
    workers = ProcessPoolExecutor(os.cpu_count(), context, _single_threaded)
    with workers as processes, display(recipe.stacks, 0, quiet=False) as show:
        paths = processes.map(partial(refined_stack, recipe, pool), range(recipe.stacks))
        try:
            for done, path in enumerate(paths, 1):
                show.step(done, {}, 1, log=done % LOG_EVERY == 0)
                yield path
        finally:
            processes.shutdown(wait=False, cancel_futures=True)  # those in hand are finished, and kept


def _single_threaded() -> None:
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


def edge_shares(endings: Sequence[Ending]) -> NDArray[np.float64]:
    """How often each stack is seen: the more depth edges, the oftener, but plain ones remain; (N,), their sum 1.

    Seen in proportion to their edges alone, plain stacks got worse: by a third of their error and more.
    """
    often = np.array([FEW_EDGES + _edges(ending.true_px) for ending in endings])
    shares: NDArray[np.float64] = often / often.sum()
    return shares


def _edges(depth_px: Tensor) -> float:
    """Share of the steps from pixel to pixel, along rows and columns alike, at which a surface ends."""
    return float(np.mean([float((depth_px.diff(dim=axis).abs() > EDGE_PX).float().mean()) for axis in (0, 1)]))


def _batch(
    endings: Sequence[Ending], rng: np.random.Generator, recipe: SettleRecipe, often: NDArray[np.float64] | None = None
) -> tuple[Ending, Tensor]:
    """Crops of random stacks, mirrored and turned, and what the errors of each count relative to, (B,).

    `often` says how often each stack comes, (N,); without it, all alike.
    """
    crops, scales = [], []
    for ending in (endings[i] for i in rng.choice(len(endings), recipe.batch, p=often)):
        top, left = rng.integers(0, recipe.stack_px - recipe.crop_px + 1, 2)
        turns, mirrored = int(rng.integers(4)), rng.random() < 0.5
        window = (..., slice(top, top + recipe.crop_px), slice(left, left + recipe.crop_px))
        crops.append([turned(x[window], turns, mirrored) for x in ending])
        scales.append((ending.start[0] - ending.true_px).abs().mean() + LEAST_ERROR_PX)
    return Ending(*map(torch.stack, zip(*crops, strict=True))), torch.stack(scales)
