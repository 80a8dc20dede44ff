"""Focus and gain of a stack: from what it says, and refused where that cannot be."""

import numpy as np
import pytest

from calibration.exif import profile_from_exif
from capture.errors import DataError
from capture.lens import Lens
from capture.stack import FocalStack
from reconstruct.optics import optics_of
from tests.reconstruct.small_stack import FOCUS_DPT, LENS, write_small_stack


@pytest.mark.parametrize("focal_length_m", [0.999, 1.0, 1.5])
def test_focus_inside_the_focal_length_is_refused(tmp_path, focal_length_m):
    lens = LENS.model_copy(update={"focal_length_m": focal_length_m})
    path = write_small_stack(tmp_path / "close.h5", lens=lens)
    with FocalStack.open(path) as stack, pytest.raises(DataError, match=r"h5: frame 0 is focused at 1 m, .* can"):
        optics_of(stack)


def test_blur_far_wider_than_the_picture_is_refused(tmp_path):
    lens = LENS.model_copy(update={"focal_length_m": 0.5})  # 0.05 was meant
    path = write_small_stack(tmp_path / "wide.h5", lens=lens)
    with (
        FocalStack.open(path) as stack,
        pytest.raises(DataError, match=r"h5: from 2\.5 m to 1 m, .* blur over 1786 px"),
    ):
        optics_of(stack)


def test_a_macro_lens_swept_to_infinity_is_not(tmp_path):
    macro = {"focal_length_m": 0.09, "f_number": 3.5, "pixel_pitch_m": 0.0173 / 96}  # 2:1, at 3/2 focal lengths
    path = write_small_stack(tmp_path / "macro.h5", lens=Lens(**macro), focus_distance_m=[0.135, 0.2, 0.5, np.inf])
    with FocalStack.open(path) as stack:
        widest_px = optics_of(stack).kappa_px_per_dpt.max() / 0.135
    assert widest_px > 2.9 * 96


@pytest.mark.parametrize(
    ("distances_m", "nearest", "taken"),
    [
        ([1.0, np.nan, 2.0, np.nan], 0, False),
        ([np.nan, 2.0, np.nan, 1.0], 3, False),
        ([np.inf, np.nan, np.nan, 1.0], 3, False),
        ([np.nan, np.nan, np.nan, 1.0], 0, True),
        ([np.nan] * 4, 0, True),
    ],
)
def test_two_known_distances_say_where_near_is(tmp_path, distances_m, nearest, taken):
    path = write_small_stack(tmp_path / "partly.h5", focus_distance_m=distances_m)
    with FocalStack.open(path) as stack:
        optics = optics_of(stack)
    assert not optics.metric
    assert optics.focus_dpt.argmax() == nearest
    assert np.ptp(optics.focus_dpt) == 1.0 and len(optics.focus_dpt) == len(FOCUS_DPT)
    assert ("first frame is taken for the nearest" in optics.warnings[0]) is taken


def test_a_profile_holds_for_its_aperture_only(tmp_path):
    path = write_small_stack(tmp_path / "stack.h5")
    profile = profile_from_exif(path)
    assert profile.f_number == LENS.f_number
    with FocalStack.open(path) as stack:
        optics_of(stack, profile)
        optics_of(stack, profile.model_copy(update={"f_number": None}))
        optics_of(stack, profile.model_copy(update={"f_number": 1.02 * LENS.f_number}))
        with pytest.raises(DataError, match=r"h5 was taken at f/2\.8, its lens profile holds for f/5\.6"):
            optics_of(stack, profile.model_copy(update={"f_number": 5.6}))
