"""Sweeps of the board to a lens profile: find, measure, fit, measure again with the right floor, fit again."""

from __future__ import annotations

import datetime
import itertools
import logging
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from calibration.board import Board
from calibration.breathing import BreathingCurve, fit_breathing
from calibration.edges import CalibrationError, Found, PatchBlur, Ramp, Sweep, locate, measure, pose_of
from calibration.fit import FLOOR_TO_SIGMA, Fit, LeftOut, Observations, fit_blur, leave_one_out
from calibration.intrinsics import NOMINAL_RATIO, camera_matrix, check_intrinsics, estimate_intrinsics
from capture.errors import DataError, UsageError
from capture.lens import Breathing, FocusTable, Intrinsics, Lens, LensProfile, Measured, SourceStack, same_setting
from capture.stack import FocalStack, file_sha256

logger = logging.getLogger(__name__)

LEAST_FRAMES = 4  # of a sweep of the board
MAX_PIXELS = 1_600_000  # calibration works on a binned image: finer sampling adds nothing to blur of many pixels
STRIP_ROWS = 240
MAX_LEVEL_CHANGE = 0.05
MAX_SATURATED = 0.01
MAX_TONE = 0.1  # a gamma of 1.2 bows by 0.22, sRGB taken for linear by 0.73
MAX_HALO = 0.08  # an unsharp mask of radius 1 px and amount 0.5 leaves 0.17; demosaicing is negative
CLEAR_BLUR_PX = 4.0
FLOOR_ROUNDS, FLOOR_SETTLED_PX = 3, 0.03
MAX_FLOOR_SIGMA_PX, MIN_SIDE_PX = 1.2, 300
TABLE_POSITIONS = 25
UNMEASURED_SQUARE_RATIO = 5e-3  # usual error of a print that nobody measured
MEASURED_SQUARE_RATIO = 5e-4

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class BoardStack:
    """One stack of a board, binned to working size, with what the calibration needs of its header."""

    sweep: Sweep
    path: Path
    sha256: str
    unit: Literal["step", "dioptre"]
    binning: int
    full_size: tuple[int, int]  # (H, W)
    lens: Lens | None
    f_number: float  # NaN unknown
    camera: str
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class Pose:
    """Where the board stood in one sweep."""

    rotation: FloatArray
    translation_m: FloatArray

    def depths_m(self, board: Board) -> FloatArray:
        """(N,) axial distance of the corners."""
        return np.asarray((board.corners_m() @ self.rotation.T + self.translation_m)[:, 2])

    def slope_dpt(self) -> FloatArray:
        """Inverse depth gained per unit of x / z and of y / z, which is the same everywhere on a plane."""
        normal = self.rotation[:, 2]
        return np.asarray(normal[:2] / (normal @ self.translation_m))

    @property
    def tilt_deg(self) -> float:
        """Angle between the board's normal and the viewing axis."""
        return float(np.rad2deg(np.arccos(np.clip(abs(self.rotation[2, 2]), 0.0, 1.0))))


@dataclass(frozen=True)
class Calibration:
    """A lens profile and the evidence for it."""

    profile: LensProfile
    stacks: list[BoardStack]
    poses: list[Pose]
    seen: Observations
    fit: Fit
    left_out: list[LeftOut | None]  # per sweep; None where the others do not determine a fit
    curve: BreathingCurve
    floor_sigma_px: float
    floor_before_px: float  # the floor sigma of the round before: how far the estimate still moved
    sentences: list[str]  # the verdict, in words
    bins: int


