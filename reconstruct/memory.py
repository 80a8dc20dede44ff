"""Memory planned before it is used: how large a tile may be, and what to do when even the smallest does not fit.

The bytes per pixel of plane sweep and network are the growth of peak resident memory of a fresh process (704 x 704 px,
5 and 10 frames, one thread, torch 2.13 on CPU), inputs included. Those of refinement were found with 352 x 352 px.
"""

from __future__ import annotations

import ctypes
import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import psutil
import torch
from numpy.typing import NDArray

from capture.errors import NoSpaceError
from capture.output import room_in

# bytes per tile pixel: constant part, and per frame
SWEEP_BYTES = (470, 175)
NETWORK_BYTES = (1450, 100)
REFINE_BYTES = (4500, 350)
OUTPUT_BYTES_PER_PX = 45  # depth, spread, confidence, sharp image, and what writing and the report add
EVIDENCE_BYTES = 2 * 32 * 4  # per working pixel of a tiled picture
FIXED_BYTES = 200_000_000
USABLE = 0.85  # share of the free memory that may be planned for
CONTROL_GROUPS, OWN_GROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
KEPT_BYTES = 512_000_000
LARGEST_KEPT_BYTES = 1 << 25  # more, glibc refuses
NO_MEMORY = ("out of memory", "not enough memory", "insufficient memory", "can't allocate memory")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of its malloc.h


@dataclass(frozen=True)
class MemoryPlan:
    """What one stack will use.

    Attributes:
        tile_px: side of a tile's core.
        smaller_px: cores to fall back to, largest first.
        needed_bytes: peak memory beyond what the process already holds.
        free_bytes: what is free now, for this process.
        where: which memory these two are about.
        scratch_bytes: of `needed_bytes`, for what belongs to the whole picture.
        file_bytes: of that, what has to go to a temporary file instead.
    """

    tile_px: int
    smaller_px: tuple[int, ...]
    needed_bytes: int
    free_bytes: int
    where: str
    scratch_bytes: int
    file_bytes: int

    def __str__(self) -> str:
        file = f", and {self.file_bytes / 1e9:.1f} GB in {tempfile.gettempdir()}" if self.file_bytes else ""
        return (
            f"memory: tiles of {self.tile_px} px, about {self.needed_bytes / 1e9:.1f} GB of "
            f"{self.free_bytes / 1e9:.1f} GB free {self.where}{file}"
        )


class Scratch:
    """Large arrays of one stack: in memory up to `limit_bytes`, beyond it in files that disappear with the arrays."""

    def __init__(self, limit_bytes: int) -> None:
        self.left = limit_bytes

    def empty(self, shape: tuple[int, ...]) -> NDArray[np.float32]:
        """An array of unknown content; NoSpaceError if the disk is full."""
        size = 4 * math.prod(shape)
        if size <= self.left:
            self.left -= size
            return np.empty(shape, np.float32)
        return on_disk(shape, np.dtype(np.float32))


def on_disk(shape: tuple[int, ...], dtype: np.dtype[Any], folder: Path | None = None) -> NDArray[Any]:
    """An array of unknown content, mapped from a file without a name in `folder` (or where temporary files go).

    The file goes with the array. Raises NoSpaceError if the disk is full.
    """
    size = dtype.itemsize * math.prod(shape)
    where = Path(tempfile.gettempdir()) if folder is None else folder
    instead = "set TMPDIR to another disk" if folder is None else "use another -o"
    amount = f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
    room = room_in(where, f"{amount} of intermediate results", instead)
    with room, tempfile.TemporaryFile(prefix="daif-", dir=where) as file:  # the mapping outlives it
        os.ftruncate(file.fileno(), size)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)  # a full disk is an error now, not a crash later
        return np.memmap(file, dtype, "r+", shape=shape)


