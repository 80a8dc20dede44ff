"""Focus breathing and hand motion between the frames of a focal stack: found, measured, removed.

Turning the focus ring changes the image scale (breathing, up to 16 % on a clip-on macro lens, of either sign: see
notes/real-stacks.md), and a held camera moves. Frame i shows the reference's pixel p at

    p_i = s_i R(angle_i) (p - c) + c + (dx_i, dy_i)          c = image centre, ((W - 1) / 2, (H - 1) / 2)

so s_i > 1 means that frame i is *larger* than the reference frame. Three parameters, not six: the extra freedom of an
affine map only costs accuracy (notes/calibration.md 4.6). A similarity is a complex number in the plane, which is how
it is written inside: p_i = ratio * p + shift, ratio = s exp(j angle).

Frames are never sharp in the same places, so they are compared *at equal blur*: both smoothed, and what defocus still
leaves between them (proportional to the Laplacian, with a strength that varies over the image) is fitted locally and
taken out before the motion is read. Neighbours and second neighbours in focus order are compared, and all pairs are
joined in one robust least squares.

Warping frame i onto the reference divides its circles of confusion by s_i, so its blur gain becomes kappa_i / s_i:
multiply kappa by `Alignment.kappa_factor`. For a lens that focuses by moving as a unit s_i and kappa_i grow together
and kappa_i / s_i is one constant for the whole stack.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.errors import DataError

FloatArray = NDArray[np.floating]
FrameReader = Callable[[int, slice, slice], FloatArray]  # (frame, rows, cols) -> (h, w, 3)

SMOOTHING_PX = 2.0  # Gaussian sigma at every pyramid level; the finest level has half the working resolution
BACKGROUND_PX = 65  # brightness that changes slower than over this width (vignetting, lamps) says nothing
COARSEST_PX = 40  # shorter side of the smallest pyramid level
BLOCK_PX = 32  # side of the blocks, at the finest level, in which left-over motion is measured
SEARCH_PX = 4.0  # motion, at the finest level, beyond which a block counts as unmatched
UNTOUCHED_PX = 0.05  # working pixels; less motion than this everywhere is not worth a resampling
WARP_BAND_ROWS = 256  # rows warped at a time: bounds the memory of the coordinate maps
WARP_MARGIN_PX = 5  # Lanczos-4 reads 3 pixels before and 4 after
BLUR_WINDOW_PX = 12.0  # Gaussian window in which the difference in blur of two frames is taken as one number
MAX_ITERATIONS = 12  # Gauss-Newton steps per level
CONVERGED_PX = 0.002  # step at the corner, level pixels
MIN_BLOCKS = 4  # textured blocks without which no residual is given
MIN_BLOCK_CORRELATION = 0.6  # of a block with its match
FLOOR_PX = 0.008  # level pixels; no pair is trusted further than this
MIN_CORRELATION = 0.3  # of two aligned, smoothed frames, below which they show different things
ESTIMABLE_STD_PX = 0.3  # working pixels at the corner; a pair known less well than this is not used


@dataclass(frozen=True)
class Alignment:
    """Where every frame of a stack stands relative to its reference frame; all lengths in full-size pixels.

    Attributes:
        height, width: size of the frames.
        reference: the frame that stays as it is.
        ratio: (S,) complex, scale * exp(1j * rotation) of each frame relative to the reference.
        shift: (S,) complex, dx + 1j dy of the image centre.
        scale_std, rotation_std_rad, shift_std_px: (S,) standard errors; 0 for the reference and for what was given.
        residual_px: (S,) motion left between each frame and the rest of the stack after alignment: the median over
            textured blocks of the local shift between frames at equal blur. NaN where nothing could be compared.
        matched: (S,) share of the textured blocks that could be found again; NaN as above.
        estimable: (S,) False where the content did not determine the motion; such a frame follows its neighbours.
    """

    height: int
    width: int
    reference: int
    ratio: NDArray[np.complex128]
    shift: NDArray[np.complex128]
    scale_std: FloatArray
    rotation_std_rad: FloatArray
    shift_std_px: FloatArray
    residual_px: FloatArray
    matched: FloatArray
    estimable: NDArray[np.bool_]

    @classmethod
    def from_scales(
        cls, scales: Sequence[float] | FloatArray, height: int, width: int, *, reference: int | None = None
    ) -> Alignment:
        """The alignment that a lens profile predicts: `scales` (S,) about the image centre, no shifts, no residual.

        `scales` need not be 1 at `reference` (default: the middle frame); only their ratios count.
        """
        values = np.asarray(scales, dtype=float)
        n_frames = len(values)
        reference = n_frames // 2 if reference is None else reference
        unknown, zero = np.full(n_frames, np.nan), np.zeros(n_frames)
        ratio = (values / values[reference]).astype(complex)
        return cls(
            height, width, reference, ratio, zero.astype(complex), zero, zero, zero, unknown, unknown,
            np.ones(n_frames, dtype=bool),
        )  # fmt: skip

    @property
    def scales(self) -> FloatArray:
        """(S,) magnification of each frame relative to the reference; above 1 is larger."""
        return np.abs(self.ratio)

    @property
    def rotations_rad(self) -> FloatArray:
        """(S,) rotation of each frame relative to the reference, x towards y."""
        return np.angle(self.ratio)

    @property
    def shifts_px(self) -> FloatArray:
        """(S, 2) dx, dy of the image centre."""
        return np.stack([self.shift.real, self.shift.imag], axis=1)

    @property
    def transforms(self) -> list[tuple[float, float, float, float]]:
        """(scale, dx, dy, rotation) of every frame."""
        return [
            (abs(ratio), shift.real, shift.imag, float(np.angle(ratio)))
            for ratio, shift in zip(self.ratio, self.shift, strict=True)
        ]

    @property
    def matrices(self) -> FloatArray:
        """(S, 2, 3) affine matrices that map a pixel (x, y) of the reference to its place in each frame."""
        centre = complex(self.width - 1, self.height - 1) / 2
        offset = centre + self.shift - self.ratio * centre
        rows = [[self.ratio.real, -self.ratio.imag, offset.real], [self.ratio.imag, self.ratio.real, offset.imag]]
        return np.moveaxis(np.array(rows), -1, 0)

    @property
    def kappa_factor(self) -> FloatArray:
        """(S,) what the blur gain kappa of each frame is multiplied by once the frame is warped: 1 / scale.

        A disc that is c pixels wide in frame i is c / s_i pixels wide on the reference's grid.
        """
        return 1.0 / self.scales

    @cached_property
    def motion_px(self) -> FloatArray:
        """(S,) the largest distance, over the image corners, between a frame's pixel and the reference's."""
        corner = complex(self.width - 1, self.height - 1) / 2
        corners = np.array([corner, -corner, corner.conjugate(), -corner.conjugate()])
        moved = (self.ratio[:, None] - 1) * corners + self.shift[:, None]
        return np.abs(moved).max(axis=1)

    @property
    def is_identity(self) -> bool:
        """True when no frame moves: nothing is resampled then."""
        return bool(np.all(self.ratio == 1) and np.all(self.shift == 0))

    @property
    def default_limit_px(self) -> float:
        """Residual above which a stack is refused: 2 px, or the longer side / 500 if that is more.

        Sound real stacks leave 0.05 to 0.5 px of 800; a clip-on macro lens at its closest, whose perspective changes
        too, 1.5 px.
        """
        return max(2.0, max(self.height, self.width) / 500)

    def check(self, limit_px: float | None = None) -> None:
        """Raise DataError, naming the worst frame and its residual, when a frame is more than `limit_px` off."""
        limit_px = self.default_limit_px if limit_px is None else limit_px
        if np.isnan(self.residual_px).all():
            return
        worst = int(np.nanargmax(self.residual_px))
        if self.residual_px[worst] > limit_px:
            raise DataError(
                f"frame {worst} does not align with the others: after alignment its content is still "
                f"{self.residual_px[worst]:.1f} px off (limit {limit_px:.1f} px; {self.matched[worst]:.0%} of its "
                "textured blocks were found again); leave the frame out, retake the sweep, or raise the limit"
            )

    def apply(self, frame: FloatArray, i: int) -> NDArray[np.float32]:
        """Frame i, (H, W) or (H, W, C) linear, resampled onto the reference's grid; same shape, float32.

        Lanczos-4 at positions rounded to 1/32 px (OpenCV's grid), clipped at 0, edges repeated outside the frame;
        `valid_mask` says where.
        """
        return self.apply_tile(lambda _i, rows, cols: frame[rows, cols], i, slice(0, self.height), slice(0, self.width))

    def apply_tile(self, read: FrameReader, i: int, rows: slice, cols: slice) -> NDArray[np.float32]:
        """The part (rows, cols) of `apply`, bit for bit, reading only the part of frame i that it needs.

        `read(i, rows, cols)` returns linear pixels, e.g. `FocalStack.linear`.
        """
        top, bottom, _ = rows.indices(self.height)
        left, right, _ = cols.indices(self.width)
        if self.ratio[i] == 1 and self.shift[i] == 0:
            return np.asarray(read(i, slice(top, bottom), slice(left, right)), dtype=np.float32)
        matrix = self.matrices[i]
        bands = []
        for start in range(top, bottom, WARP_BAND_ROWS):
            y, x = np.mgrid[start : min(start + WARP_BAND_ROWS, bottom), left:right].astype(np.float64)
            # On OpenCV's own 1/32 px grid the result does not depend on where a tile starts.
            x_in = np.round((matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2]) * 32) / 32
            y_in = np.round((matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]) * 32) / 32
            needed_rows = _needed(y_in, self.height)
            needed_cols = _needed(x_in, self.width)
            source = np.ascontiguousarray(read(i, needed_rows, needed_cols), dtype=np.float32)
            x_map = (x_in - needed_cols.start).astype(np.float32)
            y_map = (y_in - needed_rows.start).astype(np.float32)
            warped = cv2.remap(source, x_map, y_map, cv2.INTER_LANCZOS4, borderMode=cv2.BORDER_REPLICATE)
            bands.append(np.maximum(warped, 0.0, out=warped))
        return np.concatenate(bands)

    def seen(self, rows: slice, cols: slice, step: int = 1) -> NDArray[np.bool_]:
        """Where each frame saw the reference's pixel, (S, h, w), in a region of the frames reduced by `step`."""
        y = (np.arange(rows.start, rows.stop)[:, None] + 0.5) * step - 0.5
        x = (np.arange(cols.start, cols.stop)[None, :] + 0.5) * step - 0.5
        masks = []
        for (a, b, c), (d, e, f) in self.matrices:
            x_in, y_in = a * x + b * y + c, d * x + e * y + f
            masks.append((x_in >= -0.5) & (x_in <= self.width - 0.5) & (y_in >= -0.5) & (y_in <= self.height - 0.5))
        return np.stack(masks)

    def valid_mask(self) -> NDArray[np.bool_]:
        """(H, W), True where every frame saw the reference's pixel."""
        return np.asarray(self.seen(slice(0, self.height), slice(0, self.width)).all(0))

    @property
    def crop(self) -> tuple[slice, slice]:
        """Rows and columns of a rectangle that every frame saw entirely (the largest, if nothing rotates)."""
        centre = complex(self.width - 1, self.height - 1) / 2
        corners = np.array([[0, self.width - 1], [1j * (self.height - 1), self.width - 1 + 1j * (self.height - 1)]])
        seen = (corners - centre - self.shift[:, None, None]) / self.ratio[:, None, None] + centre
        edge = 0.49  # a pixel that is less than half outside was seen: the same rule as `valid_mask`
        left, right = seen[:, :, 0].real.max() - edge, seen[:, :, 1].real.min() + edge
        top, bottom = seen[:, 0, :].imag.max() - edge, seen[:, 1, :].imag.min() + edge
        rows = slice(max(0, int(np.ceil(top))), min(self.height, int(np.floor(bottom)) + 1))
        cols = slice(max(0, int(np.ceil(left))), min(self.width, int(np.floor(right)) + 1))
        return rows, cols


def align_stack(
    frames: Sequence[FloatArray] | FloatArray | Callable[[int], FloatArray],
    focus_dpt: Sequence[float] | FloatArray | None = None,
    *,
    n_frames: int | None = None,
    order: Sequence[int] | None = None,
    reference: int | None = None,
    rotation: bool = False,
    scales: Sequence[float] | FloatArray | None = None,
    max_size: int = 1024,
) -> Alignment:
    """Estimate how every frame of a focal stack is scaled and shifted; see the module's docstring for the model.

    Frames are reduced to `max_size` pixels one at a time, so memory does not grow with their size. Accuracy on
    simulated and real stacks: `python -m tests.benchmarks alignment`.

    Args:
        frames: (S, H, W, 3) linear light, or a function that returns frame i (then `n_frames`, unless `focus_dpt`).
        focus_dpt: (S,) focus settings, used only to find neighbours; NaN or None means the frames are in focus order.
        order: the frames' indices in focus order, when neither holds.
        reference: the frame that stays; default the middle one in focus order.
        rotation: also estimate a rotation (a held camera); off for a tripod, where it would only add noise.
        scales: (S,) known image scales, e.g. of a lens profile; then only the shifts are estimated.
        max_size: longer side of the frames while estimating.

    Raises:
        DataError: frames of different sizes.
    """
    if n_frames is None:
        if focus_dpt is not None:
            n_frames = len(focus_dpt)
        elif callable(frames):
            raise ValueError("align_stack needs n_frames when frames is a function and focus_dpt is not given")
        else:
            n_frames = len(frames)
    order = _focus_order(n_frames, focus_dpt) if order is None else list(order)
    reference = order[n_frames // 2] if reference is None else reference

    pyramids: list[list[FloatArray]] = []
    noise_stds: list[float] = []
    height = width = 0
    for i in range(n_frames):
        frame = np.asarray(frames(i) if callable(frames) else frames[i])
        if i == 0:
            height, width = frame.shape[:2]
        elif frame.shape[:2] != (height, width):
            raise DataError(f"frame {i} is {frame.shape[1]}x{frame.shape[0]} but frame 0 is {width}x{height}")
        grey = _working_image(frame, max_size)
        pyramids.append(_pyramid(grey))
        noise_stds.append(_noise_std(grey))
    # Level pixels per full-size pixel at the finest level.
    zoom = pyramids[0][0].shape[1] / width
    working_px = 2 * zoom  # working pixels per full-size pixel: the finest level has half the working resolution

    log_scales = None if scales is None else np.log(np.asarray(scales, dtype=float))
    pairs = []
    for reach in (1, 2):
        for a, b in zip(order, order[reach:], strict=False):
            known = None if log_scales is None else log_scales[b] - log_scales[a]
            pairs.append(_align_pair(a, b, pyramids, log_scale=known, rotation=rotation))

    motion = _join_pairs(pairs, order, reference, pyramids[0][0].shape, log_scales, rotation)
    estimate = Alignment(
        height,
        width,
        reference,
        motion.ratio,
        motion.shift / zoom,
        scale_std=motion.std[:, 0],
        rotation_std_rad=motion.std[:, 1],
        shift_std_px=motion.std[:, 2] / zoom,
        residual_px=np.zeros(n_frames),
        matched=np.ones(n_frames),
        estimable=motion.estimable,
    )
    if (estimate.motion_px * working_px).max() < UNTOUCHED_PX:
        motion = motion._replace(ratio=np.ones(n_frames, complex), shift=np.zeros(n_frames, complex))
        estimate = replace(estimate, ratio=motion.ratio, shift=motion.shift)
    residual, matched = _residuals(pairs, motion, pyramids, noise_stds)
    return replace(estimate, residual_px=residual / zoom, matched=matched)


def _needed(coordinates: NDArray[np.float64], size: int) -> slice:
    """Source pixels along one axis that Lanczos-4 reads for `coordinates`, at least one."""
    first = int(np.clip(np.floor(coordinates.min()) - WARP_MARGIN_PX, 0, size - 1))
    last = int(np.clip(np.ceil(coordinates.max()) + WARP_MARGIN_PX, 0, size - 1))
    return slice(first, last + 1)


class _Pair(NamedTuple):
    """Frame b relative to frame a, in pixels of the finest level, with standard errors of the four parameters.

    The parameters are (log scale, rotation, dx, dy); one that was given has standard error 0.
    """

    a: int
    b: int
    ratio: complex
    shift: complex
    std: FloatArray  # (4,)
    estimable: bool


class _Motion(NamedTuple):
    ratio: NDArray[np.complex128]
    shift: NDArray[np.complex128]
    std: FloatArray  # (S, 3): scale, rotation, shift
    estimable: NDArray[np.bool_]


def _focus_order(n_frames: int, focus_dpt: Sequence[float] | FloatArray | None) -> list[int]:
    """Frame indices from far to near focus; as given when a focus setting is unknown."""
    if focus_dpt is None or not np.isfinite(np.asarray(focus_dpt, dtype=float)).all():
        return list(range(n_frames))
    return [int(i) for i in np.argsort(np.asarray(focus_dpt, dtype=float), kind="stable")]


def _working_image(frame: FloatArray, max_size: int) -> NDArray[np.float32]:
    """(h, w) mean colour, at most `max_size` long, in linear light.

    Linear, because defocus is symmetric only there: through a tone curve a blurred edge moves to its dark side.
    """
    height, width = frame.shape[:2]
    factor = min(1.0, max_size / max(height, width))
    small = np.asarray(frame, dtype=np.float32)
    if factor < 1:
        size = (max(1, round(width * factor)), max(1, round(height * factor)))
        small = cv2.resize(small, size, interpolation=cv2.INTER_AREA)
    return small.mean(axis=2) if small.ndim == 3 else small


def _pyramid(grey: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    """Smoothed halves, quarters, ... of a working image, finest first."""
    levels: list[NDArray[np.float32]] = []
    image = grey
    while not levels or min(image.shape) >= 2 * COARSEST_PX:
        size = (max(image.shape[1] // 2, 1), max(image.shape[0] // 2, 1))
        image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        levels.append(cv2.GaussianBlur(image, (0, 0), SMOOTHING_PX))
    return levels


def _noise_std(grey: NDArray[np.float32]) -> float:
    """Standard deviation of the pixel noise of a working image (Immerkaer 1996, with the median for robustness)."""
    mask = np.array([[1, -2, 1], [-2, 4, -2], [1, -2, 1]], dtype=np.float32)
    high_pass = cv2.filter2D(grey, cv2.CV_32F, mask)
    return float(np.median(np.abs(high_pass))) / 0.6745 / 6.0


def _centred(shape: tuple[int, ...]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    height, width = shape
    x = np.arange(width, dtype=np.float32) - np.float32((width - 1) / 2)
    y = np.arange(height, dtype=np.float32) - np.float32((height - 1) / 2)
    return np.broadcast_to(x, shape), np.broadcast_to(y[:, None], shape)


def _sample(image: NDArray[np.float32], x: NDArray[np.float32], y: NDArray[np.float32]) -> NDArray[np.float32]:
    """`image` at (x, y), free of any bias in position.

    OpenCV rounds positions to 1/32 px, and its cubic kernel displaces a ramp by up to 0.05 px: linear interpolation
    does not, and what it adds in blur is taken out with the rest of the difference in blur.
    """
    x_grid, y_grid = np.round(x * 32) / 32, np.round(y * 32) / 32
    gx, gy = _gradient(image)
    # The rounding is undone to first order.
    moved = [
        cv2.remap(layer, x_grid, y_grid, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE) for layer in (image, gx, gy)
    ]
    return moved[0] + moved[1] * (x - x_grid) + moved[2] * (y - y_grid)


def _warp(image: NDArray[np.float32], ratio: complex, shift: complex) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
    """`image` seen on the other frame's grid, and where that is inside the image."""
    height, width = image.shape
    x, y = _centred(image.shape)
    x_in = np.float32(ratio.real) * x - np.float32(ratio.imag) * y + np.float32(shift.real)
    y_in = np.float32(ratio.imag) * x + np.float32(ratio.real) * y + np.float32(shift.imag)
    warped = _sample(image, x_in + np.float32((width - 1) / 2), y_in + np.float32((height - 1) / 2))
    margin = 2 * SMOOTHING_PX
    inside = (np.abs(x_in) < width / 2 - margin) & (np.abs(y_in) < height / 2 - margin)
    inside &= (np.abs(x) < width / 2 - margin) & (np.abs(y) < height / 2 - margin)
    return warped, inside


def _gradient(image: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    kernel = np.array([[-0.5, 0.0, 0.5]], dtype=np.float32)
    return cv2.filter2D(image, cv2.CV_32F, kernel), cv2.filter2D(image, cv2.CV_32F, kernel.T)


def _detail(image: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """`image` without its local mean over `mask`: what is left of a difference when each place has its own offset."""
    size = (BACKGROUND_PX, BACKGROUND_PX)
    return image - cv2.blur(image * mask, size) / (cv2.blur(mask, size) + np.float32(1e-6))


def _equal_exposure(a: NDArray[np.float32], b: NDArray[np.float32], mask: NDArray[np.float32]) -> NDArray[np.float32]:
    """b at the exposure of a; defocus keeps the mean in linear light, so the means may be compared."""
    return b * np.float32((mask * a).sum() / max(float((mask * b).sum()), 1e-12))


def _equal_blur_difference(
    a: NDArray[np.float32], b: NDArray[np.float32], weight: NDArray[np.float32]
) -> NDArray[np.float32]:
    """b - a without what a difference in blur explains.

    Smoothed images that differ by a little defocus differ by half the difference of their variances times the
    Laplacian (the heat equation). That factor changes with depth, so it is fitted in a window around every pixel.
    """
    difference = b - a
    laplacian = cv2.Laplacian(a + b, cv2.CV_32F) / 2
    window = BLUR_WINDOW_PX
    fitted = cv2.GaussianBlur(weight * difference * laplacian, (0, 0), window)
    power = cv2.GaussianBlur(weight * laplacian * laplacian, (0, 0), window)
    floor = 0.05 * float(power.mean()) + 1e-20
    return difference - fitted / (power + floor) * laplacian


def _align_pair(
    a: int, b: int, pyramids: list[list[NDArray[np.float32]]], *, log_scale: float | None, rotation: bool
) -> _Pair:
    """Frame b relative to frame a: Gauss-Newton, coarse to fine, robust, symmetric in the two frames."""
    free = np.array([log_scale is None, rotation, True, True])
    ratio, shift = complex(np.exp(log_scale or 0.0)), 0j
    std, estimable = np.full(4, np.inf), False
    for level in reversed(range(len(pyramids[a]))):
        image_a, image_b = pyramids[a][level], pyramids[b][level]
        if level < len(pyramids[a]) - 1:
            shift *= image_a.shape[1] / pyramids[a][level + 1].shape[1]
        else:
            shift = _coarse_shift(image_a, image_b, ratio)
        for _ in range(MAX_ITERATIONS):
            step, std, correlation = _gauss_newton_step(image_a, image_b, ratio, shift, free)
            corner_step = np.hypot(*step[:2]) * np.hypot(*image_a.shape) / 2 + np.hypot(*step[2:])
            if not corner_step < max(image_a.shape):  # nothing in common to hold on to
                return _Pair(a, b, complex(np.exp(log_scale or 0.0)), 0j, np.full(4, np.inf), False)
            shift += ratio * complex(step[2], step[3])
            ratio *= np.exp(complex(step[0], step[1]))
            if corner_step < CONVERGED_PX:
                break
    corner_std = np.hypot(*std[:2]) * np.hypot(*pyramids[a][0].shape) / 2 + np.hypot(*std[2:])
    estimable = bool(2 * corner_std < ESTIMABLE_STD_PX and correlation > MIN_CORRELATION)
    return _Pair(a, b, ratio, shift, std, estimable)


def _coarse_shift(image_a: NDArray[np.float32], image_b: NDArray[np.float32], ratio: complex) -> complex:
    """Shift of b by phase correlation where that brings the frames closer than no shift, else 0."""
    if min(image_a.shape) < 2:  # too narrow to be transformed
        return 0j
    window = cv2.createHanningWindow(image_a.shape[::-1], cv2.CV_32F)
    warped, _ = _warp(image_b, ratio, 0j)
    (dx, dy), _ = cv2.phaseCorrelate(image_a - image_a.mean(), warped - warped.mean(), window)
    shift = ratio * complex(dx, dy)
    return max((shift, 0j), key=lambda candidate: _correlation(image_a, *_warp(image_b, ratio, candidate)))


def _correlation(a: NDArray[np.float32], b: NDArray[np.float32], inside: NDArray[np.bool_]) -> float:
    """Correlation coefficient of the detail of a and b over `inside`, -1 when too little is left of it."""
    if inside.mean() < 0.25:
        return -1.0
    mask = inside.astype(np.float32)
    a, b = _detail(a, mask)[inside], _detail(b, mask)[inside]
    return float(a @ b) / (float(np.sqrt((a @ a) * (b @ b))) + 1e-20)


def _gauss_newton_step(
    image_a: NDArray[np.float32], image_b: NDArray[np.float32], ratio: complex, shift: complex, free: NDArray[np.bool_]
) -> tuple[FloatArray, FloatArray, float]:
    """(step, std) of (log scale, rotation, dx, dy), and the frames' correlation, at the present `ratio` and `shift`."""
    warped, inside = _warp(image_b, ratio, shift)
    if inside.mean() < 0.25:
        return np.full(4, np.inf), np.full(4, np.inf), -1.0
    mask = inside.astype(np.float32)
    correlation = _correlation(image_a, warped, inside)
    warped = _equal_exposure(image_a, warped, mask)

    ax, ay, bx, by = (_detail(slope, mask) for slope in (*_gradient(image_a), *_gradient(warped)))
    residual = _detail(_equal_blur_difference(image_a, warped, mask), mask)
    energy = ((ax + bx) ** 2 + (ay + by) ** 2) * mask
    textured = energy > energy.mean()
    scale = 1.4826 * float(np.median(np.abs(residual[textured]))) if textured.any() else 0.0
    weight = mask / (1 + (residual / (3 * scale + 1e-20)) ** 2)  # Cauchy: what moves by itself has no say

    x, y = _centred(image_a.shape)
    names = np.flatnonzero(free)

    def columns(gx: NDArray[np.floating], gy: NDArray[np.floating]) -> NDArray[np.floating]:
        every = (lambda: x * gx + y * gy, lambda: x * gy - y * gx, lambda: gx, lambda: gy)
        return np.stack([every[k]().ravel() for k in names])

    jacobian = columns((ax + bx) / 2, (ay + by) / 2)
    weighted = jacobian * weight.ravel()
    normal = weighted @ jacobian.T
    step, std = np.zeros(4), np.zeros(4)
    try:
        step[names] = -np.linalg.solve(normal.astype(float), (weighted @ residual.ravel()).astype(float))
    except np.linalg.LinAlgError:
        return np.full(4, np.inf), np.full(4, np.inf), correlation

    # Information from gradients that both frames share: noise, independent in the two, averages out of it.
    shared = (columns(ax, ay) * weight.ravel()) @ columns(bx, by).T
    shared = (shared + shared.T) / 2
    if not np.isfinite(shared).all() or np.linalg.eigvalsh(shared)[0] <= 0:
        std[names] = np.inf
        return step, std, correlation
    # Smoothing correlates neighbouring residuals: 4 pi sigma^2 pixels count as one.
    variance = float((weight * residual**2).sum() / (weight.sum() + 1e-20)) * 4 * np.pi * SMOOTHING_PX**2
    std[names] = np.sqrt(variance * np.diag(np.linalg.inv(shared.astype(float))))
    return step, std, correlation


def _join_pairs(
    pairs: list[_Pair],
    order: list[int],
    reference: int,
    shape: tuple[int, ...],
    log_scales: FloatArray | None,
    rotation: bool,
) -> _Motion:
    """Every frame's motion relative to the reference, from all pairs at once.

    Robust linear least squares, twice: ratio_b = ratio_ab ratio_a is linear in log(ratio), and once the ratios are
    known shift_b = ratio_ab shift_a + shift_ab is linear in the shifts. A very weak wish for no motion between
    neighbours keeps frames that nothing determines in place.
    """
    n_frames = len(order)
    half_diagonal = float(np.hypot(shape[0], shape[1])) / 2
    good = [pair for pair in pairs if pair.estimable]
    a, b = (np.array([pair[k] for pair in good], dtype=int) for k in (0, 1))
    rest_a, rest_b = np.array(order[:-1]), np.array(order[1:])
    rows_a, rows_b = np.concatenate([a, rest_a]), np.concatenate([b, rest_b])
    ratio_ab = np.array([pair.ratio for pair in good] + [1.0] * len(rest_a), dtype=complex)
    shift_ab = np.array([pair.shift for pair in good] + [0.0] * len(rest_a), dtype=complex)
    std_ab = np.array([pair.std for pair in good]).reshape(-1, 4)
    weak = np.tile([0.1, 0.1, 0.1 * half_diagonal, 0.1 * half_diagonal], (len(rest_a), 1))
    std_ab = np.concatenate([std_ab, weak])
    floor = FLOOR_PX * np.array([1 / half_diagonal, 1 / half_diagonal, 1, 1])
    std_ab = np.hypot(std_ab, floor)

    ratio_std = np.hypot(std_ab[:, 0], std_ab[:, 1]) if rotation else std_ab[:, 0]
    log_ratio, log_std = _solve_graph(rows_a, rows_b, np.ones(len(rows_a)), np.log(ratio_ab), ratio_std, reference)
    if log_scales is not None:
        log_ratio = (log_scales - log_scales[reference]) + 1j * log_ratio.imag
    ratio = np.exp(log_ratio)
    shift_std = np.hypot(std_ab[:, 2], std_ab[:, 3]) / np.sqrt(2)
    shift, centre_std = _solve_graph(rows_a, rows_b, ratio[rows_b] / ratio[rows_a], shift_ab, shift_std, reference)
    estimable = _reached(good, reference, n_frames)
    std = np.stack([log_std * (log_scales is None), log_std * rotation, centre_std], axis=1)
    std[~estimable] = np.inf
    return _Motion(ratio, shift, std, estimable)


def _solve_graph(
    a: NDArray[np.int_],
    b: NDArray[np.int_],
    factor: NDArray[np.floating] | NDArray[np.complex128],
    measured: NDArray[np.complex128],
    std: FloatArray,
    reference: int,
) -> tuple[NDArray[np.complex128], FloatArray]:
    """(values, std) that best fulfil value_b - factor value_a = measured, with value 0 at the reference."""
    n_frames = int(max(a.max(), b.max())) + 1
    rows = np.zeros((len(a), n_frames), dtype=complex)
    rows[np.arange(len(a)), b] = 1
    rows[np.arange(len(a)), a] -= factor
    keep = np.arange(n_frames) != reference
    rows = rows[:, keep]
    weight = 1 / std**2
    values = np.zeros(n_frames, dtype=complex)
    for _ in range(20):
        normal = (rows.conj().T * weight) @ rows
        values[keep] = np.linalg.solve(normal, (rows.conj().T * weight) @ measured)
        error = np.abs(rows @ values[keep] - measured) / std
        weight = 1 / std**2 / (1 + (error / 3) ** 2)
    spread = np.zeros(n_frames)
    spread[keep] = np.sqrt(np.linalg.inv(normal).real.diagonal())
    return values, spread


def _reached(pairs: list[_Pair], reference: int, n_frames: int) -> NDArray[np.bool_]:
    """(S,) whether estimable pairs connect each frame with the reference; nothing does when there are none."""
    reached = np.zeros(n_frames, dtype=bool)
    reached[reference] = any(reference in (pair.a, pair.b) for pair in pairs)
    for _ in range(n_frames):
        for pair in pairs:
            reached[[pair.a, pair.b]] = reached[pair.a] or reached[pair.b]
    return reached


def _residuals(
    pairs: list[_Pair], motion: _Motion, pyramids: list[list[NDArray[np.float32]]], noise_stds: list[float]
) -> tuple[FloatArray, FloatArray]:
    """(residual in level pixels, share of blocks matched) of every frame, NaN where nothing can be compared.

    A frame is as far off as the weakest link of its best chain of pairs to the rest of the stack: so one foreign
    frame is named itself, and not its innocent neighbours.
    """
    n_frames = len(pyramids)
    link = np.full((n_frames, n_frames), np.inf)
    matched = np.full((n_frames, n_frames), np.nan)
    for pair in pairs:
        a, b = pair.a, pair.b
        ratio = motion.ratio[b] / motion.ratio[a]
        shift = motion.shift[b] - ratio * motion.shift[a]
        off, share = _local_motion(pyramids[a][0], pyramids[b][0], ratio, shift, max(noise_stds[a], noise_stds[b]))
        if not np.isnan(off):
            link[a, b] = link[b, a] = off
            matched[a, b] = matched[b, a] = share
    chain = link.copy()
    np.fill_diagonal(chain, 0.0)
    for k in range(n_frames):  # Floyd-Warshall with the weakest link for the length
        chain = np.minimum(chain, np.maximum(chain[:, k, None], chain[None, k]))
    main = int(np.argmin(np.where(np.isfinite(chain), chain, 1e3).sum(axis=1)))
    comparable = np.isfinite(link).any(axis=1)
    residual = np.where(comparable, chain[main], np.nan)
    best = np.argmin(link, axis=1)
    residual[main] = link[main].min() if comparable[main] else np.nan
    return np.where(np.isfinite(residual), residual, np.nan), matched[np.arange(n_frames), best]


def _block_mean(image: NDArray[np.floating]) -> NDArray[np.floating]:
    """Mean over blocks of about BLOCK_PX that fill the image evenly."""
    blocks = (max(round(image.shape[1] / BLOCK_PX), 1), max(round(image.shape[0] / BLOCK_PX), 1))
    return cv2.resize(image, blocks, interpolation=cv2.INTER_AREA)


def _weaker_direction(gx: NDArray[np.float32], gy: NDArray[np.float32]) -> NDArray[np.floating]:
    """Smaller eigenvalue of every block's structure tensor: gradient energy along the direction that has less."""
    xx, xy, yy = _block_mean(gx * gx), _block_mean(gx * gy), _block_mean(gy * gy)
    return (xx + yy) / 2 - np.sqrt(((xx - yy) / 2) ** 2 + xy**2)


def _local_motion(
    image_a: NDArray[np.float32], image_b: NDArray[np.float32], ratio: complex, shift: complex, noise_std: float
) -> tuple[float, float]:
    """(median displacement over textured blocks, share of them found again) between two aligned frames.

    A block that is not found again within SEARCH_PX counts as SEARCH_PX off. NaN, NaN if fewer than MIN_BLOCKS are
    textured in both frames.
    """
    warped, inside = _warp(image_b, ratio, shift)
    mask = inside.astype(np.float32)
    warped = _equal_exposure(image_a, warped, mask)
    ax, ay = _gradient(image_a)
    whole = _block_mean(mask) > 0.95
    # Gradient energy that white pixel noise leaves after halving and smoothing, per axis.
    noise_energy = noise_std**2 / 4 / (8 * np.pi * SMOOTHING_PX**4)
    texture = np.minimum(_weaker_direction(ax, ay), _weaker_direction(*_gradient(warped)))
    textured = whole & (texture > 10 * noise_energy) & (texture > 0.05 * np.quantile(texture, 0.9))
    if textured.sum() < MIN_BLOCKS:
        return np.nan, np.nan

    moved = warped
    dx = np.zeros(texture.shape)
    dy = np.zeros(texture.shape)
    for _ in range(5):
        residual = _detail(_equal_blur_difference(image_a, moved, mask), mask)
        bx, by = _gradient(moved)
        gx, gy = (ax + bx) / 2, (ay + by) / 2
        xx, xy, yy = _block_mean(gx * gx), _block_mean(gx * gy), _block_mean(gy * gy)
        xr, yr = _block_mean(gx * residual), _block_mean(gy * residual)
        determinant = xx * yy - xy**2 + 1e-20
        dx = np.clip(dx - (yy * xr - xy * yr) / determinant, -2 * SEARCH_PX, 2 * SEARCH_PX)
        dy = np.clip(dy - (xx * yr - xy * xr) / determinant, -2 * SEARCH_PX, 2 * SEARCH_PX)
        x, y = _centred(image_a.shape)
        to_pixels = image_a.shape[::-1]
        x_map = x + (image_a.shape[1] - 1) / 2 + cv2.resize(dx, to_pixels, interpolation=cv2.INTER_NEAREST)
        y_map = y + (image_a.shape[0] - 1) / 2 + cv2.resize(dy, to_pixels, interpolation=cv2.INTER_NEAREST)
        moved = _sample(warped, x_map.astype(np.float32), y_map.astype(np.float32))
    detail_a, detail_b = _detail(image_a, mask), _detail(moved, mask)
    similarity = _block_mean(detail_a * detail_b) / (
        np.sqrt(_block_mean(detail_a**2) * _block_mean(detail_b**2)) + 1e-20
    )
    distance = np.hypot(dx, dy)
    found = (similarity > MIN_BLOCK_CORRELATION) & (distance < SEARCH_PX)
    distance = np.where(found, distance, SEARCH_PX)
    return float(np.median(distance[textured])), float(found[textured].mean())