def load_board_stack(path: Path, board: Board | None = None, *, max_pixels: int = MAX_PIXELS) -> BoardStack:
    """The stack in `path`, its green channel binned to at most `max_pixels`, ordered by focus position.

    Green alone, because lenses focus colours at different distances.

    Raises:
        CalibrationError: exposure changed between frames, or the board is overexposed.
        UsageError: nothing says which board it shows.
    """
    with FocalStack.open(path) as stack:
        if board is None:
            if stack.board is None:
                raise UsageError(
                    f"{path} does not say which board it shows; give its description with --board board.yaml"
                )
            try:
                board = Board.model_validate(stack.board)
            except ValidationError as error:
                first = error.errors()[0]
                raise DataError(f"{path}: board description: {first['loc']}: {first['msg']}") from None
        positions, unit, warnings = _positions(stack)
        binning = int(np.ceil(np.sqrt(stack.height * stack.width / max_pixels)))
        height, width = stack.height // binning, stack.width // binning
        images = np.empty((stack.n_frames, height, width), np.float32)
        saturated = np.zeros(stack.n_frames)
        rows_per_strip = max(STRIP_ROWS // binning, 1) * binning
        for i in range(stack.n_frames):
            for start in range(0, height * binning, rows_per_strip):
                rows = slice(start, min(start + rows_per_strip, height * binning))
                green = stack.linear(i, rows, slice(0, width * binning))[..., 1]
                saturated[i] += float((green > 0.995).mean()) * len(green) / (height * binning)
                images[i, start // binning : rows.stop // binning] = green.reshape(
                    len(green) // binning, binning, width, binning
                ).mean(axis=(1, 3))
        order = np.argsort(positions, kind="stable")
        if saturated.max() > MAX_SATURATED:
            raise CalibrationError(
                "SATURATED",
                f"{path}: {100 * saturated.max():.0f} % of frame {int(np.argmax(saturated))} is overexposed, which "
                "hides "
                "blur; expose so that the white of the board stays below the maximum",
            )
        level = images.mean(axis=(1, 2))
        change = np.abs(level / np.median(level) - 1.0)
        if change.max() > MAX_LEVEL_CHANGE:
            raise CalibrationError(
                "EXPOSURE_CHANGED",
                f"{path}: frame {int(np.argmax(change))} is {100 * change.max():.0f} % brighter or darker than the "
                "others; "
                "lock exposure, aperture and the light, and sweep again",
            )
        names = (stack.camera.get("make", ""), stack.camera.get("model", ""), stack.camera.get("serial_number", ""))
        return BoardStack(
            sweep=Sweep(path.name, images[order], positions[order], board),
            path=path,
            sha256=file_sha256(path),
            unit=unit,
            binning=binning,
            full_size=(stack.height, stack.width),
            lens=stack.lens,
            f_number=stack.working_f_number,
            camera=" ".join(str(name) for name in names if name),
            warnings=warnings,
        )


def calibrate(
    stacks: Sequence[BoardStack],
    *,
    focal_px: Measured | None = None,
    intrinsics: Intrinsics | None = None,
    lens_name: str = "",
    temperature_c: float | None = None,
) -> Calibration:
    """Fit one lens profile to sweeps of the board.

    Args:
        stacks: from `load_board_stack`; all of one camera, lens, zoom and aperture.
        focal_px: pinhole focal length in full-size pixels at mid focus, if known from elsewhere.
        intrinsics: all of the pinhole camera at mid focus and full size, if known; the boards then only check it.

    Raises:
        CalibrationError: what is missing, in one sentence, with a code of notes/calibration.md 5.4.
        DataError: the stacks do not belong together.
    """
    first = stacks[0]
    for stack in stacks:
        if len(stack.sweep.positions) < LEAST_FRAMES:
            raise CalibrationError(
                "TOO_FEW_FRAMES",
                f"{stack.path} has {len(stack.sweep.positions)} frames; a sweep of the board needs {LEAST_FRAMES}",
            )
    for stack in stacks[1:]:
        for name, here, there in (
            ("image size", stack.full_size, first.full_size),
            ("unit of the focus positions", stack.unit, first.unit),
            ("camera", stack.camera, first.camera),
        ):
            if here != there:
                raise DataError(
                    f"{stack.path} and {first.path} differ in {name} ({here} and {there}); calibrate them apart"
                )
    _check_apertures(stacks)
    for one, other in itertools.combinations(stacks, 2):
        # a packed copy has another sha256
        if one.sha256 == other.sha256 or np.array_equal(one.sweep.images, other.sweep.images):
            raise DataError(f"{one.path} and {other.path} are the same sweep, which says nothing new; give it once")
    names = [stack.sweep.name for stack in stacks]
    shape = (int(first.sweep.images.shape[1]), int(first.sweep.images.shape[2]))
    nothing = camera_matrix(_guess(shape))
    with ThreadPoolExecutor(max_workers=2) as pool:
        found = list(pool.map(lambda stack: locate(stack.sweep), stacks))
        _check_sharp_range(stacks, found)
        blurs = list(pool.map(lambda pair: measure(pair[0].sweep, pair[1], nothing), zip(stacks, found, strict=True)))
        _check_dropped(stacks, blurs)
        _check_linear(stacks, blurs)
        curve = _curve(stacks, blurs, names, shape)
        given = _given_focal(stacks, focal_px, first.binning)
        views = _reference_views(stacks, found, blurs, curve, shape)
        if intrinsics is None:
            pinhole, pinhole_sentence = estimate_intrinsics(*views, shape, given=given)
        else:
            pinhole = intrinsics.rescaled(1 / first.binning)
            missed_px = check_intrinsics(pinhole, *views, names)
            pinhole_sentence = (
                f"focal length, centre and distortion from {pinhole.focal_length_px.source}, taken to hold at mid "
                f"focus; the boards agree with them within {missed_px:.2f} px"
            )
        sigma, before = 0.0, 0.0
        seen, poses, fit = _observe_and_fit(stacks, found, blurs, curve, pinhole, sigma)
        soft = np.sqrt(max(fit.floor2_px2, 0.0)) * FLOOR_TO_SIGMA > MAX_FLOOR_SIGMA_PX
        if soft and min(shape) >= 2 * MIN_SIDE_PX:  # sampled finer than the lens resolves: the floor would rule the fit
            return calibrate(
                [_halved(stack) for stack in stacks],
                focal_px=focal_px,
                intrinsics=intrinsics,
                lens_name=lens_name,
                temperature_c=temperature_c,
            )
        for _ in range(FLOOR_ROUNDS):
            before, sigma = sigma, float(np.sqrt(max(sigma**2 + fit.floor2_px2 * FLOOR_TO_SIGMA**2, 0.0)))
            bend = camera_matrix(pinhole)

            ramps = [_ramp(stack.sweep, pose, fit) for stack, pose in zip(stacks, poses, strict=True)]

            def again(
                known: tuple[BoardStack, Found, PatchBlur, Ramp], sigma: float = sigma, bend: FloatArray = bend
            ) -> PatchBlur:
                stack, where, blur, ramp = known
                return measure(
                    stack.sweep, where, bend, pinhole.distortion, floor_sigma_px=sigma, previous=blur, ramp=ramp
                )

            blurs = list(pool.map(again, zip(stacks, found, blurs, ramps, strict=True)))
            curve = _curve(stacks, blurs, names, shape)
            seen, poses, fit = _observe_and_fit(stacks, found, blurs, curve, pinhole, sigma)
            if abs(sigma - before) < FLOOR_SETTLED_PX:
                break
    _check_sharpened(stacks, blurs)
    left_out = leave_one_out(seen, fit)
    profile, sentences = _profile(stacks, poses, fit, left_out, curve, pinhole, sigma, shape)
    f_numbers = [stack.f_number for stack in stacks if not math.isnan(stack.f_number)]
    f_number = float(np.median(f_numbers)) if f_numbers else None
    profile = profile.model_copy(update={"lens": lens_name, "f_number": f_number, "temperature_c": temperature_c})
    return Calibration(
        profile=profile,
        stacks=list(stacks),
        poses=poses,
        seen=seen,
        fit=fit,
        left_out=left_out,
        curve=curve,
        floor_sigma_px=sigma,
        floor_before_px=before,
        sentences=[pinhole_sentence + ".", *sentences],
        bins=first.binning,
    )


def _halved(stack: BoardStack) -> BoardStack:
    """`stack` binned once more, 2 x 2."""
    images = stack.sweep.images
    height, width = images.shape[1] // 2, images.shape[2] // 2
    binned = images[:, : 2 * height, : 2 * width].reshape(len(images), height, 2, width, 2).mean(axis=(2, 4))
    return replace(stack, sweep=replace(stack.sweep, images=binned), binning=2 * stack.binning)


def board_with_ruler(board: Board, ruler_mm: float, nominal_mm: float) -> Board:
    """The board as printed, when its ruler of `nominal_mm` measures `ruler_mm`."""
    if not 0.8 < ruler_mm / nominal_mm < 1.25:
        raise UsageError(
            f"--ruler-mm {ruler_mm:g}: the printed ruler should be near {nominal_mm:g} mm; give its length in mm"
        )
    return board.model_copy(update={"square_m": board.square_m * ruler_mm / nominal_mm, "measured": True})


def observe(
    stacks: Sequence[BoardStack],
    found: Sequence[Found],
    blurs: Sequence[PatchBlur],
    curve: BreathingCurve,
    intrinsics: Intrinsics,
) -> tuple[Observations, list[Pose]]:
    """Blur measurements of all sweeps with the depth of every patch, and the boards' poses."""
    parts, poses = [], []
    for k, (stack, where, blur) in enumerate(zip(stacks, found, blurs, strict=True)):
        sweep = stack.sweep
        height, width = sweep.images.shape[1:]
        center = np.array([(width - 1) / 2, (height - 1) / 2])
        camera = camera_matrix(intrinsics, float(curve.scale(sweep.positions[where.reference])))
        camera[:2, 2] += curve.shift_px(sweep.positions[where.reference])
        pose = Pose(*pose_of(sweep, blur, where.reference, camera, intrinsics.distortion))
        poses.append(pose)
        position = sweep.positions[blur.frame]
        parts.append(
            Observations(
                sweep=np.full(len(blur.frame), k),
                frame=blur.frame,
                position=position,
                inverse_depth_dpt=1.0 / pose.depths_m(sweep.board)[blur.corner],
                focal_px=intrinsics.focal_length_px.value * curve.scale(position),
                coc2_px2=blur.coc2_px2,
                std_px2=blur.std_px2,
                radius2=np.sum((blur.corner_px - center) ** 2, axis=1) / float(center @ center),
            )
        )
    joined = {name: np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])}
    return Observations(**joined), poses


