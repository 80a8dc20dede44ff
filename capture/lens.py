"""The thin lens: the only circle-of-confusion code of the project.

Blur is linear in dioptres (design section 2). With q_s = 1 / focus distance and q = 1 / depth,

    coc_px(q) = kappa(q_s) * (q_s - q),    kappa(q_s) = f^2 / (N p) / (1 - f q_s)

so two numbers per frame, (q_s, kappa), are the whole camera for this model. `Lens` predicts kappa from
focal length, f-number and pixel pitch; `LensProfile` holds what a calibration measured, where
kappa = pupil diameter x pinhole focal length in pixels and distances start at the entrance pupil.

All functions use arithmetic only, so floats, NumPy arrays and torch tensors work alike and gradients flow.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from capture.errors import DataError, UsageError

Numeric = TypeVar("Numeric")  # float, numpy.ndarray or torch.Tensor

ROUNDED = 0.03  # relatively; f-numbers or focal lengths that differ by less are rounded differently
NEAREST_FOCUS = 1.01  # focal lengths, hundredfold magnification; at 1 the sensor would be infinitely far away


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

    def focus_problem(self, focus_distance_m: Sequence[float] | np.ndarray, names: Sequence[str]) -> str | None:
        """Why this lens cannot be focused at these distances, or None; NaN is unknown, `names` are the frames'."""
        for distance_m, name in zip(focus_distance_m, names, strict=True):
            if distance_m < NEAREST_FOCUS * self.focal_length_m:
                return (
                    f"frame {name} is focused at {distance_m:g} m, and no lens with a focal length of "
                    f"{self.focal_length_m:g} m can be focused that close; correct the focal length (50 mm is 0.050) "
                    "or the distance (in metres)"
                )
        return None


def same_setting(one: float, other: float) -> bool:
    """Whether two f-numbers, or two focal lengths, say the same but for rounding; true where one is NaN, unknown."""
    return not max(one, other) > (1 + ROUNDED) * min(one, other)


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


class Measured(BaseModel):
    """A value with its standard error and where it came from (`fit`, `file`, `exif`, `user`, `assumed`, ...)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    value: float
    std: float = Field(ge=0)
    source: str = "fit"


class FocusTable(BaseModel):
    """What every focus position of the camera means: `focus_dpt` at `positions`, a smooth monotone map in between.

    Attributes:
        unit: unit of `positions`: motor steps, or the dioptres that the camera *claims*.
        positions: increasing; the first and the last bound the range in which the profile may be used.
        focus_dpt: true focus in 1/m from the entrance pupil, strictly rising or strictly falling.
        std_dpt: standard error of `focus_dpt`, including what is common to all positions.
        repeatability_dpt: scatter (one sigma) of the motor when it is sent to the same position again.
        source: where the map comes from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    unit: Literal["step", "dioptre"] = "step"
    positions: tuple[float, ...] = Field(min_length=2)
    focus_dpt: tuple[float, ...]
    std_dpt: tuple[float, ...]
    repeatability_dpt: float = Field(default=0.0, ge=0)
    source: str = "fit"

    @model_validator(mode="after")
    def _one_monotone_map(self) -> FocusTable:
        if not len(self.positions) == len(self.focus_dpt) == len(self.std_dpt):
            raise ValueError("positions, focus_dpt and std_dpt must have one entry each per position")
        if not np.all(np.diff(self.positions) > 0):
            raise ValueError("positions must increase")
        steps = np.diff(self.focus_dpt)
        if not (np.all(steps > 0) or np.all(steps < 0)):
            raise ValueError("focus_dpt must rise or fall strictly with position; the map turns")
        return self


class Breathing(BaseModel):
    """How the image grows and shifts with focus, at the positions of the `FocusTable`.

    A point at `x` px from the image centre at the reference position lies at `scale * x + shift` px.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    reference_position: float
    scale: tuple[float, ...]
    scale_std: tuple[float, ...]
    shift_x_px: tuple[float, ...]
    shift_y_px: tuple[float, ...]
    source: str = "fit"


class Intrinsics(BaseModel):
    """Pinhole camera at the breathing's reference position; distortion as OpenCV's (k1, k2, p1, p2, k3)."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    focal_length_px: Measured
    center_x_px: Measured
    center_y_px: Measured
    distortion: tuple[float, ...] = ()

    def rescaled(self, factor: float) -> Intrinsics:
        """The same camera on an image resized by `factor`."""
        return Intrinsics(
            focal_length_px=_scaled(self.focal_length_px, factor),
            # pixel centres sit at integers, so the image starts at -0.5
            center_x_px=_moved(_scaled(self.center_x_px, factor), 0.5 * factor - 0.5),
            center_y_px=_moved(_scaled(self.center_y_px, factor), 0.5 * factor - 0.5),
            distortion=self.distortion,
        )


