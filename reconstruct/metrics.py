"""Errors of depth, confidence and all-in-focus image against the truth (design section 9); numpy.

Every depth figure is over the pixels whose true depth is known. There an unknown answer (NaN) counts as infinitely
far, 0 dioptres, as in `protocols`: leaving it out would reward a method for giving up. Blur pixels, kappa x |dioptre
error|, compare lenses and scenes: they say by how much the predicted blur disc's diameter is wrong.
"""

from __future__ import annotations

from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.floating[Any]]

FARTHEST_DPT = 0.02  # an inverse depth below this counts as 50 m, so that one stray pixel cannot rule a mean in metres
EDGE_COC_PX = 2.0  # a depth step that changes the blur by more than this is a depth edge
EDGE_REACH_PX = 4  # pixels this close to a depth edge are scored apart
SSIM_SIGMA_PX, SSIM_TRUNCATE = 1.5, 3.5  # Wang et al. 2004

LABELS = {
    "abs_rel": "AbsRel",
    "rmse_m": "RMSE (m)",
    "delta1": "d < 1.25",
    "delta2": "d < 1.25^2",
    "delta3": "d < 1.25^3",
    "mae_dpt": "MAE (dpt)",
    "median_dpt": "median (dpt)",
    "mae_coc_px": "MAE (px of CoC)",
    "median_coc_px": "median (px of CoC)",
    "rmse_coc_px": "RMSE (px of CoC)",
    "edge_mae_coc_px": "MAE at depth edges (px of CoC)",
    "flat_mae_coc_px": "MAE away from edges (px of CoC)",
    "scaled_abs_rel": "AbsRel, median-scaled",
    "scaled_mae_dpt": "MAE (dpt), median-scaled",
    "ause": "AUSE",
    "coverage": "within 1 std",
    "kept70_cut": "MAE cut, best 70 %",
    "kept70_limit": "MAE cut, at most",
    "psnr_db": "AIF PSNR (dB)",
    "ssim": "AIF SSIM",
}
NOTE = (
    "On pixels with known true depth; an unknown answer counts as infinitely far, in metres as 50 m. px of CoC: blur "
    "gain x dioptre error, the error of the blur disc's diameter. AUSE: 0 when the stated spread ranks errors "
    "perfectly. MAE cut: how much the mean error falls when only the most confident 70 % of the pixels are kept; at "
    "most: if confidence knew the errors."
)


class Answer(Protocol):
    """What is scored: a `Reconstruction`, or anything else with these (H, W) maps and (S,) gains."""

    inverse_depth_dpt: NDArray[np.float32]
    std_dpt: NDArray[np.float32]
    confidence: NDArray[np.float32]
    kappa_px_per_dpt: NDArray[np.float64]


def depth_metrics(answer: Answer, truth_depth_m: FloatArray) -> dict[str, float]:
    """Every depth and confidence figure of `LABELS` for `answer`."""
    kappa = float(np.mean(answer.kappa_px_per_dpt))
    scores = depth_errors(answer.inverse_depth_dpt, truth_depth_m, kappa)
    return scores | confidence_errors(answer.inverse_depth_dpt, answer.std_dpt, answer.confidence, truth_depth_m)


def depth_errors(inverse_depth_dpt: FloatArray, truth_depth_m: FloatArray, kappa_px_per_dpt: float) -> dict[str, float]:
    """Depth figures of an inverse depth map (H, W) against metres (H, W), NaN or <= 0 where unknown."""
    known = known_pixels(truth_depth_m)
    truth = truth_depth_m[known].astype(np.float64)
    found = _found_dpt(inverse_depth_dpt, known)
    error_dpt = np.abs(found - 1 / truth)
    depth = 1 / np.maximum(found, FARTHEST_DPT)
    ratio = np.maximum(depth / truth, truth / depth)
    error_px = kappa_px_per_dpt * error_dpt
    edge = depth_edges(truth_depth_m, kappa_px_per_dpt)[known]
    scaled = depth * np.median(truth) / np.median(depth)
    return {
        "abs_rel": float(np.mean(np.abs(depth - truth) / truth)),
        "rmse_m": float(np.sqrt(np.mean((depth - truth) ** 2))),
        "delta1": float(np.mean(ratio < 1.25)),
        "delta2": float(np.mean(ratio < 1.25**2)),
        "delta3": float(np.mean(ratio < 1.25**3)),
        "mae_dpt": float(error_dpt.mean()),
        "median_dpt": float(np.median(error_dpt)),
        "mae_coc_px": float(error_px.mean()),
        "median_coc_px": float(np.median(error_px)),
        "rmse_coc_px": float(np.sqrt(np.mean(error_px**2))),
        "edge_mae_coc_px": float(error_px[edge].mean()) if edge.any() else float("nan"),
        "flat_mae_coc_px": float(error_px[~edge].mean()) if not edge.all() else float("nan"),
        "scaled_abs_rel": float(np.mean(np.abs(scaled - truth) / truth)),
        "scaled_mae_dpt": float(np.mean(np.abs(1 / scaled - 1 / truth))),
    }


