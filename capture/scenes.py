"""RGB-D scenes for the simulated camera: what a pinhole would see, and how far away it is.

A scene comes from a folder (`rgb.png` and `depth.png` in millimetres), from scikit-image's bundled Motorcycle
pair, or is drawn from a seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.decode import to_linear, transfer_to_linear
from capture.errors import DataError

MOTORCYCLE_FOCAL_PX = 994.978  # Middlebury 2014 calibration at the size scikit-image stores (741 x 500)
MOTORCYCLE_BASELINE_M = 0.193001
MOTORCYCLE_DOFFS_PX = 31.086
SENSOR_SIGMA_PX = 0.45  # pixel aperture and residual blur of a sharp photograph, applied to drawn scenes


@dataclass(frozen=True)
class Scene:
    """A still scene as seen by a pinhole at the centre of the lens.

    Attributes:
        aif: linear all-in-focus image, (H, W, 3) float32, 0 to 1.
        depth_m: depth along the optical axis, (H, W) float32 metres; NaN where unknown.
        name: what the scene is called in tables and file names.
        focal_px: pinhole focal length in pixels at this size, None when unknown.
        hidden_aif, hidden_depth_m: what stands behind near surfaces and a wide lens sees around their edges, where
            that is known (drawn scenes); NaN depth where nothing is hidden.
        unmixed_aif: the image before the sensor's blur (drawn scenes), when every pixel shows one surface only. In a
            photograph the pixels along an edge mix two surfaces and have the depth of one, which leaves a faint sharp
            outline where that surface is in focus and the other is not. `aif` is this, blurred by `SENSOR_SIGMA_PX`.
    """

    aif: NDArray[np.float32]
    depth_m: NDArray[np.float32]
    name: str
    focal_px: float | None = None
    hidden_aif: NDArray[np.float32] | None = None
    hidden_depth_m: NDArray[np.float32] | None = None
    unmixed_aif: NDArray[np.float32] | None = None

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
        places = np.ix_(rows, cols)
        return replace(
            self,
            aif=np.clip(aif, 0, 1),
            depth_m=self.depth_m[places],
            focal_px=focal_px,
            hidden_aif=None if self.hidden_aif is None else self.hidden_aif[places],
            hidden_depth_m=None if self.hidden_depth_m is None else self.hidden_depth_m[places],
            unmixed_aif=None,
        )


def _carry_along_rows(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Each NaN replaced by the last known value to its left; NaN where there is none."""
    columns = np.where(np.isfinite(values), np.arange(values.shape[1]), 0)
    return np.take_along_axis(values, np.maximum.accumulate(columns, axis=1), axis=1)


def srgb_to_linear(encoded: NDArray[Any]) -> NDArray[np.float32]:
    """Linear light from sRGB values 0 to 1."""
    return transfer_to_linear(encoded, "srgb").astype(np.float32)


