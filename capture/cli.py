"""The capture commands of `daif`: import, info, pack, cameras, plan, capture."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from capture.errors import UsageError

if TYPE_CHECKING:
    from capture.plan import Assessment, FocusSweep
    from capture.stack import FocalStack


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command("import")(_import)
    app.command("info")(_info)
    app.command("pack")(_pack)
    app.command("plan")(_plan)
    app.command("cameras")(_cameras)
    app.command("capture")(_capture)


# --- import, info, pack


def _import(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of photographs; stack.yaml in them says what is known.")
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The stack (.h5), or a folder for several stacks.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite stacks that exist.")] = False,
) -> None:
    """Make focal stacks of folders of photographs."""
    from capture.errors import DaifError, SomeFailedError
    from capture.importer import import_folder

    into_folder = len(folders) > 1 or os.path.isdir(output)
    if into_folder:
        if output.exists() and not output.is_dir():
            raise UsageError(f"{output} is a file; several folders need a folder after -o")
        names = [folder.resolve().name for folder in folders]
        if len(set(names)) < len(names):
            raise UsageError("two folders have the same name, so their stacks would too; import them one by one")
    failed: list[DaifError] = []
    for folder in folders:
        target = output / f"{folder.resolve().name}.h5" if into_folder else output
        try:
            if into_folder and folder.is_dir():
                output.mkdir(parents=True, exist_ok=True)
            typer.echo(import_folder(folder, target, overwrite=force))
        except DaifError as error:
            if len(folders) == 1:
                raise
            typer.echo(f"daif: {error}", err=True)
            failed.append(error)
    if failed:
        raise SomeFailedError(f"{len(failed)} of {len(folders)} folders failed, each named above")


def _info(
    stacks: Annotated[list[Path], typer.Argument(help="Focal stacks (.h5, or .h5.partial during capture).")],
    deep: Annotated[bool, typer.Option("--deep", help="Read everything and verify every checksum.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: an array with one object per stack.")] = False,
) -> None:
    """Say what focal stacks hold."""
    import json

    from capture.errors import DaifError, SomeFailedError
    from capture.stack import FocalStack

    facts, failed = [], 0
    for path in stacks:
        try:
            with FocalStack.open(path, deep=deep, allow_partial=path.suffix == ".partial") as stack:
                facts.append(_stack_facts(stack, deep))
                if not as_json:
                    typer.echo(_stack_text(facts[-1]))
        except DaifError as error:
            if len(stacks) == 1:
                raise
            typer.echo(f"daif: {error}", err=True)
            failed += 1
    if as_json:
        typer.echo(json.dumps(_finite(facts), indent=2))
    if failed:
        raise SomeFailedError(f"{failed} of {len(stacks)} stacks cannot be read, each named above")


def _pack(
    stack: Annotated[Path, typer.Argument(help="A complete focal stack.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The smaller copy.")],
    force: Annotated[bool, typer.Option("--force", help="Overwrite the copy if it exists.")] = False,
) -> None:
    """Repack a stack for archiving: gzip, checked bit for bit."""
    from capture.stack import pack_stack

    pack_stack(stack, output, overwrite=force)
    before, after = stack.stat().st_size, output.stat().st_size
    typer.echo(f"{output}: {after / 1e6:.1f} MB, {before / max(after, 1):.2f} times smaller, verified bit for bit")


def _stack_facts(stack: FocalStack, deep: bool) -> dict[str, Any]:
    """What `daif info` says about a stack, ready for JSON."""
    import numpy as np

    from capture.stack import OK, STATUS_NAMES

    names = ["focus_distance_m", "focus_dpt", "focus_distance_std_m", "focus_command", "focus_position"]
    names += ["exposure_time_s", "f_number", "iso", "mean_level", "clipped_fraction", "focus_measure"]
    frames = [{"frame": i, "status": STATUS_NAMES[int(status)]} for i, status in enumerate(stack.status)]
    for row, i in enumerate(stack.frame_index):
        frames[i] |= {name: float(getattr(stack, name)[row]) for name in names}
        frames[i] |= {
            "focus_distance_source": stack.focus_distance_source[row],
            "file": stack.original_name[row],
        }
    facts: dict[str, Any] = {
        "file": str(stack.path),
        "bytes": stack.path.stat().st_size,
        "complete": stack.complete,
        "verified": deep,
        "frames_ok": stack.n_frames,
        "frames_planned": stack.n_planned,
        "width": stack.width,
        "height": stack.height,
        "channels": stack.channels,
        "bits": 8 * stack.dtype.itemsize,
        "transfer": stack.transfer,
        "white_level": stack.white_level,
        "metric": stack.is_metric,
        "focus_unit": stack.focus_unit,
        "lens": stack.lens.model_dump() if stack.lens else None,
        "lens_info": stack.lens_info,
        "camera": stack.camera,
        "lens_profile": stack.profile is not None,
        "plan": stack.plan is not None,
        "board": stack.board is not None,
        "truth": stack.has_truth,
        "created": stack.created,
        "software": stack.software,
        "events": stack.events,
        "frames": frames,
        "kappa_px_per_dpt": None,
        "blur_range_px": None,
        "blur_step_px": None,
        "warnings": [],
    }
    known = stack.focus_dpt[~np.isnan(stack.focus_dpt)]
    optic = stack.profile.fitted_to(stack.width, stack.height) if stack.profile else stack.lens
    if optic is not None and len(known) > 1:
        try:
            kappa = np.asarray(optic.kappa_px_per_dpt(known), np.float64)
        except UsageError as error:  # focused outside what the profile was calibrated for
            facts["warnings"].append(str(error))
        else:
            facts["kappa_px_per_dpt"] = [float(kappa.min()), float(kappa.max())]
            facts["blur_range_px"] = float(kappa.max() * (known.max() - known.min()))
            facts["blur_step_px"] = [float(x) for x in (kappa[1:] * np.abs(np.diff(known))).round(3)]
    facts["warnings"] += _stack_warnings(stack)
    facts["frames_failed"] = int(np.count_nonzero(stack.status != OK))
    return facts


def _stack_warnings(stack: FocalStack) -> list[str]:
    """What a careful photographer would want to know before using the stack."""
    import numpy as np

    found = []
    for name, values in (
        ("exposure time", stack.exposure_time_s),
        ("f-number", stack.f_number),
        ("ISO", stack.iso),
    ):
        known = values[~np.isnan(values)]
        if len(known) and known.max() > 1.01 * known.min():
            found.append(f"{name} changes between frames, {known.min():.4g} to {known.max():.4g}: lock the exposure")
    clipped = stack.clipped_fraction[stack.clipped_fraction > 0.01]
    if len(clipped):
        found.append(f"{len(clipped)} frames have more than 1 % clipped values, up to {100 * clipped.max():.1f} %")
    if stack.distance_problem:
        found.append(stack.distance_problem)
    unknown = np.isnan(stack.focus_distance_m)
    if unknown.any() and not unknown.all():
        some = ", ".join(str(i) for i in stack.frame_index[unknown][:8])
        found.append(f"focus distance unknown in frames {some}: the stack counts as uncalibrated")
    return found


def _stack_text(facts: dict[str, Any]) -> str:
    """`_stack_facts` as a table for people."""
    state = "complete" if facts["complete"] else f"unfinished, {facts['frames_ok']} of {facts['frames_planned']} frames"
    colour = "RGB" if facts["channels"] == 3 else "grey"
    lines = [
        f"{facts['file']}: {state}, {facts['bytes'] / 1e6:.1f} MB"
        + (", checksums verified" if facts["verified"] else ""),
        f"  frames   {facts['frames_ok']} x {facts['width']} x {facts['height']} px, {facts['bits']}-bit {colour}, "
        f"{facts['transfer']}",
        "  depth    "
        + ("metric: every focus distance is known" if facts["metric"] else "uncalibrated: relative (ordered, no unit)"),
    ]
    lens = facts["lens"]
    if lens:
        lines.append(
            f"  lens     {1e3 * lens['focal_length_m']:.4g} mm f/{lens['f_number']:.3g}, "
            f"pixel pitch {1e6 * lens['pixel_pitch_m']:.4g} um"
        )
    elif facts["lens_profile"]:
        lines.append("  lens     calibrated profile stored in the stack")
    else:
        lines.append("  lens     unknown")
    device = " ".join(str(facts["camera"].get(key, "")) for key in ("make", "model")).strip()
    if device:
        lines.append(f"  camera   {device}")
    if facts["blur_range_px"] is not None:
        low, high = facts["kappa_px_per_dpt"]
        lines.append(
            f"  blur     kappa {low:.4g} to {high:.4g} px/dpt; {facts['blur_range_px']:.1f} px over the sweep, "
            f"{min(facts['blur_step_px']):.2f} to {max(facts['blur_step_px']):.2f} px between frames"
        )
    lines.append(f"  truth    {'true depth is stored' if facts['truth'] else 'none'}")
    lines.append("  frame  status   focus m  +- m     focus dpt  command  exposure s  ISO    mean   clipped  file")
    for frame in facts["frames"]:
        if frame["status"] != "ok":
            lines.append(f"  {frame['frame']:5d}  {frame['status']}")
            continue
        lines.append(
            f"  {frame['frame']:5d}  ok       {_cell(frame['focus_distance_m'], 7)}  "
            f"{_cell(frame['focus_distance_std_m'], 7, 2)}  {_cell(frame['focus_dpt'], 9)}  "
            f"{_cell(frame['focus_command'], 7)}  {_cell(frame['exposure_time_s'], 10)}  {_cell(frame['iso'], 5)}  "
            f"{_cell(frame['mean_level'], 5, 3)}  {100 * frame['clipped_fraction']:5.2f} %  {frame['file']}"
        )
    lines += [f"  warning: {warning}" for warning in facts["warnings"]]
    return "\n".join(lines)


def _cell(value: float, width: int, digits: int = 4) -> str:
    """A number in `width` columns, `-` where it is unknown."""
    return f"{'-' if math.isnan(value) else format(value, f'.{digits}g'):>{width}}"


# --- cameras and capture


def _cameras(
    probe: Annotated[
        str | None, typer.Option(metavar="URI", help="Find out how this body's focus moves, and write its profile.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="--probe: where to write the profile.")] = None,
    force: Annotated[bool, typer.Option("--force", help="--probe: overwrite a file that exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the list as JSON.")] = False,
) -> None:
    """List the connected cameras and what each can do."""
    import json

    from capture.cameras.listing import found_cameras
    from capture.cameras.probe import probe_focus, write_profile
    from capture.output import check_output

    if probe is not None:
        if output is not None:
            check_output(output, overwrite=force)
        profile = probe_focus(probe, ask=lambda question: typer.prompt(question, default="", show_default=False))
        typer.echo(f"profile written to {write_profile(profile, output)}")
        return
    cameras = found_cameras()
    if as_json:
        typer.echo(json.dumps(cameras, indent=2))
    elif not cameras:
        typer.echo("no camera found; --camera simulated:motorcycle needs none")
    for camera in [] if as_json else cameras:
        typer.echo(f"{camera['uri']:<28} {camera['model']:<28} {camera['focus']}")


def _capture(
    camera: Annotated[str, typer.Option(help="gphoto2:, opencv:0, picamera2:, simulated:SCENE or replay:FOLDER.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The stack to write (.h5).")],
    plan: Annotated[
        Path | None, typer.Option(help="Plan written by `daif plan`; --resume finds it in the stack.")
    ] = None,
    lens: Annotated[str | None, typer.Option(help="lens.yaml of a calibration, or optics: '50mm f/2.8 12um'.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished stack.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing stack.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the frames and stop; no camera is touched.")
    ] = False,
    exposure: Annotated[str | None, typer.Option(help="Exposure time to lock: 1/60 or 0.5 (seconds).")] = None,
    iso: Annotated[float | None, typer.Option(help="ISO to lock.")] = None,
    f_number: Annotated[float | None, typer.Option(help="f-number to lock.")] = None,
    white_balance: Annotated[str | None, typer.Option(help="White balance to lock, in the camera's word.")] = None,
    settle: Annotated[float | None, typer.Option(min=0, help="Least wait after a move, seconds.")] = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Longest wait for a picture, seconds.")] = 30.0,
    manual_focus: Annotated[
        bool, typer.Option("--manual-focus", help="You turn the ring; daif says where to.")
    ] = False,
    prefer: Annotated[str, typer.Option(help="Which file becomes the frame: raw or jpeg.")] = "raw",
    exif_distances: Annotated[
        bool, typer.Option("--exif-distances", help="Trust the focus distance in the camera's files.")
    ] = False,
    allow_drift: Annotated[bool, typer.Option("--allow-drift", help="Keep frames whose brightness changed.")] = False,
    delete_from_camera: Annotated[
        bool, typer.Option("--delete-from-camera", help="Delete pictures from the card once they are stored here.")
    ] = False,
    camera_profile: Annotated[Path | None, typer.Option(help="Profile of the body (YAML); see --probe.")] = None,
    board: Annotated[
        Path | None, typer.Option(help="board.yaml of the calibration board in the scene, kept for `daif calibrate`.")
    ] = None,
) -> None:
    """Run a focus sweep: take, check and store its frames; Ctrl-C finishes the frame and stops resumable."""
    from capture.board import BoardDescription
    from capture.cameras import open_camera
    from capture.cameras.base import ExposureSettings
    from capture.cameras.profiles import read_profile
    from capture.config import load_yaml
    from capture.plan import FocusSweep, read_lens
    from capture.sweep import StopRequest, SweepOptions, run_sweep, stored_plan

    exposure_s = None if exposure is None else _seconds(exposure)
    for option, value in (("--iso", iso), ("--f-number", f_number), ("--timeout", timeout)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{option} {value:g} must be a number above 0")
    if settle is not None and not settle < math.inf:
        raise UsageError(f"--settle {settle:g} must be a number of seconds, such as 0.5")
    if plan is None and not resume:
        raise UsageError("say which frames to take: --plan plan.yaml (daif plan -o plan.yaml), or --resume")
    sweep = FocusSweep.read(plan) if plan is not None else stored_plan(output)
    optic = read_lens(lens) if lens else None
    target = load_yaml(board, BoardDescription).model_dump() if board else None
    if dry_run:
        typer.echo(_dry_run_text(sweep, optic, camera, output))
        return
    device = open_camera(
        camera,
        profile=read_profile(camera_profile) if camera_profile else None,
        delete_from_camera=delete_from_camera,
        manual_focus=manual_focus,
    )
    options = SweepOptions(
        exposure=ExposureSettings(exposure_s, iso, f_number, white_balance),
        settle_s=settle,
        grab_timeout_s=timeout,
        allow_drift=allow_drift,
        prefer=_choice(prefer, "--prefer", ("raw", "jpeg")),
        exif_distances=exif_distances,
        board=target,
        overwrite=force,
    )
    from capture.progress import sweep_display

    with StopRequest() as stop, sweep_display() as display:
        result = run_sweep(
            device,
            sweep,
            output,
            lens=optic,
            options=options,
            resume=resume,
            stop=stop,
            on_progress=display.update,
            prompt=display.ask if manual_focus else None,
        )
    typer.echo(f"{result.path}: {result.n_frames} frames in {result.seconds:.1f} s")


def _dry_run_text(sweep: FocusSweep, optic: Any, camera: str, output: Path) -> str:
    """What a capture would do, without touching the camera."""
    from capture.plan import assess

    assessment = assess(sweep, optic) if optic is not None and sweep.spacing != "command" else None
    return f"{camera} -> {output}\n{_plan_text(sweep, assessment, 2.5)}"


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
    force: Annotated[bool, typer.Option("--force", help="Overwrite the plan if it exists.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print plan and assessment as JSON.")] = False,
) -> None:
    """Place the frames of a sweep, and say what depth precision the optics allow."""
    import dataclasses
    import json

    from capture.lens import Lens
    from capture.output import check_output
    from capture.plan import assess, command_sweep, explicit_sweep, plan_sweep, read_lens

    if output is not None:
        check_output(output, overwrite=force)
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


def _seconds(text: str) -> float:
    """Seconds of --exposure: a number, or a fraction of two."""
    over, slash, under = text.partition("/")
    try:
        parts = float(over), float(under) if slash else 1.0
    except ValueError:
        parts = math.nan, math.nan
    if not all(0 < part < math.inf for part in parts):
        raise UsageError(f"--exposure {text!r} must be seconds above 0 without a unit, such as 1/60 or 0.5")
    return parts[0] / parts[1]


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
