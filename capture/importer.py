"""Folders of photographs to focal stacks: with a `stack.yaml`, or with what EXIF says (design section 3).

With `stack.yaml` the frames, their order and their focus distances are the user's word, and contradictions are
refused. Without it the images are sorted by name, the optics come from EXIF, and focus distances from maker notes
when `exiftool` is installed; what is not known stays NaN, and such a stack is uncalibrated.

EXIF distances count from the sensor and are stored from the front principal plane (thin lens). Quantised ones may
repeat: neighbours with one distance keep their order and are spread evenly inside the quantisation step (source
"exif, quantised"); the step's standard deviation stands beside them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator

from capture.config import load_yaml
from capture.decode import RAW_SUFFIXES, Decoded, decode_image, is_image_name
from capture.errors import DataError, UsageError
from capture.exif import Exif, from_sensor_plane, read_files
from capture.lens import Lens
from capture.plan import read_lens
from capture.stack import FocusUnit, StackWriter, Transfer, distance_problem, spread_ties

STACK_FILE = "stack.yaml"


class FrameEntry(BaseModel):
    """One photograph of a stack.

    Attributes:
        file: name relative to the folder.
        focus_distance_m: lens (front principal plane) to plane of focus; `.inf` is infinity, null is unknown.
        focus_distance_std_m: its standard error; 0 is exact, and then reconstruction does not correct it by the frames.
        focus_distance_source: where it comes from.
        focus_command: focus position in `focus_unit`, e.g. a webcam's focus register.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    focus_distance_m: float | None = None
    focus_distance_std_m: float | None = Field(default=None, ge=0)
    focus_distance_source: str = "operator"
    focus_command: float | None = None
    exposure_time_s: float | None = Field(default=None, gt=0)
    f_number: float | None = Field(default=None, gt=0)
    iso: float | None = Field(default=None, gt=0)

    @field_validator("focus_distance_m")
    @classmethod
    def _in_front_of_the_lens(cls, value: float | None) -> float | None:
        if value is not None and not value > 0:  # NaN too
            raise ValueError(f"{value:g} is not a focus distance in metres; leave it out if it is not known")
        return value


class StackFile(BaseModel):
    """What `stack.yaml` may say about a folder of photographs.

    Attributes:
        transfer: curve of the stored values; left out: srgb, or linear for RAW.
        lens: optics of the *stored* image, or the path of a lens.yaml, relative to the folder.
        focus_unit: unit of the frames' `focus_command`.
        raw_half_size: develop RAW at half size, without interpolation (the default).
        frames: in the order of the sweep; left out: all images of the folder, sorted by name.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    transfer: Transfer | None = None
    lens: Lens | str | None = None
    focus_unit: FocusUnit = "driver"
    raw_half_size: bool = True
    frames: tuple[FrameEntry, ...] = ()


@dataclasses.dataclass(frozen=True)
class _Photograph:
    """One frame before its pixels are read; distance from the front principal plane, NaN unknown."""

    path: Path
    entry: FrameEntry
    exif: Exif
    distance_m: float
    std_m: float
    source: str


@dataclasses.dataclass(frozen=True)
class _Sweep:
    """What is known of a folder before its pixels are read; `events` is what was decided on the way."""

    folder: Path
    settings: StackFile
    photographs: list[_Photograph]
    events: list[tuple[str, dict[str, Any]]]


def import_folder(
    folder: str | Path,
    out: str | Path,
    *,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Make a focal stack of the photographs in `folder`; returns the path of the stack.

    Args:
        overwrite: replace `out` if it exists.
        progress: called with (frames done, frames in all).

    Raises:
        UsageError: no such folder, a mistake in stack.yaml, or `out` exists or cannot be written.
        DataError: fewer than two images, images that differ in size, damaged images, impossible distances.
        NoSpaceError: the disk cannot hold the stack.
    """
    folder, out = Path(folder), Path(out)
    sweep = _read_sweep(folder)
    settings, photographs = sweep.settings, sweep.photographs
    for source in (folder / STACK_FILE, *(photograph.path for photograph in photographs)):
        if out.resolve() == source.resolve():
            raise UsageError(f"{out} is one of the files that are read; choose another name for the stack")
    first = _decode(sweep, 0, None)
    height, width, channels = first.pixels.shape
    lens, profile_yaml, lens_info = _optics(sweep, width, height)
    with StackWriter.create(
        out,
        n_frames=len(photographs),
        height=height,
        width=width,
        channels=channels,
        dtype=first.pixels.dtype,
        transfer=settings.transfer or first.transfer,
        white_level=first.white_level,
        focus_unit=settings.focus_unit,
        lens=lens,
        lens_info=lens_info,
        camera=_camera(photographs[0].exif, first),
        profile_yaml=profile_yaml,
        exif=first.exif,
        image_info={"bit_depth": 8 * first.pixels.dtype.itemsize, "orientation": "as stored"},
        overwrite=overwrite,
        sync=False,
    ) as writer:
        try:
            for kind, details in sweep.events:
                writer.event(kind, **details)
            for i, photograph in enumerate(photographs):
                decoded = first if i == 0 else _decode(sweep, i, first)
                for note in decoded.notes:
                    writer.event("image_note", file=photograph.entry.file, note=note)
                _append(writer, i, photograph, decoded)
                if progress:
                    progress(i + 1, len(photographs))
            return writer.finish()
        except BaseException:
            writer.discard()
            raise


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Sort key under which `frame_10` follows `frame_9`."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", name.lower()) if part]


