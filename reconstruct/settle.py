"""How a refinement ends: a small network chooses, pixel by pixel, among the depths that were offered last.

Another has done so once on the way, so that what follows starts from its choice. Each was trained on what refinements
have come to where it chooses; the one that ends them, with the other's help.

Beside edges the misfit alone is a poor judge of a move. It is pooled over a window that both sides of the edge share,
and what a near object hides is guessed. How the misfits of several offers, the image and the depth's own shape go
together with the truth is the same in every scene, so it is learned once, on simulated ones (`settle_train.py`).

The network sees blur units and misfits relative to the picture's median, so it serves any lens. What chooses is not
told what the refinement started from: on simulated scenes the start is better than on captured ones, and a network that
was told learned to trust it (7 tuning scenes, disc: error against the start 0.76 with, 0.72 without). What says how
wrong the choice may be is told.

Letters: K offers, (H, W) pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reconstruct.checkpoint import load_weights

WEIGHTS = Path(__file__).parent / "weights" / "settle.safetensors"
MIDWAY_WEIGHTS = WEIGHTS.with_name("settle_midway.safetensors")
OFFERS = 8  # the moves of `RefineConfig`
LARGEST_CHANGE_PX = 1.0  # of blur std, beyond what was offered
KNOWN_STD_PX = 0.02, 10.0  # of a start; beyond them it says no more


class Closing(NamedTuple):
    """What a refinement knows in the end, or on the way; depths in px of blur std, misfits per pixel.

    Attributes:
        start_px: where it began, (H, W).
        start_std_px: how far wrong the start expected to be, (H, W); infinite where it did not say.
        depth_px: where the descent has come to, (H, W).
        settled_px: the same less what noise alone brings about.
        pooled_px: the same pooled along surfaces.
        here: misfit at `depth_px`, the image fitted to it, (H, W).
        shifted: misfits of the whole map nearer and farther by a little, nearer and farther by 1 px, (4, H, W).
        offers_px: depths that moves would make of it, (K, H, W).
        left: misfits at `depth_px`, then at the offers, with light for what near edges hide, (K + 1, H, W).
        root: the all-in-focus image as `root_of` it, (3, H, W).
    """

    start_px: Tensor
    start_std_px: Tensor
    depth_px: Tensor
    settled_px: Tensor
    pooled_px: Tensor
    here: Tensor
    shifted: Tensor
    offers_px: Tensor
    left: Tensor
    root: Tensor

    def candidates_px(self) -> Tensor:
        """Depths to choose among, (K + 2, H, W), the one to stay at first."""
        return torch.cat([self.settled_px[None], self.offers_px, self.pooled_px[None]])

    def start(self) -> Tensor:
        """Where it began and how sure it was, (2, H, W)."""
        return torch.stack([self.start_px, self.start_std_px])

    def signs(self) -> Tensor:
        """What the network sees, (C, H, W), all within a few units of 0."""
        depth = self.settled_px
        typical = self.here.median().clamp_min(1e-9)
        nearer, farther, near, far = (self.shifted - self.here) / typical
        gain = (self.left[1:] - self.left[0]) / typical
        gain = torch.where(self.offers_px == self.depth_px, 0.0, gain)  # nothing was offered there
        around = torch.stack([depth - _mean(depth[None], window)[0] for window in (5, 15)])
        parts = [
            _squashed(torch.stack([self.depth_px, self.pooled_px]) - depth, 0.1),
            _squashed(torch.stack([nearer - farther, nearer + farther, near, far]), 1.0),
            _squashed(self.here[None] / typical, 2.0),
            _squashed(around[:1], 0.5),
            _squashed(around[1:], 1.0),
            _squashed(self.offers_px - depth, 1.0),
            _squashed(gain, 1.0),
            _squashed(_mean(gain, 5), 0.5),
            *(4 * (self.root - _mean(self.root, window)) for window in (9, 3)),
        ]
        return torch.cat(parts)


SIGNS = 9 + 3 * OFFERS + 6
DOUBT_SIGNS = SIGNS + OFFERS + 5


class Settled(NamedTuple):
    """A depth and how far wrong it is expected to be (one standard deviation), px of blur std, (H, W) each."""

    depth_px: Tensor
    std_px: Tensor


class SettlingNet(nn.Module):
    """Depth is the mean of a few small networks, each trained from its own start on its own crops; another, told how
    sure the start was and how far they disagree, says how wrong that mean may be.
    """

    def __init__(self, width: int = 24, members: int = 5) -> None:
        super().__init__()
        self.members = nn.ModuleList(_Member(width) for _ in range(members))
        self.doubt = _Doubt(width)

    def forward(self, closing: Closing) -> Settled:
        """What becomes of the end of a refinement."""
        candidates_px = closing.candidates_px()[None]
        signs, start = closing.signs()[None], closing.start()[None]
        depths_px = self.depths_px(signs, candidates_px)
        std_px = self.doubt(signs, candidates_px, start, depths_px)
        return Settled(depths_px.mean(0)[0], std_px[0])

    def depths_px(self, signs: Tensor, candidates_px: Tensor) -> Tensor:
        """Every member's depth, (M, B, H, W), from (B, C, H, W) and (B, K + 2, H, W)."""
        return torch.stack([member(signs, candidates_px) for member in self.members])


