from __future__ import annotations

import dataclasses
import time

import cv2
import numpy as np
import pytest

from capture.cameras import open_camera
from capture.cameras.base import (
    Camera,
    CameraBusy,
    CameraClosed,
    CameraDisconnected,
    CameraError,
    CameraTimeout,
    ControlRejected,
    ExposureSettings,
    FocusLimit,
    FocusNotHomed,
    FocusNotReady,
)
from capture.cameras.simulated import FAULTS, Behaviour, SimulatedCamera
from capture.decode import decode_image, to_linear
from capture.errors import UsageError
from capture.plan import FocusSweep
from capture.scenes import procedural_scene
from capture.stack import FocalStack
from capture.sweep import run_sweep

SCENE = procedural_scene(11, 72, 96)


def make_camera(**behaviour):
    return SimulatedCamera(SCENE, behaviour=Behaviour(**behaviour))


def sharpness(image):
    return cv2.Laplacian(to_linear(image, "srgb"), cv2.CV_32F).var()


def test_it_is_a_camera_and_uri_options_reach_it():
    camera = open_camera("simulated:procedural-3?width=64&relative=1&backlash=5&noise=0.01&fault=disconnect@3,busy@5x2")
    assert isinstance(camera, Camera)
    with camera:
        info = camera.open()
        assert info.capabilities.focus == "relative" and info.capabilities.backlash == 5
        assert info.capabilities.focus_unit == "step" and info.lens is not None
        camera.home()
        assert camera.grab(1.0).image.shape == (48, 64, 3)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("simulated:motorbike", "motorcycle, procedural-SEED, or a folder"),
        ("simulated:procedural-1?nois=1", "did you mean 'noise'"),
        ("simulated:procedural-1?fault=disconect@3", "did you mean 'disconnect'"),
        ("simulated:procedural-1?fault=disconnect", "NAME@FRAME"),
        ("simulated:procedural-1?width=many", "option 'width'"),
    ],
)
def test_a_wrong_uri_is_one_sentence(uri, words):
    with pytest.raises(UsageError, match=words) as error:
        open_camera(uri)
    assert "\n" not in str(error.value)


def test_a_closed_camera_refuses_everything():
    camera = make_camera()
    for call in (camera.focus_range, camera.position, camera.preview, lambda: camera.grab(1), camera.home):
        with pytest.raises(CameraClosed):
            call()
    camera.close()
    camera.close()


def test_absolute_focus_goes_where_it_is_told_and_says_so():
    with make_camera() as camera:
        camera.open()
        limits = camera.focus_range()
        assert limits.unit == "dioptre" and limits.near > limits.far
        for target in (limits.far, 0.5 * (limits.near + limits.far), limits.near):
            assert camera.move_focus(target).position == pytest.approx(target, abs=1e-6)
            frame = camera.grab(1.0)
            assert 1 / frame.focus_distance_m == pytest.approx(target, abs=1e-6)
        with pytest.raises(FocusLimit):
            camera.move_focus(limits.near + 1)


def test_a_relative_camera_counts_from_the_near_stop():
    with make_camera(relative=True) as camera:
        camera.open()
        assert camera.position() is None
        with pytest.raises(FocusNotHomed):
            camera.move_focus(100)
        assert camera.home().at_limit and camera.position() == 0
        assert camera.move_focus(250).position == 250
        assert np.isnan(camera.grab(1.0).focus_distance_m)
        camera.close()
        camera.open()
        assert camera.position() is None  # the count does not outlive the connection


def test_the_focus_map_is_monotone_curved_and_invertible():
    camera = make_camera(curve=0.6)
    steps = np.linspace(0, 1000, 101)
    dioptre = np.array([camera.focus_dpt_at(step) for step in steps])
    assert (np.diff(dioptre) < 0).all()
    assert dioptre[0] == camera.near_dpt and dioptre[-1] == pytest.approx(camera.far_dpt)
    assert abs(dioptre[50] - (dioptre[0] + dioptre[-1]) / 2) > 0.1 * (dioptre[0] - dioptre[-1])
    assert [camera._step_for(q) for q in dioptre] == pytest.approx(list(steps), abs=0.3)


