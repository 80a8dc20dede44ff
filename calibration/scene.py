"""Calibration without a target: focus positions and blur gain from ordinary, textured stacks, as far as blur tells.

In every textured patch the sharpest frame is blurred until it looks like each other frame; the variances that this
takes follow v_j - v_r = G^2 ((phi_j - q)^2 - (phi_r - q)^2) with the patch's own inverse depth q. From blur alone
phi -> a phi + b, q -> a q + b, G -> G / a is invisible (design section 2): a rough profile pins these two directions
with its own errors, and without one the axis runs from 0 (first frame) to 1 (last frame) and the grade is `relative`.
"""

from __future__ import annotations

import datetime
import html
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from calibration.edges import CalibrationError, Patch
from calibration.report import Series, plot
from capture.alignment import Alignment, align_stack
from capture.errors import UsageError
from capture.lens import Breathing, FocusTable, Intrinsics, LensProfile, Measured, same_setting
from capture.stack import FocalStack, file_sha256

MAX_PIXELS = 400_000
TILE_PX = 40
MAX_TILES = 120
SIGMAS_PX = (0.0, 0.6, 1.0, 1.5, 2.1, 2.9, 3.9, 5.2, 7.0, 9.5)
DISC_SIGMA_RATIO = 0.28  # sigma of the Gaussian that looks most like a disc, over its diameter (notes 1.8)
DISC_SIGMA_STD = 0.015
MIN_TILES = 12
UNTOLD = 0.7  # posterior over prior error above which a combination counts as undetermined

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class SceneFit:
    """A refined profile, the breathing found, and the evidence."""

    profile: LensProfile
    positions: FloatArray
    focus_before: FloatArray
    focus_after: FloatArray
    focus_std: FloatArray
    scale: FloatArray
    residual: FloatArray  # standardised
    n_tiles: int
    sentences: list[str]


@dataclass(frozen=True)
class _Tiles:
    """Relative blur of the patches of one stack."""

    tile: NDArray[np.int64]
    frame: NDArray[np.int64]
    sharpest: NDArray[np.int64]
    variance_px2: FloatArray
    std_px2: FloatArray


def refine_from_scenes(paths: Sequence[Path], rough: LensProfile | None) -> SceneFit:
    """Refine `rough`, or build a relative profile, from textured stacks taken with one set of focus positions.

    Raises:
        UsageError: the stacks have different focus positions, sizes or apertures, or one is given twice.
        CalibrationError: too small, too little texture, or a stack that does not align.
    """
    positions, unit, shape, pitch = _common_header(paths)
    f_number = _common_f_number(paths, rough)
    n_places = int(np.prod([len(_tile_places(side_px)) for side_px in shape]))
    if n_places < MIN_TILES:
        raise CalibrationError(
            "TOO_SMALL",
            f"{paths[0]}: {shape[1]} x {shape[0]} px have room for {n_places} patches, and {MIN_TILES} are needed; "
            "give the stack at its full size",
        )
    tiles, alignments = [], []
    reduction = max(1.0, float(np.sqrt(shape[0] * shape[1] / MAX_PIXELS)))
    offset = 0
    for path in paths:
        frames, alignment = _aligned(path, len(positions), reduction)
        alignments.append(alignment)
        found = _relative_blur(frames)
        tiles.append(_Tiles(found.tile + offset, found.frame, found.sharpest, found.variance_px2, found.std_px2))
        offset += int(found.tile.max(initial=-1)) + 1
    merged = _Tiles(*(np.concatenate([getattr(t, name) for t in tiles]) for name in _Tiles.__dataclass_fields__))
    n_tiles = len(np.unique(merged.tile))
    if n_tiles < MIN_TILES:
        raise CalibrationError(
            "NO_TEXTURE",
            f"only {n_tiles} patches of {', '.join(p.name for p in paths)} have texture that changes with focus, and "
            f"{MIN_TILES} are needed; photograph something with fine detail at several distances",
        )
    scale = np.exp(np.mean([np.log(alignment.scales) for alignment in alignments], axis=0))
    scale = scale / scale[len(scale) // 2]
    fit = _fit(merged, positions, unit, shape, pitch, reduction, scale, rough, paths, n_tiles)
    return replace(fit, profile=fit.profile.model_copy(update={"f_number": f_number}))


def write_scene_report(fit: SceneFit, path: Path) -> None:
    """A short HTML report of a target-free refinement."""
    order = np.argsort(fit.positions)
    x = fit.positions[order]
    figures = [
        plot(
            [
                Series(x, fit.focus_after[order], "refined", line=True, error=1.96 * fit.focus_std[order]),
                Series(x, fit.focus_before[order], "before", color=1),
            ],
            "focus position",
            "focus, dpt" if fit.profile.is_metric else "focus, 0 first to 1 last frame",
        ),
        plot([Series(x, fit.scale[order], "frames", color=2)], "focus position", "image scale"),
        plot(
            [Series(np.arange(len(fit.residual), dtype=np.float64), fit.residual, "patches", color=0)],
            "observation",
            "residual, standard errors",
        ),
    ]
    items = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in fit.sentences)
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Lens from scenes</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;max-width:1020px;margin:2rem auto;padding:0 1rem}"
        "svg{width:480px;max-width:100%}</style></head><body>"
        f"<h1>Lens refined from ordinary scenes</h1><ul>{items}</ul>{''.join(figures)}</body></html>"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)


