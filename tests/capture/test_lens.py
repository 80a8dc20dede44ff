"""The optics: physics first, then what a calibrated profile says and refuses."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from capture.errors import DataError, UsageError
from capture.lens import (
    Breathing,
    FocusTable,
    Intrinsics,
    Lens,
    LensProfile,
    Measured,
    coc_diameter_px,
    depth_error_m,
    depth_of_field_m,
    dioptre_to_metre,
    metre_to_dioptre,
    same_setting,
)

LENS = Lens(focal_length_m=0.050, f_number=2.8, pixel_pitch_m=2.5e-5)


def test_blur_is_zero_in_focus_and_flips_sign_across_it():
    kappa = LENS.kappa_px_per_dpt(0.5)
    assert coc_diameter_px(kappa, 0.5, 0.5) == 0
    assert coc_diameter_px(kappa, 0.5, 0.2) > 0  # behind the plane of focus
    assert coc_diameter_px(kappa, 0.5, 0.9) < 0


def test_blur_grows_with_the_aperture():
    wide = LENS.model_copy(update={"f_number": 1.4})
    assert wide.kappa_px_per_dpt(0.5) == pytest.approx(2 * LENS.kappa_px_per_dpt(0.5))


@given(f_mm=st.floats(5, 300), n=st.floats(1, 16), focus_dpt=st.floats(0.05, 2.5), depth_m=st.floats(0.4, 50))
def test_three_ways_to_the_circle_of_confusion_agree(f_mm, n, focus_dpt, depth_m):
    lens = Lens(focal_length_m=f_mm / 1000, f_number=n, pixel_pitch_m=1e-5)
    f, s, d, p = lens.focal_length_m, 1 / focus_dpt, depth_m, lens.pixel_pitch_m
    linear = coc_diameter_px(lens.kappa_px_per_dpt(focus_dpt), focus_dpt, 1 / d)
    textbook = lens.aperture_m * f / (s - f) * (d - s) / d / p
    image_side = lens.aperture_m * lens.image_distance_m(focus_dpt) * (1 / s - 1 / d) / p
    assert linear == pytest.approx(textbook, rel=1e-9, abs=1e-9)
    assert linear == pytest.approx(image_side, rel=1e-9, abs=1e-9)


def test_floats_arrays_and_tensors_agree():
    focus, depth = np.array([0.3, 1.2]), np.array([0.5, 0.4])
    arrays = coc_diameter_px(LENS.kappa_px_per_dpt(focus), focus, depth)
    focus_t, depth_t = torch.from_numpy(focus), torch.from_numpy(depth)
    tensors = coc_diameter_px(LENS.kappa_px_per_dpt(focus_t), focus_t, depth_t)
    floats = [
        coc_diameter_px(LENS.kappa_px_per_dpt(float(q)), float(q), float(d)) for q, d in zip(focus, depth, strict=True)
    ]
    assert isinstance(tensors, torch.Tensor)
    np.testing.assert_allclose(tensors.numpy(), arrays, rtol=1e-12)
    np.testing.assert_allclose(floats, arrays, rtol=1e-12)


def test_gradients_flow_through_the_blur():
    focus = torch.tensor([0.4, 1.1], dtype=torch.float64, requires_grad=True)
    depth = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, d: coc_diameter_px(LENS.kappa_px_per_dpt(q), q, d), (focus, depth))


def test_dioptres_and_metres_handle_infinity():
    assert dioptre_to_metre(0.0) == float("inf")
    assert metre_to_dioptre(float("inf")) == 0.0
    np.testing.assert_array_equal(metre_to_dioptre(np.array([2.0, np.inf])), [0.5, 0.0])


def test_depth_of_field_is_where_the_blur_reaches_the_limit():
    near, far = depth_of_field_m(LENS, 0.5, 2.0)
    kappa = LENS.kappa_px_per_dpt(0.5)
    assert near < 2.0 < far
    assert abs(coc_diameter_px(kappa, 0.5, 1 / near)) == pytest.approx(2.0)
    assert abs(coc_diameter_px(kappa, 0.5, 1 / far)) == pytest.approx(2.0)
    assert depth_of_field_m(LENS, 0.01, 2.0)[1] == float("inf")


def test_depth_error_is_the_derivative_of_depth_by_blur():
    kappa, depth, step = LENS.kappa_px_per_dpt(0.5), 3.0, 1e-4
    blur = coc_diameter_px(kappa, 0.5, 1 / depth)
    moved = 1 / (0.5 - (blur + step) / kappa)
    assert depth_error_m(depth, kappa, step) == pytest.approx(moved - depth, rel=1e-3)


def test_a_resized_image_has_a_lens_with_a_larger_pitch():
    assert LENS.rescaled(0.5).kappa_px_per_dpt(0.7) == pytest.approx(0.5 * LENS.kappa_px_per_dpt(0.7))
    with pytest.raises(ValueError, match="positive"):
        LENS.rescaled(0.0)


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("focal_length_m", 50.0, "50 mm is 0.050"),
        ("f_number", 0.0, "not an f-number"),
        ("pixel_pitch_m", 4.0, "4 um is 4e-6"),
    ],
)
def test_wrong_units_are_refused(field, value, says):
    values = {"focal_length_m": 0.05, "f_number": 2.8, "pixel_pitch_m": 4e-6, field: value}
    with pytest.raises(ValidationError, match=says):
        Lens(**values)


def test_focus_inside_the_focal_length_is_a_problem():
    names = ["a", "b", "c"]
    assert LENS.focus_problem([np.nan, np.inf, 0.06], names) is None
    problem = LENS.focus_problem([0.5, 0.050, np.nan], names)
    assert problem.startswith("frame b is focused at 0.05 m, and no lens with a focal length of 0.05 m can")


# --- LensProfile

POSITIONS = np.linspace(0.0, 1000.0, 21)
FOCUS = 0.4 + 1.3 * (POSITIONS / 1000.0) ** 1.4


def make_profile(falling=False, **changes) -> LensProfile:
    focus = FOCUS[::-1] if falling else FOCUS
    zero = tuple(0.0 * POSITIONS)
    fields = {
        "grade": "metric",
        "width_px": 960,
        "height_px": 640,
        "pixel_pitch_m": 2.5e-5,
        "pupil_diameter_m": Measured(value=0.0179, std=2e-5),
        "focus": FocusTable(
            positions=tuple(POSITIONS), focus_dpt=tuple(focus), std_dpt=tuple(zero), repeatability_dpt=1e-3
        ),
        "breathing": Breathing(
            reference_position=500.0,
            scale=tuple(1 + (POSITIONS - 500) * 4e-5),
            scale_std=tuple(zero),
            shift_x_px=tuple(POSITIONS / 500.0),
            shift_y_px=tuple(zero),
        ),
        "intrinsics": Intrinsics(
            focal_length_px=Measured(value=2000.0, std=4.0),
            center_x_px=Measured(value=479.5, std=3.0),
            center_y_px=Measured(value=319.5, std=3.0),
            distortion=(-0.1, 0.0, 0.0, 0.0, 0.0),
        ),
        "floor_sigma_px": Measured(value=0.6, std=0.05),
        "distance_scale_std": 2e-3,
    }
    return LensProfile(**{**fields, **changes})


@pytest.mark.parametrize("falling", [False, True])
def test_step_for_inverts_focus(falling):
    profile = make_profile(falling)
    steps = np.array([0.0, 3.7, 499.0, 1000.0])
    np.testing.assert_allclose(profile.step_for(profile.focus_dpt(steps)), steps, atol=1e-6)


def test_the_focus_map_stays_monotone_between_its_positions():
    dense = make_profile().focus_dpt(np.linspace(0, 1000, 5001))
    assert np.all(np.diff(dense) > 0)


def test_kappa_is_pupil_times_focal_length_at_that_focus():
    optics = make_profile().optics([500.0, 1000.0])
    np.testing.assert_allclose(optics.kappa_px_per_dpt, 0.0179 * 2000.0 * np.array([1.0, 1.02]), rtol=1e-9)
    np.testing.assert_allclose(optics.scale, [1.0, 1.02], rtol=1e-9)
    np.testing.assert_allclose(optics.shift_px[:, 0], [1.0, 2.0])


def test_optics_by_position_dioptre_and_distance_agree():
    profile = make_profile()
    by_position = profile.optics([250.0, 750.0])
    for values, unit in ((by_position.focus_dpt, "dioptre"), (1 / by_position.focus_dpt, "m")):
        again = profile.optics(values, unit)
        for here, there in zip(again, by_position, strict=True):
            np.testing.assert_allclose(here, there, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(profile.kappa_px_per_dpt(by_position.focus_dpt), by_position.kappa_px_per_dpt, rtol=1e-9)


def test_focus_error_holds_the_motor_and_the_common_scale():
    optics = make_profile().optics([1000.0])
    assert optics.focus_std_dpt[0] == pytest.approx(np.hypot(1e-3, 2e-3 * 1.7))


def test_yaml_reads_back_to_the_last_bit(tmp_path):
    profile = make_profile(warnings=("SCALE: µ ± 1",), board={"columns": 7, "square_m": 0.1 + 0.2}, camera="no")
    path = tmp_path / "lens.yaml"
    profile.write(path)
    assert LensProfile.read(path) == profile
    assert not list(tmp_path.glob("*.partial"))


def test_use_outside_the_calibrated_range_is_refused():
    profile = make_profile()
    with pytest.raises(UsageError, match=r"1000\.1 is outside the lens profile"):
        profile.focus_dpt(1000.1)
    with pytest.raises(UsageError, match="outside the lens profile"):
        profile.step_for(2.0)
    with pytest.raises(UsageError, match="outside the lens profile"):
        profile.optics([np.nan])


def test_a_rescaled_profile_keeps_metres_and_dioptres():
    profile, half = make_profile(), make_profile().rescaled(0.5)
    there, here = profile.optics([300.0]), half.optics([300.0])
    assert here.kappa_px_per_dpt[0] == pytest.approx(0.5 * there.kappa_px_per_dpt[0])
    assert here.shift_px[0, 0] == pytest.approx(0.5 * there.shift_px[0, 0])
    assert here.focus_dpt == there.focus_dpt
    assert half.pupil_diameter_m == profile.pupil_diameter_m
    assert half.floor_sigma_px.value == pytest.approx(0.3)
    assert half.intrinsics.center_x_px.value == pytest.approx((480 - 1) / 2)
    assert (half.width_px, half.height_px) == (480, 320)


def test_a_profile_fits_a_resized_image_and_refuses_a_cropped_one():
    assert make_profile().fitted_to(480, 320).width_px == 480
    with pytest.raises(DataError, match="not the same picture resized"):
        make_profile().fitted_to(960, 540)


def test_a_focus_map_that_turns_is_refused():
    with pytest.raises(ValidationError, match="the map turns"):
        FocusTable(positions=(0, 1, 2), focus_dpt=(0.4, 0.6, 0.5), std_dpt=(0, 0, 0))


def test_settings_are_the_same_but_for_rounding():
    assert same_setting(2.8, 2.83) and same_setting(2.83, 2.8)
    assert not same_setting(2.8, 2.9) and not same_setting(2.9, 2.8)
    assert same_setting(2.8, np.nan) and same_setting(np.nan, 2.8)