# --- what is known before pixels are read


def _read_sweep(folder: Path) -> _Sweep:
    if not folder.exists():
        raise UsageError(f"the folder {folder} does not exist; check the name")
    if not folder.is_dir():
        raise UsageError(f"{folder} is a file, a folder of photographs was expected")
    description = folder / STACK_FILE
    settings = load_yaml(description, StackFile) if description.exists() else StackFile()
    entries = settings.frames or tuple(FrameEntry(file=name, focus_distance_source="") for name in image_names(folder))
    if not entries:
        raise DataError(
            f"{folder} has no images (JPEG, PNG, TIFF or camera RAW); give the folder that holds the frames"
        )
    if len(entries) < 2:
        raise DataError(f"{folder} has one image, {entries[0].file}; a focal stack needs at least 2 frames")
    names = [entry.file for entry in entries]
    for name, times in Counter(names).items():
        if times > 1:
            raise DataError(f"{description}: {name} is listed twice; keep one")
        if not (folder / name).is_file():
            raise DataError(f"{folder / name}, named in {description}, does not exist; correct `file`")
    exif = read_files([folder / name for name in names])
    if any("focus_distance_m" in entry.model_fields_set for entry in entries):
        distances = [_or_nan(entry.focus_distance_m) for entry in entries]
        problem = distance_problem(distances, [str(i) for i in range(len(entries))])
        if problem:
            raise DataError(f"{description}: {problem}")
        photographs = [
            _Photograph(
                folder / entry.file,
                entry,
                one,
                distance,
                _or_nan(entry.focus_distance_std_m),
                "" if math.isnan(distance) else entry.focus_distance_source,
            )
            for entry, one, distance in zip(entries, exif, distances, strict=True)
        ]
        return _Sweep(folder, settings, photographs, [])
    return _with_exif_distances(folder, settings, entries, exif)


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


def image_names(folder: Path) -> list[str]:
    """Names of the images of a folder, sorted as people count; a RAW file wins over the JPEG shot with it."""
    names = [path.name for path in folder.iterdir() if path.is_file() and is_image_name(path.name)]
    names = sorted((name for name in names if not name.startswith(".")), key=natural_key)
    raw_stems = {Path(name).stem for name in names if _is_raw(name)}
    return [name for name in names if _is_raw(name) or Path(name).stem not in raw_stems]


def _is_raw(name: str) -> bool:
    return Path(name).suffix.lower() in RAW_SUFFIXES


def _with_exif_distances(
    folder: Path, settings: StackFile, entries: Sequence[FrameEntry], exif: Sequence[Exif]
) -> _Sweep:
    """The frames with focus distances from EXIF as far as they make one sweep; what was done to them is an event."""
    events: list[tuple[str, dict[str, Any]]] = []
    pairs = list(zip(entries, exif, strict=True))
    reported = [one.focus_distance_m for one in exif]
    if not settings.frames and not any(map(math.isnan, reported)) and _turns(reported):
        pairs.sort(key=lambda pair: pair[1].focus_distance_m)
        reported = [one.focus_distance_m for _, one in pairs]
        events.append(("reordered", {"by": "EXIF focus distance", "files": [entry.file for entry, _ in pairs]}))
    known = [distance for distance in reported if not math.isnan(distance)]
    distances = spread_ties(reported)
    problem = distance_problem(distances, [str(i) for i in range(len(distances))])
    if known and all(map(math.isnan, distances)):
        problem = f"all frames report {known[0]:g} m"
    if problem:
        events.append(("exif_distances_ignored", {"reason": problem, "reported_m": reported}))
        distances = [math.nan] * len(distances)
    elif distances != reported and known:
        events.append(("ties_spread", {"reported_m": reported, "used_m": distances}))
    photographs = []
    for (entry, one), distance in zip(pairs, distances, strict=True):
        unknown = math.isnan(distance)
        photographs.append(
            _Photograph(
                folder / entry.file,
                entry,
                one,
                from_sensor_plane(distance, one.focal_length_m),
                math.nan if unknown else one.focus_distance_std_m,
                "" if unknown else one.focus_distance_source,
            )
        )
    return _Sweep(folder, settings, photographs, events)


def _turns(distance_m: Sequence[float]) -> bool:
    steps = [b - a for a, b in itertools.pairwise(distance_m) if a != b]
    return any(step > 0 for step in steps) and any(step < 0 for step in steps)


