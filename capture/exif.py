"""What a camera file says about its optics: standard EXIF tags by an own parser, maker notes through `exiftool`.

The parser reads the TIFF structure of JPEG, PNG, TIFF and TIFF-based RAW files, bounds-checked, and knows only the
standard tags. Focus distances live in encrypted or undocumented maker notes: the `exiftool` program reads them when
it is on the PATH (notes/capture.md 2.3). Such distances are priors with an uncertainty, never ground truth.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import math
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

NIKON_STEP = 10 ** (1 / 40) - 1  # F-mount maker notes count 0.01 m x 10^(n/40)
CANON_MAX_RATIO = 1.25  # a focus bracket wider than this says nothing useful

MIN_SENSOR_M, MAX_SENSOR_M = 0.003, 0.07  # outside, a resizer changed one tag and not the other

SENSOR_WIDTHS_MM = {  # from the makers' specification sheets; phones from the sensor's format
    "NIKON D70": 23.7,
    "NIKON D2Hs": 23.7,
    "NIKON D3100": 23.1,
    "NIKON D5300": 23.5,
    "NIKON D7000": 23.6,
    "Canon EOS 5D Mark II": 36.0,
    "Canon EOS 5D Mark III": 36.0,
    "Canon EOS 60D": 22.3,
    "Canon EOS 600D": 22.3,
    "Canon EOS 6D": 35.8,
    "Canon EOS 350D DIGITAL": 22.2,
    "Canon EOS M50": 22.3,
}

_TYPES = {1: "B", 2: "s", 3: "H", 4: "I", 5: "II", 6: "b", 7: "s", 8: "h", 9: "i", 10: "ii", 11: "f", 12: "d"}
_EXIF_IFD = 0x8769
_MAX_VALUES = 1 << 16


@dataclasses.dataclass(frozen=True)
class Exif:
    """Optics and exposure of one photograph; numbers are NaN, texts empty, where the file says nothing.

    `width_px` is the width at which the camera stored it, which a resized copy usually still carries.
    `sensor_width_m`, the sensor's long side whichever way the picture stands, comes with `sensor_width_source`:
    specification sheet, focal-plane resolution or 35 mm equivalent.
    `focus_distance_m` is counted from the sensor plane, as cameras do; `from_sensor_plane` converts.
    """

    make: str = ""
    model: str = ""
    lens_model: str = ""
    serial_number: str = ""
    date_time: str = ""
    focal_length_m: float = math.nan
    focal_length_35mm_m: float = math.nan
    f_number: float = math.nan
    iso: float = math.nan
    exposure_time_s: float = math.nan
    width_px: float = math.nan
    sensor_width_m: float = math.nan
    sensor_width_source: str = ""
    focus_distance_m: float = math.nan
    focus_distance_std_m: float = math.nan
    focus_distance_source: str = ""


def from_sensor_plane(distance_m: float, focal_length_m: float) -> float:
    """Distance from a thin lens's principal plane of an object `distance_m` from the sensor plane.

    With 1/u + 1/v = 1/f and u + v = D: u = (D + sqrt(D^2 - 4 f D)) / 2. Unknown focal lengths, and distances nearer
    than unit magnification (D < 4 f), leave the distance as it is.
    """
    if not math.isfinite(distance_m) or not distance_m > 4 * focal_length_m:
        return distance_m
    return 0.5 * (distance_m + math.sqrt(distance_m * (distance_m - 4 * focal_length_m)))


def read_exif(data: bytes, *, name: str = "") -> Exif:
    """What the standard EXIF tags of a camera file's bytes say; an empty `Exif` when it has none."""
    block = exif_block(data) or (data if is_tiff(data) else None)
    tags = read_tags(block) if block else {}
    if not tags:
        return Exif()
    model = _text(tags.get(0x0110))
    focal_m = _positive(tags.get(0x920A)) * 1e-3
    equivalent_m = _positive(tags.get(0xA405)) * 1e-3
    width_px = _positive(tags.get(0xA002))
    sensor_m, source = _sensor_width(tags, model, focal_m, equivalent_m, width_px)
    distance_m = _subject_distance(tags.get(0x9206))
    return Exif(
        make=_text(tags.get(0x010F)),
        model=model,
        lens_model=_text(tags.get(0xA434)),
        serial_number=_text(tags.get(0xA431)),
        date_time=_text(tags.get(0x9003)),
        focal_length_m=focal_m,
        focal_length_35mm_m=equivalent_m,
        f_number=_positive(tags.get(0x829D)),
        iso=_positive(tags.get(0x8827)),
        exposure_time_s=_positive(tags.get(0x829A)),
        width_px=width_px,
        sensor_width_m=sensor_m,
        sensor_width_source=source,
        focus_distance_m=distance_m,
        focus_distance_source="" if math.isnan(distance_m) else "exif",
    )