def sensor_blurred(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """`image` as a sensor with Gaussian blur of `SENSOR_SIGMA_PX` records it."""
    return cv2.GaussianBlur(image, (5, 5), SENSOR_SIGMA_PX, borderType=cv2.BORDER_REFLECT_101)


def motorcycle() -> Scene:
    """The Motorcycle scene bundled with scikit-image, 741 x 500: a photograph with structured-light depth."""
    from skimage import data

    left, _, disparity_px = data.stereo_motorcycle()
    depth_m = np.where(
        np.isfinite(disparity_px) & (disparity_px > 0),
        MOTORCYCLE_FOCAL_PX * MOTORCYCLE_BASELINE_M / (disparity_px + MOTORCYCLE_DOFFS_PX),
        np.nan,
    )
    aif = to_linear(left[..., :3], "srgb")
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
    return Scene(to_linear(bgr[..., ::-1], "srgb"), depth_m, folder.name, _read_focal_px(folder / "scene.json"))


def _read_image(path: Path, flags: int) -> NDArray[Any]:
    if not path.is_file():
        raise DataError(f"{path}: missing; a scene folder holds rgb.png and depth.png")
    image = cv2.imdecode(np.fromfile(path, dtype=np.uint8), flags)
    if image is None:
        raise DataError(f"{path}: not a readable image")
    return image


def _read_focal_px(path: Path) -> float | None:
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


# Drawn scenes. Everything is planes in space (inverse depth is linear over the image), balls and thin things, drawn
# from far to near with a z-buffer; what each covers is kept as the hidden background.

# Photographs in scikit-image's wheel that are in the public domain or CC0, by their documentation.
PHOTOGRAPHS = ("astronaut", "brick", "camera", "chelsea", "coffee", "grass", "gravel", "rocket")
WORDS = (
    "focus",
    "daif 1.0",
    "f/2.8",
    "ABCDEF",
    "hello",
    "0123456789",
    "depth",
    "Qty 24",
    "EXIT",
    "lens",
    "No. 7",
    "iris",
)
FONTS = (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_DUPLEX, cv2.FONT_HERSHEY_TRIPLEX, cv2.FONT_HERSHEY_SCRIPT_COMPLEX)
TILE_PX = 128


def procedural_scene(
    seed: int,
    height: int = 240,
    width: int = 320,
    *,
    near_m: float = 0.5,
    far_m: float = 5.0,
    low_texture: float = 0.25,
) -> Scene:
    """A drawn scene: walls and floors, boxes, boards, balls, leaves and wires with varied surfaces.

    Args:
        seed: the same seed and size give the same scene, bit for bit.
        near_m, far_m: depth range; both ends are nearly reached.
        low_texture: share of surfaces with next to no texture.
    """
    canvas = _Canvas(np.random.default_rng(seed), height, width, near_m, far_m, low_texture)
    rng = canvas.rng
    canvas.draw_background()
    count = int(rng.integers(5, 13))
    drawers = (canvas.draw_box, canvas.draw_board, canvas.draw_ball, canvas.draw_leaves, canvas.draw_wires)
    for share in np.sort(rng.uniform(0.08, 0.95, count)):  # of the way to the nearest depth, in dioptres
        q = canvas.far_dpt + share * (canvas.near_dpt - canvas.far_dpt)
        drawers[rng.choice(len(drawers), p=[0.28, 0.26, 0.18, 0.12, 0.16])](float(q))
    return canvas.scene(f"procedural-{seed}")


@lru_cache(maxsize=1)
def _photographs() -> tuple[NDArray[np.float32], ...]:
    """scikit-image's free photographs in linear light, (h, w, 3) each."""
    from skimage import data

    images = (np.atleast_3d(getattr(data, name)()) for name in PHOTOGRAPHS)
    return tuple(to_linear(np.broadcast_to(image, (*image.shape[:2], 3)), "srgb") for image in images)


class _Canvas:
    """A scene in the making; all drawing is in order of decreasing distance."""

    def __init__(
        self, rng: np.random.Generator, height: int, width: int, near_m: float, far_m: float, low_texture: float
    ) -> None:
        self.rng = rng
        self.height, self.width = height, width
        self.near_dpt, self.far_dpt = 1 / near_m, 1 / far_m
        self.low_texture = low_texture
        self.size_px = min(height, width)
        self.focal_px = 1.1 * width
        self.x = np.broadcast_to(np.arange(width, dtype=np.float32), (height, width))
        self.y = np.broadcast_to(np.arange(height, dtype=np.float32)[:, None], (height, width))
        self.aif = np.zeros((height, width, 3), dtype=np.float32)
        self.inverse_dpt = np.zeros((height, width), dtype=np.float32)
        self.hidden_aif = np.zeros_like(self.aif)
        self.hidden_dpt = np.full((height, width), np.nan, dtype=np.float32)
        self.warm = rng.uniform(0.85, 1.15, 3).astype(np.float32)  # colour of the light
        self.light = rng.standard_normal(3)
        self.light /= np.linalg.norm(self.light)

    def scene(self, name: str) -> Scene:
        """What was drawn, under one light that falls off across the image."""
        angle, fall = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0, 0.5)
        along = (np.cos(angle) * (self.x / self.width - 0.5) + np.sin(angle) * (self.y / self.height - 0.5))[..., None]
        gain = self.rng.uniform(0.12, 0.35) / max(float(self.aif.mean()), 1e-3)
        light = gain * (1 + fall * along) * self.warm
        with np.errstate(divide="ignore"):
            depth_m = (1 / self.inverse_dpt).astype(np.float32)
        unmixed = np.clip(self.aif * light, 0, 1).astype(np.float32)
        return Scene(
            sensor_blurred(unmixed),
            depth_m,
            name,
            self.focal_px,
            np.clip(self.hidden_aif * light, 0, 1).astype(np.float32),
            (1 / self.hidden_dpt).astype(np.float32),
            unmixed,
        )

    def paste(self, cover: NDArray[Any], colour: NDArray[Any], inverse_dpt: NDArray[Any]) -> None:
        """Lay a surface over the canvas where it is nearer: coverage 0 to 1, colour and inverse depth per pixel."""
        left, top, width, height = cv2.boundingRect((cover > 0).view(np.uint8))
        box = np.s_[top : top + height, left : left + width]
        aif, behind = self.aif[box], self.inverse_dpt[box]
        solid = (inverse_dpt[box] > behind) & (cover[box] >= 0.5)
        self.hidden_aif[box][solid] = aif[solid]
        self.hidden_dpt[box][solid] = behind[solid]
        aif[solid] = colour[box][solid]
        behind[solid] = inverse_dpt[box][solid]

    def plane(self, inverse_dpt: float, slope: float) -> NDArray[np.float32]:
        """Inverse depth of a plane through the image centre, tilted by up to `slope` of its own value each way."""
        gx, gy = self.rng.uniform(-slope, slope, 2) * inverse_dpt / self.size_px
        q = inverse_dpt + gx * (self.x - self.width / 2) + gy * (self.y - self.height / 2)
        return np.clip(q, self.far_dpt, self.near_dpt).astype(np.float32)

    def shadow(self, cover: NDArray[np.float32]) -> None:
        """Darken what lies behind `cover` a little, softly: things touch the world they stand in."""
        reach = max(int(self.size_px * self.rng.uniform(0.02, 0.08)), 1)
        soft = cv2.blur(cover, (2 * reach + 1, 2 * reach + 1))
        self.aif *= 1 - self.rng.uniform(0.1, 0.5) * soft[..., None]

    def draw_background(self) -> None:
        """A wall, a slope, or a room with a floor and a side wall, from `far_m` inwards."""
        layout = self.rng.choice(["wall", "slope", "room", "room"])
        full = np.ones((self.height, self.width), dtype=np.float32)
        far = self.far_dpt * self.rng.uniform(1.0, 1.3)
        span = self.near_dpt - far
        wall = self.plane(far, 0.2) if layout != "slope" else self.plane(far + 0.4 * span, 2.0)
        self.aif[...] = self.texture_image()
        self.inverse_dpt[...] = wall
        if layout == "room":
            rise = self.rng.uniform(0.3, 0.9) * span / self.height
            horizon = self.rng.uniform(0.2, 0.7) * self.height
            floor = np.minimum(far * 0.99 + rise * (self.y - horizon), self.near_dpt).astype(np.float32)
            corners = np.array([[0.3, 0.0], [0.7, 0.0], [1.6, 1.0], [-0.6, 1.0]]) * [self.width, self.height - horizon]
            corners[:, 1] += horizon
            self.paste(full, self.warped(self.texture(), corners), floor)
            if self.rng.random() < 0.4:
                run = self.rng.uniform(0.3, 0.9) * span / self.width
                edge = self.rng.uniform(0.1, 0.4) * self.width
                along = edge - self.x if self.rng.random() < 0.5 else self.x - self.width + edge
                side = np.minimum(far * 0.99 + run * along, self.near_dpt).astype(np.float32)
                self.paste(full, self.texture_image(), side)

    def draw_board(self, inverse_dpt: float) -> None:
        """A flat polygon, tilted in depth."""
        corners = int(self.rng.choice([3, 4, 4, 4, 5, 7]))
        angles = (
            np.sort(self.rng.uniform(0, 2 * np.pi, corners))
            if corners != 4
            else (self.rng.uniform(0, np.pi) + np.array([0.25, 0.75, 1.25, 1.75]) * np.pi)
        )
        radius = self.size_px * self.rng.uniform(0.1, 0.36)
        stretch = self.rng.uniform(0.4, 1.0)
        points = self.place() + radius * np.stack([np.cos(angles), stretch * np.sin(angles)], axis=1)
        cover = self.polygon(points)
        self.shadow(cover)
        self.paste(
            cover, self.texture_image() * self.shade(), self.plane(inverse_dpt, self.rng.choice([0.0, 0.4, 1.0]))
        )

    def draw_box(self, inverse_dpt: float) -> None:
        """A box standing in space, its visible faces in perspective."""
        depth_m = 1 / inverse_dpt
        half_sides_m = self.rng.uniform(0.06, 0.24, 3) * self.size_px / self.focal_px * depth_m
        rotation = np.linalg.qr(self.rng.standard_normal((3, 3)))[0]
        if self.rng.random() < 0.7:  # upright more often than tumbling
            turn = self.rng.uniform(0, 2 * np.pi)
            rotation = np.array([[np.cos(turn), 0, np.sin(turn)], [0, 1, 0], [-np.sin(turn), 0, np.cos(turn)]])
        centre = np.append((self.place() - [self.width / 2, self.height / 2]) / self.focal_px, 1) * depth_m
        faces = []
        for axis in range(3):
            for sign in (-1, 1):
                normal = sign * rotation[axis]
                a, b = (
                    rotation[(axis + 1) % 3] * half_sides_m[(axis + 1) % 3],
                    rotation[(axis + 2) % 3] * half_sides_m[(axis + 2) % 3],
                )
                middle = centre + normal * half_sides_m[axis]
                if middle @ normal < 0:  # faces the camera
                    faces.append((normal, np.stack([middle - a - b, middle + a - b, middle + a + b, middle - a + b])))
        if any((face[:, 2] < 0.3 * depth_m).any() for _, face in faces):
            return
        material = self.texture()
        projected = [face[:, :2] / face[:, 2:] * self.focal_px + [self.width / 2, self.height / 2] for _, face in faces]
        cover = np.max([self.polygon(points) for points in projected], axis=0)
        self.shadow(cover)
        for (normal, face), points in zip(faces, projected, strict=True):
            plane = np.linalg.solve(face[:3], np.ones(3))  # n . P = 1, so 1/Z = n . (x/f, y/f, 1)
            q = plane[0] * (self.x - self.width / 2) + plane[1] * (self.y - self.height / 2)
            q = (q / self.focal_px + plane[2]).astype(np.float32)
            face_material = self.texture() if self.rng.random() < 0.3 else material
            colour = self.warped(face_material, points) * (0.6 + 0.4 * abs(float(normal @ self.light)))
            self.paste(self.polygon(points), colour, np.clip(q, self.far_dpt, self.near_dpt))

    def draw_ball(self, inverse_dpt: float) -> None:
        """A ball or an egg, shaded."""
        centre = self.place()
        axes = self.size_px * self.rng.uniform(0.06, 0.28) * np.array([1.0, self.rng.uniform(0.6, 1.0)])
        dx, dy = (self.x - centre[0]) / axes[0], (self.y - centre[1]) / axes[1]
        r2 = dx * dx + dy * dy
        bulge = np.sqrt(np.maximum(1 - r2, 0))
        depth_m = 1 / inverse_dpt - (axes[0] / self.focal_px / inverse_dpt) * bulge
        cover = np.clip((1 - np.sqrt(r2)) * axes.min() + 0.5, 0, 1)
        facing = dx * self.light[0] + dy * self.light[1] + bulge * abs(self.light[2])
        self.shadow(cover)
        colour = self.texture_image() * (0.35 + 0.65 * np.maximum(facing, 0))[..., None]
        self.paste(cover, colour, np.clip(1 / depth_m, self.far_dpt, self.near_dpt))

    def draw_leaves(self, inverse_dpt: float) -> None:
        """A handful of small flat things, each at its own depth."""
        centre, spread = self.place(), self.size_px * self.rng.uniform(0.1, 0.4)
        colour = self.texture_image()
        for nearer in np.sort(self.rng.uniform(0.85, 1.15, int(self.rng.integers(4, 14)))):
            axes = self.size_px * self.rng.uniform(0.02, 0.09) * np.array([1.0, self.rng.uniform(0.2, 0.6)])
            mask = np.zeros((self.height, self.width), dtype=np.uint8)
            at = centre + spread * self.rng.standard_normal(2) * 0.5
            cv2.ellipse(
                mask, (tuple(at.tolist()), tuple((2 * axes).tolist()), self.rng.uniform(0, 180)), 255, -1, cv2.LINE_AA
            )
            self.paste(mask / np.float32(255), colour * self.shade(), self.plane(inverse_dpt * nearer, 0.8))

    def draw_wires(self, inverse_dpt: float) -> None:
        """Wires, a fence or a net: thin lines with the background between them."""
        mask = np.zeros((self.height, self.width), dtype=np.uint8)
        thickness = int(self.rng.integers(1, 2 + max(self.size_px // 60, 1)))
        if self.rng.random() < 0.5:
            angle, gap = self.rng.uniform(0, np.pi), self.size_px * self.rng.uniform(0.06, 0.25)
            centre, reach = self.place(), self.size_px * self.rng.uniform(0.2, 0.8)
            for turn in (0.0, np.pi / 2)[: int(self.rng.integers(1, 3))]:
                along = np.array([np.cos(angle + turn), np.sin(angle + turn)])
                across = np.array([-along[1], along[0]])
                for offset in np.arange(-reach, reach + 1, gap):
                    self.line(mask, np.stack([-reach * along, reach * along]) + offset * across + centre, thickness)
        else:
            for _ in range(int(self.rng.integers(1, 6))):
                start, end, bend = self.rng.uniform(-0.1, 1.1, (3, 2)) * [self.width, self.height]
                t = np.linspace(0, 1, 24)[:, None]
                self.line(mask, (1 - t) ** 2 * start + 2 * t * (1 - t) * bend + t**2 * end, thickness)
        colour = self.texture_image() if self.rng.random() < 0.5 else self.flat(self.colour())
        self.paste(mask / np.float32(255), colour, self.plane(inverse_dpt, 0.6))

    def place(self) -> NDArray[np.float64]:
        """A point in the image, seldom close to its border."""
        return self.rng.uniform(0.1, 0.9, 2) * [self.width, self.height]

    def shade(self) -> float:
        return float(self.rng.uniform(0.5, 1.2))

    def polygon(self, points: NDArray[np.float64]) -> NDArray[np.float32]:
        """Coverage (H, W) of a polygon, anti-aliased."""
        mask = np.zeros((self.height, self.width), dtype=np.uint8)
        cv2.fillPoly(mask, [np.rint(points * 16).astype(np.int32)], 255, cv2.LINE_AA, shift=4)
        return mask.astype(np.float32) / np.float32(255)

    def line(self, mask: NDArray[np.uint8], points: NDArray[np.float64], thickness: int) -> None:
        cv2.polylines(mask, [np.rint(points * 16).astype(np.int32)], False, 255, thickness, cv2.LINE_AA, shift=4)

    def warped(self, tile: NDArray[np.float32], corners: NDArray[np.float64]) -> NDArray[np.float32]:
        """`tile` stretched over the quadrilateral `corners`, repeated beyond it, (H, W, 3)."""
        size = tile.shape[0] - 1
        square = np.array([[0, 0], [size, 0], [size, size], [0, size]], dtype=np.float32)
        homography = cv2.getPerspectiveTransform(square, corners.astype(np.float32))
        # Seen almost edge-on a tile repeats without end, and mirroring would loop once per repetition.
        return cv2.warpPerspective(tile, homography, (self.width, self.height), borderMode=cv2.BORDER_WRAP)

    def texture_image(self) -> NDArray[np.float32]:
        """A texture over the whole canvas, turned and scaled at random, (H, W, 3)."""
        angle, scale = self.rng.uniform(0, 2 * np.pi), self.rng.uniform(0.5, 1.5)
        turn = scale * np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        centre = self.place()[:, None] - turn @ np.full((2, 1), TILE_PX / 2)
        size = (self.width, self.height)
        return cv2.warpAffine(self.texture(), np.hstack([turn, centre]), size, borderMode=cv2.BORDER_REFLECT_101)

    def colour(self) -> NDArray[np.float32]:
        """A linear RGB colour; mostly muted, sometimes strong, of any brightness."""
        grey = self.rng.uniform(0.05, 0.9) ** 2
        return (grey * self.rng.uniform(1 - self.rng.uniform(0.05, 0.95) ** 2, 1, 3)).astype(np.float32)

    def flat(self, colour: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.broadcast_to(colour, (self.height, self.width, 3))

    def texture(self) -> NDArray[np.float32]:
        """A square tile of some material, linear light, (TILE_PX, TILE_PX, 3)."""
        if self.rng.random() < self.low_texture:
            grain = 0.03 * self.noise(1.0)
            return np.maximum(self.colour() * (1 + grain[..., None]), 0).astype(np.float32)
        makers: tuple[Callable[[], NDArray[np.float32]], ...] = (
            self.photograph,
            self.marble,
            self.pattern,
            self.writing,
        )
        return makers[self.rng.choice(4, p=[0.5, 0.22, 0.15, 0.13])]()

    def noise(self, roughness: float) -> NDArray[np.float32]:
        """1/f-like noise of unit standard deviation, (TILE_PX, TILE_PX): octaves, each `roughness` as strong."""
        total = np.zeros((2, 2), dtype=np.float32)
        while total.shape[0] < TILE_PX:
            size = 2 * total.shape[0]
            total = cv2.resize(total, (size, size), interpolation=cv2.INTER_CUBIC) / np.float32(roughness)
            total += self.rng.standard_normal((size, size), dtype=np.float32)
        return (total / total.std()).astype(np.float32)

    def photograph(self) -> NDArray[np.float32]:
        """A crop of a free photograph, at some scale, turned and tinted."""
        photographs = _photographs()
        source = photographs[self.rng.integers(len(photographs))]
        size = int(self.rng.uniform(64, min(source.shape[:2])))
        top, left = (int(self.rng.integers(0, extent - size + 1)) for extent in source.shape[:2])
        crop = source[top : top + size, left : left + size]
        shrinks = size > TILE_PX
        tile = cv2.resize(crop, (TILE_PX, TILE_PX), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)
        tile = np.rot90(tile, int(self.rng.integers(4)))
        tint = self.rng.uniform(0.6, 1.2, 3).astype(np.float32)
        return np.ascontiguousarray(tile * tint)

    def mixed(self, share: NDArray[Any]) -> NDArray[np.float32]:
        """Two colours mixed by `share`, 0 to 1."""
        first, second = self.colour(), self.colour()
        return first + share.astype(np.float32)[..., None] * (second - first)

    def marble(self) -> NDArray[np.float32]:
        """Two colours through rough noise: stone, cloth, foliage."""
        noise = self.noise(self.rng.uniform(0.5, 1.0))
        return self.mixed(1 / (1 + np.exp(-self.rng.uniform(1, 4) * noise)))

    def pattern(self) -> NDArray[np.float32]:
        """Stripes, checks or dots with soft pixel-wide edges, a little uneven."""
        y, x = np.mgrid[:TILE_PX, :TILE_PX].astype(np.float32)
        period = self.rng.uniform(6, 40)
        wave_x, wave_y = np.sin(2 * np.pi / period * x), np.sin(2 * np.pi / period * y)
        kind = self.rng.integers(4)
        wave = (wave_x, wave_x * wave_y, np.maximum(wave_x, wave_y) - 0.8, wave_x + wave_y - 1.0)[kind]
        sharpness = self.rng.choice([0.8, period / 2])  # a grating, or an edge one pixel wide
        share = np.clip(0.5 + wave * sharpness, 0, 1)
        return np.maximum(self.mixed(share) * (1 + 0.08 * self.noise(0.8)[..., None]), 0)

    def writing(self) -> NDArray[np.float32]:
        """Lines of text on paper."""
        ink = np.zeros((TILE_PX, TILE_PX), dtype=np.uint8)
        line_px = int(self.rng.integers(10, 36))
        font = int(self.rng.choice(FONTS))
        for bottom in range(line_px, TILE_PX + line_px, line_px):
            text = " ".join(self.rng.choice(WORDS, 4))
            left = -int(self.rng.integers(0, 30))
            cv2.putText(
                ink, text, (left, bottom - line_px // 4), font, line_px / 40, 255, max(line_px // 16, 1), cv2.LINE_AA
            )
        return np.maximum(self.mixed(ink / np.float32(255)) * (1 + 0.05 * self.noise(0.8)[..., None]), 0)
