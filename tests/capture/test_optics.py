from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from capture.lens import coc_diameter_px
from capture.optics import (
    CONDITIONS,
    NOTES_LENS,
    ApertureRenderer,
    Condition,
    breathing_magnification,
    expose,
    interpolated,
    lens_positions,
    render_frame,
    simulate_sweep,
    sweep_for_scene,
)
from capture.scenes import Scene, motorcycle, procedural_scene
from capture.stack import FocalStack

KAPPA = 20.0


def flat_scene(image, depth_m=2.0):
    return Scene(image.astype(np.float32), np.full(image.shape[:2], depth_m, np.float32), "flat")


def at_coc(image, coc_px, psf="disc"):
    """`image` at 2 m, in a frame whose focus puts its blur at `coc_px`."""
    return render_frame(flat_scene(image), focus_dpt=0.5 + coc_px / KAPPA, kappa_px_per_dpt=KAPPA, psf=psf)


def photograph(size=120):
    return motorcycle().aif[200 : 200 + size, 300 : 300 + size]


def test_in_focus_is_identity():
    image = photograph()
    np.testing.assert_allclose(at_coc(image, 0.0), image, atol=1e-6)


@pytest.mark.parametrize("psf", ["disc", "gaussian", "hexagon"])
@pytest.mark.parametrize("coc_px", [1.0, 2.0, 4.0, -8.0, 16.0])
def test_second_moment_of_the_blur_is_that_of_a_disc(psf, coc_px):
    grey = np.full((81, 81, 3), 0.25)  # the interpolation's small negative lobes stay above black
    point = grey.copy()
    point[40, 40] += 0.5
    spread = (at_coc(point, coc_px, psf) - at_coc(grey, coc_px, psf))[..., 0].astype(np.float64) / 0.5
    y, x = np.mgrid[:81, :81] - 40
    assert spread.sum() == pytest.approx(1.0, abs=0.02)
    assert (spread * x).sum() == pytest.approx(0.0, abs=0.15)
    for axis in (x, y):
        assert (spread * axis**2).sum() == pytest.approx(coc_px**2 / 16, rel=0.04, abs=0.06)


@pytest.mark.parametrize("coc_px", [2.0, 6.0, 16.0])
def test_fronto_parallel_plane_is_an_ideal_disc_convolution(coc_px):
    image, fine = photograph(), 8
    radius = coc_px / 2 * fine
    y, x = np.mgrid[-int(radius) - 1 : int(radius) + 2, -int(radius) - 1 : int(radius) + 2]
    disc = np.clip(radius + 0.5 - np.hypot(x, y), 0, 1)
    ideal = cv2.filter2D(interpolated(image, fine), -1, disc / disc.sum(), borderType=cv2.BORDER_REFLECT_101)
    inner = np.s_[10:-10, 10:-10]
    error = (at_coc(image, coc_px) - ideal[::fine, ::fine])[inner]
    assert np.sqrt((error**2).mean()) < 0.004


def test_interpolation_keeps_samples_and_parabolas():
    y, x = np.mgrid[:12, :15].astype(np.float32)
    image = np.stack([x, y * x, 0.1 * x * x + 0.2 * y * y], axis=2)
    fine = interpolated(image, 4)
    np.testing.assert_array_equal(fine[::4, ::4], image)
    fy, fx = (np.mgrid[:45, :57] / 4)[:, 8:-8, 8:-8]
    np.testing.assert_allclose(fine[8:-8, 8:-8, 2], 0.1 * fx * fx + 0.2 * fy * fy, atol=1e-4)