def exif_block(data: bytes) -> bytes | None:
    """The EXIF block (a TIFF structure) inside a JPEG or PNG, or None."""
    if data[:2] == b"\xff\xd8":
        for marker, start, end in jpeg_segments(data):
            if marker == 0xE1 and data[start : start + 6] == b"Exif\0\0":
                return data[start + 6 : end]
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        position = 8
        while position + 8 <= len(data):
            length, kind = struct.unpack_from(">I4s", data, position)
            if kind == b"eXIf":
                return data[position + 8 : position + 8 + length]
            position += 12 + length
    return None


def jpeg_segments(data: bytes) -> list[tuple[int, int, int]]:
    """(marker, start, end) of every segment's content up to and including the start of scan."""
    found = []
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in (0xFF, 0x01) or 0xD0 <= marker <= 0xD8:  # fill bytes and markers without content
            position += 1 if marker == 0xFF else 2
            continue
        (length,) = struct.unpack_from(">H", data, position + 2)
        found.append((marker, position + 4, position + 2 + length))
        if marker == 0xDA:
            break
        position += 2 + length
    return found


def is_tiff(data: bytes) -> bool:
    """Whether `data` begins like a TIFF or a TIFF-based RAW file."""
    return data[:4] in (b"II*\0", b"MM\0*", b"IIU\0", b"IIRO", b"IIRS")


def read_tags(tiff: bytes) -> dict[int, Any]:
    """Tags of a TIFF structure's first directory and of its EXIF directory: number to value, or a list of them.

    Damaged entries are skipped: reading metadata never fails.
    """
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None or len(tiff) < 8:
        return {}
    (first,) = struct.unpack_from(order + "I", tiff, 4)
    tags = _directory(tiff, order, first)
    extra = tags.get(_EXIF_IFD)
    if isinstance(extra, int):
        tags |= _directory(tiff, order, extra)
    return tags


def _directory(tiff: bytes, order: str, offset: int) -> dict[int, Any]:
    tags: dict[int, Any] = {}
    if not 0 <= offset <= len(tiff) - 2:
        return tags
    (count,) = struct.unpack_from(order + "H", tiff, offset)
    for i in range(count):
        entry = offset + 2 + 12 * i
        if entry + 12 > len(tiff):
            break
        tag, kind, n = struct.unpack_from(order + "HHI", tiff, entry)
        code = _TYPES.get(kind)
        if code is None or n > _MAX_VALUES:
            continue
        size = struct.calcsize("=" + code) * n
        start = entry + 8 if size <= 4 else struct.unpack_from(order + "I", tiff, entry + 8)[0]
        if start + size > len(tiff):
            continue
        tags[tag] = _value(tiff, order, code, n, start)
    return tags


def _value(tiff: bytes, order: str, code: str, n: int, start: int) -> Any:
    if code == "s":
        return tiff[start : start + n]
    values = struct.unpack_from(f"{order}{len(code) * n}{code[0]}", tiff, start)
    if len(code) == 2:  # rationals: 0xFFFFFFFF as numerator means infinity (EXIF 2.32, SubjectDistance)
        values = tuple(
            math.inf if top == 0xFFFFFFFF else top / bottom if bottom else math.nan
            for top, bottom in zip(values[::2], values[1::2], strict=True)
        )
    return values[0] if n == 1 else list(values)


def _text(value: Any) -> str:
    return value.split(b"\0")[0].decode("utf-8", "replace").strip() if isinstance(value, bytes) else ""


def _positive(value: Any) -> float:
    """A finite number above 0, else NaN: cameras write 0 for what they do not know."""
    value = value[0] if isinstance(value, list) and value else value
    return float(value) if isinstance(value, int | float) and 0 < value < math.inf else math.nan


def _subject_distance(value: Any) -> float:
    """SubjectDistance in metres; 0 means unknown, infinity is allowed."""
    return float(value) if isinstance(value, int | float) and value > 0 else math.nan


def _sensor_width(
    tags: dict[int, Any], model: str, focal_m: float, equivalent_m: float, width_px: float
) -> tuple[float, str]:
    """(the sensor's long side in metres, where it comes from), the most trustworthy source first."""
    if model in SENSOR_WIDTHS_MM:
        return SENSOR_WIDTHS_MM[model] * 1e-3, "specification"
    height_px = _positive(tags.get(0xA003))
    upright = height_px > width_px
    long_px, short_px = (height_px, width_px) if upright else (width_px, height_px)
    across, up = (_positive(tags.get(tag)) for tag in (0xA20E, 0xA20F))
    unit_m = {2.0: 0.0254, 3.0: 0.01, 4.0: 1e-3}.get(_positive(tags.get(0xA210, 2)), math.nan)
    width_m = long_px / (up if upright and up > 0 else across) * unit_m
    if MIN_SENSOR_M < width_m < MAX_SENSOR_M:
        return width_m, "focal-plane resolution"
    # 35 mm equivalence compares diagonals; that of 36 x 24 mm is 43.27 mm
    width_m = 0.04327 * focal_m / equivalent_m / math.hypot(1.0, short_px / long_px)
    if MIN_SENSOR_M < width_m < MAX_SENSOR_M:
        return width_m, "35 mm equivalent"
    return math.nan, ""


