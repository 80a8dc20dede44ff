"""The focus of every frame, found from aperture-sampled frames whose true settings are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from capture.optics import Condition, simulate_sweep, sweep_for_scene
from capture.scenes import procedural_scene
from capture.stack import FocalStack
from reconstruct.datasets import import_dataset
from reconstruct.lens_fit import WINDOW_PX, fitted_focus, telling_windows
from tests.reconstruct.tiny_datasets import write_nyuv2


@pytest.fixture(scope="module")
def sweep():
    """Frames and validity of a scene, its true settings and gains."""
    scene = procedural_scene(3, 96, 128)
    taken = simulate_sweep(scene, *sweep_for_scene(scene, 5, 16.0), Condition(psf="disc", noise_std=0.01, bits=8))
    frames = torch.from_numpy(np.ascontiguousarray(taken.linear().transpose(0, 3, 1, 2)))
    focus, kappa = (torch.tensor(x, dtype=torch.float32) for x in (taken.focus_dpt, taken.kappa_px_per_dpt))
    return frames, torch.ones_like(frames[:, 0], dtype=torch.bool), focus, kappa


def off_px(focus, true, kappa):
    """What no shift and stretch explains, px of blur std."""
    line = np.polynomial.Polynomial.fit(true.numpy(), (focus - true).numpy(), 1)
    left = (focus - true).numpy() - line(true.numpy())
    return float(np.sqrt(np.mean(left**2)) * kappa.mean() / 4)


@pytest.mark.parametrize("wrong_px", [(0, 0, 0.6, 0, 0), (0.3, -0.4, 0, 0.5, -0.2)])
def test_wrong_settings_are_found(sweep, wrong_px):
    frames, valid, true, kappa = sweep
    told = true + torch.tensor(wrong_px) * 4 / kappa.mean()
    fitted = fitted_focus([(frames, valid)], told, kappa)
    assert off_px(told, true, kappa) > 0.2
    assert off_px(fitted, true, kappa) < 0.25 * off_px(told, true, kappa)


def test_what_no_stack_tells_stays_as_it_was_reported(sweep):
    frames, valid, true, kappa = sweep
    told = true + torch.tensor([0, 0, 0.6, 0, 0]) * 4 / kappa.mean()
    moved = fitted_focus([(frames, valid)], told, kappa) - told
    assert float(moved.abs().max()) > 0
    assert float(moved.mean()) == pytest.approx(0, abs=1e-4)
    assert float((moved * (told - told.mean())).sum()) == pytest.approx(0, abs=1e-4)


def test_right_settings_are_not_touched(sweep):
    frames, valid, true, kappa = sweep
    assert torch.equal(fitted_focus([(frames, valid)], true, kappa), true)


def test_a_frame_that_no_focus_explains_bends_nothing(tmp_path):
    """The paper's simulator cuts blur off at 7 px: its nearest frame is sharper than any focus of ours makes it."""
    source = write_nyuv2(tmp_path)[0]
    import_dataset("nyuv2", source, tmp_path, renderer="published", limit=1)
    with FocalStack.open(tmp_path / "nyuv2_0002.h5") as stack:
        frames = torch.from_numpy(np.stack([stack.linear(i) for i in range(stack.n_frames)]))
        focus, kappa = (
            torch.tensor(x).float() for x in (stack.focus_dpt, stack.lens.kappa_px_per_dpt(stack.focus_dpt))
        )
    window = frames.permute(0, 3, 1, 2)[..., 40:200, 60:260].contiguous()
    valid = torch.ones_like(window[:, 0], dtype=torch.bool)
    assert torch.equal(fitted_focus([(window, valid)], focus, kappa), focus)


def test_two_frames_tell_nothing(sweep):
    frames, valid, true, kappa = sweep
    told = true[:2] + torch.tensor([0, 0.1])
    assert torch.equal(fitted_focus([(frames[:2], valid[:2])], told, kappa[:2]), told)


@pytest.mark.parametrize("level", [0.0, 0.3, torch.nan])
def test_frames_without_anything_in_them_tell_nothing(sweep, level):
    frames, valid, true, kappa = sweep
    assert torch.equal(fitted_focus([(torch.full_like(frames, level), valid)], true, kappa), true)
    assert torch.equal(fitted_focus([(frames, torch.zeros_like(valid))], true, kappa), true)


def test_parts_count_together(sweep):
    """Two halves of the picture know what the whole does."""
    frames, valid, true, kappa = sweep
    told = true + torch.tensor([0, 0, 0.6, 0, 0]) * 4 / kappa.mean()
    halves = [(frames[..., half], valid[..., half]) for half in (slice(0, 64), slice(64, 128))]
    assert off_px(fitted_focus(halves, told, kappa), true, kappa) < 0.25 * off_px(told, true, kappa)


def test_windows_lie_where_detail_is():
    luma = torch.zeros(2, 250, 300)
    luma[1, 130:140, 290:300] = torch.rand(10, 10)
    small = telling_windows(luma[:, :90, :100], 90, 100)
    found = telling_windows(luma, 500, 600)
    assert small == [(slice(0, 90), slice(0, 100))]
    assert len(found) == 4
    assert all(window.stop - window.start == WINDOW_PX for pair in found for window in pair)
    rows, cols = found[3]
    assert rows.start <= 260
    assert rows.stop >= 278
    assert cols.stop > 590
