"""Depth, confidence and all-in-focus image of a focal stack without any training: a sweep over inverse depth.

    cost_volume(frames (B, S, 3, H, W), focus_dpt (B, S), kappa (B, S), hypotheses_dpt (N,) or (B, N),
                *, valid=None (B, S, H, W), psf="disc", window_px=5) -> (B, N, H, W) float32
    hypotheses(focus_dpt (S,), kappa (S,), count, beyond_px=2.0) -> (count,) dioptres, uniform, ascending

If a pixel lies at inverse depth q, the blur of every frame there is known: CoC_k = kappa_k (q_k - q). The frame that
would be sharpest is then blurred to what each other frame should look like; no deconvolution is needed, because
blurring a disc of diameter a by sqrt(b^2 - a^2) gives the second moment of a disc of diameter b. The hypothesis
with the smallest difference wins. notes/performance.md 3 and notes/method.md 9b.5 compare this with other methods.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Literal

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

Psf = Literal["disc", "gaussian"]

LEVEL_RATIO = 1.3  # neighbouring blur levels; a mix of two has the exact second moment in between
FINEST_LEVEL_PX = 1.0


def hypotheses(focus_dpt: Tensor, kappa: Tensor, count: int, beyond_px: float = 2.0) -> Tensor:
    """Inverse depths to test, (count,) dioptres, uniform and ascending.

    They reach `beyond_px` of CoC past the nearest and the farthest focus, so that a scene slightly outside the
    sweep is still found.
    """
    margin = beyond_px / float(kappa.mean())
    return torch.linspace(float(focus_dpt.min()) - margin, float(focus_dpt.max()) + margin, count)


def cost_volume(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    hypotheses_dpt: Tensor,
    *,
    valid: Tensor | None = None,
    psf: Psf = "disc",
    window_px: int = 5,
) -> Tensor:
    """How badly each inverse depth explains the frames, (B, N, H, W) float32, 0 where noise explains the rest.

    The cost is log(1 + E / noise), E being the mean squared difference between the frames and the blurred
    reference in a window. Its offset and scale need no tuning between scenes: in a textureless window it is flat
    near log 2, in a textured one its minimum stays there and the wrong hypotheses rise above it.

    Args:
        frames: linear RGB, (B, S, 3, H, W), S >= 2, any order.
        focus_dpt: focus of each frame, (B, S) in 1/m.
        kappa: blur gain of each frame, (B, S), pixels of CoC diameter per dioptre.
        hypotheses_dpt: inverse depths to test, (N,) or (B, N).
        valid: pixels that hold data, (B, S, H, W) bool; None when all do.
        psf: shape of the blur.
        window_px: side of the square over which differences are averaged; odd.
    """
    if frames.ndim != 5 or frames.shape[1] < 2 or frames.shape[2] != 3:
        raise ValueError(f"frames must be (B, S >= 2, 3, H, W), got {tuple(frames.shape)}")
    volumes = []
    for b in range(frames.shape[0]):
        tested = hypotheses_dpt if hypotheses_dpt.ndim == 1 else hypotheses_dpt[b]
        luma, mask = prepared_luma(frames[b], None if valid is None else valid[b])
        cost = _stack_cost(luma, mask, focus_dpt[b], kappa[b], tested, psf, window_px)
        volumes.append(cost)
    return torch.stack(volumes)


def prepared_luma(frames: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Brightness of `frames` (S, 3, H, W) with holes filled and exposure equalised, (S, H, W), and where it is data.

    Holes (not `valid`, or not finite) take the mean of the frames that see the pixel, so that blurring beside them
    mixes in something plausible; they carry no weight themselves.
    """
    luma = frames.mean(1)
    finite = torch.isfinite(luma)
    mask = finite if valid is None else finite & valid
    luma = torch.where(mask, luma, 0.0)
    seen = mask.sum(0)
    common = luma.sum(0) / seen.clamp_min(1)
    overall = luma.sum() / mask.sum().clamp_min(1)
    common = torch.where(seen > 0, common, overall)
    luma = torch.where(mask, luma, common)
    return luma * relative_exposure(luma)[:, None, None], mask.float()


def relative_exposure(luma: Tensor) -> Tensor:
    """Factor per frame, (S,), that brings all frames of `luma` (S, H, W) to one exposure.

    Defocus moves light by a few pixels only, so block means far larger than the blur differ by exposure alone; the
    median of their ratios ignores the blocks where something else happened. Corrections beyond 10 % are not made:
    such frames differ by more than exposure.
    """
    blocks = F.adaptive_avg_pool2d(luma[None], (min(8, luma.shape[1]), min(8, luma.shape[2])))[0].flatten(1)
    target = blocks.median(0).values
    ratio = (target[None] / blocks.clamp_min(1e-4)).median(1).values
    return ratio.clamp(0.9, 1.1)


