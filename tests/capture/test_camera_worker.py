import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from capture.cameras import base
from capture.cameras.base import (
    Camera,
    CameraBusy,
    CameraClosed,
    CameraCrashed,
    CameraError,
    CameraTimeout,
)
from capture.cameras.worker import WorkerCamera


@pytest.fixture
def camera(tmp_path):
    with WorkerCamera("tests.capture.broken_camera:BrokenCamera", {"log": str(tmp_path / "log")}) as camera:
        yield camera


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_frame_crosses_the_pipe_whole_and_close_closes_the_backend(camera, tmp_path):
    assert isinstance(camera, Camera)
    assert f"{camera.open()}" == f"opened in {camera.pid}"
    frame = camera.grab(1.0)
    np.testing.assert_array_equal(frame.image.ravel(), np.arange(600, dtype=np.uint8))
    assert frame.originals == (("a.nef", b"raw"), ("a.jpg", b"jpeg"))
    pid = camera.pid
    camera.close()
    camera.close()
    assert not alive(pid)
    assert (tmp_path / "log").read_text().count(f"closed {pid}") >= 1
    with pytest.raises(CameraClosed):
        camera.position()


def test_a_stuck_driver_is_a_timeout_and_is_replaced(camera):
    camera.open()
    stuck = camera.pid
    began = time.monotonic()
    with pytest.raises(CameraTimeout, match=r"hang within 0\.3 s"):
        camera.call("hang", deadline_s=0.3)
    assert time.monotonic() - began < 5
    assert not alive(stuck)
    with pytest.raises(CameraClosed):
        camera.position()
    camera.open()
    assert camera.pid != stuck
    assert camera.position() == 3.5


def test_a_crashed_driver_is_named_and_replaced(camera):
    camera.open()
    with pytest.raises(CameraCrashed, match=r"died during crash \(SIGSEGV\)") as caught:
        camera.call("crash")
    assert caught.value.recovery == "reopen"
    camera.open()
    assert camera.position() == 3.5


def test_errors_cross_the_pipe_with_everything_they_carry(camera):
    camera.open()
    with pytest.raises(CameraBusy) as caught:
        camera.call("busy")
    assert (caught.value.stage, caught.value.native_code) == ("busy", -110)
    assert str(caught.value).startswith("wait a moment (I/O in progress); ")
    with pytest.raises(CameraError, match=r"driver failed in bug \(KeyError: 'oops'\)"):
        camera.call("bug")
    assert camera.position() == 3.5


def test_every_error_of_the_taxonomy_pickles_and_states_its_advice():
    kinds = [kind for kind in vars(base).values() if isinstance(kind, type) and issubclass(kind, CameraError)]
    assert len(kinds) >= 18
    for kind in kinds:
        error = kind("it broke", stage="grab", native_code=-1, native_text="native")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error)
        assert vars(again) == vars(error)
        assert kind.exit_code == 4
        assert "\n" not in str(error)


def test_the_child_ends_when_its_parent_is_killed(tmp_path):
    script = (
        "from capture.cameras.worker import WorkerCamera; import time\n"
        f"camera = WorkerCamera('tests.capture.broken_camera:BrokenCamera', {{'log': {str(tmp_path / 'log')!r}}})\n"
        "camera.open(); print(camera.pid, flush=True); time.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)
    assert f"closed {child}" in (tmp_path / "log").read_text()  # the camera was let go properly


def test_large_frames_cross_quickly(camera):
    camera.open()
    payload = np.zeros((4000, 6000), np.uint8)  # 24 MB
    began = time.process_time()
    back = camera.call("echo", payload, deadline_s=30.0)
    assert back.shape == payload.shape
    assert time.process_time() - began < 1.0
