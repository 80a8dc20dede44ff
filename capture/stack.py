"""Focal stacks on disk: the HDF5 layout, format version 1, its crash-safe writer and its suspicious reader.

Layout (S planned frames of H x W pixels; text is fixed-length UTF-8, structured text is JSON or YAML as bytes):

    /                     attributes format, format_version, uuid, created, software, complete, plan_sha256
    /stack/frames         (S, H, W, C) u8 or u16, C = 1 or 3, RGB; attributes transfer_function, white_level, ...
    /stack/status         (S,) u8: 0 pending, 1 ok, 2 failed; written last
    /stack/<name>         (S,) per-frame numbers and texts, see `_NUMBERS` and `_TEXTS`
    /lens, /camera        attributes
    /calibration/*        lens_profile (YAML), board (JSON)
    /ground_truth/*       depth (H, W) f4 metres, all_in_focus (H, W, 3) f4 linear
    /plan, /exif, /events bytes: JSON, the camera's EXIF block, JSON lines

The writer allocates everything before the first frame and later only overwrites bytes in place, so the structure of
the file cannot be torn: a frame is written and flushed, then its status, then flushed and synced. The file is called
`*.h5.partial` until it is complete. Layout and protocol: notes/capture.md 5. This is the only importer of h5py.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, cast, get_args

import h5py
import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from capture.errors import DaifError, DataError, NoSpaceError, UsageError
from capture.exif import NIKON_STEP
from capture.lease import Lease
from capture.lens import Lens, LensProfile, metre_to_dioptre
from capture.output import check_output

logger = logging.getLogger(__name__)

Transfer = Literal["linear", "srgb", "rec709"]
FocusUnit = Literal["step", "dioptre", "m", "driver"]
Pixels = NDArray[np.uint8] | NDArray[np.uint16]

FORMAT = "daif-focal-stack"
VERSION = "1.0"
PENDING, OK, FAILED = 0, 1, 2
STATUS_NAMES = {PENDING: "pending", OK: "ok", FAILED: "failed"}

_NUMBERS = {  # per frame, NaN unknown: name in the file, (attribute of FocalStack, type, unit)
    "focus_command": ("focus_command", "f8", ""),
    "focus_position": ("focus_position", "f8", ""),
    "focus_distance": ("focus_distance_m", "f8", "m"),
    "focus_distance_std": ("focus_distance_std_m", "f8", "m"),
    "exposure_time": ("exposure_time_s", "f8", "s"),
    "f_number": ("f_number", "f8", "1"),
    "iso": ("iso", "f8", "1"),
    "timestamp": ("timestamp_s", "f8", "s"),
    "settle_time": ("settle_time_s", "f8", "s"),
    "mean_level": ("mean_level", "f4", "1"),
    "clipped_fraction": ("clipped_fraction", "f4", "1"),
    "focus_measure": ("focus_measure", "f4", "1"),
}
_TEXTS = {  # per frame, bytes of UTF-8
    "focus_distance_source": 32,
    "original_name": 256,
    "original_sha256": 64,
    "metadata_json": 2048,
}
_TILE_PX = 256
_EVENTS_CHUNK = 16384
_MAX_SIDE = 1 << 16
_MAX_FRAMES = 10_000
_MAX_CHUNK_BYTES = 1 << 26
_MAX_TEXT_BYTES = 1 << 24
_MAX_DEFLATE = 1032  # zlib cannot compress further; more is a damaged or hostile shape
_FILTERS = {h5py.h5z.FILTER_DEFLATE, h5py.h5z.FILTER_SHUFFLE, h5py.h5z.FILTER_FLETCHER32}


class StackFormatError(DataError):
    """A focal stack file cannot be trusted; the text says which file, dataset, expected, found, and what to do."""


# --- reading


class FocalStack:
    """A focal stack opened for reading; a context manager. Only frames with status ok are visible, in order.

    Attributes:
        path: the file.
        n_frames: number of ok frames, S; `n_planned` counts the others too.
        height, width, channels, dtype: of the stored frames.
        transfer: transfer function of the stored values, white_level: the value that means 1.0.
        complete: False for a stack that is still being written, or was cut off.
        status: (n_planned,) 0 pending, 1 ok, 2 failed; frame_index: (S,) place of each frame in the plan.
        focus_distance_m: (S,) from the front principal plane; NaN unknown, inf allowed; focus_dpt its reciprocal.
        distance_problem: None, or why these are not what an unfinished stack has stored; see `usable_distances`.
        focus_distance_std_m, focus_command, focus_position, exposure_time_s, f_number, iso, timestamp_s,
        settle_time_s, mean_level, clipped_fraction, focus_measure: (S,), NaN unknown.
        focus_unit: unit of focus_command and focus_position.
        lens: the thin lens, if known; lens_info and camera: make, model, ...
    """

    focus_distance_m: NDArray[np.float64]
    focus_distance_std_m: NDArray[np.float64]
    focus_command: NDArray[np.float64]
    focus_position: NDArray[np.float64]
    exposure_time_s: NDArray[np.float64]
    f_number: NDArray[np.float64]
    iso: NDArray[np.float64]
    timestamp_s: NDArray[np.float64]
    settle_time_s: NDArray[np.float64]
    mean_level: NDArray[np.float32]
    clipped_fraction: NDArray[np.float32]
    focus_measure: NDArray[np.float32]

    def __init__(self, path: str | Path, *, allow_partial: bool = False) -> None:
        self.path = Path(path)
        self._file = _Source(self.path)
        try:
            with self._file.guard("header"):
                self._read_header(allow_partial)
        except BaseException:
            self._file.close()
            raise

    @classmethod
    def open(cls, path: str | Path, *, deep: bool = False, allow_partial: bool = False) -> FocalStack:
        """The stack in `path`, checked.

        Args:
            deep: also read every chunk of every dataset and verify its checksum.
            allow_partial: accept a stack that is still being written, however few frames it has.

        Raises:
            StackFormatError: the file is missing, damaged, incomplete, or no focal stack.
        """
        stack = cls(path, allow_partial=allow_partial)
        if deep:
            try:
                stack.verify()
            except BaseException:
                stack.close()
                raise
        return stack

    def _read_header(self, allow_partial: bool) -> None:
        file = self._file
        attributes = file.attributes("/")
        found = attributes.get("format")
        if found != FORMAT:
            raise file.error("attribute format", FORMAT, repr(found), "convert it with `daif import`")
        version = str(attributes.get("format_version"))
        if version.partition(".")[0] != VERSION.partition(".")[0]:
            raise file.error("attribute format_version", f"{VERSION} or another 1.x", version, "update daif")
        self.complete = bool(attributes.get("complete"))
        self.uuid, self.created, self.software, self.plan_sha256 = (
            str(attributes.get(name, "")) for name in ("uuid", "created", "software", "plan_sha256")
        )
        self._read_frames_header()
        self.status = file.array("stack/status", (self.n_planned,), "u")
        if self.status.max() > FAILED:
            raise file.error("/stack/status", "0, 1 or 2", str(self.status.max()))
        if not self.complete and not allow_partial:
            n_ok = int(np.count_nonzero(self.status == OK))
            advice = (
                "import it again" if self._is_import() else "continue it with `daif capture --resume`, or start again"
            )
            raise StackFormatError(f"{self.path} is incomplete, {n_ok} of {self.n_planned} frames are there; {advice}")
        self.frame_index = np.flatnonzero(self.status == OK)
        self.n_frames = len(self.frame_index)
        if self.n_frames < 2 and not allow_partial:
            raise file.error("/stack/status", "at least 2 frames that are ok", str(self.n_frames), "capture it again")
        for name, (attribute, dtype, _) in _NUMBERS.items():
            setattr(self, attribute, self._numbers(name, dtype))
        self.focus_unit = self._focus_unit()
        self._check_distances()
        self._read_optics()

    def _is_import(self) -> bool:
        """Whether photographs were imported: there is no sweep to continue."""
        return "camera" in self._file.names("/") and self._file.attributes("camera").get("driver") == "import"

    def _read_frames_header(self) -> None:
        file = self._file
        dataset = file.dataset("stack/frames", "u")
        shape, itemsize = dataset.shape, dataset.dtype.itemsize
        if len(shape) != 4 or shape[3] not in (1, 3) or itemsize > 2:
            raise file.error("/stack/frames", "(frames, height, width, 1 or 3) u8 or u16", f"{shape} {dataset.dtype}")
        if not (0 < shape[0] <= _MAX_FRAMES and 0 < shape[1] <= _MAX_SIDE and 0 < shape[2] <= _MAX_SIDE):
            raise file.error("/stack/frames", f"up to {_MAX_FRAMES} frames of up to {_MAX_SIDE} px", f"{shape}")
        self.n_planned, self.height, self.width, self.channels = shape
        self.dtype = dataset.dtype
        self._frames = dataset
        attributes = file.attributes("stack/frames")
        transfer = attributes.get("transfer_function")
        if transfer not in get_args(Transfer):
            raise file.error("/stack/frames attribute transfer_function", "linear, srgb or rec709", repr(transfer))
        self.transfer = cast(Transfer, transfer)
        white_level = attributes.get("white_level")
        top = np.iinfo(self.dtype).max
        if not isinstance(white_level, float | int) or not 0 < white_level <= top:
            raise file.error("/stack/frames attribute white_level", f"a number in (0, {top}]", repr(white_level))
        self.white_level = float(white_level)

    def _focus_unit(self) -> FocusUnit:
        if "focus_command" not in self._file.names("stack"):
            return "step"
        unit = self._file.attributes("stack/focus_command").get("unit")
        if unit not in get_args(FocusUnit):
            raise self._file.error("/stack/focus_command attribute unit", "step, dioptre, m or driver", repr(unit))
        return cast(FocusUnit, unit)

    def _numbers(self, name: str, dtype: str) -> NDArray[Any]:
        if name not in self._file.names("stack"):
            return np.full(self.n_frames, np.nan, dtype)
        return self._file.array(f"stack/{name}", (self.n_planned,), "f")[self.frame_index].astype(dtype)

    @property
    def working_f_number(self) -> float:
        """The aperture that most frames report, else the lens's; NaN unknown."""
        reported = self.f_number[np.isfinite(self.f_number) & (self.f_number > 0)]
        if len(reported):
            return float(np.median(reported))
        return self.lens.f_number if self.lens else math.nan

    def _check_distances(self) -> None:
        distances, self.distance_problem = usable_distances(self.focus_distance_m, [f"{i}" for i in self.frame_index])
        if self.distance_problem and self.complete:
            raise StackFormatError(f"{self.path}: /stack/focus_distance: {self.distance_problem}")
        self.focus_distance_m = distances
        self.focus_dpt: NDArray[np.float64] = metre_to_dioptre(distances)

    def _read_optics(self) -> None:
        attributes = self._file.attributes("lens") if "lens" in self._file.names("/") else {}
        optics = {
            "focal_length_m": attributes.pop("focal_length", None),
            "f_number": attributes.pop("f_number", None),
            "pixel_pitch_m": attributes.pop("pixel_pitch", None),
        }
        self.lens: Lens | None = None
        self.lens_info: dict[str, Any] = attributes
        if any(value is not None for value in optics.values()):
            try:
                self.lens = Lens.model_validate(optics)
            except ValidationError as error:
                first = error.errors()[0]
                raise StackFormatError(
                    f"{self.path}: /lens attribute {first['loc'][0]}: {first['msg'].removeprefix('Value error, ')}"
                ) from None
        self.camera: dict[str, Any] = self._file.attributes("camera") if "camera" in self._file.names("/") else {}

    # pixels

    def raw(self, i: int, rows: slice = slice(None), cols: slice = slice(None)) -> Pixels:
        """Stored values of frame `i`, (h, w, C) u8 or u16; only the tiles touched are read from disk."""
        place = int(self.frame_index[i])
        with self._file.guard(f"frame {place} of /stack/frames"):
            return cast(Pixels, self._frames[place, rows, cols])

    def linear(self, i: int, rows: slice = slice(None), cols: slice = slice(None)) -> NDArray[np.float32]:
        """Frame `i` as linear RGB, (h, w, 3) float32, 0 to 1; grey frames become three equal channels."""
        from capture.decode import to_linear

        return to_linear(self.raw(i, rows, cols), self.transfer, self.white_level)

    def linear_stack(self, rows: slice = slice(None), cols: slice = slice(None)) -> NDArray[np.float32]:
        """All frames as linear RGB, (S, h, w, 3) float32."""
        height = len(range(*rows.indices(self.height)))
        width = len(range(*cols.indices(self.width)))
        frames = np.empty((self.n_frames, height, width, 3), np.float32)
        for i in range(self.n_frames):
            frames[i] = self.linear(i, rows, cols)
        return frames

    # the rest

    @property
    def is_metric(self) -> bool:
        """Whether depth can come out in metres: the focus distance of every frame is known."""
        return self.n_frames > 0 and not bool(np.isnan(self.focus_distance_m).any())

    @cached_property
    def truth_depth_m(self) -> NDArray[np.float32] | None:
        """(H, W) true depth in metres, NaN unknown, or None."""
        return self._truth("depth", (self.height, self.width))

    @cached_property
    def truth_aif(self) -> NDArray[np.float32] | None:
        """(H, W, 3) true all-in-focus image, linear, or None."""
        return self._truth("all_in_focus", (self.height, self.width, 3))

    @property
    def has_truth(self) -> bool:
        """Whether the stack carries true depth."""
        return "depth" in self._file.names("ground_truth")

    def _truth(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float32] | None:
        if name not in self._file.names("ground_truth"):
            return None
        return self._file.array(f"ground_truth/{name}", shape, "f").astype(np.float32)

    @cached_property
    def profile_yaml(self) -> str | None:
        """Text of the lens profile that the stack was captured with, or None."""
        return self._text("calibration", "lens_profile")

    @cached_property
    def profile(self) -> LensProfile | None:
        """The lens profile that the stack was captured with, or None."""
        from capture.config import parse_yaml

        if self.profile_yaml is None:
            return None
        try:
            return parse_yaml(self.profile_yaml, LensProfile, source=f"{self.path}, /calibration/lens_profile")
        except UsageError as error:
            raise StackFormatError(str(error)) from None

    @cached_property
    def board(self) -> dict[str, Any] | None:
        """Description of the calibration board in the scene, or None."""
        return self._json("calibration", "board")

    @cached_property
    def plan(self) -> dict[str, Any] | None:
        """The focus sweep that was asked for, or None."""
        return self._json("/", "plan")

    @cached_property
    def exif(self) -> bytes | None:
        """EXIF block (TIFF structure) of the first camera file, or None."""
        return self._file.content("exif") if "exif" in self._file.names("/") else None

    @cached_property
    def events(self) -> list[dict[str, Any]]:
        """What happened during capture: `time`, `kind` and whatever belongs to the kind."""
        if "events" not in self._file.names("/"):
            return []
        lines = self._file.content("events").rstrip(b"\0").splitlines()
        return [self._parse_json(line, "/events") for line in lines]

    @cached_property
    def focus_distance_source(self) -> list[str]:
        """Where each focus distance comes from: exif, reported, calibrated, simulated, operator, ... or ''."""
        return self._texts("focus_distance_source")

    @cached_property
    def original_name(self) -> list[str]:
        """The camera's own file of each frame, relative to the stack's folder, or ''."""
        return self._texts("original_name")

    @cached_property
    def original_sha256(self) -> list[str]:
        """SHA-256 of the camera's own file of each frame, or ''."""
        return self._texts("original_sha256")

    @cached_property
    def metadata(self) -> list[dict[str, Any]]:
        """Whatever else the camera said about each frame."""
        return [
            self._parse_json(text.encode(), "/stack/metadata_json") if text else {}
            for text in self._texts("metadata_json")
        ]

    def _texts(self, name: str) -> list[str]:
        if name not in self._file.names("stack"):
            return [""] * self.n_frames
        found = self._file.array(f"stack/{name}", (self.n_planned,), "S")[self.frame_index]
        return [item.decode("utf-8", "replace") for item in found.tolist()]

    def _text(self, group: str, name: str) -> str | None:
        if name not in self._file.names(group):
            return None
        return self._file.content(f"{group.rstrip('/')}/{name}").decode("utf-8", "replace")

    def _json(self, group: str, name: str) -> dict[str, Any] | None:
        text = self._text(group, name)
        return None if text is None else self._parse_json(text.encode(), f"{group.rstrip('/')}/{name}")

    def _parse_json(self, text: bytes, name: str) -> dict[str, Any]:
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = None
        if not isinstance(value, dict):
            raise self._file.error(name, "a JSON object", repr(text[:40]))
        return value

    def verify(self) -> None:
        """Read every chunk of every dataset; `StackFormatError` names the first whose checksum is wrong."""
        for i in range(self.n_frames):
            self.raw(i)
        for name in self._file.objects():
            if name != "stack/frames":
                self._file.content(name)

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()

    def __enter__(self) -> FocalStack:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _Source:
    """An HDF5 file from which only checked things are read, so that damage is a sentence and never a hang.

    Variable-length data, links out of the file, virtual and external storage and foreign filters are refused by
    their description, before HDF5 touches them; sizes are compared with the file's before memory is asked for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: h5py.File | None = None
        try:
            self.size = path.stat().st_size
            with path.open("rb") as file:
                signature = file.read(8)
        except FileNotFoundError:
            partial = path.with_name(path.name + ".partial")
            hint = f"; its capture is unfinished, see {partial}" if partial.exists() else "; check the name"
            raise StackFormatError(f"{path} does not exist{hint}") from None
        except OSError as error:
            raise StackFormatError(f"{path} cannot be read: {error.strerror}") from None
        if signature != b"\x89HDF\r\n\x1a\n":
            raise StackFormatError(
                f"{path} is not a focal stack: expected an HDF5 file, found one that starts with "
                f"{signature!r}; turn photographs into a stack with `daif import`"
            )
        with self.guard("HDF5 structure"):
            # no lock: one may read while the writer works, and the writer's lease keeps other writers out
            self._file = h5py.File(path, "r", locking=False)
            self._names = {
                "/": self._group_names("/"),
                **{name: self._group_names(name) for name in ("stack", "calibration", "ground_truth")},
            }

    def names(self, group: str) -> set[str]:
        """Names in one of the groups that the format knows."""
        return self._names[group]

    def _group_names(self, group: str) -> set[str]:
        assert self._file is not None
        if group != "/":
            if group not in self._names_of_root():
                return set()
            self._check_link(group)
        found = self._file[group]
        if not isinstance(found, h5py.Group):
            raise self.error(f"/{group}", "a group", "a dataset")
        return set(found.keys())

    def _names_of_root(self) -> set[str]:
        assert self._file is not None
        return set(self._file.keys())

    def _check_link(self, name: str) -> None:
        assert self._file is not None
        parent, _, leaf = name.rpartition("/")
        link = self._file[parent or "/"].get(leaf, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise self.error(f"/{name}", "data in this file", "a link to elsewhere", "copy the data into the file")

    def attributes(self, name: str) -> dict[str, Any]:
        """Attributes of an object as str, int, float, or lists of them."""
        assert self._file is not None
        with self.guard(f"attributes of {name}"):
            if name != "/":
                self._check_link(name)
            holder = self._file[name]
            values = {}
            for key in holder.attrs:
                attribute = h5py.h5a.open(holder.id, key.encode())
                self._check_type(attribute.get_type(), f"{name} attribute {key}")
                if attribute.get_storage_size() > 1 << 16:
                    raise self.error(f"{name} attribute {key}", "64 KiB at most", str(attribute.get_storage_size()))
                values[key] = _plain(holder.attrs[key])
            return values

    def dataset(self, name: str, kind: str) -> h5py.Dataset:
        """A dataset whose values are of NumPy kind `kind` ('u', 'f', 'S'), checked but not read."""
        assert self._file is not None
        with self.guard(f"/{name}"):
            group, _, leaf = name.rpartition("/")
            if leaf not in self.names(group or "/"):
                raise self.error(f"/{name}", "a dataset", "nothing", "the file is damaged or no focal stack")
            self._check_link(name)
            dataset = self._file[name]
            if not isinstance(dataset, h5py.Dataset):
                raise self.error(f"/{name}", "a dataset", "a group")
            self._check_type(dataset.id.get_type(), f"/{name}")
            if dataset.dtype.kind != kind or dataset.dtype.itemsize > 1 << 16:
                raise self.error(f"/{name}", f"values of kind {kind}", str(dataset.dtype))
            self._check_storage(dataset, name)
            return dataset

    def array(self, name: str, shape: tuple[int, ...], kind: str) -> NDArray[Any]:
        """All values of a dataset that must have this shape."""
        with self.guard(f"/{name}"):
            dataset = self.dataset(name, kind)
            if dataset.shape != shape:
                raise self.error(f"/{name}", f"shape {shape}", f"{dataset.shape}")
            return np.asarray(dataset[...])

    def content(self, name: str) -> bytes:
        """The bytes of a dataset of whatever known kind, read whole."""
        assert self._file is not None
        with self.guard(f"/{name}"):
            self._check_link(name)
            found = self._file[name]
            if not isinstance(found, h5py.Dataset):
                return b""  # groups that later versions may add
            self._check_type(found.id.get_type(), f"/{name}")
            dataset = self.dataset(name, found.dtype.kind)
            if name in ("plan", "exif", "events") and dataset.size * dataset.dtype.itemsize > _MAX_TEXT_BYTES:
                raise self.error(f"/{name}", f"{_MAX_TEXT_BYTES} bytes at most", str(dataset.size))
            return np.asarray(dataset[...]).tobytes()

    def objects(self) -> list[str]:
        """Paths of all datasets that the format knows."""
        groups = [f"{group}/{name}" for group in ("stack", "calibration", "ground_truth") for name in self.names(group)]
        return sorted(groups + [name for name in ("plan", "exif", "events") if name in self.names("/")])

    def copy_packed(self, target: Path) -> None:
        """Write the same content to `target` with gzip and shuffle on images."""
        assert self._file is not None
        with h5py.File(target, "w", locking=False) as file:
            for group in ("/", "stack", "lens", "camera"):
                if group == "/" or group in self.names("/"):
                    _set_attributes(file.require_group(group), self.attributes(group))
            for name in self.objects():
                source = self.dataset(name, self._file[name].dtype.kind)
                options: dict[str, Any] = {}
                if source.ndim > 1:
                    options = {"compression": "gzip", "shuffle": True, "fletcher32": True, "chunks": source.chunks}
                copy = file.create_dataset(name, shape=source.shape, dtype=source.dtype, **options)
                for i in range(source.shape[0]) if source.ndim > 1 else [slice(None)]:
                    copy[i] = source[i]
                _set_attributes(copy, self.attributes(name))

    def compare(self, other: _Source) -> None:
        """Raises StackFormatError unless `other` holds exactly the same datasets and attributes."""
        assert self._file is not None and other._file is not None
        for name in self.objects():
            ours, theirs = self._file[name], other.dataset(name, self._file[name].dtype.kind)
            same = ours.shape == theirs.shape and repr(self.attributes(name)) == repr(other.attributes(name))
            parts = range(ours.shape[0]) if ours.ndim > 1 else [slice(None)]
            if not same or any(ours[i].tobytes() != theirs[i].tobytes() for i in parts):
                raise other.error(f"/{name}", "the same bytes as in the original", "others", "try again")

    def _check_type(self, kind: h5py.h5t.TypeID, name: str) -> None:
        plain = isinstance(kind, h5py.h5t.TypeIntegerID | h5py.h5t.TypeFloatID | h5py.h5t.TypeEnumID)
        fixed_text = isinstance(kind, h5py.h5t.TypeStringID) and not kind.is_variable_str()
        if not (plain or fixed_text):
            raise self.error(name, "numbers or fixed-length text", "another type", "write the stack with daif")

    def _check_storage(self, dataset: h5py.Dataset, name: str) -> None:
        if dataset.is_virtual or dataset.external or dataset.shape is None:
            raise self.error(f"/{name}", "data in this file", "data kept elsewhere", "copy the data into the file")
        settings = dataset.id.get_create_plist()
        filters = {settings.get_filter(i)[0] for i in range(settings.get_nfilters())}
        if filters - _FILTERS:
            raise self.error(f"/{name}", "gzip, shuffle or fletcher32", f"filters {sorted(filters)}", "repack it")
        n_bytes = 1
        for side in (*dataset.shape, dataset.dtype.itemsize):  # Python integers: a damaged shape must not overflow
            n_bytes *= int(side)
        limit = self.size * (_MAX_DEFLATE if h5py.h5z.FILTER_DEFLATE in filters else 1)
        if n_bytes > limit:
            raise self.error(
                f"/{name}", f"at most the file's {self.size} bytes", f"a shape {dataset.shape} of {n_bytes} bytes"
            )
        if dataset.chunks is not None:
            chunk_bytes = dataset.dtype.itemsize
            for side in dataset.chunks:
                chunk_bytes *= int(side)
            if chunk_bytes > _MAX_CHUNK_BYTES:
                raise self.error(f"/{name}", f"chunks of at most {_MAX_CHUNK_BYTES} bytes", f"{dataset.chunks}")

    def error(self, name: str, expected: str, found: str, advice: str = "the file is damaged; restore it") -> DataError:
        return StackFormatError(f"{self.path}: {name}: expected {expected}, found {found}; {advice}")

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Turns whatever h5py raises on damaged bytes into one sentence about `name`."""
        try:
            yield
        except DaifError:
            raise
        except Exception as error:  # h5py has no base class: damage gives half a dozen built-in ones
            reason = " ".join(str(error).split())[:160] or type(error).__name__
            raise StackFormatError(
                f"{self.path}: {name} cannot be read, the file is truncated or damaged ({reason}); "
                "restore it, or import or capture it again"
            ) from None

    def close(self) -> None:
        if self._file is not None:
            with contextlib.suppress(Exception):  # closing a damaged file may complain; it was only read
                self._file.close()
            self._file = None


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    if isinstance(value, np.ndarray):
        return [_plain(item) for item in value.tolist()]
    if isinstance(value, np.bytes_):
        return bytes(value).decode("utf-8", "replace")
    return value.item() if isinstance(value, np.generic) else value