def _common_header(paths: Sequence[Path]) -> tuple[FloatArray, str, tuple[int, int], float | None]:
    headers = []
    for path in paths:
        with FocalStack.open(path) as stack:
            known = next(
                (v for v in (stack.focus_position, stack.focus_command, stack.focus_dpt) if np.isfinite(v).all()), None
            )
            unit = "dioptre" if known is stack.focus_dpt or stack.focus_unit == "dioptre" else "step"
            positions = np.arange(stack.n_frames, dtype=np.float64) if known is None else np.asarray(known, np.float64)
            pitch = stack.lens.pixel_pitch_m if stack.lens else None
            headers.append((positions, unit if known is not None else "step", (stack.height, stack.width), pitch))
    first = headers[0]
    for path, header in zip(paths, headers, strict=True):
        if header[2] != first[2] or len(header[0]) != len(first[0]) or not np.allclose(header[0], first[0]):
            raise UsageError(
                f"{path} has other focus positions or another size than {paths[0]}; refine from each alone"
            )
    hashes = [file_sha256(path) for path in paths]
    for k, digest in enumerate(hashes):
        if digest in hashes[:k]:
            twin = paths[hashes.index(digest)]
            raise UsageError(f"{twin} and {paths[k]} are the same stack, which counts once; leave one out")
    if len(np.unique(first[0])) < len(first[0]):
        # some cameras report one position for two neighbours: their order is still known
        return np.arange(len(first[0]), dtype=np.float64), "step", first[2], first[3]
    return first


def _common_f_number(paths: Sequence[Path], rough: LensProfile | None) -> float | None:
    """The f-number of `rough` and the stacks, as far as they say it."""
    told = [] if rough is None or rough.f_number is None else [("the profile", rough.f_number)]
    for path in paths:
        with FocalStack.open(path) as stack:
            if np.isfinite(stack.working_f_number):
                told.append((str(path), stack.working_f_number))
    for source, f_number in told:
        first, common = told[0]
        if not same_setting(f_number, common):
            raise UsageError(
                f"{source} was taken at f/{f_number:g} and {first} at f/{common:g}; refine from stacks of one "
                "aperture, the profile's"
            )
    return told[0][1] if told else None


def _aligned(path: Path, n_frames: int, reduction: float) -> tuple[NDArray[np.float32], Alignment]:
    """Grey frames of one stack at working size, warped onto one another, and how they had been moved."""
    with FocalStack.open(path) as stack:
        size = (round(stack.width / reduction), round(stack.height / reduction))
        small = np.stack(
            [cv2.resize(stack.linear(i), size, interpolation=cv2.INTER_AREA) for i in range(stack.n_frames)]
        )
        focus = stack.focus_dpt if np.isfinite(stack.focus_dpt).all() else None
    alignment = align_stack(small, focus)
    warped = np.stack([alignment.apply(frame, i) for i, frame in enumerate(small)])
    rows, columns = alignment.crop
    return np.ascontiguousarray(warped[:, rows, columns, 1]).astype(np.float32), alignment