def test_backlash_shows_only_when_approached_from_the_far_side():
    def true_focus(camera):
        return camera.grab(1.0).metadata["true_focus_dpt"]

    with make_camera(relative=True, backlash=20) as camera:
        camera.open()
        camera.home()
        camera.move_focus(400)
        assert true_focus(camera) == pytest.approx(camera.focus_dpt_at(400))
        camera.move_focus(500)
        camera.move_focus(400)
        assert true_focus(camera) == pytest.approx(camera.focus_dpt_at(420))
        camera.move_focus(300)
        camera.move_focus(400)
        assert true_focus(camera) == pytest.approx(camera.focus_dpt_at(400))


def test_frames_get_sharper_towards_the_scene():
    with make_camera() as camera:
        camera.open()
        limits = camera.focus_range()
        target = 1 / float(np.median(SCENE.depth_m))
        camera.move_focus(target)
        sharp = sharpness(camera.grab(1.0).image)
        camera.move_focus(limits.near if limits.near - target > target - limits.far else limits.far)
        assert sharp > sharpness(camera.grab(1.0).image)


def test_live_view_is_needed_when_asked_for():
    with make_camera(live_view=True) as camera:
        camera.open()
        with pytest.raises(FocusNotReady):
            camera.move_focus(camera.focus_range().far)
        camera.set_live_view(True)
        camera.move_focus(camera.focus_range().far)
        assert camera.preview().dtype == np.uint8 and camera.preview().shape == (72, 96, 3)


def test_exposure_is_locked_read_back_and_scales_the_light():
    with make_camera(bits=16) as camera:
        camera.open()
        base = to_linear(camera.grab(1.0).image, "srgb").mean()
        assert camera.lock_exposure(ExposureSettings(exposure_time_s=0.005)).exposure_time_s == 0.005
        assert to_linear(camera.grab(1.0).image, "srgb").mean() == pytest.approx(base / 2, rel=1e-3)
        with pytest.raises(ControlRejected, match=r"f/2\.8"):
            camera.lock_exposure(ExposureSettings(f_number=11.0))


def test_drift_and_noise():
    with make_camera(drift=0.1, bits=16) as camera:
        camera.open()
        first, second = (to_linear(camera.grab(1.0).image, "srgb") for _ in range(2))
        unclipped = second < 1
        np.testing.assert_allclose(second[unclipped], 1.1 * first[unclipped], atol=1e-4)
    with make_camera(noise=0.02) as camera:
        camera.open()
        assert not np.array_equal(camera.grab(1.0).image, camera.grab(1.0).image)


@pytest.mark.parametrize("files", ["jpeg", "png"])
def test_files_decode_to_the_frame(files):
    with make_camera(files=files) as camera, make_camera() as plain:
        camera.open()
        plain.open()
        frame = camera.grab(1.0)
        assert frame.image is None
        name, data = frame.originals[0]
        difference = decode_image(data, name=name).pixels.astype(float) - plain.grab(1.0).image
        assert np.abs(difference).mean() <= (0 if files == "png" else 3)


def test_latency_counts_against_the_deadline():
    with make_camera(latency_s=0.2) as camera:
        camera.open()
        started = time.monotonic()
        with pytest.raises(CameraTimeout):
            camera.grab(0.05)
        assert time.monotonic() - started < 0.2


def test_a_fault_strikes_as_often_as_planned():
    with make_camera(fault="busy@1x2") as camera:
        camera.open()
        camera.grab(1.0)
        for _ in range(2):
            with pytest.raises(CameraBusy):
                camera.grab(1.0)
        camera.grab(1.0)


def test_a_disconnected_camera_needs_to_be_opened_again():
    with make_camera(fault="disconnect@0") as camera:
        camera.open()
        for _ in range(2):
            with pytest.raises(CameraDisconnected):
                camera.grab(1.0)
        camera.open()
        camera.grab(1.0)


RAISED = sorted(name for name, (_, error) in FAULTS.items() if error is not None)


