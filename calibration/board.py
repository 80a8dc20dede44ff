"""The calibration target: describing it, drawing it in true scale, finding it, and seeing it in a simulated scene.

The board is ChArUco (chessboard with ArUco markers in its white squares) on a lattice of 24 cells per square, so that
the whole print is one small matrix of black and white cells. Black squares carry a patch of fine random cells: small
blur shows best on fine detail, which a plain chessboard lacks.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.board import BoardDescription
from capture.errors import UsageError
from capture.scenes import Scene

CELLS = 24  # lattice cells per square: markers have modules of 3 cells, the texture has single cells
TEXTURE_CELLS = 8
TEXTURE_FILL = 0.4  # share of white: more would cost the black squares their contrast at large blur
MARGIN_MM = 10.0
PAPERS_MM = {"A5": (210, 148), "A4": (297, 210), "letter": (279.4, 215.9), "A3": (420, 297), "A2": (594, 420)}
RULER_MM = 100.0
SUPERSAMPLING = 3  # odd: the middle sample lies on the pixel centre
MAX_PNG_PIXELS = 400_000_000  # A1 at 600 dpi has 280 million
MAX_TEXELS = 24  # per cell
FOUND_WHOLE = 0.8  # of the corners


class Board(BoardDescription):
    """A printed ChArUco board: its cells, its corners."""

    def cells(self) -> NDArray[np.uint8]:
        """The print as (24 rows, 24 columns) cells of 0 (black) or 1 (white)."""
        image = _charuco(self).generateImage((self.columns * CELLS, self.rows * CELLS), marginSize=0)
        cells = (image > 127).astype(np.uint8)
        if self.texture:
            rng = np.random.default_rng(24)
            low, high = (CELLS - TEXTURE_CELLS) // 2, (CELLS + TEXTURE_CELLS) // 2
            for row in range(self.rows):
                for column in range(self.columns):
                    square = cells[row * CELLS : (row + 1) * CELLS, column * CELLS : (column + 1) * CELLS]
                    if not square.any():
                        square[low:high, low:high] = rng.random((TEXTURE_CELLS, TEXTURE_CELLS)) < TEXTURE_FILL
        return cells

    def corners_m(self) -> NDArray[np.float64]:
        """The (N, 3) inner corners in metres, z = 0, in the order of their ChArUco ids."""
        x, y = np.meshgrid(np.arange(1, self.columns), np.arange(1, self.rows))
        return np.stack([x.ravel(), y.ravel(), np.zeros(x.size)], axis=1).astype(np.float64) * self.square_m


class BoardView(NamedTuple):
    """The board as found in one image."""

    ids: NDArray[np.int64]  # (N,) of `Board.corners_m`
    corners_px: NDArray[np.float64]  # (N, 2); pixel centres at integers
    n_markers: int


def find_board(image: NDArray[np.float32], board: Board) -> BoardView:
    """Corners of `board` in a linear grey image (H, W), 0 to 1; `ids` is empty where it was not found.

    Finds boards blurred up to about 0.8 marker modules (notes/calibration.md 3).
    """
    low, high = np.percentile(image[::4, ::4], (1.0, 99.0))
    tone = np.clip((image - low) / max(high - low, 1e-6), 0.0, 1.0) ** (1 / 2.2)
    grey = (tone * 255.0 + 0.5).astype(np.uint8)
    charuco_parameters, marker_parameters = cv2.aruco.CharucoParameters(), cv2.aruco.DetectorParameters()
    charuco_parameters.tryRefineMarkers = True
    marker_parameters.cornerRefinementMethod = cv2.aruco.CORNER_REFINE_SUBPIX
    detector = cv2.aruco.CharucoDetector(_charuco(board), charuco_parameters, marker_parameters)
    corners, ids, _, marker_ids = detector.detectBoard(grey)
    n_markers = 0 if marker_ids is None else len(marker_ids)
    if ids is None or len(ids) == 0:
        return BoardView(np.zeros(0, np.int64), np.zeros((0, 2)), n_markers)
    found = np.asarray(ids).reshape(-1).astype(np.int64)
    return BoardView(found, np.asarray(corners, np.float64).reshape(-1, 2), n_markers)


def other_pattern_that_fits(image: NDArray[np.float32], board: Board) -> Board | None:
    """A board like `board` with swapped sides or the legacy pattern that is found whole in `image`, if one is.

    Markers are numbered row by row: part of a board of as many columns and other rows looks the same.
    """
    for swap in (False, True):
        for legacy in (False, True):
            columns, rows = (board.rows, board.columns) if swap else (board.columns, board.rows)
            other = board.model_copy(update={"columns": columns, "rows": rows, "legacy_pattern": legacy})
            n_corners = (columns - 1) * (rows - 1)
            if other != board and len(find_board(image, other).ids) >= FOUND_WHOLE * n_corners:
                return other
    return None


class Painter:
    """Draws one board sharp, area-sampled, under any homography; keeps the magnified print between calls."""

    def __init__(self, board: Board) -> None:
        self.board = board
        self._print = np.pad(board.cells() * np.uint8(255), CELLS // 2, constant_values=255)  # the paper around it
        self._magnified: dict[int, NDArray[np.uint8]] = {}

    def paint(
        self,
        board_to_px: NDArray[np.float64],
        shape: tuple[int, int],
        bend: NDArray[np.float32] | None = None,
        *,
        smooth_px: float = 0.0,
    ) -> NDArray[np.float32]:
        """Reflectance (H, W), 0 to 1; the paper is taken to be endless and white.

        Args:
            board_to_px: 3 x 3 homography from board metres to pixels.
            shape: (H, W).
            bend: (H, W, 2) where each pixel would lie without lens distortion; None when there is none.
            smooth_px: sigma of a Gaussian to sample with; 0 averages over each pixel's square, as a sensor does.
        """
        height, width = shape
        n = SUPERSAMPLING
        # a texel as large as a sample: bilinear reading then averages over the sample instead of picking a point
        corners = np.array([[0, 0], [1, 0], [1, 1], [0, 1]]) * [self.board.columns, self.board.rows]
        seen = cv2.perspectiveTransform((corners * self.board.square_m)[None], board_to_px)[0]
        cells = 2 * (self.board.columns + self.board.rows) * CELLS
        samples_per_cell = n * cv2.arcLength(seen.astype(np.float32), closed=True) / cells
        texels = int(np.clip(round(samples_per_cell), 1, MAX_TEXELS))
        if texels not in self._magnified:
            self._magnified[texels] = np.kron(self._print, np.ones((texels, texels), np.uint8)).astype(np.uint8)
        texture = self._magnified[texels]
        to_texels = _affine(texels * CELLS / self.board.square_m, texels * CELLS / 2 - 0.5)
        if bend is None:
            to_fine = _affine(n, (n - 1) / 2)
            sizes = (width * n, height * n)
            matrix = to_fine @ board_to_px @ np.linalg.inv(to_texels)
            fine = cv2.warpPerspective(texture, matrix, sizes, flags=cv2.INTER_LINEAR, borderValue=(255,))
        else:
            where = cv2.resize(bend, (width * n, height * n), interpolation=cv2.INTER_LINEAR)
            matrix = to_texels @ np.linalg.inv(board_to_px)
            texel = cv2.perspectiveTransform(where.reshape(1, -1, 2), matrix).reshape(where.shape)
            fine = cv2.remap(texture, texel, None, cv2.INTER_LINEAR, borderValue=(255,))
        if smooth_px:
            smooth = cv2.GaussianBlur(fine.astype(np.float32), (0, 0), n * smooth_px)
            return np.asarray(smooth[n // 2 :: n, n // 2 :: n] / 255.0, np.float32)
        return cv2.resize(fine.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA) / 255.0


def board_to_px(
    rotation: NDArray[np.float64], translation_m: NDArray[np.float64], camera: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Homography from board metres to pixels for a pose (R 3 x 3, t in metres) and a 3 x 3 camera matrix."""
    return camera @ np.column_stack([rotation[:, 0], rotation[:, 1], translation_m])


