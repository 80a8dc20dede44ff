"""The capture commands of `daif`: import, info, pack, cameras, plan, capture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capture.errors import UsageError

if TYPE_CHECKING:
    from capture.plan import Assessment, FocusSweep


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command("plan")(_plan)


# --- plan


def _plan(
    near: Annotated[float | None, typer.Option(help="Nearest plane of focus in metres.")] = None,
    far: Annotated[float | None, typer.Option(help="Farthest plane of focus in metres, or inf.")] = None,
    lens: Annotated[
        str | None, typer.Option(help="lens.yaml, or optics in words: '50mm f/2.8 12um' (pixel pitch as stored).")
    ] = None,
    count: Annotated[int | None, typer.Option(help="Number of frames; default: from the optics, 5 to 20.")] = None,
    spacing: Annotated[str, typer.Option(help="dioptre, geometric, metre or adaptive.")] = "dioptre",
    step_px: Annotated[float, typer.Option(help="Blur change between frames, in pixels of diameter.")] = 4.0,
    reduce: Annotated[int, typer.Option(min=1, help="Reconstruct at 1/REDUCE of the stored resolution.")] = 1,
    distances: Annotated[str | None, typer.Option(help="Explicit planes of focus in metres: '0.6,1,2,inf'.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Positions in camera units, 'FIRST:LAST:COUNT' or a comma list; see --unit.")
    ] = None,
    unit: Annotated[str, typer.Option(help="Unit of --positions: step, driver, dioptre or m.")] = "step",
    image: Annotated[str | None, typer.Option(help="Stored image size, WIDTHxHEIGHT, to estimate the bytes.")] = None,
    raw: Annotated[bool, typer.Option("--raw", help="The camera keeps RAW files: 16 bit, larger.")] = False,
    seconds_per_frame: Annotated[float, typer.Option(help="Move, settle, expose and transfer.")] = 2.5,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here (YAML).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan and assessment as JSON.")] = False,
) -> None:
    """Place the frames of a sweep, and say what depth precision the optics allow."""
    import dataclasses
    import json

    from capture.lens import Lens
    from capture.plan import assess, command_sweep, explicit_sweep, plan_sweep, read_lens

    stored = read_lens(lens) if lens else None
    optic = stored.rescaled(1.0 / reduce) if stored else None
    if positions is not None:
        sweep = command_sweep(_positions(positions), _choice(unit, "--unit", ("step", "driver", "dioptre", "m")))
    elif distances is not None:
        sweep = explicit_sweep(tuple(_number(word, "--distances") for word in distances.split(",")), lens=optic)
    elif near is None or far is None:
        raise UsageError("say from where to where: --near M --far M (or --distances, or --positions with --unit)")
    else:
        kind = _choice(spacing, "--spacing", ("dioptre", "geometric", "metre", "adaptive"))
        sweep = plan_sweep(near, far, lens=optic, count=count, spacing=kind, step_px=step_px)
    assessment = None
    if optic is not None and positions is None:
        shape = _image_shape(image) if image else None
        assessment = assess(sweep, optic, seconds_per_frame=seconds_per_frame, image_shape=shape, raw=raw)
    if isinstance(stored, Lens):
        sweep = sweep.model_copy(update={"lens": stored})
    if output is not None:
        sweep.write(output)
    if as_json:
        facts = dataclasses.asdict(assessment) if assessment else None
        typer.echo(json.dumps({"plan": sweep.model_dump(mode="json"), "assessment": _finite(facts)}, indent=2))
    else:
        typer.echo(_plan_text(sweep, assessment, seconds_per_frame))
    if assessment:
        for warning in assessment.warnings:
            typer.echo(f"warning: {warning}", err=True)


def _plan_text(sweep: FocusSweep, assessment: Assessment | None, seconds_per_frame: float) -> str:
    """The plan as a table for people."""
    if assessment is None:
        if sweep.spacing == "command":
            lines = [f"{sweep.count} frames at {sweep.unit}: " + ", ".join(f"{x:g}" for x in sweep)]
        else:
            lines = [f"{sweep.count} frames at metres: " + ", ".join(f"{x:.4g}" for x in sweep.focus_distance_m)]
            lines.append("give --lens to see blur steps and depth precision")
        lines.append(f"about {sweep.count * seconds_per_frame:.0f} s")
        return "\n".join(lines)
    lines = ["frame  focus m  dioptre  blur step px  best std m  typical error m"]
    for index, frame in enumerate(assessment.frames):
        step = "" if frame.step_px != frame.step_px else f"{frame.step_px:.2f}"
        lines.append(
            f"{index:5d}  {frame.focus_distance_m:7.4g}  {frame.focus_dpt:7.3f}  {step:>12}  "
            f"{frame.bound_m:10.2g}  {frame.typical_m:15.2g}"
        )
    size = "" if assessment.bytes is None else f", about {assessment.bytes / 1e6:.0f} MB"
    lines.append(
        f"{sweep.count} frames, blur changes by {assessment.range_px:.1f} px over the range; "
        f"about {assessment.seconds:.0f} s{size}"
    )
    lines.append(
        f"best: Cramer-Rao bound on texture ({assessment.coc_bound_px:.3f} px of blur diameter); "
        f"typical: median of the plane sweep on noisy simulated scenes"
    )
    if sweep.spacing == "adaptive":
        lines.append(f"adaptive: {sweep.scout_count} quick frames over this range decide on site where the frames go")
    return "\n".join(lines)


def _positions(text: str) -> tuple[float, ...]:
    """'FIRST:LAST:COUNT' or a comma list as numbers."""
    if ":" not in text:
        return tuple(_number(word, "--positions") for word in text.split(","))
    parts = text.split(":")
    if len(parts) != 3 or not parts[2].strip().isdigit() or not 2 <= int(parts[2]) <= 999:
        raise UsageError(f"--positions {text!r} must be FIRST:LAST:COUNT with a count of 2 to 999, such as 0:200:11")
    first, last = _number(parts[0], "--positions"), _number(parts[1], "--positions")
    n = int(parts[2])
    return tuple(first + (last - first) * i / (n - 1) for i in range(n))


def _number(word: str, option: str) -> float:
    try:
        return float(word)
    except ValueError:
        raise UsageError(f"{option}: {word.strip()!r} is not a number") from None


def _choice(word: str, option: str, choices: tuple[str, ...]) -> Any:
    """`word`, if it is one of `choices` (any literal type that names them)."""
    for choice in choices:
        if word == choice:
            return choice
    from capture.config import did_you_mean

    raise UsageError(f"{option} {word!r} is not known{did_you_mean(word, choices)}")


def _image_shape(text: str) -> tuple[int, int]:
    """'6000x4000' as (H, W)."""
    width, _, height = text.lower().partition("x")
    if not (width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise UsageError(f"--image {text!r} must be WIDTHxHEIGHT in pixels, such as 6000x4000")
    return int(height), int(width)


def _finite(value: Any) -> Any:
    """`value` with NaN as None and infinity as "inf": JSON has neither."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf"
    return value
