"""Metrics against closed forms and scikit-image."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from reconstruct import metrics

RNG = np.random.default_rng(0)
TRUTH_M = (1 + RNG.random((40, 50))).astype(np.float32)


def answer(inverse_depth, std=None, confidence=None, kappa=20.0):
    ones = np.ones_like(inverse_depth)
    std = ones if std is None else std
    return SimpleNamespace(
        inverse_depth_dpt=inverse_depth,
        std_dpt=std,
        confidence=-std if confidence is None else confidence,
        kappa_px_per_dpt=np.full(5, kappa),
    )


def test_psnr_and_ssim_agree_with_scikit_image():
    truth = RNG.random((48, 64, 3))
    image = np.clip(truth + 0.1 * RNG.standard_normal(truth.shape), 0, 1)
    assert metrics.psnr(image, truth) == pytest.approx(peak_signal_noise_ratio(truth, image, data_range=1), abs=1e-9)
    theirs = structural_similarity(
        truth, image, data_range=1, channel_axis=2, gaussian_weights=True, use_sample_covariance=False
    )
    assert metrics.ssim(image, truth) == pytest.approx(theirs, abs=1e-7)


def test_perfect_depth_scores_zero():
    scores = metrics.depth_metrics(answer(1 / TRUTH_M), TRUTH_M)
    assert scores["abs_rel"] == pytest.approx(0, abs=1e-6)
    assert scores["delta1"] == 1
    assert scores["mae_coc_px"] == pytest.approx(0, abs=1e-5)


def test_a_constant_dioptre_error_is_kappa_times_it_in_blur_pixels():
    scores = metrics.depth_errors(1 / TRUTH_M + 0.1, TRUTH_M, 20.0)
    assert scores["mae_dpt"] == pytest.approx(0.1, abs=1e-6)
    assert scores["mae_coc_px"] == pytest.approx(2.0, abs=1e-5)
    assert scores["median_coc_px"] == pytest.approx(2.0, abs=1e-5)


def test_median_scaling_removes_a_scale_error():
    scores = metrics.depth_errors(1 / (1.3 * TRUTH_M), TRUTH_M, 20.0)
    assert scores["abs_rel"] == pytest.approx(0.3, abs=1e-5)
    assert scores["scaled_abs_rel"] == pytest.approx(0, abs=1e-5)


def test_unknown_truth_is_left_out():
    holed = TRUTH_M.copy()
    holed[:5] = np.nan
    holed[5:9] = 0
    found = 1 / TRUTH_M
    found[:9] = 50
    assert metrics.depth_errors(found, holed, 20.0)["abs_rel"] == pytest.approx(0, abs=1e-6)


def test_ranking_by_the_true_error_is_ideal_and_the_reverse_is_not():
    error = RNG.random(TRUTH_M.shape)
    found = 1 / TRUTH_M + error
    ideal = metrics.depth_metrics(answer(found, std=error), TRUTH_M)
    worst = metrics.depth_metrics(answer(found, std=1 - error), TRUTH_M)
    assert ideal["ause"] == pytest.approx(0, abs=1e-6)
    assert ideal["kept70_cut"] == pytest.approx(0.3, abs=0.03)  # uniform errors: mean 0.35 instead of 0.5
    assert ideal["kept70_cut"] == pytest.approx(ideal["kept70_limit"]) == pytest.approx(worst["kept70_limit"])
    assert worst["ause"] > 0.5 and worst["kept70_cut"] < 0


def test_gaussian_errors_are_covered_to_68_percent():
    error = 0.05 * RNG.standard_normal(TRUTH_M.shape)
    scores = metrics.depth_metrics(answer(1 / TRUTH_M + error, std=np.full(TRUTH_M.shape, 0.05)), TRUTH_M)
    assert scores["coverage"] == pytest.approx(0.68, abs=0.03)


def test_depth_edges_are_found_only_at_the_step():
    depth = np.ones((30, 40), np.float32)
    depth[:, 20:] = 2
    edges = metrics.depth_edges(depth, 20.0)
    assert edges[:, 17:23].all()
    assert not edges[:, :14].any() and not edges[:, 26:].any()
    assert not metrics.depth_edges(depth, 1.0).any()  # half a dioptre is half a pixel of blur: no edge to this lens


def test_every_figure_has_a_label():
    scores = metrics.depth_metrics(answer(1 / TRUTH_M), TRUTH_M)
    scores |= metrics.image_metrics(np.zeros((40, 50, 3)), np.ones((40, 50, 3)))
    assert scores.keys() == metrics.LABELS.keys()