def confidence_errors(
    inverse_depth_dpt: FloatArray, std_dpt: FloatArray, confidence: FloatArray, truth_depth_m: FloatArray
) -> dict[str, float]:
    """How well the stated spread and confidence, (H, W) each, foresee the real errors.

    ause: area between the curves of the MAE left when the least certain pixels are removed, ranked by `std_dpt` and
    by the true error, over the MAE of all pixels. coverage: share of errors within one `std_dpt`. kept70_cut: 1 -
    MAE of the most confident 70 % / MAE of all; kept70_limit: the same if confidence knew the errors.
    """
    known = known_pixels(truth_depth_m)
    error = np.abs(_found_dpt(inverse_depth_dpt, known) - 1 / truth_depth_m[known])
    std = np.asarray(std_dpt, np.float64)[known]
    kept = np.argsort(-np.asarray(confidence)[known], kind="stable")[: max(1, round(0.7 * error.size))]
    whole = max(float(error.mean()), 1e-12)
    counts = np.arange(1, error.size + 1)
    curve = np.cumsum(error[np.argsort(std, kind="stable")]) / counts
    ideal = np.cumsum(np.sort(error)) / counts
    return {
        "ause": float(np.mean(curve - ideal)) / whole,
        "coverage": float(np.mean(error <= std)),
        "kept70_cut": 1 - float(error[kept].mean()) / whole,
        "kept70_limit": 1 - float(ideal[len(kept) - 1]) / whole,
    }


def depth_edges(truth_depth_m: FloatArray, kappa_px_per_dpt: float) -> NDArray[np.bool_]:
    """Pixels (H, W) within `EDGE_REACH_PX` of a step in true depth that changes the blur by `EDGE_COC_PX`."""
    known = known_pixels(truth_depth_m)
    inverse = np.divide(1.0, truth_depth_m, out=np.zeros(truth_depth_m.shape), where=known).astype(np.float32)
    three = np.ones((3, 3), np.uint8)
    near = cv2.dilate(np.where(known, inverse, -1e6).astype(np.float32), three)
    far = cv2.erode(np.where(known, inverse, 1e6).astype(np.float32), three)
    step = np.where((near > -1e6) & (far < 1e6), near - far, 0)
    side = 2 * EDGE_REACH_PX + 1
    found = cv2.dilate((step * kappa_px_per_dpt > EDGE_COC_PX).astype(np.uint8), np.ones((side, side), np.uint8))
    return found.astype(bool)


def image_metrics(aif: FloatArray, truth_aif: FloatArray) -> dict[str, float]:
    """PSNR and SSIM of an all-in-focus image (H, W, 3) against the truth, both linear, 0 to 1."""
    return {"psnr_db": psnr(aif, truth_aif), "ssim": ssim(aif, truth_aif)}


def psnr(image: FloatArray, truth: FloatArray) -> float:
    """Peak signal-to-noise ratio in dB for a range of 1; inf where the images are equal."""
    error = float(np.mean((np.asarray(image, np.float64) - truth) ** 2))
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def ssim(image: FloatArray, truth: FloatArray) -> float:
    """Mean structural similarity of (H, W, 3) images with range 1 (Wang et al. 2004: Gaussian 1.5 px, K 0.01, 0.03).

    As in scikit-image with `gaussian_weights=True, use_sample_covariance=False`: the mean leaves out the border.
    """
    radius = int(SSIM_TRUNCATE * SSIM_SIGMA_PX + 0.5)

    def mean(x: FloatArray) -> FloatArray:
        return cv2.GaussianBlur(x, (2 * radius + 1, 2 * radius + 1), SSIM_SIGMA_PX, borderType=cv2.BORDER_REFLECT)

    x, y = np.asarray(image, np.float64), np.asarray(truth, np.float64)
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    similarity = (2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))
    return float(similarity[radius:-radius, radius:-radius].mean())


def known_pixels(truth_depth_m: FloatArray) -> NDArray[np.bool_]:
    """Where the true depth, metres, is known: neither NaN nor infinite nor <= 0."""
    return np.isfinite(truth_depth_m) & (truth_depth_m > 0)


def _found_dpt(inverse_depth_dpt: FloatArray, known: NDArray[np.bool_]) -> NDArray[np.float64]:
    found = np.asarray(inverse_depth_dpt, np.float64)[known]
    return np.where(np.isnan(found), 0.0, found)
