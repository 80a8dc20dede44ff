"""Blur of every patch of the board in every frame, with its uncertainty, by fitting the known board blurred by discs.

No edge widths: an erf fitted to disc blur reads 4 to 10 % too much, and never by the same factor
(notes/calibration.md 4.2). Instead the board is drawn sharp at the geometry of each frame, blurred by discs in the
Fourier domain, and compared with the frame in a window around every chessboard corner; gain, offset and a small
shift of each window come out of the same linear solve, so uneven light and breathing cost nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import cv2
import numpy as np
import scipy.fft
from numpy.typing import NDArray
from scipy.special import j1

from calibration.board import Board, BoardView, Painter, find_board, other_pattern_that_fits
from capture.errors import DataError

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float64]

MIN_CORNERS = 8
WINDOW_SQUARES = 0.55  # half-width of a window around a corner
MAX_BLUR_SQUARES = 0.9  # beyond, the window holds the blur of the paper around the board
LEVEL_RATIO, LEVEL_STEP_PX = 1.05, 0.3  # between the discs of the bank, whichever is more: interpolated in between
COARSE_RATIO, COARSE_STEP_PX = 1.4, 0.5
SMOOTH_PX = 0.45  # templates are sampled with a Gaussian: squares of a pixel would alias fine detail by some per cent
HALO_SIGMA_PX = 2.0
AIRY_SAMPLES = 128  # per unit of the disc spectrum's argument: linear in between to 1e-5
MIN_RAMP_PX = 0.1  # of change of blur over a window: less does not matter
PATCH_PIXELS = 4000  # of a window are used: more would lower the noise below what the template leaves unexplained
MAX_GEOMETRY_PX = 0.3  # a template that sits worse is drawn again


class CalibrationError(DataError):
    """A calibration that cannot be trusted; `code` is one of notes/calibration.md 5.4."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(f"{sentence} [{code}]")
        self.code = code


@dataclass(frozen=True)
class Sweep:
    """Frames of a board that does not move, linear grey, at increasing focus positions."""

    name: str
    images: NDArray[np.float32]  # (S, H, W), 0 to 1
    positions: NDArray[np.float64]  # (S,)
    board: Board


class Similarity(NamedTuple):
    """Frame geometry relative to the sweep's reference frame: x -> scale * x + shift, x from the image centre."""

    scale: float
    shift_x_px: float
    shift_y_px: float

    def matrix(self, shape: tuple[int, int]) -> NDArray[np.float64]:
        center_x, center_y = (shape[1] - 1) / 2, (shape[0] - 1) / 2
        return np.array(
            [
                [self.scale, 0, self.shift_x_px + center_x * (1 - self.scale)],
                [0, self.scale, self.shift_y_px + center_y * (1 - self.scale)],
                [0, 0, 1.0],
            ]
        )


class Found(NamedTuple):
    """Where the board is in one sweep: the views of all frames, and the frame that sees it sharpest."""

    views: list[BoardView]
    reference: int


class Ramp(NamedTuple):
    """How blur changes across the windows of a board that is not frontal, as an earlier fit has it.

    Without it the sharper half of a window, where detail is stronger, speaks for the whole: 0.03 px too little blur,
    and a gain 1 % off from one sweep of a board tilted by 50 degrees.
    """

    side: NDArray[np.float64]  # (S, N) sign of the defocus in every frame at every corner, positive behind focus
    per_px: NDArray[np.float64]  # (2,) change of the signed diameter per px to the right and down


class PatchBlur(NamedTuple):
    """Blur observations of one sweep; every array has one entry per (frame, corner)."""

    frame: NDArray[np.int64]
    corner: NDArray[np.int64]
    coc2_px2: NDArray[np.float64]  # squared CoC diameter, which may come out negative near focus
    std_px2: NDArray[np.float64]
    corner_px: NDArray[np.float64]  # (n, 2) where the corner really is in that frame
    tone: NDArray[np.float64]  # bow of brightness against the template, 0 in linear light
    halo: NDArray[np.float64]  # bright rims of edges, 0 without sharpening
    geometry: list[Similarity | None]  # per frame; None where the board was lost
    n_dropped: int  # patches blurred beyond MAX_BLUR_SQUARES

    def at_corners(self, frame: int) -> NDArray[np.float64] | None:
        """(N,) squared diameters of `frame` by corner, unseen corners at the median; None when it has none."""
        here = self.frame == frame
        if not here.any():
            return None
        values = np.full(int(self.corner.max()) + 1, np.median(self.coc2_px2[here]))
        values[self.corner[here]] = self.coc2_px2[here]
        return values