class _Layers(nn.Module):
    """Convolutions at full size; each but the first and last adds to what it got, looking `reaches` pixels far."""

    def __init__(self, inputs: int, width: int, outputs: int, reaches: tuple[int, ...]) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, width, 3, 1, 1)
        self.more = nn.ModuleList(nn.Conv2d(width, width, 3, 1, reach, reach) for reach in reaches)
        self.last = nn.Conv2d(width, outputs, 1)
        nn.init.normal_(self.last.weight, std=1e-3)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(x), 0.1)
        for layer in self.more:
            x = x + F.leaky_relu(layer(x), 0.1)
        return self.last(x)


class _Member(_Layers):
    """Shares of the candidates, and a bounded change beyond them."""

    def __init__(self, width: int) -> None:
        super().__init__(SIGNS, width, OFFERS + 3, (2, 4, 2, 1))
        with torch.no_grad():
            self.last.bias[0] = 3.0  # type: ignore[index]  # untrained, it nearly stays

    def forward(self, signs: Tensor, candidates_px: Tensor) -> Tensor:  # type: ignore[override]
        """(B, H, W), px of blur std."""
        *shares, beyond = super().forward(signs).split([OFFERS + 2, 1], 1)
        chosen = (shares[0].softmax(1) * candidates_px).sum(1)
        return chosen + LARGEST_CHANGE_PX * torch.tanh(beyond[:, 0])


class _Doubt(_Layers):
    """The std of the error that is left: the start's, changed by a factor."""

    def __init__(self, width: int) -> None:
        super().__init__(DOUBT_SIGNS, width, 1, (2, 4, 8, 2, 1))

    def forward(self, signs: Tensor, candidates_px: Tensor, start: Tensor, depths_px: Tensor) -> Tensor:  # type: ignore[override]
        """(B, H, W), px of blur std, from the signs, the candidates, `Closing.start` and the members' depths."""
        start_px, start_std_px = start[:, :1], start[:, 1:].clamp(*KNOWN_STD_PX)
        depth_px = depths_px.mean(0)[:, None]
        parts = [
            signs,
            start_std_px.log(),
            _squashed(depth_px - torch.cat([candidates_px, start_px], 1), 0.3),
            (depths_px.std(0, correction=0)[:, None] + 0.003).log() + 3,
        ]
        gain = super().forward(torch.cat(parts, 1)).clamp(-4, 4)
        return (start_std_px * gain.exp())[:, 0]


Choice = Callable[[Closing], Settled]


def settle(closing: Closing) -> Settled:
    """What the shipped network makes of a refinement's end."""
    return _settled_by(WEIGHTS, closing)


def settle_midway(closing: Closing) -> Settled:
    """What the shipped network makes of the last moves before the end."""
    return _settled_by(MIDWAY_WEIGHTS, closing)


@torch.no_grad()
def _settled_by(weights: Path, closing: Closing) -> Settled:
    """Where other moves were offered than the network learned to judge, the depth stays."""
    if len(closing.offers_px) != OFFERS:
        return stay(closing)
    settled: Settled = _shipped(weights, closing.depth_px.device)(closing)
    return settled


def stay(closing: Closing) -> Settled:
    """The depth where the descent ended, noise taken back: nothing learned, for whoever must not use it.

    A pixel that had to move far was, and may still be, less sure than its start said.
    """
    depth_px = closing.settled_px
    return Settled(depth_px, torch.hypot(closing.start_std_px, (depth_px - closing.start_px) / 2))


LEARNED: tuple[Choice, ...] = settle_midway, settle  # what `refine` chooses by


@lru_cache(maxsize=2)
def _shipped(weights: Path, device: torch.device) -> SettlingNet:
    return load_settling(weights, device)


def load_settling(path: Path, device: torch.device) -> SettlingNet:
    """The network in a weights file; DataError if it is missing, damaged or holds something else."""
    tensors, about = load_weights(path, "settle")
    net = SettlingNet(about["recipe"]["width"], about["recipe"]["members"])
    net.load_state_dict(tensors)
    return net.to(device).eval()


def _mean(x: Tensor, window_px: int) -> Tensor:
    """(C, H, W) averaged over a square window, of which only what lies inside the image counts."""
    return F.avg_pool2d(x[None], window_px, 1, window_px // 2, count_include_pad=False)[0]


def _squashed(x: Tensor, scale: float) -> Tensor:
    return x / (scale + x.abs())
