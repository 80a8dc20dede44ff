"""The OpenCV backend against a fake device (no video device and no kernel module exists here) and real video files."""

import math

import cv2
import numpy as np
import pytest

from capture.cameras import open_camera
from capture.cameras.base import (
    CameraClosed,
    CameraDisconnected,
    CameraNotFound,
    ControlRejected,
    ExposureSettings,
    FocusLimit,
    UnsupportedControl,
)
from capture.cameras.opencv import OpencvCamera
from capture.errors import UsageError


class FakeDevice:
    """cv2.VideoCapture of a webcam with the measured vices of real ones.

    Frames queue up (`lag` of them are older than now), the lens needs `settle` frames to arrive, focus is quantised to
    `grid`, autofocus fights until it is switched off, and automatic exposure drifts until it is manual. The picture's
    level in the left half is the lens position, in the right half a texture.
    """

    def __init__(self, *, lag=4, settle=3, grid=5.0, focus=True, broken_reads=(), ignore_exposure=False, colour=True):
        self.values = {
            cv2.CAP_PROP_FOCUS: 30.0,
            cv2.CAP_PROP_AUTOFOCUS: 1.0,
            cv2.CAP_PROP_AUTO_EXPOSURE: 3.0,
            cv2.CAP_PROP_EXPOSURE: 156.0,
            cv2.CAP_PROP_GAIN: 10.0,
            cv2.CAP_PROP_AUTO_WB: 1.0,
            cv2.CAP_PROP_WB_TEMPERATURE: 4600.0,
            cv2.CAP_PROP_BUFFERSIZE: 4.0,
        }
        self.settle, self.grid, self.focus = settle, grid, focus
        self.ignore_exposure, self.colour = ignore_exposure, colour
        self.broken_reads = set(broken_reads)
        self.lens, self.drift, self.reads, self.released = 30.0, 0.0, 0, False
        self.queue = [self.expose() for _ in range(lag)]

    def expose(self):
        if self.values[cv2.CAP_PROP_AUTOFOCUS]:
            self.lens += 7.0  # hunting
        else:
            self.lens += (self.values[cv2.CAP_PROP_FOCUS] - self.lens) / max(self.settle, 1)
            if abs(self.values[cv2.CAP_PROP_FOCUS] - self.lens) < 0.5:
                self.lens = self.values[cv2.CAP_PROP_FOCUS]
        if self.values[cv2.CAP_PROP_AUTO_EXPOSURE] != 1.0:
            self.drift = (self.drift + 3.0) % 100.0
        image = np.zeros((24, 32, 3), np.uint8)
        image[:, :16] = np.clip(self.lens, 0, 255)
        image[:, 16:] = np.clip(100 + self.drift + (np.indices((24, 16)).sum(0) % 2)[..., None] * 40, 0, 255)
        image[0, 0] = (10, 20, 30)  # blue, green, red
        return image if self.colour else image[..., 0]

    def isOpened(self):
        return True

    def release(self):
        self.released = True

    def get(self, control):
        return self.values.get(control, -1.0)

    def set(self, control, value):
        if control == cv2.CAP_PROP_FOCUS:
            if not self.focus:
                return False
            value = round(value / self.grid) * self.grid
        if self.ignore_exposure and control in (cv2.CAP_PROP_EXPOSURE, cv2.CAP_PROP_AUTO_EXPOSURE):
            return True  # says yes, does nothing
        if control == cv2.CAP_PROP_BUFFERSIZE:
            return False  # V4L2 keeps its four
        self.values[control] = float(value)
        return True

    def grab(self):
        self.queue.append(self.expose())
        self.queue.pop(0)
        return True

    def read(self):
        self.reads += 1
        if self.reads in self.broken_reads:
            return False, None
        self.queue.append(self.expose())
        return True, self.queue.pop(0)


def camera_on(device, **options):
    return OpencvCamera(0, api="v4l2", settle_s=0.0, capture_factory=lambda source, api: device, **options)


def test_focus_is_believed_only_after_two_values_came_back():
    with camera_on(FakeDevice()) as camera:
        assert camera.open().capabilities.focus == "absolute"
        assert camera.focus_range().near == 255.0  # larger is nearer on UVC devices
    with camera_on(FakeDevice(focus=False)) as camera:
        assert camera.open().capabilities.focus == "manual"
        with pytest.raises(UnsupportedControl):
            camera.move_focus(10.0)
    stuck = FakeDevice(grid=1000.0)  # set() says yes, every value reads back 0
    with camera_on(stuck) as camera:
        assert camera.open().capabilities.focus == "manual"


def test_no_frame_from_before_the_move_is_delivered():
    device = FakeDevice(lag=4, settle=1)
    with camera_on(device) as camera:
        camera.open()
        camera.lock_exposure(ExposureSettings())
        for target in (200.0, 100.0, 20.0):
            camera.move_focus(target)
            frame = camera.grab(5.0)
            assert frame.image[5, 5, 0] == target
            assert frame.focus_position == target