class SourceStack(BaseModel):
    """One sweep that a profile was fitted to.

    `left_out_shift_dpt` is how far its focus lies from what a fit to the other sweeps alone predicts, and
    `left_out_expected_dpt` the standard error of that; absent where the others do not determine a fit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    file: str
    sha256: str
    n_frames: int
    distance_m: float
    tilt_deg: float
    left_out_shift_dpt: float | None = None
    left_out_expected_dpt: float | None = None


class Optics(NamedTuple):
    """What the blur model needs of each frame, all (S,): see `coc_diameter_px`."""

    focus_dpt: np.ndarray
    focus_std_dpt: np.ndarray
    kappa_px_per_dpt: np.ndarray
    kappa_std_px_per_dpt: np.ndarray
    scale: np.ndarray  # breathing: magnification relative to the reference position
    shift_px: np.ndarray  # (S, 2) x and y


class LensProfile(BaseModel):
    """What a calibration knows of one lens on one camera (`lens.yaml`).

    Blur follows c = A F_i |q - q_i| with the diameter A of the entrance pupil in metres, the pinhole focal length
    F_i in pixels at focus position i, and dioptres counted from the entrance pupil (notes/calibration.md 1.1).

    Attributes:
        grade: `metric` (target), `anchored` (known distances), `exif` (predicted), `relative` (units unknown).
        psf: family in which diameters are stated; `disc` is a uniform disc of the circle of confusion's diameter.
        floor_sigma_px: the blur left in perfect focus, as the standard deviation of a Gaussian convolved with it.
            Calibration needs it to measure blur, a renderer could; comparing frames with each other does not.
        near_far_ratio: blur gain in front of focus over the gain behind it; 1 for an ideal lens.
        field_curvature_dpt: focus shift from the centre to the corner of the image.
        distance_scale_std: relative error common to all distances (size of the board, focal length in pixels).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["daif-lens/1"] = "daif-lens/1"
    grade: Literal["metric", "anchored", "exif", "relative"]
    width_px: int = Field(gt=0)
    height_px: int = Field(gt=0)
    pixel_pitch_m: float | None = None
    pupil_diameter_m: Measured
    focus: FocusTable
    breathing: Breathing
    intrinsics: Intrinsics
    psf: Literal["disc", "gaussian"] = "disc"
    floor_sigma_px: Measured
    near_far_ratio: Measured | None = None
    field_curvature_dpt: Measured | None = None
    distance_scale_std: float = Field(default=0.0, ge=0)
    camera: str = ""
    lens: str = ""
    f_number: float | None = None
    temperature_c: float | None = None
    board: dict[str, Any] | None = None
    sources: tuple[SourceStack, ...] = ()
    created: str = ""
    software: str = ""
    warnings: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _physical(self) -> LensProfile:
        if not 1e-5 < self.pupil_diameter_m.value < 1.0 and self.grade != "relative":
            raise ValueError(f"pupil_diameter_m {self.pupil_diameter_m.value:g} is not a diameter in metres")
        n = len(self.focus.positions)
        table = self.breathing
        if any(len(row) != n for row in (table.scale, table.scale_std, table.shift_x_px, table.shift_y_px)):
            raise ValueError(f"breathing must have one entry per focus position, which are {n}")
        if min(table.scale) <= 0 or self.intrinsics.focal_length_px.value <= 0:
            raise ValueError("breathing.scale and intrinsics.focal_length_px must be positive")
        return self

    @property
    def is_metric(self) -> bool:
        """Whether distances read with this profile are metres."""
        return self.grade != "relative"

    @property
    def position_range(self) -> tuple[float, float]:
        """First and last focus position in which the profile may be used."""
        return self.focus.positions[0], self.focus.positions[-1]

    @property
    def focus_range_dpt(self) -> tuple[float, float]:
        """Smallest and largest focus of the profile in dioptres."""
        return min(self.focus.focus_dpt), max(self.focus.focus_dpt)

    def focus_dpt(self, position: Any) -> np.ndarray:
        """Focus in dioptres at focus `position`; `UsageError` outside the calibrated range."""
        return self._at(position, self.focus.focus_dpt)

    def step_for(self, focus_dpt: Any) -> np.ndarray:
        """Focus position that focuses at `focus_dpt`: the inverse of `focus_dpt`; `UsageError` outside the range."""
        wanted = np.asarray(focus_dpt, np.float64)
        low, high = self.focus_range_dpt
        outside = (wanted < low - 1e-9) | (wanted > high + 1e-9) | ~np.isfinite(wanted)
        if outside.any():
            raise UsageError(
                f"focus {float(wanted[outside].flat[0]):.4g} dpt is outside the lens profile, which knows "
                f"{low:.4g} to {high:.4g} dpt; calibrate a wider sweep or ask for less"
            )
        left, right = (np.full(wanted.shape, end) for end in self.position_range)
        rising = self.focus.focus_dpt[-1] > self.focus.focus_dpt[0]
        for _ in range(60):
            middle = 0.5 * (left + right)
            go_right = (self._at(middle, self.focus.focus_dpt) < wanted) == rising
            left, right = np.where(go_right, middle, left), np.where(go_right, right, middle)
        return 0.5 * (left + right)

    def kappa_px_per_dpt(self, focus_dpt: Any) -> np.ndarray:
        """CoC diameter in pixels per dioptre of defocus at focus setting `focus_dpt`."""
        return self.optics(self.step_for(focus_dpt)).kappa_px_per_dpt

    def optics(self, position: Any, unit: Literal["position", "dioptre", "m"] = "position") -> Optics:
        """Focus, blur gain and breathing of each frame with their standard errors.

        Args:
            position: (S,) focus positions in the profile's own unit, or the *true* focus with `unit`
                `dioptre` (1/m) or `m`.
        """
        position = np.atleast_1d(np.asarray(position, np.float64))
        if unit != "position":
            position = self.step_for(position if unit == "dioptre" else metre_to_dioptre(position))
        focus_dpt = self.focus_dpt(position)
        scale = self._at(position, self.breathing.scale)
        kappa = self.pupil_diameter_m.value * self.intrinsics.focal_length_px.value * scale
        scale_std = self._at(position, self.breathing.scale_std)
        # F's own error is not here: it rescales all distances and is counted in distance_scale_std
        kappa_std = kappa * np.hypot(self.pupil_diameter_m.std / self.pupil_diameter_m.value, scale_std / scale)
        focus_std = np.hypot(self._at(position, self.focus.std_dpt), self.focus.repeatability_dpt)
        shift_px = np.stack(
            [self._at(position, self.breathing.shift_x_px), self._at(position, self.breathing.shift_y_px)]
        )
        return Optics(
            focus_dpt, np.hypot(focus_std, self.distance_scale_std * focus_dpt), kappa, kappa_std, scale, shift_px.T
        )

    def rescaled(self, factor: float) -> LensProfile:
        """The same lens on an image resized by `factor` (0.5 halves the image): only what counts in pixels changes."""
        if not factor > 0:
            raise ValueError(f"factor must be positive, got {factor}")
        table = self.breathing
        return self.model_copy(
            update={
                "width_px": max(1, round(self.width_px * factor)),
                "height_px": max(1, round(self.height_px * factor)),
                "pixel_pitch_m": self.pixel_pitch_m and self.pixel_pitch_m / factor,
                "floor_sigma_px": _scaled(self.floor_sigma_px, factor),
                "intrinsics": self.intrinsics.rescaled(factor),
                "breathing": table.model_copy(
                    update={
                        "shift_x_px": tuple(x * factor for x in table.shift_x_px),
                        "shift_y_px": tuple(y * factor for y in table.shift_y_px),
                    }
                ),
            }
        )

    def fitted_to(self, width_px: int, height_px: int) -> LensProfile:
        """The profile rescaled to an image of this size; `DataError` when the aspect ratio says it was cropped."""
        factor = width_px / self.width_px
        if abs(self.height_px * factor - height_px) > 1.5 + 0.003 * height_px:
            raise DataError(
                f"the lens profile was made for images of {self.width_px} x {self.height_px} px and these are "
                f"{width_px} x {height_px} px, which is not the same picture resized; calibrate with the crop "
                f"that you capture with"
            )
        return self if factor == 1.0 else self.rescaled(factor)

    def to_yaml(self) -> str:
        """The profile as YAML; reading it gives back an equal profile, to the last bit."""
        fields = self.model_dump(mode="json", exclude_none=True)
        text = yaml.safe_dump(fields, sort_keys=False, default_flow_style=None, width=120, allow_unicode=True)
        return "# lens profile: SI units, named in each key; dioptres count from the entrance pupil\n" + text

    def write(self, path: Path) -> None:
        """Write `path` as YAML, whole or not at all."""
        partial = path.with_name(path.name + ".partial")
        partial.write_text(self.to_yaml(), encoding="utf-8")
        partial.replace(path)

    @classmethod
    def read(cls, path: Path) -> LensProfile:
        """Read a profile written by `write`; the error names the line of anything unexpected."""
        from capture.config import load_yaml

        return load_yaml(path, cls)

    def _at(self, position: Any, values: tuple[float, ...]) -> np.ndarray:
        """`values` of the focus table interpolated at `position` (monotone cubic)."""
        from scipy.interpolate import PchipInterpolator

        position = np.asarray(position, np.float64)
        low, high = self.position_range
        slack = 1e-9 * (high - low)
        outside = (position < low - slack) | (position > high + slack) | ~np.isfinite(position)
        if outside.any():
            raise UsageError(
                f"focus position {float(position[outside].flat[0]):.6g} is outside the lens profile, which was "
                f"calibrated from {low:.6g} to {high:.6g}; calibrate a sweep that covers it"
            )
        return PchipInterpolator(self.focus.positions, values, extrapolate=True)(position)


def _scaled(measured: Measured, by: float) -> Measured:
    return measured.model_copy(update={"value": measured.value * by, "std": measured.std * by})


def _moved(measured: Measured, by: float) -> Measured:
    return measured.model_copy(update={"value": measured.value + by})