def _relative_blur(frames: NDArray[np.float32]) -> _Tiles:
    """Variance of the Gaussian that turns each patch's sharpest frame into every other frame."""
    n_frames, height, width = frames.shape
    energy = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in frames])
    energy = np.stack([cv2.blur(cv2.Laplacian(frame, cv2.CV_32F) ** 2, (TILE_PX, TILE_PX)) for frame in energy])
    centers = [(y, x) for y in _tile_places(height) for x in _tile_places(width)]
    contrast = np.array([energy[:, y, x].max() - energy[:, y, x].min() for y, x in centers])
    best = np.argsort(-contrast)[:MAX_TILES]
    if len(best):
        best = best[contrast[best] > 0.02 * np.median(contrast[best[: max(len(best) // 4, 1)]])]
    blurred = np.stack(
        [np.stack([frame if s == 0 else cv2.GaussianBlur(frame, (0, 0), s) for frame in frames]) for s in SIGMAS_PX]
    )
    half = TILE_PX // 2 + 4
    rows = []
    for label, index in enumerate(best):
        y, x = centers[index]
        box = (slice(y - half, y + half), slice(x - half, x + half))
        sharpest = int(np.argmax(energy[:, y, x]))
        for frame in range(n_frames):
            if frame == sharpest:
                continue
            patch = Patch(frames[frame][box])
            templates = [blurred[k, sharpest][box] for k in range(len(SIGMAS_PX))]
            if min(patch.cost(template) for template in templates) > 0.25:
                continue
            fit = patch.fit(SIGMAS_PX, templates.__getitem__)
            if np.isfinite(fit.std2) and fit.coc2 < SIGMAS_PX[-1] ** 2:
                # a Gaussian stands in for a ratio of discs: some per cent are not noise
                std = float(np.hypot(fit.std2, 0.05 + 0.1 * max(fit.coc2, 0.0)))
                rows.append((label, frame, sharpest, fit.coc2, std))
    table = np.array(rows).reshape(-1, 5)
    integer = table[:, :3].astype(np.int64)
    return _Tiles(integer[:, 0], integer[:, 1], integer[:, 2], table[:, 3], table[:, 4])


def _tile_places(side_px: int) -> range:
    return range(TILE_PX, side_px - TILE_PX, TILE_PX)


def _fit(
    tiles: _Tiles,
    positions: FloatArray,
    unit: str,
    shape: tuple[int, int],
    pitch: float | None,
    reduction: float,
    scale: FloatArray,
    rough: LensProfile | None,
    paths: Sequence[Path],
    n_tiles: int,
) -> SceneFit:
    n_frames = len(positions)
    labels, tile = np.unique(tiles.tile, return_inverse=True)
    if rough is None:
        axis = (positions - positions[0]) / (positions[-1] - positions[0])
        prior_std, gain, gain_std = np.full(n_frames, 0.3), 5.0, 1.5  # log gain: between e^-3 and e^3 of the start
        prior_std[[0, -1]] = 1e-4  # the gauge
    else:
        optics = rough.fitted_to(shape[1], shape[0]).optics(positions)
        axis, prior_std = optics.focus_dpt, optics.focus_std_dpt
        kappa = float(np.median(optics.kappa_px_per_dpt / optics.scale)) / reduction
        gain = DISC_SIGMA_RATIO * kappa
        gain_std = float(
            np.hypot(
                np.median(optics.kappa_std_px_per_dpt / optics.kappa_px_per_dpt), DISC_SIGMA_STD / DISC_SIGMA_RATIO
            )
        )
    start_q = np.array([axis[tiles.sharpest[tile == k][0]] for k in range(len(labels))])
    # neighbours in position move together: independent errors would let noise fold the axis
    x0 = np.concatenate([np.zeros(n_frames), [0.0], np.zeros(len(labels))])
    depth_std = 0.5 * float(np.ptp(axis))

    def unpack(x: FloatArray) -> tuple[FloatArray, float, FloatArray]:
        return (
            axis + prior_std * x[:n_frames],
            gain * float(np.exp(gain_std * x[n_frames])),
            start_q + depth_std * x[n_frames + 1 :],
        )

    def residuals(x: FloatArray) -> FloatArray:
        phi, g, q = unpack(x)
        here, there = phi[tiles.frame] - q[tile], phi[tiles.sharpest] - q[tile]
        data = (tiles.variance_px2 - g**2 * (here**2 - there**2)) / tiles.std_px2
        softened = np.sign(data) * np.sqrt(8.0 * (np.sqrt(1.0 + (data / 2.0) ** 2) - 1.0))
        return np.concatenate([softened, x])

    if rough is None:  # the start of the gain: the robust ratio of what is seen to what gain 1 would give
        model = (axis[tiles.frame] - start_q[tile]) ** 2
        far = model > 0.1
        gain = float(np.sqrt(max(np.median(tiles.variance_px2[far] / model[far]), 1e-3)))
    found = least_squares(residuals, x0, method="trf", x_scale="jac", max_nfev=100)
    phi, g, _ = unpack(found.x)
    covariance = np.linalg.pinv(found.jac.T @ found.jac, hermitian=True)
    residual = found.fun[: len(tiles.frame)]
    worse = max(1.0, float(np.sqrt(np.mean(residual**2))))
    std = np.sqrt(np.diag(covariance)[:n_frames]) * prior_std * (worse if rough is None else 1.0)
    sentences = _what_is_told(found.jac, covariance, prior_std, axis, gain_std, rough, n_frames)
    span = float(np.ptp(phi))
    order = np.argsort(positions)
    steps = np.diff(phi[order])
    if not (np.all(steps > 0) or np.all(steps < 0)):
        at = int(np.argmin(steps * np.sign(np.median(steps))))
        first, second = int(order[at]), int(order[at + 1])
        sentences.append(
            f"Frames {first} and {second} come out in the wrong order of focus ({phi[first]:.3f}, "
            f"{phi[second]:.3f}); they were "
            "put in order, so trust neither."
        )
    sign = np.sign(phi[order[-1]] - phi[order[0]])
    running = np.maximum.accumulate(sign * phi[order])
    monotone = sign * (running + 1e-6 * span * np.arange(n_frames))
    near_over_far = float(scale[np.argmax(phi)] / scale[np.argmin(phi)])
    if rough is None:
        sentences.append(
            f"Breathing between the first and the last frame: scale {scale[-1] / scale[0]:.4f} (last over first); "
            "which end is "
            "near cannot be known from blur."
        )
    else:
        sentences.append(f"Breathing: near focus shows the scene at {near_over_far:.4f} of the scale of far focus.")
    sentences.append(f"Residual {np.sqrt(np.mean(residual**2)):.2f} standard errors over {n_tiles} patches.")
    kappa = g * reduction / DISC_SIGMA_RATIO
    kappa_ratio = float(np.sqrt(covariance[n_frames, n_frames])) * gain_std
    profile = _as_profile(
        rough,
        positions[order],
        unit,
        shape,
        pitch,
        monotone,
        std[order],
        scale[order],
        kappa,
        kappa_ratio,
        paths,
        sentences,
    )
    return SceneFit(profile, positions, axis, phi, std, scale, residual, n_tiles, sentences)


def _what_is_told(
    jacobian: FloatArray,
    covariance: FloatArray,
    prior_std: FloatArray,
    axis: FloatArray,
    gain_std: float,
    rough: LensProfile | None,
    n_frames: int,
) -> list[str]:
    """Which combinations of focus and gain the blur determined, and which only the prior holds."""
    if rough is None:
        return [
            "No distance is known: focus runs from 0 (first frame) to 1 (last frame). Undetermined: the unit and the "
            "zero "
            "of this axis, the aperture, and which end is near; depth from this profile is relative."
        ]
    del jacobian, gain_std
    block = covariance[:n_frames, :n_frames] * np.outer(prior_std, prior_std)
    prior = np.diag(prior_std**2)
    middle = axis - axis.mean()
    directions = {
        "a common offset of all focus positions": np.full(n_frames, 1.0 / n_frames),
        "a common scale of focus and aperture": middle / float(middle @ middle),
    }
    sentences, told_by_blur = [], []
    projector = np.eye(n_frames)
    for name, direction in directions.items():
        after = float(np.sqrt(direction @ block @ direction))
        before = float(np.sqrt(direction @ prior @ direction))
        unit = " dpt" if "offset" in name else ""
        if after > UNTOLD * before:
            sentences.append(
                f"Undetermined by blur: {name} (+- {1.96 * after:.3g}{unit}, 95 %, from the rough profile alone)."
            )
        else:
            told_by_blur.append(f"{name} (+- {1.96 * after:.3g}{unit})")
        unit_vector = direction / np.linalg.norm(direction)
        projector -= np.outer(unit_vector, unit_vector)
    shape_after = float(np.sqrt(np.trace(projector @ block @ projector.T) / max(n_frames - 2, 1)))
    shape_before = float(np.sqrt(np.trace(projector @ prior @ projector.T) / max(n_frames - 2, 1)))
    told_by_blur.append(f"the shape of the focus axis ({shape_before:.4f} dpt before, {shape_after:.4f} now)")
    return [f"Determined: {'; '.join(told_by_blur)}.", *sentences]


def _as_profile(
    rough: LensProfile | None,
    positions: FloatArray,
    unit: str,
    shape: tuple[int, int],
    pitch: float | None,
    focus: FloatArray,
    focus_std: FloatArray,
    scale: FloatArray,
    kappa: float,
    kappa_ratio: float,
    paths: Sequence[Path],
    sentences: Sequence[str],
) -> LensProfile:
    zero = tuple(0.0 for _ in positions)
    source = f"{len(paths)} scene{'s' if len(paths) > 1 else ''}"
    table = FocusTable(
        unit="dioptre" if unit == "dioptre" else "step",
        positions=tuple(map(float, positions)),
        focus_dpt=tuple(map(float, focus)),
        std_dpt=tuple(map(float, focus_std)),
        source=source,
    )
    breathing = Breathing(
        reference_position=float(positions[len(positions) // 2]),
        scale=tuple(map(float, scale)),
        scale_std=tuple(1e-3 for _ in positions),
        shift_x_px=zero,
        shift_y_px=zero,
        source=source,
    )
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    if rough is not None:
        lens = rough.fitted_to(shape[1], shape[0])
        pupil = kappa / lens.intrinsics.focal_length_px.value
        return lens.model_copy(
            update={
                "focus": table,
                "breathing": breathing,
                "pupil_diameter_m": Measured(value=pupil, std=pupil * kappa_ratio, source=source),
                "created": now,
                "warnings": tuple(sentences),
            }
        )
    focal = 1.2 * shape[1]
    nothing = Measured(value=0.5, std=0.5, source="assumed")
    return LensProfile(
        grade="relative",
        width_px=shape[1],
        height_px=shape[0],
        pixel_pitch_m=pitch,
        pupil_diameter_m=Measured(value=kappa / focal, std=kappa_ratio * kappa / focal, source=source),
        focus=table,
        breathing=breathing,
        intrinsics=Intrinsics(
            focal_length_px=Measured(value=focal, std=0.3 * focal, source="assumed"),
            center_x_px=Measured(value=(shape[1] - 1) / 2, std=0.01 * shape[1], source="assumed"),
            center_y_px=Measured(value=(shape[0] - 1) / 2, std=0.01 * shape[1], source="assumed"),
        ),
        floor_sigma_px=nothing,
        created=now,
        warnings=tuple(sentences),
    )
