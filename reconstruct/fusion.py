"""All-in-focus image from frames and depth: what each frame still shows of each scale of detail, best combined.

At inverse depth q, frame k shows detail of frequency f with contrast H_k = OTF(kappa_k (q_k - q), f). With Y_k the
band of detail in frame k, a band of the sharp image is estimated as

    A = sum_k w_k H_k Y_k / sum_k w_k H_k^2,    w_k = 1 / (noise + (MODEL_ERROR CoC_k)^2 signal)

and then shrunk by signal / (signal + noise that is left). Where there is texture the sharpest frames decide, and the
little blur between two focus settings is undone; where there is none, all frames are averaged, which removes noise.
The bands are not decimated, so weights may change from pixel to pixel without seams.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from reconstruct.smoothing import box_mean, gaussian_mean

BAND_SIGMAS_PX = (0.6, 1.3, 2.8)  # a band is what one of these Gaussians leaves of the band before it
BAND_FREQUENCIES = (0.3, 0.15, 0.07)  # cycles a pixel at which a band's contrast is read
COARSE_WINDOW_PX = 17  # what varies within it counts as signal of the coarsest band
MODEL_ERROR = 0.2  # share of the signal that the blur model gets wrong, per pixel of CoC
LEAST_CONTRAST = 0.2  # blur is undone by at most 1 / this
DEPTH_CAUTION = 0.5  # standard errors of depth that are added to the blur


def fuse(
    frames: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    inverse_depth_dpt: Tensor,
    std_dpt: Tensor,
    *,
    valid: Tensor | None = None,
    noise: Tensor | None = None,
) -> Tensor:
    """All-in-focus image, linear RGB (3, H, W), of `frames` (S, 3, H, W) whose depth is known.

    Args:
        focus_dpt: focus of each frame, (S,) in 1/m.
        kappa: blur gain of each frame, (S,), pixels of CoC diameter per dioptre.
        inverse_depth_dpt, std_dpt: depth and its standard error, (H, W).
        valid: pixels that hold data, (S, H, W); None when all finite ones do.
        noise: variance of the pixel noise of one channel; None measures it.
    """
    frames, mask = filled_frames(frames, valid)
    seen = mask.sum(0)
    gain, focus = kappa[:, None, None], focus_dpt[:, None, None]
    coc2 = (focus - inverse_depth_dpt).square_().add_((DEPTH_CAUTION * std_dpt).square()).mul_(gain.square())
    sharpest = torch.where(mask, coc2, torch.inf).min(0).indices
    error2 = MODEL_ERROR**2 * coc2
    usable = mask | (seen == 0)
    noise = channel_noise_variance(frames) if noise is None else noise
    aif = torch.zeros_like(frames[0])
    coarse, finer_sigma = frames, 0.0
    for sigma, frequency in zip(BAND_SIGMAS_PX, BAND_FREQUENCIES, strict=True):
        smooth = gaussian_mean(coarse.flatten(0, 1), sigma).view_as(coarse)
        band = coarse - smooth if coarse is frames else coarse.sub_(smooth)
        coarse = smooth
        band_noise = noise * _noise_share(finer_sigma, math.hypot(finer_sigma, sigma))
        signal = _signal(band, sharpest, band_noise, 2 * math.ceil(3 * sigma) + 1)
        weight = torch.addcmul(band_noise, error2, signal).reciprocal_().mul_(usable)
        contrast = band_contrast(coc2, frequency).clamp_min_(LEAST_CONTRAST)
        share = weight * contrast
        total = (share * contrast).sum(0)
        noise_left = band_noise * share.square().sum(0) / total.square()
        aif += _weighted_sum(share, band) * (signal / (total * (signal + noise_left)))
        finer_sigma = math.hypot(finer_sigma, sigma)
    coarse_noise = noise / (4 * math.pi * finer_sigma**2)
    ripple = torch.empty_like(coarse)
    for plane, target in zip(coarse.flatten(0, 1), ripple.flatten(0, 1), strict=True):
        torch.sub(plane, box_mean(plane, COARSE_WINDOW_PX), out=target)
    signal = _signal(ripple, sharpest, coarse_noise, COARSE_WINDOW_PX)
    weight = torch.addcmul(coarse_noise, error2, signal).reciprocal_().mul_(usable)
    aif += _weighted_sum(weight, coarse) / weight.sum(0)
    return aif.clamp_min(0.0)


def filled_frames(frames: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """`frames` (S, 3, H, W) with holes filled by the frames that see the pixel, and where they hold data (S, H, W)."""
    mask = usable_mask(torch.isfinite(frames.sum(1)), valid)
    if bool(mask.all()):
        return frames, mask
    seen = mask.sum(0)
    filled = torch.where(mask[:, None], frames, 0.0)
    average = filled.sum((0, 2, 3)) / seen.sum().clamp_min(1)
    common = torch.where(seen > 0, filled.sum(0) / seen.clamp_min(1), average[:, None, None])
    return torch.where(mask[:, None], frames, common), mask


def usable_mask(finite: Tensor, valid: Tensor | None) -> Tensor:
    """Which pixels of each frame to use, (S, H, W): `valid` ones, and all `finite` ones where no frame is valid.

    Beyond the common field of view alignment repeats the frames' edges: poor, but nearer the truth than black.
    """
    if valid is None:
        return finite
    mask = finite & valid
    return torch.where(mask.any(0), mask, finite)


def band_contrast(coc2_px: Tensor, frequency: float) -> Tensor:
    """Contrast that a disc leaves of a wave of `frequency` cycles a pixel, down to about 0.1; its diameter is squared.

    The Gaussian of std 0.26 CoC, which is a disc's closest there and never changes sign.
    """
    return (coc2_px * (-2 * (math.pi * frequency * 0.26) ** 2)).exp_()


def _weighted_sum(weight: Tensor, frames: Tensor) -> Tensor:
    """Sum over frames of weight (S, H, W) times frames (S, 3, H, W), (3, H, W), without the (S, 3, H, W) product."""
    total = weight[0] * frames[0]
    for k in range(1, len(weight)):
        total.addcmul_(weight[k], frames[k])
    return total


def _signal(band: Tensor, sharpest: Tensor, noise: Tensor, window_px: int) -> Tensor:
    """Local variance of a band (S, 3, H, W) in the sharpest frame less its noise, (H, W), positive."""
    picked = band.gather(0, sharpest.expand(1, 3, -1, -1))[0]
    power = box_mean(picked.square_().mean(0), window_px)
    return torch.maximum(power - noise, 0.01 * noise)


def _noise_share(finer_sigma: float, sigma: float) -> float:
    """Share of white noise's variance between Gaussians of two widths (0: the pixel itself)."""

    def left(s: float) -> float:
        return 1.0 if s == 0 else min(1.0, 1 / (4 * math.pi * s * s))

    cross = left(math.sqrt((finer_sigma**2 + sigma**2) / 2))
    return max(left(finer_sigma) + left(sigma) - 2 * cross, 0.01)