def test_constant_light_stays_constant_over_any_depth():
    scene = procedural_scene(4, 96, 128)
    grey = np.full_like(scene.aif, 0.37)
    scene = replace(scene, aif=grey, unmixed_aif=None, hidden_aif=grey)
    np.testing.assert_allclose(render_frame(scene, focus_dpt=0.9, kappa_px_per_dpt=15.0), 0.37, atol=1e-6)
    photo = motorcycle().resized(100, 150)
    photo = replace(photo, aif=np.full_like(photo.aif, 0.37))
    np.testing.assert_allclose(render_frame(photo, focus_dpt=0.3, kappa_px_per_dpt=80.0), 0.37, atol=1e-6)


def two_planes(near_dpt=1.5, far_dpt=0.5):
    """A bright near bar over a dark far wall."""
    aif = np.full((60, 120, 3), 0.1, np.float32)
    depth_m = np.full((60, 120), 1 / far_dpt, np.float32)
    aif[:, 40:80], depth_m[:, 40:80] = 0.9, 1 / near_dpt
    return Scene(aif, depth_m, "bar")


def test_background_blur_does_not_touch_a_sharp_foreground():
    scene = two_planes()
    frame = render_frame(scene, focus_dpt=1.5, kappa_px_per_dpt=12.0)
    np.testing.assert_allclose(frame[:, 41:79], 0.9, atol=1e-5)
    np.testing.assert_allclose(frame[:, :38], 0.1, atol=0.02)  # and the wall seen around the bar's edge is wall


def test_near_bar_out_of_focus_is_half_transparent_at_its_edge():
    frame = render_frame(two_planes(), focus_dpt=0.5, kappa_px_per_dpt=16.0)[30, :, 0]  # bar: 16 px disc
    assert frame[20] == pytest.approx(0.1, abs=0.01) and frame[60] == pytest.approx(0.9, abs=0.01)
    assert frame[39:41].mean() == pytest.approx(0.5, abs=0.05)
    bar = (frame - 0.1) / 0.8
    assert bar.sum() == pytest.approx(40, abs=0.5)  # the bar neither grows nor shrinks
    t = (np.arange(32, 48) - 39.5) / 8  # a straight edge through a disc: circular segments, not a ramp
    np.testing.assert_allclose(bar[32:48], 0.5 + (t * np.sqrt(1 - t * t) + np.arcsin(t)) / np.pi, atol=0.03)


def test_the_sides_of_focus_are_mirrored():
    """Before and behind the focus the aperture appears upside down; only an asymmetric aperture shows it."""
    image = np.full((41, 41, 3), 0.1)
    image[20, 20] = 0.9
    behind, before = at_coc(image, 10.0, "hexagon"), at_coc(image, -10.0, "hexagon")
    np.testing.assert_allclose(behind, before[::-1, ::-1], atol=0.01)


def test_no_cracks_in_a_slanted_surface():
    aif = np.zeros((80, 160, 3), np.float32)
    aif[...] = (0, 0, 1)
    inverse = np.full((80, 160), 0.3, np.float32)
    inverse[:, 30:130] = np.linspace(0.6, 2.6, 100, dtype=np.float32)
    aif[:, 30:130] = 1
    scene = Scene(aif, 1 / inverse, "ramp")
    for focus_dpt in (0.8, 1.6, 2.4):
        frame = render_frame(scene, focus_dpt=focus_dpt, kappa_px_per_dpt=KAPPA)
        np.testing.assert_allclose(frame[:, 60:100], 1.0, atol=1e-5)


def test_lens_positions_share_the_disc_moments():
    for psf in ("disc", "gaussian", "hexagon"):
        points = lens_positions(100, psf)
        np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(points.var(axis=0), 0.25)
    assert np.abs(np.linalg.norm(lens_positions(400, "disc"), axis=1).max() - 1) < 0.02


