"""Every loss term as a pure function: the published ones (DEReD, `notes/method.md` section 4) and their repairs (9b.8).

Images and stacks are linear RGB, (..., 3, H, W), 0 to 1; maps are (B, 1, H, W). The terms of a step travel as
`LossTerms`, their weights as `LossWeights` with the same field names, so that every term can be logged.

The paper's training uses `published_terms` with `PUBLISHED` weights (`reconstruct/finetune.py`). No command trains with
`repaired_terms`, its weights and `total`: the network learns more from refined maps, and they are there for comparison.
Refinement and fine-tuning take single functions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for a data range of 1
SSIM_SIGMA_PX, SSIM_RADIUS_PX = 1.5, 5
CHARBONNIER_SCALE = 0.02  # notes/forward-model.md section 2


class LossTerms(NamedTuple):
    """What one step measured, each a scalar tensor, unweighted.

    Attributes:
        reconstruction: rendered stack against captured stack.
        coarse_aif: all-in-focus image against a fusion of the frames.
        smoothness: edge-aware smoothness of depth.
        sharpness: blur of the all-in-focus image.
        coarse_sharpness: blur of the fusion; published, but it has no gradient (notes bug 4): logged only.
    """

    reconstruction: Tensor
    coarse_aif: Tensor
    smoothness: Tensor
    sharpness: Tensor
    coarse_sharpness: Tensor


@dataclass(frozen=True)
class LossWeights:
    """Weight of each of `LossTerms`; the defaults suit `repaired_terms`, `PUBLISHED` holds the paper's."""

    reconstruction: float = 1.0
    coarse_aif: float = 0.1
    smoothness: float = 0.01
    sharpness: float = 0.0
    coarse_sharpness: float = 0.0


PUBLISHED = LossWeights(reconstruction=1000, coarse_aif=100, smoothness=10, sharpness=10, coarse_sharpness=10)


def total(terms: LossTerms, weights: LossWeights) -> Tensor:
    """Weighted sum of the terms, a scalar; a term of weight 0 is left out, so that its NaN cannot spread."""
    parts = [
        getattr(weights, field.name) * getattr(terms, field.name)
        for field in fields(weights)
        if getattr(weights, field.name)
    ]
    return torch.stack(parts).sum()


# --- photometric ----------------------------------------------------------------------------------------------------


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Mean absolute difference."""
    return (a - b).abs().mean()


def charbonnier(a: Tensor, b: Tensor, scale: float = CHARBONNIER_SCALE) -> Tensor:
    """Mean of sqrt(d^2 + scale^2) - scale: quadratic below `scale`, absolute above."""
    return ((a - b).square() + scale * scale).sqrt().mean() - scale


def laplace_surprise(error: Tensor, std: Tensor) -> Tensor:
    """Negative log-likelihood of each `error` under a Laplace distribution of that `std`, but for a constant.

    log b + |error| / b with b = std / sqrt(2); lowest where b is the usual |error|.
    """
    scale = std / math.sqrt(2.0)
    return scale.log() + error.abs() / scale


def ssim_map(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) per pixel and channel, (..., H, W).

    11 x 11 Gaussian window of sigma 1.5, zero-padded as published.
    """
    shape = a.shape
    a, b = a.reshape(-1, 1, *shape[-2:]), b.reshape(-1, 1, *shape[-2:])
    moments = _window(torch.cat([a, b, a * a, b * b, a * b]))
    mean_a, mean_b, square_a, square_b, product = moments.chunk(5)
    var_a, var_b, covariance = square_a - mean_a**2, square_b - mean_b**2, product - mean_a * mean_b
    luminance = (2 * mean_a * mean_b + SSIM_C1) / (mean_a**2 + mean_b**2 + SSIM_C1)
    structure = (2 * covariance + SSIM_C2) / (var_a + var_b + SSIM_C2)
    return (luminance * structure).reshape(shape)