def _observe_and_fit(
    stacks: Sequence[BoardStack],
    found: Sequence[Found],
    blurs: Sequence[PatchBlur],
    curve: BreathingCurve,
    intrinsics: Intrinsics,
    floor_sigma_px: float,
) -> tuple[Observations, list[Pose], Fit]:
    seen, poses = observe(stacks, found, blurs, curve, intrinsics)
    return seen, poses, fit_blur(seen, floor_sigma_px, [stack.sweep.name for stack in stacks])


def _ramp(sweep: Sweep, pose: Pose, fit: Fit) -> Ramp:
    """How `fit` has blur change over the image of the board at `pose`: c = A F (phi - D), and D F is affine in px."""
    defocus = fit.law(sweep.positions)[:, None] - 1.0 / pose.depths_m(sweep.board)
    return Ramp(np.sign(defocus), -fit.pupil_m * pose.slope_dpt())


def _positions(stack: FocalStack) -> tuple[FloatArray, Literal["step", "dioptre"], tuple[str, ...]]:
    """Focus positions of the frames, their unit, and what is doubtful about them."""
    for values in (stack.focus_position, stack.focus_command):
        if np.isfinite(values).all():
            if stack.focus_unit == "m":
                return 1.0 / values, "dioptre", ()
            return values.astype(np.float64), "dioptre" if stack.focus_unit == "dioptre" else "step", ()
    if np.isfinite(stack.focus_dpt).all():
        return stack.focus_dpt.astype(np.float64), "dioptre", ()
    return (
        np.arange(stack.n_frames, dtype=np.float64),
        "step",
        (f"{stack.path.name} does not say where the focus was, so frame numbers stand for positions",),
    )


