"""The thin lens: the only circle-of-confusion code of the project.

Blur is linear in dioptres (design section 2). With q_s = 1 / focus distance and q = 1 / depth,

    coc_px(q) = kappa(q_s) * (q_s - q),    kappa(q_s) = f^2 / (N p) / (1 - f q_s)

so two numbers per frame, (q_s, kappa), are the whole camera for this model. `Lens` predicts kappa from
focal length, f-number and pixel pitch; `LensProfile` holds what a calibration measured, where
kappa = pupil diameter x pinhole focal length in pixels and distances start at the entrance pupil.

All functions use arithmetic only, so floats, NumPy arrays and torch tensors work alike and gradients flow.
"""

from __future__ import annotations

from typing import Any, TypeVar

import numpy as np
from pydantic import BaseModel, ConfigDict, field_validator

Numeric = TypeVar("Numeric")  # float, numpy.ndarray or torch.Tensor


class Lens(BaseModel):
    """A thin lens in front of a sensor, in SI units.

    Attributes:
        focal_length_m: focal length in metres (50 mm is 0.050).
        f_number: focal length over aperture diameter.
        pixel_pitch_m: spacing of the *stored* pixels in metres; it grows when the image is downscaled.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    focal_length_m: float
    f_number: float
    pixel_pitch_m: float

    @field_validator("focal_length_m")
    @classmethod
    def _focal_length_in_metres(cls, value: float) -> float:
        if not 5e-4 < value < 2.0:
            raise ValueError(f"{value:g} is not a focal length in metres (0.0005 to 2); 50 mm is 0.050")
        return value

    @field_validator("f_number")
    @classmethod
    def _f_number_plausible(cls, value: float) -> float:
        if not 0.3 <= value <= 128:
            raise ValueError(f"{value:g} is not an f-number (0.3 to 128)")
        return value

    @field_validator("pixel_pitch_m")
    @classmethod
    def _pixel_pitch_in_metres(cls, value: float) -> float:
        if not 1e-7 < value < 1e-3:
            raise ValueError(f"{value:g} is not a pixel pitch in metres (1e-7 to 1e-3); 4 um is 4e-6")
        return value

    @property
    def aperture_m(self) -> float:
        """Diameter of the aperture in metres."""
        return self.focal_length_m / self.f_number

    def rescaled(self, factor: float) -> Lens:
        """The same lens on an image resized by `factor` (0.5 halves the image and doubles the pitch)."""
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor}")
        return self.model_copy(update={"pixel_pitch_m": self.pixel_pitch_m / factor})

    def kappa_px_per_dpt(self, focus_dpt: Numeric) -> Numeric:
        """CoC diameter in pixels per dioptre of defocus, at focus setting `focus_dpt` (1/m)."""
        f_m, p_m = self.focal_length_m, self.pixel_pitch_m
        return f_m * f_m / (self.f_number * p_m) / (1.0 - f_m * focus_dpt)  # type: ignore[operator, return-value]

    def image_distance_m(self, focus_dpt: Numeric) -> Numeric:
        """Lens-to-sensor distance in metres when focused at `focus_dpt`; its ratio is the focus breathing."""
        return self.focal_length_m / (1.0 - self.focal_length_m * focus_dpt)  # type: ignore[operator, return-value]


def coc_diameter_px(kappa_px_per_dpt: Any, focus_dpt: Any, inverse_depth_dpt: Any) -> Any:
    """Signed circle-of-confusion diameter in pixels, positive behind the plane of focus.

    Args:
        kappa_px_per_dpt: blur gain of the frame, pixels of CoC diameter per dioptre.
        focus_dpt: focus setting q_s = 1 / focus distance, in 1/m; 0 is infinity.
        inverse_depth_dpt: q = 1 / depth, in 1/m; 0 is infinitely far.
    """
    return kappa_px_per_dpt * (focus_dpt - inverse_depth_dpt)


def depth_of_field_m(lens: Lens, focus_dpt: float, coc_limit_px: float) -> tuple[float, float]:
    """Near and far limit in metres between which the CoC stays below `coc_limit_px`; far may be inf."""
    half_dpt = coc_limit_px / lens.kappa_px_per_dpt(focus_dpt)
    return dioptre_to_metre(focus_dpt + half_dpt), dioptre_to_metre(max(focus_dpt - half_dpt, 0.0))


def dioptre_to_metre(dioptre: Any) -> Any:
    """1/x for floats, arrays and tensors; 0 dpt is inf, NaN stays NaN."""
    if isinstance(dioptre, float | int):
        return float("inf") if dioptre == 0 else 1.0 / dioptre
    if isinstance(dioptre, np.ndarray):
        with np.errstate(divide="ignore"):
            return 1.0 / dioptre
    return 1.0 / dioptre


def metre_to_dioptre(metre: Any) -> Any:
    """1/x for floats, arrays and tensors; inf is 0 dpt, NaN stays NaN."""
    return dioptre_to_metre(metre)


def depth_error_m(depth_m: Any, kappa_px_per_dpt: Any, coc_error_px: Any) -> Any:
    """Depth error caused by misjudging the CoC by `coc_error_px`: dZ = Z^2 dc / kappa (metres)."""
    return depth_m * depth_m * coc_error_px / kappa_px_per_dpt