def test_breathing_scales_the_frame_and_has_either_sign():
    focus_dpt = np.array([0.2, 0.6, 1.0])
    np.testing.assert_allclose(breathing_magnification(focus_dpt, 0.01), [0.995, 1.0, 1.005])
    np.testing.assert_allclose(breathing_magnification(focus_dpt, -0.01), [1.005, 1.0, 0.995])
    image = photograph()
    renderer = ApertureRenderer(flat_scene(image), KAPPA)
    larger = renderer.frame(0.5, KAPPA, magnification=1.04, shift_px=(1.5, -2.0))
    centre = (119 / 2, 119 / 2)
    affine = cv2.getRotationMatrix2D(centre, 0, 1.04) + np.array([[0, 0, 1.5], [0, 0, -2.0]])
    expected = cv2.warpAffine(image, affine, (120, 120), flags=cv2.INTER_CUBIC)
    assert np.abs(larger - expected)[10:-10, 10:-10].mean() < 0.006


def test_noise_follows_its_formula():
    rng = np.random.default_rng(0)
    for signal in (0.0, 0.25, 1.0):
        light = np.full((300, 300, 3), 0.5, np.float32)
        noisy = expose(light * 0 + signal * 0.5 + 0.25, rng, 0.02, None)
        assert noisy.std() == pytest.approx(0.02 * np.sqrt(signal * 0.5 + 0.25 + 0.01), rel=0.02)


def test_quantisation_is_srgb():
    light = np.array([[[0.0, 0.2140, 1.0]]], np.float32)
    rng = np.random.default_rng(0)
    np.testing.assert_array_equal(expose(light, rng, 0.0, 8), [[[0, 127, 255]]])
    assert expose(light, rng, 0.0, 16).dtype == np.uint16
    np.testing.assert_array_equal(expose(light, rng, 0.0, None), light)


def test_conditions_differ_as_named():
    scene = motorcycle().resized(60, 80)
    lens, focus_dpt = sweep_for_scene(scene, 4, 8.0)
    sweeps = {name: simulate_sweep(scene, lens, focus_dpt, name, seed=1) for name in CONDITIONS}
    assert sweeps["noisy"].frames.dtype == np.uint8 and sweeps["same_model"].frames.dtype == np.uint16
    np.testing.assert_array_equal(sweeps["noisy"].true_focus_dpt, sweeps["noisy"].focus_dpt)
    error = sweeps["mismatched"].focus_dpt / sweeps["mismatched"].true_focus_dpt - 1
    assert 0.002 < np.abs(error).max() < 0.08
    assert np.ptp(sweeps["mismatched"].magnification) == pytest.approx(0.005)
    noise = [np.std(sweeps[name].linear() - sweeps["same_model"].linear()) for name in ("noisy", "noisy3")]
    assert 2.5 < noise[1] / noise[0] < 3.5
    repeat = simulate_sweep(scene, lens, focus_dpt, "mismatched", seed=1)
    np.testing.assert_array_equal(repeat.frames, sweeps["mismatched"].frames)


def test_sweep_for_scene_reaches_the_blur_asked_for():
    scene = motorcycle()
    lens, focus_dpt = sweep_for_scene(scene, 7, 24.0)
    kappa = lens.kappa_px_per_dpt(focus_dpt)
    assert coc_diameter_px(kappa[-1], focus_dpt[-1], focus_dpt[0]) == pytest.approx(24.0)
    assert NOTES_LENS.kappa_px_per_dpt(0.0) == pytest.approx(26.04, abs=0.01)


def test_a_sweep_is_written_as_a_stack_with_its_truth(tmp_path):
    scene = motorcycle().resized(60, 80)
    lens, focus_dpt = sweep_for_scene(scene, 3, 6.0)
    sweep = simulate_sweep(scene, lens, focus_dpt, Condition(bits=8))
    path = sweep.write(tmp_path / "m.h5")
    with FocalStack.open(path) as stack:
        assert stack.n_frames == 3 and stack.transfer == "srgb"
        np.testing.assert_allclose(stack.focus_dpt, focus_dpt)
        np.testing.assert_array_equal(stack.raw(1), sweep.frames[1])
        np.testing.assert_array_equal(stack.truth_depth_m, scene.depth_m)
