"""The target: true scale on paper, found when blurred, the same in simulation."""

import re
import struct
import zlib

import cv2
import numpy as np
import pytest

from calibration.board import (
    PAPERS_MM,
    Board,
    board_for_paper,
    board_scene,
    find_board,
    other_pattern_that_fits,
    write_pdf,
    write_png,
)
from capture.errors import UsageError


@pytest.mark.parametrize("paper", PAPERS_MM)
def test_pdf_is_in_true_scale_and_holds_exactly_the_cells(tmp_path, paper):
    board = board_for_paper(paper)
    write_pdf(board, tmp_path / "board.pdf", paper)
    data = (tmp_path / "board.pdf").read_bytes()
    box = [float(v) for v in re.search(rb"MediaBox \[([^\]]*)\]", data)[1].split()]
    np.testing.assert_allclose(np.array(box[2:]) / 72 * 25.4, PAPERS_MM[paper], atol=1e-3)
    content = zlib.decompress(re.search(rb"stream\n(.*)\nendstream", data, re.DOTALL)[1]).decode()
    assert content.startswith(f"{72 / 25.4:.10f} 0 0 {72 / 25.4:.10f} 0 0 cm")  # one unit is a millimetre
    boxes = np.array([[float(v) for v in m.split()[:4]] for m in re.findall(r"[-\d. ]+ re", content)])
    assert boxes.min() >= 0
    cell_mm = board.square_m * 1000 / 24
    left, top = boxes[:, 0].min(), (boxes[:, 1] + boxes[:, 3]).max()
    drawn = np.ones_like(board.cells())
    for x, y, w, h in boxes:
        rows = slice(round((top - y - h) / cell_mm), round((top - y) / cell_mm))
        columns = slice(round((x - left) / cell_mm), round((x + w - left) / cell_mm))
        assert drawn[rows, columns].all(), "rectangles overlap"
        drawn[rows, columns] = 0
    np.testing.assert_array_equal(drawn, board.cells())
    assert len(re.findall(r" l\n", content)) == 102  # the ruler: its base line and 101 ticks


def test_png_stores_the_resolution_that_prints_true(tmp_path):
    board = Board(square_m=0.031)
    write_png(board, tmp_path / "board.png")
    data = (tmp_path / "board.png").read_bytes()
    at = data.index(b"pHYs")
    px_per_m, _, unit = struct.unpack(">IIB", data[at + 4 : at + 13])
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_GRAYSCALE)
    cells = board.cells().shape[1] + 2 * (24 // 4)
    assert unit == 1
    assert image.shape[1] / px_per_m == pytest.approx(cells * board.square_m / 24, rel=1e-4)


@pytest.mark.parametrize(("columns", "rows"), [(7, 5), (9, 7), (5, 7)])
def test_texture_is_not_mistaken_for_markers(columns, rows):
    board = Board(columns=columns, rows=rows)
    scene = board_scene(board, distance_m=1.0, focal_px=1800, height=700, width=900)
    for sigma in (0.01, 0.8, 1.2):
        view = find_board(cv2.GaussianBlur(scene.aif[..., 1], (0, 0), sigma), board)
        assert view.n_markers == columns * rows // 2
        assert len(view.ids) == (columns - 1) * (rows - 1)


@pytest.mark.parametrize("angles", [{}, {"tilt_deg": 50.0}, {"turn_deg": -35.0, "roll_deg": 5.0}])
def test_the_scene_is_where_it_says(angles):
    board = Board(square_m=0.04)
    scene = board_scene(board, distance_m=0.95, focal_px=1500.0, height=480, width=720, **angles)
    view = find_board(scene.aif[..., 1], board)
    assert len(view.ids) == 24
    camera = np.array([[1500.0, 0, 359.5], [0, 1500.0, 239.5], [0, 0, 1]])
    _, rotation, translation = cv2.solvePnP(board.corners_m()[view.ids], view.corners_px, camera, None)
    depth = (board.corners_m()[view.ids] @ cv2.Rodrigues(rotation)[0].T + translation.T)[:, 2]
    at = np.round(view.corners_px).astype(int)
    np.testing.assert_allclose(scene.depth_m[at[:, 1], at[:, 0]], depth, rtol=2e-3)


def test_a_swapped_or_legacy_description_is_recognised():
    truth = Board(columns=6, rows=8, legacy_pattern=True)
    image = board_scene(truth, distance_m=1.0, focal_px=1100, height=500, width=500).aif[..., 1]
    assert other_pattern_that_fits(image, Board(columns=6, rows=8)) == truth
    assert other_pattern_that_fits(np.full((300, 300), 0.5, np.float32), truth) is None


def test_a_board_that_does_not_fit_its_paper_is_refused(tmp_path):
    with pytest.raises(UsageError, match="do not fit A4"):
        write_pdf(Board(square_m=0.05), tmp_path / "board.pdf", "A4")
    with pytest.raises(UsageError, match="A7 is not known"):
        board_for_paper("A7")
    with pytest.raises(ValueError, match=r"35 mm is 0\.035"):
        Board(square_m=35.0)


def test_a_board_tilted_behind_the_camera_is_refused():
    with pytest.raises(UsageError, match="behind the camera"):
        board_scene(Board(), distance_m=0.3, focal_px=300.0, height=400, width=400, tilt_deg=80.0)