def distance_problem(distance_m: Sequence[float] | NDArray[np.float64], names: Sequence[str]) -> str | None:
    """What is wrong with a sweep's focus distances, or None: they must be positive and strictly rise or fall.

    Unknown ones (NaN) are skipped. `names` are the frames' numbers or files, for the sentence.
    """
    known = [(float(d), name) for d, name in zip(distance_m, names, strict=True) if not np.isnan(d)]
    for distance, name in known:
        if not distance > 0:
            return f"focus distance {distance:g} m of frame {name} is not positive; give metres, or leave it out"
    seen: dict[float, str] = {}
    for distance, name in known:
        if distance in seen:
            return (
                f"duplicate focus distance {distance:g} m in frames {seen[distance]} and {name}; "
                "drop one of them, or leave out a distance that is not known"
            )
        seen[distance] = name
    for (a, _), (b, middle), (c, _) in zip(known, known[1:], known[2:], strict=False):
        if (b > a) != (c > b):
            return (
                f"focus distances turn at frame {middle} ({a:g}, {b:g}, {c:g} m); "
                "they must rise or fall throughout: put the frames in order of focus"
            )
    return None


def spread_ties(distance_m: Sequence[float], step: float = NIKON_STEP) -> list[float]:
    """`distance_m` with runs of one quantised value spread evenly inside its quantisation step, order kept.

    Args:
        distance_m: (S,) in the order of the sweep, NaN unknown.
        step: relative size of a quantisation step; a run stays within half a step of its value.

    A sweep in which all frames report one value says nothing about their distances: those become NaN.
    """
    values = np.asarray(distance_m, np.float64)
    known = values[np.isfinite(values)]
    if len(known) > 1 and known.min() == known.max():
        return [math.nan] * len(values)
    rising = len(known) < 2 or known[-1] > known[0]
    spread = values.copy()
    start = 0
    for end in range(1, len(values) + 1):
        if end < len(values) and values[end] == values[start]:
            continue
        n = end - start
        if n > 1 and math.isfinite(values[start]):
            places = (np.arange(n) + 0.5) / n - 0.5  # of a step, around the reported value
            spread[start:end] *= (1.0 + step) ** (places if rising else -places)
        start = end
    return spread.tolist()


