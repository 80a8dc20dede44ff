"""Focus sweeps as data: where the frames go, and what the optics will let them say about depth.

A `FocusSweep` is planned, printed, saved beside the images and run again without a camera in sight. Blur is linear in
dioptres, so frames uniform in dioptres differ by equal blur; the gain in depth precision saturates when neighbouring
frames differ by 2 to 4 px of circle of confusion (notes/capture.md 4.1), hence 4 px by default.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, model_validator

from capture.config import load_yaml
from capture.errors import UsageError
from capture.lens import Lens, LensProfile, depth_error_m
from capture.output import write_text

Spacing = Literal["dioptre", "geometric", "metre", "explicit", "adaptive", "command"]

MAX_FRAMES = 999
STEP_PX = 4.0  # blur change between neighbouring frames; finer gains nothing, 8 px costs a third of the precision
WIDEST_STEP_PX = 8.0
FEWEST_USEFUL_FRAMES, MOST_USEFUL_FRAMES = 5, 20
LEAST_RANGE_PX = 2.0  # below this total blur change the optics do not see depth

# Standard deviation of the blur diameter in px, Cramer-Rao bound at the worst position of the range, by total blur
# range (rows) and number of frames (columns): textured surface, pillbox, 0.5 px floor. notes/capture.md 4.1.
_BOUND_RANGE_PX = np.array([8.0, 16.0, 32.0, 64.0])
_BOUND_FRAMES = np.array([3.0, 5.0, 8.0, 10.0, 20.0])
_BOUND_PX = np.array(
    [
        [0.039, 0.036, 0.037, 0.038, 0.038],
        [0.061, 0.046, 0.043, 0.044, 0.045],
        [0.109, 0.073, 0.060, 0.057, 0.057],
        [0.217, 0.137, 0.102, 0.092, 0.076],
    ]
)
# What the plane sweep reaches in practice (median over pixels of 15 scenes with noise, notes/performance.md 3.2): most
# of a scene has little texture, so the bound above is met at strong edges only.
TYPICAL_COC_ERROR_PX = 0.14

Metres = Annotated[float, PlainSerializer(lambda value: "inf" if math.isinf(value) else value, when_used="json")]


class FocusSweep(BaseModel):
    """Focus settings of one sweep, near to far; iterates over its positions in `unit`.

    Attributes:
        spacing: how frames lie between `near_m` and `far_m`: uniform in "dioptre" (default) or "metre", "geometric",
            "explicit" (`distances_m`), "adaptive" (decided on site from `scout_count` frames that are not kept), or
            "command" (`positions` in the camera's own `unit`, for lenses that no one has calibrated).
        near_m, far_m: nearest and farthest plane of focus in metres; `far_m` may be inf. Both ends are frames.
        count: number of frames; for lists it is their length.
        lens: optics that the plan was made for; kept for the record and for a stack that has nothing better.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    spacing: Spacing = "dioptre"
    near_m: Metres | None = None
    far_m: Metres | None = None
    count: int = Field(ge=2, le=MAX_FRAMES)
    distances_m: tuple[Metres, ...] | None = None
    positions: tuple[float, ...] | None = None
    unit: Literal["dioptre", "m", "step", "driver"] = "dioptre"
    scout_count: int = Field(default=9, ge=3, le=99)
    lens: Lens | None = None

    @model_validator(mode="before")
    @classmethod
    def _count_of_a_list(cls, value: Any) -> Any:
        if isinstance(value, dict) and "count" not in value:
            listed = value.get("distances_m") or value.get("positions")
            if isinstance(listed, list | tuple):
                return {**value, "count": len(listed)}
        return value

    @model_validator(mode="after")
    def _consistent(self) -> FocusSweep:
        if self.spacing == "command":
            self._check_list(self.positions, "positions", "dioptre")
            return self
        if self.positions is not None or self.unit != "dioptre":
            raise ValueError("positions and unit belong to spacing: command; distances are given in metres")
        if self.spacing == "explicit":
            self._check_list(self.distances_m, "distances_m", "m")
            return self
        if self.distances_m is not None:
            raise ValueError("distances_m belongs to spacing: explicit")
        near_m, far_m = self.near_m, self.far_m
        if near_m is None or far_m is None:
            raise ValueError(f"near_m and far_m are needed for spacing: {self.spacing}")
        if not (math.isfinite(near_m) and near_m >= 1e-3):
            raise ValueError(f"near_m {near_m:g} must be a distance in metres, 0.001 or more")
        if not far_m > near_m:
            raise ValueError(f"far_m {far_m:g} must be larger than near_m {near_m:g}")
        if math.isinf(far_m) and self.spacing in ("metre", "geometric"):
            raise ValueError(f"far_m inf needs spacing: dioptre; {self.spacing} cannot reach it")
        if len(set(self._distances())) != self.count:
            raise ValueError(f"{self.count} frames between {near_m:g} m and {far_m:g} m fall together; take fewer")
        return self

    def _check_list(self, values: tuple[float, ...] | None, name: str, kind: Literal["m", "dioptre"]) -> None:
        if values is None or len(values) < 2:
            raise ValueError(f"{name} with two or more entries is needed for spacing: {self.spacing}")
        if len(values) != self.count:
            raise ValueError(f"count is {self.count} and {name} has {len(values)} entries; leave count out")
        if self.near_m is not None or self.far_m is not None:
            raise ValueError(f"near_m and far_m do not go with {name}; the list says where the frames are")
        allowed_inf = kind == "m"
        for value in values:
            if math.isnan(value) or (math.isinf(value) and not (allowed_inf and value > 0)):
                raise ValueError(f"{name} has {value}, a finite number is needed")
            if kind == "m" and value < 1e-3:
                raise ValueError(f"{name} has {value:g}; distances are metres, 0.001 or more")
        rising = [after > before for before, after in itertools.pairwise(values)]
        falling = [after < before for before, after in itertools.pairwise(values)]
        if not (all(rising) or (kind == "dioptre" and all(falling))):
            order = "rise from near to far" if kind == "m" else "rise or fall steadily"
            raise ValueError(f"{name} must {order} without repeats, so that the lens approaches from one side")

    def _distances(self) -> tuple[float, ...]:
        assert self.near_m is not None and self.far_m is not None
        if self.spacing == "metre":
            inner = np.linspace(self.near_m, self.far_m, self.count)
        elif self.spacing == "geometric":
            inner = np.geomspace(self.near_m, self.far_m, self.count)
        else:
            inner = 1.0 / np.linspace(1.0 / self.near_m, 1.0 / self.far_m, self.count)[:-1]
        # both ends exactly as asked, not as rounded by the division
        return (self.near_m, *(float(d) for d in inner[1 : self.count - 1]), self.far_m)

    @property
    def focus_distance_m(self) -> NDArray[np.float64]:
        """(S,) planes of focus in metres, near to far; NaN for a sweep in camera units."""
        if self.spacing == "command":
            return np.full(self.count, np.nan)
        return np.array(self.distances_m if self.distances_m is not None else self._distances())

    @property
    def focus_dpt(self) -> NDArray[np.float64]:
        """(S,) focus settings in dioptres; NaN for a sweep in camera units."""
        return 1.0 / self.focus_distance_m

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[float]:  # type: ignore[override]  # pydantic iterates over fields, a sweep over frames
        return iter(self.positions if self.positions is not None else (float(q) for q in self.focus_dpt))

    @property
    def sha256(self) -> str:
        """Identity of the plan: two plans with this in common ask for the same frames."""
        return hashlib.sha256(self.model_dump_json(exclude={"lens"}).encode()).hexdigest()

    def to_yaml(self) -> str:
        """The plan as text that `read` accepts."""
        return yaml.safe_dump(self.model_dump(mode="json", exclude_defaults=True), sort_keys=False)

    def write(self, path: Path) -> None:
        """Write the plan to `path` as YAML, whole or not at all."""
        text = f"# focus sweep of {self.count} frames; distances in metres\n{self.to_yaml()}"
        write_text(path, text)

    @classmethod
    def read(cls, path: Path) -> FocusSweep:
        """The plan in the YAML file `path`; `UsageError` names the line of what is wrong."""
        return load_yaml(path, cls)


Optic = Lens | LensProfile


def plan_sweep(
    near_m: float,
    far_m: float,
    *,
    lens: Optic | None = None,
    count: int | None = None,
    spacing: Spacing = "dioptre",
    step_px: float = STEP_PX,
) -> FocusSweep:
    """A sweep from `near_m` to `far_m`, with as many frames as `step_px` of blur change per frame asks for (5 to 20).

    Args:
        lens: optics at the resolution of the reconstruction; needed when `count` is None.
        count: number of frames, instead of the one that follows from the optics.
    """
    if count is None:
        if lens is None:
            raise UsageError("say how many frames (--count) or which lens (--lens), from which the number follows")
        if not (0 < near_m < far_m and math.isfinite(near_m)):
            raise UsageError(f"near {near_m:g} m and far {far_m:g} m: near must be positive and smaller than far")
        if not step_px > 0:
            raise UsageError(f"--step-px must be positive, got {step_px:g}")
        wanted = 1 + math.ceil(blur_range_px(lens, near_m, far_m) / step_px - 1e-9)
        count = min(max(wanted, FEWEST_USEFUL_FRAMES), MOST_USEFUL_FRAMES)
    try:
        return FocusSweep(spacing=spacing, near_m=near_m, far_m=far_m, count=count, lens=_plain(lens))
    except ValueError as error:
        raise UsageError(_first_sentence(error)) from None


def explicit_sweep(distances_m: tuple[float, ...], *, lens: Optic | None = None) -> FocusSweep:
    """A sweep through these planes of focus in metres, near to far."""
    try:
        return FocusSweep(spacing="explicit", distances_m=distances_m, count=len(distances_m), lens=_plain(lens))
    except ValueError as error:
        raise UsageError(_first_sentence(error)) from None


def command_sweep(positions: tuple[float, ...], unit: Literal["dioptre", "m", "step", "driver"]) -> FocusSweep:
    """A sweep through positions in the camera's own unit, for a lens that is not calibrated."""
    try:
        return FocusSweep(spacing="command", positions=positions, unit=unit, count=len(positions))
    except ValueError as error:
        raise UsageError(_first_sentence(error)) from None


def _plain(lens: Optic | None) -> Lens | None:
    return lens if isinstance(lens, Lens) else None


def _first_sentence(error: ValueError) -> str:
    """The message of the first problem of a pydantic error."""
    problems = error.errors(include_url=False) if hasattr(error, "errors") else []
    if not problems:
        return str(error)
    where = ".".join(str(part) for part in problems[0]["loc"])
    text = problems[0]["msg"].removeprefix("Value error, ")
    return f"plan: {where}: {text}" if where else f"plan: {text}"


# --- what the optics allow


@dataclass(frozen=True)
class PlannedFrame:
    """One frame of an assessed plan; the blur step leads to the next frame, NaN for the last."""

    focus_distance_m: float
    focus_dpt: float
    step_px: float
    bound_m: float
    typical_m: float


@dataclass(frozen=True)
class Assessment:
    """What a plan will deliver.

    Attributes:
        range_px: change of blur diameter from the first to the last frame.
        widest_step_px: largest blur change between neighbouring frames.
        coc_bound_px: best possible standard deviation of the blur diameter on a textured surface (Cramer-Rao).
        frames: where each lies, the blur step to the next, and the depth precision for a surface there: `bound_m` from
            the Cramer-Rao bound and `typical_m` from what the plane sweep reaches in practice; inf at infinity.
        seconds, bytes: estimated duration and size; bytes are None while the image size is not known.
        warnings: sentences about what will not work and what to do.
    """

    range_px: float
    widest_step_px: float
    coc_bound_px: float
    frames: tuple[PlannedFrame, ...]
    seconds: float
    bytes: int | None
    warnings: tuple[str, ...]


def blur_range_px(lens: Optic, near_m: float, far_m: float) -> float:
    """Change of blur diameter in px over the range, with the gain of its middle."""
    middle_dpt = 0.5 * (1.0 / near_m + 1.0 / far_m)
    return float(_kappa(lens, np.array([middle_dpt]))[0] * (1.0 / near_m - 1.0 / far_m))


def coc_bound_px(range_px: float, count: int) -> float:
    """Smallest possible standard deviation of a blur diameter in px on texture (notes/capture.md 4.1)."""
    log_range = np.log(np.clip(range_px, _BOUND_RANGE_PX[0], _BOUND_RANGE_PX[-1]))
    log_count = np.log(np.clip(count, _BOUND_FRAMES[0], _BOUND_FRAMES[-1]))
    per_range = [float(np.interp(log_count, np.log(_BOUND_FRAMES), row)) for row in _BOUND_PX]
    beyond = max(range_px / _BOUND_RANGE_PX[-1], 1.0)  # the table's last rows grow like this when frames are far apart
    return beyond * float(np.interp(log_range, np.log(_BOUND_RANGE_PX), per_range))


def assess(
    sweep: FocusSweep,
    lens: Optic,
    *,
    seconds_per_frame: float = 2.5,
    image_shape: tuple[int, int] | None = None,
    raw: bool = False,
) -> Assessment:
    """What `sweep` can see through `lens`, at the resolution that `lens` is given for.

    Args:
        seconds_per_frame: move, settle, exposure and transfer; 2.5 s is a usual tethered body.
        image_shape: (H, W) of the frames as stored, for the estimate of bytes.
        raw: frames are 16 bit and the camera's RAW file is kept beside the JPEG.
    """
    focus_dpt = sweep.focus_dpt
    if not np.all(np.isfinite(focus_dpt)):
        raise UsageError("a sweep in camera units says nothing about distances; plan in metres to assess it")
    if isinstance(lens, Lens):
        problem = lens.focus_problem(sweep.focus_distance_m, [str(i) for i in range(len(sweep))])
        if problem:
            raise UsageError(f"plan: {problem}")
    kappa = _kappa(lens, focus_dpt)
    steps_px = np.abs(np.diff(focus_dpt)) * 0.5 * (kappa[1:] + kappa[:-1])
    range_px = float(steps_px.sum())
    bound_px = coc_bound_px(range_px, len(sweep))
    frames = tuple(
        PlannedFrame(
            focus_distance_m=float(distance_m),
            focus_dpt=float(q),
            step_px=float(step),
            bound_m=float(depth_error_m(distance_m, k, bound_px)),
            typical_m=float(depth_error_m(distance_m, k, max(TYPICAL_COC_ERROR_PX, bound_px))),
        )
        for distance_m, q, k, step in zip(sweep.focus_distance_m, focus_dpt, kappa, [*steps_px, math.nan], strict=True)
    )
    size = None
    if image_shape is not None:
        pixels = image_shape[0] * image_shape[1]
        # JPEG about 0.4 and RAW about 1.3 bytes per pixel beside the stored frame
        size = round(len(sweep) * pixels * ((6 + 1.7) if raw else (3 + 0.4)))
    widest = float(steps_px.max())
    return Assessment(
        range_px=range_px,
        widest_step_px=widest,
        coc_bound_px=bound_px,
        frames=frames,
        seconds=len(sweep) * seconds_per_frame,
        bytes=size,
        warnings=tuple(_warnings(sweep, lens, range_px, widest)),
    )


def _warnings(sweep: FocusSweep, lens: Optic, range_px: float, widest_px: float) -> Iterator[str]:
    if range_px < LEAST_RANGE_PX:
        yield (
            f"these optics cannot see this depth: blur changes by only {range_px:.2g} px over the whole range and "
            f"{LEAST_RANGE_PX:g} px is the least; open the aperture, come closer, use a longer lens or more resolution"
        )
    if widest_px > WIDEST_STEP_PX:
        factor = widest_px / WIDEST_STEP_PX
        remedy = f"reconstruct at 1/{math.ceil(factor)} of the resolution"
        if isinstance(lens, Lens):
            remedy = f"stop down to f/{lens.f_number * factor:.2g}, or {remedy}"
        yield (
            f"neighbouring frames differ by up to {widest_px:.1f} px of blur, more than {WIDEST_STEP_PX:g} px: "
            f"{remedy}, or take {math.ceil(range_px / WIDEST_STEP_PX) + 1} frames"
        )
    if len(sweep) > 2 and 0 < range_px / (len(sweep) - 1) < 1.0 and range_px >= LEAST_RANGE_PX:
        yield (
            f"{len(sweep)} frames are closer than 1 px of blur, which gains nothing; "
            f"{max(FEWEST_USEFUL_FRAMES, 1 + math.ceil(range_px / STEP_PX))} would do"
        )


def _kappa(lens: Optic, focus_dpt: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(lens.kappa_px_per_dpt(focus_dpt), np.float64)


# --- lenses on the command line


class _AnyLens(BaseModel):
    """Reads the one key that tells the two kinds of lens files apart."""

    model_config = ConfigDict(extra="allow")

    format: str | None = None


_LENS_TEXT = re.compile(
    r"\s*(?P<focal>[\d.]+)\s*mm[\s,]+f/?\s*(?P<number>[\d.]+)[\s,]+(?:pitch\s+)?(?P<pitch>[\d.]+)\s*(?:um|µm|μm)\s*",
    re.IGNORECASE,
)


def read_lens(text: str) -> Optic:
    """A lens from a YAML file (plain optics or a calibrated profile) or from words like "50mm f/2.8 12um".

    Raises:
        UsageError: neither a file nor such words, or not a lens.
    """
    path = Path(text)
    if path.suffix.lower() in (".yaml", ".yml") or path.is_file():
        return LensProfile.read(path) if load_yaml(path, _AnyLens).format is not None else load_yaml(path, Lens)
    found = _LENS_TEXT.fullmatch(text)
    if not found:
        raise UsageError(
            f"--lens {text!r} is neither a YAML file nor optics in words such as '50mm f/2.8 12um' "
            f"(focal length, f-number, pixel pitch of the stored image)"
        )
    try:
        return Lens(
            focal_length_m=float(found["focal"]) * 1e-3,
            f_number=float(found["number"]),
            pixel_pitch_m=float(found["pitch"]) * 1e-6,
        )
    except ValueError as error:
        raise UsageError(f"--lens {text!r}: {_first_sentence(error)}") from None


# --- adaptive: frames where the scene is


def place_frames(
    scout_dpt: NDArray[np.float64],
    focus_measure: NDArray[np.float64],
    count: int,
    *,
    lens: Optic | None = None,
    step_px: float = STEP_PX,
) -> FocusSweep:
    """An explicit sweep of at most `count` frames over the distances at which a scout sweep saw something sharp.

    The sharpest scout frame of every tile votes for its dioptre, weighted by how clearly it stands out of the tile's
    other frames; tiles without a peak do not vote. Frames then lie at equal shares of the votes mixed with an even
    floor, so that an empty stretch between foreground and background gets few frames but none is left without any.

    Args:
        scout_dpt: (K,) focus of the scout frames.
        focus_measure: (K, tiles) energy of detail per frame and tile.
        count: most frames to spend.
        lens: with it, no more frames than `step_px` of blur change per frame are taken.
    """
    order = np.argsort(scout_dpt)
    dpt, measure = scout_dpt[order], focus_measure[order]
    peak = measure.argmax(axis=0)
    top, low = measure.max(axis=0), np.median(measure, axis=0)
    contrast = np.where(top > 0, (top - low) / np.maximum(top, 1e-12), 0.0)
    weight = np.where(contrast > 0.25, contrast, 0.0)
    if not np.any(weight > 0):
        raise UsageError("the scout sweep saw nothing sharp anywhere; widen near and far, or add light and texture")
    votes = np.bincount(peak, weights=weight, minlength=dpt.size)
    votes = np.where(votes > 0.02 * votes.sum(), votes, 0.0)
    first, last = np.flatnonzero(votes)[[0, -1]]
    # a peak at frame k means content anywhere up to its neighbours
    low_dpt, high_dpt = dpt[max(first - 1, 0)], dpt[min(last + 1, dpt.size - 1)]
    if lens is not None:
        by_blur = 1 + math.ceil(blur_range_px(lens, 1.0 / high_dpt, _metres(low_dpt)) / step_px)
        count = min(count, max(by_blur, FEWEST_USEFUL_FRAMES))
    grid = np.linspace(low_dpt, high_dpt, 512)
    density = np.interp(grid, dpt, votes / votes.max()) + 0.25
    share = np.concatenate([[0.0], np.cumsum(0.5 * (density[1:] + density[:-1]))])
    placed = np.interp(np.linspace(0.0, share[-1], count), share, grid)
    return explicit_sweep(tuple(_metres(q) for q in placed[::-1]), lens=lens)


def _metres(dioptre: float) -> float:
    return math.inf if dioptre <= 0 else float(1.0 / dioptre)
