"""What a stack says of the calibration board in its scene; `calibration/board.py` draws it and finds it."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, field_validator


class BoardDescription(BaseModel):
    """A printed ChArUco board.

    Attributes:
        columns, rows: number of squares; an odd number of rows looks the same in old and new OpenCV.
        square_m: side of a square in metres, as measured on the print.
        texture: whether black squares carry the fine patch of `daif board`.
        legacy_pattern: pattern of OpenCV before 4.6 (differs for even `rows`).
        measured: whether somebody held a ruler to the print.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    columns: int = Field(default=7, ge=3, le=30)
    rows: int = Field(default=5, ge=3, le=30)
    square_m: float = 0.035
    texture: bool = True
    legacy_pattern: bool = False
    measured: bool = False

    @field_validator("square_m")
    @classmethod
    def _square_in_metres(cls, value: float) -> float:
        if not 1e-3 < value < 1.0:
            raise ValueError(f"{value:g} is not a square in metres (0.001 to 1); 35 mm is 0.035")
        return value
