"""What a real lens does to a scene: frames by sampling the aperture, noise, quantisation, breathing.

Every frame is the average, in linear light, of the scene seen from many points of the lens. From the point (u, v) of
the unit disc a surface with circle of confusion `coc` appears shifted by coc / 2 * (u, v); the nearest surface wins.
Occlusion, disc bokeh and partial transparency of near edges follow by themselves. There are no layers and no
convolution here, and nothing is shared with `reconstruct/render.py`, so that no result is scored against its own
forward model (design section 5; `notes/forward-model.md`, test set A).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from capture.decode import to_linear, to_srgb8, to_srgb16
from capture.lens import Lens, coc_diameter_px, dioptre_to_metre
from capture.scenes import Scene, sensor_blurred
from capture.stack import write_stack

Psf = Literal["disc", "gaussian", "hexagon"]
Quality = Literal["full", "fast"]

NOTES_LENS = Lens(focal_length_m=0.050, f_number=8.0, pixel_pitch_m=1.2e-5)  # at 320 x 240; 26 px of CoC per dioptre
NOTES_FOCUS_M = (1.0, 1.5, 2.5, 4.0, 6.0)

SUBPIXELS = 4  # the image is interpolated once to this many samples a pixel, then read by nearest neighbour
UNITS = 64  # disparities are int16 in 1/64 px
HOLE = 32767  # int16 disparity of a pixel that sees nothing
BLACK = 0.01  # linear light: a black pixel has the shot noise of this much


@dataclass(frozen=True)
class Condition:
    """How far the simulated camera is from ideal (design section 9).

    Attributes:
        psf: shape of the aperture; every one has the second moment of the disc, (coc / 4)^2 per axis.
        noise_std: noise of a white pixel in linear light; variance = noise_std^2 * (signal + BLACK).
        bits: 8 or 16 for sRGB-encoded integers, None for linear float32.
        breathing: relative change of image scale from the farthest to the nearest focus setting.
        focus_error: standard deviation of the relative error of the reported focus distances.
    """

    psf: Psf = "disc"
    noise_std: float = 0.0
    bits: Literal[8, 16] | None = 16
    breathing: float = 0.0
    focus_error: float = 0.0


CONDITIONS = {
    "same_model": Condition(psf="gaussian"),
    "disc": Condition(),
    "noisy": Condition(psf="gaussian", noise_std=0.01, bits=8),
    "noisy3": Condition(psf="gaussian", noise_std=0.03, bits=8),
    "mismatched": Condition(noise_std=0.01, bits=8, breathing=0.005, focus_error=0.02),
}


@dataclass(frozen=True)
class SimulatedSweep:
    """A focal stack whose truth is known.

    Attributes:
        frames: (S, H, W, 3); uint8 or uint16 in sRGB, or float32 in linear light.
        transfer: "srgb" or "linear", what `frames` are encoded with.
        focus_dpt: focus settings that the camera reports, (S,).
        true_focus_dpt: focus settings that the frames were taken at, (S,).
        kappa_px_per_dpt: blur gain of each frame at the reported setting, (S,).
        magnification: image scale of each frame, (S,); 1 at the middle of the sweep.
        scene: the truth.
        lens: the lens the frames were taken with.
    """

    frames: NDArray[Any]
    transfer: Literal["srgb", "linear"]
    focus_dpt: NDArray[np.float64]
    true_focus_dpt: NDArray[np.float64]
    kappa_px_per_dpt: NDArray[np.float64]
    magnification: NDArray[np.float64]
    scene: Scene
    lens: Lens

    def linear(self) -> NDArray[np.float32]:
        """The frames in linear light, (S, H, W, 3) float32, 0 to 1."""
        if self.transfer == "linear":
            return self.frames
        return to_linear(self.frames, "srgb")

    def write(self, path: str | Path, *, overwrite: bool = False) -> Path:
        """Store the sweep as a focal stack with its truth; the distances are those that the camera reports."""
        return write_stack(
            path,
            self.frames,
            focus_distance_m=dioptre_to_metre(self.focus_dpt),
            focus_distance_source="simulated",
            lens=self.lens,
            transfer=self.transfer,
            truth_depth_m=self.scene.depth_m,
            truth_aif=self.scene.aif,
            overwrite=overwrite,
        )


class ApertureRenderer:
    """Renders frames of one scene; what does not depend on focus is prepared once.

    Args:
        scene: what the lens looks at.
        max_kappa_px_per_dpt: largest blur gain that will be asked for; it bounds how far hidden background is seen.
    """

    def __init__(self, scene: Scene, max_kappa_px_per_dpt: float) -> None:
        self.inverse_depth_dpt = scene.filled_inverse_depth_dpt()
        self.unmixed = scene.unmixed_aif is not None
        aif = scene.aif if scene.unmixed_aif is None else scene.unmixed_aif
        self.fine = interpolated(aif, SUBPIXELS)
        if scene.hidden_aif is not None and scene.hidden_depth_m is not None:
            self.hidden_dpt, self.hidden_aif = (1 / scene.hidden_depth_m).astype(np.float32), scene.hidden_aif
        else:
            parallax_px = max_kappa_px_per_dpt / 2 * float(np.ptp(self.inverse_depth_dpt))
            behind = _behind(self.inverse_depth_dpt, 1.0 / max_kappa_px_per_dpt, reach_px=int(parallax_px) + 2)
            self.hidden_dpt = np.where(behind >= 0, self.inverse_depth_dpt.ravel()[behind], np.float32(np.nan))
            self.hidden_aif = aif.reshape(-1, 3)[behind]

    def frame(
        self,
        focus_dpt: float,
        kappa_px_per_dpt: float,
        *,
        psf: Psf = "disc",
        quality: Quality = "full",
        magnification: float = 1.0,
        shift_px: tuple[float, float] = (0.0, 0.0),
    ) -> NDArray[np.float32]:
        """The scene through the lens at one focus setting, (H, W, 3) float32 linear.

        Args:
            focus_dpt: focus setting in 1/m.
            kappa_px_per_dpt: pixels of CoC diameter per dioptre at that setting.
            psf: shape of the aperture.
            quality: "full" for measurements; "fast" takes a third of the lens positions, for training.
            magnification: scale of this frame about the image centre (focus breathing).
            shift_px: (x, y) displacement of this frame.
        """
        planes: tuple[NDArray[np.float32], ...] = (self.inverse_depth_dpt, self.hidden_dpt, self.fine, self.hidden_aif)
        if magnification != 1.0 or shift_px != (0.0, 0.0):
            planes = self._moved(magnification, shift_px)
        inverse_depth_dpt, hidden_dpt, fine, hidden_aif = planes
        half_coc = coc_diameter_px(kappa_px_per_dpt, focus_dpt, inverse_depth_dpt).astype(np.float32) / 2
        hidden_half_coc = coc_diameter_px(kappa_px_per_dpt, focus_dpt, hidden_dpt).astype(np.float32) / 2
        samples = lens_positions(sample_count(2 * float(np.abs(half_coc).max()), quality), psf)
        view = _average_views(half_coc, hidden_half_coc, fine, hidden_aif, samples)
        return sensor_blurred(view) if self.unmixed else view

    def _moved(self, magnification: float, shift_px: tuple[float, float]) -> tuple[NDArray[np.float32], ...]:
        """Inverse depth, hidden inverse depth, fine image and hidden image as the displaced frame sees them."""
        height, width = self.inverse_depth_dpt.shape
        centre = np.array([(width - 1) / 2, (height - 1) / 2])
        offset = centre * (1 - magnification) + np.asarray(shift_px)
        rows = np.clip(np.rint((np.arange(height) - offset[1]) / magnification), 0, height - 1).astype(np.intp)
        cols = np.clip(np.rint((np.arange(width) - offset[0]) / magnification), 0, width - 1).astype(np.intp)
        places = np.ix_(rows, cols)
        affine = np.array([[magnification, 0, SUBPIXELS * offset[0]], [0, magnification, SUBPIXELS * offset[1]]])
        fine = cv2.warpAffine(self.fine, affine, self.fine.shape[1::-1], borderMode=cv2.BORDER_REFLECT_101)
        return self.inverse_depth_dpt[places], self.hidden_dpt[places], fine, self.hidden_aif[places]


def render_frame(
    scene: Scene,
    *,
    focus_dpt: float,
    kappa_px_per_dpt: float,
    psf: Psf = "disc",
    quality: Quality = "full",
    magnification: float = 1.0,
    shift_px: tuple[float, float] = (0.0, 0.0),
) -> NDArray[np.float32]:
    """One noiseless frame, (H, W, 3) float32 linear; see `ApertureRenderer.frame`."""
    renderer = ApertureRenderer(scene, kappa_px_per_dpt)
    return renderer.frame(
        focus_dpt, kappa_px_per_dpt, psf=psf, quality=quality, magnification=magnification, shift_px=shift_px
    )


def simulate_sweep(
    scene: Scene,
    lens: Lens,
    focus_dpt: Sequence[float] | NDArray[np.floating],
    condition: Condition | str = "disc",
    *,
    seed: int = 0,
    quality: Quality = "full",
) -> SimulatedSweep:
    """Focal stack of `scene` through `lens`, with the imperfections of `condition` (a name in `CONDITIONS` or one).

    Args:
        scene: what the lens looks at.
        lens: its `pixel_pitch_m` belongs to the scene's own size.
        focus_dpt: focus settings in 1/m, (S,), in any order.
        condition: what the camera does wrong.
        seed: of the noise and of the focus error.
        quality: see `ApertureRenderer.frame`.
    """
    if isinstance(condition, str):
        condition = CONDITIONS[condition]
    rng = np.random.default_rng(seed)
    reported = np.asarray(focus_dpt, dtype=np.float64)
    true = reported / (1 + condition.focus_error * rng.standard_normal(reported.shape))
    magnification = breathing_magnification(true, condition.breathing)
    gain = np.asarray(lens.kappa_px_per_dpt(true))
    renderer = ApertureRenderer(scene, float(gain.max()))
    frames = [
        expose(
            renderer.frame(float(q), float(k), psf=condition.psf, quality=quality, magnification=float(m)),
            rng,
            condition.noise_std,
            condition.bits,
        )
        for q, k, m in zip(true, gain, magnification, strict=True)
    ]
    return SimulatedSweep(
        frames=np.stack(frames),
        transfer="linear" if condition.bits is None else "srgb",
        focus_dpt=reported,
        true_focus_dpt=true,
        kappa_px_per_dpt=np.asarray(lens.kappa_px_per_dpt(reported)),
        magnification=magnification,
        scene=scene,
        lens=lens,
    )


def breathing_magnification(focus_dpt: NDArray[np.float64], breathing: float) -> NDArray[np.float64]:
    """Image scale of each frame, linear in dioptres, `breathing` from far to near, 1 at the middle.

    A lens that moves as a unit has a positive sign (near is larger), internal focusing often a negative one
    (`notes/real-stacks.md`).
    """
    span = float(np.ptp(focus_dpt))
    if span == 0:
        return np.ones_like(focus_dpt)
    return 1 + breathing * (focus_dpt - (focus_dpt.min() + focus_dpt.max()) / 2) / span


def expose(
    linear: NDArray[np.float32], rng: np.random.Generator, noise_std: float, bits: Literal[8, 16] | None
) -> NDArray[Any]:
    """The sensor's answer to `linear` light: noise of variance noise_std^2 * (signal + BLACK), then quantisation.

    Returns sRGB-encoded uint8 or uint16, or linear float32 when `bits` is None.
    """
    if noise_std > 0:
        noise = rng.standard_normal(linear.shape, dtype=np.float32)
        linear = linear + np.float32(noise_std) * np.sqrt(np.maximum(linear, 0) + np.float32(BLACK)) * noise
    if bits is None:
        return np.clip(linear, 0, 1).astype(np.float32)
    return to_srgb8(linear) if bits == 8 else to_srgb16(linear)


def sweep_for_scene(
    scene: Scene, n_frames: int, max_coc_px: float, *, focal_length_m: float = 0.050
) -> tuple[Lens, NDArray[np.float64]]:
    """A lens, and `n_frames` focus settings (1/m) uniform over the depths of `scene`, with blur up to `max_coc_px`.

    Seen in the nearest frame, the farthest point has a CoC of `max_coc_px`; the outermost 0.5 % of the pixels at either
    end do not count. The pixel pitch follows from that at f/2.8. A flat scene is swept by 5 % to either side.
    """
    inverse = 1.0 / scene.depth_m[np.isfinite(scene.depth_m)]
    far, near = np.percentile(inverse, [0.5, 99.5])
    if near - far < 0.1 * near:
        far, near = np.array([0.95, 1.05]) * (far + near) / 2
    kappa = max_coc_px / (near - far)
    lens = Lens(focal_length_m=focal_length_m, f_number=2.8, pixel_pitch_m=1e-5)
    return lens.rescaled(float(kappa / lens.kappa_px_per_dpt(float(near)))), np.linspace(far, near, n_frames)


def sample_count(max_coc_px: float, quality: Quality) -> int:
    """Number of lens positions that keeps a disc of `max_coc_px` smooth.

    At one per 3 px of the disc's area ("full") a photograph blurred over 24 px differs from its limit by 0.0015 in
    linear light, root mean square; at one per 10 ("fast") by 0.004.
    """
    share, fewest, most = (0.3, 48, 192) if quality == "full" else (0.1, 16, 64)
    return min(max(math.ceil(share * max_coc_px**2), fewest), most)


def lens_positions(count: int, psf: Psf) -> NDArray[np.float64]:
    """`count` points (u, v) on the aperture, (count, 2), in units of its radius, evenly spread on a sunflower.

    Mean 0 and variance 1/4 per axis exactly, whatever the shape: all shapes share the disc's second moment.
    """
    index = np.arange(count)
    share = (index + 0.5) / count
    angle = index * np.pi * (3 - np.sqrt(5))
    radius = np.sqrt(-np.log1p(-share) / 2) if psf == "gaussian" else np.sqrt(share)
    if psf == "hexagon":
        # Stretch every direction to the hexagon's edge: area elements keep their relative sizes closely enough.
        radius = radius * np.cos(np.pi / 6) / np.cos((angle % (np.pi / 3)) - np.pi / 6)
    points = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    points -= points.mean(axis=0)
    return points * (0.5 / points.std(axis=0))


def interpolated(image: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """`image` on a grid `factor` times as fine, (factor * (H - 1) + 1, factor * (W - 1) + 1, C).

    Cubic convolution with a = -1/2 (Keys 1981): keeps the given samples and every parabola, so it adds no blur to
    second order; OpenCV's own cubic (a = -3/4) sharpens.
    """
    for axis in (0, 1):
        padded = np.pad(image, [(1, 2) if a == axis else (0, 0) for a in range(3)], mode="edge")
        size = image.shape[axis]
        shape = list(image.shape)
        shape[axis] = factor * (size - 1) + 1
        fine = np.empty(shape, dtype=np.float32)
        for phase in range(factor):
            t = phase / factor
            weights = (
                -0.5 * t * (1 - t) ** 2,
                1 + t * t * (1.5 * t - 2.5),
                1 + (1 - t) ** 2 * (1.5 * (1 - t) - 2.5),
                -0.5 * (1 - t) * t * t,
            )
            count = size if phase == 0 else size - 1
            taps = (np.take(padded, range(k, k + count), axis=axis) for k in range(4))
            out = fine[phase::factor] if axis == 0 else fine[:, phase::factor]
            out[...] = sum(np.float32(w) * tap for w, tap in zip(weights, taps, strict=True))
        image = fine
    return image


def _behind(inverse_depth: NDArray[np.float32], step_dpt: float, reach_px: int) -> NDArray[np.int32]:
    """For every pixel close to something farther away, the flat index of the background that continues behind it.

    The photograph does not show what a wide lens sees around the edge of a near object. It is taken to be the
    background mirrored at that edge; (H, W) int32, -1 where nothing farther lies within `reach_px`.
    """
    height, width = inverse_depth.shape
    q = inverse_depth.ravel()
    window = np.ones((2 * reach_px + 1, 2 * reach_px + 1), dtype=np.uint8)
    near_edge = inverse_depth - cv2.erode(inverse_depth, window) > step_dpt
    edge = np.full(height * width, -1, dtype=np.int32)  # nearest background pixel, spreading inwards ring by ring
    open_pixels = np.flatnonzero(near_edge)
    rows, cols = np.divmod(open_pixels, width)
    for ring in range(reach_px):
        if not open_pixels.size:
            break
        best = np.full(open_pixels.size, -1, dtype=np.int32)
        best_q = (q[open_pixels] - step_dpt).astype(np.float32)
        for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0), (1, 1), (1, -1), (-1, 1), (-1, -1)):
            neighbour = np.clip(rows + dy, 0, height - 1) * width + np.clip(cols + dx, 0, width - 1)
            source = neighbour.astype(np.int32) if ring == 0 else edge[neighbour]
            source_q = np.where(source >= 0, q[source], np.inf)
            farther = source_q < best_q
            best = np.where(farther, source, best)
            best_q = np.where(farther, source_q, best_q)
        edge[open_pixels] = best
        waiting = best < 0
        open_pixels, rows, cols = open_pixels[waiting], rows[waiting], cols[waiting]
    found = np.flatnonzero(edge >= 0)
    rows, cols = np.divmod(found, width)
    edge_rows, edge_cols = np.divmod(edge[found], width)
    mirrored = np.clip(2 * edge_rows - rows, 0, height - 1) * width + np.clip(2 * edge_cols - cols, 0, width - 1)
    same_surface = np.abs(q[mirrored] - q[edge[found]]) < step_dpt
    edge[found] = np.where(same_surface, mirrored, edge[found])
    return edge.reshape(height, width)


def _crossed_pixels(u: float, v: float, nearest: int, farthest: int) -> list[tuple[int, int, int, int]]:
    """Whole-pixel shifts (dx, dy) of the disparities `nearest` to `farthest` (1/64 px) seen from (u, v), far to near.

    Each comes as (dx, dy, low, high): the disparities low <= d < high round to that shift.
    """
    cuts = [float(nearest), float(farthest + 1)]
    for slope in (u / UNITS, v / UNITS):
        if slope != 0:
            first, last = sorted((nearest * slope, farthest * slope))
            cuts.extend((pixel + 0.5) / slope for pixel in range(math.ceil(first - 0.5), math.floor(last - 0.5) + 1))
    ordered = sorted({min(max(math.ceil(cut), nearest), farthest + 1) for cut in cuts}, reverse=True)
    return [
        (round((low + high - 1) / 2 * u / UNITS), round((low + high - 1) / 2 * v / UNITS), low, high)
        for high, low in pairwise(ordered)
    ]


def _average_views(
    half_coc: NDArray[np.float32],
    hidden_half_coc: NDArray[np.float32],
    fine: NDArray[np.float32],
    hidden_aif: NDArray[np.float32],
    samples: NDArray[np.float64],
) -> NDArray[np.float32]:
    """Mean over lens positions of the scene's forward warp, nearest surface first, (H, W, 3).

    A pixel with half-CoC d lands at its own place plus round(d u); so the surface seen at y lies at y - o for the one
    shift o whose range of disparities holds it. Going through the few possible shifts from far to near and
    overwriting is a z-buffer without a scatter. Views that see nothing at a pixel do not count there.

    Args:
        half_coc: signed CoC radius in px, (H, W).
        hidden_half_coc: the same of the background behind each pixel, NaN where there is none.
        fine: all-in-focus image on a grid `SUBPIXELS` times as fine.
        hidden_aif: colour of the background behind each pixel, (H, W, 3).
        samples: lens positions (N, 2).
    """
    height, width = half_coc.shape
    margin = math.ceil(float(np.abs(half_coc).max() * np.abs(samples).max())) + 1
    disparity = np.rint(half_coc * UNITS)
    slack = _half_slope(disparity)
    centre, low_end, high_end, hidden = (
        np.pad(plane.astype(np.int16), margin, mode="reflect")
        for plane in (
            disparity,
            disparity - slack,
            disparity + slack,
            np.nan_to_num(np.rint(hidden_half_coc * UNITS), nan=HOLE),
        )
    )
    hidden_colours = np.pad(hidden_aif, ((margin, margin), (margin, margin), (0, 0)), mode="reflect").reshape(-1, 3)
    padded_width = width + 2 * margin
    hidden = hidden.ravel()
    nearest, farthest = int(low_end.min()), int(high_end.max())

    base_x = np.broadcast_to(np.arange(width, dtype=np.float32) * SUBPIXELS, (height, width))
    base_y = np.broadcast_to(np.arange(height, dtype=np.float32)[:, None] * SUBPIXELS, (height, width))
    seen = np.empty((height, width), dtype=np.int16)
    reached, short_of = np.empty((2, height, width), dtype=bool)
    map_x, map_y = np.empty((2, height, width), dtype=np.float32)
    view = np.empty((height, width, 3), dtype=np.float32)
    total = np.zeros((height, width, 3), dtype=np.float32)
    unseen = np.zeros(height * width, dtype=np.float32)
    for u, v in samples.tolist():
        shifts = _crossed_pixels(u, v, nearest, farthest)
        seen.fill(HOLE)
        for dx, dy, low, high in shifts:
            window = np.s_[margin - dy : margin - dy + height, margin - dx : margin - dx + width]
            np.greater_equal(high_end[window], low, out=reached)
            np.less(low_end[window], high, out=short_of)
            np.logical_and(reached, short_of, out=reached)
            cv2.copyTo(centre[window], reached.view(np.uint8), seen)
        np.multiply(seen, np.float32(-u * SUBPIXELS / UNITS), out=map_x)
        np.multiply(seen, np.float32(-v * SUBPIXELS / UNITS), out=map_y)
        map_x += base_x
        map_y += base_y
        cv2.remap(fine, map_x, map_y, cv2.INTER_NEAREST, dst=view, borderMode=cv2.BORDER_REFLECT_101)
        holes = np.flatnonzero(seen == HOLE)
        if holes.size:
            rows, cols = np.divmod(holes, width)
            home = (rows + margin) * padded_width + cols + margin
            source = np.full(holes.size, -1)
            for dx, dy, low, high in shifts:
                place = home - dy * padded_width - dx
                value = hidden[place]
                hit = (value >= low - UNITS // 4) & (value < high + UNITS // 4)
                source[hit] = place[hit]
            colours = hidden_colours[source]
            colours[source < 0] = 0
            view.reshape(-1, 3)[holes] = colours
            unseen[holes[source < 0]] += 1
        cv2.add(total, view, dst=total)
    seen_by = len(samples) - unseen.reshape(height, width, 1)
    here = fine[::SUBPIXELS, ::SUBPIXELS]
    return np.maximum(np.where(seen_by > 0, total / np.maximum(seen_by, 1), here), 0).astype(np.float32)


def _half_slope(disparity: NDArray[np.float32]) -> NDArray[np.float32]:
    """Half the largest step to a neighbour on the same surface.

    A slanted surface stretches when seen from the side; widening each pixel's range by this closes the cracks.
    """
    slack = np.zeros_like(disparity)
    for axis in (0, 1):
        step = np.abs(np.diff(disparity, axis=axis))
        step[step > UNITS] = 0  # more than a pixel at the rim of the lens: another surface
        head, tail = (np.s_[:-1], np.s_[1:]) if axis == 0 else (np.s_[:, :-1], np.s_[:, 1:])
        np.maximum(slack[head], step / 2, out=slack[head])
        np.maximum(slack[tail], step / 2, out=slack[tail])
    return slack
