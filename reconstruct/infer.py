"""One stack in, depth, confidence and all-in-focus image out.

The order of work: align (breathing and hand motion), decide the optics, estimate depth in tiles at the
*working scale*, at which the widest blur stays below `max_coc_px`, and, where that is smaller than the
stored size, carry the depth up along the edges of the full-size all-in-focus image. Frames are read from the
stack tile by tile, so memory is bounded by the outputs and one tile (`reconstruct/memory.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from capture.alignment import Alignment, FrameReader, align_stack
from capture.errors import DataError, NoSpaceError
from capture.lens import LensProfile
from capture.stack import FocalStack
from reconstruct import memory
from reconstruct.device import pick_device
from reconstruct.estimate import Estimate
from reconstruct.fusion import fuse
from reconstruct.optics import StackOptics, optics_of
from reconstruct.plane_sweep import Photometry, photometry, plane_sweep
from reconstruct.result import Reconstruction

Method = Literal["network", "plane-sweep"]
Report = Callable[[str, float], None]  # (what is being done, share of the whole so far)
OVERVIEW_PX = 1024  # longer side of the reduced frames that alignment and gain are estimated from
PHOTOMETRY_PX = 512  # side of the middle part that noise and exposure are measured on, working pixels
HALO_PX = 96  # working pixels around a tile: blur, windows and the network's reach
TILE_PX = 768  # side of a tile's core, working pixels; smaller where memory is short
READ_PX = 1 << 20  # full-size pixels read at a time where they are reduced at once


@dataclass(frozen=True)
class Settings:
    """How a stack is reconstructed.

    Attributes:
        method: the trained network, or the training-free plane sweep.
        weights: name or path of the network's weights.
        refine_steps: gradient steps through the renderer after the first answer; 0 for none.
        align: False trusts the frames to be aligned.
        max_residual_px: alignment residual above which the stack is refused; None for the default, inf for never.
        max_coc_px: widest blur at the working scale; larger blur is worked on at half, a third ... of the size.
        device: `auto`, `cpu`, `cuda`, `cuda:1` ...
        compare: with the network, also keep the plane sweep's answer to print beside it.
        memory_share: part of the machine's memory to count on; 1 / workers.
    """

    method: Method = "plane-sweep"
    weights: str = "default"
    refine_steps: int = 0
    align: bool = True
    max_residual_px: float | None = None
    max_coc_px: float = 40.0
    device: str = "auto"
    compare: bool = False
    memory_share: float = 1.0


def plan_memory(stack: FocalStack, settings: Settings) -> memory.MemoryPlan:
    """What `reconstruct` will use; NoSpaceError, naming the stack, if it cannot fit."""
    try:
        return memory.plan(
            stack.height,
            stack.width,
            stack.n_frames,
            tile_px=TILE_PX,
            halo_px=HALO_PX,
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
    plan: memory.MemoryPlan | None = None,
) -> Reconstruction:
    """Depth, confidence and all-in-focus image of `stack`.

    Args:
        overview, plan: from `read_overview` and `plan_memory`, where the caller has them already.

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
    plan = plan or plan_memory(stack, settings)

    progress("aligning", 0.0)
    overview = overview or read_overview(stack)
    clock.lap("read")
    small, alignment = _align(stack, overview, optics, settings)
    clock.lap("align")
    optics = _with_gain(optics, overview, small, alignment)
    kappa = _require(optics.kappa_px_per_dpt) * alignment.kappa_factor
    step = _working_step(optics, kappa, settings.max_coc_px, (stack.height, stack.width))
    clock.lap("gain")

    estimator = _Estimator(settings, optics.focus_dpt, kappa / step, device)

    def compute(tile_px: int) -> tuple[_Fields, _Fields | None]:
        fields, baseline = _estimate_tiled(stack, alignment, estimator, step, tile_px, progress)
        clock.lap("estimate")
        if step > 1:
            fields = _carry_up(stack, alignment, fields, optics.focus_dpt, kappa, step, tile_px, device, progress)
            clock.lap("full size")
        return fields, baseline

    fields, baseline = _within_memory(compute, plan, stack)
    progress("done", 1.0)
    answer = _assemble(stack, optics, alignment, kappa, step, fields, clock, estimator.description)
    if baseline is not None:
        answer.baseline = _assemble(stack, optics, alignment, kappa, step, baseline, clock, {"name": "plane-sweep"})
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

    def put(self, rows: slice, cols: slice, estimate: Estimate, core: tuple[slice, slice]) -> None:
        for name in ("inverse_depth_dpt", "std_dpt", "confidence"):
            getattr(self, name)[rows, cols] = getattr(estimate, name)[core].cpu().numpy()
        self.aif[rows, cols] = estimate.aif[(slice(None), *core)].permute(1, 2, 0).cpu().numpy()


