"""Camera bytes to pixels: JPEG, PNG, TIFF and RAW files decoded as stored, and transfer functions to linear light."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

Transfer = Literal["linear", "srgb", "rec709"]


def to_linear(raw: NDArray[Any], transfer: Transfer, white_level: float | None = None) -> NDArray[np.float32]:
    """Linear RGB (H, W, 3) float32, 0 to 1, of stored u8 or u16 values (H, W, 3), (H, W, 1) or (H, W).

    Args:
        transfer: the curve that the values are stored with (`transfer_to_linear`).
        white_level: stored value that means 1.0; the type's largest if left out. Values above it become 1.
    """
    if raw.ndim == 2:
        raw = raw[..., None]
    if white_level is None:
        white_level = float(np.iinfo(raw.dtype).max)
    linear = _linear_table(raw.dtype.itemsize, transfer, white_level)[raw]
    return np.repeat(linear, 3, axis=2) if linear.shape[2] == 1 else linear


def to_srgb8(linear: NDArray[np.floating[Any]]) -> NDArray[np.uint8]:
    """sRGB u8 of linear values 0 to 1 of any shape; what lies outside is clipped, NaN becomes 0."""
    return _srgb_table(255)[_table_index(linear)].astype(np.uint8)


def to_srgb16(linear: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    """sRGB u16 of linear values 0 to 1 of any shape; what lies outside is clipped, NaN becomes 0."""
    clipped = np.clip(np.nan_to_num(linear, nan=0.0), 0.0, 1.0)
    return np.round(linear_to_transfer(clipped, "srgb") * 65535.0).astype(np.uint16)


def transfer_to_linear(encoded: NDArray[np.floating[Any]], transfer: Transfer) -> NDArray[np.floating[Any]]:
    """Linear light of encoded values 0 to 1 (IEC 61966-2-1 for srgb, the inverse of BT.709's OETF for rec709)."""
    if transfer == "linear":
        return encoded
    if transfer == "srgb":
        return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    return np.where(encoded < 0.081, encoded / 4.5, ((encoded + 0.099) / 1.099) ** (1.0 / 0.45))


def linear_to_transfer(linear: NDArray[np.floating[Any]], transfer: Transfer) -> NDArray[np.floating[Any]]:
    """The inverse of `transfer_to_linear`, for linear values 0 to 1."""
    if transfer == "linear":
        return linear
    if transfer == "srgb":
        return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1.0 / 2.4) - 0.055)
    return np.where(linear < 0.018, linear * 4.5, 1.099 * linear**0.45 - 0.099)


@lru_cache(maxsize=16)
def _linear_table(itemsize: int, transfer: Transfer, white_level: float) -> NDArray[np.float32]:
    codes = np.arange(1 << (8 * itemsize), dtype=np.float64)
    return transfer_to_linear(np.minimum(codes / white_level, 1.0), transfer).astype(np.float32)


_TABLE_BITS = 16


def _table_index(linear: NDArray[np.floating[Any]]) -> NDArray[np.uint16]:
    top = (1 << _TABLE_BITS) - 1
    return (np.clip(np.nan_to_num(linear, nan=0.0), 0.0, 1.0) * top + 0.5).astype(np.uint16)


@lru_cache(maxsize=1)
def _srgb_table(top: int) -> NDArray[np.float64]:
    linear = np.linspace(0.0, 1.0, 1 << _TABLE_BITS)
    return np.round(linear_to_transfer(linear, "srgb") * top)