def board_scene(
    board: Board,
    *,
    distance_m: float,
    focal_px: float,
    height: int,
    width: int,
    tilt_deg: float = 0.0,
    turn_deg: float = 0.0,
    roll_deg: float = 0.0,
) -> Scene:
    """The board on an endless white sheet, its centre on the axis at `distance_m`, as a scene for the simulated camera.

    Tilt turns it about the horizontal axis, turn about the vertical one, roll about the viewing axis.
    """
    tilt, turn, roll = np.deg2rad([tilt_deg, turn_deg, roll_deg])
    about_x = np.array([[1, 0, 0], [0, np.cos(tilt), -np.sin(tilt)], [0, np.sin(tilt), np.cos(tilt)]])
    about_y = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
    about_z = np.array([[np.cos(roll), -np.sin(roll), 0], [np.sin(roll), np.cos(roll), 0], [0, 0, 1]])
    rotation = about_z @ about_x @ about_y
    center = np.array([board.columns, board.rows, 0.0]) * board.square_m / 2
    translation = np.array([0.0, 0.0, distance_m]) - rotation @ center
    camera = np.array([[focal_px, 0, (width - 1) / 2], [0, focal_px, (height - 1) / 2], [0, 0, 1.0]])
    grey = Painter(board).paint(board_to_px(rotation, translation, camera), (height, width)) * 0.8 + 0.05
    x, y = np.meshgrid((np.arange(width) - camera[0, 2]) / focal_px, (np.arange(height) - camera[1, 2]) / focal_px)
    normal = rotation[:, 2]
    inverse_depth = (normal[0] * x + normal[1] * y + normal[2]) / float(normal @ translation)
    if inverse_depth.min() <= 0:
        raise UsageError(f"a board tilted by {tilt_deg:g} and turned by {turn_deg:g} degrees reaches behind the camera")
    return Scene(
        aif=np.repeat(grey[..., None], 3, axis=2).astype(np.float32),
        depth_m=(1.0 / inverse_depth).astype(np.float32),
        name=f"board at {distance_m:g} m",
        focal_px=focal_px,
    )