def _guess(shape: tuple[int, int]) -> Intrinsics:
    none = Measured(value=0.0, std=0.0, source="assumed")
    return Intrinsics(
        focal_length_px=Measured(value=1.2 * shape[1], std=0.0, source="assumed"), center_x_px=none, center_y_px=none
    )


def _check_sharp_range(stacks: Sequence[BoardStack], found: Sequence[Found]) -> None:
    """`TOO_SHARP` when every frame of every sweep shows the whole board: nothing was out of focus."""
    for stack, where in zip(stacks, found, strict=True):
        smooth = [cv2.GaussianBlur(image, (0, 0), 2.0) for image in stack.sweep.images]  # noise is sharp in every frame
        energy = np.array([np.var(cv2.Laplacian(image, cv2.CV_32F)) for image in smooth])
        counts = [len(view.ids) for view in where.views]
        if energy.min() < 0.7 * energy.max() or min(counts) < 0.8 * max(counts):
            return
    raise CalibrationError(
        "TOO_SHARP",
        "the board is equally sharp in every frame, so all its distances lie within the depth of field; open the "
        "aperture, "
        "sweep farther, or come closer",
    )


def _check_apertures(stacks: Sequence[BoardStack]) -> None:
    """DataError if the headers tell of different apertures or focal lengths."""
    for name, told in (
        ("f-number", [stack.f_number for stack in stacks]),
        ("focal length", [stack.lens.focal_length_m if stack.lens else math.nan for stack in stacks]),
    ):
        known = [(value, stack.path) for value, stack in zip(told, stacks, strict=True) if not math.isnan(value)]
        (low, one), (high, other) = min(known, default=(1.0, "")), max(known, default=(1.0, ""))
        if not same_setting(low, high):
            raise DataError(f"{one} and {other} differ in {name} ({low:g} and {high:g}); calibrate them apart")


