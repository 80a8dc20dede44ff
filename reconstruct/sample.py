"""One scene of a published data set, and what a reader of such a set offers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from capture.errors import UsageError
from capture.lens import Lens
from capture.stack import Transfer, write_stack

FloatMap = NDArray[np.float32]


@dataclass(frozen=True)
class Sample:
    """One scene as a focal stack.

    Attributes:
        frames: (S, H, W, 3) uint8 in `transfer`.
        focus_distance_m: (S,) NaN where unknown.
        lens: of frames that were computed, whose focus is exact. None where nothing published fixes the blur gain;
            it is then estimated from the frames.
        truth_depth_m: (H, W) metres, NaN where unknown.
    """

    frames: NDArray[np.uint8]
    focus_distance_m: NDArray[np.float64]
    transfer: Transfer
    lens: Lens | None = None
    truth_depth_m: FloatMap | None = None
    truth_aif: FloatMap | None = None

    def only(self, frames: Sequence[int]) -> Sample:
        """The stack of these frames, in this order; UsageError if one does not exist, or if it is only one."""
        count = len(self.frames)
        missing = [i for i in frames if not 0 <= i < count]
        if missing:
            raise UsageError(f"--frames asks for {missing[0]}, but the stacks have frames 0 to {count - 1}")
        if len(frames) < 2:
            raise UsageError(f"--frames asks for {frames[0]} alone, but depth needs at least two frames; name more")
        chosen = list(frames)
        return replace(self, frames=self.frames[chosen], focus_distance_m=self.focus_distance_m[chosen])

    def write(self, path: Path, *, source: str) -> Path:
        """Store it, over whatever is there; `source` says where the focus distances come from."""
        return write_stack(
            path,
            self.frames,
            focus_distance_m=self.focus_distance_m,
            focus_distance_std_m=np.nan if self.lens is None else 0.0,
            focus_distance_source=source,
            lens=self.lens,
            transfer=self.transfer,
            truth_depth_m=self.truth_depth_m,
            truth_aif=self.truth_aif,
            overwrite=True,
        )


class DataSet(Protocol):
    """A data set at hand, opened at one split."""

    @property
    def scenes(self) -> Mapping[str, Any]:
        """Name of every scene (and of its stack), with what the reader needs to find it."""

    def sample(self, name: str) -> Sample:
        """The scene as a focal stack."""

    def truth(self, name: str) -> FloatMap:
        """What published tables compare with, in their unit and size; see each class."""