def channel_noise_variance(frames: Tensor) -> Tensor:
    """Variance of the pixel noise of one channel of `frames` (S, 3, H, W), a scalar."""
    return torch.stack([noise_variance(frames[:, c]) for c in range(3)]).mean()


def noise_variance(luma: Tensor) -> Tensor:
    """Variance of the pixel noise of `luma` (S, H, W), a scalar.

    Read from the diagonal Haar band, where texture is weakest, in the frame that has least of it. 0.001^2 where the
    image is a single line and cannot tell.
    """
    if min(luma.shape[1:]) < 2:
        return luma.new_tensor(1e-6)
    even = luma[:, : luma.shape[1] // 2 * 2, : luma.shape[2] // 2 * 2]
    diagonal = (even[:, ::2, ::2] - even[:, 1::2, ::2] - even[:, ::2, 1::2] + even[:, 1::2, 1::2]) / 2
    spread = _medians(diagonal.abs().flatten(1)).min() / 0.6745
    return spread.square().clamp_min(1e-8)


def _medians(rows: Tensor) -> Tensor:
    """The lower median of each of `rows` (N, L), (N,); numpy's on a CPU, ten times as fast there."""
    if rows.device.type != "cpu":
        return rows.median(1).values
    middle = (rows.shape[1] - 1) // 2
    return torch.from_numpy(np.partition(rows.numpy(), middle, 1)[:, middle])
