"""Focus and blur gain of every frame of a stack, from the best source that it has.

In order: a lens profile (measured), a thin lens with known focus distances (predicted), known focus distances
alone (the gain is then found from the images), and nothing (relative: the sweep is 0 to 1, design section 2).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from capture.errors import DataError
from capture.lens import LensProfile, same_setting
from capture.stack import FocalStack
from reconstruct.export import Intrinsics

# longer sides of the picture, over the whole sweep; on the sensor blur stays below aperture times magnification, 1 to 3
# sensor widths with lenses that focus from macro to infinity (100 mm f/2.8 at 1:1, 90 mm f/3.5 at 2:1)
WIDEST_BLUR = 4.0
HARMLESS_PX = 250.0  # of blur, in pictures of any size

Source = Literal["profile", "thin lens", "focus distances only", "uncalibrated"]


@dataclass(frozen=True)
class StackOptics:
    """The camera of one stack as the blur model sees it.

    Attributes:
        focus_dpt: (S,) focus settings; in relative mode positions along the sweep, 1 = nearest frame, 0 = farthest.
        kappa_px_per_dpt: (S,) CoC diameter in stored pixels per dioptre, None where the images must tell.
        scales: (S,) breathing that a profile predicts, None where it must be estimated.
        focus_std_dpt: (S,) what the calibration does not know about `focus_dpt`.
        focus_exact: measured, or said to be without error: the frames need not be asked.
        gain_std: relative standard error of the gain.
        metric: whether depth comes out in metres.
    """

    focus_dpt: NDArray[np.float64]
    kappa_px_per_dpt: NDArray[np.float64] | None
    scales: NDArray[np.float64] | None
    focus_std_dpt: NDArray[np.float64]
    focus_exact: bool
    gain_std: float
    metric: bool
    source: Source
    intrinsics: Intrinsics
    warnings: tuple[str, ...] = ()


def optics_of(stack: FocalStack, profile: LensProfile | None = None) -> StackOptics:
    """The optics of `stack`; `profile` (or the one stored in it) wins over the lens's nominal numbers.

    Raises DataError if the lens cannot be focused where the frames say or would blur absurdly, or if the profile does
    not fit the stack's size or knows nothing of its focus positions.
    """
    profile = profile or stack.profile
    if profile is not None:
        return _from_profile(stack, profile)
    intrinsics = Intrinsics.assume(stack.height, stack.width)
    unknown = np.isnan(stack.focus_distance_m)
    if unknown.any():
        known = stack.focus_dpt[~unknown]
        near_last = len(known) > 1 and known[-1] > known[0]
        words = (
            f"{stack.path.name} is uncalibrated ({int(unknown.sum())} of {stack.n_frames} focus distances unknown): "
            "depth is relative, ordered along the sweep in frame order, and has no unit"
        )
        if len(known) < 2:
            words += "; the first frame is taken for the nearest, which two known distances would decide"
        return StackOptics(
            focus_dpt=np.linspace(0.0, 1.0, stack.n_frames) if near_last else np.linspace(1.0, 0.0, stack.n_frames),
            kappa_px_per_dpt=None,
            scales=None,
            focus_std_dpt=np.zeros(stack.n_frames),
            focus_exact=False,
            gain_std=0.0,
            metric=False,
            source="uncalibrated",
            intrinsics=intrinsics,
            warnings=(words,),
        )
    focus_dpt = np.asarray(stack.focus_dpt, dtype=np.float64)
    std = np.asarray(stack.focus_distance_std_m, dtype=np.float64) * focus_dpt**2
    exact = bool((std == 0).all())
    std = np.nan_to_num(std)
    if stack.lens is None:
        words = f"{stack.path.name} has no lens data: the blur gain is estimated from the frames"
        return StackOptics(
            focus_dpt, None, None, std, exact, 0.05, True, "focus distances only", intrinsics, (words,)
        )  # fmt: skip
    problem = stack.lens.focus_problem(stack.focus_distance_m, [f"{i}" for i in stack.frame_index])
    if problem:
        raise DataError(f"{stack.path}: {problem}")
    kappa = np.asarray(stack.lens.kappa_px_per_dpt(focus_dpt), dtype=np.float64)
    widest_px = float(kappa.max() * np.ptp(focus_dpt))
    if widest_px > max(HARMLESS_PX, WIDEST_BLUR * max(stack.height, stack.width)):
        lens = stack.lens
        near, far = (f"{d:g} m" for d in (stack.focus_distance_m.min(), stack.focus_distance_m.max()))
        raise DataError(
            f"{stack.path}: from {far} to {near}, this lens would blur over {widest_px:.0f} px in pictures of "
            f"{stack.width} x {stack.height} px; correct focal_length_m ({lens.focal_length_m:g}; 50 mm is 0.050), "
            f"f_number ({lens.f_number:g}), pixel_pitch_m ({lens.pixel_pitch_m:g}) or the distances"
        )
    focal_px = float(np.median(stack.lens.image_distance_m(focus_dpt))) / stack.lens.pixel_pitch_m
    centre = (stack.width - 1) / 2, (stack.height - 1) / 2
    return StackOptics(
        focus_dpt, kappa, None, std, exact, 0.0, True, "thin lens", Intrinsics(focal_px, *centre)
    )  # fmt: skip


def _from_profile(stack: FocalStack, profile: LensProfile) -> StackOptics:
    """Focus, gain, breathing and their errors at the stack's focus positions.

    The profile's floor is not taken. The plane sweep blurs the sharper of two frames by sqrt(b^2 - a^2), and both hold
    the same floor s: convolution adds it alike to either side, so at the true depth they agree whatever s is.
    Refinement does render, but from an image fused from the frames, which holds the floor already; it keeps
    its own `FLOOR_PX`, whatever the lens.

    Raises DataError if the profile does not fit the stack's size or aperture, or knows nothing of its focus positions.
    """
    f_number = stack.working_f_number
    if profile.f_number and not same_setting(f_number, profile.f_number):
        raise DataError(
            f"{stack.path} was taken at f/{f_number:g}, its lens profile holds for f/{profile.f_number:g}; calibrate "
            "at that aperture, or take f_number out of the profile (--lens) if the camera misreports it"
        )
    fitted = profile.fitted_to(stack.width, stack.height)
    if stack.focus_unit == fitted.focus.unit and not np.isnan(stack.focus_command).any():
        optics = fitted.optics(stack.focus_command)
    elif not np.isnan(stack.focus_distance_m).any():
        optics = fitted.optics(stack.focus_distance_m, unit="m")
    else:
        raise DataError(
            f"{stack.path} has neither focus positions in {fitted.focus.unit}s, which the lens profile maps to "
            "distances, nor known focus distances; capture it with `daif capture --lens`, or leave out --lens"
        )
    inner = fitted.intrinsics
    relative_gain = np.divide(optics.kappa_std_px_per_dpt, optics.kappa_px_per_dpt)
    return StackOptics(
        focus_dpt=optics.focus_dpt,
        kappa_px_per_dpt=optics.kappa_px_per_dpt,
        scales=optics.scale,
        focus_std_dpt=optics.focus_std_dpt,
        focus_exact=True,
        gain_std=float(relative_gain.max()),
        metric=fitted.is_metric,
        source="profile",
        intrinsics=Intrinsics(inner.focal_length_px.value, inner.center_x_px.value, inner.center_y_px.value),
        warnings=tuple(fitted.warnings),
    )
