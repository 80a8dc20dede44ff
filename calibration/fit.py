"""Blur of many patches to pupil diameter, focus map and blur floor, each with its standard error.

Model of the squared CoC diameter of patch j in frame i of sweep k (notes/calibration.md 1.1 and 4.4):

    c^2 = (A F_i (D_kj (1 + e_k) - phi(u_i) - delta_ki))^2 + c0^2

A pupil diameter, F_i pinhole focal length in px, D inverse depth, phi a polynomial in motor position u, e_k the error
of a pose, delta_ki a random focus error per frame. Without delta the covariance claims far too much: patches of one
frame share the motor's error. Its spread tau is estimated, and is the motor's repeatability.

No motor follows a polynomial, and what a polynomial of some degree leaves is the same on every board: taken for scatter
it would average out, and the intervals would be too narrow. So phi has many coefficients, each expected to be small
(normal, its size falling with the fourth power of its degree), and the sizes' common scale is estimated like tau.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.stats import t as student_t

from calibration.edges import CalibrationError

logger = logging.getLogger(__name__)

POSE_STD = 2e-4  # relative error of a PnP distance with the right focal length (notes 4.4: 0.00 to 0.013 %)
BLUR_STD_PX, BLUR_STD_RATIO = 0.01, 0.001  # what the template does not explain, common to no two patches
MAX_DEGREE = 8
LAW_DECAY = 4.0  # coefficient k of the focus law is expected to fall as k^-4: smooth motors
SMALL_BLUR_PX = 5.0  # stage 2 leaves out what is smaller: there the floor's shape counts, not only its size
FLOOR_SHAPE_PX2 = 0.3  # error of c^2 there when the bank already has a floor of the right size
FLOOR_SHAPE_RATIO = 0.08  # of the floor's own c^2, where blur is not much larger than the floor
OUTLIER_SIGMAS = 5.0
MAX_PUPIL_RATIO = 0.05  # relative standard error of A beyond which nothing is known
MIN_DEPTH_SHARE = 0.05  # of the sweep's dioptre range, between the nearest and the farthest patch
TAU_ROUNDS = 15
WIDE_TAU_RATIO = 0.1  # of the dioptre range: prior of a frame's focus error before the motor is known
TAU_FLOOR = 1e-4  # of the dioptre range: no motor is believed to be better
MAX_STEPS, COST_TOLERANCE, MAX_DAMPING = 100, 1e-8, 1e12
FLOOR_TO_SIGMA = 1 / 3.6  # disc-fit diameter of a Gaussian floor (notes 4.4: c0 = 3.6 sigma)

FloatArray = NDArray[np.float64]


@dataclass(frozen=True)
class Observations:
    """Patches of all sweeps; every array has one entry per patch and frame."""

    sweep: NDArray[np.int64]
    frame: NDArray[np.int64]  # within its sweep
    position: FloatArray  # of the focus motor
    inverse_depth_dpt: FloatArray
    focal_px: FloatArray  # pinhole focal length in that frame
    coc2_px2: FloatArray
    std_px2: FloatArray
    radius2: FloatArray  # squared distance from the image centre, 1 in the corner

    def __len__(self) -> int:
        return len(self.frame)

    def take(self, keep: NDArray[Any]) -> Observations:
        """The observations selected by a mask or by indices."""
        return Observations(**{name: values[keep] for name, values in vars(self).items()})


@dataclass(frozen=True)
class FocusLaw:
    """phi(u): Chebyshev polynomial in the position scaled to [-1, 1] over `low` to `high`."""

    low: float
    high: float
    coefficients: FloatArray

    def design(self, position: Any) -> FloatArray:
        """(n, degree + 1) values of the basis, so that phi = design @ coefficients."""
        unit = (2.0 * np.asarray(position, np.float64) - self.low - self.high) / (self.high - self.low)
        return np.asarray(np.polynomial.chebyshev.chebvander(unit, len(self.coefficients) - 1), np.float64)

    def __call__(self, position: Any) -> FloatArray:
        return self.design(position) @ self.coefficients


@dataclass(frozen=True)
class Fit:
    """Result of `fit_blur`; standard errors are scaled so that value +- 1.96 std covers 95 %."""

    pupil_m: float
    pupil_std_m: float
    law: FocusLaw
    law_covariance: FloatArray
    law_std: FloatArray  # size that was expected of the law's coefficients
    floor2_px2: float  # c0^2 of the measured diameters; negative when the bank's floor was too large
    floor2_std_px2: float
    tau_dpt: float
    frame_error_dpt: dict[tuple[int, int], float]  # delta of (sweep, frame)
    outlier_frames: list[tuple[int, int]]
    residual: FloatArray  # standardised, per observation used
    used: NDArray[np.bool_]  # of the observations given
    converged: bool
    pupil_focus_correlation: float
    pose_error: FloatArray  # e_k
    extra: dict[str, tuple[float, float]]  # name -> (value, std) of terms that the model leaves out, see `_diagnose`

    def focus_std_dpt(self, position: Any) -> FloatArray:
        """Standard error of phi at `position`."""
        design = self.law.design(position)
        return np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", design, self.law_covariance, design), 0.0))

    def signed_coc_px(self, seen: Observations) -> FloatArray:
        """CoC diameter that the fit predicts, positive behind the plane of focus, without the floor."""
        return self.pupil_m * seen.focal_px * (self.law(seen.position) - seen.inverse_depth_dpt)


def fit_blur(seen: Observations, floor_sigma_px: float = 0.0, names: Sequence[str] = ()) -> Fit:
    """Two-stage robust fit of `seen`; `CalibrationError` names what makes it impossible.

    Stage 1 takes every patch; stage 2, started from it, only those whose predicted blur exceeds 5 px (or a third
    of the largest), because near focus the shape of the floor is mistaken for size.

    Args:
        floor_sigma_px: Gaussian floor that the templates already had; what it hides counts in the uncertainties.
        names: of the sweeps, for what is said about one of them.
    """
    _check_bracketed(seen)
    degree = max(1, min(MAX_DEGREE, len(np.unique(seen.position)) - 2))
    first = _fit_hierarchical(seen, _linear_start(seen), degree)
    predicted = np.abs(first.signed_coc_px(seen))
    cut = min(SMALL_BLUR_PX, float(predicted.max()) / 3)
    # sharp patches stay in as the floor's anchor, with the uncertainty of its shape
    floor2 = (floor_sigma_px / FLOOR_TO_SIGMA) ** 2 + abs(first.floor2_px2)
    blunt = np.where(predicted < cut, FLOOR_SHAPE_PX2 + 0.5 * abs(first.floor2_px2), 0.0)
    blunt += FLOOR_SHAPE_RATIO * floor2 / (1.0 + predicted**2 / max(4.0 * floor2, 1e-6))
    second = _fit_hierarchical(seen, first, degree, extra_std_px2=blunt, diagnose=True)
    gap = abs(second.pupil_m - first.pupil_m) / max(float(np.hypot(first.pupil_std_m, second.pupil_std_m)), 1e-12)
    if gap > 3.0 and abs(second.pupil_m / first.pupil_m - 1.0) > 0.1:
        raise CalibrationError(
            "NOT_CONVERGED",
            f"small and large blur disagree about the aperture ({first.pupil_m * 1e3:.2f} and "
            f"{second.pupil_m * 1e3:.2f} mm); the images are probably sharpened or not linear: capture RAW, or switch "
            "sharpening off",
        )
    _check_result(second, seen, names or [f"sweep {k}" for k in range(int(seen.sweep.max()) + 1)])
    return second


@dataclass(frozen=True)
class _Start:
    pupil_m: float
    law: FocusLaw
    floor2_px2: float


def _groups(seen: Observations) -> tuple[NDArray[np.int64], list[tuple[int, int]]]:
    """Index of the (sweep, frame) of each observation, and the list of these pairs."""
    keys = seen.sweep.astype(np.int64) * 100_000 + seen.frame
    unique, index = np.unique(keys, return_inverse=True)
    return index.astype(np.int64), [(int(key // 100_000), int(key % 100_000)) for key in unique]


def _linear_start(seen: Observations) -> _Start:
    """Closed-form start: with the side of focus known from the V's minimum, signed blur is linear in A and A phi."""
    signed, rows, focal = [], [], []
    low, high = float(seen.position.min()), float(seen.position.max())
    for sweep in np.unique(seen.sweep):
        here = seen.sweep == sweep
        # patches of one depth share a V: bins of inverse depth stand in for corners
        depth = seen.inverse_depth_dpt[here]
        bins = np.floor((depth - depth.min()) / max(np.ptp(depth) / 6, 1e-3 * abs(float(depth.mean())))).astype(int)
        for label in np.unique(bins):
            index = np.flatnonzero(here)[bins == label]
            positions = np.unique(seen.position[index])
            level = np.array([np.median(seen.coc2_px2[index][seen.position[index] == p]) for p in positions])
            lowest = int(np.argmin(level))
            for at, coc2 in zip(positions, level, strict=True):
                if at == positions[lowest] or coc2 <= 0:
                    continue
                match = index[seen.position[index] == at]
                signed.append(np.sign(at - positions[lowest]) * np.sqrt(max(coc2 - level[lowest], 0.0)))
                focal.append(float(seen.focal_px[match].mean()))
                rows.append((at, float(seen.inverse_depth_dpt[match].mean())))
    law = FocusLaw(low, high, np.zeros(3 if len(rows) >= 8 else 2))
    table = np.array(rows)
    # c / F = B(u) - A D, B = A phi
    design = np.column_stack([law.design(table[:, 0]), -table[:, 1]])
    target, weight = np.array(signed) / np.array(focal), np.ones(len(rows))
    for _ in range(10):
        solution = np.linalg.lstsq(design * weight[:, None], target * weight, rcond=None)[0]
        left = np.abs(target - design @ solution)
        weight = 1.0 / np.sqrt(1.0 + (left / max(2.0 * float(np.median(left)), 1e-12)) ** 2)
    pupil = float(solution[-1])
    # a motor that focuses farther with rising position turns every sign around
    coefficients = solution[:-1] / (pupil if pupil else 1e-12)
    floor2 = float(np.clip(np.percentile(seen.coc2_px2, 2), 0.0, 25.0))
    return _Start(max(abs(pupil), 1e-6), FocusLaw(low, high, coefficients), floor2)