def board_for_paper(paper: str, columns: int = 7, rows: int = 5) -> Board:
    """The board with the largest squares of whole millimetres that fit on `paper` (A5, A4, letter, A3, A2)."""
    if paper not in PAPERS_MM:
        raise UsageError(f"--paper {paper} is not known; it is one of {', '.join(PAPERS_MM)}")
    width, height = PAPERS_MM[paper]
    ruler_room = 12.0
    square = int(min((width - 2 * MARGIN_MM) / columns, (height - 2 * MARGIN_MM - ruler_room) / rows))
    if square < 5:
        raise UsageError(f"{columns} x {rows} squares on {paper} would be {square} mm; take fewer squares")
    return Board(columns=columns, rows=rows, square_m=square / 1000)


def write_pdf(board: Board, path: Path, paper: str) -> None:
    """One page of `paper` with the board in true scale, its description, and a ruler of 100 mm to check the print."""
    width, height = PAPERS_MM[paper]
    cells = board.cells()
    cell_mm = board.square_m * 1000 / CELLS
    left, top = (width - cells.shape[1] * cell_mm) / 2, height - MARGIN_MM
    if left < 0 or cells.shape[0] * cell_mm + MARGIN_MM + 12 > height:
        raise UsageError(f"{board.columns} x {board.rows} squares of {board.square_m * 1000:g} mm do not fit {paper}")
    # black cells only, in one path: viewers then leave no hairlines between neighbours
    black = [
        f"{left + x * cell_mm:.5f} {top - (y + h) * cell_mm:.5f} {w * cell_mm:.5f} {h * cell_mm:.5f} re"
        for x, y, w, h in _rectangles(cells == 0)
    ]
    ruler_y = MARGIN_MM + 1.0
    lines = [f"{left:.3f} {ruler_y:.3f} m {left + RULER_MM:.3f} {ruler_y:.3f} l"]
    for mm in range(int(RULER_MM) + 1):
        tick_mm = 4.0 if mm % 10 == 0 else 2.5 if mm % 5 == 0 else 1.5
        lines.append(f"{left + mm:.3f} {ruler_y:.3f} m {left + mm:.3f} {ruler_y + tick_mm:.3f} l")
    label = (
        f"daif board: {board.columns} x {board.rows} squares of {board.square_m * 1000:g} mm. "
        f"Print at 100 %, glue flat. This ruler must be {RULER_MM:g} mm long;"
    )
    second = "if it is not, pass its real length:  daif calibrate --ruler-mm LENGTH"
    numbers = [f"BT /F1 2.2 Tf {left + mm - 0.6:.3f} {ruler_y - 2.4:.3f} Td ({mm}) Tj ET" for mm in range(0, 101, 50)]
    text = f"BT /F1 2.8 Tf {left + RULER_MM + 4:.3f} {ruler_y + 3:.3f} Td ({label}) Tj 0 -3.4 Td ({second}) Tj ET"
    to_mm = f"{72 / 25.4:.10f} 0 0 {72 / 25.4:.10f} 0 0 cm"
    content = "\n".join([to_mm, "0 g", *black, "f", "0.1 w", *lines, "S", *numbers, text])
    stream = zlib.compress(content.encode("ascii"))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %.4f %.4f] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>" % (width / 25.4 * 72, height / 25.4 * 72),
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(stream), stream),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    out += b"xref\n0 %d\n0000000000 65535 f \n%s" % (len(objects) + 1, table)
    out += b"trailer\n<< /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, out.rfind(b"xref\n0"))
    path.write_bytes(out)


