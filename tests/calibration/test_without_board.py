"""Profiles without a target: from a stack's metadata, and refined on ordinary scenes; nothing claimed beyond these."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.edges import CalibrationError
from calibration.exif import profile_from_exif
from calibration.scene import refine_from_scenes
from capture.alignment import Alignment
from capture.errors import DataError, UsageError
from capture.lens import LensProfile
from capture.optics import Condition, simulate_sweep, sweep_for_scene
from capture.scenes import procedural_scene
from capture.stack import FocalStack, write_stack
from reconstruct.cli import app
from reconstruct.optics import optics_of

SCENE = procedural_scene(3, 240, 320)
LENS, FOCUS_DPT = sweep_for_scene(SCENE, 7, 9.0)
BREATHING = -0.03  # near focus shows the scene smaller


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    taken = simulate_sweep(SCENE, LENS, FOCUS_DPT, Condition(bits=16, noise_std=0.003, breathing=BREATHING))
    return taken.write(tmp_path_factory.mktemp("scene") / "scene.h5")


def write(path, frames, **header):
    return write_stack(path, frames, transfer="srgb", **header)


def test_metadata_become_a_profile_with_wide_errors(tmp_path, sweep):
    out = tmp_path / "lens.yaml"
    done = CliRunner().invoke(app, ["calibrate", "--from-exif", str(sweep), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "metadata only; expect about 5 %" in done.output
    profile = LensProfile.read(out)
    assert profile.grade == "exif"
    assert profile.pupil_diameter_m.value == pytest.approx(LENS.aperture_m)
    assert profile.pupil_diameter_m.std == pytest.approx(0.05 * LENS.aperture_m)
    np.testing.assert_allclose(profile.focus.focus_dpt, np.sort(FOCUS_DPT), rtol=1e-6)
    assert (np.array(profile.focus.std_dpt) > 0.03 * np.array(profile.focus.focus_dpt)).all()
    assert profile.warnings[0].startswith("EXIF: nothing was measured")


def test_metadata_say_the_aperture_that_reconstruct_will_compare(sweep, monkeypatch):
    monkeypatch.setattr(FocalStack, "working_f_number", 2 * LENS.f_number)  # frames that contradict stack.yaml
    with FocalStack.open(sweep) as stack:
        assert optics_of(stack, profile_from_exif(sweep)).source == "profile"


@pytest.mark.parametrize(
    ("header", "words"),
    [
        ({}, "neither focal length, f-number nor pixel pitch; give them in stack.yaml"),
        ({"lens": LENS}, "knows the focus distance of 0 frames, and two different ones are needed; "),
    ],
)
def test_what_metadata_do_not_say_is_named(tmp_path, header, words):
    path = write(tmp_path / "bare.h5", np.full((3, 24, 32, 3), 90, np.uint8), **header)
    with pytest.raises(DataError, match=words):
        profile_from_exif(path)


def test_a_scene_alone_gives_the_shape_of_the_axis_and_breathing_and_claims_no_more(tmp_path, sweep):
    out = tmp_path / "lens.yaml"
    done = CliRunner().invoke(app, ["calibrate", "--scene", str(sweep), "-o", str(out)])
    assert done.exit_code == 0, done.output
    assert "No distance is known" in done.output and "Undetermined" in done.output
    assert "dpt" not in done.output.replace(str(tmp_path), "")
    profile = LensProfile.read(out)
    assert profile.grade == "relative" and not profile.is_metric
    assert profile.f_number == LENS.f_number
    order = np.argsort(profile.focus.positions)
    scale = np.array(profile.breathing.scale)[order]
    assert scale[-1] / scale[0] == pytest.approx((1 + BREATHING / 2) / (1 - BREATHING / 2), abs=4e-3)
    np.testing.assert_allclose(np.array(profile.focus.focus_dpt)[order], np.linspace(0, 1, 7), atol=0.08)
    assert (tmp_path / "report.html").exists()


def test_a_rough_profile_is_refined_by_a_scene(sweep):
    rough = profile_from_exif(sweep)
    wrong = np.array(rough.focus.focus_dpt) + 0.02 * np.ptp(FOCUS_DPT) * np.array([0, 1, -1, 1, -1, 1, 0])
    table = rough.focus.model_copy(update={"focus_dpt": tuple(wrong)})
    refined = refine_from_scenes([sweep], rough.model_copy(update={"focus": table}))
    truth = np.sort(FOCUS_DPT)

    def shape_error(focus):  # what an offset and a scale of the axis leave
        return np.std(np.polyval(np.polyfit(focus, truth, 1), focus) - truth)

    # 0.59 of it is left with OpenCV 5.0, 0.61 with 4.10
    assert shape_error(np.array(refined.profile.focus.focus_dpt)) < 0.65 * shape_error(wrong)
    assert any("common offset" in sentence for sentence in refined.sentences)


def test_one_scene_given_twice_is_refused(tmp_path, sweep):
    copy = shutil.copy(sweep, tmp_path / "copy.h5")
    for again in (sweep, copy):
        with pytest.raises(UsageError, match=rf"^{sweep} and {again} are the same stack, .*; leave one out$"):
            refine_from_scenes([sweep, Path(again)], None)


def test_scenes_at_another_aperture_are_refused(tmp_path, sweep):
    rough = profile_from_exif(sweep)
    assert rough.f_number == LENS.f_number
    stopped_down = LENS.model_copy(update={"f_number": 2 * LENS.f_number})
    wall = np.full((7, 240, 320, 3), 90, np.uint8)
    path = write(tmp_path / "stopped.h5", wall, focus_distance_m=1 / FOCUS_DPT, lens=stopped_down)
    for paths, profile in (([path], rough), ([sweep, path], None)):
        with pytest.raises(UsageError, match=rf"stopped\.h5 was taken at f/{2 * LENS.f_number:g} and .* at f/"):
            refine_from_scenes(paths, profile)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("height", "width", "words"),
    [
        (72, 96, r"96 x 72 px have room for 0 patches, .*; give the stack at its full size"),
        (200, 220, "only 0 patches"),  # alignment may leave less than the frames hold
    ],
)
def test_small_scenes_are_refused_in_one_sentence(tmp_path, monkeypatch, height, width, words):
    path = write(
        tmp_path / "small.h5", np.full((4, height, width, 3), 90, np.uint8), focus_distance_m=1 / FOCUS_DPT[:4]
    )
    monkeypatch.setattr(Alignment, "crop", property(lambda self: (slice(60, 130), slice(60, 130))))
    with pytest.raises(CalibrationError, match=words):
        refine_from_scenes([path], None)


def test_a_scene_without_texture_is_refused(tmp_path):
    path = write(tmp_path / "wall.h5", np.full((4, 240, 320, 3), 90, np.uint8), focus_distance_m=1 / FOCUS_DPT[:4])
    with pytest.raises(CalibrationError, match=r"; photograph something with fine detail.*\[NO_TEXTURE\]"):
        refine_from_scenes([path], None)
