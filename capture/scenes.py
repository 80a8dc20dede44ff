"""RGB-D scenes for the simulated camera: what a pinhole would see, and how far away it is.

A scene comes from a folder (`rgb.png` and `depth.png` in millimetres), from scikit-image's bundled Motorcycle
pair, or is drawn from a seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.errors import DataError

MOTORCYCLE_FOCAL_PX = 994.978  # Middlebury 2014 calibration at the size scikit-image stores (741 x 500)
MOTORCYCLE_BASELINE_M = 0.193001
MOTORCYCLE_DOFFS_PX = 31.086


@dataclass(frozen=True)
class Scene:
    """A still scene as seen by a pinhole at the centre of the lens.

    Attributes:
        aif: linear all-in-focus image, (H, W, 3) float32, 0 to 1.
        depth_m: depth along the optical axis, (H, W) float32 metres; NaN where unknown.
        name: what the scene is called in tables and file names.
        focal_px: pinhole focal length in pixels at this size, None when unknown.
    """

    aif: NDArray[np.float32]
    depth_m: NDArray[np.float32]
    name: str
    focal_px: float | None = None

    def __post_init__(self) -> None:
        if self.aif.ndim != 3 or self.aif.shape[2] != 3 or self.aif.shape[:2] != self.depth_m.shape:
            raise ValueError(f"aif must be (H, W, 3) over depth (H, W), got {self.aif.shape} and {self.depth_m.shape}")

    @property
    def height(self) -> int:
        return self.depth_m.shape[0]

    @property
    def width(self) -> int:
        return self.depth_m.shape[1]

    def filled_inverse_depth_dpt(self) -> NDArray[np.float32]:
        """Inverse depth (H, W) in dioptres, unknown pixels filled from the farther of their row neighbours.

        Depth is missing mostly where the second view of the depth sensor was blocked, and that is background.
        """
        with np.errstate(divide="ignore"):
            inverse = (1.0 / self.depth_m).astype(np.float32)
        known = np.isfinite(inverse)
        if known.all():
            return inverse
        if not known.any():
            raise DataError(f"scene {self.name}: no pixel has a known depth")
        filled = np.fmin(_carry_along_rows(inverse), _carry_along_rows(inverse[:, ::-1])[:, ::-1])
        empty_rows = ~known.any(axis=1)
        if empty_rows.any():
            filled = np.fmin(_carry_along_rows(filled.T), _carry_along_rows(filled.T[:, ::-1])[:, ::-1]).T
        smooth = cv2.medianBlur(np.ascontiguousarray(filled), 5)  # rows are filled one by one: remove the streaks
        return np.where(known, inverse, smooth).astype(np.float32)

    def resized(self, height: int, width: int) -> Scene:
        """The scene at another size: image averaged over area, depth by nearest neighbour."""
        shrinks = height <= self.height and width <= self.width
        aif = cv2.resize(self.aif, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_CUBIC)
        rows = ((np.arange(height) + 0.5) * self.height / height).astype(np.intp)
        cols = ((np.arange(width) + 0.5) * self.width / width).astype(np.intp)
        focal_px = None if self.focal_px is None else self.focal_px * width / self.width
        return replace(self, aif=np.clip(aif, 0, 1), depth_m=self.depth_m[np.ix_(rows, cols)], focal_px=focal_px)


def _carry_along_rows(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each NaN replaced by the last known value to its left; NaN where there is none."""
    columns = np.where(np.isfinite(values), np.arange(values.shape[1]), 0)
    return np.take_along_axis(values, np.maximum.accumulate(columns, axis=1), axis=1)


def srgb_to_linear(encoded: NDArray[np.floating]) -> NDArray[np.float32]:
    """Linear light from sRGB values 0 to 1 (IEC 61966-2-1)."""
    low = encoded / 12.92
    high = ((encoded + 0.055) / 1.055) ** 2.4
    return np.where(encoded <= 0.04045, low, high).astype(np.float32)


def motorcycle() -> Scene:
    """The Motorcycle scene bundled with scikit-image, 741 x 500: a photograph with structured-light depth."""
    from skimage import data

    left, _, disparity_px = data.stereo_motorcycle()
    depth_m = np.where(
        np.isfinite(disparity_px) & (disparity_px > 0),
        MOTORCYCLE_FOCAL_PX * MOTORCYCLE_BASELINE_M / (disparity_px + MOTORCYCLE_DOFFS_PX),
        np.nan,
    )
    aif = srgb_to_linear(left[..., :3] / 255.0)
    return Scene(aif, depth_m.astype(np.float32), "motorcycle", MOTORCYCLE_FOCAL_PX)


def load_scene(folder: str | Path) -> Scene:
    """Scene from `rgb.png` (8-bit sRGB) and `depth.png` (16-bit millimetres, 0 unknown) in `folder`.

    `scene.json`, when there, gives the focal length in pixels. Raises DataError naming the file at fault.
    """
    folder = Path(folder)
    bgr = _read_image(folder / "rgb.png", cv2.IMREAD_COLOR)
    depth_mm = _read_image(folder / "depth.png", cv2.IMREAD_UNCHANGED)
    if depth_mm.dtype != np.uint16 or depth_mm.ndim != 2:
        raise DataError(
            f"{folder / 'depth.png'}: expected one 16-bit channel of millimetres, "
            f"found {depth_mm.dtype} {depth_mm.shape}"
        )
    if bgr.shape[:2] != depth_mm.shape:
        raise DataError(f"{folder}: rgb.png is {bgr.shape[:2]}, depth.png is {depth_mm.shape}; they must match")
    depth_m = np.where(depth_mm > 0, depth_mm / 1000.0, np.nan).astype(np.float32)
    return Scene(srgb_to_linear(bgr[..., ::-1] / 255.0), depth_m, folder.name, _read_focal_px(folder / "scene.json"))


def _read_image(path: Path, flags: int) -> NDArray[Any]:
    if not path.is_file():
        raise DataError(f"{path}: missing; a scene folder holds rgb.png and depth.png")
    image = cv2.imdecode(np.fromfile(path, dtype=np.uint8), flags)
    if image is None:
        raise DataError(f"{path}: not a readable image")
    return image


def _read_focal_px(path: Path) -> float | None:
    import json

    if not path.is_file():
        return None
    try:
        focal_px = json.loads(path.read_text(encoding="utf-8")).get("focal_px")
    except (ValueError, AttributeError) as error:
        raise DataError(f"{path}: not a JSON object ({error})") from error
    if focal_px is not None and not (isinstance(focal_px, int | float) and focal_px > 0):
        raise DataError(f"{path}: focal_px must be a positive number or null, found {focal_px!r}")
    return None if focal_px is None else float(focal_px)


def rgbd_scenes(root: str | Path) -> list[Scene]:
    """Every scene folder directly under `root`, in the order of their names."""
    folders = sorted(path.parent for path in Path(root).glob("*/depth.png"))
    if not folders:
        raise DataError(f"{root}: no scene folder (rgb.png and depth.png) in it")
    return [load_scene(folder) for folder in folders]
