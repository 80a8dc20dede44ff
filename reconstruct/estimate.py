"""What every reconstruction method returns: depth, how far to trust it, and the all-in-focus image."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Estimate(NamedTuple):
    """One scene as reconstructed from one focal stack; all tensors share one device.

    Attributes:
        inverse_depth_dpt: 1 / depth in dioptres, (H, W) float32; unitless where `metric` is False.
        std_dpt: expected error (one standard deviation) of `inverse_depth_dpt`, (H, W), same unit.
        confidence: 0 (a guess) to 1 (as sure as this stack allows), (H, W).
        aif: all-in-focus image, linear RGB, (3, H, W).
        metric: whether the depth is in dioptres; False after an uncalibrated sweep, whose depth is only ordered.
    """

    inverse_depth_dpt: Tensor
    std_dpt: Tensor
    confidence: Tensor
    aif: Tensor
    metric: bool = True

    @property
    def depth_m(self) -> Tensor:
        """Depth along the optical axis in metres, (H, W); NaN where the inverse depth is not positive."""
        return torch.where(self.inverse_depth_dpt > 0, 1.0 / self.inverse_depth_dpt, torch.nan)
