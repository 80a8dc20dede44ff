"""Training stacks: simulated ones with their truth, and crops of captured ones without.

Simulated scenes are drawn from a seed (textured objects at many depths over slanted grounds) and seen through the
aperture-sampled camera of `capture/optics.py`, which shares no code with the training renderer. Everything that a
lens or a sensor can do is drawn at random: blur range, number and spacing of frames, shape of the blur, breathing,
shake, noise, bit depth, exposure, errors of the focus readings. Dioptres are arbitrary here (every sweep runs over
about 1 dpt), because the network only sees blur.

Which stacks a training step sees is a pure function of (seed, step): a run that was killed continues bit for bit, and
however many processes share a step, together they see the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from capture.alignment import align_stack
from capture.errors import DataError
from capture.lens import LensProfile
from capture.optics import ApertureRenderer, Psf, Quality, expose
from capture.output import room_in
from capture.scenes import Scene, srgb_to_linear
from capture.stack import FocalStack
from reconstruct import remote, result
from reconstruct.device import own_share
from reconstruct.lens_fit import picture_focus
from reconstruct.memory import on_disk
from reconstruct.network import Prior
from reconstruct.optics import optics_of
from reconstruct.plane_sweep import quietened, relative_exposure

PHOTOGRAPHS = (
    "astronaut",
    "chelsea",
    "coffee",
    "rocket",
    "brick",
    "grass",
    "gravel",
    "camera",
    "coins",
    "page",
    "text",
)
SWEEP = 13  # frames rendered of each scene; every training stack is a choice among them
FAR_DPT, NEAR_DPT = 0.5, 1.5  # the sweep of every simulated scene


@dataclass(frozen=True)
class StackBatch:
    """Stacks of equal size and length.

    Attributes:
        frames: linear RGB, (B, S, 3, H, W).
        focus_dpt, kappa: what the camera claims, (B, S).
        inverse_depth_dpt: truth, (B, 1, H, W), NaN where unknown; None for captured stacks.
        aif: true all-in-focus image, (B, 3, H, W), or None.
        prior: what the plane sweep knows, where it was asked before; else None.
        noise: (B,), of the frames as captured (`Photometry`), where the plane sweep is yet to be asked; or None.
        exact: (B,), 1 where `inverse_depth_dpt` is the truth, 0 where it is an estimate; None for truth throughout.
    """

    frames: Tensor
    focus_dpt: Tensor
    kappa: Tensor
    inverse_depth_dpt: Tensor | None = None
    aif: Tensor | None = None
    prior: Prior | None = None
    noise: Tensor | None = None
    exact: Tensor | None = None

    def to(self, device: torch.device) -> StackBatch:
        """The same batch on `device`."""
        moved = {k: x.to(device, non_blocking=True) for k, x in vars(self).items() if isinstance(x, Tensor)}
        prior = None if self.prior is None else Prior._make(x.to(device, non_blocking=True) for x in self.prior)
        return replace(self, **moved, prior=prior)


# ------------------------------------------------------------------------------------------------------ scenes


@lru_cache(maxsize=1)
def _photographs() -> tuple[NDArray[np.float32], ...]:
    """scikit-image's freely licensed photographs in linear light, (H, W, 3) each, and half size."""
    from skimage import data

    images = []
    for name in PHOTOGRAPHS:
        image = np.asarray(getattr(data, name)())
        if image.ndim == 2:
            image = np.repeat(image[..., None], 3, axis=2)
        linear = srgb_to_linear(image[..., :3] / 255.0)
        images.append(linear)
        images.append(cv2.resize(linear, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA))
    return tuple(images)


def _fractal(rng: np.random.Generator, size: int, slope: float) -> NDArray[np.float32]:
    """Noise with amplitude spectrum 1 / f^slope, (size, size), mean 0, standard deviation 1."""
    f = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) + 1.0 / size
    phase = rng.random(f.shape) * 2 * np.pi
    noise = np.fft.irfft2(np.exp(1j * phase) / f**slope, s=(size, size))
    return ((noise - noise.mean()) / noise.std()).astype(np.float32)