@pytest.mark.parametrize("name", RAISED)
def test_every_raised_fault_is_of_the_taxonomy(name):
    def take_a_frame(camera):
        camera.open()
        camera.lock_exposure(ExposureSettings())
        camera.move_focus(camera.focus_range().far)
        camera.grab(1.0)

    with make_camera(fault=f"{name}@0") as camera, pytest.raises(CameraError) as error:
        take_a_frame(camera)
    stage, expected = FAULTS[name]
    assert type(error.value) is type(expected) and error.value.stage == stage and error.value.native_text == "simulated"


def test_silent_faults_show_in_the_picture():
    def frames(fault):
        with make_camera(fault=fault, bits=16) as camera:
            camera.open()
            limits = camera.focus_range()
            taken = []
            for target in (limits.near, limits.far):
                camera.move_focus(target)
                taken.append(camera.grab(1.0).image)
            return taken

    near, far = frames(())
    assert not np.array_equal(near, far)
    assert np.array_equal(*frames("repeat@1"))
    stuck = frames("stuck@1")
    assert np.array_equal(stuck[0], stuck[1])
    assert frames("black@1")[1].max() == 0
    assert frames("wrong_size@1")[1].shape == (36, 48, 3)
    assert frames("corrupt@1")[1].shape == (36, 96, 3)
    assert to_linear(frames("drift@1")[1], "srgb").mean() > 1.2 * to_linear(far, "srgb").mean()


def test_a_sweep_runs_from_plan_to_stack_through_faults(tmp_path):
    camera = make_camera(fault="busy@1,disconnect@2,corrupt@3", noise=0.005, files="png")
    sweep = FocusSweep(near_m=1 / camera.near_dpt, far_m=1 / camera.far_dpt, count=5)
    run_sweep(camera, sweep, tmp_path / "s.h5")
    with FocalStack.open(tmp_path / "s.h5") as stack:
        assert stack.n_frames == 5
        np.testing.assert_allclose(stack.focus_dpt, np.linspace(camera.near_dpt, camera.far_dpt, 5), atol=1e-3)


def test_a_sweep_of_a_relative_camera_with_backlash(tmp_path):
    camera = make_camera(relative=True, backlash=8, live_view=True)
    sweep = FocusSweep(spacing="command", unit="step", positions=(0.0, 250.0, 500.0, 750.0, 1000.0), count=5)
    run_sweep(camera, sweep, tmp_path / "s.h5")
    with FocalStack.open(tmp_path / "s.h5") as stack:
        true = [frame["true_focus_dpt"] for frame in stack.metadata]
    np.testing.assert_allclose(true, [camera.focus_dpt_at(step) for step in sweep.positions], atol=1e-9)


def test_blur_grows_as_the_image_does():
    camera = make_camera(breathing=-0.08)
    gain, scale = (
        [f(q) for q in (camera.far_dpt, camera.near_dpt)] for f in (camera.kappa_px_per_dpt, camera.magnification)
    )
    assert scale[1] / scale[0] == pytest.approx(0.96 / 1.04)
    assert gain[1] / gain[0] == pytest.approx(scale[1] / scale[0])
    middle = 0.5 * (camera.far_dpt + camera.near_dpt)
    assert camera.kappa_px_per_dpt(middle) == pytest.approx(float(camera.lens.kappa_px_per_dpt(middle)))


def test_a_flat_wall_can_be_swept():
    wall = dataclasses.replace(SCENE, depth_m=np.full_like(SCENE.depth_m, 2.0), hidden_aif=None, hidden_depth_m=None)
    with SimulatedCamera(wall) as camera:
        camera.open()
        assert camera.far_dpt < 0.5 < camera.near_dpt
        camera.move_focus(0.5)
        sharp = sharpness(camera.grab(1.0).image)
        camera.move_focus(camera.near_dpt)
        assert sharpness(camera.grab(1.0).image) < 0.5 * sharp


def test_cameras_of_different_scenes_are_one_camera():
    names = {SimulatedCamera(procedural_scene(seed, 24, 32)).open().model for seed in (1, 2)}
    assert len(names) == 1