# --- maker notes


def read_files(paths: Sequence[Path]) -> list[Exif]:
    """What each file says: its standard tags, and its maker note's focus distance if `exiftool` is installed."""
    found = []
    for path, notes in zip(paths, _maker_notes(paths), strict=True):
        with path.open("rb") as file:
            data = file.read(1 << 20)  # the blocks of JPEG and PNG stand at the front
            standard = read_exif(data + file.read() if is_tiff(data) else data)
        found.append(merge_maker_notes(standard, notes))
    return found


def merge_maker_notes(standard: Exif, notes: dict[str, Any]) -> Exif:
    """`standard` completed with what `exiftool -json -n` said about the same file."""
    distance_m, std_m, source = _maker_focus(notes)
    numbers = {
        "focal_length_m": _number(notes.get("FocalLength")) * 1e-3,
        "focal_length_35mm_m": _number(notes.get("FocalLengthIn35mmFormat")) * 1e-3,
        "f_number": _number(notes.get("FNumber")),
        "iso": _number(notes.get("ISO")),
        "exposure_time_s": _number(notes.get("ExposureTime")),
    }
    texts = {"make": "Make", "model": "Model", "lens_model": "LensModel", "serial_number": "SerialNumber"}
    changes: dict[str, Any] = {
        name: value for name, value in numbers.items() if math.isnan(getattr(standard, name)) and 0 < value < math.inf
    }
    changes |= {name: str(notes[tag]) for name, tag in texts.items() if tag in notes and not getattr(standard, name)}
    if not math.isnan(distance_m):
        changes |= {
            "focus_distance_m": distance_m,
            "focus_distance_std_m": std_m,
            "focus_distance_source": source,
        }
    return dataclasses.replace(standard, **changes)


def _maker_focus(notes: dict[str, Any]) -> tuple[float, float, str]:
    """(focus distance, its standard error, source) of a maker note; NaN when it says nothing useful."""
    make = str(notes.get("Make", "")).upper()
    unknown = math.nan, math.nan, ""
    low, high = sorted((_number(notes.get("FocusDistanceLower")), _number(notes.get("FocusDistanceUpper"))))
    if 0 < low <= high < 655 and high / low <= CANON_MAX_RATIO:
        return math.sqrt(low * high), 0.5 * (high - low), "exif, bracket"
    distance = _number(notes.get("FocusDistance"))
    if not distance > 0 or "SONY" in make:  # exiftool itself doubts its formula for Sony
        return unknown
    if math.isinf(distance):
        return math.inf, math.nan, "exif"
    if "NIKON" in make and _on_nikon_grid(distance):
        return distance, distance * NIKON_STEP / math.sqrt(12.0), "exif, quantised"
    return distance, 0.05 * distance, "exif"


def _on_nikon_grid(distance_m: float) -> bool:
    code = 40 * math.log10(distance_m / 0.01)
    return abs(code - round(code)) < 0.02


def _number(value: Any) -> float:
    """A number of exiftool's JSON; its words for infinity and nonsense included."""
    if isinstance(value, str):
        text = value.strip().lower()
        with contextlib.suppress(ValueError):
            return math.inf if text.startswith("inf") else float(re.sub(r"\s*m$", "", text))
        return math.nan
    if not isinstance(value, int | float):
        return math.nan
    return math.inf if value >= 0xFFFFFFFF else float(value)


def _maker_notes(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """One dictionary of exiftool's tags per file; all empty when the program is missing or fails."""
    program = shutil.which("exiftool")
    nothing: list[dict[str, Any]] = [{} for _ in paths]
    if program is None or not paths:
        return nothing
    wanted = "Make Model LensModel SerialNumber FocalLength FocalLengthIn35mmFormat FNumber ISO ExposureTime "
    wanted += "FocusDistance FocusDistanceLower FocusDistanceUpper"
    command = [program, "-json", "-n", *(f"-{tag}" for tag in wanted.split()), "-@", "-"]
    names = [str(path.resolve()) for path in paths]
    if any("\n" in name for name in names):
        return nothing
    try:
        result = subprocess.run(
            command, input="\n".join(names), capture_output=True, text=True, timeout=30 + len(paths), check=False
        )
        answers = json.loads(result.stdout or "[]")
        by_name = {answer["SourceFile"]: answer for answer in answers}
    except (OSError, subprocess.SubprocessError, ValueError, TypeError, KeyError) as error:
        logger.warning("exiftool failed, focus distances of maker notes stay unknown: %s", error)
        return nothing
    return [by_name.get(name, {}) for name in names]