def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Mean structural similarity, 1 for equal images."""
    return ssim_map(a, b).mean()


def ssim_l1(a: Tensor, b: Tensor, alpha: float = 0.85) -> Tensor:
    """alpha (1 - SSIM) + (1 - alpha) L1; not halved, as published."""
    return alpha * (1 - ssim(a, b)) + (1 - alpha) * l1(a, b)


def match_exposure(rendered: Tensor, captured: Tensor, limit: float = 0.2) -> Tensor:
    """`rendered` (B, S, 3, H, W) with the gain and offset of each frame that suit `captured` best.

    Absorbs exposure drift between frames. Least squares over a frame's pixels and channels, gain within 1 +- `limit`
    and offset within +- `limit` / 4; both are constants for the gradient.
    """
    x, y = rendered.detach().flatten(2), captured.detach().flatten(2)
    mean_x, mean_y = x.mean(-1, keepdim=True), y.mean(-1, keepdim=True)
    covariance = ((x - mean_x) * (y - mean_y)).mean(-1, keepdim=True)
    variance = (x - mean_x).square().mean(-1, keepdim=True)
    gain = torch.where(variance > 1e-8, covariance / variance.clamp_min(1e-8), torch.ones_like(variance))
    gain = gain.clamp(1 - limit, 1 + limit)
    offset = (mean_y - gain * mean_x).clamp(-limit / 4, limit / 4)
    return rendered * gain[..., None, None] + offset[..., None, None]


def _window(image: Tensor) -> Tensor:
    """Gaussian mean over SSIM's window, (N, 1, H, W)."""
    taps = _gaussian_taps(SSIM_SIGMA_PX, SSIM_RADIUS_PX, image.dtype, image.device)
    down = functional.conv2d(image, taps[None, None, :, None], padding=(SSIM_RADIUS_PX, 0))
    return functional.conv2d(down, taps[None, None, None, :], padding=(0, SSIM_RADIUS_PX))


