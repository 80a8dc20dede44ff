"""Arrays to the files that other programs read: PNG with EXIF, PLY, GLB, float TIFF, EXR, nerfstudio."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.errors import DataError, UsageError

DepthUnit = Literal["mm", "um"]
UNITS_PER_METRE: dict[str, float] = {"mm": 1e3, "um": 1e6}
PNG_MAX = 65535
EXTRA_FORMATS = ("glb", "tiff", "exr", "nerfstudio")
_TURBO_RGB = cv2.applyColorMap(np.arange(256, dtype=np.uint8)[:, None], cv2.COLORMAP_TURBO)[..., ::-1].copy()
_UNKNOWN_RGB = (40, 40, 40)


@dataclass(frozen=True)
class Intrinsics:
    """A pinhole camera in pixels of the image it goes with; `assumed` when the lens is not known."""

    focal_px: float
    centre_x_px: float
    centre_y_px: float
    assumed: bool = False

    @classmethod
    def assume(cls, height: int, width: int) -> Intrinsics:
        """A normal lens (focal length = 1.2 x the longer side), for stacks whose lens is unknown."""
        return cls(1.2 * max(height, width), (width - 1) / 2, (height - 1) / 2, assumed=True)


def write_depth_png(path: Path, depth_m: NDArray[np.float32], unit: DepthUnit = "mm") -> int:
    """Write (H, W) metres as 16-bit PNG in `unit`, 0 = unknown; returns how many pixels were out of range.

    This is what nerfstudio reads (data_conventions.md). Depth beyond 65.535 m (mm) or 65.5 mm (um) cannot be
    stored and becomes unknown; `depth.npy` keeps it.
    """
    scaled = np.where(np.isfinite(depth_m), depth_m, 0.0) * UNITS_PER_METRE[unit]
    out_of_range = (scaled > PNG_MAX) | ((scaled < 0.5) & np.isfinite(depth_m))
    write_png(path, np.where(out_of_range, 0, np.rint(scaled)).astype(np.uint16))
    return int(out_of_range.sum())


def write_png(path: Path, image: NDArray[np.uint8] | NDArray[np.uint16], exif: bytes | None = None) -> None:
    """Write an RGB (H, W, 3) or grey (H, W) image as PNG, with an EXIF block (TIFF bytes) if given."""
    ok, encoded = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2BGR) if image.ndim == 3 else image)
    if not ok:
        raise DataError(f"{path}: cannot encode an image of shape {image.shape} as PNG")
    data = encoded.tobytes()
    if exif:
        after_header = 8 + 25  # signature, then the IHDR chunk
        chunk = b"eXIf" + exif
        data = (
            data[:after_header]
            + struct.pack(">I", len(exif))
            + chunk
            + struct.pack(">I", zlib.crc32(chunk))
            + data[after_header:]
        )
    path.write_bytes(data)


def colorize(values: NDArray[np.floating], low: float, high: float) -> NDArray[np.uint8]:
    """Turbo colours (H, W, 3) for `values` between `low` (blue) and `high` (red); NaN is dark grey."""
    scaled = (values - low) / max(high - low, 1e-12)
    index = np.clip(np.nan_to_num(scaled) * 255, 0, 255).astype(np.uint8)
    rgb = cv2.applyColorMap(index, _TURBO_RGB)  # three times as fast as indexing, which at 100 MP took seconds
    rgb[~np.isfinite(values)] = _UNKNOWN_RGB
    return rgb


def colorize_inverse_depth(inverse_depth_dpt: NDArray[np.floating]) -> tuple[NDArray[np.uint8], float, float]:
    """Depth in colours, near red and far blue, spread evenly over dioptres; also the two ends in dioptres."""
    finite = inverse_depth_dpt[np.isfinite(inverse_depth_dpt)]
    finite = finite[:: max(1, finite.size // 1_000_000)]  # the ends do not need every pixel
    low, high = (float(v) for v in np.percentile(finite, [1, 99])) if finite.size else (0.0, 1.0)
    high = max(high, low + 1e-9)
    return colorize(inverse_depth_dpt, low, high), low, high


def back_project(depth_m: NDArray[np.float32], intrinsics: Intrinsics, stride: int = 1) -> NDArray[np.float32]:
    """Camera coordinates (h, w, 3) in metres, x right, y down, z forward, of every `stride`-th row and column.

    NaN where the depth is.
    """
    height, width = depth_m.shape
    x = (np.arange(0, width, stride, dtype=np.float32) - intrinsics.centre_x_px) / intrinsics.focal_px
    y = (np.arange(0, height, stride, dtype=np.float32) - intrinsics.centre_y_px) / intrinsics.focal_px
    z = depth_m[::stride, ::stride]
    return np.stack([x[None, :] * z, y[:, None] * z, z], axis=-1)


def write_ply(
    path: Path,
    depth_m: NDArray[np.float32],
    rgb: NDArray[np.uint8],
    confidence: NDArray[np.float32],
    intrinsics: Intrinsics,
    max_points: int = 1_000_000,
    *,
    metric: bool = True,
) -> int:
    """Write a binary point cloud (x right, y down, z forward; metres) and return the number of points.

    Every n-th row and column is taken so that at most `max_points` remain; unknown depth is left out. Without
    `metric` the file says that its lengths have no unit.
    """
    stride = max(1, int(np.ceil(np.sqrt(depth_m.size / max_points))))
    xyz = back_project(depth_m, intrinsics, stride).reshape(-1, 3)
    colour = rgb[::stride, ::stride].reshape(-1, 3)
    sure = confidence[::stride, ::stride].reshape(-1)
    known = np.isfinite(xyz).all(axis=1)
    vertex = np.empty(
        int(known.sum()),
        dtype=[("xyz", "<f4", 3), ("rgb", "u1", 3), ("confidence", "<f4")],
    )
    vertex["xyz"], vertex["rgb"], vertex["confidence"] = xyz[known], colour[known], sure[known]
    properties = "".join(f"property float {axis}\n" for axis in "xyz")
    properties += "".join(f"property uchar {channel}\n" for channel in ("red", "green", "blue"))
    unit = "metres" if metric else "relative depth, no unit"
    header = (
        f"ply\nformat binary_little_endian 1.0\ncomment {unit}, x right, y down, z forward\n"
        f"element vertex {len(vertex)}\n{properties}property float confidence\nend_header\n"
    )
    path.write_bytes(header.encode("ascii") + vertex.tobytes())
    return len(vertex)


def write_glb(
    path: Path,
    depth_m: NDArray[np.float32],
    rgb: NDArray[np.uint8],
    intrinsics: Intrinsics,
    max_vertices: int = 500_000,
    max_slope: float = 0.05,
) -> int:
    """Write a coloured mesh as binary glTF 2.0 (y up, z backward, metres) and return the number of triangles.

    Quads whose corners differ by more than `max_slope` of their depth are depth edges and stay open. Where none is
    left, depth being unknown or torn everywhere, no file is written.
    """
    stride = max(1, int(np.ceil(np.sqrt(depth_m.size / max_vertices))))
    xyz = back_project(depth_m, intrinsics, stride) * np.array([1, -1, -1], np.float32)
    depth = depth_m[::stride, ::stride]
    colour = rgb[::stride, ::stride]
    height, width = depth.shape
    index = np.arange(height * width, dtype=np.uint32).reshape(height, width)
    corners = np.stack([index[:-1, :-1], index[1:, :-1], index[:-1, 1:], index[1:, 1:]], axis=-1)
    corner_depth = depth.reshape(-1)[corners]
    with np.errstate(invalid="ignore"):
        spread = corner_depth.max(axis=-1) - corner_depth.min(axis=-1)
        joined = spread <= max_slope * corner_depth.min(axis=-1)  # False for NaN corners
    quads = corners[joined]
    faces = np.concatenate([quads[:, [0, 1, 2]], quads[:, [2, 1, 3]]]).astype("<u4")
    used, faces_flat = np.unique(faces, return_inverse=True)
    if used.size == 0:
        return 0
    vertices = xyz.reshape(-1, 3)[used].astype("<f4")
    rgba = np.concatenate([colour.reshape(-1, 3)[used], np.full((used.size, 1), 255, np.uint8)], axis=1)
    blobs = [vertices.tobytes(), rgba.tobytes(), faces_flat.astype("<u4").tobytes()]
    offsets = np.cumsum([0, *(len(blob) for blob in blobs)]).tolist()
    gltf = {
        "asset": {"version": "2.0", "generator": "daif"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "materials": [{"extensions": {"KHR_materials_unlit": {}}, "doubleSided": True}],
        "extensionsUsed": ["KHR_materials_unlit"],
        "meshes": [
            {"primitives": [{"attributes": {"POSITION": 0, "COLOR_0": 1}, "indices": 2, "material": 0}]}
        ],
        "buffers": [{"byteLength": offsets[-1]}],
        "bufferViews": [
            {"buffer": 0, "byteOffset": offsets[i], "byteLength": len(blobs[i]), "target": 34963 if i == 2 else 34962}
            for i in range(3)
        ],
        "accessors": [
            {
                "bufferView": 0, "componentType": 5126, "count": len(vertices), "type": "VEC3",
                "min": vertices.min(axis=0).tolist(), "max": vertices.max(axis=0).tolist(),
            },
            {"bufferView": 1, "componentType": 5121, "normalized": True, "count": len(vertices), "type": "VEC4"},
            {"bufferView": 2, "componentType": 5125, "count": int(faces.size), "type": "SCALAR"},
        ],
    }  # fmt: skip
    text = json.dumps(gltf, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 4)
    binary = b"".join(blobs)
    binary += b"\0" * (-len(binary) % 4)
    total = 12 + 8 + len(text) + 8 + len(binary)
    path.write_bytes(
        struct.pack("<4sII", b"glTF", 2, total)
        + struct.pack("<I4s", len(text), b"JSON") + text
        + struct.pack("<I4s", len(binary), b"BIN\0") + binary
    )  # fmt: skip
    return len(faces)


def write_float_tiff(path: Path, depth_m: NDArray[np.float32]) -> None:
    """Write (H, W) float32 metres as TIFF; NaN = unknown."""
    if not cv2.imwrite(str(path), depth_m.astype(np.float32)):
        raise DataError(f"{path}: OpenCV could not write a float TIFF")


def check_formats(names: Sequence[str]) -> None:
    """Raise UsageError if a format of `EXTRA_FORMATS` needs a package that is not installed."""
    if "exr" in names and find_spec("OpenEXR") is None:
        raise UsageError("writing EXR needs one more package: pip install 'daif[exr]'")


def write_exr(path: Path, depth_m: NDArray[np.float32], rgb_linear: NDArray[np.float32]) -> None:
    """Write linear R, G, B and Z (metres) as OpenEXR; needs the `exr` extra, see `check_formats`."""
    import OpenEXR

    channels = {"RGB": rgb_linear.astype(np.float32), "Z": depth_m.astype(np.float32)}
    header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
    with OpenEXR.File(header, channels) as file:
        file.write(str(path))


def write_nerfstudio(path: Path, height: int, width: int, intrinsics: Intrinsics, *, depth_in_mm: bool = True) -> None:
    """Write `transforms.json` for one pinhole view at the origin that names aif.png, and depth.png if `depth_in_mm`.

    nerfstudio takes depth as millimetres; another unit can be told on its command line only, not in this file.
    """
    frame: dict[str, Any] = {"file_path": "aif.png"} | ({"depth_file_path": "depth.png"} if depth_in_mm else {})
    frame |= {"transform_matrix": np.eye(4).tolist()}
    document = {
        "camera_model": "OPENCV",
        "fl_x": intrinsics.focal_px,
        "fl_y": intrinsics.focal_px,
        "cx": intrinsics.centre_x_px,
        "cy": intrinsics.centre_y_px,
        "w": width,
        "h": height,
        "frames": [frame],
    }
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