def _photo_texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    image = _photographs()[rng.integers(len(_photographs()))]
    height, width = image.shape[:2]
    zoom = float(np.exp(rng.uniform(np.log(0.5), np.log(2.2))))
    angle = rng.uniform(-25, 25) if rng.random() < 0.4 else 0.0
    matrix = cv2.getRotationMatrix2D((rng.uniform(0, width), rng.uniform(0, height)), angle, zoom)
    matrix[:, 2] += size / 2 - matrix[:, :2] @ np.array([width, height]) * rng.uniform(0.2, 0.8)
    if zoom < 1:
        image = cv2.GaussianBlur(image, (0, 0), 0.4 / zoom)
    crop = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_CUBIC, borderMode=cv2.BORDER_REFLECT_101)
    crop = np.clip(crop, 0, 1)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return crop ** np.float32(rng.uniform(0.7, 1.4))


def _pattern_texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    y, x = np.mgrid[:size, :size].astype(np.float32)
    angle, period = rng.uniform(0, np.pi), float(np.exp(rng.uniform(np.log(4), np.log(50))))
    u = (x * np.cos(angle) + y * np.sin(angle)) / period * 2 * np.pi
    v = (-x * np.sin(angle) + y * np.cos(angle)) / period * 2 * np.pi
    kind = rng.integers(5)
    if kind == 0:
        mask = np.sin(u)
    elif kind == 1:
        mask = np.sign(np.sin(u) * np.sin(v))
    elif kind == 2:
        mask = np.sign(np.sin(u))
    elif kind == 3:
        mask = np.sign(_fractal(rng, size, 1.6) - rng.uniform(-0.7, 0.7))
    else:  # strokes, like print
        mask = np.full((size, size), -1.0, np.float32)
        for _ in range(int(rng.integers(20, 200))):
            p = rng.integers(0, size, 2)
            q = p + rng.integers(-14, 15, 2)
            cv2.line(mask, tuple(map(int, p)), tuple(map(int, q)), 1.0, int(rng.integers(1, 4)), cv2.LINE_AA)
    one, two = rng.random((2, 3)).astype(np.float32) ** 1.5
    return one + (two - one) * (0.5 + 0.5 * mask[..., None].astype(np.float32))