def write_png(board: Board, path: Path, dpi: float = 600.0) -> None:
    """The board with a white margin as a PNG whose stored resolution prints it in true scale.

    Raises UsageError if it would be larger than any print.
    """
    cell_m = board.square_m / CELLS
    px_per_cell = max(1, round(cell_m / 0.0254 * dpi))
    height, width = (px_per_cell * CELLS * squares for squares in (board.rows, board.columns))
    if height * width > MAX_PNG_PIXELS:
        raise UsageError(
            f"{board.columns} x {board.rows} squares of {board.square_m * 1000:g} mm would be {width} x {height} px at "
            f"{dpi:g} dpi, and {MAX_PNG_PIXELS // 1_000_000} million px are the limit; take smaller or fewer squares"
        )
    image = np.kron(np.pad(board.cells(), CELLS // 4, constant_values=1), np.ones((px_per_cell, px_per_cell), np.uint8))
    png = cv2.imencode(".png", image * np.uint8(255))[1].tobytes()
    px_per_m = round(px_per_cell / cell_m)
    chunk = b"pHYs" + struct.pack(">IIB", px_per_m, px_per_m, 1)
    chunk = struct.pack(">I", 9) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(png[:33] + chunk + png[33:])  # after the signature (8 bytes) and IHDR (25)


def _charuco(board: Board) -> cv2.aruco.CharucoBoard:
    n_markers = board.columns * board.rows // 2
    sizes = ((50, cv2.aruco.DICT_4X4_50), (100, cv2.aruco.DICT_4X4_100), (250, cv2.aruco.DICT_4X4_250))
    name = next((name for size, name in sizes if n_markers <= size), cv2.aruco.DICT_4X4_1000)
    dictionary = cv2.aruco.getPredefinedDictionary(name)
    charuco = cv2.aruco.CharucoBoard((board.columns, board.rows), board.square_m, 0.75 * board.square_m, dictionary)
    charuco.setLegacyPattern(board.legacy_pattern)
    return charuco


def _affine(scale: float, shift: float) -> NDArray[np.float64]:
    return np.array([[scale, 0, shift], [0, scale, shift], [0, 0, 1.0]])


def _rectangles(mask: NDArray[np.bool_]) -> list[tuple[int, int, int, int]]:
    """Disjoint rectangles (x, y, width, height) that cover `mask`: runs of each row, joined with equal runs below."""
    open_runs: dict[tuple[int, int], int] = {}
    done = []
    for y, row in enumerate(np.vstack([mask, np.zeros_like(mask[:1])])):
        edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(np.int8), [0]])))
        runs = {(int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True)}
        for run in [run for run in open_runs if run not in runs]:
            start = open_runs.pop(run)
            done.append((run[0], start, run[1] - run[0], y - start))
        for run in runs:
            open_runs.setdefault(run, y)
    return done
