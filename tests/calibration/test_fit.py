"""The fit on measurements with known truth: values, intervals, invariances, refusals."""

import dataclasses

import numpy as np
import pytest

from calibration.edges import CalibrationError
from calibration.fit import bootstrap_std, fit_blur, leave_one_out
from tests.calibration.measurements import Truth

STEPS = np.linspace(0, 1000, 11)
THREE = [(0.7, 0.01), (1.0, 0.01), (1.6, 0.01)]
TILTED = [(0.95, 0.15)]


def focus_rms(fit, truth, steps=STEPS):
    return float(np.sqrt(np.mean((fit.law(steps) - truth.focus_dpt(steps)) ** 2))) / (truth.near_dpt - truth.far_dpt)


@pytest.mark.parametrize("boards", [THREE, TILTED, THREE[::2]], ids=["three", "tilted", "two"])
@pytest.mark.parametrize("truth", [Truth(), Truth(breathing=-0.06, cubic=0.3, noise=0.02)], ids=["plain", "hard"])
def test_aperture_and_focus_map_are_recovered(boards, truth):
    fit = fit_blur(truth.observe(boards, STEPS, seed=1))
    assert fit.pupil_m == pytest.approx(truth.pupil_m, rel=0.01)
    assert focus_rms(fit, truth) < 0.0025
    assert fit.floor2_px2 == pytest.approx(truth.floor_px**2, abs=0.3)


def test_intervals_cover_the_truth_and_are_not_idle():
    hits, widths = [], []
    for seed in range(8):
        truth = Truth(jitter_dpt=0.004)
        fit = fit_blur(truth.observe(THREE, STEPS, seed))
        hits.append(abs(fit.pupil_m - truth.pupil_m) < 1.96 * fit.pupil_std_m)
        hits.extend(np.abs(fit.law(STEPS) - truth.focus_dpt(STEPS)) < 1.96 * fit.focus_std_dpt(STEPS))
        widths.append(fit.pupil_std_m / truth.pupil_m)
    assert 0.9 <= np.mean(hits) <= 1.0
    assert np.median(widths) < 0.006


@pytest.mark.parametrize("jitter_dpt", [0.0, 0.003])
def test_a_motor_that_no_polynomial_follows_is_followed(jitter_dpt):
    """What a polynomial leaves is the same on all boards; taken for scatter, six of them cover 47 and 83 %."""
    six = [(1 / dpt, 0.01) for dpt in np.linspace(0.8, 1.4, 6)]
    truth = Truth(wave=0.08, jitter_dpt=jitter_dpt)
    hits, errors = [], []
    for seed in range(6):
        fit = fit_blur(truth.observe(six, STEPS, seed))
        hits.append(np.abs(fit.law(STEPS) - truth.focus_dpt(STEPS)) < 1.96 * fit.focus_std_dpt(STEPS))
        errors.append(focus_rms(fit, truth))
    assert np.mean(hits) >= 0.9
    assert np.median(errors) < 0.0012


@pytest.mark.parametrize("jitter_dpt", [0.005, 0.015])
def test_the_motors_scatter_is_told(jitter_dpt):
    truth = Truth(jitter_dpt=jitter_dpt)
    found = [
        fit_blur(truth.observe([(0.7, 0.01), (0.9, 0.01), (1.2, 0.01), (1.8, 0.01)], STEPS, s)).tau_dpt
        for s in range(2)
    ]
    assert np.median(found) == pytest.approx(jitter_dpt, rel=0.3)


def test_the_bootstrap_agrees_with_the_covariance():
    seen = Truth(jitter_dpt=0.005).observe(THREE, STEPS, seed=3)
    fit = fit_blur(seen)
    pupil_std, positions, focus_std = bootstrap_std(seen, fit, rounds=25)
    assert 0.4 < pupil_std / fit.pupil_std_m < 2.0
    assert 0.4 < np.median(focus_std / fit.focus_std_dpt(positions)) < 2.0


def test_reversing_the_motor_gives_the_same_dioptres():
    seen = Truth().observe(THREE, STEPS, seed=2)
    forward = fit_blur(seen)
    backward = fit_blur(dataclasses.replace(seen, position=1000.0 - seen.position))
    assert backward.pupil_m == pytest.approx(forward.pupil_m, rel=1e-4)
    np.testing.assert_allclose(backward.law(1000.0 - STEPS), forward.law(STEPS), atol=1e-4)


def test_twice_the_distances_halve_the_dioptres_and_double_the_aperture():
    seen = Truth().observe(THREE, STEPS, seed=2)
    near, far = fit_blur(seen), fit_blur(dataclasses.replace(seen, inverse_depth_dpt=seen.inverse_depth_dpt / 2))
    np.testing.assert_allclose(far.law(STEPS), near.law(STEPS) / 2, rtol=2e-3)
    assert far.pupil_m == pytest.approx(2 * near.pupil_m, rel=2e-3)


def test_the_order_of_observations_does_not_matter():
    seen = Truth().observe(THREE, STEPS, seed=2)
    mixed = seen.take(np.random.default_rng(0).permutation(len(seen)))
    assert fit_blur(mixed).pupil_m == pytest.approx(fit_blur(seen).pupil_m, rel=1e-5)


