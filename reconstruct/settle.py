"""How a refinement ends: a small network chooses, pixel by pixel, among the depths that were offered last.

Beside edges the misfit alone is a poor judge of a move. It is pooled over a window that both sides of the edge share,
and what a near object hides is guessed. How the misfits of several offers, the image and the depth's own shape go
together with the truth is the same in every scene, so it is learned once, on simulated ones (`settle_train.py`).

The network sees blur units and misfits relative to the picture's median, so it serves any lens. It is not told what
the refinement started from: on simulated scenes the start is better than on captured ones, and a network that was told
learned to trust it (7 tuning scenes, disc: error against the start 0.76 with, 0.72 without).

Letters: K offers, (H, W) pixels.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reconstruct.checkpoint import load_weights

WEIGHTS = Path(__file__).parent / "weights" / "settle.safetensors"
OFFERS = 8  # the moves of `RefineConfig`
LARGEST_CHANGE_PX = 1.0  # of blur std, beyond what was offered


class Closing(NamedTuple):
    """What a refinement knows in the end; depths in px of blur std, misfits per pixel.

    Attributes:
        depth_px: where the descent ended, (H, W).
        settled_px: the same less what noise alone brings about.
        pooled_px: the same pooled along surfaces.
        here: misfit at `depth_px`, the image fitted to it, (H, W).
        shifted: misfits of the whole map nearer and farther by a little, nearer and farther by 1 px, (4, H, W).
        offers_px: depths that moves would make of it, (K, H, W).
        left: misfits at `depth_px`, then at the offers, with light for what near edges hide, (K + 1, H, W).
        root: the all-in-focus image as `root_of` it, (3, H, W).
    """

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


class SettlingNet(nn.Module):
    """The mean of a few small networks, each trained from its own start on its own crops: a percent better than one."""

    def __init__(self, width: int = 16, members: int = 3) -> None:
        super().__init__()
        self.members = nn.ModuleList(_Member(width) for _ in range(members))

    def forward(self, signs: Tensor, candidates_px: Tensor) -> Tensor:
        """Depths in px of blur std, (B, H, W), from (B, C, H, W) and (B, K + 2, H, W)."""
        return torch.stack([member(signs, candidates_px) for member in self.members]).mean(0)


class _Member(nn.Module):
    """Shares of the candidates, and a bounded change beyond them; they look 10 pixels far at full size."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(SIGNS, width, 3, 1, 1)
        self.more = nn.ModuleList(nn.Conv2d(width, width, 3, 1, reach, reach) for reach in (2, 4, 2, 1))
        self.last = nn.Conv2d(width, OFFERS + 3, 1)
        nn.init.normal_(self.last.weight, std=1e-3)
        with torch.no_grad():
            self.last.bias.zero_()  # type: ignore[union-attr]
            self.last.bias[0] = 3.0  # type: ignore[index]  # untrained, it nearly stays

    def forward(self, signs: Tensor, candidates_px: Tensor) -> Tensor:
        x = F.leaky_relu(self.first(signs), 0.1)
        for layer in self.more:
            x = x + F.leaky_relu(layer(x), 0.1)
        *shares, beyond = self.last(x).split([OFFERS + 2, 1], 1)
        chosen = (shares[0].softmax(1) * candidates_px).sum(1)
        return chosen + LARGEST_CHANGE_PX * torch.tanh(beyond[:, 0])


@torch.no_grad()
def settle(closing: Closing) -> Tensor:
    """The depth that the shipped network makes of a refinement's end, px of blur std, (H, W).

    Where other moves were offered than it learned to judge, the depth stays.
    """
    if len(closing.offers_px) != OFFERS:
        return stay(closing)
    net = _shipped(closing.depth_px.device)
    return net(closing.signs()[None], closing.candidates_px()[None])[0]


def stay(closing: Closing) -> Tensor:
    """The depth where the descent ended, noise taken back: nothing learned, for whoever must not use it."""
    return closing.settled_px


@lru_cache(maxsize=1)
def _shipped(device: torch.device) -> SettlingNet:
    return load_settling(WEIGHTS, device)


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