def noise_variance(luma: Tensor) -> Tensor:
    """Variance of the pixel noise of `luma` (S, H, W), a scalar.

    Read from the diagonal Haar band, where texture is weakest, in the frame that has least of it.
    """
    even = luma[:, : luma.shape[1] // 2 * 2, : luma.shape[2] // 2 * 2]
    diagonal = (even[:, ::2, ::2] - even[:, 1::2, ::2] - even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 2
    spread = diagonal.abs().flatten(1).median(1).values.min() / 0.6745
    return spread.square().clamp_min(1e-8)


class BlurLevels:
    """The frames of one stack blurred by a ladder of discs, made when asked for and kept."""

    def __init__(self, luma: Tensor, largest_px: float, psf: Psf) -> None:
        self.luma = luma
        self.diameters_px = [0.0, FINEST_LEVEL_PX]
        while self.diameters_px[-1] < largest_px:
            self.diameters_px.append(self.diameters_px[-1] * LEVEL_RATIO)
        height, width = luma.shape[1:]
        pad = math.ceil(largest_px / 2) + 4
        self._rows = _reflected(height, pad, luma.device)
        self._cols = _reflected(width, pad, luma.device)
        self._pad, self._psf = pad, psf
        padded = luma[:, self._rows][:, :, self._cols]
        self._size = (padded.shape[1], padded.shape[2])
        self._spectra = torch.fft.rfft2(padded)
        self._levels: dict[tuple[int, int], Tensor] = {}

    def level(self, frame: int, index: int) -> Tensor:
        """Frame `frame` blurred by `diameters_px[index]`, (H, W)."""
        if index == 0:
            return self.luma[frame]
        if (frame, index) not in self._levels:
            transfer = _transfer(*self._size, self.diameters_px[index], self._psf, str(self.luma.device))
            blurred = torch.fft.irfft2(self._spectra[frame] * transfer, s=self._size)
            height, width = self.luma.shape[1:]
            inside = blurred[self._pad : self._pad + height, self._pad : self._pad + width]
            self._levels[frame, index] = inside.contiguous()
        return self._levels[frame, index]

    def blurred(self, frame: int, diameter_px: float) -> Tensor:
        """Frame `frame` blurred by any diameter up to the largest, (H, W)."""
        index = max(int(np.searchsorted(self.diameters_px, diameter_px)) - 1, 0)
        index = min(index, len(self.diameters_px) - 2)
        below, above = self.diameters_px[index], self.diameters_px[index + 1]
        mix = (diameter_px**2 - below**2) / (above**2 - below**2)
        return torch.lerp(self.level(frame, index), self.level(frame, index + 1), min(mix, 1.0))


def _reflected(length: int, pad: int, device: torch.device) -> Tensor:
    """Indices of a line of `length` pixels mirrored beyond its ends as often as `pad` needs."""
    position = torch.arange(-pad, length + pad, device=device) % (2 * length)
    return torch.where(position < length, position, 2 * length - 1 - position)


@lru_cache(maxsize=64)
def _transfer(height: int, width: int, diameter_px: float, psf: Psf, device: str) -> Tensor:
    """Transfer function of a blur of `diameter_px` on an rfft2 grid: 2 J1(x) / x for a disc."""
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None])
    if psf == "gaussian":
        return torch.exp(-2 * (math.pi * frequency * diameter_px / 4) ** 2).to(device)
    x = frequency * diameter_px * math.pi
    return torch.where(x > 1e-3, 2 * torch.special.bessel_j1(x) / x.clamp_min(1e-3), 1.0).to(device)


def _stack_cost(
    luma: Tensor,
    mask: Tensor | None,
    focus_dpt: Tensor,
    kappa: Tensor,
    tested_dpt: Tensor,
    psf: Psf,
    window_px: int,
) -> Tensor:
    """Cost of each hypothesis for one stack, (N, H, W); see `cost_volume`."""
    focus, gain, tested = (x.detach().cpu().double().numpy() for x in (focus_dpt, kappa, tested_dpt))
    coc_px = np.abs(gain[:, None] * (focus[:, None] - tested[None]))  # (S, N)
    levels = BlurLevels(luma, float(coc_px.max()), psf)
    noise = noise_variance(luma)
    n_frames = len(focus)
    cost = torch.empty((len(tested), *luma.shape[1:]), device=luma.device)
    for n in range(len(tested)):
        reference = int(coc_px[:, n].argmin())
        energy = torch.zeros_like(luma[0])
        weight = torch.zeros_like(luma[0])
        for k in range(n_frames):
            if k == reference:
                continue
            relative_px = math.sqrt(max(coc_px[k, n] ** 2 - coc_px[reference, n] ** 2, 0.0))
            difference = levels.blurred(reference, relative_px) - luma[k]
            if mask is None:
                energy.addcmul_(difference, difference)
            else:
                both = mask[k] * mask[reference]
                energy.addcmul_(difference * both, difference)
                weight += both
        if mask is None:
            mean = box_mean(energy, window_px) / (n_frames - 1)
        else:
            mean = box_mean(energy, window_px) / box_mean(weight, window_px).clamp_min(1e-3)
        cost[n] = torch.log1p(mean / noise)
    return cost


def box_mean(image: Tensor, window_px: int) -> Tensor:
    """Mean of (H, W) over a square window of odd side, mirrored at the border; cv2 on the CPU, where it is 10 x faster."""
    if image.device.type == "cpu":
        return torch.from_numpy(cv2.blur(image.numpy(), (window_px, window_px), borderType=cv2.BORDER_REFLECT))
    radius = window_px // 2
    rows = _reflected(image.shape[0], radius, image.device)
    cols = _reflected(image.shape[1], radius, image.device)
    padded = image[rows][:, cols][None, None]
    return F.avg_pool2d(F.avg_pool2d(padded, (window_px, 1), stride=1), (1, window_px), stride=1)[0, 0]