def _check_dropped(stacks: Sequence[BoardStack], blurs: Sequence[PatchBlur]) -> None:
    """`BLUR_TOO_LARGE` when so much is blurred beyond the size of a square that little is left."""
    lost = [
        sum(g is None for g in blur.geometry) / len(blur.geometry)
        + blur.n_dropped / max(blur.n_dropped + len(blur.frame), 1)
        for blur in blurs
    ]
    worst = int(np.argmax(lost))
    usable = len(stacks[worst].sweep.positions) - sum(g is None for g in blurs[worst].geometry)
    if usable < LEAST_FRAMES:
        raise CalibrationError(
            "BLUR_TOO_LARGE",
            f"{stacks[worst].sweep.name}: only {usable} of {len(blurs[worst].geometry)} frames show the board with "
            "blur below "
            "the size of its squares; print larger squares, move closer to focus, or sweep in finer steps",
        )


def _check_linear(stacks: Sequence[BoardStack], blurs: Sequence[PatchBlur]) -> None:
    """`NOT_LINEAR` when mid tones are too bright or too dark for the board's black and white."""
    for stack, blur in zip(stacks, blurs, strict=True):
        tone = _median_where_blurred(blur, blur.tone)
        if abs(tone) > MAX_TONE:
            compared = "brighter" if tone < 0 else "darker"
            raise CalibrationError(
                "NOT_LINEAR",
                f"{stack.path}: mid tones are {compared} than a blurred board has them (bow {tone:+.2f}, limit "
                f"{MAX_TONE:g}), so the values are not the linear light that the stack declares; "
                "capture RAW, or correct `transfer` in stack.yaml and import again",
            )