def _leaves_texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Dead leaves: discs of all sizes over one another, with the statistics of natural edges."""
    image = np.full((size, size, 3), 0.3, np.float32)
    for _ in range(int(rng.integers(60, 500))):
        radius = int(2 / (rng.random() + 0.03))
        colour = tuple(float(c) for c in rng.random(3) ** 1.5)
        cv2.circle(image, tuple(int(c) for c in rng.integers(0, size, 2)), radius, colour, -1, cv2.LINE_AA)
    return image


def _drawing_texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """Outlines, open strokes and filled shapes on plain paper: what they enclose is no hole and no object."""
    paper = rng.uniform(0.02, 1.0, 3) ** (0.5 if rng.random() < 0.7 else 2.0)
    image = paper * np.exp(np.exp(rng.uniform(np.log(0.002), np.log(0.05))) * _fractal(rng, size, 0.8)[..., None])
    image = image.astype(np.float32)
    inks = rng.random((2, 3)) ** 2
    for _ in range(int(np.exp(rng.uniform(np.log(2), np.log(40))))):
        ink = tuple(float(c) for c in inks[rng.integers(2)])
        centre, angle = rng.uniform(0, size, 2), float(rng.uniform(0, 360))
        extent = size * float(np.exp(rng.uniform(np.log(0.02), np.log(0.5))))
        width = int(np.exp(rng.uniform(0, np.log(12))))
        kind = rng.random()
        if kind < 0.5:
            axes = (1 + int(extent), 1 + int(extent * rng.uniform(0.2, 1)))
            arc = 360 if rng.random() < 0.7 else int(rng.integers(40, 320))
            filled = -1 if rng.random() < 0.15 else width
            cv2.ellipse(image, tuple(map(int, centre)), axes, angle, 0, arc, ink, filled, cv2.LINE_AA)
            continue
        if kind < 0.75:
            points = cv2.boxPoints((tuple(centre), (2 * extent, 2 * extent * rng.uniform(0.2, 1)), angle))
        else:
            points = centre + np.cumsum(rng.normal(0, extent, (int(rng.integers(2, 9)), 2)), 0)
        corners = [points.astype(np.int32)]
        if kind < 0.9 and rng.random() < 0.2:
            cv2.fillPoly(image, corners, ink, cv2.LINE_AA)
        else:
            cv2.polylines(image, corners, kind < 0.9, ink, width, cv2.LINE_AA)
    return image


def _texture(rng: np.random.Generator, size: int) -> NDArray[np.float32]:
    """One surface's colours, (size, size, 3) linear; about a quarter of the surfaces have next to no texture."""
    kind = rng.random()
    if kind < 0.37:
        image = _photo_texture(rng, size)
    elif kind < 0.48:
        image = _pattern_texture(rng, size)
    elif kind < 0.57:
        image = _leaves_texture(rng, size)
    elif kind < 0.68:
        image = _drawing_texture(rng, size)
    else:
        slope, contrast = rng.uniform(0.6, 1.9), float(np.exp(rng.uniform(np.log(0.004), np.log(0.6))))
        noise = np.stack([_fractal(rng, size, slope)] * 3, -1)
        if rng.random() < 0.4:
            noise += 0.5 * np.stack([_fractal(rng, size, slope) for _ in range(3)], -1)
        image = rng.uniform(0.03, 0.9, 3).astype(np.float32) * np.exp(contrast * noise).astype(np.float32)
    if rng.random() < 0.25:  # nearly plain: keep a trace of the pattern
        image = image.mean((0, 1)) + (image - image.mean((0, 1))) * np.float32(np.exp(rng.uniform(-4.5, -1)))
    if rng.random() < 0.5:
        image = image * rng.uniform(0.5, 1.3, 3).astype(np.float32)
    if rng.random() < 0.3:  # black things, and what lies in the dark: there noise hides most of the texture
        image = image * np.float32(np.exp(rng.uniform(np.log(0.02), np.log(0.5))))
    return np.clip(image, 0, 1).astype(np.float32)


def _shape_mask(rng: np.random.Generator, size: int) -> NDArray[np.uint8]:
    """Outline of one object, (size, size) 0 or 1."""
    mask = np.zeros((size, size), np.uint8)
    centre = rng.uniform(-0.05, 1.05, 2) * size
    extent = size * float(np.exp(rng.uniform(np.log(0.04), np.log(0.45))))
    angle, kind = rng.uniform(0, 360), rng.random()
    if kind < 0.3:
        axes = (max(1, int(extent)), max(1, int(extent * rng.uniform(0.3, 1))))
        cv2.ellipse(mask, (int(centre[0]), int(centre[1])), axes, angle, 0, 360, 1, -1)
    elif kind < 0.6:
        box = cv2.boxPoints((tuple(centre), (2 * extent, 2 * extent * rng.uniform(0.25, 1)), angle))
        cv2.fillPoly(mask, [box.astype(np.int32)], 1)
    elif kind < 0.8:
        count = int(rng.integers(3, 12))
        turns = np.sort(rng.random(count)) * 2 * np.pi
        radius = extent * rng.uniform(0.4, 1.2, count)
        points = centre + np.stack([radius * np.cos(turns), radius * np.sin(turns)], 1)
        cv2.fillPoly(mask, [points.astype(np.int32)], 1)
    elif kind < 0.92:  # bars, wires, legs
        half = rng.uniform(0.2, 0.8) * size * np.array([np.cos(angle), np.sin(angle)])
        ends = [tuple(int(c) for c in centre + sign * half) for sign in (1, -1)]
        cv2.line(mask, ends[0], ends[1], 1, int(np.exp(rng.uniform(np.log(2), np.log(18)))))
    else:
        mask = (cv2.GaussianBlur(_fractal(rng, size, 2.2), (0, 0), 2) > rng.uniform(0.3, 1.2)).astype(np.uint8)
    return mask