def _optics(sweep: _Sweep, width: int, height: int) -> tuple[Lens | None, str | None, dict[str, str | float]]:
    """(lens, text of the lens profile, attributes to keep) for stored images of this size."""
    exif = [photograph.exif for photograph in sweep.photographs]
    info: dict[str, str | float] = {
        name: value for name, value in (("make", exif[0].make), ("model", exif[0].lens_model)) if value
    }
    given = sweep.settings.lens
    if given is not None:
        optic = given if isinstance(given, Lens) else read_lens(str(sweep.folder / given))
        info["source"] = given if isinstance(given, str) else STACK_FILE
        if not isinstance(optic, Lens):
            return None, (sweep.folder / str(given)).read_text(encoding="utf-8"), info
        if problem := _focus_problem(optic, sweep):
            raise DataError(f"{sweep.folder / STACK_FILE}: {problem}")
        return optic, None, info
    focal_m, f_number = (_common([getattr(one, name) for one in exif]) for name in ("focal_length_m", "f_number"))
    pitch_m = exif[0].sensor_width_m / max(width, height)  # both of the long side; pictures may stand upright
    if any(math.isnan(number) for number in (focal_m, f_number, pitch_m)):
        return None, None, info
    info |= {"source": "exif", "pixel_pitch_source": exif[0].sensor_width_source}
    try:
        lens = Lens(focal_length_m=focal_m, f_number=f_number, pixel_pitch_m=pitch_m)
        problem = _focus_problem(lens, sweep)
    except ValueError as error:
        problem = " ".join(str(error).split())
    if problem:
        sweep.events.append(("exif_lens_ignored", {"reason": problem}))
        return None, None, info
    return lens, None, info


def _focus_problem(lens: Lens, sweep: _Sweep) -> str | None:
    """Why `lens` cannot be focused where the frames are said to be, or None."""
    names = [photograph.entry.file for photograph in sweep.photographs]
    return lens.focus_problem([photograph.distance_m for photograph in sweep.photographs], names)


def _common(values: Sequence[float]) -> float:
    """The value that all agree on within 1 %, else NaN."""
    known = [value for value in values if not math.isnan(value)]
    if len(known) < len(values) or max(known) > 1.01 * min(known):
        return math.nan
    return float(np.median(known))


def _camera(exif: Exif, first: Decoded) -> dict[str, str | float]:
    found: dict[str, Any] = {
        "make": exif.make,
        "model": exif.model,
        "serial_number": exif.serial_number,
        "driver": "import",
        "raw_white_balance": first.white_balance,
    }
    if not math.isnan(exif.sensor_width_m):
        found["sensor_width"] = exif.sensor_width_m
    return {name: value for name, value in found.items() if value}


# --- pixels


def _decode(sweep: _Sweep, i: int, first: Decoded | None) -> Decoded:
    """Frame `i`, which must be like the first one."""
    path, settings = sweep.photographs[i].path, sweep.settings
    decoded = decode_image(path, white_balance=first.white_balance if first else None, half_size=settings.raw_half_size)
    if decoded.white_balance is not None and settings.transfer not in (None, "linear"):
        raise UsageError(
            f"{sweep.folder / STACK_FILE}: transfer: {settings.transfer} does not fit {path.name}: RAW files are "
            "linear; leave it out"
        )
    if first is not None and _kind(decoded) != _kind(first):
        raise DataError(
            f"{path} is {_kind(decoded)} and {sweep.photographs[0].path.name} is {_kind(first)}; all frames of a stack "
            "must be alike, so take out what is not part of it"
        )
    return decoded


def _kind(decoded: Decoded) -> str:
    height, width, channels = decoded.pixels.shape
    colour = "grey" if channels == 1 else "RGB"
    return f"{width} x {height} px {8 * decoded.pixels.dtype.itemsize}-bit {decoded.transfer} {colour}"


def _append(writer: StackWriter, i: int, photograph: _Photograph, decoded: Decoded) -> None:
    """Store one frame; what stack.yaml says wins over EXIF."""
    entry, exif = photograph.entry, photograph.exif
    writer.append(
        i,
        decoded.pixels,
        focus_distance_m=photograph.distance_m,
        focus_distance_std_m=photograph.std_m,
        focus_distance_source=photograph.source,
        focus_command=_or_nan(entry.focus_command),
        exposure_time_s=entry.exposure_time_s or exif.exposure_time_s,
        f_number=entry.f_number or exif.f_number,
        iso=entry.iso or exif.iso,
        timestamp_s=math.nan,
        metadata={
            name: value
            for name, value in dataclasses.asdict(exif).items()
            if value != "" and not (isinstance(value, float) and not math.isfinite(value))
        },
        source_file=(entry.file, hashlib.sha256(photograph.path.read_bytes()).hexdigest()),
    )