def _with_degree(start: _Start, degree: int) -> _Start:
    coefficients = np.zeros(degree + 1)
    shared = min(degree + 1, len(start.law.coefficients))
    coefficients[:shared] = start.law.coefficients[:shared]
    return _Start(start.pupil_m, FocusLaw(start.law.low, start.law.high, coefficients), start.floor2_px2)


def _span(seen: Observations, start: _Start) -> float:
    ends = start.law(np.array([start.law.low, start.law.high]))
    return max(float(abs(ends[1] - ends[0])), 1e-3)


@dataclass(frozen=True)
class _Solution:
    pupil_m: float
    law: FocusLaw
    floor2_px2: float
    pose: FloatArray
    delta: FloatArray
    residual: FloatArray
    covariance: FloatArray  # of (log A, law coefficients, floor2)
    delta_variance: FloatArray
    delta_variance_given_rest: FloatArray  # if all other parameters were known
    term: float  # value and standard error of the additional term, if one was given
    term_std: float
    converged: bool


def _solve(
    seen: Observations,
    start: _Start | _Solution,
    *,
    tau: float | FloatArray,
    law_std: FloatArray,
    index: NDArray[np.int64],
    n_groups: int,
    extra_std_px2: FloatArray | float = 0.0,
    weight: FloatArray | None = None,
    term: tuple[FloatArray, FloatArray] | None = None,
) -> _Solution:
    """Robust least squares for given tau (scalar or one per (sweep, frame)).

    Args:
        law_std: expected size of each coefficient of the law, infinite where nothing is expected.
        term: one more parameter z: the gain of each observation grows by z times the first, its defocus by z times
            the second array.
    """
    n_law = len(start.law.coefficients)
    basis = start.law.design(seen.position)
    sweeps, sweep_index = np.unique(seen.sweep, return_inverse=True)
    tau_each = np.broadcast_to(np.asarray(tau, np.float64), (n_groups,))
    own_tau = tau_each[index]
    coc = np.sqrt(np.maximum(seen.coc2_px2, 1.0))
    model_std = 2.0 * coc * np.hypot(BLUR_STD_PX, BLUR_STD_RATIO * coc)
    std = np.sqrt(seen.std_px2**2 + model_std**2 + np.square(extra_std_px2))
    root = np.ones(len(seen)) if weight is None else np.sqrt(weight)
    rows = np.arange(len(seen))
    floor_at, pose_at, term_at = 1 + n_law, 2 + n_law, 2 + n_law + len(sweeps)
    n_shared = term_at + (term is not None)
    precision = np.zeros(n_shared + n_groups)  # of what is expected of the parameters, which is 0
    precision[1:floor_at] = 1.0 / np.square(law_std)
    precision[pose_at:term_at] = precision[n_shared:] = 1.0
    by_gain, by_shift = term if term is not None else (np.zeros(len(seen)), np.zeros(len(seen)))
    # the frames' own errors are many, and each touches its own frame only
    of_group = csr_array((np.ones(len(seen)), (index, rows)), shape=(n_groups, len(seen)))

    def misfit(x: FloatArray) -> tuple[FloatArray, FloatArray, FloatArray]:
        """(standardised residual, gain, defocus) of every patch."""
        z = x[term_at] if term is not None else 0.0
        gain = np.exp(x[0]) * seen.focal_px * (1.0 + z * by_gain)
        depth = seen.inverse_depth_dpt * (1.0 + POSE_STD * x[pose_at:term_at][sweep_index])
        defocus = basis @ x[1:floor_at] + own_tau * x[n_shared:][index] - depth + z * by_shift
        return (seen.coc2_px2 - (gain * defocus) ** 2 - x[floor_at]) / std, gain, defocus

    def cost(x: FloatArray) -> float:
        return float(np.sum((root * _soften(misfit(x)[0])) ** 2) + np.sum(precision * x**2))

    def normal_equations(x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(information matrix, half the cost's gradient)."""
        data, gain, defocus = misfit(x)
        scale = _soften_slope(data) * root / std
        by_defocus = -2.0 * gain**2 * defocus * scale
        shared = np.zeros((len(seen), n_shared))
        shared[:, 0] = by_defocus * defocus
        shared[:, 1:floor_at] = by_defocus[:, None] * basis
        shared[:, floor_at] = -scale
        shared[rows, pose_at + sweep_index] = -by_defocus * seen.inverse_depth_dpt * POSE_STD
        if term is not None:
            shared[:, term_at] = by_defocus * (defocus * by_gain / (1.0 + x[term_at] * by_gain) + by_shift)
        own = by_defocus * own_tau
        softened = _soften(data) * root
        cross = of_group @ (shared * own[:, None])
        information = np.block([[shared.T @ shared, cross.T], [cross, np.diag(of_group @ own**2)]])
        information[np.diag_indices(len(x))] += precision
        gradient = np.concatenate([shared.T @ softened, of_group @ (own * softened)])
        gradient += precision * x
        return information, gradient

    x = np.zeros(n_shared + n_groups)
    x[0], x[1:floor_at], x[floor_at] = np.log(start.pupil_m), start.law.coefficients, start.floor2_px2
    if isinstance(start, _Solution):
        x[pose_at:term_at], x[n_shared:] = start.pose / POSE_STD, start.delta / tau_each
    x, converged = _levenberg_marquardt(cost, normal_equations, x)
    information = normal_equations(x)[0]
    covariance = np.asarray(np.linalg.pinv(information, hermitian=True), np.float64)
    return _Solution(
        pupil_m=float(np.exp(x[0])),
        law=FocusLaw(start.law.low, start.law.high, x[1:floor_at]),
        floor2_px2=float(x[floor_at]),
        pose=x[pose_at:term_at] * POSE_STD,
        delta=x[n_shared:] * tau_each,
        residual=misfit(x)[0],
        covariance=covariance[: 2 + n_law, : 2 + n_law],
        delta_variance=np.diag(covariance)[n_shared:] * tau_each**2,
        delta_variance_given_rest=tau_each**2 / np.diag(information)[n_shared:],
        term=float(x[term_at]) if term is not None else 0.0,
        term_std=float(np.sqrt(max(covariance[term_at, term_at], 0.0))) if term is not None else 0.0,
        converged=converged,
    )


def _levenberg_marquardt(
    cost: Callable[[FloatArray], float],
    normal_equations: Callable[[FloatArray], tuple[FloatArray, FloatArray]],
    x: FloatArray,
) -> tuple[FloatArray, bool]:
    """The minimum near `x`, and whether it was reached within MAX_STEPS."""
    damping, now = 1e-3, cost(x)
    for _ in range(MAX_STEPS):
        information, gradient = normal_equations(x)
        while True:
            damped = information + damping * np.diag(np.diag(information))
            step = np.linalg.solve(damped, -gradient)
            then = cost(x + step)
            if then <= now or damping > MAX_DAMPING:
                break
            damping *= 8.0
        if then <= now:
            x = x + step
        if not now - then > COST_TOLERANCE * now:
            return x, True
        damping, now = max(damping / 8.0, 1e-9), then
    return x, False


def _soften(z: FloatArray) -> FloatArray:
    """Residual whose square is the soft-L1 loss (scipy's, with its scale at 2 sigma)."""
    return np.sign(z) * np.sqrt(2.0 * 4.0 * (np.sqrt(1.0 + (z / 2.0) ** 2) - 1.0))


def _soften_slope(z: FloatArray) -> FloatArray:
    softened = np.abs(_soften(z))
    return np.where(softened > 1e-6, np.abs(z) / np.sqrt(1.0 + (z / 2.0) ** 2) / np.maximum(softened, 1e-6), 1.0)


def _fit_hierarchical(
    seen: Observations,
    start: _Start | Fit,
    degree: int,
    extra_std_px2: FloatArray | float = 0.0,
    *,
    diagnose: bool = False,
) -> Fit:
    """One fit with the motor's scatter estimated, and covariances that cover."""
    begin = _with_degree(
        start if isinstance(start, _Start) else _Start(start.pupil_m, start.law, start.floor2_px2), degree
    )
    index, groups = _groups(seen)
    solution, tau, law_std, out, clean = _scatter(seen, begin, index, len(groups), extra_std_px2)
    tau_each = np.where(out, WIDE_TAU_RATIO * _span(seen, begin), tau)
    n_law = degree + 1
    law_variance = np.diag(solution.covariance)[1 : 1 + n_law]
    n_told = float(np.sum(1.0 - law_variance / law_std**2))  # coefficients that the data determine
    factor = float(student_t.ppf(0.975, max(float(clean.sum()) - n_told - 1.0, 1.0))) / 1.959964
    covariance = solution.covariance * factor**2
    middle = np.concatenate([[0.0], solution.law.design(np.array([0.5 * (begin.law.low + begin.law.high)]))[0], [0.0]])
    middle_var = float(middle @ covariance @ middle)
    correlation = float(covariance[0] @ middle / np.sqrt(max(covariance[0, 0] * middle_var, 1e-30)))
    return Fit(
        pupil_m=solution.pupil_m,
        pupil_std_m=solution.pupil_m * float(np.sqrt(max(covariance[0, 0], 0.0))),
        law=solution.law,
        law_covariance=covariance[1 : 1 + n_law, 1 : 1 + n_law],
        law_std=law_std,
        floor2_px2=solution.floor2_px2,
        floor2_std_px2=float(np.sqrt(max(covariance[1 + n_law, 1 + n_law], 0.0))),
        tau_dpt=tau,
        frame_error_dpt={group: float(d) for group, d in zip(groups, solution.delta, strict=True)},
        outlier_frames=[group for group, bad in zip(groups, out, strict=True) if bad],
        residual=solution.residual,
        used=np.ones(len(seen), bool),
        converged=solution.converged,
        pupil_focus_correlation=correlation,
        pose_error=solution.pose,
        extra=_diagnose(seen, solution, tau_each, law_std, extra_std_px2, factor) if diagnose else {},
    )


class _Scatter(NamedTuple):
    solution: _Solution
    tau: float
    law_std: FloatArray  # expected size of the law's coefficients
    out: NDArray[np.bool_]  # (sweep, frame) groups whose focus is far from where the law has it
    clean: NDArray[np.bool_]  # groups that tell tau


def _scatter(
    seen: Observations,
    begin: _Start,
    index: NDArray[np.int64],
    n_groups: int,
    extra_std_px2: FloatArray | float,
) -> _Scatter:
    """The fit with the motor's scatter tau and the law's roughness, by expectation maximisation from wide priors."""
    span = _span(seen, begin)
    wide = WIDE_TAU_RATIO * span
    order = np.arange(len(begin.law.coefficients), dtype=np.float64)
    bent = order >= 2  # one line is as likely as another
    fall = np.where(bent, np.maximum(order, 1.0) ** -LAW_DECAY, np.inf)
    law_std = span * fall
    solution = _solve(
        seen, begin, tau=wide, law_std=law_std, index=index, n_groups=n_groups, extra_std_px2=extra_std_px2
    )
    # a frame near the minimum of the V does not tell its focus error: its delta keeps the prior's variance
    told = solution.delta_variance_given_rest < (0.3 * wide) ** 2
    tau = 1.4826 * float(np.median(np.abs(solution.delta[told]))) if told.sum() > 3 else 0.01 * span
    out = told & (np.abs(solution.delta) > OUTLIER_SIGMAS * max(tau, 1e-3 * span))
    clean = ~out & told
    for _ in range(TAU_ROUNDS):  # the variances hold what the other parameters leave open
        tau = max(tau, TAU_FLOOR * span)
        solution = _solve(
            seen,
            solution,
            tau=np.where(out, wide, tau),
            law_std=law_std,
            index=index,
            n_groups=n_groups,
            extra_std_px2=extra_std_px2,
        )
        tau = float(np.sqrt(np.mean(solution.delta[clean] ** 2 + solution.delta_variance[clean])))
        if bent.any():
            law_variance = np.diag(solution.covariance)[1 : 1 + len(order)]
            roughness2 = (solution.law.coefficients**2 + law_variance)[bent] / fall[bent] ** 2
            law_std = np.sqrt(np.mean(roughness2)) * fall
    return _Scatter(solution, max(tau, TAU_FLOOR * span), law_std, out, clean)


def _diagnose(
    seen: Observations,
    solution: _Solution,
    tau: FloatArray,
    law_std: FloatArray,
    extra_std_px2: FloatArray | float,
    factor: float,
) -> dict[str, tuple[float, float]]:
    """Value and standard error of terms that an ideal lens does not have, each fitted alone beside all the others.

    near_far: relative excess of the blur gain in front of focus; radial: of the gain in the image corner;
    curvature: focus shift in the corner (dpt); pupil_slope: relative change of the pupil per dioptre of focus.
    """
    focus = solution.law(seen.position)
    nothing = np.zeros(len(seen))
    terms = {
        "near_far": ((focus < seen.inverse_depth_dpt).astype(np.float64), nothing),
        "radial": (seen.radius2, nothing),
        "curvature": (nothing, seen.radius2),
        "pupil_slope": (focus - float(focus.mean()), nothing),
    }
    index, groups = _groups(seen)
    extra = {}
    for name, term in terms.items():
        fit = _solve(
            seen,
            solution,
            tau=tau,
            law_std=law_std,
            index=index,
            n_groups=len(groups),
            extra_std_px2=extra_std_px2,
            term=term,
        )
        extra[name] = (fit.term, fit.term_std * factor)
    return extra


class LeftOut(NamedTuple):
    """How well the other sweeps predict one that the fit did not see."""

    shift_dpt: float  # focus of the sweep against the prediction
    expected_dpt: float  # its standard error, from the other sweeps' fit and the motor's scatter
    blur_rms_px: float  # predicted against measured diameters

    @property
    def agrees(self) -> bool:
        """Whether the shift is within three standard errors."""
        return abs(self.shift_dpt) <= 3.0 * self.expected_dpt


def leave_one_out(seen: Observations, fit: Fit) -> list[LeftOut | None]:
    """For every sweep, the prediction of a fit to the other sweeps; None where those do not determine one.

    A frontal sweep alone does not (notes/calibration.md 1.2), so two frontal sweeps cannot be checked in this way.
    """
    out: list[LeftOut | None] = []
    degree = len(fit.law.coefficients) - 1
    for sweep in np.unique(seen.sweep):
        others, own = seen.take(seen.sweep != sweep), seen.take(seen.sweep == sweep)
        if not len(others):
            return [None]
        rest = _fit_hierarchical(others, fit, degree)
        if not rest.converged or not _tells_gain(rest, others):
            out.append(None)
            continue
        predicted = rest.signed_coc_px(own)
        blurred = np.abs(predicted) > SMALL_BLUR_PX
        if not blurred.any():
            out.append(None)
            continue
        own, predicted = own.take(blurred), predicted[blurred]
        measured = np.sign(predicted) * np.sqrt(np.maximum(own.coc2_px2 - rest.floor2_px2, 0.0))
        miss_px = measured - predicted
        frames, first = np.unique(own.frame, return_index=True)
        miss_dpt = miss_px / (rest.pupil_m * own.focal_px)
        by_frame = [float(np.median(miss_dpt[own.frame == frame])) for frame in frames]
        by_gain = rest.pupil_std_m / rest.pupil_m * float(np.mean(predicted / (rest.pupil_m * own.focal_px)))
        parts = (
            max(rest.tau_dpt, fit.tau_dpt) / np.sqrt(len(frames)),
            float(np.mean(rest.focus_std_dpt(own.position[first]))),
            POSE_STD * float(np.median(own.inverse_depth_dpt)),
            by_gain,
        )
        shift, expected = float(np.mean(by_frame)), float(np.linalg.norm(parts))
        out.append(LeftOut(shift, expected, float(np.sqrt(np.mean(miss_px**2)))))
    return out


def bootstrap_std(
    seen: Observations, fit: Fit, rounds: int = 50, seed: int = 0
) -> tuple[float, FloatArray, FloatArray]:
    """(std of A in m, positions, std of phi there in dpt) by drawing whole frames with replacement.

    Whole frames, because patches of one frame share the motor's error.
    """
    rng = np.random.default_rng(seed)
    index, groups = _groups(seen)
    positions = np.unique(seen.position)
    begin = _Start(fit.pupil_m, fit.law, fit.floor2_px2)
    pupils, laws = [], []
    for _ in range(rounds):
        weight = np.bincount(rng.integers(0, len(groups), len(groups)), minlength=len(groups))[index]
        solved = _solve(
            seen.take(weight > 0),
            begin,
            tau=fit.tau_dpt,
            law_std=fit.law_std,
            index=index[weight > 0],
            n_groups=len(groups),
            weight=weight[weight > 0].astype(np.float64),
        )
        pupils.append(solved.pupil_m)
        laws.append(solved.law(positions))
    return float(np.std(pupils)), positions, np.std(laws, axis=0)


def _check_bracketed(seen: Observations) -> None:
    """`NO_BRACKET` when no sweep focuses on the board between its ends."""
    one_sided = []
    for sweep in np.unique(seen.sweep):
        here = seen.sweep == sweep
        frames = np.unique(seen.frame[here])
        level = [np.median(seen.coc2_px2[here & (seen.frame == frame)]) for frame in frames]
        if int(np.argmin(level)) in (0, len(frames) - 1):
            one_sided.append(int(sweep))
    if len(one_sided) == len(np.unique(seen.sweep)):
        raise CalibrationError(
            "NO_BRACKET",
            "in every sweep the sharpest frame is the first or the last, so the blur is seen from one side of focus "
            "only; sweep past the board on both sides, or move it",
        )


def _tells_gain(fit: Fit, seen: Observations) -> bool:
    """Whether the boards span enough depth to tell a wide aperture from a far focus."""
    span = abs(float(np.ptp(fit.law(np.linspace(fit.law.low, fit.law.high, 200)))))
    deep = float(np.ptp(seen.inverse_depth_dpt)) >= MIN_DEPTH_SHARE * span
    return deep and not fit.pupil_std_m > MAX_PUPIL_RATIO * fit.pupil_m


def _check_result(fit: Fit, seen: Observations, names: Sequence[str]) -> None:
    """Refuse a fit that says nothing, in the words of notes/calibration.md 5.4."""
    span = abs(float(np.ptp(fit.law(np.linspace(fit.law.low, fit.law.high, 200)))))
    depths = float(np.ptp(seen.inverse_depth_dpt))
    if not _tells_gain(fit, seen):
        raise CalibrationError(
            "ONE_DISTANCE",
            f"the board was seen over {depths:.3f} dpt of a sweep of {span:.2f} dpt, which cannot tell a wide "
            f"aperture from a far focus (aperture {fit.pupil_m * 1e3:.1f} +- {1.96 * fit.pupil_std_m * 1e3:.1f} mm); "
            "add a sweep at another distance, or tilt the board by 45 to 60 degrees",
        )
    if not fit.converged or not np.isfinite(fit.pupil_std_m):
        raise CalibrationError(
            "NOT_CONVERGED",
            "the fit did not converge; check that every sweep shows the same board with the same lens setting",
        )
    slope = np.diff(fit.law(np.linspace(fit.law.low, fit.law.high, 400)))
    if not (np.all(slope > 0) or np.all(slope < 0)):
        raise CalibrationError(
            "NON_MONOTONE",
            "the fitted focus turns back within the sweep, so steps were lost or the positions are not in order; "
            "sweep again from one end stop in one direction",
        )
    positions = np.unique(seen.position)
    step = float(np.median(np.abs(np.diff(fit.law(positions))))) if len(positions) > 1 else span
    if fit.tau_dpt > max(0.5 * step, 0.02 if span > 0.2 else 0.1 * span) or len(fit.outlier_frames) > 0.3 * len(
        fit.frame_error_dpt
    ):
        worst = max(fit.frame_error_dpt, key=lambda group: abs(fit.frame_error_dpt[group]))
        raise CalibrationError(
            "REPEATABILITY",
            f"the same focus position meant different focus in different frames ({fit.tau_dpt:.3f} dpt, steps are "
            f"{step:.3f} dpt apart; worst is {names[worst[0]]}, frame {worst[1]}, off by "
            f"{fit.frame_error_dpt[worst]:+.3f} dpt), so steps were lost; home the motor and approach "
            "every position from the same side",
        )