def _surface(rng: np.random.Generator, size: int, centre_dpt: float, tilt_dpt: float) -> NDArray[np.float32]:
    """Inverse depth of a plane, or of a gently curved one, (size, size)."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    plane = centre_dpt + tilt_dpt * (x * rng.normal() + y * rng.normal())
    if rng.random() < 0.3:
        plane = plane + tilt_dpt * rng.normal() * cv2.GaussianBlur(_fractal(rng, size, 2.5), (0, 0), 4)
    return plane.astype(np.float32)


def procedural_training_scene(seed: Sequence[int], size: int) -> Scene:
    """One square scene: a tilted ground or a room, and objects at many depths in front of it.

    Inverse depth mostly lies within [FAR_DPT, NEAR_DPT] and sometimes a little outside.
    """
    rng = np.random.default_rng([*seed, 1])
    fine = 2 * size  # drawn at twice the size so that edges of colour are as soft as a sensor makes them
    low, high = FAR_DPT, NEAR_DPT
    if rng.random() < 0.3:  # a shallow scene within a long sweep
        low, high = np.sort(rng.uniform(FAR_DPT, NEAR_DPT, 2))
        high = max(high, low + 0.15)
    span = high - low
    image = _texture(rng, fine)
    depth = _surface(rng, fine, low + span * rng.beta(1, 2), span * rng.uniform(0.0, 0.5))
    if rng.random() < 0.35:  # a floor or a wall meeting the ground
        other = _surface(rng, fine, low + span * rng.uniform(0.3, 0.9), span * 0.6)
        nearer = other > depth
        depth, image = np.where(nearer, other, depth), np.where(nearer[..., None], _texture(rng, fine), image)
    objects = int(rng.integers(1, 14))
    order = np.sort(rng.random(objects)) if rng.random() < 0.8 else rng.random(objects)
    for place in order:
        mask = _shape_mask(rng, fine)
        surface = _surface(rng, fine, low + span * float(place), span * float(rng.choice([0.0, 0.05, 0.25])))
        if rng.random() < 0.3:  # a rounded body
            inside = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
            surface = surface + span * rng.uniform(0.02, 0.15) * np.sqrt(inside / max(float(inside.max()), 1.0))
        visible = (mask > 0) & ((surface > depth) | (rng.random() < 0.3))
        depth = np.where(visible, surface, depth)
        if rng.random() < 0.8:  # else camouflaged: a depth edge that no edge of colour betrays
            image = np.where(visible[..., None], _texture(rng, fine), image)
    if rng.random() < 0.6:  # uneven light
        image = image * np.exp(0.35 * cv2.GaussianBlur(_fractal(rng, fine, 2.0), (0, 0), 8))[..., None]
    while rng.random() < 0.3:  # shadows and reflections: soft edges that no lens made
        soft_px = float(np.exp(rng.uniform(np.log(1.5), np.log(25))))
        shade = cv2.GaussianBlur(_shape_mask(rng, fine).astype(np.float32), (0, 0), soft_px)[..., None]
        image = image * (1 - rng.uniform(0.2, 0.9) * shade) if rng.random() < 0.6 else image + rng.random() * shade
    depth = np.clip(depth, FAR_DPT - 0.12, NEAR_DPT + 0.12)
    aif = cv2.resize(np.clip(image, 0, 1).astype(np.float32), (size, size), interpolation=cv2.INTER_AREA)
    brightness = rng.uniform(0.35, 1.0) / max(float(np.percentile(aif, 99)), 0.05)
    aif = np.clip(aif * brightness, 0.001, 1)
    return Scene(aif.astype(np.float32), (1.0 / depth[::2, ::2]).astype(np.float32), f"procedural-{seed}")


# ---------------------------------------------------------------------------------------------- rendered sweeps


@dataclass(frozen=True)
class RenderedScene:
    """A simulated scene through a simulated lens, noiseless: `SWEEP` frames and the truth.

    Attributes:
        frames: square root of linear light as uint16, (SWEEP, H, W, 3).
        focus_dpt, kappa: (SWEEP,).
        inverse_depth_dpt: (H, W); aif: (H, W, 3), same coding as `frames`.
    """

    frames: NDArray[np.uint16]
    focus_dpt: NDArray[np.float32]
    kappa: NDArray[np.float32]
    inverse_depth_dpt: NDArray[np.float32]
    aif: NDArray[np.uint16]


def _encode(linear: NDArray[np.float32]) -> NDArray[np.uint16]:
    return np.rint(np.sqrt(np.clip(linear, 0, 1)) * 65535).astype(np.uint16)


def _decode(coded: NDArray[np.uint16]) -> NDArray[np.float32]:
    return np.square(coded.astype(np.float32) / np.float32(65535))


def render_scene(seed: Sequence[int], size: int, *, crowded: bool = False) -> RenderedScene:
    """The sweep of one scene through a random lens; a pure function of its arguments.

    A crowded one is drawn twice as large and reduced, through a lens that blurs much, as a room in a small picture: of
    such pictures' pixels twice as many or more lie beside depth edges.
    """
    scene = procedural_training_scene(seed, 2 * size if crowded else size).resized(size, size)
    rng = np.random.default_rng([*seed, 2])
    least, most = (5, 36) if rng.random() < 0.85 else (1, 5)  # few px of blur over the whole sweep: far scenes, webcams
    if crowded:
        least, most = 12, 36
    range_px = float(np.exp(rng.uniform(np.log(least), np.log(most))))
    bend = rng.uniform(0.0, 0.08)  # f q of the thin lens: gain grows a little towards near focus
    focus = np.linspace(FAR_DPT, NEAR_DPT, SWEEP)
    if rng.random() < 0.3:
        focus = np.sort(focus + rng.normal(0, 0.02, SWEEP))
    kappa = range_px / (NEAR_DPT - FAR_DPT) * (1 - bend) / (1 - bend * focus)
    psf: Psf = rng.choice(["disc", "gaussian", "hexagon"], p=[0.5, 0.35, 0.15])
    moving = rng.random() < 0.35
    breathing = rng.normal(0, 0.006) if moving else 0.0
    shake_px = rng.uniform(0, 0.4) if moving else 0.0
    softness_px = rng.uniform(0.3, 0.7) if rng.random() < 0.4 else 0.0
    quality: Quality = "full" if rng.random() < 0.12 else "fast"
    renderer = ApertureRenderer(scene, float(kappa.max()))
    frames = []
    for q, k in zip(focus, kappa, strict=True):
        shift = (float(rng.normal(0, shake_px)), float(rng.normal(0, shake_px))) if moving else (0.0, 0.0)
        frame = renderer.frame(
            float(q), float(k), psf=psf, quality=quality, magnification=1 + breathing * (q - 1), shift_px=shift
        )
        frames.append(cv2.GaussianBlur(frame, (0, 0), softness_px) if softness_px else frame)
    return RenderedScene(
        _encode(np.stack(frames)),
        focus.astype(np.float32),
        kappa.astype(np.float32),
        scene.filled_inverse_depth_dpt(),
        _encode(scene.aif),
    )


class ScenePool:
    """Rendered scenes kept in a folder; one that is missing is rendered on the spot.

    A scene takes a second or so to render and serves many steps through other choices of frames, crops and noise.
    """

    def __init__(self, folder: str | Path, seed: int, size: int) -> None:
        self.folder, self.seed, self.size = Path(folder) / f"seed{seed}-{size}px", seed, size
        self.folder.mkdir(parents=True, exist_ok=True)

    def path(self, index: int) -> Path:
        """Where scene `index` is kept."""
        return self.folder / f"{index:06d}.npz"

    def __getitem__(self, index: int) -> RenderedScene:
        path = self.path(index)
        if not path.exists():
            rendered = render_scene((self.seed, index), self.size)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            with room_in(self.folder, path.name), partial.open("wb") as file:
                np.savez(file, **vars(rendered))
            partial.replace(path)
            return rendered
        try:
            with path.open("rb") as stream, np.load(stream, allow_pickle=False) as stored:
                return RenderedScene(**{name: stored[name] for name in stored.files})
        except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise DataError(f"{path}: damaged ({error}); delete it, it is made anew") from None


def choose_frames(rng: np.random.Generator, count: int) -> NDArray[np.intp]:
    """`count` of the SWEEP frames, in random order: even over the sweep, uneven, or over a part of it."""
    kind = rng.random()
    if kind < 0.5:
        chosen = np.rint(np.linspace(0, SWEEP - 1, count)).astype(np.intp)
    elif kind < 0.85:
        inner = rng.choice(np.arange(1, SWEEP - 1), count - 2, replace=False)
        chosen = np.concatenate([[0, SWEEP - 1], inner]).astype(np.intp)
    else:
        length = int(rng.integers(max(count, SWEEP // 2), SWEEP + 1))
        start = int(rng.integers(0, SWEEP - length + 1))
        chosen = start + np.rint(np.linspace(0, length - 1, count)).astype(np.intp)
    return rng.permutation(chosen)


def training_stack(
    scene: RenderedScene, rng: np.random.Generator, frames: int, crop: int
) -> tuple[NDArray[np.float32], ...]:
    """One crop as a camera would deliver it: (frames (S, 3, h, w), focus_dpt, kappa, inverse depth (1, h, w), aif).

    Draws frames, crop, mirror and quarter turns, exposure, noise, bit depth, and errors of the focus readings.
    """
    height, width = scene.inverse_depth_dpt.shape
    top, left = int(rng.integers(0, height - crop + 1)), int(rng.integers(0, width - crop + 1))
    window = np.s_[top : top + crop, left : left + crop]
    chosen = choose_frames(rng, frames)
    exposure = rng.uniform(0.25, 1.0)
    image = _decode(scene.frames[chosen][:, window[0], window[1]]) * np.float32(exposure)
    if rng.random() < 0.3:
        image = image * (1 + rng.normal(0, 0.01, (frames, 1, 1, 1))).astype(np.float32)
    noise_std = float(np.exp(rng.uniform(np.log(0.001), np.log(0.06))))
    image = expose(image, rng, noise_std, bits=None)
    if rng.random() < 0.6:  # 8 bit, in a gamma close to sRGB
        image = (np.rint(image ** np.float32(1 / 2.2) * 255) / np.float32(255)) ** np.float32(2.2)
    focus = scene.focus_dpt[chosen]
    if rng.random() < 0.35:
        focus = focus + (np.ptp(focus) * rng.uniform(0, 0.02) * rng.standard_normal(frames)).astype(np.float32)
    inverse, aif = scene.inverse_depth_dpt[window][None], _decode(scene.aif[window]) * np.float32(exposure)
    image, aif = image.transpose(0, 3, 1, 2), aif.transpose(2, 0, 1)
    turn, mirror = int(rng.integers(4)), rng.random() < 0.5

    def orient(x: NDArray[np.float32]) -> NDArray[np.float32]:
        x = np.rot90(x, turn, axes=(-2, -1))
        return np.ascontiguousarray(x[..., ::-1] if mirror else x)

    return orient(image), focus, scene.kappa[chosen], orient(inverse), orient(aif)


def turned(x: Tensor, turns: int, mirrored: bool) -> Tensor:
    """`x` (..., H, W) after that many quarter turns, then mirrored or not."""
    x = torch.rot90(x, turns, (-2, -1))
    return x.flip(-1) if mirrored else x


class SimulatedBatches:
    """Batches of simulated stacks; `batch(step)` is a pure function of (seed, step).

    The pool grows with the step, so that training can start before all scenes are rendered.
    """

    def __init__(self, pool: ScenePool, scenes: int, first: int, batch: int, crop: int) -> None:
        self.pool, self.scenes, self.first, self.size, self.crop = pool, scenes, first, batch, crop

    def batch(self, step: int, part: int = 0, parts: int = 1) -> StackBatch:
        """Every `parts`-th stack of the batch of `step`, from `part` on, `quietened`; only their scenes are read."""
        rng = np.random.default_rng([self.pool.seed, 3, step])
        count = int(rng.choice([2, 3, 4, 5, 6, 7, 8, 10], p=[0.04, 0.1, 0.14, 0.34, 0.12, 0.12, 0.08, 0.06]))
        available = min(self.scenes, self.first + step * self.size // 8)
        chosen = rng.integers(0, available, self.size)
        stacks = []
        for place in range(part, self.size, parts):
            own = np.random.default_rng([self.pool.seed, 3, step, 1 + place])
            stacks.append(training_stack(self.pool[int(chosen[place])], own, count, self.crop))
        frames, focus, kappa, depth, aif = (torch.from_numpy(np.stack(x)) for x in zip(*stacks, strict=True))
        quiet, contexts = zip(*map(quietened, frames), strict=True)
        noise = torch.stack([context.noise for context in contexts])
        return StackBatch(torch.stack(quiet), focus, kappa, depth, aif, noise=noise)


# ---------------------------------------------------------------------------------------------- captured stacks

LONGEST_SIDE_PX = 1024  # captured stacks are trained on at this size or below
LEAST_SIDE_PX = 32
STORED = ("frames", "valid", "focus_dpt", "kappa")
WIDEST_BLUR_PX = 40.0  # and so that the widest blur of the sweep stays below this


@dataclass(frozen=True)
class CapturedStack:
    """One captured stack, aligned, at the size it is trained on. Its ground truth, if any, is not in here.

    Attributes:
        name: for tables.
        frames: (S, 3, h, w) linear float32, on the CPU.
        valid: (S, h, w), False where a frame has no data.
        focus_dpt, kappa: (S,), the gain at this size.
        metric: False where focus distances are unknown and depth is only ordered.
    """

    name: str
    frames: Tensor
    valid: Tensor
    focus_dpt: Tensor
    kappa: Tensor
    metric: bool

    def without(self, index: int) -> CapturedStack:
        """The same stack as if frame `index` had not been taken."""
        keep = [i for i in range(len(self.frames)) if i != index]
        return replace(
            self,
            frames=self.frames[keep],
            valid=self.valid[keep],
            focus_dpt=self.focus_dpt[keep],
            kappa=self.kappa[keep],
        )


def kept_prior(prior: Prior, folder: Path) -> Prior:
    """`prior` of one stack for many steps: its volumes of half precision and `kept` in `folder`.

    Of `total` only what the network reads of it, what it exceeds its least by.
    """
    least = prior.total.amin(1, keepdim=True)
    volumes = [x.clamp_max(torch.finfo(torch.float16).max).half() for x in (prior.cost, prior.total - least)]
    return Prior._make([*(kept(x, folder) for x in volumes), *(x.cpu() for x in prior[2:])])


def kept(values: Tensor, folder: Path) -> Tensor:
    """`values` mapped from a file in `folder`, as by `on_disk`."""
    array = values.cpu().numpy()
    mapped = on_disk(array.shape, array.dtype, folder)
    mapped[:] = array
    return torch.from_numpy(mapped)


def prepare_captured(locations: Sequence[str | Path], profile: LensProfile | None, folder: Path) -> list[CapturedStack]:
    """`load_captured` of every path or URL, done once and kept in `folder`; the frames are mapped from there, not held.

    Under torchrun every process prepares its share and waits for the others': `folder` must be on a disk they share.
    """
    result.remove_leftovers(folder)
    rank, world = own_share()
    targets = [folder / f"{Path(x).stem[:80]}-{_fingerprint(str(x), profile)}" for x in locations]
    for location, target in list(zip(locations, targets, strict=True))[rank::world]:
        if not target.exists():
            with tempfile.TemporaryDirectory(prefix="daif-") as scratch:
                _keep(load_captured(remote.fetch(str(location), Path(scratch)), profile), target)
    while not all(target.exists() for target in targets):
        time.sleep(0.2)
    return [_mapped(target) for target in targets]


def _fingerprint(location: str, profile: LensProfile | None) -> str:
    """What the prepared stack depends on, in a few letters."""
    lens = "" if profile is None else profile.model_dump_json()
    return hashlib.sha256(f"{remote.state(location)} {lens}".encode()).hexdigest()[:12]


def _keep(stack: CapturedStack, target: Path) -> None:
    partial = target.with_name(f".{target.name}.partial-{result.who()}")
    try:
        with room_in(target.parent, f"{stack.name}, prepared ({stack.frames.nbytes / 1e6:.0f} MB)"):
            partial.mkdir(parents=True)
            for name in STORED:
                np.save(partial / f"{name}.npy", getattr(stack, name).numpy())
            (partial / "about.json").write_text(json.dumps({"name": stack.name, "metric": stack.metric}))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _mapped(folder: Path) -> CapturedStack:
    try:
        about = json.loads((folder / "about.json").read_text())
        for name in STORED:
            about[name] = torch.from_numpy(np.load(folder / f"{name}.npy", mmap_mode="c"))  # "c": writable, for torch
        return CapturedStack(**about)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{folder}: damaged ({error}); delete it, it is made anew from the stack") from None


def load_captured(path: str | Path, profile: LensProfile | None = None) -> CapturedStack:
    """The stack at `path`, aligned, brought to one exposure and reduced to training size, its focus fitted.

    Raises DataError if the stack cannot be trusted or does not align.
    """
    with FocalStack.open(path) as stack:
        optics = optics_of(stack, profile)
        widest_px = 0.0 if optics.kappa_px_per_dpt is None else float(optics.kappa_px_per_dpt.max())
        widest_px *= float(np.ptp(optics.focus_dpt))
        step = max(1, -(-max(stack.height, stack.width) // LONGEST_SIDE_PX), int(np.ceil(widest_px / WIDEST_BLUR_PX)))
        height, width = stack.height // step * step, stack.width // step * step
        size = (width // step, height // step)
        if min(size) < LEAST_SIDE_PX:
            why = f": its blur spans {widest_px:.0f} px, check pixel_pitch_m and focus distances" if step > 1 else ""
            raise DataError(
                f"{path}: {stack.width} x {stack.height} px, trained on at {size[0]} x {size[1]}{why}; "
                f"at least {LEAST_SIDE_PX} px a side are needed"
            )
        small = np.stack(
            [
                cv2.resize(stack.linear(i, slice(height), slice(width)), size, interpolation=cv2.INTER_AREA)
                for i in range(stack.n_frames)
            ]
        )
        alignment = align_stack(small, optics.focus_dpt, scales=optics.scales)
        try:
            alignment.check()
        except DataError as error:
            raise DataError(f"{path}: {error}") from None
        aligned = np.stack([alignment.apply(frame, i) for i, frame in enumerate(small)])
        valid = np.repeat(alignment.valid_mask()[None], stack.n_frames, axis=0)
        frames = torch.from_numpy(np.ascontiguousarray(aligned.transpose(0, 3, 1, 2)))
        frames *= relative_exposure(frames.mean(1))[:, None, None, None]
        focus = torch.as_tensor(optics.focus_dpt, dtype=torch.float32)
        if optics.kappa_px_per_dpt is None:
            from reconstruct.plane_sweep import estimate_gain

            kappa = torch.full_like(focus, float(estimate_gain(frames, focus)))
        else:
            kappa = torch.as_tensor(optics.kappa_px_per_dpt * alignment.kappa_factor / step, dtype=torch.float32)
        seen = torch.from_numpy(valid)
        if not optics.focus_exact:

            def cut(factor: int, rows: slice, cols: slice) -> tuple[Tensor, Tensor]:
                down, right = (slice(part.start * factor, part.stop * factor) for part in (rows, cols))
                middle = slice(factor // 2, None, factor)
                return F.avg_pool2d(frames[..., down, right], factor), seen[..., down, right][..., middle, middle]

            focus = picture_focus(cut, frames.mean(1), (frames.shape[2], frames.shape[3]), focus, kappa)
        return CapturedStack(Path(path).stem, frames, seen, focus, kappa, optics.metric)