class _Estimator:
    """(frames, valid) of one tile to an `Estimate`: the chosen method with its weights loaded once."""

    def __init__(
        self, settings: Settings, focus_dpt: NDArray[np.float64], kappa: NDArray[np.float64], device: torch.device
    ) -> None:
        self.device = device
        self.focus_dpt = torch.as_tensor(focus_dpt, dtype=torch.float32, device=device)
        self.kappa = torch.as_tensor(kappa, dtype=torch.float32, device=device)
        self.refine_steps = settings.refine_steps
        self.compare = settings.compare and settings.method == "network"
        self.description: dict[str, Any] = {"name": settings.method, "refine_steps": settings.refine_steps}
        self.context: Photometry | None = None
        self.model: Any = None
        if settings.method == "network":
            from reconstruct.predict import load_network

            self.model = load_network(settings.weights, device)
            self.description["weights"] = self.model.identity

    def look_at(self, frames: NDArray[np.float32], valid: NDArray[np.bool_]) -> None:
        """Takes noise and exposure of all tiles from these frames, so that no tile differs from its neighbour."""
        if self.model is None or self.compare:
            tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).to(self.device)
            self.context = photometry(tensor, torch.from_numpy(valid).to(self.device))

    def __call__(self, frames: NDArray[np.float32], valid: NDArray[np.bool_]) -> tuple[Estimate, Estimate | None]:
        """The tile's estimate, and the plane sweep's where it is wanted for comparison."""
        tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(self.device)
        mask = torch.from_numpy(valid).to(self.device)
        if self.model is None:
            estimate = plane_sweep(tensor, self.focus_dpt, self.kappa, valid=mask, context=self.context)
        else:
            from reconstruct.predict import predict

            estimate = predict(self.model, tensor, self.focus_dpt, self.kappa, valid=mask)
        if self.refine_steps:
            from reconstruct.refine import refine

            estimate = refine(tensor, self.focus_dpt, self.kappa, estimate, steps=self.refine_steps, valid=mask)
        baseline = None
        if self.compare:
            baseline = plane_sweep(tensor, self.focus_dpt, self.kappa, valid=mask, context=self.context)
        return estimate, baseline


@dataclass(frozen=True)
class Overview:
    """All frames (S, h, w, 3), linear, reduced by a whole `factor` to about OVERVIEW_PX."""

    frames: NDArray[np.float32]
    factor: int


