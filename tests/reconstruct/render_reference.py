"""The renderer's definitions, written out slowly: double loops, spatial kernels, autograd for gradients."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from scipy import special
from torch import Tensor
from torch.nn import functional

from reconstruct.render import Layers
from reconstruct.spectrum import Psf


def published_loops(image: Tensor, radius_px: Tensor, window: int) -> Tensor:
    """DEReD's kernel read line by line: image (3, H, W) and radius (H, W) to (3, H, W), scalars only."""
    _, height, width = image.shape
    half = window // 2
    out = image.clone()
    for py in range(height):
        for px in range(width):
            if radius_px[py, px] <= 1:
                continue
            total, norm = image.new_zeros(3), image.new_zeros(())
            for qy in range(max(0, py - half), min(height, py + half + 1)):
                for qx in range(max(0, px - half), min(width, px + half + 1)):
                    c = radius_px[qy, qx]
                    if c > 1:
                        g = torch.exp(-2.0 * ((py - qy) ** 2 + (px - qx) ** 2) / c**2) / c**2
                        total, norm = total + g * image[:, qy, qx], norm + g
            out[:, py, px] = total / norm
    return out


def gaussian_taps(variance: Tensor, reach: int) -> Tensor:
    """The discrete Gaussian exp(-t) I_n(t), n = -reach to reach, differentiable in t."""
    return torch.stack([_bessel(variance, abs(n)) for n in range(-reach, reach + 1)])


class _ScaledBessel(torch.autograd.Function):
    @staticmethod
    def forward(ctx, variance, order):
        ctx.save_for_backward(variance)
        ctx.order = order
        return variance.new_tensor(special.ive(order, variance.detach().cpu().numpy()))

    @staticmethod
    def backward(ctx, grad):
        (variance,) = ctx.saved_tensors
        t, n = variance.detach().cpu().numpy(), ctx.order
        slope = 0.5 * (special.ive(n - 1, t) + special.ive(n + 1, t)) - special.ive(n, t)
        return grad * variance.new_tensor(slope), None


def _bessel(variance: Tensor, order: int) -> Tensor:
    return _ScaledBessel.apply(variance, order)


def blur_gaussian(image: Tensor, coc_px: Tensor, psf: Psf) -> Tensor:
    """`image` (C, H, W) blurred by the discrete Gaussian, zero outside, by two convolutions."""
    variance = (psf.gain * coc_px) ** 2 + psf.floor_px**2
    reach = math.ceil(6 * math.sqrt(float(variance.detach()))) + 3
    taps = gaussian_taps(variance, reach).to(image.dtype)
    channels = image.shape[0]
    down = functional.conv2d(image[:, None], taps[None, None, :, None], padding=(reach, 0))
    return functional.conv2d(down, taps[None, None, None, :], padding=(0, reach)).reshape(channels, *image.shape[1:])


def disc_taps(coc_px: float, points: int = 400) -> Tensor:
    """The anti-aliased disc, (2 R + 1, 2 R + 1): a fine grid of points in it, each shared by the four pixels around."""
    wanted = coc_px**2 / 16

    def taps(radius: float) -> tuple[Tensor, float]:
        reach = math.ceil(radius) + 1
        line = ((torch.arange(points, dtype=torch.float64) + 0.5) / points * 2 - 1) * radius
        y, x = torch.meshgrid(line, line, indexing="ij")
        inside = y**2 + x**2 <= radius**2
        y, x = y[inside], x[inside]
        kernel = torch.zeros(2 * reach + 1, 2 * reach + 1, dtype=torch.float64)
        for dy in (0, 1):
            for dx in (0, 1):
                row, column = y.floor() + dy, x.floor() + dx
                share = (1 - (y - row).abs()) * (1 - (x - column).abs())
                kernel.index_put_((row.long() + reach, column.long() + reach), share, accumulate=True)
        kernel /= kernel.sum()
        return kernel, float((kernel.sum(0) * torch.arange(-reach, reach + 1) ** 2).sum())

    low, high = 0.0, coc_px
    for _ in range(40):  # the radius with the ideal disc's second moment
        middle = (low + high) / 2
        low, high = (middle, high) if taps(middle)[1] < wanted else (low, middle)
    return taps(low)[0]