def locate(sweep: Sweep) -> Found:
    """The board in every frame that is sharp enough; `CalibrationError` when no frame shows it."""
    views = [find_board(image, sweep.board) for image in sweep.images]
    sharpness = np.array([_sharpness(image) for image in sweep.images])
    counts = np.array([len(view.ids) for view in views])
    if counts.max() < MIN_CORNERS:
        sharpest = int(np.argmax(sharpness))
        other = other_pattern_that_fits(sweep.images[sharpest], sweep.board)
        if other is not None:
            raise CalibrationError(
                "LEGACY_PATTERN",
                f"{sweep.name}: the board is not {sweep.board.columns} x {sweep.board.rows} squares but "
                f"{other.columns} x {other.rows}{' (pattern of OpenCV before 4.6)' if other.legacy_pattern else ''}; "
                "correct the board description",
            )
        n_markers = max(view.n_markers for view in views)
        if counts.max() == 0 and n_markers >= MIN_CORNERS:  # corners of the right board are found between its markers
            raise CalibrationError(
                "NO_BOARD",
                f"{sweep.name}: {n_markers} markers are seen, but not placed as on a board of {sweep.board.columns} x "
                f"{sweep.board.rows} squares; correct columns and rows of the board description",
            )
        closest = int(np.argmax([view.n_markers for view in views])) if any(v.n_markers for v in views) else sharpest
        raise CalibrationError(
            "NO_BOARD",
            f"{sweep.name}: no frame shows the board; closest is frame {closest} with {views[closest].n_markers} of "
            f"{sweep.board.columns * sweep.board.rows // 2} markers and {counts[closest]} corners; the sweep must "
            "focus on the board at some frame, and its squares must be larger than the blur there",
        )
    usable = counts >= max(MIN_CORNERS, 0.8 * counts.max())
    return Found(views, int(np.argmax(np.where(usable, sharpness, -1.0))))


def measure(
    sweep: Sweep,
    found: Found,
    camera: NDArray[np.float64],
    distortion: Sequence[float] = (),
    *,
    floor_sigma_px: float = 0.0,
    previous: PatchBlur | None = None,
    ramp: Ramp | None = None,
) -> PatchBlur:
    """Blur of all patches of `sweep`, tracking the board outwards from its sharpest frame.

    Args:
        camera: 3 x 3 camera matrix, needed only to undo `distortion`.
        floor_sigma_px: Gaussian blur that every frame has even in focus, convolved with the discs.
        previous: an earlier measurement of the same sweep, to start from.
        ramp: how blur varies over a window; the diameters are those at the corners themselves.
    """
    shape = sweep.images.shape[1:]
    bend = _bend(camera, distortion, shape)
    view = found.views[found.reference]
    points = _straight(view.corners_px, camera, distortion)
    corners_m = sweep.board.corners_m()[:, :2]
    homography = cv2.findHomography(corners_m[view.ids], points, cv2.RANSAC, 1.0)[0]
    tracker = _Tracker(sweep, Painter(sweep.board), homography, bend, floor_sigma_px, ramp)

    n_frames = len(sweep.images)
    fitted: list[_FrameFit | None] = [None] * n_frames
    start = Similarity(1.0, 0.0, 0.0)
    for step in (1, -1):
        known: list[tuple[float, Similarity]] = []
        for frame in range(found.reference, n_frames if step > 0 else -1, step):
            if frame == found.reference and fitted[frame] is not None:
                guess = start
            elif previous is not None and previous.geometry[frame] is not None:
                guess = previous.geometry[frame] or start
            else:
                guess = _extrapolate(known, sweep.positions[frame]) or start
            if fitted[frame] is None:
                fitted[frame] = tracker.fit(frame, guess, None if previous is None else previous.at_corners(frame))
            result = fitted[frame]
            if result is not None:
                known.append((float(sweep.positions[frame]), result.geometry))
    return _collect(fitted)


