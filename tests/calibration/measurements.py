"""Blur measurements with known truth, for Monte Carlo: what `calibration.edges` would hand to `calibration.fit`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.fit import Observations


@dataclass(frozen=True)
class Truth:
    """A lens, its motor, and how the measurements of its blur err."""

    pupil_m: float = 0.0179
    focal_px: float = 2000.0
    far_dpt: float = 0.4
    near_dpt: float = 1.7
    bend: float = 0.25
    cubic: float = 0.0
    wave: float = 0.0  # of the motor law: no polynomial
    breathing: float = 0.05  # change of F per dioptre
    floor_px: float = 1.5
    noise: float = 0.01  # of the image; blur of a patch then errs by 0.04 px per %
    jitter_dpt: float = 0.0
    frame_blur_ratio: float = 0.002  # error of blur common to a frame
    pose_ratio: float = 1e-4

    def focus_dpt(self, step):
        u = np.asarray(step, float) / 1000.0
        shape = u + self.bend * u * (u - 1.0) + self.cubic * u * (u - 1.0) * (u - 0.5)
        shape = shape + self.wave * np.sin(2.0 * np.pi * u) / (2.0 * np.pi)
        return self.far_dpt + (self.near_dpt - self.far_dpt) * shape

    def observe(self, boards, steps, seed, n_corners=24) -> Observations:
        """Measurements of `boards`, pairs (distance_m, depth range over the board in dpt), at motor `steps`."""
        rng = np.random.default_rng(seed)
        rows = []
        for k, (distance_m, range_dpt) in enumerate(boards):
            depth = 1.0 / distance_m + range_dpt * np.linspace(-0.5, 0.5, n_corners)
            seen_depth = depth * (1.0 + self.pose_ratio * rng.standard_normal())
            for i, step in enumerate(steps):
                phi = self.focus_dpt(step) + self.jitter_dpt * rng.standard_normal()
                focal = self.focal_px * (1.0 + self.breathing * self.focus_dpt(step))
                c = np.abs(self.pupil_m * focal * (phi - depth)) * (1.0 + self.frame_blur_ratio * rng.standard_normal())
                std_px = np.hypot(4.0 * self.noise, 0.03)
                c2 = c**2 + self.floor_px**2
                std2 = 2.0 * np.sqrt(c2) * std_px
                c2 = c2 + std2 * rng.standard_normal(n_corners)
                radius2 = np.linspace(0.0, 0.5, n_corners)[rng.permutation(n_corners)]
                for j in range(n_corners):
                    rows.append((k, i, step, seen_depth[j], focal, c2[j], std2[j], radius2[j]))
        table = np.array(rows)
        return Observations(table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), *table[:, 2:].T)