def _check_sharpened(stacks: Sequence[BoardStack], blurs: Sequence[PatchBlur]) -> None:
    """`SHARPENED` when edges have bright rims that no blur leaves."""
    for stack, blur in zip(stacks, blurs, strict=True):
        halo = _median_where_blurred(blur, blur.halo)
        if halo > MAX_HALO:
            raise CalibrationError(
                "SHARPENED",
                f"{stack.path}: edges have rims as sharpening by {halo:.2f} draws them (limit {MAX_HALO:g}), which "
                "hides blur; switch sharpening, clarity and noise reduction off in the camera, or capture RAW",
            )


def _median_where_blurred(blur: PatchBlur, values: FloatArray) -> float:
    blurred = blur.coc2_px2 > CLEAR_BLUR_PX**2
    return float(np.median(values[blurred])) if blurred.any() else 0.0


def _curve(
    stacks: Sequence[BoardStack], blurs: Sequence[PatchBlur], names: Sequence[str], shape: tuple[int, int]
) -> BreathingCurve:
    center = np.array([(shape[1] - 1) / 2, (shape[0] - 1) / 2])
    arms = [float(np.sqrt(np.mean(np.sum((blur.corner_px - center) ** 2, axis=1)))) for blur in blurs]
    positions = [stack.sweep.positions for stack in stacks]
    coc = [
        np.array(
            [
                np.sqrt(max(float(np.median(b.coc2_px2[b.frame == i])), 0.0)) if g else 0.0
                for i, g in enumerate(b.geometry)
            ]
        )
        for b in blurs
    ]
    return fit_breathing(positions, [blur.geometry for blur in blurs], names, arms, coc)


def _given_focal(stacks: Sequence[BoardStack], focal_px: Measured | None, binning: int) -> Measured | None:
    """Focal length in binned pixels from the user or, less surely, from the stacks' lens data."""
    if focal_px is not None:
        return focal_px.model_copy(update={"value": focal_px.value / binning, "std": focal_px.std / binning})
    lens = stacks[0].lens
    if lens is None:
        return None
    value = lens.focal_length_m / lens.pixel_pitch_m / binning
    return Measured(value=value, std=NOMINAL_RATIO * value, source="lens data")


