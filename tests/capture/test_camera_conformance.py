"""Every backend keeps the contract of capture/cameras/base.py; the operator never learns which one it is.

Simulated (absolute and relative), a replayed folder, a video file in its worker process, the OpenCV backend on a fake
device, the Pi backend on a stand-in of picamera2, and gphoto2 on libgphoto2's virtual camera with a faked focus motor.
"""

import math

import cv2
import numpy as np
import pytest

from capture.cameras import gphoto, open_camera
from capture.cameras.base import (
    Camera,
    CameraClosed,
    CameraError,
    ExposureSettings,
    FocusLimit,
    FocusNotHomed,
    UnsupportedControl,
)
from capture.decode import decode_image
from tests.capture import fake_picamera2
from tests.capture.test_camera_gphoto import has_virtual_camera
from tests.capture.test_camera_opencv import FakeDevice, camera_on


def simulated(tmp_path, monkeypatch):
    return open_camera("simulated:procedural-3?width=64&max_coc_px=8&noise=0.01")


def relative(tmp_path, monkeypatch):
    return open_camera("simulated:procedural-3?width=64&max_coc_px=8&noise=0.01&relative=1&backlash=5&live_view=1")


def replay(tmp_path, monkeypatch):
    for index in range(4):
        image = np.random.default_rng(index).integers(0, 255, (30, 40, 3), np.uint8)
        cv2.imwrite(str(tmp_path / f"frame_{index}.png"), image)
    (tmp_path / "stack.yaml").write_text(
        "transfer: linear\nframes:\n"
        + "".join(f"  - {{file: frame_{i}.png, focus_distance_m: {1.0 + 0.5 * i}}}\n" for i in range(4))
    )
    return open_camera(f"replay:{tmp_path}")


def video(tmp_path, monkeypatch):
    path = tmp_path / "sweep.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 48))
    for level in range(6):
        writer.write(np.random.default_rng(level).integers(0, 255, (48, 64, 3), np.uint8))
    writer.release()
    return open_camera(f"opencv:{path}")


def webcam(tmp_path, monkeypatch):
    return camera_on(FakeDevice())


def pi(tmp_path, monkeypatch):
    from capture.cameras.picamera import PicameraCamera

    fake_picamera2.install(monkeypatch)
    return PicameraCamera()


def dslr(tmp_path, monkeypatch):
    if not has_virtual_camera():
        pytest.skip("this gphoto2 has no virtual USB port")
    monkeypatch.setenv("DAIF_RIG", str(tmp_path))
    monkeypatch.setattr(gphoto, "DRIVER", "tests.capture.virtual_dslr")
    return open_camera("gphoto2:")


@pytest.mark.parametrize("make", [simulated, relative, replay, video, webcam, pi, dslr], ids=lambda make: make.__name__)
def test_a_backend_keeps_the_contract(make, tmp_path, monkeypatch):
    camera = make(tmp_path, monkeypatch)
    assert isinstance(camera, Camera)
    for call in (camera.position, camera.focus_range, lambda: camera.grab(1.0)):
        with pytest.raises(CameraClosed):
            call()
    with camera:
        info = camera.open()
        capabilities = info.capabilities
        assert info.model
        assert info.driver
        locked = camera.lock_exposure(ExposureSettings())
        assert isinstance(locked, ExposureSettings)
        limits = camera.focus_range()
        assert limits.unit == capabilities.focus_unit
        assert limits.near != limits.far
        assert limits.step > 0
        middle = 0.5 * (limits.near + limits.far)
        if capabilities.needs_live_view:
            camera.set_live_view(True)
        if capabilities.focus == "relative":
            with pytest.raises(FocusNotHomed):
                camera.move_focus(middle)
        home = camera.home("near")
        assert home.at_limit or home.position == pytest.approx(limits.near, abs=limits.step)
        report = camera.move_focus(middle)
        assert report.commanded == middle
        assert report.finished_s > 1e9
        assert camera.position() == pytest.approx(middle, abs=max(0.51 * limits.step, 1.0))
        beyond = limits.far + 2 * (limits.far - limits.near)
        with pytest.raises(FocusLimit):
            camera.move_focus(beyond)
        first, second = camera.grab(20.0), camera.grab(20.0)
        for frame in (first, second):
            assert (frame.image is None) != (not frame.originals)
            pixels = decode_image(frame.originals[0][1]).pixels if frame.image is None else frame.image
            assert pixels.ndim == 3
            assert pixels.shape[2] in (1, 3)
            assert pixels.dtype in (np.uint8, np.uint16)
            assert 1e9 < frame.started_s <= frame.finished_s
            assert math.isnan(frame.focus_distance_m) or frame.focus_distance_m > 0
            if frame.image is not None:
                assert frame.transfer in ("linear", "srgb", "rec709")
        if capabilities.preview:
            try:
                look = camera.preview()
                assert look.dtype == np.uint8
                assert look.shape[2] == 3
            except UnsupportedControl:  # libgphoto2 claims live view for the virtual body
                assert make is dslr
        else:
            with pytest.raises(UnsupportedControl):
                camera.preview()
        camera.close()
        camera.close()
        with pytest.raises(CameraClosed):
            camera.grab(1.0)
        camera.open()  # a closed camera opens again
        assert camera.focus_range().unit == limits.unit


@pytest.mark.parametrize("make", [replay, pi, webcam], ids=lambda make: make.__name__)
def test_settings_that_a_backend_lacks_are_refused(make, tmp_path, monkeypatch):
    with make(tmp_path, monkeypatch) as camera:
        camera.open()
        with pytest.raises(CameraError):
            camera.lock_exposure(ExposureSettings(f_number=5.6))
