"""Depth and all-in-focus image from simulated sweeps, and what must not change them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capture.errors import UsageError
from capture.optics import Condition, simulate_sweep, sweep_for_scene
from capture.scenes import Scene
from reconstruct.device import pick_device
from reconstruct.estimate import Estimate
from reconstruct.metrics import psnr
from reconstruct.plane_sweep import (
    SweepConfig,
    cost_volume,
    estimate_gain,
    hypotheses,
    photometry,
    plane_sweep,
    relative_exposure,
)

torch.set_num_threads(1)


def steps_scene(height: int = 96, width: int = 192) -> Scene:
    """Textured steps in depth, 1 m, 1.3 m and 2 m, one to each third of the width."""
    rng = np.random.default_rng(3)
    fine = rng.random((height, width, 1), dtype=np.float32)
    coarse = rng.random((height // 4, width // 4, 3), dtype=np.float32).repeat(4, 0).repeat(4, 1)
    inverse = np.repeat(np.linspace(1.0, 0.5, 3), width // 3)[None].repeat(height, 0)
    return Scene(0.2 + 0.2 * fine + 0.4 * coarse, (1 / inverse).astype(np.float32), "steps")


@pytest.fixture(scope="module")
def sweep() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Scene]:
    scene = steps_scene()
    lens, focus = sweep_for_scene(scene, 5, 16.0)
    made = simulate_sweep(scene, lens, focus, Condition(noise_std=0.01, bits=8))
    frames = torch.from_numpy(made.linear()).permute(0, 3, 1, 2).contiguous()
    return frames, torch.tensor(focus).float(), torch.tensor(made.kappa_px_per_dpt).float(), scene


def error_px(found: Estimate, scene: Scene, kappa: torch.Tensor) -> torch.Tensor:
    return (found.inverse_depth_dpt - 1 / torch.from_numpy(scene.depth_m)).abs() * kappa.mean()


def test_depth_of_textured_steps_is_right_to_a_fraction_of_a_pixel_of_blur(sweep):
    frames, focus, kappa, scene = sweep
    found = plane_sweep(frames, focus, kappa)
    assert found.metric
    assert error_px(found, scene, kappa).median() < 0.25
    assert found.confidence.min() >= 0 and found.confidence.max() <= 1


def test_stated_spread_holds_most_errors_and_ranks_them(sweep):
    frames, focus, kappa, scene = sweep
    found = plane_sweep(frames, focus, kappa)
    error = error_px(found, scene, kappa).flatten()
    inside = (error <= (found.std_dpt * kappa.mean()).flatten()).float().mean()
    assert inside > 0.5  # an easy scene: the spread was calibrated on harder ones
    sure = found.confidence.flatten().argsort(descending=True)[: error.numel() * 7 // 10]
    assert error[sure].mean() < 0.7 * error.mean()


def test_fused_image_beats_every_single_frame(sweep):
    frames, focus, kappa, scene = sweep
    found = plane_sweep(frames, focus, kappa)
    best_frame = max(psnr(frame.permute(1, 2, 0).numpy(), scene.aif) for frame in frames)
    assert psnr(found.aif.permute(1, 2, 0).numpy(), scene.aif) > best_frame + 3


def test_frame_order_does_not_matter(sweep):
    frames, focus, kappa, _ = sweep
    order = torch.tensor([3, 0, 4, 1, 2])
    straight, shuffled = plane_sweep(frames, focus, kappa), plane_sweep(frames[order], focus[order], kappa[order])
    for other, own in zip(shuffled[:-1], straight[:-1], strict=True):
        torch.testing.assert_close(other, own, atol=0, rtol=0)


@pytest.mark.parametrize("chosen", [[0, 4], [1, 3], [0, 2, 4]], ids=["ends", "inner", "three"])
def test_few_frames_still_order_the_steps(sweep, chosen):
    frames, focus, kappa, scene = sweep
    found = plane_sweep(frames[chosen], focus[chosen], kappa[chosen]).inverse_depth_dpt
    third = scene.width // 3
    near, middle, far = (found[:, i * third + 16 : (i + 1) * third - 16].median() for i in range(3))
    assert near > middle > far


@pytest.mark.parametrize("shape", [(1, 1), (2, 3), (17, 31), (33, 8)])
def test_any_size_gives_finite_maps(sweep, shape):
    frames, focus, kappa, _ = sweep
    found = plane_sweep(frames[:, :, : shape[0], : shape[1]], focus, kappa)
    assert found.aif.shape == (3, *shape)
    assert all(torch.isfinite(m).all() and m.shape[-2:] == shape for m in found[:4])


def test_pixels_without_data_change_only_their_surroundings(sweep):
    frames, focus, kappa, scene = sweep
    holed = frames.clone()
    holed[1, :, :10, :] = float("nan")
    valid = torch.ones(frames.shape[0], *frames.shape[2:], dtype=torch.bool)
    valid[3, :, :12] = False
    found = plane_sweep(holed, focus, kappa, valid=valid)
    assert all(torch.isfinite(m).all() for m in found[:4])
    assert error_px(found, scene, kappa)[20:, 24:].median() < 0.25


def test_a_rim_that_few_frames_see_does_not_stray_to_depths_that_none_can_judge(sweep):
    frames, focus, kappa, scene = sweep
    valid = torch.ones(frames.shape[0], *frames.shape[2:], dtype=torch.bool)
    valid[:3, :, -6:] = False
    valid[:2, :, -9:] = False
    rim = error_px(plane_sweep(frames, focus, kappa, valid=valid), scene, kappa)[:, -6:]
    assert rim.mean() < 1.0


def test_border_that_no_frame_sees_is_not_black(sweep):
    frames, focus, kappa, scene = sweep
    valid = torch.ones(frames.shape[0], *frames.shape[2:], dtype=torch.bool)
    valid[:, :, :3] = False
    kept = plane_sweep(frames, focus, kappa, valid=valid).aif[:, :, :3]
    lost = plane_sweep(torch.where(valid[:, None], frames, torch.nan), focus, kappa).aif[:, :, :3]
    for border in (kept, lost):
        assert border.mean() == pytest.approx(float(scene.aif[:, :3].mean()), rel=0.2)


def test_exposure_drift_is_evened_out(sweep):
    frames, focus, kappa, scene = sweep
    drift = torch.tensor([1.0, 1.04, 0.97, 1.02, 0.96])
    luma = (frames * drift[:, None, None, None]).mean(1)
    evened = relative_exposure(luma) * drift
    assert evened.max() / evened.min() < 1.01
    found = plane_sweep(frames * drift[:, None, None, None], focus, kappa)
    assert error_px(found, scene, kappa).median() < 0.30


def test_true_hypothesis_costs_least(sweep):
    frames, focus, kappa, scene = sweep
    tested = hypotheses(focus, kappa, 24)
    cost = cost_volume(frames[None], focus[None], kappa[None], tested)
    assert cost.shape == (1, 24, scene.height, scene.width)
    assert cost.min() >= 0
    found = tested[cost[0].argmin(0)]
    step = tested[1] - tested[0]
    close = (found - 1 / torch.from_numpy(scene.depth_m)).abs() < 1.5 * step
    assert close.float().mean() > 0.8


def test_a_batch_is_its_stacks_one_by_one(sweep):
    frames, focus, kappa, _ = sweep
    tested = hypotheses(focus, kappa, 8)
    both = torch.stack([frames, frames.flip(-1)])
    together = cost_volume(both, focus.expand(2, -1), kappa.expand(2, -1), tested.expand(2, -1))
    alone = cost_volume(both[1:], focus[None], kappa[None], tested)
    torch.testing.assert_close(together[1:], alone)


def test_tile_with_halo_equals_the_whole(sweep):
    frames, focus, kappa, _ = sweep
    whole = plane_sweep(frames, focus, kappa)
    part = plane_sweep(frames[..., :160], focus, kappa, context=photometry(frames))
    difference_dpt = (whole.inverse_depth_dpt[:, :64] - part.inverse_depth_dpt[:, :64]).abs()
    assert difference_dpt.quantile(0.99) < 1e-3


def test_gain_is_found_from_the_frames(sweep):
    frames, focus, kappa, _ = sweep
    assert estimate_gain(frames, focus) == pytest.approx(float(kappa.mean()), rel=0.15)


@pytest.mark.parametrize("count", [0, 2, 257])
def test_a_number_of_hypotheses_that_cannot_be_searched_is_refused(count):
    with pytest.raises(ValueError, match=f"hypotheses={count}: expected 3 .* to 256"):
        SweepConfig(hypotheses=count)
    SweepConfig(hypotheses=256)


def test_one_frame_is_refused(sweep):
    frames, focus, kappa, _ = sweep
    with pytest.raises(ValueError, match="S >= 2"):
        cost_volume(frames[None, :1], focus[None, :1], kappa[None, :1], torch.linspace(0.5, 1, 4))


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "auto:1", "cpu:0"])
def test_unknown_device_is_refused(name):
    with pytest.raises(UsageError, match="expected auto, cpu"):
        pick_device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_missing_cuda_is_one_sentence():
    with pytest.raises(UsageError, match="finds no CUDA device"):
        pick_device("cuda")
    assert pick_device("auto").type == "cpu"


def test_apples_gpu_is_never_taken(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert pick_device("auto").type == "cpu"
    for name in ("mps", "mps:0"):
        with pytest.raises(UsageError, match=f"--device {name}: Apple's GPUs lack the float64"):
            pick_device(name)