@lru_cache(maxsize=16)
@torch.inference_mode(False)  # kept: a tensor first made for inference could never serve training
def _gaussian_taps(sigma_px: float, radius_px: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.arange(-radius_px, radius_px + 1, dtype=torch.float64)
    taps = torch.exp(-(x**2) / (2 * sigma_px**2))
    return (taps / taps.sum()).to(dtype=dtype, device=device)


# --- depth ----------------------------------------------------------------------------------------------------------


def edge_aware_smoothness(values: Tensor, guide: Tensor, edge_gain: float = 10.0) -> Tensor:
    """Mean |difference| of neighbouring `values` (B, 1, H, W), less where `guide` (B, 3, H, W) has an edge.

    Interior differences only, weight exp(-edge_gain |guide difference|), channels averaged (notes 9b.8). A constant
    map costs nothing.
    """
    total = values.new_zeros(())
    for dim in (-2, -1):
        if values.shape[dim] > 1:  # else nothing has a neighbour
            weight = torch.exp(-edge_gain * guide.diff(dim=dim).abs().mean(1, keepdim=True))
            total = total + (values.diff(dim=dim).abs() * weight).mean()
    return total


def inverse_depth_smoothness(inverse_depth_dpt: Tensor, guide: Tensor, edge_gain: float = 10.0) -> Tensor:
    """Edge-aware smoothness of inverse depth over its mean, so that shrinking the scale buys nothing (monodepth2)."""
    mean = inverse_depth_dpt.mean((-2, -1), keepdim=True)
    return edge_aware_smoothness(inverse_depth_dpt / (mean.abs() + 1e-7), guide, edge_gain)


def published_smoothness(depth_m: Tensor, aif: Tensor, beta: float = 2.5) -> Tensor:
    """mean(|dx Z| beta exp(-|dx A|) + |dy Z| beta exp(-|dy A|)), depth in metres, zero beyond the top left.

    Kept as published: a constant depth is penalised in proportion to itself (notes bug 7) and beta scales the term
    instead of the image gradient (bug 8).
    """
    return sum(
        (beta * _difference(depth_m, dim).abs() * torch.exp(-_difference(aif, dim).abs())).mean() for dim in (-2, -1)
    )  # type: ignore[return-value]


def _difference(image: Tensor, dim: int) -> Tensor:
    return image.diff(dim=dim, prepend=torch.zeros_like(image.narrow(dim, 0, 1)))


# --- all-in-focus image ---------------------------------------------------------------------------------------------


def blur_measure(image: Tensor) -> Tensor:
    """The published sharpness loss of `image` (B, 3, H, W): lower for a sharper image.

    0.25 mean_batch(-log(sum (LoG * x)^2 / (H W - mean(x)^2) + 1e-8)) with x the mean of the channels and LoG the
    7 x 7 Laplacian of a Gaussian of sigma 1.
    """
    gray = image.mean(1, keepdim=True)
    kernel = _laplacian_of_gaussian(gray.dtype, gray.device)
    energy = functional.conv2d(gray, kernel, padding=3).square().sum((1, 2, 3))
    pixels = gray.shape[-2] * gray.shape[-1]
    return 0.25 * -torch.log(energy / (pixels - gray.mean((1, 2, 3)) ** 2) + 1e-8).mean()


@lru_cache(maxsize=4)
@torch.inference_mode(False)
def _laplacian_of_gaussian(dtype: torch.dtype, device: torch.device) -> Tensor:
    x = torch.arange(-3, 4, dtype=torch.float64)
    half_r2 = (x[:, None] ** 2 + x[None] ** 2) / 2
    kernel = -(1 - half_r2) * torch.exp(-half_r2) / torch.pi
    return kernel.to(dtype=dtype, device=device)[None, None]


def published_coarse_aif(stack: Tensor, coc_px: Tensor) -> Tensor:
    """At each pixel, the frame of `stack` (B, S, 3, H, W) with the smallest |`coc_px`| (B, S, H, W); (B, 3, H, W)."""
    nearest = coc_px.abs().argmin(1)[:, None, None].expand(-1, 1, 3, -1, -1)
    return stack.gather(1, nearest)[:, 0]


def fuse_sharpest(stack: Tensor, *, window_px: int = 9, power: float = 2.0) -> Tensor:
    """Frames of `stack` (B, S, 3, H, W) weighted by local contrast; (B, 3, H, W), without gradient.

    Independent of the predicted depth, so it cannot confirm the depth's own mistakes (notes bug 10). The weight is the
    `power` of the Laplacian's energy over a `window_px` square.
    """
    with torch.no_grad():
        batch, frames = stack.shape[:2]
        gray = stack.mean(2).flatten(0, 1)[:, None]
        padded = functional.pad(gray, (1, 1, 1, 1), mode="replicate")
        neighbours = padded[..., 2:, 1:-1] + padded[..., :-2, 1:-1] + padded[..., 1:-1, 2:] + padded[..., 1:-1, :-2]
        energy = (neighbours - 4 * gray).square()
        for _ in range(2):  # a box twice is a tent: no blocky seams
            energy = functional.avg_pool2d(energy, window_px, 1, window_px // 2, count_include_pad=False)
        weight = (energy + 1e-10).pow(power).reshape(batch, frames, 1, *gray.shape[-2:])
        return (stack * (weight / weight.sum(1, keepdim=True))).sum(1)


# --- sets of terms --------------------------------------------------------------------------------------------------


def published_terms(rendered: Tensor, stack: Tensor, aif: Tensor, depth_m: Tensor, coc_px: Tensor) -> LossTerms:
    """The five published terms, for `PUBLISHED` weights.

    Args:
        rendered, stack: (B, S, 3, H, W).
        aif: (B, 3, H, W).
        depth_m: (B, 1, H, W).
        coc_px: (B, S, H, W); chooses the coarse all-in-focus image.
    """
    coarse = published_coarse_aif(stack, coc_px)
    return LossTerms(
        reconstruction=ssim_l1(rendered, stack),
        coarse_aif=ssim_l1(aif, coarse),
        smoothness=published_smoothness(depth_m, aif),
        sharpness=blur_measure(aif),
        coarse_sharpness=blur_measure(coarse),
    )


def repaired_terms(rendered: Tensor, stack: Tensor, aif: Tensor, inverse_depth_dpt: Tensor) -> LossTerms:
    """The same terms repaired: exposure matched, smoothness of normalised inverse depth, depth-independent fusion."""
    coarse = fuse_sharpest(stack)
    return LossTerms(
        reconstruction=ssim_l1(match_exposure(rendered, stack), stack),
        coarse_aif=ssim_l1(aif, coarse),
        smoothness=inverse_depth_smoothness(inverse_depth_dpt, aif.detach()),
        sharpness=blur_measure(aif),
        coarse_sharpness=blur_measure(coarse),
    )
