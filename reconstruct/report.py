"""One HTML file that shows a reconstruction: no server, no network, works from a memory stick.

The page is `pages/report.html`; this file fills in its data. Refocusing and the 3-D view run in the browser
(WebGL) from the all-in-focus image and the depth, packed into one PNG: red and green hold the inverse depth
as 16 bits, blue its standard deviation (square-root coded).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from reconstruct import export
from reconstruct.result import Reconstruction, json_ready
from reconstruct.v_curves import misfit_px, v_curves

PAGE_WIDTH_PX = 1024
THUMBNAIL_PX = 320
CLOUD_POINTS = 120_000


@dataclass(frozen=True)
class Truth:
    """What the errors are measured against: depth (H, W) metres with NaN, and the error table's rows."""

    depth_m: NDArray[np.float32]
    columns: list[str]
    rows: list[list[str]]
    note: str


def format_length(metres: float) -> str:
    """Metres in the unit that a person would use."""
    if not np.isfinite(metres):
        return "unknown"
    if metres < 0.01:
        return f"{metres * 1e3:.2f} mm"
    if metres < 1:
        return f"{metres * 100:.1f} cm"
    return f"{metres:.2f} m"


def render_report(
    result: Reconstruction,
    thumbnails: Sequence[tuple[NDArray[np.uint8], str]],
    truth: Truth | None = None,
) -> str:
    """The report as HTML text.

    Args:
        result: what to show.
        thumbnails: (sRGB image, label) of each captured frame.
        truth: adds an error map and the table of errors when the true depth is known.
    """
    seen = _sampled(result)
    payload = {
        "title": result.name,
        "subtitle": _subtitle(result),
        "metric": result.metric,
        "assumed_lens": result.intrinsics.assumed,
        "warnings": list(result.record.get("warnings", [])),
        "facts": _facts(seen),
        "maps": [
            _map("All-in-focus image", result.aif_srgb8, "fused from all frames in linear light"),
            *_maps(seen, truth),
        ],
        "frames": [{"src": _jpeg(image), "label": label} for image, label in thumbnails],
        "errors": None if truth is None else {"columns": truth.columns, "rows": truth.rows, "note": truth.note},
        "curves": _curves(result, [image for image, _ in thumbnails]),
        "scene": _scene(result),
        "cloud": _cloud(result),
        "record": result.record,
    }
    # no "<" in it: "</script>" would end the script that it stands in, "<!--<script>" would swallow the page's own
    text = json.dumps(json_ready(payload), separators=(",", ":")).replace("<", "\\u003c")
    page = resources.files("reconstruct").joinpath("pages/report.html").read_text(encoding="utf-8")
    return page.replace("/*DATA*/", text)


