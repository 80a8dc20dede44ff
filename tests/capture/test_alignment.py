"""Alignment against simulated breathing and motion, whose truth is known, and against the real stacks."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import pytest

from capture.alignment import Alignment, align_stack
from capture.errors import DataError

STACKS = Path(__file__).parents[3] / "shared" / "data" / "stacks"
needs_stacks = pytest.mark.skipif(not STACKS.is_dir(), reason="../shared/data/stacks (real focal stacks) is not here")


@lru_cache
def fractal(seed: int, height: int, width: int) -> np.ndarray:
    """Linear colour texture with the 1/f spectrum of natural scenes."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    frequency[0, 0] = 1
    noise = rng.normal(size=(3, height, width))
    texture = np.moveaxis(np.fft.ifft2(np.fft.fft2(noise) / frequency).real, 0, -1)
    return np.clip(0.35 + 0.15 * (texture - texture.mean()) / texture.std(), 0.01, 1).astype(np.float32)


def disc_blur(image: np.ndarray, diameter_px: float) -> np.ndarray:
    half = int(np.ceil(diameter_px / 2)) + 1
    y, x = np.mgrid[-half : half + 1, -half : half + 1]
    kernel = np.clip(diameter_px / 2 + 0.5 - np.hypot(x, y), 0, 1)
    return cv2.filter2D(image, -1, kernel / kernel.sum(), borderType=cv2.BORDER_REFLECT_101)