def read_overview(stack: FocalStack) -> Overview:
    """The frames reduced, each read once and in bands."""
    factor = max(1, int(np.ceil(max(stack.height, stack.width) / OVERVIEW_PX)))
    rows, cols = (slice(0, length // factor) for length in (stack.height, stack.width))
    frames = [_read_reduced(stack.linear, i, rows, cols, factor) for i in range(stack.n_frames)]
    return Overview(np.stack(frames), factor)


def _read_reduced(read: FrameReader, i: int, rows: slice, cols: slice, factor: int) -> NDArray[np.float32]:
    """Region (rows, cols) of frame i reduced by `factor`, (h, w, 3), a band at a time."""
    if factor == 1:
        return np.asarray(read(i, rows, cols), np.float32)
    full_cols = slice(cols.start * factor, cols.stop * factor)
    width = cols.stop - cols.start
    step = max(1, READ_PX // (width * factor * factor))
    out = np.empty((rows.stop - rows.start, width, 3), np.float32)
    for start in range(rows.start, rows.stop, step):
        stop = min(start + step, rows.stop)
        band = read(i, slice(start * factor, stop * factor), full_cols)
        reduced = cv2.resize(band, (width, stop - start), interpolation=cv2.INTER_AREA)
        out[start - rows.start : stop - rows.start] = reduced
    return out


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


def _require(kappa: NDArray[np.float64] | None) -> NDArray[np.float64]:
    assert kappa is not None
    return kappa


def _working_step(optics: StackOptics, kappa: NDArray[np.float64], max_coc_px: float, size: tuple[int, int]) -> int:
    """Whole factor by which frames are reduced so that the widest blur between two focus settings fits."""
    widest_px = float(kappa.max() * np.ptp(optics.focus_dpt))
    step = max(1, int(np.ceil(widest_px / max_coc_px)))
    if min(size) // step < 64:
        step = max(1, min(size) // 64)
    return step


def _tiles(height: int, width: int, tile_px: int) -> Iterator[tuple[slice, slice, slice, slice]]:
    """Cores that cover the image, and the same with a halo: (rows, cols, halo_rows, halo_cols)."""
    for rows, outer_rows in _spans(height, tile_px):
        for cols, outer_cols in _spans(width, tile_px):
            yield rows, cols, outer_rows, outer_cols


def _spans(length: int, tile_px: int) -> list[tuple[slice, slice]]:
    count = max(1, int(np.ceil(length / tile_px))) if length > tile_px + 2 * HALO_PX else 1
    ends = np.linspace(0, length, count + 1).astype(int)
    return [
        (slice(a, b), slice(max(0, a - HALO_PX), min(length, b + HALO_PX)))
        for a, b in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True)
    ]


def _read_tile(stack: FocalStack, alignment: Alignment, rows: slice, cols: slice, step: int) -> NDArray[np.float32]:
    """Aligned frames (S, h, w, 3) of a working-scale region."""

    def read(i: int, full_rows: slice, full_cols: slice) -> NDArray[np.float32]:
        return alignment.apply_tile(stack.linear, i, full_rows, full_cols)

    return np.stack([_read_reduced(read, i, rows, cols, step) for i in range(stack.n_frames)])


def _seen(alignment: Alignment, rows: slice, cols: slice, step: int) -> NDArray[np.bool_]:
    """Where each frame holds data on the reference's grid, (S, h, w), for a working-scale region."""
    y = (np.arange(rows.start, rows.stop)[:, None] + 0.5) * step - 0.5
    x = (np.arange(cols.start, cols.stop)[None, :] + 0.5) * step - 0.5
    masks = []
    for (a, b, c), (d, e, f) in alignment.matrices:
        x_in, y_in = a * x + b * y + c, d * x + e * y + f
        masks.append(
            (x_in >= -0.5) & (x_in <= alignment.width - 0.5) & (y_in >= -0.5) & (y_in <= alignment.height - 0.5)
        )
    return np.stack(masks)


def _estimate_tiled(
    stack: FocalStack,
    alignment: Alignment,
    estimator: _Estimator,
    step: int,
    tile_px: int,
    progress: Report,
) -> tuple[_Fields, _Fields | None]:
    height, width = stack.height // step, stack.width // step
    fields = _Fields.empty(height, width)
    baseline = _Fields.empty(height, width) if estimator.compare else None
    middle = _middle(height), _middle(width)
    estimator.look_at(_read_tile(stack, alignment, *middle, step), _seen(alignment, *middle, step))
    tiles = list(_tiles(height, width, tile_px))
    for done, (rows, cols, outer_rows, outer_cols) in enumerate(tiles):
        progress("estimating depth", 0.1 + 0.6 * done / len(tiles))
        frames = _read_tile(stack, alignment, outer_rows, outer_cols, step)
        seen = _seen(alignment, outer_rows, outer_cols, step)
        estimate, beside = estimator(frames, seen)
        everywhere = torch.from_numpy(seen.all(0)).to(estimate.confidence.device)
        core = _inside(rows, outer_rows), _inside(cols, outer_cols)
        fields.put(rows, cols, _less_sure(estimate, everywhere), core)
        if baseline is not None and beside is not None:
            baseline.put(rows, cols, _less_sure(beside, everywhere), core)
    return fields, baseline


def _middle(length: int) -> slice:
    start = max(0, (length - PHOTOMETRY_PX) // 2)
    return slice(start, min(length, start + PHOTOMETRY_PX))


def _less_sure(estimate: Estimate, everywhere: Tensor) -> Estimate:
    """`estimate` with half the confidence where some frame saw nothing."""
    return estimate._replace(confidence=torch.where(everywhere, estimate.confidence, 0.5 * estimate.confidence))


def _inside(core: slice, outer: slice) -> slice:
    return slice(core.start - outer.start, core.stop - outer.start)


def _carry_up(
    stack: FocalStack,
    alignment: Alignment,
    small: _Fields,
    focus_dpt: NDArray[np.float64],
    kappa: NDArray[np.float64],
    step: int,
    tile_px: int,
    device: torch.device,
    progress: Report,
) -> _Fields:
    """Working-scale maps at full size: depth follows the edges of the sharp image, which is fused at full size."""
    height, width = stack.height, stack.width
    fields = _Fields.empty(height, width)
    tiles = list(_tiles(height, width, tile_px))
    focus, gain = (torch.as_tensor(v, dtype=torch.float32, device=device) for v in (focus_dpt, kappa))
    for done, (rows, cols, outer_rows, outer_cols) in enumerate(tiles):
        progress("full size", 0.7 + 0.3 * done / len(tiles))
        frames = _read_tile(stack, alignment, outer_rows, outer_cols, 1)
        tensor = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous().to(device)
        rough = [_enlarged(m, step, outer_rows, outer_cols) for m in (small.inverse_depth_dpt, small.std_dpt)]
        seen = torch.from_numpy(_seen(alignment, outer_rows, outer_cols, 1)).to(device)
        sharp = fuse(tensor, focus, gain, *(torch.from_numpy(m).to(device) for m in rough), valid=seen)
        guide = cv2.cvtColor(np.sqrt(sharp.permute(1, 2, 0).cpu().numpy()), cv2.COLOR_RGB2GRAY)
        depth = guided_filter(guide, rough[0], radius=2 * step, epsilon=1e-4)
        core = _inside(rows, outer_rows), _inside(cols, outer_cols)
        fields.inverse_depth_dpt[rows, cols] = depth[core]
        fields.std_dpt[rows, cols] = rough[1][core]
        fields.confidence[rows, cols] = _enlarged(small.confidence, step, outer_rows, outer_cols)[core]
        fields.aif[rows, cols] = sharp.permute(1, 2, 0).cpu().numpy()[core]
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
    alignment: Alignment,
    kappa: NDArray[np.float64],
    step: int,
    fields: _Fields,
    clock: Clock,
    method: dict[str, Any],
) -> Reconstruction:
    std_dpt = _with_calibration_error(fields, optics) if optics.metric else fields.std_dpt
    intrinsics = optics.intrinsics
    residual = float(np.nanmax(alignment.residual_px)) if np.isfinite(alignment.residual_px).any() else None
    record = {
        "format": "daif-reconstruction/1",
        "metric": optics.metric,
        "method": method,
        "optics": {
            "source": optics.source,
            "focus_dpt": optics.focus_dpt.tolist(),
            "kappa_px_per_dpt": kappa.tolist(),
            "lens": stack.lens.model_dump() if stack.lens else None,
        },
        "intrinsics": vars(intrinsics),
        "alignment": {
            "scales": alignment.scales.tolist(),
            "shifts_px": alignment.shifts_px.tolist(),
            "residual_px": [None if np.isnan(r) else float(r) for r in alignment.residual_px],
        },
        "working_scale": 1 / step,
        "seconds": clock.seconds,
        "cpu_seconds": clock.cpu_seconds,
        "summary": {"alignment_residual_px": residual, "seconds": sum(clock.seconds.values())},
        "warnings": list(optics.warnings),
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
