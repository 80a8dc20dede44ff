"""Camera bytes to pixels: JPEG, PNG, TIFF and RAW files decoded as stored, and transfer functions to linear light."""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.errors import DataError
from capture.exif import exif_block, is_tiff, jpeg_segments, read_tags

Transfer = Literal["linear", "srgb", "rec709"]

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".tif", ".tiff"}
RAW_SUFFIXES = {
    *(".dng", ".nef", ".nrw", ".cr2", ".cr3", ".crw", ".arw", ".srf", ".sr2", ".raf", ".orf", ".rw2", ".pef", ".srw"),
    *(".x3f", ".3fr", ".iiq", ".kdc", ".dcr", ".mrw", ".raw"),
}
MAX_PIXELS = 1 << 28  # 268 megapixels; a bigger claim is a damaged or hostile header


class Decoded(NamedTuple):
    """An image as its file stores it: no rotation, no colour management, no tone curve undone.

    Attributes:
        pixels: (H, W, C) uint8 or uint16, RGB order, C = 1 or 3.
        transfer: curve that the values are stored with; `assumed` where the file leaves it open.
        white_level: value that means 1.0.
        exif: EXIF block (TIFF structure) of a JPEG or PNG, or None.
        white_balance: the four gains that a RAW file was developed with, None for other files.
        notes: what a careful user should hear, e.g. that an alpha channel was dropped.
    """

    pixels: NDArray[Any]
    transfer: Transfer
    white_level: float
    exif: bytes | None = None
    white_balance: tuple[float, ...] | None = None
    notes: tuple[str, ...] = ()


def decode_image(
    source: bytes | str | Path,
    *,
    name: str | None = None,
    white_balance: Sequence[float] | None = None,
    half_size: bool = True,
) -> Decoded:
    """The pixels of a JPEG, PNG, TIFF (8 or 16 bit) or camera RAW file.

    Args:
        source: a file, or its bytes; `name` then says what it is called (RAW files are known by their suffix).
        white_balance: RAW only: gains to develop with. Develop all frames of a stack with those of its first
            frame; left out, the camera's own are used and returned.
        half_size: RAW only: one RGB pixel per 2 x 2 sensor cells, without interpolation.

    Raises:
        DataError: no such file, not an image, truncated, too large, or of an unsupported kind.
    """
    if isinstance(source, bytes):
        data, name = source, name or "image"
    else:
        name = name or str(source)
        try:
            data = Path(source).read_bytes()
        except OSError as error:
            raise DataError(f"{name} cannot be read: {error.strerror}") from None
    if not data:
        raise DataError(f"{name} is empty; copy it from the camera again")
    if Path(name).suffix.lower() in RAW_SUFFIXES:
        return _decode_raw(data, name, white_balance, half_size)
    if data[:2] == b"\xff\xd8":
        _check_jpeg(data, name)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data, name)
    elif is_tiff(data):
        _check_tiff(data, name)
    else:
        raise DataError(
            f"{name} is no image that can be read: expected JPEG, PNG, TIFF or camera RAW, found bytes {data[:4]!r}"
        )
    return _decode_standard(data, name)


