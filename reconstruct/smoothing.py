"""Box and Gaussian means on any device; cv2 on the CPU, several times as fast there (notes/performance.md 1.2)."""

from __future__ import annotations

import math

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor


def box_mean(image: Tensor, window_px: int) -> Tensor:
    """Mean of (H, W) over a square window of odd side, mirrored at the border."""
    if image.device.type == "cpu":
        return torch.from_numpy(cv2.blur(image.numpy(), (window_px, window_px), borderType=cv2.BORDER_REFLECT))
    return _separable(image[None], torch.full((window_px,), 1 / window_px, device=image.device))[0]


def gaussian_mean(image: Tensor, sigma_px: float) -> Tensor:
    """`image` (C, H, W) blurred by a Gaussian cut at 3 sigma, mirrored at the border."""
    radius = math.ceil(3 * sigma_px)
    if image.device.type == "cpu":
        size = (2 * radius + 1, 2 * radius + 1)
        blurred = torch.empty_like(image, memory_format=torch.contiguous_format)
        for plane, target in zip(image.numpy(), blurred.numpy(), strict=True):
            cv2.GaussianBlur(plane, size, sigma_px, dst=target, borderType=cv2.BORDER_REFLECT)
        return blurred
    offset = torch.arange(-radius, radius + 1, device=image.device)
    kernel = torch.exp(-(offset**2) / (2 * sigma_px**2))
    return _separable(image, kernel / kernel.sum())


def mirrored(length: int, before: int, total: int, device: torch.device) -> Tensor:
    """Indices, (total,), of a line of `length` pixels from `before` pixels ahead of it, mirrored beyond its ends."""
    position = (torch.arange(total, device=device) - before) % (2 * length)
    return torch.where(position < length, position, 2 * length - 1 - position)


def _separable(image: Tensor, kernel: Tensor) -> Tensor:
    """`image` (C, H, W) convolved with `kernel` along both axes."""
    radius = len(kernel) // 2
    rows = mirrored(image.shape[1], radius, image.shape[1] + 2 * radius, image.device)
    cols = mirrored(image.shape[2], radius, image.shape[2] + 2 * radius, image.device)
    padded = image[:, rows][:, :, cols][:, None]
    return F.conv2d(F.conv2d(padded, kernel.view(1, 1, -1, 1)), kernel.view(1, 1, 1, -1))[:, 0]


def edge_aware_mean(values: Tensor, down: Tensor, right: Tensor, strength: float, iterations: int = 3) -> Tensor:
    """`values` (C, H, W) smoothed along links of 0 (cut) to 1 between neighbours, as float32.

    The fast global smoother (Min et al. 2014): (I + strength L) u = values, L being the links' Laplacian, solved
    along rows and columns in turn with falling strength, so that no streaks stay. The reach is about
    sqrt(strength) pixels where nothing is cut.

    Args:
        down: link of each pixel to the one below, (H - 1, W).
        right: link of each pixel to the one to its right, (H, W - 1).
    """
    right = right.T.contiguous()
    for left in range(iterations - 1, -1, -1):
        share = 1.5 * 4.0**left / (4.0**iterations - 1) * strength
        values = _tridiagonal(values.permute(2, 0, 1).contiguous(), share * right).permute(1, 2, 0)
        values = _tridiagonal(values.permute(1, 0, 2).contiguous(), share * down).permute(1, 0, 2)
    return values


def _tridiagonal(values: Tensor, link: Tensor) -> Tensor:
    """u (T, C, X) of u_t + link_t (u_t - u_t+1) + link_t-1 (u_t - u_t-1) = values_t; `link` (T - 1, X)."""
    end = torch.zeros_like(values[:1, 0])
    inverse = 1 + torch.cat((link, end)) + torch.cat((end, link))  # the diagonal, until its line is reached
    carried, solved = torch.empty_like(link), torch.empty_like(values)
    links, inverses, shares, given, lines = (x.unbind(0) for x in (link, inverse, carried, values, solved))
    inverses[0].reciprocal_()
    lines[0].copy_(given[0])
    for t in range(1, len(lines)):
        torch.mul(links[t - 1], inverses[t - 1], out=shares[t - 1])
        inverses[t].addcmul_(links[t - 1], shares[t - 1], value=-1).reciprocal_()
        torch.addcmul(given[t], shares[t - 1], lines[t - 1], out=lines[t])
    solved *= inverse[:, None]
    for t in range(len(lines) - 2, -1, -1):
        lines[t].addcmul_(shares[t], lines[t + 1])
    return solved