class _FrameFit(NamedTuple):
    corner: NDArray[np.int64]
    coc2_px2: NDArray[np.float64]
    std_px2: NDArray[np.float64]
    corner_px: NDArray[np.float64]
    tone: NDArray[np.float64]
    halo: NDArray[np.float64]
    geometry: Similarity
    n_dropped: int


class _Tracker:
    """Fits frames of one sweep at a guessed geometry and returns the geometry that the windows agree on."""

    def __init__(
        self,
        sweep: Sweep,
        painter: Painter,
        homography: NDArray[np.float64],
        bend: NDArray[np.float32] | None,
        floor_sigma_px: float,
        ramp: Ramp | None,
    ) -> None:
        self.sweep, self.painter, self.homography, self.bend = sweep, painter, homography, bend
        self.floor_sigma_px, self.ramp = floor_sigma_px, ramp
        self.shape = (int(sweep.images.shape[1]), int(sweep.images.shape[2]))

    def fit(
        self, frame: int, guess: Similarity, expected: NDArray[np.float64] | None, *, jumped: bool = False
    ) -> _FrameFit | None:
        """Blur of all windows of `frame`; None when the board does not look like the template at all.

        Args:
            expected: (N,) squared diameter of every corner from an earlier round, to look only around it.
        """
        result, first = None, guess
        for _ in range(3):
            to_px = guess.matrix(self.shape) @ self.homography
            result, moved_px, guess = self._fit_once(frame, guess, to_px, expected)
            if result is None or moved_px < MAX_GEOMETRY_PX:
                break
        if result is None and not jumped:
            return self.fit(frame, self._jumped(frame, first), expected, jumped=True)
        return result

    def _jumped(self, frame: int, guess: Similarity) -> Similarity:
        """`guess` shifted to where the board is now, should somebody have pushed it."""
        to_px = guess.matrix(self.shape) @ self.homography
        square = float(_square_px(to_px, self.sweep.board).min())
        template, image = (
            cv2.GaussianBlur(picture, (0, 0), 0.15 * square)
            for picture in (self.painter.paint(to_px, self.shape, self.bend), self.sweep.images[frame])
        )
        reach = max(int(0.6 * square), 2)  # the chessboard looks the same again two squares on
        inner = template[reach:-reach, reach:-reach]
        match = cv2.matchTemplate(image, inner, cv2.TM_CCOEFF_NORMED)
        down, right = (int(n) - reach for n in np.unravel_index(int(match.argmax()), match.shape))
        return guess._replace(shift_x_px=guess.shift_x_px + right, shift_y_px=guess.shift_y_px + down)

    def _fit_once(
        self, frame: int, guess: Similarity, to_px: NDArray[np.float64], expected: NDArray[np.float64] | None
    ) -> tuple[_FrameFit | None, float, Similarity]:
        board = self.sweep.board
        ideal = cv2.perspectiveTransform(board.corners_m()[None, :, :2], to_px)[0]
        corners = ideal if self.bend is None else _bent(ideal, self.bend)
        square_px = _square_px(to_px, board)
        # the box of a window holds the square around the corner also when the board is rolled
        jacobian = _corner_jacobians(to_px, board) * board.square_m
        half = WINDOW_SQUARES * np.abs(jacobian).max(axis=2)
        largest = MAX_BLUR_SQUARES * float(square_px.max())
        pad = 0.5 * largest + 4
        low = np.floor(np.maximum((corners - half).min(axis=0) - pad, 0)).astype(int)
        high = np.ceil(np.minimum((corners + half).max(axis=0) + pad, np.array(self.shape[::-1]) - 1)).astype(int) + 1
        inside = np.all((corners - half >= 1) & (corners + half <= np.array(self.shape[::-1]) - 2), axis=1)
        if inside.sum() < MIN_CORNERS // 2:
            return None, 0.0, guess
        crop = (slice(low[1], high[1]), slice(low[0], high[0]))
        crop_shape = (high[1] - low[1], high[0] - low[0])
        offset = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1.0]])
        bend = None if self.bend is None else self.bend[crop] - low.astype(np.float32)
        bank = _DiscBank(
            self.painter.paint(offset @ to_px, crop_shape, bend, smooth_px=SMOOTH_PX), self.floor_sigma_px, SMOOTH_PX
        )
        image = self.sweep.images[frame][crop]
        which = np.flatnonzero(inside)
        boxes = [
            (
                slice(int(corners[j, 1] - half[j, 1]) - low[1], int(corners[j, 1] + half[j, 1]) - low[1] + 1),
                slice(int(corners[j, 0] - half[j, 0]) - low[0], int(corners[j, 0] + half[j, 0]) - low[0] + 1),
            )
            for j in which
        ]
        patches = [Patch(image[box]) for box in boxes]

        if expected is None:
            near, worst = self._coarse(bank, image, boxes, largest)
            if worst > 0.5:
                return None, 0.0, guess
        else:
            middle = np.sqrt(np.maximum(expected[which], 0.0))
            near = np.stack([np.maximum(middle / 1.06 - 1.0, 0.0), middle * 1.06 + 1.0], axis=1)
        ramps = self._ramps(frame, which, corners[which] - low, boxes)
        reach = max((float(np.abs(ramp).max()) for ramp in ramps if ramp is not None), default=0.0)
        levels = _levels(float(near[:, 0].min()) - reach, float(near[:, 1].max()) + reach, LEVEL_RATIO, LEVEL_STEP_PX)
        blurred = cache(lambda k: bank(levels[k]))
        fits = []
        for patch, box, (nearest, farthest), over in zip(patches, boxes, near, ramps, strict=True):
            first = max(int(np.searchsorted(levels, nearest, side="right")) - 1, 0)
            last = min(max(int(np.searchsorted(levels, farthest, side="left")), first + 1), len(levels) - 1)

            def template(
                k: int, box: tuple[slice, slice] = box, over: FloatArray | None = over, first: int = first
            ) -> NDArray[np.float32]:
                if over is None:
                    return blurred(first + k)[box]
                return _at_diameters(levels, lambda level: blurred(level)[box], np.abs(levels[first + k] + over))

            fits.append(patch.fit(levels[first : last + 1], template))
        coc2, std2, shift, tone, halo = (np.array(values) for values in zip(*fits, strict=True))
        good = np.isfinite(std2) & (coc2 < (MAX_BLUR_SQUARES * square_px[which]) ** 2)
        if good.sum() < MIN_CORNERS // 2:
            return None, 0.0, guess
        moved, geometry = _regress(corners[which][good], shift[good], guess, self.shape)
        return (
            _FrameFit(
                which[good],
                coc2[good],
                std2[good],
                (corners[which] + shift)[good],
                tone[good],
                halo[good],
                geometry,
                int((~good).sum()),
            ),
            moved,
            geometry,
        )

    def _ramps(
        self,
        frame: int,
        which: NDArray[np.int64],
        corners: NDArray[np.float64],
        boxes: Sequence[tuple[slice, slice]],
    ) -> list[NDArray[np.float64] | None]:
        """What each window's blur exceeds that at its corner by, over its pixels; None where that is nothing."""
        if self.ramp is None:
            return [None] * len(boxes)
        out: list[NDArray[np.float64] | None] = []
        for side, corner, (rows, columns) in zip(self.ramp.side[frame, which], corners, boxes, strict=True):
            right = np.arange(columns.start, columns.stop) - corner[0]
            down = np.arange(rows.start, rows.stop) - corner[1]
            over = side * (self.ramp.per_px[0] * right[None, :] + self.ramp.per_px[1] * down[:, None])
            out.append(over if np.abs(over).max() > MIN_RAMP_PX else None)
        return out

    @staticmethod
    def _coarse(
        bank: _DiscBank, image: NDArray[np.float32], boxes: Sequence[tuple[slice, slice]], largest: float
    ) -> tuple[NDArray[np.float64], float]:
        """((n, 2) diameters between which each window's blur lies, median unexplained share), at half resolution."""
        small = cv2.resize(image, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        small_bank = bank.halved()
        boxes = [(slice(y.start // 2, y.stop // 2), slice(x.start // 2, x.stop // 2)) for y, x in boxes]
        patches = [Patch(small[box]) for box in boxes]
        levels = _levels(0.0, largest, COARSE_RATIO, COARSE_STEP_PX)
        costs = np.array(
            [
                [patch.cost(template[box]) for patch, box in zip(patches, boxes, strict=True)]
                for template in (small_bank(0.5 * level) for level in levels)
            ]
        )
        best = costs.argmin(axis=0)
        table = np.array(levels)
        near = np.stack([table[np.maximum(best - 1, 0)], table[np.minimum(best + 1, len(levels) - 1)]], axis=1)
        return near, float(np.median(costs.min(axis=0)))


class PatchFit(NamedTuple):
    coc2: float
    std2: float
    shift: NDArray[np.float64]
    tone: float  # q of brightness = gain (template + q template^2) + offset
    halo: float  # amount of (template - its surroundings) beyond what blur explains: positive beside sharpened edges


class _PairFit(NamedTuple):
    cost: float
    t: float
    std_t: float
    shift: FloatArray
    columns: FloatArray  # the parts of the template
    inverse: FloatArray  # of their normal matrix
    residual: FloatArray


class Patch:
    """One window of a frame, and its least-squares comparison with windows of the template."""

    def __init__(self, image: NDArray[np.float32]) -> None:
        self.stride = max(1, int(np.sqrt(image.size / PATCH_PIXELS)))
        self.inner = (slice(1, -1, self.stride), slice(1, -1, self.stride))
        self.pixels = image[self.inner].astype(np.float64).ravel()
        self.pixels -= self.pixels.mean()
        self.energy = float(np.sum(self.pixels**2)) + 1e-12

    def cost(self, template: NDArray[np.float32]) -> float:
        """Unexplained share of the window's variance for the best gain and offset."""
        centered = template[self.inner].ravel().astype(np.float64)
        centered -= centered.mean()
        return 1.0 - max(float(centered @ self.pixels), 0.0) ** 2 / (float(centered @ centered) + 1e-12) / self.energy

    def fit(self, levels: Sequence[float], template: Callable[[int], NDArray[np.float32]]) -> PatchFit:
        """Squared diameter, its standard error and the window's shift, from the pair of levels that fits best.

        Between two levels the template is linear in c^2, so gain, offset, shift and c^2 are one linear solve; where
        that lands outside its pair, it says on which side the better pairs are.

        Args:
            template: the window at the level of that number.
        """
        drawn = cache(template)
        best: _PairFit | None = None
        lowest, highest = 0, len(levels) - 2
        while lowest <= highest:
            k = (lowest + highest) // 2
            here = self._fit_pair(drawn(k), drawn(k + 1), below=k > 0, above=k < len(levels) - 2)
            if here is not None and (best is None or here.cost < best.cost):
                best, at = here, k
            if here is None or here.t < 0.0:
                highest = k - 1
            elif here.t > 1.0:
                lowest = k + 1
            else:
                break
        if best is None:
            return PatchFit(np.nan, np.nan, np.zeros(2), 0.0, 0.0)
        span = levels[at + 1] ** 2 - levels[at] ** 2
        low, high = drawn(at), drawn(at + 1)
        return PatchFit(
            levels[at] ** 2 + float(np.clip(best.t, -3.0, 3.0)) * span,
            best.std_t * span,
            best.shift,
            *self._beside(low + np.float32(np.clip(best.t, 0.0, 1.0)) * (high - low), best),
        )

    def _fit_pair(
        self, low: NDArray[np.float32], high: NDArray[np.float32], *, below: bool, above: bool
    ) -> _PairFit | None:
        """The window as low + t (high - low), shifted; None when it looks like neither.

        Args:
            below, above: whether there are other pairs on that side, which know better than an extrapolation.
        """
        n = self.stride
        middle = 0.5 * (low + high)
        slope_x = 0.5 * (middle[1:-1:n, 2::n] - middle[1:-1:n, :-2:n])
        slope_y = 0.5 * (middle[2::n, 1:-1:n] - middle[:-2:n, 1:-1:n])
        parts = [low[self.inner], (high - low)[self.inner], slope_x, slope_y]
        columns = np.array([part.ravel() for part in parts], np.float64)
        columns -= columns.mean(axis=1, keepdims=True)
        normal = columns @ columns.T
        normal.flat[::5] *= 1.0 + 1e-12
        try:
            inverse = np.asarray(np.linalg.inv(normal), np.float64)
        except np.linalg.LinAlgError:
            return None
        solution = inverse @ (columns @ self.pixels)
        gain, mix, right, down = solution
        if gain <= 0:
            return None
        t = float(mix / gain)
        miss = max(-t if below else 0.0, t - 1.0 if above else 0.0, 0.0)
        residual = self.pixels - solution @ columns
        squares = float(residual @ residual)
        variance = squares / max(self.pixels.size - 5, 1)
        std_t = np.sqrt(variance * max(inverse[1, 1] - 2 * t * inverse[0, 1] + t * t * inverse[0, 0], 0.0)) / gain
        shift = np.array([-right / gain, -down / gain])
        return _PairFit(squares * (1.0 + 10.0 * miss), t, float(std_t), shift, columns, inverse, residual / gain)

    def _beside(self, template: NDArray[np.float32], fit: _PairFit) -> tuple[float, float]:
        """(tone, halo): how much of two faults of the image, which no blur explains, the residual holds."""
        halo = template - cv2.GaussianBlur(template, (0, 0), HALO_SIGMA_PX)
        faults = np.array([image[self.inner].ravel() for image in (np.square(template), halo)], np.float64)
        faults -= faults.mean(axis=1, keepdims=True)
        faults -= faults @ fit.columns.T @ fit.inverse @ fit.columns
        normal = faults @ faults.T
        tone, halo_amount = np.linalg.solve(normal + 1e-9 * np.diag(np.diag(normal)), faults @ fit.residual)
        return float(tone), float(halo_amount)


class _DiscBank:
    """A template blurred by uniform discs of any diameter, exactly (in the Fourier domain), on white paper.

    `smooth_px` is the Gaussian that `sharp` was sampled with; a sensor's square pixels take its place.
    """

    def __init__(self, sharp: NDArray[np.float32], floor_sigma_px: float, smooth_px: float) -> None:
        self.shape = sharp.shape
        self._sharp, self._floor_sigma_px, self._smooth_px = sharp, floor_sigma_px, smooth_px
        padded = [scipy.fft.next_fast_len(n, real=True) for n in sharp.shape]
        full = np.ones(padded, np.float32)
        full[: sharp.shape[0], : sharp.shape[1]] = sharp
        self._padded = padded
        fy, fx = scipy.fft.fftfreq(padded[0])[:, None], scipy.fft.rfftfreq(padded[1])[None, :]
        self._frequency = np.sqrt(fx * fx + fy * fy).astype(np.float32)
        gauss = np.exp(2.0 * np.pi**2 * (smooth_px**2 - floor_sigma_px**2) * self._frequency**2)
        self._spectrum = scipy.fft.rfft2(full) * (gauss * np.sinc(fx) * np.sinc(fy)).astype(np.float32)

    def halved(self) -> _DiscBank:
        """The bank of the template at half the resolution."""
        half = cv2.resize(self._sharp, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA)
        return _DiscBank(half, 0.5 * self._floor_sigma_px, 0.5 * self._smooth_px)

    def __call__(self, coc_px: float) -> NDArray[np.float32]:
        if coc_px <= 0:
            spectrum = self._spectrum
        else:
            index = self._frequency * np.float32(np.pi * coc_px * AIRY_SAMPLES)
            table = _airy(int(np.ceil(np.pi * coc_px)))
            floor = index.astype(np.int32)
            weight = index - floor
            spectrum = self._spectrum * (table[floor] * (1 - weight) + table[floor + 1] * weight)
        return scipy.fft.irfft2(spectrum, s=self._padded)[: self.shape[0], : self.shape[1]]


@cache
def _airy(largest: int) -> NDArray[np.float32]:
    """2 J1(z) / z for z = 0, 1 / AIRY_SAMPLES, ... to beyond `largest`, the spectrum of a disc."""
    z = np.arange(1, largest * AIRY_SAMPLES + 2) / AIRY_SAMPLES
    return np.concatenate([[1.0], 2.0 * j1(z) / z]).astype(np.float32)


def _levels(low: float, high: float, ratio: float, step_px: float) -> list[float]:
    """Disc diameters from `low` to `high`, growing by `ratio` or `step_px`, whichever is more; none in 0 to 1 px."""
    levels = [max(low, 0.0)]
    while levels[-1] < high - 1e-9:
        levels.append(min(max(levels[-1] * ratio, levels[-1] + step_px, 1.0), high))
    return levels if len(levels) > 1 else [levels[0], levels[0] + step_px]


def _at_diameters(
    levels: Sequence[float], window: Callable[[int], NDArray[np.float32]], coc_px: NDArray[np.float64]
) -> NDArray[np.float32]:
    """A window whose every pixel is blurred by its own diameter, read off those blurred by `levels` throughout."""
    squared = np.square(levels)
    wanted = np.square(coc_px)
    above = np.clip(np.searchsorted(squared, wanted), 1, len(levels) - 1)
    t = np.clip((wanted - squared[above - 1]) / (squared[above] - squared[above - 1]), 0.0, 1.0).astype(np.float32)
    lowest = int(above.min()) - 1
    stack = np.stack([window(k) for k in range(lowest, int(above.max()) + 1)])
    low, high = (np.take_along_axis(stack, k[None] - lowest, axis=0)[0] for k in (above - 1, above))
    return np.asarray(low + t * (high - low))


def _sharpness(image: NDArray[np.float32]) -> float:
    gradient = np.hypot(np.diff(image[:-1], axis=1), np.diff(image[:, :-1], axis=0))
    return float(np.mean(gradient**2) / max(float(image.mean()) ** 2, 1e-9))


def _extrapolate(known: list[tuple[float, Similarity]], position: float) -> Similarity | None:
    """Geometry at `position` from the last fitted frames of the same direction (linear once there are three)."""
    if not known:
        return None
    if len(known) < 3:
        return known[-1][1]
    at = np.array([p for p, _ in known[-4:]])
    values = np.array([g for _, g in known[-4:]])
    slope, level = np.polyfit(at - position, values, 1)
    del slope
    return Similarity(float(level[0]), float(level[1]), float(level[2]))


def _regress(
    corners: NDArray[np.float64], shift: NDArray[np.float64], guess: Similarity, shape: tuple[int, int]
) -> tuple[float, Similarity]:
    """(how far the windows moved in px, the similarity that they agree on), by robust least squares."""
    center = np.array([(shape[1] - 1) / 2, (shape[0] - 1) / 2])
    relative = corners - center
    weights = np.ones(len(corners))
    solution = np.zeros(3)
    for _ in range(5):
        rows_x = np.column_stack([relative[:, 0], np.ones(len(corners)), np.zeros(len(corners))])
        rows_y = np.column_stack([relative[:, 1], np.zeros(len(corners)), np.ones(len(corners))])
        design = np.vstack([rows_x, rows_y]) * np.tile(weights, 2)[:, None]
        solution = np.linalg.lstsq(
            design, np.concatenate([shift[:, 0], shift[:, 1]]) * np.tile(weights, 2), rcond=None
        )[0]
        left = shift - (solution[0] * relative + solution[1:])
        error = np.hypot(left[:, 0], left[:, 1])
        weights = 1.0 / np.sqrt(1.0 + (error / max(2.0 * float(np.median(error)), 1e-3)) ** 2)
    zoom = 1.0 + solution[0]
    moved = float(np.sqrt(np.mean((solution[0] * relative + solution[1:]) ** 2)))
    return moved, Similarity(
        guess.scale * zoom, guess.shift_x_px * zoom + solution[1], guess.shift_y_px * zoom + solution[2]
    )


def _corner_jacobians(to_px: NDArray[np.float64], board: Board) -> NDArray[np.float64]:
    """(N, 2, 2) derivative of pixel position by board position (px/m) at the corners."""
    points = board.corners_m()[:, :2]
    homogeneous = np.column_stack([points, np.ones(len(points))]) @ to_px.T
    w = homogeneous[:, 2]
    xy = homogeneous[:, :2] / w[:, None]
    return (to_px[None, :2, :2] - xy[:, :, None] * to_px[None, 2, None, :2]) / w[:, None, None]


def _square_px(to_px: NDArray[np.float64], board: Board) -> NDArray[np.float64]:
    """(N,) side of a square at each corner, the shorter of its two directions."""
    return np.linalg.norm(_corner_jacobians(to_px, board), axis=1).min(axis=1) * board.square_m


def _bend(
    camera: NDArray[np.float64], distortion: Sequence[float], shape: tuple[int, ...]
) -> NDArray[np.float32] | None:
    """(H, W, 2) where every pixel would lie without distortion; None when there is none."""
    if not any(distortion):
        return None
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float64)
    straight = _straight(np.stack([x.ravel(), y.ravel()], axis=1), camera, distortion)
    return straight.reshape(shape[0], shape[1], 2).astype(np.float32)


def _straight(
    points: NDArray[np.float64], camera: NDArray[np.float64], distortion: Sequence[float]
) -> NDArray[np.float64]:
    """Pixel positions (N, 2) without lens distortion."""
    if not any(distortion):
        return points
    out = cv2.undistortPoints(points.reshape(-1, 1, 2), camera, np.asarray(distortion, np.float64), P=camera)
    return np.asarray(out, np.float64).reshape(-1, 2)


def _bent(ideal: NDArray[np.float64], bend: NDArray[np.float32]) -> NDArray[np.float64]:
    """Inverse of `bend` at a few points, by fixed-point iteration."""
    points = ideal.copy()
    limit = np.array(bend.shape[1::-1]) - 1.0
    for _ in range(8):
        at = np.clip(points, 0, limit)
        here = cv2.remap(bend, at.astype(np.float32)[None], None, cv2.INTER_LINEAR)[0]
        points = points + (ideal - here)
    return points


def _collect(fitted: list[_FrameFit | None]) -> PatchBlur:
    frames = [i for i, fit in enumerate(fitted) if fit is not None]
    fits = [fit for fit in fitted if fit is not None]
    same = ("corner", "coc2_px2", "std_px2", "corner_px", "tone", "halo")
    return PatchBlur(
        frame=np.concatenate([np.full(len(fit.corner), i) for i, fit in zip(frames, fits, strict=True)]),
        **{name: np.concatenate([getattr(fit, name) for fit in fits]) for name in same},
        geometry=[None if fit is None else fit.geometry for fit in fitted],
        n_dropped=sum(fit.n_dropped for fit in fits),
    )


def pose_of(
    sweep: Sweep, blur: PatchBlur, reference: int, camera: NDArray[np.float64], distortion: Sequence[float]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rotation (3, 3) and translation (3,) in metres of the board, from the corners of the reference frame."""
    here = blur.frame == reference
    points = sweep.board.corners_m()[blur.corner[here]]
    coefficients = np.asarray(distortion, np.float64) if any(distortion) else None
    _, rotation, translation = cv2.solvePnP(points, blur.corner_px[here], camera, coefficients)
    rotation, translation = cv2.solvePnPRefineLM(
        points, blur.corner_px[here], camera, coefficients, rotation, translation
    )
    return np.asarray(cv2.Rodrigues(rotation)[0]), np.asarray(translation).reshape(3)
