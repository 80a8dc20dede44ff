"""What a profile says reaches whoever reconstructs or trains with it."""

import numpy as np
import pytest

from calibration.exif import profile_from_exif
from capture.lens import Measured
from capture.optics import Condition, simulate_sweep, sweep_for_scene
from capture.scenes import procedural_scene
from capture.stack import FocalStack
from reconstruct.dataset import load_captured
from reconstruct.infer import Settings, reconstruct

SCENE = procedural_scene(3, 96, 128)
LENS, FOCUS_DPT = sweep_for_scene(SCENE, 5, 8.0)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    taken = simulate_sweep(SCENE, LENS, FOCUS_DPT, Condition(bits=16), quality="fast")
    return taken.write(tmp_path_factory.mktemp("used") / "scene.h5")


def profile_with(path, focus_std_dpt, gain_ratio):
    profile = profile_from_exif(path)
    pupil = profile.pupil_diameter_m.value
    return profile.model_copy(
        update={
            "focus": profile.focus.model_copy(update={"std_dpt": (focus_std_dpt,) * 5}),
            "pupil_diameter_m": Measured(value=1.1 * pupil, std=1.1 * pupil * gain_ratio),
            "distance_scale_std": 0.0,
        }
    )


def test_depth_std_holds_what_the_calibration_does_not_know(path):
    with FocalStack.open(path) as stack:
        sure, focus, gain = (
            reconstruct(stack, Settings(method="plane-sweep"), profile_with(path, *errors)).std_dpt
            for errors in ((0.0, 0.0), (0.05, 0.0), (0.0, 0.2))
        )
    known = np.isfinite(sure)
    np.testing.assert_allclose(focus[known] ** 2 - sure[known] ** 2, 0.05**2, rtol=1e-2)
    assert (gain[known] >= sure[known]).all() and (gain[known] > 1.01 * sure[known]).any()


def test_training_takes_focus_gain_and_breathing_of_the_profile(path):
    profile = profile_with(path, 0.0, 0.0)
    captured = load_captured(path, profile)
    np.testing.assert_allclose(np.sort(captured.focus_dpt.numpy()), np.sort(FOCUS_DPT), rtol=1e-5)
    # a frame that the lens enlarges is blurred more and scaled back: on the common scale A F is one number
    common = profile.pupil_diameter_m.value * profile.intrinsics.focal_length_px.value
    np.testing.assert_allclose(captured.kappa.numpy(), common, rtol=0.02)
