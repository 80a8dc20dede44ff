"""Does an old lens profile still hold? A new sweep of the board is measured and compared with what it predicts."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from calibration.calibrate import BoardStack, Pose
from calibration.edges import CalibrationError, locate, measure, pose_of
from calibration.intrinsics import camera_matrix
from capture.errors import UsageError
from capture.lens import LensProfile, same_setting

GAIN_LIMIT = 0.02
FRAMES_NEEDED = 3


@dataclass(frozen=True)
class Check:
    """What a new sweep says about a profile.

    `gain_ratio` is measured blur gain over the profile's (one board distance tells it only together with the shift).
    """

    holds: bool
    shift_dpt: float
    shift_std_dpt: float
    gain_ratio: float
    gain_std: float
    residual_px: float
    n_frames: int
    limit_dpt: float
    sentence: str


def check_profile(profile: LensProfile, stack: BoardStack) -> Check:
    """Compare `profile` with a new sweep of a board; `UsageError` when the two do not belong together."""
    sweep = stack.sweep
    if stack.unit != profile.focus.unit:
        raise UsageError(f"{stack.path} counts focus in {stack.unit}s, the profile in {profile.focus.unit}s")
    if profile.f_number and not same_setting(stack.f_number, profile.f_number):
        raise UsageError(
            f"{stack.path} was taken at f/{stack.f_number:g} and the profile at f/{profile.f_number:g}; sweep at the "
            "profile's aperture"
        )
    height, width = stack.full_size
    lens = profile.fitted_to(width, height).rescaled(1.0 / stack.binning)
    low, high = lens.position_range
    inside = (sweep.positions >= low) & (sweep.positions <= high)
    if inside.sum() < FRAMES_NEEDED:
        raise UsageError(
            f"{stack.path}: {inside.sum()} of {len(inside)} frames lie in the profile's range of focus positions "
            f"({low:g} to {high:g}); sweep within it"
        )
    found = locate(sweep)
    sweep_optics = lens.optics(np.clip(sweep.positions, low, high))
    camera = camera_matrix(lens.intrinsics, float(sweep_optics.scale[found.reference]))
    camera[:2, 2] += sweep_optics.shift_px[found.reference]
    distortion = lens.intrinsics.distortion
    blur = measure(sweep, found, camera, distortion, floor_sigma_px=lens.floor_sigma_px.value)
    pose = Pose(*pose_of(sweep, blur, found.reference, camera, distortion))
    inverse_depth = 1.0 / pose.depths_m(sweep.board)
    rows = []  # per frame: (sign-carrying) predicted defocus, measured defocus, their difference, weight
    for frame in np.flatnonzero(inside):
        here = blur.frame == frame
        kappa = sweep_optics.kappa_px_per_dpt[frame]
        defocus = sweep_optics.focus_dpt[frame] - inverse_depth[blur.corner[here]]
        if here.sum() < 4 or np.abs(np.median(kappa * defocus)) < 3.0:
            continue  # near focus the sign of the blur is not seen
        measured = np.sign(defocus) * np.sqrt(np.maximum(blur.coc2_px2[here], 0.0)) / kappa
        rows.append((float(np.median(defocus)), float(np.median(measured))))
    if len(rows) < FRAMES_NEEDED:
        raise CalibrationError(
            "NO_BRACKET",
            f"{stack.path}: only {len(rows)} frames are blurred enough to compare; sweep farther past the board",
        )
    predicted, measured = np.array(rows).T
    design = np.column_stack([np.ones_like(predicted), predicted])
    expected_std = float(np.median(sweep_optics.focus_std_dpt))
    solution, *_ = np.linalg.lstsq(design, measured - predicted, rcond=None)
    left = measured - predicted - design @ solution
    scatter = max(float(np.sqrt(np.sum(left**2) / max(len(rows) - 2, 1))), expected_std)
    covariance = np.linalg.inv(design.T @ design) * scatter**2
    shift, gain = float(solution[0]), float(solution[1])
    shift_std, gain_std = (float(value) for value in np.sqrt(np.diag(covariance)))
    kappa = float(np.median(sweep_optics.kappa_px_per_dpt))
    # half a pixel of blur is what nobody sees
    limit = max(3.0 * float(np.hypot(expected_std, shift_std)), 0.5 / kappa)
    bad_shift = abs(shift) > limit
    bad_gain = abs(gain) > max(GAIN_LIMIT, 3.0 * gain_std)
    if bad_shift or bad_gain:
        reasons = []
        if bad_shift:
            reasons.append(f"focus is {shift:+.4f} dpt from where it says (limit {limit:.4f})")
        if bad_gain:
            reasons.append(f"blur grows {100 * gain:+.1f} % against it")
        sentence = f"The profile no longer holds: {' and '.join(reasons)}; calibrate again."
    else:
        sentence = (
            f"The profile holds: focus within {abs(shift):.4f} dpt (limit {limit:.4f}), blur gain within "
            f"{100 * abs(gain):.1f} %, over {len(rows)} frames."
        )
    return Check(
        not (bad_shift or bad_gain), shift, shift_std, 1.0 + gain, gain_std,
        kappa * scatter, len(rows), limit, sentence,
    )  # fmt: skip
