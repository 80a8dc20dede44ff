"""`report.html` beside lens.yaml: one file, no network, that lets a person judge a calibration."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from calibration.calibrate import Calibration
from calibration.fit import LeftOut

WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 300, 58, 42, 12, 22
COLORS = ("#0b6e99", "#c2410c", "#15803d", "#7e22ce", "#a16207", "#be185d", "#334155", "#0f766e")

FloatArray = NDArray[np.float64]


class Series(NamedTuple):
    """Points or a line of one plot."""

    x: FloatArray
    y: FloatArray
    label: str = ""
    line: bool = False
    color: int = 0
    error: FloatArray | None = None  # half-width of a band (line) or of error bars (points)


def write_report(calibration: Calibration, path: Path) -> None:
    """Write the report of `calibration` to `path`, whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(report_html(calibration), encoding="utf-8")
    partial.replace(path)


def report_html(calibration: Calibration) -> str:
    """The report as one HTML page."""
    profile, fit = calibration.profile, calibration.fit
    verdict, color = verdict_of(calibration)
    rows = [
        (
            "entrance pupil",
            f"{profile.pupil_diameter_m.value * 1e3:.3f} mm",
            f"{profile.pupil_diameter_m.std * 1e3:.3f}",
        ),
        (
            "focal length",
            f"{profile.intrinsics.focal_length_px.value:.1f} px",
            f"{profile.intrinsics.focal_length_px.std:.1f}",
        ),
        (
            "blur gain at mid focus",
            f"{_mid_gain(calibration):.2f} px/dpt",
            f"{_mid_gain(calibration) * _gain_ratio(calibration):.2f}",
        ),
        ("blur floor (sigma)", f"{profile.floor_sigma_px.value:.2f} px", f"{profile.floor_sigma_px.std:.2f}"),
        ("motor repeatability", f"{fit.tau_dpt:.4f} dpt", ""),
        ("distance scale, common", "", f"{100 * profile.distance_scale_std:.2f} %"),
        (
            "breathing over the sweep",
            f"{100 * (max(profile.breathing.scale) / min(profile.breathing.scale) - 1):.2f} %",
            f"{100 * max(profile.breathing.scale_std):.3f} %",
        ),
    ]
    for name, label in (
        ("near_far", "gain near / far - 1"),
        ("radial", "gain corner / centre - 1"),
        ("pupil_slope", "pupil change per dpt"),
    ):
        value, std = fit.extra[name]
        rows.append((label, f"{100 * value:+.2f} %", f"{100 * std:.2f}"))
    rows.append(
        ("field curvature, corner", f"{fit.extra['curvature'][0]:+.4f} dpt", f"{fit.extra['curvature'][1]:.4f}")
    )
    table = "".join(f"<tr><td>{a}</td><td class=n>{b}</td><td class=n>{c}</td></tr>" for a, b, c in rows)
    sources = "".join(
        f"<tr><td>{html.escape(s.file)}</td><td class=n>{s.n_frames}</td><td class=n>{s.distance_m:.3f} m</td>"
        f"<td class=n>{s.tilt_deg:.0f}&deg;</td><td class=n>{_left_out(left)}</td>"
        f"<td><code>{s.sha256[:12]}</code></td></tr>"
        for s, left in zip(profile.sources, calibration.left_out, strict=True)
    )
    notes = "".join(f"<li>{html.escape(text)}</li>" for text in [*calibration.sentences, *profile.warnings])
    figures = "".join(
        f"<figure>{plot}<figcaption>{html.escape(caption)}</figcaption></figure>"
        for plot, caption in _figures(calibration)
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Lens calibration</title><style>
body{{font:15px/1.5 system-ui,sans-serif;color:#1e293b;max-width:1020px;margin:2rem auto;padding:0 1rem}}
h1{{font-size:1.5rem;margin:0 0 .5rem}} h2{{font-size:1.1rem;margin:2rem 0 .5rem}}
.verdict{{border-left:6px solid {color};background:#f8fafc;padding:.7rem 1rem;font-size:1.05rem}}
.grid{{display:flex;flex-wrap:wrap;gap:1rem}} figure{{margin:0;width:480px;max-width:100%}}
figcaption{{font-size:.85rem;color:#475569;padding:0 .5rem}} svg{{width:100%;height:auto}}
table{{border-collapse:collapse}} td,th{{padding:.15rem .8rem .15rem 0;text-align:left;border-bottom:1px solid #e2e8f0}}
.n{{text-align:right;font-variant-numeric:tabular-nums}}
</style></head><body>
<h1>Lens calibration{": " + html.escape(profile.camera) if profile.camera else ""}</h1>
<p class="verdict">{html.escape(verdict)}</p>
<ul>{notes}</ul>
<h2>Measured</h2><table><tr><th></th><th class=n>value</th><th class=n>std. error</th></tr>{table}</table>
<h2>Sweeps</h2><table><tr><th>file</th><th>frames</th><th>distance</th><th>tilt</th>
<th>focus against what the other sweeps predict</th><th>sha256</th></tr>{sources}</table>
<h2>Evidence</h2><div class="grid">{figures}</div>
<p>{html.escape(profile.software)}, {
        html.escape(profile.created)
    }. Distances count from the entrance pupil; blur is the diameter
of a uniform disc, in pixels of the {profile.width_px} x {profile.height_px} image{
        f" (measured on it binned by {calibration.bins}; the plots show binned pixels)" if calibration.bins > 1 else ""
    }.</p>
</body></html>
"""


def _left_out(left: LeftOut | None) -> str:
    if left is None:
        return "cannot be told"
    return f"{left.shift_dpt:+.4f} &plusmn; {1.96 * left.expected_dpt:.4f} dpt, {left.blur_rms_px:.2f} px"


def verdict_of(calibration: Calibration) -> tuple[str, str]:
    """One sentence on how far to trust the profile, and its colour."""
    profile = calibration.profile
    span = float(np.ptp(profile.focus.focus_dpt))
    focus = float(np.median(profile.focus.std_dpt)) / span
    gain = profile.pupil_diameter_m.std / profile.pupil_diameter_m.value
    codes = [warning.partition(":")[0] for warning in profile.warnings]
    serious = [code for code in codes if code not in ("SCALE_UNCHECKED", "OUTLIER") and code.isupper()]
    numbers = (
        f"blur gain within {196 * gain:.2f} %, focus positions within {196 * focus:.2f} % of the range, distances "
        "within "
        f"{196 * profile.distance_scale_std:.1f} % overall (95 %)"
    )
    if serious:
        return f"Use with care ({', '.join(serious)}): {numbers}.", "#c2410c"
    if gain > 0.01 or focus > 0.005:
        return f"Usable, not precise: {numbers}. More distances would help.", "#a16207"
    return f"Trustworthy: {numbers}.", "#15803d"


def _mid_gain(calibration: Calibration) -> float:
    profile = calibration.profile
    return float(profile.optics(0.5 * sum(profile.position_range)).kappa_px_per_dpt[0])


def _gain_ratio(calibration: Calibration) -> float:
    return calibration.profile.pupil_diameter_m.std / calibration.profile.pupil_diameter_m.value


def _figures(calibration: Calibration) -> list[tuple[str, str]]:
    seen, fit, curve = calibration.seen, calibration.fit, calibration.curve
    measured = np.sqrt(np.maximum(seen.coc2_px2, 0.0))
    predicted = fit.signed_coc_px(seen)
    dense = np.linspace(fit.law.low, fit.law.high, 200)
    names = [stack.sweep.name for stack in calibration.stacks]
    v_curves, depths = [], []
    for k, name in enumerate(names):
        here = seen.sweep == k
        middle = float(np.median(seen.inverse_depth_dpt[here]))
        near = here & (
            np.abs(seen.inverse_depth_dpt - middle) <= np.quantile(np.abs(seen.inverse_depth_dpt[here] - middle), 0.4)
        )
        v_curves.append(Series(seen.position[near], measured[near], name, color=k))
        gain = fit.pupil_m * np.interp(dense, *_sorted(seen.position[here], seen.focal_px[here]))
        v_curves.append(Series(dense, np.abs(gain * (fit.law(dense) - middle)), line=True, color=k))
        depths.append(Series(np.sqrt(seen.radius2[here]), seen.inverse_depth_dpt[here], name, color=k))
    frames = sorted(fit.frame_error_dpt)
    frame_position = np.array([calibration.stacks[k].sweep.positions[i] for k, i in frames])
    frame_error = np.array([fit.frame_error_dpt[frame] for frame in frames])
    frame_sweep = np.array([k for k, _ in frames])
    residual = measured - np.abs(predicted)
    ends = np.array([predicted.min(), predicted.max()])
    blunt = np.abs(predicted) > 3.0
    band = 1.96 * fit.focus_std_dpt(dense)
    scale = [
        Series(
            np.array([stack.sweep.positions[i] for i in range(len(stack.sweep.positions))]),
            np.asarray(curve.scale(stack.sweep.positions)),
            stack.sweep.name,
            color=k,
        )
        for k, stack in enumerate(calibration.stacks)
    ]
    scale.append(Series(dense, curve.scale(dense), line=True, color=6, error=1.96 * curve.scale_std(dense)))
    return [
        (
            plot(v_curves, "focus position", "blur diameter, px"),
            "V-curves: blur of the patches at each sweep's median depth (points) and the fit (lines).",
        ),
        (
            plot(
                [
                    Series(predicted, np.sign(predicted) * measured, "patches", color=0),
                    Series(ends, ends, "fit", line=True, color=1),
                ],
                "predicted blur, px (positive: behind focus)",
                "measured blur, px",
            ),
            "Both sides of focus must lie on one straight line; a kink at zero is aberration.",
        ),
        (
            plot(
                [
                    Series(dense, fit.law(dense), "fit, 95 % band", line=True, color=0, error=band),
                    Series(frame_position, fit.law(frame_position) + frame_error, "frames", color=1),
                ],
                "focus position",
                "focus, dpt",
            ),
            "Focus map: what each position of the motor means.",
        ),
        (
            plot(
                [
                    *[
                        Series(frame_position[frame_sweep == k], frame_error[frame_sweep == k], n, color=k)
                        for k, n in enumerate(names)
                    ],
                    Series(dense, 0.0 * dense, line=True, color=6, error=band),
                ],
                "focus position",
                "focus error of the frame, dpt",
            ),
            "Residuals of the focus map, one point per frame; the band is the map's own 95 % interval.",
        ),
        (
            plot(scale, "focus position", "image scale"),
            "Breathing: image scale against focus, 1 at the reference position.",
        ),
        (
            plot(depths, "distance from image centre (1: corner)", "inverse depth, dpt"),
            "Where the data lies: patches over sensor and depth. The profile is an extrapolation elsewhere.",
        ),
        (
            plot(
                [Series(np.sqrt(seen.radius2[blunt]), residual[blunt], "patches", color=0)],
                "distance from image centre (1: corner)",
                "blur residual, px",
            ),
            "Residuals over the sensor: a slope is field curvature or vignetting.",
        ),
        (
            plot([Series(np.abs(predicted), residual, "patches", color=0)], "predicted blur, px", "blur residual, px"),
            "Residuals over blur: a trend at large blur means a wrong gain, at small blur a wrong floor.",
        ),
    ]


def _sorted(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    order = np.argsort(x)
    return x[order], y[order]


def plot(series: Sequence[Series], x_label: str, y_label: str) -> str:
    """One SVG line-and-scatter plot."""
    x_all = np.concatenate([s.x for s in series])
    y_all = np.concatenate([s.y if s.error is None else np.concatenate([s.y - s.error, s.y + s.error]) for s in series])
    x_ticks, y_ticks = _ticks(float(x_all.min()), float(x_all.max())), _ticks(float(y_all.min()), float(y_all.max()))
    x_low, x_high = min(float(x_all.min()), x_ticks[0]), max(float(x_all.max()), x_ticks[-1])
    y_low, y_high = min(float(y_all.min()), y_ticks[0]), max(float(y_all.max()), y_ticks[-1])

    def px(x: FloatArray | float) -> FloatArray:
        return LEFT + (np.asarray(x) - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)

    def py(y: FloatArray | float) -> FloatArray:
        return HEIGHT - BOTTOM - (np.asarray(y) - y_low) / (y_high - y_low) * (HEIGHT - BOTTOM - TOP)

    parts = []
    for tick in x_ticks:
        parts.append(f'<path d="M{px(tick):.1f} {TOP}V{HEIGHT - BOTTOM}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{px(tick):.1f}" y="{HEIGHT - BOTTOM + 15}" text-anchor="middle">{tick:g}</text>')
    for tick in y_ticks:
        parts.append(f'<path d="M{LEFT} {py(tick):.1f}H{WIDTH - RIGHT}" stroke="#e2e8f0"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{py(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for s in series:
        color = COLORS[s.color % len(COLORS)]
        xs, ys = px(s.x), py(s.y)
        if s.line and s.error is not None:
            outline = [*zip(xs, py(s.y + s.error), strict=True), *reversed([*zip(xs, py(s.y - s.error), strict=True)])]
            parts.append(
                f'<path d="M{"L".join(f"{x:.1f} {y:.1f}" for x, y in outline)}Z" fill="{color}" opacity=".18"/>'
            )
        if s.line:
            points = "L".join(f"{x:.1f} {y:.1f}" for x, y in zip(xs, ys, strict=True))
            parts.append(f'<path d="M{points}" fill="none" stroke="{color}" stroke-width="1.5"/>')
        else:
            # a zero-length round stroke per point: one path for thousands of patches
            points = "".join(f"M{x:.1f} {y:.1f}h0" for x, y in zip(xs, ys, strict=True))
            parts.append(f'<path d="{points}" stroke="{color}" stroke-width="4" stroke-linecap="round" opacity=".5"/>')
    for n, s in enumerate([s for s in series if s.label][:8]):
        color = COLORS[s.color % len(COLORS)]
        parts.append(f'<circle cx="{LEFT + 12}" cy="{TOP + 12 + 15 * n}" r="4" fill="{color}"/>')
        parts.append(f'<text x="{LEFT + 21}" y="{TOP + 16 + 15 * n}">{html.escape(s.label)}</text>')
    middle = (HEIGHT - BOTTOM + TOP) / 2
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{html.escape(x_label)}</text>')
    parts.append(
        f'<text transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{html.escape(y_label)}</text>'
    )
    body = "".join(parts)
    style = 'font-size="11" font-family="system-ui,sans-serif" fill="#334155"'
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" {style}>{body}</svg>'


def _ticks(low: float, high: float) -> list[float]:
    """About six round numbers that span `low` to `high`."""
    if not high > low:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / 5
    power = 10.0 ** np.floor(np.log10(raw))
    step = float(next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw))
    return [round(n * step, 12) for n in range(int(np.ceil(low / step - 1e-9)), int(np.floor(high / step + 1e-9)) + 1)]
