"""Noise goes, what the frames show stays."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from capture.optics import BLACK
from reconstruct import denoise
from reconstruct.denoise import REACH_PX, SIGMA_PX, denoised, root_of

GRAIN = 0.02**2


def noisy(light: torch.Tensor, seed: int = 0) -> torch.Tensor:
    """Frames (5, 3, H, W) of `light` with shot noise of GRAIN."""
    frames = light.expand(5, 3, *light.shape[-2:])
    noise = torch.randn(frames.shape, generator=torch.Generator().manual_seed(seed))
    return frames + (GRAIN * (frames + BLACK)).sqrt() * noise


def literal(frames: torch.Tensor, grain: float) -> torch.Tensor:
    """The filter as one writes it: for every offset, the picture shifted."""
    roots, size = root_of(frames), frames.shape[-2:]
    there = F.pad(torch.ones(1, 1, *size), (REACH_PX,) * 4)
    padded = F.pad(roots, (REACH_PX,) * 4)
    total, weights = torch.zeros_like(roots), torch.zeros(1, 1, *size)
    for down in range(-REACH_PX, REACH_PX + 1):
        for right in range(-REACH_PX, REACH_PX + 1):
            shifted = (
                ...,
                slice(REACH_PX + down, REACH_PX + down + size[0]),
                slice(REACH_PX + right, REACH_PX + right + size[1]),
            )
            distance = (roots - padded[shifted]).square().mean((0, 1)) / (2 * grain / 4)
            weight = torch.exp(-(distance - 1).clamp_min(0) - (down**2 + right**2) / (2 * SIGMA_PX**2))
            weight = weight * there[shifted]
            total, weights = total + weight * padded[shifted], weights + weight
    return ((total / weights) ** 2 - BLACK).clamp_min(0)


@pytest.mark.parametrize("shape", [(5, 3, 40, 50), (2, 3, 1, 30), (3, 3, 7, 2)])
def test_it_is_the_bilateral_filter_of_all_frames_at_once(monkeypatch, shape):
    monkeypatch.setattr(denoise, "BAND_PX", 700)  # several bands
    frames = 0.3 + 0.05 * torch.rand(shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(denoised(frames, torch.tensor(GRAIN)), literal(frames, GRAIN), atol=2e-6)


def test_plain_surfaces_lose_most_of_their_noise_and_keep_their_brightness():
    light = torch.full((64, 64), 0.4)
    quiet = denoised(noisy(light), torch.tensor(GRAIN))
    assert quiet.std() < 0.5 * noisy(light).std()
    assert float(quiet.mean()) == pytest.approx(0.4, rel=0.002)


def test_texture_that_is_sharp_in_one_frame_only_keeps_its_contrast():
    frames = torch.full((5, 3, 64, 64), 0.4)
    frames[2] = 0.4 + 0.1 * torch.sin(torch.arange(64) * 2 * math.pi / 5)
    quiet = denoised(noisy(frames), torch.tensor(GRAIN))
    assert quiet[2].std() > 0.95 * frames[2].std()
    assert quiet[0].std() < 0.75 * noisy(frames)[0].std()


def test_frames_without_noise_stay_as_they_are():
    frames = 0.1 + 0.8 * torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    assert torch.allclose(denoised(frames, torch.tensor(1e-8)), frames, atol=1e-6)


def test_pixels_without_data_stay_so_and_tell_their_neighbours_nothing():
    frames, valid = noisy(torch.full((32, 32), 0.4)), torch.ones(5, 32, 32, dtype=torch.bool)
    valid[1, :, :4] = False
    lost = torch.where(valid[:, None], frames, torch.nan)
    found = denoised(lost, torch.tensor(GRAIN), valid)
    assert torch.equal(found.isnan(), lost.isnan())
    assert (found[valid[:, None].expand_as(found)] - 0.4).abs().max() < 0.05
