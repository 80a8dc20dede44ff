"""The calibration commands of `daif`: board, calibrate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capture.errors import UsageError

if TYPE_CHECKING:
    from calibration.board import Board


def register(app: typer.Typer) -> None:
    """Add this package's commands to `app`."""
    app.command("board")(_board)
    app.command("calibrate")(_calibrate)


def _board(
    output: Annotated[Path, typer.Option("--output", "-o", help="board.pdf or board.png.")],
    paper: Annotated[str, typer.Option(help="A5, A4, letter, A3 or A2.")] = "A4",
    columns: Annotated[int, typer.Option(min=3, max=30, help="Squares across.")] = 7,
    rows: Annotated[int, typer.Option(min=3, max=30, help="Squares down; odd.")] = 5,
    square_mm: Annotated[float | None, typer.Option(min=2, max=500, help="Side of a square; else the largest.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Draw the calibration target in true scale, and board.yaml that describes it."""
    import yaml

    from calibration.board import board_for_paper, write_pdf, write_png
    from capture.output import check_output, write_text

    kind = output.suffix.lower()
    if kind not in (".pdf", ".png"):
        raise UsageError(f"-o {output}: the board is written as .pdf or .png; say -o board.pdf")
    description = output.with_suffix(".yaml")
    for path in (output, description):
        check_output(path, overwrite=force)
    board = board_for_paper(paper, columns, rows)
    if square_mm is not None:
        board = board.model_copy(update={"square_m": square_mm / 1000})
    if kind == ".pdf":
        write_pdf(board, output, paper)
    else:
        write_png(board, output)
    write_text(description, yaml.safe_dump(board.model_dump(), sort_keys=False))
    typer.echo(
        f"{output}: {board.columns} x {board.rows} squares of {board.square_m * 1000:g} mm; described in {description}"
    )
    typer.echo("Print at 100 %, glue it flat, measure its ruler, and capture sweeps at 2 or more distances.", err=True)


def _calibrate(
    stacks: Annotated[
        list[Path], typer.Argument(help="Sweeps of the board at several distances, or one of it tilted.")
    ],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="lens.yaml to write; report.html goes beside it.")
    ] = None,
    board: Annotated[Path | None, typer.Option(help="board.yaml, if the stacks do not carry it.")] = None,
    ruler_mm: Annotated[float | None, typer.Option(help="Measured length of the board's printed 100 mm ruler.")] = None,
    focal_px: Annotated[
        float | None, typer.Option(min=1, max=1e6, help="Focal length in pixels at mid focus, if known.")
    ] = None,
    intrinsics: Annotated[
        Path | None, typer.Option(help="Camera matrix and distortion at mid focus: YAML of OpenCV or ROS.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Temperature in degrees Celsius, for the record.")] = None,
    lens_name: Annotated[str, typer.Option(help="Name of the lens, for the record.")] = "",
    lens: Annotated[
        Path | None, typer.Option(help="An existing lens.yaml: to --check, or to refine by --scene.")
    ] = None,
    bootstrap: Annotated[int, typer.Option(min=0, max=1000, help="Check the errors by so many resamplings.")] = 0,
    from_exif: Annotated[bool, typer.Option("--from-exif", help="Write what the stack's metadata say.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Does --lens still hold for this sweep of the board?")] = False,
    scene: Annotated[
        bool, typer.Option("--scene", help="No board: refine focus and gain from ordinary, textured stacks.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.")] = False,
) -> None:
    """Fit a lens profile: focus positions to dioptres, blur to depth, with error bars."""
    import dataclasses

    from calibration.board import RULER_MM
    from calibration.calibrate import board_with_ruler, calibrate, load_board_stack
    from calibration.check import check_profile
    from calibration.exif import profile_from_exif
    from calibration.fit import bootstrap_std
    from calibration.intrinsics import read_intrinsics
    from calibration.report import verdict_of, write_report
    from capture.errors import DataError
    from capture.lens import LensProfile, Measured
    from capture.output import check_output

    if sum((from_exif, check, scene)) > 1:
        raise UsageError("--from-exif, --check and --scene exclude each other; give one")
    if intrinsics is not None and focal_px is not None:
        raise UsageError("--intrinsics and --focal-px exclude each other; the file holds the focal length")
    if temperature is not None and not math.isfinite(temperature):
        raise UsageError(f"--temperature {temperature:g} must be a finite number")
    given = _read_board(board) if board is not None else None

    if check:
        if lens is None or len(stacks) != 1:
            raise UsageError("--check compares one stack with a profile: daif calibrate --check STACK --lens lens.yaml")
        result = check_profile(LensProfile.read(lens), load_board_stack(stacks[0], given))
        typer.echo(result.sentence)
        if not result.holds:
            raise DataError(f"{lens} does not hold for {stacks[0]}; calibrate again")
        return

    if output is None:
        raise UsageError("say where to write the profile: -o lens.yaml")
    if output.suffix.lower() not in (".yaml", ".yml"):
        raise UsageError(f"-o {output}: the profile is written as .yaml or .yml; say -o lens.yaml")
    report = output.with_name("report.html") if output.name == "lens.yaml" else output.with_suffix(".html")
    for path in (output,) if from_exif else (output, report):
        for read in (*stacks, *(one for one in (board, intrinsics, lens) if one is not None)):
            if path.exists() and read.exists() and path.samefile(read):
                raise UsageError(f"{path} would be written, but {read} is read; choose another name after -o")
        check_output(path, overwrite=force)

    if from_exif:
        if len(stacks) != 1:
            raise UsageError("--from-exif reads one stack")
        profile_from_exif(stacks[0]).write(output)
        typer.echo(f"{output}: from metadata only; expect about 5 % in scale and 0.07 dpt in offset")
        return

    if scene:
        from calibration.scene import refine_from_scenes, write_scene_report

        refined = refine_from_scenes(stacks, LensProfile.read(lens) if lens is not None else None)
        refined.profile.write(output)
        write_scene_report(refined, report)
        for sentence in refined.sentences:
            typer.echo(sentence)
        typer.echo(f"{output}, {report}")
        return

    loaded = []
    for path in stacks:
        stack = load_board_stack(path, given)
        if ruler_mm is not None:
            measured = board_with_ruler(stack.sweep.board, ruler_mm, RULER_MM)
            stack = dataclasses.replace(stack, sweep=dataclasses.replace(stack.sweep, board=measured))
        loaded.append(stack)
    known_focal = None if focal_px is None else Measured(value=focal_px, std=2e-3 * focal_px, source="user")
    calibration = calibrate(
        loaded,
        focal_px=known_focal,
        intrinsics=None if intrinsics is None else read_intrinsics(intrinsics, loaded[0].full_size),
        lens_name=lens_name,
        temperature_c=temperature,
    )
    calibration.profile.write(output)
    write_report(calibration, report)
    for sentence in (*calibration.sentences, *calibration.profile.warnings, verdict_of(calibration)[0]):
        typer.echo(sentence)
    if bootstrap:
        pupil_std, _, focus_std = bootstrap_std(calibration.seen, calibration.fit, bootstrap)
        typer.echo(
            f"Bootstrap over frames ({bootstrap} rounds): aperture +- {pupil_std * 1e3:.3f} mm where the fit says "
            f"{calibration.fit.pupil_std_m * 1e3:.3f}, focus +- {float(focus_std.mean()):.4f} dpt."
        )
    typer.echo(f"{output}, {report}")


def _read_board(path: Path) -> Board:
    from calibration.board import Board
    from capture.config import load_yaml

    return load_yaml(path, Board)