def plan(
    height: int,
    width: int,
    n_frames: int,
    *,
    step: int,
    tile_px: int,
    halo_px: int,
    network: bool = False,
    refine: bool = False,
    device: torch.device | None = None,
    share: float = 1.0,
) -> MemoryPlan:
    """The largest tile, `tile_px` or a half or a quarter of it, with which a stack of this size fits.

    Args:
        step: factor by which frames are reduced to the working scale.
        device: where tiles are computed; what belongs to the whole picture is always in the machine's own memory.
        share: part of the machine's memory that this process may count on, 1 / workers.

    Raises NoSpaceError, naming both sizes, if the smallest tile does not fit.
    """
    per_px, per_frame = NETWORK_BYTES if network else SWEEP_BYTES
    if refine:
        per_px, per_frame = max(per_px, REFINE_BYTES[0]), max(per_frame, REFINE_BYTES[1])
    outputs = height * width * OUTPUT_BYTES_PER_PX + FIXED_BYTES
    small = height // step, width // step
    kept = 12 * n_frames * math.prod(small) if step > 1 else 0
    if max(small) > tile_px + 2 * halo_px:
        kept += EVIDENCE_BYTES * math.prod(small)
    free = int(min(free_bytes(), share * limit_bytes()))
    on_gpu = device is not None and device.type == "cuda"
    free_there = torch.cuda.mem_get_info(device)[0] if on_gpu else 0
    sides = [side for side in (tile_px, tile_px // 2, tile_px // 4) if side > 0]
    for i, side in enumerate(sides):
        tile = (per_px + per_frame * n_frames) * math.prod(min(n, side + 2 * halo_px) for n in small)
        if on_gpu and tile > USABLE * free_there:
            continue
        ram_tile = 0 if on_gpu else tile
        beside = outputs if step == 1 else FIXED_BYTES  # reduced maps are kept, full-size ones made later
        for scratch in (kept, 0):
            needed = max(outputs, beside + scratch) + ram_tile
            if needed < USABLE * free:
                where = f"in RAM, {tile / 1e9:.1f} GB on {device}" if on_gpu else "in RAM"
                return MemoryPlan(side, tuple(sides[i + 1 :]), needed, free, where, scratch, kept - scratch)
    what = f"{n_frames} frames of {width} x {height} px"
    if on_gpu and tile > USABLE * free_there:
        raise NoSpaceError(
            f"{what} need about {tile / 1e9:.1f} GB on {device} even in the smallest tiles and {free_there / 1e9:.1f} "
            "GB are free there; end what else uses it, or use --device cpu"
        )
    raise NoSpaceError(
        f"{what} need about {needed / 1e9:.1f} GB even in the smallest tiles and {free / 1e9:.1f} GB are "
        "free; close other programs, use fewer --workers, or reduce the frames"
    )


def keep_freed_memory() -> None:
    """Lets glibc keep up to KEPT_BYTES of freed memory for the next tensors; elsewhere nothing changes.

    Otherwise it hands every few tensors' worth back to the system, and a tenth of the network's time on a CPU goes into
    touching the same pages anew.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return
    mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES)
    mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def ran_out(error: BaseException) -> bool:
    """Whether `error` is what Python, NumPy, OpenCV or torch raise when memory ran out."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in NO_MEMORY)


def free_bytes() -> int:
    """Memory that this process can still take, without swapping: of the machine, or of its control group."""
    free = psutil.virtual_memory().available
    for limit, used in _control_groups():
        free = min(free, limit - used)
    return max(0, int(free))


def limit_bytes() -> int:
    """All memory of the machine, or of the control group (container, Slurm job) that this process runs in."""
    return int(min([psutil.virtual_memory().total, *(limit for limit, _ in _control_groups())]))


def _control_groups() -> Iterator[tuple[int, int]]:
    """(limit, used without file cache) of each control group with a limit, version 2 or 1, that this process is in.

    A group's own limit and those of the groups around it all hold.
    """
    try:
        lines = OWN_GROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, kinds, place = line.split(":", 2)
        if kinds == "":
            root, names = CONTROL_GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in kinds.split(","):
            root = CONTROL_GROUPS / "memory"
            names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
        else:
            continue
        inside = PurePosixPath(place.lstrip("/"))
        for group in (inside, *inside.parents):
            yield from _group_limit(root / group, *names)


def _group_limit(folder: Path, limit_name: str, used_name: str, cache_name: str) -> Iterator[tuple[int, int]]:
    try:
        limit, used = (int((folder / name).read_text()) for name in (limit_name, used_name))
        lines = (folder / "memory.stat").read_text().split("\n")
    except (OSError, ValueError):  # no such group, or "max"
        return
    cache = sum(int(line.split()[1]) for line in lines if line.startswith(cache_name + " "))
    yield limit, max(0, used - cache)
