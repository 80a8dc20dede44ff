"""One stack in, depth, confidence and all-in-focus image out.

The order of work: align (breathing and hand motion), decide the optics, estimate depth in tiles at the
*working scale*, at which the widest blur stays below `max_coc_px`, and, where that is smaller than the
stored size, carry the depth up along the edges of the full-size all-in-focus image. Frames are read from the
stack tile by tile, so memory is bounded by the outputs and one tile (`reconstruct/memory.py`). Tiles cannot be told
from the whole: exposure and noise are measured once, and what has no bounded reach is done to the whole picture
(`reconstruct/methods.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.alignment import Alignment, FrameReader, align_stack
from capture.errors import DataError, NoSpaceError
from capture.lens import LensProfile
from capture.stack import FocalStack
from reconstruct import blind, memory
from reconstruct.device import pick_device
from reconstruct.estimate import Estimate
from reconstruct.fusion import channel_noise_variance, filled_frames, fuse
from reconstruct.lens_fit import picture_focus
from reconstruct.methods import METHODS, Network, PlaneSweep
from reconstruct.optics import StackOptics, optics_of
from reconstruct.plane_sweep import DARKEST, Evidence, Photometry, quietened, relative_exposure
from reconstruct.result import Reconstruction

Report = Callable[[str, float], None]  # (what is being done, share of the whole so far)
OVERVIEW_PX = 1024  # longer side of the reduced frames that alignment and gain are estimated from
PHOTOMETRY_PX = 512  # side of the middle part that noise and exposure are measured on, working pixels
GRID_PX = 16  # tiles start on multiples of it, as the network's halvings do
BLUR_HALO_PX = 48  # around a tile that is compared: half the widest blur, and what its rings and windows reach
FUSE_HALO_PX = 32  # around a tile that is fused: the reach of its bands and windows
TILE_PX = 768  # side of a tile's core, working pixels; smaller where memory is short
CONTRADICTED_PX = 0.2  # of blur std, by which a corrected focus is worth a warning
UNEVEN = 0.05  # differences of brightness that are worth a warning, the share of notes/calibration.md
READ_PX = 1 << 20  # full-size pixels read at a time where they are reduced at once


@dataclass(frozen=True)
class Settings:
    """How a stack is reconstructed.

    Attributes:
        method: the trained network, or the training-free plane sweep.
        weights: name or path of the network's weights.
        refine_steps: gradient steps through the renderer after the first answer; 0 for none.
        fit_focus: correct each frame's focus by what the frames say, unless it was measured or is said to be exact.
        align: False trusts the frames to be aligned.
        max_residual_px: alignment residual above which the stack is refused; None for the default, inf for never.
        max_coc_px: widest blur at the working scale; larger blur is worked on at half, a third ... of the size.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        compare: with the network, also keep the plane sweep's answer to print beside it.
        memory_share: part of the machine's memory to count on; 1 / workers.
    """

    method: Literal["network", "plane-sweep"] = "network"
    weights: str = "default"
    refine_steps: int = 0
    fit_focus: bool = True
    align: bool = True
    max_residual_px: float | None = None
    max_coc_px: float = 40.0
    device: str = "auto"
    compare: bool = False
    memory_share: float = 1.0


def plan_memory(stack: FocalStack, settings: Settings, profile: LensProfile | None = None) -> memory.MemoryPlan:
    """What `reconstruct` will use; NoSpaceError, naming the stack, if it cannot fit."""
    optics = optics_of(stack, profile)
    return _plan(stack, settings, 1 if optics.kappa_px_per_dpt is None else _working_step(stack, optics, settings))


def _plan(stack: FocalStack, settings: Settings, step: int) -> memory.MemoryPlan:
    try:
        return memory.plan(
            stack.height,
            stack.width,
            stack.n_frames,
            step=step,
            tile_px=TILE_PX,
            halo_px=METHODS[settings.method].halo_px,
            network=settings.method == "network",
            refine=settings.refine_steps > 0,
            device=pick_device(settings.device),
            share=settings.memory_share,
        )
    except NoSpaceError as error:
        raise NoSpaceError(f"{stack.path}: {error}") from None


def reconstruct(
    stack: FocalStack,
    settings: Settings | None = None,
    profile: LensProfile | None = None,
    progress: Report = lambda what, share: None,
    *,
    overview: Overview | None = None,
) -> Reconstruction:
    """Depth, confidence and all-in-focus image of `stack`.

    Args:
        overview: from `read_overview`, where the caller has it already.

    Raises:
        DataError: fewer than two usable frames, a profile that does not fit, frames that do not align.
        NoSpaceError: memory that does not suffice, even with smaller tiles.
        UsageError: a device that is not there.
    """
    settings = settings or Settings()
    device = pick_device(settings.device)
    clock = Clock()
    if stack.n_frames < 2:
        raise DataError(f"{stack.path} has {stack.n_frames} usable frame; depth from focus needs at least 2")
    optics = optics_of(stack, profile)

    progress("aligning", 0.0)
    overview = overview or read_overview(stack)
    clock.lap("read")
    small, alignment = _align(stack, overview, optics, settings)
    clock.lap("align")
    optics = _with_gain(optics, overview, small, alignment)
    step = _working_step(stack, optics, settings)
    kappa = _require(optics.kappa_px_per_dpt) * alignment.kappa_factor
    exposure = overview.exposure()
    clock.lap("gain")
    plan = _plan(stack, settings, step)
    told = optics.focus_dpt

    def picture() -> _Picture:
        return _Picture(stack, alignment, exposure, step, device, memory.Scratch(plan.scratch_bytes))

    guessed = not overview.says_depth(exposure) and not picture().says_depth(plan.tile_px)
    if guessed:
        optics = replace(optics, warnings=(*optics.warnings, blind.WARNING))
    elif settings.fit_focus and not optics.focus_exact:
        progress("comparing focus", 0.05)
        optics = _with_fitted_focus(optics, kappa, stack, overview, alignment, exposure, step, device)
        clock.lap("focus")

    focus, gain = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (optics.focus_dpt, kappa / step))
    sweep = PlaneSweep(focus, gain)
    learned = settings.method == "network"
    method = Network(focus, gain, settings.weights, optics.metric) if learned else sweep
    brightness = max(DARKEST, float((overview.frames.mean((1, 2, 3)) * exposure).mean()))

    def compute(tile_px: int) -> tuple[_Fields, _Fields | None]:
        taken = picture()
        clock.lap("read frames")
        method.context = sweep.context = taken.photometry(brightness)
        fields = _estimate_tiled(taken, method, settings.refine_steps, tile_px, progress)
        compared = settings.compare and method is not sweep
        baseline = _estimate_tiled(taken, sweep, 0, tile_px, progress) if compared else None
        clock.lap("estimate")
        if step > 1:
            del taken
            sharp = _Picture(stack, alignment, exposure, 1, device, memory.Scratch(0))
            fields = _carry_up(sharp, fields, optics.focus_dpt, kappa, step, tile_px, progress)
            clock.lap("full size")
        return fields, baseline

    fields, baseline = _within_memory(compute, plan, stack)
    if guessed:
        for maps in filter(None, (fields, baseline)):
            maps.doubt(float(np.ptp(optics.focus_dpt)))
    progress("done", 1.0)
    description = {**method.description, "refine_steps": settings.refine_steps}
    taken = stack, optics, told, alignment, exposure, kappa, step
    answer = _assemble(*taken, fields, clock, description)
    if baseline is not None:
        answer.baseline = _assemble(*taken, baseline, clock, sweep.description)
    return answer


def _within_memory(
    compute: Callable[[int], tuple[_Fields, _Fields | None]], plan: memory.MemoryPlan, stack: FocalStack
) -> tuple[_Fields, _Fields | None]:
    """`compute(tile side)`, once more with smaller tiles if memory ran out all the same, else NoSpaceError."""
    for tile_px in (plan.tile_px, *plan.smaller_px[-1:]):
        try:
            return compute(tile_px)
        except (MemoryError, RuntimeError, cv2.error) as error:
            if not memory.ran_out(error):
                raise
        if torch.cuda.is_available():  # outside the handler: the error's traceback kept the tensors alive
            torch.cuda.empty_cache()
    raise NoSpaceError(
        f"{stack.path}: memory ran out in tiles of {tile_px} px too; close other programs, use fewer --workers, "
        "or reduce the frames"
    )


@dataclass
class _Fields:
    """The four maps, (H, W) and (H, W, 3), on the CPU."""

    inverse_depth_dpt: NDArray[np.float32]
    std_dpt: NDArray[np.float32]
    confidence: NDArray[np.float32]
    aif: NDArray[np.float32]

    @classmethod
    def empty(cls, height: int, width: int) -> _Fields:
        depth, std, confidence = (np.empty((height, width), np.float32) for _ in range(3))
        return cls(depth, std, confidence, np.empty((height, width, 3), np.float32))

    def doubt(self, sweep_dpt: float) -> None:
        """Take the depth for a guess: as likely anywhere in the sweep as here."""
        np.maximum(self.std_dpt, sweep_dpt / math.sqrt(12), out=self.std_dpt)
        self.confidence[:] = 0

    def put(self, tile: _Tile, estimate: Estimate) -> None:
        for name in ("inverse_depth_dpt", "std_dpt", "confidence"):
            getattr(self, name)[tile.core] = getattr(estimate, name)[tile.inside].cpu().numpy()
        self.aif[tile.core] = estimate.aif[(slice(None), *tile.inside)].permute(1, 2, 0).cpu().numpy()


@dataclass(frozen=True)
class Overview:
    """All frames (S, h, w, 3), linear, reduced by a whole `factor` to about OVERVIEW_PX."""

    frames: NDArray[np.float32]
    factor: int

    def exposure(self) -> NDArray[np.float32]:
        """Factor per frame, (S,), that brings all to one exposure."""
        return relative_exposure(torch.from_numpy(self.frames.mean(-1))).numpy()

    def says_depth(self, exposure: NDArray[np.float32]) -> bool:
        """Whether the frames differ as they do out of focus (`reconstruct/blind.py`)."""
        return blind.says_depth(torch.from_numpy(self.frames.mean(-1) * exposure[:, None, None]))


def read_overview(stack: FocalStack) -> Overview:
    """The frames reduced, each read once and in bands."""
    factor = int(np.ceil(max(stack.height, stack.width) / OVERVIEW_PX))
    factor = min(factor, stack.height, stack.width)
    frames = np.empty((stack.n_frames, stack.height // factor, stack.width // factor, 3), np.float32)
    for i, out in enumerate(frames):
        _reduce(stack.linear, i, factor, out)
    return Overview(frames, factor)


def _reduce(read: FrameReader, i: int, factor: int, out: NDArray[np.float32], corner: tuple[int, int] = (0, 0)) -> None:
    """Frame i from its pixel `corner` on, reduced by `factor` into `out` (h, w, 3), a band at a time."""
    height, width, _ = out.shape
    top, left = corner
    step = max(1, READ_PX // (width * factor * factor))
    for start in range(0, height, step):
        stop = min(start + step, height)
        rows, cols = slice(top + start * factor, top + stop * factor), slice(left, left + width * factor)
        band = read(i, rows, cols)
        out[start:stop] = cv2.resize(band, (width, stop - start), interpolation=cv2.INTER_AREA)


def _align(
    stack: FocalStack, overview: Overview, optics: StackOptics, settings: Settings
) -> tuple[Alignment | None, Alignment]:
    """The alignment at the overview's size (None if not wanted), and the same for full-size frames."""
    if not settings.align:
        return None, Alignment.from_scales(np.ones(stack.n_frames), stack.height, stack.width)
    small = align_stack(overview.frames, optics.focus_dpt, scales=optics.scales, max_size=OVERVIEW_PX)
    alignment = _full_size(small, stack.height, stack.width, overview.factor)
    try:
        alignment.check(settings.max_residual_px)
    except DataError as error:
        raise DataError(f"{stack.path}: {error} (--allow-misaligned)") from None
    return small, alignment