class _DiscTaps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, coc_px, reach):
        ctx.save_for_backward(coc_px)
        ctx.reach = reach
        return _DiscTaps.padded(float(coc_px.abs()), reach)

    @staticmethod
    def backward(ctx, grad):
        (coc_px,) = ctx.saved_tensors
        c, step = float(coc_px.abs()), 0.1
        slope = (_DiscTaps.padded(c + step, ctx.reach) - _DiscTaps.padded(abs(c - step), ctx.reach)) / (2 * step)
        return (grad * slope).sum() * coc_px.sign(), None

    @staticmethod
    @lru_cache(maxsize=1000)
    def padded(coc_px, reach):
        taps = disc_taps(coc_px, 120)
        return functional.pad(taps, [reach - taps.shape[0] // 2] * 4)


def blur_disc(image: Tensor, coc_px: Tensor, psf: Psf) -> Tensor:
    """`image` blurred by the disc's taps and then by the floor, zero outside."""
    reach = math.ceil(float(coc_px.detach().abs()) / 2) + 3
    taps = _DiscTaps.apply(coc_px, reach)
    margin = math.ceil(6 * psf.floor_px) + 3  # light that the disc throws out of the image, the floor may bring back
    blurred = functional.conv2d(image[:, None], taps[None, None], padding=reach + margin)[:, 0]
    still = torch.zeros_like(coc_px)
    return blur_gaussian(blurred, still, psf)[:, margin:-margin, margin:-margin]


def blur(image: Tensor, coc_px: Tensor, psf: Psf) -> Tensor:
    """`image` (C, H, W) blurred by one circle of confusion."""
    return blur_disc(image, coc_px, psf) if psf.shape == "disc" else blur_gaussian(image, coc_px, psf)


def hats(inverse_depth_dpt: Tensor, layers: Layers) -> Tensor:
    """Linear weight of every pixel in every layer, (L, H, W)."""
    planes = layers.inverse_depth_dpt(inverse_depth_dpt)[:, None, None]
    return (1 - (inverse_depth_dpt - planes).abs() / layers.step_dpt).clamp_min(0)


def scatter(
    aif: Tensor, inverse_depth_dpt: Tensor, focus_dpt: Tensor, kappa: Tensor, psf: Psf, layers: Layers
) -> Tensor:
    """(S, 3, H, W) = sum_l B_kl(I w_l) / sum_l B_kl(w_l), as written."""
    weights = hats(inverse_depth_dpt, layers)
    planes = layers.inverse_depth_dpt(focus_dpt)
    frames = []
    for focus, gain in zip(focus_dpt, kappa, strict=True):
        light, norm = torch.zeros_like(aif), torch.zeros_like(aif[:1])
        for plane, weight in zip(planes, weights, strict=True):
            coc_px = gain * (focus - plane)
            light = light + blur(aif * weight, coc_px, psf)
            norm = norm + blur(weight[None], coc_px, psf)
        frames.append(light / norm)
    return torch.stack(frames)


def occlusion(
    aif: Tensor,
    inverse_depth_dpt: Tensor,
    focus_dpt: Tensor,
    kappa: Tensor,
    psf: Psf,
    layers: Layers,
    hidden: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """(S, 3, H, W): near to far, colour and opacity over E_l, light through what is open, renormalised; as written.

    `hidden`, an image (3, H, W) and inverse depth (H, W), counts from one layer behind the pixel on, fully from two on.
    """
    weights = hats(inverse_depth_dpt, layers).flip(0)
    planes = layers.inverse_depth_dpt(focus_dpt).flip(0)
    hidden_aif, hidden_dpt = hidden or (aif, inverse_depth_dpt.detach())
    hidden_weights = hats(hidden_dpt, layers).flip(0)
    counts = ((inverse_depth_dpt - planes[:, None, None]) / layers.step_dpt - 1).clamp(0, 1)
    frames = []
    for focus, gain in zip(focus_dpt, kappa, strict=True):
        light, norm, opening = torch.zeros_like(aif), torch.zeros_like(aif[0]), torch.ones_like(aif[0])
        for index, plane in enumerate(planes):
            coc_px = gain * (focus - plane)
            own, behind = weights[index], weights[index:].sum(0)
            hidden_own = counts[index] * hidden_weights[index]
            behind = behind + counts[index] * hidden_weights[index:].sum(0)
            light_here, own = aif * own + hidden_aif * hidden_own, own + hidden_own
            if float(own.detach().max()) == 0:
                continue
            e = blur(behind[None], coc_px, psf)[0].clamp_min(1e-3)
            alpha = blur(own[None], coc_px, psf)[0] / e
            light = light + opening * blur(light_here, coc_px, psf) / e
            norm = norm + opening * alpha
            opening = opening * (1 - alpha)
        frames.append(light / norm)
    return torch.stack(frames)


def gather(image: Tensor, variance: Tensor) -> Tensor:
    """`image` (3, H, W) read by every pixel through the discrete Gaussian of its own `variance` (H, W).

    Shifted adds over the whole image, normalised inside it; nothing is cut before 6 sigma. Not differentiable: compare
    gradients by small differences.
    """
    reach = math.ceil(6 * math.sqrt(float(variance.max()))) + 3
    table = [torch.from_numpy(special.ive(n, variance.numpy())) for n in range(reach + 1)]
    height, width = variance.shape
    total, norm = torch.zeros_like(image), torch.zeros_like(variance)
    for dy in range(-min(reach, height - 1), min(reach, height - 1) + 1):
        p_rows, q_rows = slice(max(0, -dy), height - max(0, dy)), slice(max(0, dy), height - max(0, -dy))
        for dx in range(-min(reach, width - 1), min(reach, width - 1) + 1):
            p_cols, q_cols = slice(max(0, -dx), width - max(0, dx)), slice(max(0, dx), width - max(0, -dx))
            weight = (table[abs(dy)] * table[abs(dx)])[p_rows, p_cols]
            total[:, p_rows, p_cols] += weight * image[:, q_rows, q_cols]
            norm[p_rows, p_cols] += weight
    return total / norm