def test_previews_settle_and_start_fresh_after_a_move():
    device = FakeDevice(lag=4, settle=6)
    with camera_on(device) as camera:
        camera.open()
        camera.lock_exposure(ExposureSettings())
        camera.move_focus(200.0)
        levels = [int(camera.preview()[5, 5, 0]) for _ in range(40)]
        assert levels[-1] == 200
        assert levels[0] != levels[-1]  # the lens is still on its way: the sweep waits for this to stop


def test_pictures_are_rgb_and_averages_have_16_bits():
    with camera_on(FakeDevice(), average=4) as camera:
        camera.open()
        frame = camera.grab(5.0)
        assert frame.image.dtype == np.uint16
        assert frame.white_level == 65535.0
        np.testing.assert_allclose(frame.image[0, 0] / 257.0, [30, 20, 10])
        assert frame.transfer == "srgb"
    with camera_on(FakeDevice(colour=False)) as camera:
        camera.open()
        assert camera.grab(5.0).image.shape == (24, 32, 3)


def test_exposure_is_locked_verified_and_put_back():
    device = FakeDevice()
    camera = camera_on(device)
    camera.open()
    locked = camera.lock_exposure(ExposureSettings(exposure_time_s=0.01, white_balance="5000"))
    assert locked.exposure_time_s == pytest.approx(0.01)
    assert locked.white_balance == "5000"
    assert device.values[cv2.CAP_PROP_AUTO_EXPOSURE] == 1.0  # V4L2: manual
    assert device.values[cv2.CAP_PROP_AUTO_WB] == 0.0
    camera.close()
    camera.close()
    assert device.released
    assert device.values[cv2.CAP_PROP_AUTO_EXPOSURE] == 3.0
    assert device.values[cv2.CAP_PROP_AUTOFOCUS] == 1.0
    assert device.values[cv2.CAP_PROP_FOCUS] == 30.0
    with pytest.raises(CameraClosed):
        camera.grab(1.0)


def test_a_lock_that_does_not_hold_is_refused():
    with camera_on(FakeDevice(ignore_exposure=True)) as camera:
        camera.open()
        with pytest.raises(ControlRejected, match="drifts by"):
            camera.lock_exposure(ExposureSettings())
        with pytest.raises(ControlRejected, match="reads back"):
            camera.lock_exposure(ExposureSettings(exposure_time_s=0.1))
        with pytest.raises(UnsupportedControl):
            camera.lock_exposure(ExposureSettings(f_number=4))


def test_one_failed_read_is_tried_again_and_many_are_a_lost_camera():
    device = FakeDevice(broken_reads={1})
    with camera_on(device) as camera:
        camera.open()
        assert camera.grab(5.0).image is not None
        device.broken_reads = set(range(device.reads, device.reads + 50))
        with pytest.raises(CameraDisconnected):
            camera.grab(5.0)


def test_positions_outside_the_range_are_refused():
    with camera_on(FakeDevice(), near=120.0, far=10.0) as camera:
        camera.open()
        assert camera.home().commanded == 120.0
        with pytest.raises(FocusLimit):
            camera.move_focus(200.0)


def test_macos_turns_the_ring_by_hand():
    camera = OpencvCamera(0, api="avfoundation", capture_factory=lambda source, api: FakeDevice())
    with camera:
        assert camera.open().capabilities.focus == "manual"


@pytest.fixture
def video(tmp_path):
    path = tmp_path / "sweep.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"FFV1"), 10, (64, 48))
    for level in range(6):
        frame = np.full((48, 64, 3), 40 + 30 * level, np.uint8)
        frame[::4, ::4] = 0
        writer.write(frame)
    writer.release()
    return path


def test_a_video_file_is_a_camera_whose_position_is_the_frame(video):
    with open_camera(f"opencv:{video}") as camera:  # in its worker process
        info = camera.open()
        assert info.capabilities.focus == "absolute"
        limits = camera.focus_range()
        assert (limits.near, limits.far) == (0.0, 5.0)
        for position in (3.0, 0.0, 5.0):
            camera.move_focus(position)
            frame = camera.grab(5.0)
            assert abs(int(frame.image[1, 1, 0]) - (40 + 30 * position)) <= 1
            assert math.isnan(frame.exposure_time_s)
        with pytest.raises(FocusLimit):
            camera.move_focus(9.0)


def test_what_is_not_there_is_said(tmp_path):
    with pytest.raises(CameraNotFound, match="no video device 63"), open_camera("opencv:63") as camera:
        camera.open()
    video = open_camera(f"opencv:{tmp_path / 'none.avi'}")
    with pytest.raises(CameraNotFound, match="cannot be opened as a video"), video:
        video.open()


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("opencv:0?avrage=3", "did you mean 'average'"),
        ("opencv:0?average=x", "not a number"),
        ("opencv:0?average=0", "out of range"),
        ("opencv:0?api=gstreamer", "must be one of"),
        ("opncv:0", "did you mean 'opencv'"),
        ("replay:x?y=1", "no option 'y'"),
    ],
)
def test_uris_are_checked(uri, says):
    with pytest.raises(UsageError, match=says.replace("?", r"\?")):
        open_camera(uri)