def usable_distances(distance_m: NDArray[np.float64], names: Sequence[str]) -> tuple[NDArray[np.float64], str | None]:
    """What can be made of distances that a camera reported, and what was wrong with them, or None.

    Repeats are spread inside their quantisation step; distances that are no sweep even then count as unknown, all NaN.
    """
    problem = distance_problem(distance_m, names)
    if problem is None:
        return distance_m, None
    spread = np.array(spread_ties(distance_m.tolist()), np.float64)
    return (spread if distance_problem(spread, names) is None else np.full(len(distance_m), np.nan)), problem


# --- writing


class StackWriter:
    """Writes one focal stack, frame by frame, as `<path>.partial` until `finish()`; a context manager.

    What `append` has returned from is on disk: a SIGKILL at any moment loses at most the frame in flight. Leaving the
    `with` block without `finish()` keeps the partial file for `resume`.

    Attributes:
        path: the final name; partial_path: what is being written.
        n_frames, height, width, channels, dtype, transfer, white_level: as given to `create`.
        distance_problem: after `finish`, None or what was wrong with the focus distances.
    """

    def __init__(self, path: Path, file: h5py.File, lease: Lease, *, sync: bool) -> None:
        self.path, self.partial_path = path, partial_path(path)
        self._file: h5py.File | None = file
        self._lease, self._sync = lease, sync
        frames = file["stack/frames"]
        self.n_frames, self.height, self.width, self.channels = frames.shape
        self.dtype: np.dtype[Any] = frames.dtype
        self.transfer = cast(Transfer, _plain(frames.attrs["transfer_function"]))
        self.white_level = float(frames.attrs["white_level"])
        self._frame_bytes = self.height * self.width * self.channels * self.dtype.itemsize
        self.distance_problem: str | None = None
        self.uuid = str(_plain(file.attrs["uuid"]))
        self._events_end = len(np.asarray(file["events"]).tobytes().rstrip(b"\0"))

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        n_frames: int,
        height: int,
        width: int,
        channels: int = 3,
        dtype: Any = np.uint8,
        transfer: Transfer,
        white_level: float | None = None,
        focus_unit: FocusUnit = "step",
        lens: Lens | None = None,
        lens_info: Mapping[str, str | float] | None = None,
        camera: Mapping[str, str | float] | None = None,
        profile_yaml: str | None = None,
        plan: Mapping[str, Any] | None = None,
        board: Mapping[str, Any] | None = None,
        exif: bytes | None = None,
        truth_depth_m: NDArray[np.floating[Any]] | None = None,
        truth_aif: NDArray[np.floating[Any]] | None = None,
        image_info: Mapping[str, str | float] | None = None,
        overwrite: bool = False,
        sync: bool = True,
    ) -> StackWriter:
        """A writer for `n_frames` frames of (height, width, channels); the disk space is taken now.

        Args:
            dtype: uint8 or uint16.
            white_level: stored value that means 1.0; the largest one if left out.
            focus_unit: unit of `focus_command` and `focus_position`.
            lens_info, camera, image_info: attributes to keep (make, model, serial_number; white_balance_gains ...).
            plan: the sweep as JSON-serialisable data; `resume` insists on the same.
            board: description of the calibration board, likewise.
            exif: EXIF block of the first camera file, to be carried over into results.
            truth_depth_m: (H, W) true depth in metres; truth_aif: (H, W, 3) linear.
            overwrite: replace a finished stack of that name (when `finish` is called) or a partial one (now).
            sync: flush and fsync after every frame; without it only `finish` does.

        Raises:
            UsageError: the file exists and `overwrite` is False, or the folder is not writable.
            LockedError: another process writes this stack.
            NoSpaceError: the disk cannot hold it; says how many bytes are needed.
        """
        path, dtype = Path(path), np.dtype(dtype)
        if dtype not in (np.uint8, np.uint16):
            raise ValueError(f"frames are stored as uint8 or uint16, not {dtype}")
        if n_frames > _MAX_FRAMES:
            raise DataError(f"{path}: {n_frames} frames cannot be stored, {_MAX_FRAMES} at most; make several stacks")
        if transfer not in get_args(Transfer) or channels not in (1, 3) or n_frames < 1:
            raise ValueError(f"transfer={transfer!r}, channels={channels}, n_frames={n_frames}")
        if not (0 < height <= _MAX_SIDE and 0 < width <= _MAX_SIDE):
            raise DataError(f"{path}: frames of {width} x {height} px cannot be stored; {_MAX_SIDE} px at most")
        check_output(path, overwrite=overwrite)
        lease = Lease(path)
        try:
            partial = partial_path(path)
            if not overwrite:
                check_unfinished(path)
            needed = n_frames * height * width * channels * dtype.itemsize
            needed += sum(truth.size * 4 for truth in (truth_depth_m, truth_aif) if truth is not None)
            check_free_space(path.parent, needed + n_frames * 4096 + (1 << 20), path)
            fresh = path.with_name(path.name + ".creating")
            with _space(path, needed):
                try:
                    file = h5py.File(fresh, "w", locking=False)
                    with file:
                        _write_header(file, plan)
                        frames = _make_dataset(
                            file, "stack/frames", (n_frames, height, width, channels), dtype, _tile(height, width)
                        )
                        frames.attrs["transfer_function"] = _text(transfer)
                        frames.attrs["white_level"] = float(white_level or np.iinfo(dtype).max)
                        frames.attrs["color_order"] = _text("RGB")
                        _set_attributes(frames, image_info)
                        _make_table(file, n_frames, focus_unit)
                        _write_optics(file, lens, lens_info, camera)
                        _write_content(file, "calibration/lens_profile", profile_yaml)
                        _write_content(file, "calibration/board", _dumps(board))
                        _write_content(file, "plan", _dumps(plan))
                        _write_content(file, "exif", exif)
                        _write_truth(file, truth_depth_m, truth_aif, (height, width))
                    if sync:
                        _fsync(fresh)
                    # renamed only when its structure is whole: a `.partial` file always opens
                    os.replace(fresh, partial)
                    file = h5py.File(partial, "r+", locking=False)
                except BaseException:
                    fresh.unlink(missing_ok=True)
                    raise
            return cls(path, file, lease, sync=sync)
        except BaseException:
            lease.release()
            raise

    @classmethod
    def resume(cls, path: str | Path, *, plan: Mapping[str, Any] | None = None, sync: bool = True) -> StackWriter:
        """A writer that continues the unfinished stack of `path` (its final name, or the `.partial` file's).

        Raises:
            DataError: there is nothing to resume, it is damaged, or `plan` is not the plan that it was begun with.
            LockedError: another process writes this stack.
        """
        path = Path(path)
        if path.suffix == ".partial":
            path = path.with_suffix("")
        check_output(path, overwrite=True)
        partial = partial_path(path)
        if not partial.exists():
            found = f"{path} is complete" if path.exists() else "nothing was begun there"
            raise DataError(f"{partial} does not exist, so there is nothing to resume: {found}; leave out --resume")
        lease = Lease(path)
        try:
            with FocalStack.open(partial, allow_partial=True) as stack:
                begun = stack.plan_sha256
            if plan is not None and plan_sha256(plan) != begun:
                raise DataError(
                    f"{partial} was begun with another plan (sha256 {begun[:12]}, now {plan_sha256(plan)[:12]}); "
                    "resume with the same plan, or start a new stack"
                )
            return cls(path, h5py.File(partial, "r+", locking=False), lease, sync=sync)
        except BaseException:
            lease.release()
            raise

    @property
    def status(self) -> NDArray[np.uint8]:
        """(n_frames,) 0 pending, 1 ok, 2 failed."""
        return np.asarray(self._open_file()["stack/status"])

    @property
    def pending(self) -> list[int]:
        """Frames that are not ok yet: never taken, or failed."""
        return [int(i) for i in np.flatnonzero(self.status != OK)]

    def append(
        self,
        index: int,
        image: NDArray[Any],
        *,
        focus_distance_m: float = np.nan,
        focus_distance_std_m: float = np.nan,
        focus_distance_source: str = "",
        focus_command: float = np.nan,
        focus_position: float = np.nan,
        exposure_time_s: float = np.nan,
        f_number: float = np.nan,
        iso: float = np.nan,
        timestamp_s: float | None = None,
        settle_time_s: float = np.nan,
        focus_measure: float = np.nan,
        metadata: Mapping[str, Any] | None = None,
        originals: Sequence[tuple[str, bytes]] = (),
        source_file: tuple[str, str] | None = None,
    ) -> None:
        """Store frame `index`; on return it survives the death of this process.

        Args:
            image: (H, W, C) or (H, W) of the stack's type, in its transfer function.
            timestamp_s: time of exposure in seconds since 1970 UTC; now if left out.
            metadata: JSON-serialisable; what does not fit into 2 KiB is left out from its end and an event says so.
            originals: the camera's own files as (name, bytes): saved first, in `<file>.<uuid>.originals/` beside
                the stack; a file that is there already is never replaced.
            source_file: instead, (name, sha256) of a camera file that stays where it is.

        Raises:
            DataError: the image has another size or type than the stack.
            NoSpaceError: the disk is full; earlier frames are safe.
        """
        image = np.asarray(image)
        if image.ndim == 2:
            image = image[..., None]
        expected = (self.height, self.width, self.channels)
        if image.shape != expected or image.dtype != self.dtype:
            raise DataError(
                f"{self.path}: frame {index}: expected {self.width} x {self.height} px, {self.channels} channels, "
                f"{self.dtype}, found shape {image.shape} {image.dtype}; all frames must be alike"
            )
        if not 0 <= index < self.n_frames:
            raise ValueError(f"frame {index} of a stack of {self.n_frames}")
        if focus_distance_m <= 0:
            raise DataError(f"{self.path}: frame {index}: focus distance {focus_distance_m:g} m is not positive")
        stack = self._open_file()["stack"]
        with _space(self.path, self._frame_bytes + sum(len(data) for _, data in originals)):
            name, digest = source_file or ("", "")
            details = dict(metadata or {})
            saved = [self._save_original(index, original, data) for original, data in originals]
            if saved:
                name, digest = saved[0]
                if len(saved) > 1:
                    details = {"originals": [{"file": file, "sha256": sha} for file, sha in saved], **details}
            if stack["status"][index] != PENDING:
                self._set_status(index, PENDING)  # taken again: it must not count while it is being overwritten
            stack["frames"][index] = image
            numbers = {
                "focus_command": focus_command,
                "focus_position": focus_position,
                "focus_distance": focus_distance_m,
                "focus_distance_std": focus_distance_std_m,
                "exposure_time": exposure_time_s,
                "f_number": f_number,
                "iso": iso,
                "timestamp": time.time() if timestamp_s is None else timestamp_s,
                "settle_time": settle_time_s,
                "mean_level": image.mean() / self.white_level,
                "clipped_fraction": np.count_nonzero(image >= self.white_level) / image.size,
                "focus_measure": focus_measure,
            }
            for key, value in numbers.items():
                stack[key][index] = value
            texts = {
                "focus_distance_source": focus_distance_source,
                "original_name": name,
                "original_sha256": digest,
                "metadata_json": self._fitting_json(index, details),
            }
            for key, text in texts.items():
                stack[key][index] = _cut(text, _TEXTS[key])
            if self._sync:
                self._open_file().flush()
            self._set_status(index, OK)

    def fail(self, index: int, reason: str) -> None:
        """Mark frame `index` as failed, with the reason in the event log."""
        self.event("frame_failed", frame=index, reason=reason)
        self._set_status(index, FAILED)

    def event(self, kind: str, **details: Any) -> None:
        """Add one line to the stack's event log: time, kind and `details` (JSON-serialisable)."""
        line = json.dumps({"time": round(time.time(), 3), "kind": kind, **details}, default=str).encode() + b"\n"
        events = self._open_file()["events"]
        end = self._events_end + len(line)
        if end > _MAX_TEXT_BYTES:
            return  # a log of 16 MiB says enough
        with _space(self.path, len(line)):
            if end > events.shape[0]:
                events.resize((-(-end // _EVENTS_CHUNK) * _EVENTS_CHUNK,))
            events[self._events_end : end] = np.frombuffer(line, np.uint8)
            self._events_end = end
            if self._sync:
                self._flush()

    def finish(self, *, allow_missing: bool = False) -> Path:
        """Complete the stack under its final name, which is returned.

        Args:
            allow_missing: frames may be missing (a sweep that was stopped); two must be there anyway.

        Focus distances that are no sweep do not keep frames from being used: `usable_distances` decides, an event keeps
        what was reported, and `distance_problem` says what was wrong.

        Raises:
            DataError: frames are missing.
        """
        status = self.status
        n_ok = int(np.count_nonzero(status == OK))
        if n_ok < 2 or (n_ok < self.n_frames and not allow_missing):
            raise DataError(
                f"{self.partial_path} has {n_ok} of {self.n_frames} frames, and {'2' if allow_missing else 'all'} are "
                "needed to finish it; capture the rest with --resume"
            )
        file = self._open_file()
        self._settle_distances(np.flatnonzero(status == OK))
        with _space(self.path, 0):
            file.attrs["complete"] = np.uint8(1)
            self._flush()
            file.close()
            self._file = None
            os.replace(self.partial_path, self.path)
            if self._sync:
                _fsync(self.path.parent)
        self._lease.release()
        return self.path

    def _settle_distances(self, ok: NDArray[np.intp]) -> None:
        """Make the distances of the frames `ok` what a reader accepts."""
        stack = self._open_file()["stack"]
        reported = stack["focus_distance"][:][ok]
        used, self.distance_problem = usable_distances(reported, [f"{i}" for i in ok])
        if self.distance_problem is None:
            return
        unknown = bool(np.isnan(used).all())
        self.event(
            "focus_distances_ignored" if unknown else "focus_distances_spread",
            reason=self.distance_problem,
            reported_m=reported.tolist(),
            used_m=used.tolist(),
        )
        consequence = "they count as unknown" if unknown else "repeats are spread inside their rounding"
        logger.warning("%s: %s; %s", self.path, self.distance_problem.partition(";")[0], consequence)
        with _space(self.path, 0):
            for i, distance_m in zip(ok, used, strict=True):
                stack["focus_distance"][i] = distance_m
                if unknown:
                    stack["focus_distance_std"][i] = np.nan
                    stack["focus_distance_source"][i] = b""

    def discard(self) -> None:
        """Close and delete the partial file."""
        self.close()
        self.partial_path.unlink(missing_ok=True)

    def close(self) -> None:
        """Close the partial file and keep it; a second call does nothing."""
        if self._file is not None:
            file, self._file = self._file, None
            # after a full disk closing fails too; every frame that was acknowledged is on disk already
            with contextlib.suppress(OSError, RuntimeError):
                file.close()
        self._lease.release()

    def __enter__(self) -> StackWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_file(self) -> h5py.File:
        if self._file is None:
            raise ValueError(f"{self.path}: this writer is closed")
        return self._file

    def _set_status(self, index: int, status: int) -> None:
        self._open_file()["stack/status"][index] = status
        if self._sync:
            self._flush()

    def _flush(self) -> None:
        file = self._open_file()
        file.flush()
        os.fsync(file.id.get_vfd_handle())

    def _save_original(self, index: int, name: str, data: bytes) -> tuple[str, str]:
        """Writes one camera file beside the stack, replacing none; (name relative to the stack's folder, sha256).

        The folder carries the stack's uuid, so that a later stack of the same name leaves it alone.
        """
        digest = hashlib.sha256(data).hexdigest()
        folder = self.path.with_name(f"{_cut(self.path.name, 100).decode()}.{self.uuid[:8]}.originals")
        folder.mkdir(exist_ok=True)
        base = re.sub(r"[^\w.\-]", "_", Path(name.replace("\\", "/")).name)
        safe = Path(base.encode()[-100:].decode(errors="ignore"))
        target = folder / f"{index:03d}_{safe}"
        for again in itertools.count(2):  # a frame that was taken again, under the name of its first try
            if not target.exists():
                break
            if file_sha256(target) == digest:
                return f"{folder.name}/{target.name}", digest
            target = folder / f"{index:03d}_{safe.stem}_{again}{safe.suffix}"
        temporary = target.with_name(target.name + ".tmp")
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            if self._sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
        return f"{folder.name}/{target.name}", digest

    def _fitting_json(self, index: int, details: dict[str, Any]) -> str:
        """`details` as JSON within the space of the dataset; whole keys are left out from the end."""
        kept, left_out = dict(details), []
        while len(text := json.dumps(kept, default=str)) > _TEXTS["metadata_json"]:  # ASCII: characters are bytes
            left_out.append(kept.popitem()[0])
        if left_out:
            self.event("metadata_left_out", frame=index, keys=left_out[::-1])
        return text if details else ""


def write_stack(
    path: str | Path,
    frames: NDArray[Any],
    *,
    focus_distance_m: Sequence[float] | NDArray[np.floating[Any]] | None = None,
    focus_distance_std_m: float = np.nan,
    focus_distance_source: str = "",
    lens: Lens | None = None,
    transfer: Transfer = "linear",
    truth_depth_m: NDArray[np.floating[Any]] | None = None,
    truth_aif: NDArray[np.floating[Any]] | None = None,
    overwrite: bool = False,
    **create_options: Any,
) -> Path:
    """Store a whole stack at once; returns its path.

    Args:
        frames: (S, H, W, 3) or (S, H, W, 1), uint8 or uint16 in `transfer`, or floating linear light 0 to 1
            (`transfer` must be "linear"), which is stored as uint16.
        focus_distance_m: (S,) NaN unknown; left out, all are unknown.
        focus_distance_std_m: their standard error; 0 where they are exact, and are not to be fitted to the frames.
        create_options: anything else that `StackWriter.create` takes.
    """
    frames = np.asarray(frames)
    if frames.dtype.kind == "f":
        if transfer != "linear":
            raise ValueError(f"floating frames are linear light, transfer={transfer!r} is not")
        frames = (np.clip(frames, 0.0, 1.0) * 65535.0 + 0.5).astype(np.uint16)
    n_frames, height, width, channels = frames.shape
    distances = np.full(n_frames, np.nan) if focus_distance_m is None else np.asarray(focus_distance_m, np.float64)
    if distances.shape != (n_frames,):
        raise ValueError(f"focus_distance_m must be ({n_frames},) to match frames, got {distances.shape}")
    if problem := distance_problem(distances, [f"{i}" for i in range(n_frames)]):
        raise DataError(f"{path}: {problem}")
    with StackWriter.create(
        path,
        n_frames=n_frames,
        height=height,
        width=width,
        channels=channels,
        dtype=frames.dtype,
        transfer=transfer,
        lens=lens,
        truth_depth_m=truth_depth_m,
        truth_aif=truth_aif,
        overwrite=overwrite,
        sync=False,
        **create_options,
    ) as writer:
        try:
            for i in range(n_frames):
                writer.append(
                    i,
                    frames[i],
                    focus_distance_m=float(distances[i]),
                    focus_distance_std_m=focus_distance_std_m,
                    focus_distance_source=focus_distance_source,
                )
            return writer.finish()
        except BaseException:
            writer.discard()
            raise


def pack_stack(path: str | Path, out: str | Path, *, overwrite: bool = False) -> Path:
    """Repack a complete stack for archiving (gzip + shuffle, readable everywhere); returns `out`.

    Everything that the format knows is kept; the copy is compared with the original, bit for bit, before it gets its
    name.

    Raises:
        StackFormatError: the stack cannot be trusted. UsageError: `out` exists. NoSpaceError: the disk is full.
    """
    path, out = Path(path), Path(out)
    check_output(out, overwrite=overwrite)
    with Lease(out), FocalStack.open(path, deep=True) as stack:
        if partial_path(out).exists():
            raise UsageError(
                f"{partial_path(out)} holds an unfinished stack of that name; finish it with `daif capture --resume`, "
                "or choose another name"
            )
        check_free_space(out.parent, path.stat().st_size, out)
        packing = out.with_name(out.name + ".packing")
        try:
            with _space(out, path.stat().st_size):
                stack._file.copy_packed(packing)
                with FocalStack.open(packing, deep=True) as copy:
                    stack._file.compare(copy._file)
                _fsync(packing)
                os.replace(packing, out)
        except BaseException:
            packing.unlink(missing_ok=True)
            raise
    return out


def partial_path(path: str | Path) -> Path:
    """Where the stack `path` is written until it is complete."""
    return Path(f"{path}.partial")


def check_unfinished(path: Path) -> None:
    """Raises UsageError if an unfinished stack stands where the stack `path` would be written."""
    partial = partial_path(path)
    if not partial.exists():
        return
    with contextlib.suppress(DataError), FocalStack.open(partial, allow_partial=True) as stack:
        if stack.camera.get("driver") == "import":
            raise UsageError(f"{partial} is left of an import that was stopped; discard it with --force")
    raise UsageError(f"{partial} holds an unfinished stack; continue it with --resume, or discard it with --force")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def plan_sha256(plan: Mapping[str, Any]) -> str:
    """Hash by which `resume` recognises a plan."""
    return hashlib.sha256((_dumps(plan) or "").encode()).hexdigest()


def check_free_space(folder: Path, needed_bytes: int, target: Path) -> None:
    """Raises NoSpaceError, with the bytes needed and free, if `folder` cannot take `needed_bytes`."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise NoSpaceError(
            f"{target} needs {needed_bytes / 1e6:.1f} MB and {folder} has {free / 1e6:.1f} MB free; "
            "free some space, or choose another folder"
        )


@contextlib.contextmanager
def _space(path: Path, needed_bytes: int) -> Iterator[None]:
    """Turns the several ways in which HDF5 reports a full disk into one NoSpaceError."""
    try:
        yield
    except DaifError:
        raise
    except (OSError, RuntimeError, ValueError) as error:
        full = {errno.ENOSPC, errno.EDQUOT}
        if getattr(error, "errno", None) in full or "No space left" in str(error) or "errno = 28" in str(error):
            raise NoSpaceError(
                f"the disk is full while writing {path}, {needed_bytes / 1e6:.1f} MB more are needed; frames written "
                "before are safe: free some space and continue with --resume"
            ) from None
        raise


def _write_header(file: h5py.File, plan: Mapping[str, Any] | None) -> None:
    header = {
        "format": FORMAT,
        "format_version": VERSION,
        "uuid": str(uuid.uuid4()),
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "software": f"daif {_version()}",
        "default": "stack",
        "plan_sha256": "" if plan is None else plan_sha256(plan),
    }
    _set_attributes(file, header)
    file.attrs["complete"] = np.uint8(0)
    group = file.create_group("stack")
    group.attrs["signal"] = _text("frames")
    group.attrs["axes"] = np.array([b"frame", b"y", b"x", b"channel"])


def _version() -> str:
    try:
        return importlib.metadata.version("daif")
    except importlib.metadata.PackageNotFoundError:  # run from a source tree
        return "unknown"


def _make_dataset(
    file: h5py.File, name: str, shape: tuple[int, ...], dtype: np.dtype[Any], tile: tuple[int, int]
) -> h5py.Dataset:
    """A checksummed, uncompressed image dataset in tiles of one frame whose space is allocated now."""
    chunk = tile if len(shape) == 2 else (*tile, shape[-1])
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_chunk((1,) * (len(shape) - len(chunk)) + chunk)
    settings.set_fletcher32()
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    space = h5py.h5s.create_simple(shape)
    return h5py.Dataset(h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(dtype), space, settings, links))


def _tile(height: int, width: int) -> tuple[int, int]:
    """Tile of about 256 px a side that divides the image with little rest."""
    rows, cols = max(1, round(height / _TILE_PX)), max(1, round(width / _TILE_PX))
    return -(-height // rows), -(-width // cols)


def _make_table(file: h5py.File, n_frames: int, focus_unit: str) -> None:
    group = file["stack"]
    group.create_dataset("status", data=np.full(n_frames, PENDING, np.uint8))
    for name, (_, dtype, unit) in _NUMBERS.items():
        dataset = group.create_dataset(name, data=np.full(n_frames, np.nan, dtype))
        dataset.attrs["unit"] = _text(unit or focus_unit)
    group["focus_distance"].attrs["reference"] = _text("front principal plane")
    for name, length in _TEXTS.items():
        group.create_dataset(name, data=np.zeros(n_frames, f"S{length}"))
    file.create_dataset("events", data=np.zeros(_EVENTS_CHUNK, np.uint8), chunks=(_EVENTS_CHUNK,), maxshape=(None,))


def _write_optics(
    file: h5py.File,
    lens: Lens | None,
    lens_info: Mapping[str, str | float] | None,
    camera: Mapping[str, str | float] | None,
) -> None:
    group = file.create_group("lens")
    _set_attributes(group, lens_info)
    if lens is not None:
        numbers = {"focal_length": lens.focal_length_m, "f_number": lens.f_number, "pixel_pitch": lens.pixel_pitch_m}
        _set_attributes(group, numbers)
    _set_attributes(file.create_group("camera"), camera)


def _write_truth(
    file: h5py.File,
    depth_m: NDArray[np.floating[Any]] | None,
    aif: NDArray[np.floating[Any]] | None,
    size: tuple[int, int],
) -> None:
    for name, truth, shape, unit in (("depth", depth_m, size, "m"), ("all_in_focus", aif, (*size, 3), "1")):
        if truth is None:
            continue
        if truth.shape != shape:
            raise ValueError(f"true {name} must be {shape} to match the frames, got {truth.shape}")
        dataset = _make_dataset(file, f"ground_truth/{name}", shape, np.dtype(np.float32), _tile(*size))
        dataset[...] = truth
        dataset.attrs["unit"] = _text(unit)


def _write_content(file: h5py.File, name: str, content: str | bytes | None) -> None:
    if content:
        data = content.encode() if isinstance(content, str) else content
        file.create_dataset(name, data=np.frombuffer(data, np.uint8))


def _set_attributes(holder: Any, values: Mapping[str, Any] | None) -> None:
    for name, value in (values or {}).items():
        if isinstance(value, str):
            holder.attrs[name] = _text(value)
        elif isinstance(value, list | tuple) and value and isinstance(value[0], str):
            holder.attrs[name] = np.array([item.encode() for item in value])
        else:
            holder.attrs[name] = np.asarray(value)


def _text(text: str) -> Any:
    """Text as a fixed-length HDF5 string: damaged variable-length ones make HDF5 hang."""
    data = text.encode()
    return np.array(data, h5py.string_dtype("utf-8", max(1, len(data))))


def _dumps(value: Mapping[str, Any] | None) -> str | None:
    return None if value is None else json.dumps(value, sort_keys=True, separators=(",", ":"))


def _cut(text: str, n_bytes: int) -> bytes:
    """UTF-8 of `text`, cut between characters to at most `n_bytes`."""
    return text.encode()[:n_bytes].decode(errors="ignore").encode()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
