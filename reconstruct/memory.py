"""Memory planned before it is used: how large a tile may be, and what to do when even the smallest does not fit.

The bytes per pixel of plane sweep and network are the growth of peak resident memory of a fresh process (704 x 704 px,
5 and 10 frames, one thread, torch 2.13 on CPU), inputs included. Those of refinement are a cautious guess.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from capture.errors import NoSpaceError

# bytes per tile pixel: constant part, and per frame
SWEEP_BYTES = (470, 175)
NETWORK_BYTES = (650, 200)
REFINE_BYTES = (2500, 350)
OUTPUT_BYTES_PER_PX = 45  # depth, spread, confidence, sharp image, and what writing and the report add
FIXED_BYTES = 200_000_000
USABLE = 0.85  # share of the free memory that may be planned for


@dataclass(frozen=True)
class MemoryPlan:
    """What one stack will use.

    Attributes:
        tile_px: side of a tile's core.
        smaller_px: cores to fall back to, largest first.
        needed_bytes: peak memory beyond what the process already holds.
        free_bytes: what is free now, for this process.
    """

    tile_px: int
    smaller_px: tuple[int, ...]
    needed_bytes: int
    free_bytes: int
    where: str

    def __str__(self) -> str:
        return (
            f"memory: tiles of {self.tile_px} px, about {self.needed_bytes / 1e9:.1f} GB of "
            f"{self.free_bytes / 1e9:.1f} GB free {self.where}"
        )


def plan(
    height: int,
    width: int,
    n_frames: int,
    *,
    tile_px: int,
    halo_px: int,
    network: bool = False,
    refine: bool = False,
    device: torch.device | None = None,
    share: float = 1.0,
) -> MemoryPlan:
    """The largest tile, `tile_px` or a half or a quarter of it, with which a stack of this size fits.

    Args:
        device: where tiles are computed; the outputs are always in the machine's own memory.
        share: part of the machine's memory that this process may count on, 1 / workers.

    Raises NoSpaceError, naming both sizes, if the smallest tile does not fit.
    """
    per_px, per_frame = NETWORK_BYTES if network else SWEEP_BYTES
    if refine:
        per_px, per_frame = max(per_px, REFINE_BYTES[0]), max(per_frame, REFINE_BYTES[1])
    outputs = height * width * OUTPUT_BYTES_PER_PX + FIXED_BYTES
    free = int(min(free_bytes(), share * limit_bytes()))
    on_gpu = device is not None and device.type == "cuda"
    free_for_tiles = torch.cuda.mem_get_info(device)[0] if on_gpu else free - outputs
    sides = [side for side in (tile_px, tile_px // 2, tile_px // 4) if side > 0]
    for i, side in enumerate(sides):
        tile = min(height, side + 2 * halo_px) * min(width, side + 2 * halo_px) * (per_px + per_frame * n_frames)
        if outputs < USABLE * free and tile < USABLE * free_for_tiles:
            needed = tile if on_gpu else outputs + tile
            where = f"on {device}" if on_gpu else "in RAM"
            return MemoryPlan(side, tuple(sides[i + 1 :]), needed, free_for_tiles if on_gpu else free, where)
    raise NoSpaceError(
        f"{n_frames} frames of {width} x {height} px need about {(outputs + tile) / 1e9:.1f} GB even in the smallest "
        f"tiles and {free / 1e9:.1f} GB are free; close other programs, use fewer --workers, or reduce the frames"
    )


def ran_out(error: BaseException) -> bool:
    """Whether `error` is what Python, NumPy, OpenCV or torch raise when memory ran out."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError):
        return True
    text = str(error).lower()
    return any(words in text for words in ("out of memory", "not enough memory", "insufficient memory"))


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
    """(limit, used without file cache) of the control group, version 2 or 1, where it has a limit."""
    for folder, limit_name, used_name, cache_name in (
        ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            limit = int((Path(folder) / limit_name).read_text())
            used = int((Path(folder) / used_name).read_text())
            lines = (Path(folder) / "memory.stat").read_text().split("\n")
        except (OSError, ValueError):  # no such group, or "max"
            continue
        cache = sum(int(line.split()[1]) for line in lines if line.startswith(cache_name + " "))
        yield limit, max(0, used - cache)
