"""Camera matrix and distortion from the files that OpenCV and ROS write."""

import cv2
import numpy as np
import pytest

from calibration.board import Board
from calibration.edges import CalibrationError
from calibration.intrinsics import check_intrinsics, read_intrinsics
from capture.errors import UsageError

ROS = """\
image_width: 640
image_height: 480
camera_name: left
distortion_model: plumb_bob
camera_matrix: {rows: 3, cols: 3, data: [700.0, 0, 321.5, 0, 702.0, 236.0, 0, 0, 1]}
distortion_coefficients: {rows: 1, cols: 5, data: [-0.21, 0.06, 1e-4, -2.e-04, 0]}
projection_matrix: {rows: 3, cols: 4, data: [1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0]}
"""


def test_a_file_of_opencv_is_read_and_follows_the_image_size(tmp_path):
    path = tmp_path / "camera.yml"
    storage = cv2.FileStorage(str(path), cv2.FILE_STORAGE_WRITE)
    storage.write("calibration_time", "Mon 23 Nov 2026 07:00:00")
    storage.write("image_width", 1920)
    storage.write("image_height", 1280)
    storage.write("camera_matrix", np.array([[2100.0, 0, 959.5], [0, 2100.0, 639.5], [0, 0, 1]]))
    storage.write("distortion_coefficients", np.array([[-0.1, 0.02, 0.0, 0.0, 0.0]]))
    storage.release()
    full, half = read_intrinsics(path, (1280, 1920)), read_intrinsics(path, (640, 960))
    assert full.focal_length_px.value == 2100.0
    assert full.focal_length_px.source == "camera.yml"
    assert full.distortion == (-0.1, 0.02, 0.0, 0.0, 0.0)
    assert half.focal_length_px.value == 1050.0
    assert (half.center_x_px.value, half.center_y_px.value) == (479.5, 319.5)  # the middle stays the middle
    assert half.distortion == full.distortion


def test_a_file_of_ros_is_read(tmp_path):
    (tmp_path / "left.yaml").write_text(ROS)
    found = read_intrinsics(tmp_path / "left.yaml", (480, 640))
    assert found.focal_length_px.value == 701.0
    assert found.center_x_px.value == 321.5
    assert found.distortion == (-0.21, 0.06, 1e-4, -2e-4, 0.0)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        (ROS, "", "found nothing"),
        (ROS, "<opencv_storage></opencv_storage>", "expected keys and values"),
        ("camera_matrix", "CameraMatrix", "'camera_matrix' is missing"),
        ("image_width: 640", "image_width: 0", ":1: image_width: .* greater than 0, found 0"),
        ("image_width: 640", "image_width: 480", "480 x 480 px and the stacks are 640 x 480 px, which is not the same"),
        ("plumb_bob", "equidistant", "'equidistant', which is no pinhole camera"),
        ("700.0, 0", "700.0", "3 x 3 values were expected, found 8"),
        ("rows: 3, cols: 3, data: [700.0, 0,", "rows: 2, cols: 4, data: [700.0,", "must be 3 x 3, found 2 x 4"),
        ("[700.0", "[.nan", "must be finite"),
        ("[700.0", "[-700.0", "must be fx 0 cx, 0 fy cy, 0 0 1"),
        ("702.0", "750.0", "pixels must be square, found fx 700 and fy 750"),
        ("321.5", "3215", r"principal point \(3215, 236\) of camera_matrix lies outside"),
        ("cols: 5, data: [-0.21, 0.06, 1e-4, -2.e-04, 0]", "cols: 2, data: [-0.21, 0]", "4, 5 or 8 values .* found 2"),
    ],
)
def test_what_is_no_such_file_is_refused_in_one_sentence(tmp_path, old, new, words):
    path = tmp_path / "camera.yaml"
    path.write_text(ROS.replace(old, new))
    with pytest.raises(UsageError, match=words) as caught:
        read_intrinsics(path, (480, 640))
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"none\.yaml cannot be read: No such file"):
        read_intrinsics(tmp_path / "none.yaml", (480, 640))


def test_boards_that_contradict_the_file_are_named(tmp_path):
    path = tmp_path / "left.yaml"
    path.write_text(ROS)
    found = read_intrinsics(path, (480, 640))
    points = Board(square_m=0.04).corners_m()
    camera = np.array([[701.0, 0, 321.5], [0, 701.0, 236.0], [0, 0, 1]])
    tilted = np.array([0.6, 0.2, 0.0]), np.array([-0.14, -0.1, 0.3])
    seen = cv2.projectPoints(points, *tilted, camera, np.array(found.distortion))[0].reshape(-1, 2)
    straight = cv2.projectPoints(points, *tilted, camera, None)[0].reshape(-1, 2)
    assert check_intrinsics(found, [points], [seen], ["a.h5"]) < 0.01
    with pytest.raises(CalibrationError, match=r"b\.h5: .* intrinsics of left\.yaml .*\[INTRINSICS_DISAGREE\]"):
        check_intrinsics(found, [points, points], [seen, straight], ["a.h5", "b.h5"])