def _sampled(result: Reconstruction) -> Reconstruction:
    """`result` at every n-th row and column, enough for the page and its figures, and far quicker to go through."""
    stride = max(1, result.confidence.shape[1] // PAGE_WIDTH_PX)
    part = (slice(None, None, stride), slice(None, None, stride))
    maps = {name: getattr(result, name)[part] for name in ("inverse_depth_dpt", "std_dpt", "confidence", "aif")}
    baseline = result.baseline
    if baseline is not None and baseline.confidence.shape == result.confidence.shape:
        baseline = _sampled(baseline)
    return replace(result, **maps, baseline=baseline)


def _subtitle(result: Reconstruction) -> str:
    height, width = result.confidence.shape
    kind = "metric depth" if result.metric else "relative depth (uncalibrated: ordered, no unit)"
    method = result.record.get("method", {}).get("name", "unknown method")
    return f"{len(result.focus_dpt)} frames of {width} x {height} px, {kind}, {method}"


def _facts(result: Reconstruction) -> list[tuple[str, str]]:
    near, far = result.near_far()
    known = np.isfinite(result.depth)
    facts: list[tuple[str, str]] = []
    if result.metric and known.any():
        facts += [("nearest (1 %)", format_length(near)), ("farthest (99 %)", format_length(far))]
        facts += [("median uncertainty", "± " + format_length(float(np.median(result.depth_std[known]))))]
    if result.baseline is not None and result.baseline.confidence.shape == result.confidence.shape:
        gap = np.abs(result.inverse_depth_dpt - result.baseline.inverse_depth_dpt) * float(
            result.kappa_px_per_dpt.mean()
        )
        facts.append(("median difference to the plane sweep", f"{float(np.median(gap)):.2f} px of blur"))
    facts += [
        ("confident (above 0.5)", f"{100 * float((result.confidence > 0.5).mean()):.0f} %"),
        ("depth known", f"{100 * float(known.mean()):.0f} %"),
    ]
    for label, key, unit in (("alignment residual", "alignment_residual_px", "px"), ("time", "seconds", "s")):
        value = result.record.get("summary", {}).get(key)
        if value is not None:
            facts.append((label, f"{value:.2g} {unit}" if unit == "px" else f"{value:.1f} {unit}"))
    return facts


def _maps(result: Reconstruction, truth: Truth | None) -> list[dict[str, Any]]:
    colour, low, high = export.colorize_inverse_depth(result.inverse_depth_dpt)
    ticks = np.linspace(high, low, 5)
    if result.metric:
        labels = [format_length(1 / q) if q > 1e-3 else "far" for q in ticks]
    else:
        labels = ["near", "", "", "", "far"]
    maps = [
        _map("Depth", colour, "evenly spread over dioptres", _bar(reverse=True), labels),
        _map(
            "Confidence",
            export.colorize(result.confidence, 0, 1),
            "how sure the depth is, 0 to 1",
            _bar(),
            ["0", "0.25", "0.5", "0.75", "1"],
        ),
    ]
    std = result.depth_std
    top = float(np.nanpercentile(std, 95)) if np.isfinite(std).any() else 1.0
    spread_labels = [format_length(v) if result.metric else f"{v:.2f}" for v in np.linspace(0, top, 3)]
    maps.append(_map("Uncertainty", export.colorize(std, 0, top), "one standard deviation", _bar(), spread_labels))
    if result.baseline is not None:
        beside = export.colorize(result.baseline.inverse_depth_dpt, low, high)
        maps.append(_map("Depth, plane sweep", beside, "without training, same colours", _bar(reverse=True), labels))
    if truth is not None:
        stride = max(1, truth.depth_m.shape[1] // PAGE_WIDTH_PX)
        true_m = truth.depth_m[::stride, ::stride]
        true_colour = export.colorize(1 / true_m, low, high)
        maps.append(_map("True depth", true_colour, "same colours as Depth", _bar(reverse=True), labels))
        error = np.abs(result.depth - true_m) / true_m
        maps.append(
            _map("Error", export.colorize(error, 0, 0.1), "|depth - truth| / truth", _bar(), ["0", "5 %", "over 10 %"])
        )
    return maps


def _map(
    name: str,
    image: NDArray[np.uint8],
    note: str,
    colors: list[str] | None = None,
    ticks: list[str] | None = None,
) -> dict[str, Any]:
    entry: dict[str, Any] = {"name": name, "note": note, "src": _jpeg(_fit(image, 800), quality=90)}
    if colors is not None:
        entry["bar"] = {"colors": colors, "ticks": ticks or []}
    return entry


def _bar(*, reverse: bool = False) -> list[str]:
    lut = export.colorize(np.linspace(1 if reverse else 0, 0 if reverse else 1, 17)[None], 0, 1)[0]
    return [f"rgb({r},{g},{b})" for r, g, b in lut]


def _scene(result: Reconstruction) -> dict[str, Any]:
    """What the refocus shader needs, at most PAGE_WIDTH_PX wide."""
    aif = _fit(result.aif_srgb8, PAGE_WIDTH_PX)
    height, width = aif.shape[:2]
    scale = width / result.aif.shape[1]
    q = cv2.resize(result.inverse_depth_dpt, (width, height), interpolation=cv2.INTER_NEAREST)
    finite = np.isfinite(q)
    q[~finite] = np.median(q[finite]) if finite.any() else 0.0
    std = np.nan_to_num(cv2.resize(result.std_dpt, (width, height), interpolation=cv2.INTER_NEAREST))
    low, high = (float(v) for v in np.percentile(q, [0.2, 99.8]))
    high = max(high, low + 1e-6)
    std_scale = max(float(std.max()), 1e-9)
    level = np.rint(np.clip((q - low) / (high - low), 0, 1) * 65535).astype(np.uint16)
    packed = np.stack([level >> 8, level & 255, np.rint(np.sqrt(std / std_scale) * 255)], axis=-1).astype(np.uint8)
    return {
        "aif": _jpeg(aif, quality=92),
        "packed": _png(packed),
        "q_low": low,
        "q_high": high,
        "std_scale": std_scale,
        "kappa": float(np.median(result.kappa_px_per_dpt)) * scale,
        "focus_near": float(result.focus_dpt.max()),
        "focus_far": float(result.focus_dpt.min()),
        "focal": result.intrinsics.focal_px * scale,
        "centre_x": result.intrinsics.centre_x_px * scale,
        "centre_y": result.intrinsics.centre_y_px * scale,
    }


def _cloud(result: Reconstruction) -> dict[str, Any]:
    """Centred points in a unit box as 16-bit integers, thinned to CLOUD_POINTS."""
    depth = result.depth if result.metric else 1 + np.clip(result.depth, 0, 1)
    stride = max(1, int(np.ceil(np.sqrt(depth.size / CLOUD_POINTS))))
    xyz = export.back_project(depth.astype(np.float32, copy=False), result.intrinsics, stride)
    rgb = result.aif_srgb8[::stride, ::stride]
    sure = result.confidence[::stride, ::stride]
    known = np.isfinite(xyz).all(axis=-1)
    if not known.any():
        return {"xyz": "", "rgb": "", "confidence": "", "point": 0.01, "depth": 1.0, "zoom": 2.0}
    low, high = np.percentile(xyz[known], [1, 99], axis=0)
    extent = float((high - low).max())
    middle = np.array([0.0, 0.0, (low[2] + high[2]) / 2])  # on the optical axis, so that the first view is the camera's
    centred = (xyz[known] - middle) / max(extent, 1e-9)
    keep = (np.abs(centred) < 1).all(axis=-1)
    quantised = np.rint(centred[keep] * 32767).astype("<i2")
    return {
        "xyz": _base64(quantised.tobytes()),
        "rgb": _base64(rgb[known][keep].tobytes()),
        "confidence": _base64(np.rint(sure[known][keep] * 255).astype(np.uint8).tobytes()),
        "point": 1.4 * stride / result.intrinsics.focal_px,
        "depth": float(middle[2]) / max(extent, 1e-9),
        "zoom": 2 * result.intrinsics.focal_px / max(depth.shape[0], depth.shape[1] * 640 / 1200),
    }


def _curves(result: Reconstruction, frames: Sequence[NDArray[np.uint8]]) -> dict[str, Any] | None:
    """V-curves, where the optics are known beforehand and the frames did not have to tell them; else None."""
    source = result.record["optics"].get("source")
    if not result.metric or not frames or source not in ("profile", "thin lens"):
        return None
    curves = v_curves(result, frames)
    gap_px = misfit_px(result, curves)
    if not np.isfinite(gap_px):
        return None
    by = "the calibrated lens profile" if source == "profile" else "the lens's nominal numbers (not calibrated)"
    return {
        "note": f"lines: predicted by {by}; points: measured in the frames; median distance {gap_px:.1f} px. "
        "Points that lie beside their line as a whole mean that the calibration does not fit this lens.",
        "curves": [
            {
                "label": format_length(1 / curve.inverse_depth_dpt),
                "line": np.stack([curve.focus_dpt, curve.predicted_px], axis=1).round(4),
                "points": [
                    [focus, px]
                    for focus, px in zip(result.focus_dpt, curve.measured_px, strict=True)
                    if np.isfinite(px)
                ],
            }
            for curve in curves
        ],
    }


def _fit(image: NDArray[np.uint8], width_px: int) -> NDArray[np.uint8]:
    height, width = image.shape[:2]
    if width <= width_px:
        return image
    return cv2.resize(image, (width_px, max(1, round(height * width_px / width))), interpolation=cv2.INTER_AREA)


def _jpeg(image: NDArray[np.uint8], quality: int = 85) -> str:
    encoded = cv2.imencode(".jpg", image[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])[1]
    return "data:image/jpeg;base64," + _base64(encoded.tobytes())


def _png(image: NDArray[np.uint8]) -> str:
    return "data:image/png;base64," + _base64(cv2.imencode(".png", image[..., ::-1])[1].tobytes())


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")
