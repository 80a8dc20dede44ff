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
        planes = [cv2.GaussianBlur(p, size, sigma_px, borderType=cv2.BORDER_REFLECT) for p in image.numpy()]
        return torch.stack([torch.from_numpy(p) for p in planes])
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
