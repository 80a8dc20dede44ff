"""The Pi backend against a stand-in of picamera2 (fake_picamera2.py): its own logic, not libcamera's."""

import numpy as np
import pytest

from capture.cameras import open_camera
from capture.cameras.base import CameraNotFound, ExposureSettings
from capture.cameras.picamera import PicameraCamera
from capture.plan import FocusSweep
from capture.stack import FocalStack
from capture.sweep import SweepOptions, run_sweep
from tests.capture import fake_picamera2


def test_focus_is_in_dioptres_waited_for_and_stored_as_reported(tmp_path, monkeypatch):
    fake_picamera2.install(monkeypatch)
    camera = PicameraCamera()
    sweep = FocusSweep(near_m=0.1, far_m=float("inf"), count=5)
    options = SweepOptions(settle_s=0.0, max_settle_s=0.01, exposure=ExposureSettings(exposure_time_s=0.02))
    run_sweep(camera, sweep, tmp_path / "a.h5", options=options)
    with FocalStack.open(tmp_path / "a.h5") as stack:
        np.testing.assert_allclose(stack.focus_dpt, sweep.focus_dpt, atol=0.05)
        assert set(stack.focus_distance_source) == {"reported"}
        assert stack.exposure_time_s[0] == pytest.approx(0.02)


def test_a_machine_without_picamera2_is_told_what_to_install():
    camera = open_camera("picamera2:")
    with camera, pytest.raises(CameraNotFound, match="apt install python3-picamera2"):
        camera.open()
