"""Scenes of a place taken again, changed or not: lessons whose depth is the exact truth of their frames.

A refined map is not the truth of the stack it was made from, but it is the truth of what a simulated camera sees of the
refined scene. Scenes made of parts of several have the place's own textures under its own lens and noise, at outlines
and depths that were never captured: what is learned from many of them holds for what the place has not shown yet.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from capture.optics import ApertureRenderer, Psf, expose
from capture.scenes import Scene
from reconstruct.dataset import CapturedStack
from reconstruct.estimate import Estimate
from reconstruct.plane_sweep import pixel_noise

BEYOND_PX = 1.5  # of CoC: how far outside the sweep a scene that is taken again may reach


def taken_again(stack: CapturedStack, seen: Estimate, psf: Psf, rng: np.random.Generator) -> CapturedStack:
    """The scene that `seen` shows, taken by a simulated camera with the lens and the noise of `stack`.

    Args:
        seen: all-in-focus image and depth, `within_sweep`.
        psf: shape of the lens's blur.
        rng: draws the noise.
    """
    focus, kappa = (np.asarray(x, np.float64) for x in (stack.focus_dpt, stack.kappa))
    depth = seen.inverse_depth_dpt.double().numpy()
    near_enough = 1.0 - depth.min()  # only differences blur, and a depth in metres must be positive
    image = seen.aif.permute(1, 2, 0).nan_to_num().clamp(0, 1).numpy()
    scene = Scene(np.ascontiguousarray(image), (1 / (depth + near_enough)).astype(np.float32), stack.name)
    renderer = ApertureRenderer(scene, float(kappa.max()))
    _, grain = pixel_noise(stack.frames, stack.valid)
    frames = [
        expose(renderer.frame(q + near_enough, k, psf=psf, quality="fast"), rng, float(grain.sqrt()), None)
        for q, k in zip(focus.tolist(), kappa.tolist(), strict=True)
    ]
    return replace(
        stack,
        frames=torch.from_numpy(np.ascontiguousarray(np.stack(frames).transpose(0, 3, 1, 2))),
        valid=torch.tensor(True).expand(len(frames), *depth.shape),
    )


def within_sweep(seen: Estimate, stack: CapturedStack) -> Estimate:
    """`seen` without depths that none of the frames of `stack` comes near."""
    beyond = BEYOND_PX / float(stack.kappa.mean())
    nearest, farthest = float(stack.focus_dpt.max()) + beyond, float(stack.focus_dpt.min()) - beyond
    return seen._replace(inverse_depth_dpt=seen.inverse_depth_dpt.clamp(farthest, nearest))


def part_of(seen: Estimate, side_px: int, rng: np.random.Generator) -> Estimate:
    """A part of `seen`, at most so many pixels wide and high."""
    first = [int(rng.integers(max(length - side_px, 0) + 1)) for length in seen.inverse_depth_dpt.shape]
    rows, cols = (slice(start, start + side_px) for start in first)
    depth, std, confidence = (x[rows, cols] for x in (seen.inverse_depth_dpt, seen.std_dpt, seen.confidence))
    return Estimate(depth, std, confidence, seen.aif[:, rows, cols], seen.metric)


def altered(seen: Estimate, stack: CapturedStack, rng: np.random.Generator) -> Estimate:
    """`seen` at other depths, so that the same texture is seen under other blur: their differences change by up to
    20 %, and all move by up to 12 % of the swept range.
    """
    depth = seen.inverse_depth_dpt
    middle, swept = depth.median(), float(np.ptp(stack.focus_dpt.numpy()))
    changed = middle + (depth - middle) * rng.uniform(0.8, 1.2) + rng.uniform(-0.12, 0.12) * swept
    return seen._replace(inverse_depth_dpt=changed)


def mixed(
    seen: Estimate, stack: CapturedStack, other: Estimate, kappa_ratio: float, rng: np.random.Generator
) -> Estimate:
    """`seen` with the near parts of `other` before it: turned, scaled, mirrored, at any place and depth.

    Parts show where they are nearer than what they cover.

    Args:
        stack: that of `seen`.
        kappa_ratio: blur a dioptre of the stack of `other`, relative to that of `stack`: parts keep their blur.
    """
    depth, image = seen.inverse_depth_dpt.numpy(), seen.aif.numpy()
    part, part_image = (x.numpy() for x in (other.inverse_depth_dpt, other.aif))
    if rng.random() < 0.5:
        part, part_image = part[:, ::-1], part_image[:, :, ::-1]
    motion = _motion(part.shape, depth.shape, rng)

    def moved(values: NDArray[np.float32], how: int, beside: int = cv2.BORDER_REPLICATE) -> NDArray[np.float32]:
        size = depth.shape[1], depth.shape[0]
        return cv2.warpAffine(np.ascontiguousarray(values), motion, size, flags=how, borderMode=beside)

    near = (part > np.quantile(part, rng.uniform(0.3, 0.85))).astype(np.float32)
    focus = stack.focus_dpt.numpy()
    relief = moved(part - part.min(), cv2.INTER_NEAREST) * kappa_ratio * rng.uniform(0.5, 1.2)
    placed = relief + focus.min() + rng.uniform(0, 0.6) * np.ptp(focus)
    shown = (moved(near, cv2.INTER_NEAREST, cv2.BORDER_CONSTANT) > 0) & (placed > depth)
    nearest = np.where(shown, placed, depth).astype(np.float32)
    pasted = np.stack([np.where(shown, moved(x, cv2.INTER_LINEAR), y) for x, y in zip(part_image, image, strict=True)])
    return seen._replace(inverse_depth_dpt=torch.from_numpy(nearest), aif=torch.from_numpy(pasted))


def _motion(source: tuple[int, ...], target: tuple[int, ...], rng: np.random.Generator) -> NDArray[np.float32]:
    """A similarity that carries some point of the middle of `source` (H, W) to one of `target`, 2 x 3."""
    scale, angle = rng.uniform(0.7, 1.6), rng.uniform(-0.4, 0.4)
    turned = scale * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    here, there = (rng.uniform(0.2, 0.8, 2) * size[::-1] for size in (source, target))
    return np.column_stack([turned, there - turned @ here]).astype(np.float32)