def test_a_frame_with_a_wrong_focus_is_named_and_costs_little():
    truth = Truth()
    seen = truth.observe(THREE, STEPS, seed=5)
    wrong = (seen.sweep == 1) & (seen.frame == 2)
    shifted = truth.pupil_m * seen.focal_px * (truth.focus_dpt(seen.position) + 0.08 - seen.inverse_depth_dpt)
    fit = fit_blur(dataclasses.replace(seen, coc2_px2=np.where(wrong, shifted**2 + 2.25, seen.coc2_px2)))
    assert fit.outlier_frames == [(1, 2)]
    assert fit.frame_error_dpt[1, 2] == pytest.approx(0.08, abs=0.01)
    assert fit.pupil_m == pytest.approx(truth.pupil_m, rel=0.01)


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("near_far", lambda seen, c: c * np.where(c < 0, 1.10, 1.0), 0.10),
        ("radial", lambda seen, c: c * (1.0 - 0.15 * seen.radius2), -0.15),
        ("curvature", lambda seen, c: c + 0.0179 * seen.focal_px * 0.05 * seen.radius2, 0.05),
    ],
)
def test_what_an_ideal_lens_has_not_is_diagnosed(name, change, expected):
    truth = Truth()
    seen = truth.observe(THREE, STEPS, seed=6)
    signed = truth.pupil_m * seen.focal_px * (truth.focus_dpt(seen.position) - seen.inverse_depth_dpt)
    changed = dataclasses.replace(seen, coc2_px2=seen.coc2_px2 - signed**2 + change(seen, signed) ** 2)
    value, std = fit_blur(changed).extra[name]
    assert value == pytest.approx(expected, rel=0.4)
    assert abs(value) > 4 * std
    plain, plain_std = fit_blur(seen).extra[name]
    assert abs(plain) < max(4 * plain_std, 0.01)


def test_a_sweep_is_predicted_by_the_others_unless_they_are_one_frontal_board():
    seen = Truth().observe(THREE, STEPS, seed=4)
    for left in leave_one_out(seen, fit_blur(seen)):
        assert left.agrees
        assert abs(left.shift_dpt) < 0.005
    two = seen.take(seen.sweep < 2)
    assert leave_one_out(two, fit_blur(two)) == [None, None]


def test_a_sweep_that_does_not_fit_the_others_is_told():
    truth = Truth()
    seen = truth.observe([*THREE, (1.25, 0.01)], STEPS, seed=4)
    off = np.where(seen.sweep == 2, 0.02, 0.0)  # the lens was turned between the sweeps
    signed = truth.pupil_m * seen.focal_px * (truth.focus_dpt(seen.position) + off - seen.inverse_depth_dpt)
    seen = dataclasses.replace(seen, coc2_px2=signed**2 + truth.floor_px**2)
    left = leave_one_out(seen, fit_blur(seen))
    assert not left[2].agrees
    assert left[2].shift_dpt == pytest.approx(0.02, rel=0.3)


def test_a_fit_that_does_not_converge_is_refused(monkeypatch):
    seen = Truth().observe(THREE, STEPS, seed=0)
    monkeypatch.setattr("calibration.fit.MAX_STEPS", 0)
    with pytest.raises(CalibrationError, match=r"check that every sweep shows the same board.*\[NOT_CONVERGED\]"):
        fit_blur(seen)


def lost_steps(truth, seen):
    """Measurements of a motor that lost 150 steps in the middle of every sweep but the first."""
    position = np.where((seen.frame > 4) & (seen.sweep > 0), seen.position - 150.0 * seen.sweep, seen.position)
    signed = truth.pupil_m * seen.focal_px * (truth.focus_dpt(position) - seen.inverse_depth_dpt)
    return dataclasses.replace(seen, coc2_px2=signed**2 + truth.floor_px**2)


@pytest.mark.parametrize(
    ("code", "make"),
    [
        ("ONE_DISTANCE", lambda: Truth().observe([(1.0, 0.005)], STEPS, 0)),
        ("NO_BRACKET", lambda: Truth().observe([(0.45, 0.01), (0.5, 0.01)], STEPS, 0)),
        ("REPEATABILITY", lambda: lost_steps(Truth(), Truth().observe(THREE, STEPS, 0))),
        (
            "NON_MONOTONE",
            lambda: Truth(bend=1.9, far_dpt=0.9).observe([(0.9, 0.01), (1.15, 0.2), (1.3, 0.1)], STEPS, 0),
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused_with_what_to_do(code, make):
    with pytest.raises(CalibrationError, match=r"; .*\[" + code + r"\]") as caught:
        fit_blur(make())
    assert caught.value.code == code
    assert caught.value.exit_code == 6


def test_the_sweep_that_lost_steps_is_named():
    seen = lost_steps(Truth(), Truth().observe(THREE, STEPS, 0))
    with pytest.raises(
        CalibrationError, match=r"worst is (near|middle|far)\.h5, frame \d+, off by .* so steps were lost"
    ):
        fit_blur(seen, names=["near.h5", "middle.h5", "far.h5"])
