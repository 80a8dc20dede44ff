"""A camera for calibration tests: the board through a real aperture, sharing nothing with the code under test.

A plane seen from the point (a, b) of the pupil is an affine warp of the plane seen from its centre, because inverse
depth is affine in pinhole image coordinates. The frame is the mean of such views at twice the resolution, binned.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import cv2
import numpy as np

from calibration.board import Board

SUPERSAMPLING = 2
TEXELS_PER_CELL = 8


@cache
def _texture(board: Board) -> np.ndarray:
    cells = np.pad(board.cells(), 48, constant_values=1)
    return np.kron(cells, np.full((TEXELS_PER_CELL, TEXELS_PER_CELL), 255, np.uint8))


@dataclass(frozen=True)
class BoardCamera:
    """Thin lens with a non-linear focus motor."""

    height: int = 400
    width: int = 600
    pupil_m: float = 0.0179
    focal_px: float = 1250.0  # at focus 0
    focal_m: float = 0.050
    breathing: float = 1.0  # 1: unit-focus thin lens, -1: against it
    near_dpt: float = 1.7
    far_dpt: float = 0.4
    bend: float = 0.25  # of the motor law
    wave: float = 0.0  # of the motor law: no polynomial
    floor_px: float = 0.5
    noise: float = 0.01
    bits: int = 14
    distortion: float = 0.0  # k1
    backlash: float = 0.0  # play of the gear in steps; all frames are approached from below, so the lens stays behind

    def focus_dpt(self, step):
        u = (np.asarray(step, float) - self.backlash) / 1000.0
        return self.far_dpt + (self.near_dpt - self.far_dpt) * (
            u + self.bend * u * (u - 1.0) + self.wave * np.sin(2.0 * np.pi * u) / (2.0 * np.pi)
        )

    def focal_at(self, step):
        phi = self.focus_dpt(step)
        return self.focal_px / (1.0 - self.focal_m * phi * self.breathing)

    def pose(self, board: Board, distance_m, tilt_deg=0.0, roll_deg=0.0, shift_m=(0.0, 0.0), turn_deg=0.0):
        """(rotation, translation) with the board's centre at `distance_m`."""
        about_x = cv2.Rodrigues(np.array([np.deg2rad(tilt_deg), 0.0, 0.0]))[0]
        about_y = cv2.Rodrigues(np.array([0.0, np.deg2rad(turn_deg), 0.0]))[0]
        about_z = cv2.Rodrigues(np.array([0.0, 0.0, np.deg2rad(roll_deg)]))[0]
        rotation = about_z @ about_x @ about_y
        center = np.array([board.columns, board.rows, 0.0]) * board.square_m / 2
        return rotation, np.array([*shift_m, distance_m]) - rotation @ center

    def frame(self, board: Board, pose, step, rng, jitter_dpt=0.0) -> np.ndarray:
        """One linear grey frame (H, W)."""
        n = SUPERSAMPLING
        rotation, translation = pose
        phi = float(self.focus_dpt(step)) + jitter_dpt
        focal = float(self.focal_at(step)) * n
        height, width = self.height * n, self.width * n
        camera = np.array([[focal, 0, (width - 1) / 2 + 3.0], [0, focal, (height - 1) / 2 - 2.0], [0, 0, 1.0]])
        plane = camera @ np.column_stack([rotation[:, :2], translation])
        normal = rotation[:, 2] / (rotation[:, 2] @ translation)
        inverse_depth = normal @ np.linalg.inv(camera)  # of the homogeneous pixel
        texture = _texture(board)
        texels_per_m = 24 * TEXELS_PER_CELL / board.square_m
        shift = 48 * TEXELS_PER_CELL - 0.5
        from_texels = np.linalg.inv(np.array([[texels_per_m, 0, shift], [0, texels_per_m, shift], [0, 0, 1.0]]))
        outline = np.array([[0, 0], [1, 0], [1, 1], [0, 1.0]]) * [board.columns, board.rows] * board.square_m
        seen = cv2.perspectiveTransform(outline[None], plane)[0]
        outline_dpt = np.column_stack([seen, np.ones(4)]) @ inverse_depth
        largest = self.pupil_m * focal * float(np.abs(phi - outline_dpt).max())
        # beyond the blur of the print everything is white paper
        low = np.clip(np.floor(seen.min(axis=0) - largest / 2).astype(int) - 4, 0, (width, height))
        high = np.clip(np.ceil(seen.max(axis=0) + largest / 2).astype(int) + 5, 0, (width, height))
        to_region = np.array([[1, 0, -low[0]], [0, 1, -low[1]], [0, 0, 1.0]])
        size = (int(high[0] - low[0]), int(high[1] - low[1]))
        count = int(np.clip((largest / n) ** 2, 64, 160))
        angle = np.arange(count) * np.pi * (3 - np.sqrt(5))
        pupil = np.sqrt((np.arange(count) + 0.5) / count)[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
        pupil -= pupil.mean(axis=0)
        pupil *= 0.25 * self.pupil_m / pupil.std(axis=0)  # second moments of the disc, exactly
        total = np.zeros(size[::-1], np.float32)
        for a, b in pupil:
            aside = np.eye(3)
            aside[0] += focal * a * (phi * np.array([0, 0, 1.0]) - inverse_depth)
            aside[1] += focal * b * (phi * np.array([0, 0, 1.0]) - inverse_depth)
            matrix = to_region @ aside @ plane @ from_texels
            view = cv2.warpPerspective(texture, matrix, size, flags=cv2.INTER_LINEAR, borderValue=(255,))
            cv2.accumulate(view, total)
        image = np.ones((height, width), np.float32)
        image[low[1] : high[1], low[0] : high[0]] = total / (255.0 * count)
        image = image * 0.75 + 0.06
        if self.distortion:
            image = cv2.remap(image, *self._straight(camera, (height, width)), cv2.INTER_CUBIC)
        if self.floor_px:
            image = cv2.GaussianBlur(image, (0, 0), self.floor_px * n)
        image = cv2.resize(image, (self.width, self.height), interpolation=cv2.INTER_AREA)
        image = image + rng.normal(0.0, self.noise, image.shape).astype(np.float32)
        levels = 2**self.bits - 1
        return (np.round(np.clip(image, 0, 1) * levels) / levels).astype(np.float32)

    def _straight(self, camera, shape) -> tuple[np.ndarray, np.ndarray]:
        """Where every pixel of a distorted image lies in the straight one: r_distorted = r (1 + k1 r^2)."""
        y, x = np.mgrid[: shape[0], : shape[1]]
        xd, yd = (x - camera[0, 2]) / camera[0, 0], (y - camera[1, 2]) / camera[1, 1]
        shrink = np.ones(shape)
        for _ in range(10):
            shrink = 1.0 / (1.0 + self.distortion * (xd**2 + yd**2) * shrink**2)
        straight_x, straight_y = xd * shrink * camera[0, 0] + camera[0, 2], yd * shrink * camera[1, 1] + camera[1, 2]
        return straight_x.astype(np.float32), straight_y.astype(np.float32)

    def sweep(self, board: Board, pose, steps, seed=0, jitter_dpt=0.0) -> np.ndarray:
        """(S, H, W) frames at motor `steps`; `jitter_dpt` is the motor's own scatter."""
        rng = np.random.default_rng(seed)
        jitter = rng.normal(0.0, jitter_dpt, len(steps)) if jitter_dpt else np.zeros(len(steps))
        return np.stack([self.frame(board, pose, s, rng, j) for s, j in zip(steps, jitter, strict=True)])