def is_image_name(name: str) -> bool:
    """Whether a file of this name is one that `decode_image` reads."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES | RAW_SUFFIXES


def _decode_standard(data: bytes, name: str) -> Decoded:
    import cv2

    try:
        # -1 is IMREAD_UNCHANGED; the EXIF orientation must not turn single frames of a stack
        pixels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED | cv2.IMREAD_IGNORE_ORIENTATION)
    except cv2.error as error:
        reason = " ".join(str(error).split())[:120]
        raise DataError(f"{name} cannot be decoded ({reason}); copy or export it again") from None
    if pixels is None:
        raise DataError(f"{name} cannot be decoded, it is damaged or of an unusual kind; copy or export it again")
    if pixels.dtype not in (np.uint8, np.uint16):
        raise DataError(f"{name}: expected 8 or 16 bits per channel, found {pixels.dtype}; export it as 16-bit TIFF")
    notes = []
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    if pixels.shape[2] in (2, 4):
        notes.append("its alpha channel was dropped")
        pixels = pixels[..., : pixels.shape[2] - 1]
    if pixels.shape[2] == 3:
        pixels = pixels[..., ::-1]
    elif pixels.shape[2] != 1:
        raise DataError(f"{name}: expected 1 or 3 colour channels, found {pixels.shape[2]}")
    if pixels.dtype == np.uint16:
        notes.append("16-bit values are taken as sRGB; write `transfer: linear` into stack.yaml if they are linear")
    white_level = float(np.iinfo(pixels.dtype).max)
    return Decoded(np.ascontiguousarray(pixels), "srgb", white_level, exif_block(data), None, tuple(notes))


def _check_pixels(width: int, height: int, name: str) -> None:
    if not 0 < width * height <= MAX_PIXELS:
        raise DataError(f"{name}: its header claims {width} x {height} px, expected 1 to {MAX_PIXELS} px in all")


_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]", re.DOTALL)


def _check_jpeg(data: bytes, name: str) -> None:
    """Refuses what libjpeg would fill up with grey: a JPEG without its end marker."""
    segments = jpeg_segments(data)
    frames = [start for marker, start, _ in segments if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC)]
    if frames and frames[0] + 5 <= len(data):
        height, width = struct.unpack_from(">HH", data, frames[0] + 1)
        _check_pixels(width, height, name)
    truncated = f"{name} is truncated, the end of the JPEG data is missing; copy it from the camera again"
    if not frames or not segments or segments[-1][0] != 0xDA:
        raise DataError(truncated)
    position = segments[-1][2]
    while True:
        found = _JPEG_MARKER.search(data, position)
        if found is None:
            raise DataError(truncated)
        marker, position = data[found.start() + 1], found.end()
        if marker == 0xD9:
            return
        if position + 2 > len(data):
            raise DataError(truncated)
        position += struct.unpack_from(">H", data, position)[0]  # tables and headers of the next progressive scan


def _check_png(data: bytes, name: str) -> None:
    """Checks the size, that all chunks are there, and their checksums."""
    position = 8
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if end > len(data):
            break
        if zlib.crc32(data[position + 4 : end - 4]) != struct.unpack_from(">I", data, end - 4)[0]:
            raise DataError(f"{name} is damaged, the checksum of its {kind!r} chunk is wrong; copy or export it again")
        if kind == b"IHDR" and length >= 8:
            width, height = struct.unpack_from(">II", data, position + 8)
            _check_pixels(width, height, name)
        if kind == b"IEND":
            return
        position = end
    raise DataError(f"{name} is truncated, the end of the PNG data is missing; copy or export it again")


def _check_tiff(data: bytes, name: str) -> None:
    """Checks the size, that every strip or tile lies inside the file, and that OpenCV reads this layout of values."""
    tags = read_tags(data)
    width, height = tags.get(256), tags.get(257)
    if not isinstance(width, int) or not isinstance(height, int):
        raise DataError(f"{name} is truncated or no TIFF image: its size is missing; export it again")
    _check_pixels(width, height, name)
    for offsets, counts in ((273, 279), (324, 325)):
        starts, lengths = (tags.get(tag, []) for tag in (offsets, counts))
        starts, lengths = (
            [item for item in (value if isinstance(value, list) else [value]) if isinstance(item, int)]
            for value in (starts, lengths)
        )
        if any(start + length > len(data) for start, length in zip(starts, lengths, strict=False)):
            raise DataError(f"{name} is truncated, part of the TIFF data is missing; copy or export it again")

    bits, samples, kind, planes = (_integer(tags.get(tag)) for tag in (258, 277, 262, 284))
    if bits > 8:  # values that OpenCV takes as they stand in the file
        if kind not in (1, 2):
            raise DataError(
                f"{name}: expected 16-bit values that grow with light, grey or RGB, found PhotometricInterpretation "
                f"{kind}; export it as 16-bit RGB TIFF"
            )
        if samples > 1 and planes == 2:
            raise DataError(
                f"{name}: expected 16-bit colours side by side, found one plane per colour (PlanarConfiguration 2); "
                "export it with interleaved channels"
            )


def _integer(value: Any) -> int:
    """Of a tag, or of its first value; 1, which is TIFF's default for most, where there is none."""
    value = value[0] if isinstance(value, list) and value else value
    return value if isinstance(value, int) else 1


def _decode_raw(data: bytes, name: str, white_balance: Sequence[float] | None, half_size: bool) -> Decoded:
    """RAW developed to linear light, alike for every frame (notes/capture.md 6)."""
    import io

    import rawpy

    try:
        with rawpy.imread(io.BytesIO(data)) as raw:
            _check_pixels(raw.sizes.width, raw.sizes.height, name)
            if 16 * len(data) < raw.sizes.raw_width * raw.sizes.raw_height:  # no camera packs into half a bit a pixel
                raise DataError(
                    f"{name} is truncated, most of its sensor data is missing; copy it from the camera again"
                )
            gains = _white_balance(raw) if white_balance is None else tuple(white_balance)
            pixels = raw.postprocess(
                gamma=(1, 1),
                no_auto_bright=True,
                output_bps=16,
                adjust_maximum_thr=0.0,  # the default rescales by the frame's peak, which defocus changes
                use_camera_wb=False,
                user_wb=list(gains),
                output_color=rawpy.ColorSpace.sRGB,
                user_flip=0,
                half_size=half_size,
            )
    except (rawpy.LibRawError, MemoryError, ValueError, RuntimeError) as error:
        reason = " ".join(str(getattr(error, "args", [error])[0]).split())[:80]
        raise DataError(
            f"{name} cannot be developed ({reason}): it is truncated, holds no sensor data, or is of a camera that "
            "LibRaw does not know; copy it again, or convert it to DNG"
        ) from None
    if pixels.min() == pixels.max():
        raise DataError(f"{name} has no picture in it, every pixel is {pixels.min()}; copy it from the camera again")
    return Decoded(np.ascontiguousarray(pixels), "linear", 65535.0, None, gains)


def _white_balance(raw: Any) -> tuple[float, ...]:
    """The camera's gains (R, G, B, G2), else daylight's, else none."""
    for gains in (raw.camera_whitebalance, raw.daylight_whitebalance):
        if min(gains[:3]) > 0:
            return (*map(float, gains[:3]), float(gains[3] or gains[1]))
    return (1.0, 1.0, 1.0, 1.0)


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