def simulate(ratio, shift, *, noise=0.01, blur_px=8.0, size=(320, 480), seed=0) -> np.ndarray:
    """(S, H, W, 3) sweep from far to near over a far and a near textured plane, 2x supersampled.

    Frame i shows point p (from the centre) of the scene at ratio[i] * p + shift[i]; exposure flickers by 5 %.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    far, near = fractal(1, 2 * height, 2 * width), fractal(2, 2 * height, 2 * width)
    mask = np.zeros((2 * height, 2 * width), np.float32)
    mask[height // 2 : 3 * height // 2, 2 * width // 3 : 3 * width // 2] = 1
    frames = []
    for i, (r, t) in enumerate(zip(np.asarray(ratio, complex), np.asarray(shift, complex), strict=True)):
        centre = complex(2 * width - 1, 2 * height - 1) / 2
        offset = centre + 2 * t - r * centre
        matrix = np.array([[r.real, -r.imag, offset.real], [r.imag, r.real, offset.imag]])

        def moved(layer, matrix=matrix):
            # Area sampling would be exact; at 2x the interpolation error is below 0.01 px.
            return cv2.warpAffine(
                layer, matrix, (2 * width, 2 * height), flags=cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REFLECT_101
            )

        nearness = i / (len(ratio) - 1)
        cover = disc_blur(moved(mask), 2 * blur_px * (1 - nearness))[..., None]
        front = disc_blur(moved(near * mask[..., None]), 2 * blur_px * (1 - nearness))
        image = disc_blur(moved(far), 2 * blur_px * nearness) * (1 - cover) + front
        image = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA) * (1 + 0.05 * rng.uniform(-1, 1))
        frames.append(np.clip(image + noise * rng.normal(size=image.shape), 0, 1).astype(np.float32))
    return np.stack(frames)


def error_px(alignment: Alignment, ratio, shift) -> tuple[float, float]:
    """(worst frame's rms over the image, worst corner) of the estimated against the true motion."""
    ratio, shift = np.asarray(ratio, complex), np.asarray(shift, complex)
    ref = alignment.reference
    true_ratio = ratio / ratio[ref]
    true_shift = shift - true_ratio * shift[ref]
    y, x = np.mgrid[-1:1:21j, -1:1:21j]
    points = (x * (alignment.width - 1) + 1j * y * (alignment.height - 1)) / 2
    off = np.abs((alignment.ratio - true_ratio)[:, None, None] * points + (alignment.shift - true_shift)[:, None, None])
    return float(np.sqrt((off**2).mean(axis=(1, 2))).max()), float(off.max())


U = np.linspace(0, 1, 5)
HAND = np.array([0.3 - 0.2j, -0.5 + 0.4j, 0.1 + 0.9j, 1.2 + 0.2j, 0.8 - 0.9j])


@pytest.mark.parametrize(
    ("scale", "shift", "noise"),
    [
        pytest.param(1 + 0.04 * U, 0 * HAND, 0.01, id="thin-lens-sign"),
        pytest.param(1 - 0.035 * U, HAND, 0.02, id="zoom-sign-and-hand"),
        pytest.param(1 + 0.16 * U, 4 * HAND, 0.01, id="macro-16-percent"),
        pytest.param(1 + 0.02 * U, 20 * HAND, 0.03, id="large-shift-noisy"),
    ],
)
def test_breathing_and_motion_are_found(scale, shift, noise):
    frames = simulate(scale, shift, noise=noise)
    alignment = align_stack(frames)
    rms, corner = error_px(alignment, scale, shift)
    assert rms <= 0.1, f"rms {rms:.3f} px"
    assert corner <= 0.25, f"corner {corner:.3f} px"
    assert alignment.estimable.all()
    assert np.nanmax(alignment.residual_px) < 0.3
    alignment.check()


def test_rotation_is_found_when_asked_for():
    ratio = (1 + 0.02 * U) * np.exp(1j * np.radians([0.0, 0.4, -0.3, 0.8, 0.2]))
    alignment = align_stack(simulate(ratio, HAND), rotation=True)
    assert error_px(alignment, ratio, HAND)[0] <= 0.1
    assert np.all(alignment.rotation_std_rad[np.arange(5) != 2] > 0)


def test_standard_errors_cover_the_truth():
    scale = 1 + 0.03 * U
    misses = []
    for seed in range(2):
        alignment = align_stack(simulate(scale, HAND, noise=0.03, seed=seed))
        others = np.arange(5) != alignment.reference
        misses += list(np.abs(alignment.scales - scale / scale[2])[others] / alignment.scale_std[others])
    assert 0.02 < np.median(misses) < 2.0
    assert np.max(misses) < 5.0


def test_order_does_not_matter_when_focus_is_given():
    scale = 1 + 0.05 * U
    shuffled = np.array([3, 0, 4, 2, 1])
    frames = simulate(scale, HAND)
    plain = align_stack(frames, U, reference=2)
    mixed = align_stack(frames[shuffled], U[shuffled], reference=3)
    np.testing.assert_allclose(mixed.scales, plain.scales[shuffled], atol=1e-6)
    assert align_stack(frames[shuffled], U[shuffled]).reference == 3  # the middle in focus, not in the list


def test_known_scales_leave_only_the_shift_to_estimate():
    scale = 1 + 0.05 * U
    alignment = align_stack(simulate(scale, HAND), scales=scale)
    np.testing.assert_allclose(alignment.scales, scale / scale[2], atol=1e-12)
    assert np.all(alignment.scale_std == 0)
    assert error_px(alignment, scale, HAND)[0] <= 0.1


def test_content_that_moves_by_itself_is_ignored():
    scale = 1 + 0.03 * U
    frames = simulate(scale, 0 * U)
    mover = fractal(9, 90, 110)
    for i in range(5):
        frames[i, 200:290, 40 + 12 * i : 150 + 12 * i] = mover
    assert error_px(align_stack(frames), scale, 0 * U)[0] <= 0.15


@pytest.mark.parametrize(("noise", "vignetting"), [(0.0, 0.0), (0.02, 0.0), (0.02, 0.4)])
def test_flat_wall_is_not_estimable_and_stays_untouched(noise, vignetting):
    rng = np.random.default_rng(3)
    y, x = np.mgrid[-1:1:480j, -1:1:640j]
    wall = 0.4 * (1 - vignetting * (x**2 + y**2) / 2)[..., None]  # vignetting is fixed to the sensor
    frames = (wall + noise * rng.normal(size=(4, 480, 640, 3))).astype(np.float32)
    alignment = align_stack(frames)
    assert not alignment.estimable.any()
    assert alignment.is_identity
    assert np.isnan(alignment.residual_px).all()
    assert np.isinf(alignment.scale_std[1:][alignment.reference != np.arange(1, 4)]).all()
    alignment.check()


def test_still_camera_is_left_untouched():
    frames = simulate(np.ones(5), np.zeros(5), noise=0.005, blur_px=4)
    alignment = align_stack(frames)
    assert alignment.is_identity
    np.testing.assert_array_equal(alignment.apply(frames[0], 0), frames[0])


@pytest.mark.parametrize("foreign", [0, 2, 3])
def test_frame_of_another_scene_is_refused_by_name(foreign):
    frames = simulate(1 + 0.03 * U, 0 * U)
    frames[foreign] = fractal(11, 320, 480)
    alignment = align_stack(frames)
    with pytest.raises(DataError, match=rf"frame {foreign} does not align .* px off \(limit 2.0 px"):
        alignment.check()
    alignment.check(limit_px=100.0)  # told otherwise


def test_scene_that_moved_during_the_sweep_is_refused():
    frames = simulate(1 + 0.03 * U, 0 * U)
    frames[3:, :, :300] = np.roll(frames[3:], 5, axis=1)[:, :, :300]  # most of the scene jumps by 5 px
    frames[3:, :, 300:] = np.roll(frames[3:], -5, axis=1)[:, :, 300:]
    alignment = align_stack(frames)
    with pytest.raises(DataError, match="px off"):
        alignment.check()


def test_frames_of_different_sizes_are_refused():
    with pytest.raises(DataError, match="frame 1 is 64x48 but frame 0 is 64x50"):
        align_stack([np.zeros((50, 64, 3), np.float32), np.zeros((48, 64, 3), np.float32)])


def test_large_frames_read_one_at_a_time_give_full_size_pixels():
    scale, shift = 1 + 0.04 * U, HAND
    frames = simulate(scale, shift)
    large = align_stack(lambda i: cv2.resize(frames[i], (1440, 960)), n_frames=5, max_size=480)
    assert error_px(large, scale, 3 * shift)[0] <= 0.3  # three times the pixels
    assert large.default_limit_px == pytest.approx(2.88)


def test_warped_frames_coincide():
    ratio = (1 + 0.06 * U) * np.exp(0.005j * U)
    frames = simulate(ratio, 3 * HAND, noise=0.0, blur_px=0.0)
    alignment = align_stack(frames, rotation=True)
    rows, cols = alignment.crop

    def seen(frame):  # without the finest pixels, which no resampling keeps, and without the simulated flicker
        smooth = cv2.GaussianBlur(frame, (0, 0), 1.0)[rows, cols]
        return smooth / smooth.mean()

    for i in (0, 4):
        before = np.abs(seen(frames[i]) - seen(frames[2])).mean()
        assert np.abs(seen(alignment.apply(frames[i], i)) - seen(frames[2])).mean() < 0.06 * before


def test_tiles_equal_the_whole_and_read_little():
    rng = np.random.default_rng(0)
    frame = rng.random((300, 400, 3), dtype=np.float32)
    alignment = Alignment.from_scales([1.07, 1.0, 0.95], 300, 400)
    whole = alignment.apply(frame, 0)
    sizes = []

    def read(i, rows, cols):
        sizes.append(frame[rows, cols].shape[:2])
        return frame[rows, cols]

    for rows, cols in [
        (slice(0, 100), slice(0, 130)),
        (slice(137, 260), slice(255, 400)),
        (slice(299, 300), slice(3, 4)),
    ]:
        np.testing.assert_array_equal(alignment.apply_tile(read, 0, rows, cols), whole[rows, cols])
    assert max(h * w for h, w in sizes) < 0.25 * 300 * 400


def test_profile_scales_give_matrices_kappa_factor_and_crop():
    alignment = Alignment.from_scales([0.9, 1.0, 1.25], 101, 201)
    np.testing.assert_allclose(alignment.matrices[2] @ [100, 50, 1], [100, 50])  # the centre stays
    np.testing.assert_allclose(alignment.matrices[2] @ [140, 50, 1], [150, 50])  # larger: 40 px become 50
    np.testing.assert_allclose(alignment.kappa_factor, [1 / 0.9, 1.0, 0.8])
    rows, cols = alignment.crop
    mask = alignment.valid_mask()
    assert mask[rows, cols].all()
    assert mask.sum() == mask[rows, cols].size  # without rotation the valid part is that rectangle
    assert alignment.seen(slice(0, 50), slice(0, 100), 2).shape == (3, 50, 100)


def test_warping_divides_the_blur_disc_by_the_scale():
    dots = np.zeros((201, 201), np.float32)
    dots[100, 100] = 1.0
    scale = 1.25
    blurred = disc_blur(dots, 40.0).astype(np.float32)  # what frame 0, 1.25 times larger, shows
    warped = Alignment.from_scales([scale, 1.0], 201, 201, reference=1).apply(blurred, 0)
    area = warped.sum() / warped[100, 100]
    assert 2 * np.sqrt(area / np.pi) == pytest.approx(40.0 / scale, rel=0.01)


@needs_stacks
@pytest.mark.parametrize(
    ("name", "near_over_far"),  # `magnification_vs_middle_frame` of stack.json, first over last
    [
        ("dslr_shelf", 0.965),
        ("phone_keyboard", 1.044),
        ("webcam_sponge", 1.019),
        ("pcb_usb", 1.037),
        ("pcb_button", 1.159),
    ],
)
def test_real_stacks_have_the_scale_measured_before(name, near_over_far):
    listing = json.loads((STACKS / name / "stack.json").read_text())
    images = [cv2.imread(str(STACKS / name / frame["file"])).astype(np.float32) / 255 for frame in listing["frames"]]
    alignment = align_stack([image**2.2 for image in images])
    assert alignment.estimable.all()
    assert alignment.scales[0] / alignment.scales[-1] == pytest.approx(near_over_far, abs=0.006)
    assert alignment.matched.min() > 0.5


@pytest.mark.parametrize("size", [(1, 1), (3, 3), (2, 40), (40, 1), (1, 3000), (9, 4000)])
def test_pictures_too_narrow_to_compare_are_left_as_they_are(size):
    picture = np.random.default_rng(0).random((*size, 3)).astype(np.float32)
    found = align_stack([picture, 0.9 * picture, picture[::-1]])
    assert found.is_identity
    assert not found.estimable.any()