def _reference_views(
    stacks: Sequence[BoardStack],
    found: Sequence[Found],
    blurs: Sequence[PatchBlur],
    curve: BreathingCurve,
    shape: tuple[int, int],
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Corners of every sweep moved to the curve's reference position and averaged over frames: (metres, pixels)."""
    center = np.array([(shape[1] - 1) / 2, (shape[0] - 1) / 2])
    points_m, points_px = [], []
    for stack, where, blur in zip(stacks, found, blurs, strict=True):
        home = blur.geometry[where.reference]
        assert home is not None  # the sharpest frame was fitted first
        corners_m = stack.sweep.board.corners_m()
        total, count = np.zeros((len(corners_m), 2)), np.zeros(len(corners_m))
        for frame, geometry in enumerate(blur.geometry):
            here = blur.frame == frame
            if geometry is None or not here.any():
                continue
            relative = blur.corner_px[here] - center - np.array([geometry.shift_x_px, geometry.shift_y_px])
            weight = 1.0 / (1.0 + np.median(np.maximum(blur.coc2_px2[here], 0.0)))
            np.add.at(total, blur.corner[here], weight * relative / geometry.scale)
            np.add.at(count, blur.corner[here], weight)
        seen = count > 0
        at = stack.sweep.positions[where.reference]
        in_reference = total[seen] / count[seen, None]  # of the sharpest frame, from the centre
        points_px.append((in_reference - curve.shift_px(at)) / float(curve.scale(at)) + center)
        points_m.append(corners_m[seen])
    return points_m, points_px


def _profile(
    stacks: Sequence[BoardStack],
    poses: Sequence[Pose],
    fit: Fit,
    left_out: Sequence[LeftOut | None],
    curve: BreathingCurve,
    intrinsics: Intrinsics,
    floor_sigma_px: float,
    shape: tuple[int, int],
) -> tuple[LensProfile, list[str]]:
    """The profile at full image size, and what is to be said about it."""
    first = stacks[0]
    board = first.sweep.board
    positions = np.linspace(fit.law.low, fit.law.high, TABLE_POSITIONS)
    square_ratio = MEASURED_SQUARE_RATIO if board.measured else UNMEASURED_SQUARE_RATIO
    focal = intrinsics.focal_length_px
    scale_std = float(np.hypot(square_ratio, focal.std / focal.value))
    warnings = [warning for stack in stacks for warning in stack.warnings]
    sentences = []
    span = abs(float(np.ptp(fit.law(positions))))
    focus_std = fit.focus_std_dpt(positions)
    sentences.append(
        f"Aperture {fit.pupil_m * 1e3:.2f} +- {1.96 * fit.pupil_std_m * 1e3:.2f} mm (95 %), focus "
        f"{min(fit.law(positions)):.3f} to {max(fit.law(positions)):.3f} dpt, known to +- "
        f"{1.96 * np.median(focus_std):.4f} "
        f"dpt ({100 * np.median(focus_std) / span:.2f} % of the range)."
    )
    sentences.append(f"The motor comes back to a position within {fit.tau_dpt:.4f} dpt (one sigma).")
    if not board.measured:
        warnings.append("SCALE_UNCHECKED: nobody measured the print; all distances share its error (0.5 % assumed)")
    if focal.std > 0.01 * focal.value:
        warnings.append(
            f"FOCAL_LENGTH_POOR: the focal length in pixels is known to {100 * focal.std / focal.value:.1f} % only, "
            "and so are "
            "all distances; add a sweep of a board tilted by 45 degrees"
        )
    if fit.pupil_std_m > 0.01 * fit.pupil_m:
        warnings.append(
            f"APERTURE_POOR: the blur gain is known to {100 * fit.pupil_std_m / fit.pupil_m:.1f} % only; add a distance"
        )
    for group in fit.outlier_frames:
        warnings.append(
            f"OUTLIER: {stacks[group[0]].sweep.name} frame {group[1]} was focused {fit.frame_error_dpt[group]:+.3f} "
            "dpt from "
            "where its position says, and counts little"
        )
    told = [(stack, left) for stack, left in zip(stacks, left_out, strict=True) if left is not None]
    if told:
        worst = max(told, key=lambda pair: abs(pair[1].shift_dpt) / pair[1].expected_dpt)[1]
        sentences.append(
            f"Leaving each sweep out in turn, the others predict its focus within {abs(worst.shift_dpt):.4f} dpt "
            f"(expected {1.96 * worst.expected_dpt:.4f}, 95 %)"
            + (f"; {len(stacks) - len(told)} cannot be checked in this way." if len(told) < len(stacks) else ".")
        )
    for stack, left in told:
        if not left.agrees:
            warnings.append(
                f"SWEEP_DISAGREES: {stack.sweep.name} focuses {left.shift_dpt:+.4f} dpt from where the other sweeps "
                f"have it ({left.expected_dpt:.4f} would be one standard error): the lens, its zoom or the motor's "
                "home changed between sweeps, or the board bends"
            )
    share = float(np.mean(np.abs(fit.residual) > 5.0))
    if share > 0.02:
        warnings.append(
            f"OUTLIER_PATCHES: {100 * share:.0f} % of the patches fit badly; look at the report's residuals"
        )
    near_far, near_far_std = fit.extra["near_far"]
    if abs(near_far) > max(0.05, 3 * near_far_std):
        warnings.append(
            f"NEAR_FAR_ASYMMETRY: blur in front of focus grows {100 * near_far:+.0f} % against blur behind it "
            "(spherical "
            "aberration); depth in front of focus will be off by as much"
        )
    curvature, curvature_std = fit.extra["curvature"]
    if abs(curvature) > max(0.01 * span, 3 * curvature_std):
        warnings.append(f"FIELD_CURVATURE: focus in the corners differs by {curvature:+.3f} dpt from the centre")
    radial, radial_std = fit.extra["radial"]
    if abs(radial) > max(0.05, 3 * radial_std):
        warnings.append(f"RADIAL_BLUR: blur in the corners is {100 * radial:+.0f} % of that in the centre (vignetting)")
    slope, slope_std = fit.extra["pupil_slope"]
    if abs(slope) * span > max(0.02, 3 * slope_std * span):
        warnings.append(
            f"PUPIL_CHANGES: the pupil changes by {100 * slope:+.1f} % per dioptre of focus (internal focusing)"
        )
    if first.lens is not None:
        nominal = first.lens.aperture_m
        if abs(fit.pupil_m / nominal - 1) > 0.15:
            warnings.append(
                f"IMPLAUSIBLE_APERTURE: {fit.pupil_m * 1e3:.1f} mm where f / N is {nominal * 1e3:.1f} mm; check the "
                "square size, "
                "the f-number, and that the lens was stopped down while capturing"
            )
    grade: Literal["metric"] = "metric"
    source = f"fit to {len(stacks)} sweep{'s' if len(stacks) > 1 else ''}"
    breathing_shift = curve.shift_px(positions)
    profile = LensProfile(
        grade=grade,
        width_px=shape[1],
        height_px=shape[0],
        pixel_pitch_m=first.lens.pixel_pitch_m * first.binning if first.lens else None,
        pupil_diameter_m=Measured(value=fit.pupil_m, std=fit.pupil_std_m, source=source),
        focus=FocusTable(
            unit=first.unit,
            positions=tuple(map(float, positions)),
            focus_dpt=tuple(map(float, fit.law(positions))),
            std_dpt=tuple(map(float, focus_std)),
            repeatability_dpt=fit.tau_dpt,
            source=source,
        ),
        breathing=Breathing(
            reference_position=curve.reference,
            scale=tuple(map(float, curve.scale(positions))),
            scale_std=tuple(map(float, curve.scale_std(positions))),
            shift_x_px=tuple(map(float, breathing_shift[:, 0])),
            shift_y_px=tuple(map(float, breathing_shift[:, 1])),
            source=source,
        ),
        intrinsics=intrinsics,
        floor_sigma_px=Measured(
            value=floor_sigma_px,
            std=float(0.5 * fit.floor2_std_px2 * FLOOR_TO_SIGMA**2 / max(floor_sigma_px, 0.1)),
            source=source,
        ),
        near_far_ratio=Measured(value=1 + near_far, std=near_far_std, source="diagnosis, not used"),
        field_curvature_dpt=Measured(value=curvature, std=curvature_std, source="diagnosis, not used"),
        distance_scale_std=scale_std,
        camera=first.camera,
        board=board.model_dump(),
        sources=tuple(
            SourceStack(
                file=stack.path.name,
                sha256=stack.sha256,
                n_frames=len(stack.sweep.positions),
                distance_m=float(pose.depths_m(stack.sweep.board).mean()),
                tilt_deg=pose.tilt_deg,
                left_out_shift_dpt=left.shift_dpt if left else None,
                left_out_expected_dpt=left.expected_dpt if left else None,
            )
            for stack, pose, left in zip(stacks, poses, left_out, strict=True)
        ),
        created=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        software=_software(),
        warnings=tuple(warnings),
    )
    full = profile.rescaled(first.binning).model_copy(
        update={"width_px": first.full_size[1], "height_px": first.full_size[0]}
    )
    return full, sentences


def _software() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        daif = version("daif")
    except PackageNotFoundError:
        daif = "unknown"
    return f"daif {daif}, opencv {cv2.__version__}"