def _full_size(small: Alignment, height: int, width: int, factor: int) -> Alignment:
    """`small` for frames `factor` times as large, whose last rows and columns the overview may have left out."""
    left_out = complex(width - small.width * factor, height - small.height * factor) / 2  # centre to centre
    return replace(
        small,
        height=height,
        width=width,
        shift=small.shift * factor + (small.ratio - 1) * left_out,
        shift_std_px=small.shift_std_px * factor,
        residual_px=small.residual_px * factor,
    )


def _with_gain(optics: StackOptics, overview: Overview, small: Alignment | None, alignment: Alignment) -> StackOptics:
    """`optics` with the blur gain found from the frames where no lens data gave it."""
    if optics.kappa_px_per_dpt is not None:
        return optics
    from reconstruct.plane_sweep import estimate_gain

    frames = overview.frames
    if small is not None and not small.is_identity:
        frames = np.stack([small.apply(frame, i) for i, frame in enumerate(frames)])
    tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
    gain = estimate_gain(tensor, torch.as_tensor(optics.focus_dpt, dtype=torch.float32)) * overview.factor
    return replace(optics, kappa_px_per_dpt=np.full(len(optics.focus_dpt), gain) / alignment.kappa_factor)


def _with_fitted_focus(
    optics: StackOptics,
    kappa: NDArray[np.float64],
    stack: FocalStack,
    overview: Overview,
    alignment: Alignment,
    exposure: NDArray[np.float32],
    step: int,
    device: torch.device,
) -> StackOptics:
    """`optics` with the focus settings that explain the frames best, and a warning where they contradict the stored."""

    def cut(factor: int, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        factor *= step
        frames = np.empty((stack.n_frames, rows.stop - rows.start, cols.stop - cols.start, 3), np.float32)
        for i, out in enumerate(frames):
            _reduce(_aligned(stack, alignment), i, factor, out, (rows.start * factor, cols.start * factor))
            out *= exposure[i]
        tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        return tensor.to(device), torch.from_numpy(alignment.seen(rows, cols, factor)).to(device)

    told, gain = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (optics.focus_dpt, kappa / step))
    luma = torch.from_numpy(overview.frames.mean(-1))
    fitted = picture_focus(cut, luma, (stack.height // step, stack.width // step), told, gain)
    found = fitted.cpu().numpy().astype(np.float64)
    moved_px = (found - told.cpu().numpy()) * kappa / step / 4
    if not moved_px.any():
        return optics
    warnings = optics.warnings
    contradicted = [
        f"frame {i} at {_in_metres(found[i])} instead of {_in_metres(optics.focus_dpt[i])}"
        for i in np.flatnonzero(np.abs(moved_px) > CONTRADICTED_PX)
        if _in_metres(found[i]) != _in_metres(optics.focus_dpt[i])  # beyond infinity there is nothing to tell
    ]
    if optics.metric and contradicted:
        words = f"the frames contradict their stored focus distances, which were corrected: {', '.join(contradicted)}; "
        warnings += (words + "`daif calibrate` measures them, --no-fit-focus believes in them",)
    return replace(optics, focus_dpt=found, warnings=warnings)


def _in_metres(focus_dpt: float) -> str:
    return f"{1 / focus_dpt:.3g} m" if focus_dpt > 1e-3 else "infinity"


def _require(kappa: NDArray[np.float64] | None) -> NDArray[np.float64]:
    assert kappa is not None
    return kappa


def _working_step(stack: FocalStack, optics: StackOptics, settings: Settings) -> int:
    """Whole factor by which frames are reduced so that the widest blur between two focus settings fits."""
    widest_px = float(_require(optics.kappa_px_per_dpt).max() * np.ptp(optics.focus_dpt))
    step = max(1, int(np.ceil(widest_px / settings.max_coc_px)))
    return min(step, max(1, min(stack.height, stack.width) // 64))


class _Picture:
    """The aligned frames of a stack at the working scale, brought to one exposure.

    Reduced ones are kept, because making them reads the whole stack; at full size every region is read when it is
    needed.
    """

    def __init__(
        self,
        stack: FocalStack,
        alignment: Alignment,
        exposure: NDArray[np.float32],
        step: int,
        device: torch.device,
        scratch: memory.Scratch,
    ) -> None:
        self.stack, self.alignment, self.step, self.device, self.scratch = stack, alignment, step, device, scratch
        self.exposure = exposure
        self.height, self.width = stack.height // step, stack.width // step
        self.gathered: _Gathered | None = None  # by the first method that needs it; it serves all alike
        self.kept: NDArray[np.float32] | None = None
        if step > 1:
            self.kept = scratch.empty((stack.n_frames, self.height, self.width, 3))
            for i, out in enumerate(self.kept):
                _reduce(_aligned(stack, alignment), i, step, out)
                out *= exposure[i]

    def read(self, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
        """A region of all frames, (S, 3, h, w), and where each holds data, (S, h, w)."""
        if self.kept is not None:
            frames = self.kept[:, rows, cols]
        else:
            read = _aligned(self.stack, self.alignment)
            frames = np.stack([read(i, rows, cols) for i in range(self.stack.n_frames)])
            frames *= self.exposure[:, None, None, None]
        tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(self.device)
        return tensor, torch.from_numpy(self.alignment.seen(rows, cols, self.step)).to(self.device)

    def says_depth(self, tile_px: int) -> bool:
        """As `Overview.says_depth`, of what is too small to be seen there."""
        tiles = _tiles(self.height, self.width, tile_px, 0)
        return any(blind.says_depth(self.read(*tile.core)[0].mean(1)) for tile in tiles)

    def photometry(self, brightness: float) -> Photometry:
        """Noise and exposure, from the middle of the picture; `brightness` is the whole's."""
        _, found = quietened(*self.read(_middle(self.height), _middle(self.width)))
        return found._replace(brightness=torch.full_like(found.noise, brightness))


def _aligned(stack: FocalStack, alignment: Alignment) -> FrameReader:
    return lambda i, rows, cols: alignment.apply_tile(stack.linear, i, rows, cols)


def _middle(length: int) -> slice:
    start = max(0, (length - PHOTOMETRY_PX) // 2)
    return slice(start, min(length, start + PHOTOMETRY_PX))


class _Tile(NamedTuple):
    """A part of a picture, `core`, and the same with its surroundings, `outer`: rows and columns of each."""

    core: tuple[slice, slice]
    outer: tuple[slice, slice]

    @property
    def inside(self) -> tuple[slice, slice]:
        """The core within the outer part."""
        rows, cols = (slice(c.start - o.start, c.stop - o.start) for c, o in zip(self.core, self.outer, strict=True))
        return rows, cols


def _tiles(height: int, width: int, tile_px: int, halo_px: int) -> list[_Tile]:
    """Tiles whose cores cover the picture; a single one if it is hardly larger than a tile."""
    return [
        _Tile((rows, cols), (outer_rows, outer_cols))
        for rows, outer_rows in _spans(height, tile_px, halo_px)
        for cols, outer_cols in _spans(width, tile_px, halo_px)
    ]


def _spans(length: int, tile_px: int, halo_px: int) -> list[tuple[slice, slice]]:
    count = max(1, int(np.ceil(length / tile_px))) if length > tile_px + 2 * halo_px else 1
    starts = (np.arange(count) * length / count).astype(int) // GRID_PX * GRID_PX
    ends = [*starts[1:].tolist(), length]
    return [
        (slice(a, b), slice(max(0, a - halo_px), min(length, b + halo_px)))
        for a, b in zip(starts.tolist(), ends, strict=True)
    ]


def _estimate_tiled(
    picture: _Picture, method: PlaneSweep, refine_steps: int, tile_px: int, progress: Report
) -> _Fields:
    height, width = picture.height, picture.width
    fields = _Fields.empty(height, width)
    tiles = _tiles(height, width, tile_px, method.halo_px)
    gathered = None
    if len(tiles) > 1 and method.hypotheses:
        gathered = picture.gathered = picture.gathered or _Gathered(picture, method, tile_px, progress)
    for done, tile in enumerate(tiles):
        progress("estimating depth", 0.4 + 0.3 * done / len(tiles))
        frames, seen = picture.read(*tile.outer)
        estimate = method.estimate(frames, seen, None if gathered is None else gathered.evidence(*tile.outer))
        if refine_steps:
            from reconstruct.refine import refine

            stack = frames, method.focus_dpt, method.kappa
            estimate = refine(*stack, estimate, steps=refine_steps, valid=seen, context=method.context)
        else:
            estimate = method.finished(estimate)
        fields.put(tile, _less_sure(estimate, seen.all(0)))
    return fields


class _Gathered:
    """Evidence for the whole picture, compared tile by tile and smoothed as one."""

    def __init__(self, picture: _Picture, method: PlaneSweep, tile_px: int, progress: Report) -> None:
        self.device = picture.device
        size = picture.height, picture.width
        cost, total = (picture.scratch.empty((method.hypotheses, *size)) for _ in range(2))
        guide = np.empty(size, np.float32)
        tiles = _tiles(*size, tile_px, BLUR_HALO_PX)
        for done, tile in enumerate(tiles):
            progress("comparing frames", 0.1 + 0.2 * done / len(tiles))
            found, edges = method.compare(*picture.read(*tile.outer))
            cost[(slice(None), *tile.core)] = found[(slice(None), *tile.inside)].cpu().numpy()
            guide[tile.core] = edges[tile.inside].cpu().numpy()
        progress("smoothing", 0.3)
        self.cost, self.total = torch.from_numpy(cost), torch.from_numpy(total)
        method.smooth(self.cost, torch.from_numpy(guide), self.total, picture.device)

    def evidence(self, rows: slice, cols: slice) -> Evidence:
        """What belongs to a region of the picture."""
        return Evidence(self.cost[:, rows, cols].to(self.device), self.total[:, rows, cols].to(self.device))


def _less_sure(estimate: Estimate, everywhere: Tensor) -> Estimate:
    """`estimate` with half the confidence where some frame saw nothing."""
    return estimate._replace(confidence=torch.where(everywhere, estimate.confidence, 0.5 * estimate.confidence))


def _carry_up(
    picture: _Picture,
    small: _Fields,
    focus_dpt: NDArray[np.float64],
    kappa: NDArray[np.float64],
    step: int,
    tile_px: int,
    progress: Report,
) -> _Fields:
    """Working-scale maps at full size: depth follows the edges of the sharp image, which is fused from `picture`."""
    height, width, device = picture.height, picture.width, picture.device
    fields = _Fields.empty(height, width)
    radius = 2 * step
    tiles = _tiles(height, width, tile_px, FUSE_HALO_PX + 2 * radius)
    focus, gain = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (focus_dpt, kappa))
    noise = channel_noise_variance(filled_frames(*picture.read(_middle(height), _middle(width)))[0])
    for done, tile in enumerate(tiles):
        progress("full size", 0.7 + 0.3 * done / len(tiles))
        frames, seen = picture.read(*tile.outer)
        depth, std, confidence = (
            _enlarged(m, step, *tile.outer) for m in (small.inverse_depth_dpt, small.std_dpt, small.confidence)
        )
        rough = (torch.from_numpy(m).to(device) for m in (depth, std))
        sharp = fuse(frames, focus, gain, *rough, valid=seen, noise=noise).permute(1, 2, 0).cpu().numpy()
        guide = cv2.cvtColor(np.sqrt(sharp), cv2.COLOR_RGB2GRAY)
        fields.inverse_depth_dpt[tile.core] = guided_filter(guide, depth, radius, epsilon=1e-4)[tile.inside]
        fields.std_dpt[tile.core] = std[tile.inside]
        fields.confidence[tile.core] = confidence[tile.inside]
        fields.aif[tile.core] = sharp[tile.inside]
    return fields


def _enlarged(small: NDArray[np.float32], step: int, rows: slice, cols: slice) -> NDArray[np.float32]:
    """Region (rows, cols) at full size of a working-scale map, bilinear; edges repeated."""
    y = ((np.arange(rows.start, rows.stop) + 0.5) / step - 0.5).astype(np.float32)
    x = ((np.arange(cols.start, cols.stop) + 0.5) / step - 0.5).astype(np.float32)
    x_map, y_map = np.meshgrid(x, y)
    return cv2.remap(small, x_map, y_map, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def guided_filter(
    guide: NDArray[np.float32], values: NDArray[np.float32], radius: int, epsilon: float
) -> NDArray[np.float32]:
    """`values` smoothed along the edges of `guide` (He, Sun, Tang, "Guided Image Filtering", 2013, eq. 5-8)."""
    size = (2 * radius + 1, 2 * radius + 1)

    def mean(image: NDArray[np.float32]) -> NDArray[np.float32]:
        return cv2.blur(image, size, borderType=cv2.BORDER_REFLECT_101)

    mean_guide, mean_values = mean(guide), mean(values)
    covariance = mean(guide * values) - mean_guide * mean_values
    slope = covariance / (mean(guide * guide) - mean_guide**2 + epsilon)
    return mean(slope) * guide + mean(mean_values - slope * mean_guide)


class Clock:
    """Wall seconds per stage, and CPU seconds of this thread, which are all where torch runs on one."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.cpu_seconds: dict[str, float] = {}
        self._last = time.perf_counter(), time.thread_time()

    def lap(self, stage: str) -> None:
        now = time.perf_counter(), time.thread_time()
        for total, before, after in zip((self.seconds, self.cpu_seconds), self._last, now, strict=True):
            total[stage] = total.get(stage, 0.0) + after - before
        self._last = now


def _assemble(
    stack: FocalStack,
    optics: StackOptics,
    told_focus_dpt: NDArray[np.float64],
    alignment: Alignment,
    exposure: NDArray[np.float32],
    kappa: NDArray[np.float64],
    step: int,
    fields: _Fields,
    clock: Clock,
    method: dict[str, Any],
) -> Reconstruction:
    std_dpt = _with_calibration_error(fields, optics) if optics.metric else fields.std_dpt
    intrinsics = optics.intrinsics
    warnings = list(optics.warnings)
    if np.ptp(exposure) > UNEVEN:
        warnings.append(
            f"brightness differs between frames by {100 * np.ptp(exposure):.0f} % and was evened out; unless the lens "
            "does this as it focuses close, lock the exposure before the next sweep and avoid lamps that flicker"
        )
    residual = float(np.nanmax(alignment.residual_px)) if np.isfinite(alignment.residual_px).any() else None
    record = {
        "format": "daif-reconstruction/1",
        "metric": optics.metric,
        "method": method,
        "optics": {
            "source": optics.source,
            "focus_dpt": optics.focus_dpt.tolist(),
            "told_focus_dpt": told_focus_dpt.tolist(),
            "kappa_px_per_dpt": kappa.tolist(),
            "lens": stack.lens.model_dump() if stack.lens else None,
        },
        "intrinsics": vars(intrinsics),
        "alignment": {
            "scales": alignment.scales.tolist(),
            "shifts_px": alignment.shifts_px.tolist(),
            "residual_px": [None if np.isnan(r) else float(r) for r in alignment.residual_px],
        },
        "exposure_factors": exposure.tolist(),
        "working_scale": 1 / step,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "summary": {"alignment_residual_px": residual, "seconds": sum(clock.seconds.values())},
        "warnings": warnings,
    }
    return Reconstruction(
        name=stack.path.name.removesuffix(".partial").removesuffix(".h5"),
        inverse_depth_dpt=fields.inverse_depth_dpt,
        std_dpt=std_dpt,
        confidence=fields.confidence,
        aif=fields.aif,
        metric=optics.metric,
        intrinsics=intrinsics,
        focus_dpt=optics.focus_dpt,
        kappa_px_per_dpt=kappa,
        record=record,
    )


def _with_calibration_error(fields: _Fields, optics: StackOptics) -> NDArray[np.float32]:
    """std_dpt with what the calibration does not know: the focus settings, and the gain times the defocus."""
    focus_std = float(np.median(optics.focus_std_dpt))
    if focus_std == 0 and optics.gain_std == 0:
        return fields.std_dpt
    ordered = np.sort(optics.focus_dpt).astype(np.float32)
    out = np.empty_like(fields.std_dpt)
    for row, (inverse, std) in enumerate(zip(fields.inverse_depth_dpt, fields.std_dpt, strict=True)):
        gain_error = optics.gain_std * np.abs(inverse[:, None] - ordered).min(axis=1)
        out[row] = np.sqrt(std**2 + focus_std**2 + gain_error**2)
    return out
