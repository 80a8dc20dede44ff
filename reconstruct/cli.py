"""The `daif` command: reconstruction commands, and the assembly of all the others."""

from __future__ import annotations

import logging
import os
import signal
import sys
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

import calibration.cli
import capture.cli
import reconstruct.train_cli
from capture.errors import DaifError, UsageError
from capture.output import disk_is_full

app = typer.Typer(
    name="daif",
    help="From a focus sweep to metric depth and an all-in-focus image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_options = {"debug": False}
INTERRUPTED, TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM


@app.callback()
def _global_options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Log every step to stderr.")] = False,
) -> None:
    _options["debug"] = debug
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.INFO if verbose else logging.WARNING,
        format="%(levelname).1s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    for chatty in ("h5py", "PIL", "asyncio", "distributed"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1 ...")]


@app.command("reconstruct")
def reconstruct_command(
    stacks: Annotated[list[str], typer.Argument(help="Stacks (.h5), folders of photographs or of stacks, or URLs.")],
    out: Annotated[str, typer.Option("--output", "-o", help="Folder or URL for the results, one folder per stack.")],
    method: Annotated[str, typer.Option(help="network or plane-sweep.")] = "network",
    weights: Annotated[str, typer.Option(help="Weights of the network: a name or a file.")] = "default",
    refine: Annotated[int, typer.Option(min=0, help="Gradient steps through the renderer after the first answer.")] = 0,
    lens: Annotated[Path | None, typer.Option(help="Lens profile (lens.yaml) from `daif calibrate`.")] = None,
    device: Device = "auto",
    depth_unit: Annotated[str, typer.Option(help="Unit of depth.png: mm, or um for macro.")] = "mm",
    formats: Annotated[str, typer.Option(help="More outputs, comma-separated: glb, tiff, exr, nerfstudio.")] = "",
    fit_focus: Annotated[
        bool,
        typer.Option("--fit-focus/--no-fit-focus", help="Correct reported focus by the frames; never a calibration's."),
    ] = True,
    align: Annotated[bool, typer.Option("--align/--no-align", help="Remove breathing and hand motion first.")] = True,
    allow_misaligned: Annotated[bool, typer.Option("--allow-misaligned", help="Go on all the same.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace existing results.")] = False,
    workers: Annotated[int, typer.Option(min=1, help="Processes on this machine; one per GPU is right.")] = 1,
    on: Annotated[str | None, typer.Option(help="Dask scheduler to join: tcp://HOST:8786.")] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Keep looking for new stacks until interrupted.")] = False,
    follow: Annotated[bool, typer.Option("--follow", help="One stack that is still being captured.")] = False,
) -> None:
    """Turn focal stacks into depth, confidence and all-in-focus images."""
    from reconstruct import batch, export, infer, job

    wanted = tuple(part.strip() for part in formats.split(",") if part.strip())
    for value, allowed, option in (
        (method, ("network", "plane-sweep"), "--method"),
        (depth_unit, tuple(export.UNITS_PER_METRE), "--depth-unit"),
        *((name, export.EXTRA_FORMATS, "--formats") for name in wanted),
    ):
        if value not in allowed:
            raise UsageError(f"{option} is {value!r}; it must be one of {', '.join(allowed)}")
    if on is None:
        export.check_formats(wanted)
    settings = infer.Settings(
        method=method,  # type: ignore[arg-type]
        weights=weights,
        refine_steps=refine,
        fit_focus=fit_focus,
        align=align,
        max_residual_px=float("inf") if allow_misaligned else None,
        device=device,
    )
    single = replace(settings, compare=True)  # the plane sweep beside the network: for one stack, not for thousands
    if follow:
        if len(stacks) != 1:
            raise UsageError(f"--follow takes one stack, got {len(stacks)}")
        batch.follow(stacks[0], job.Job(out, single, lens, depth_unit, wanted, force))  # type: ignore[arg-type]
        return
    found = [] if watch else batch.find_stacks(stacks)
    chosen = single if len(found) == 1 else settings
    work = job.Job(out, chosen, lens, depth_unit, wanted, force)  # type: ignore[arg-type]
    if watch:
        batch.watch(stacks, work, workers=workers, address=on)
    else:
        batch.run(found, work, workers=workers, address=on)


@app.command("evaluate")
def evaluate_command(
    out: Annotated[Path, typer.Argument(help="Folder that `daif reconstruct` wrote.")],
    truth: Annotated[
        Path,
        typer.Option(help="Folder with NAME.h5, NAME/depth.png (mm), NAME.png, NAME.npy; the data set of --protocol."),
    ],
    protocol: Annotated[
        str | None, typer.Option(help="Score as a published table does: nyuv2, defocusnet, ddff12 or zedd.")
    ] = None,
    subset: Annotated[bool, typer.Option("--subset", help="With --protocol: score the scenes there are.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Print the errors of reconstructions against true depth."""
    if protocol is not None:
        from reconstruct import protocols

        protocols.run(protocol, out, truth, subset=subset, as_json=as_json)
        return
    if subset:
        raise UsageError("--subset belongs to --protocol; without one every reconstruction is scored anyway")
    from reconstruct import evaluate

    evaluate.run(out, truth, as_json=as_json)


@app.command("import-dataset")
def import_dataset_command(
    kind: Annotated[str, typer.Argument(help="nyuv2, defocusnet, ddff12, zedd or mobile-depth.")],
    source: Annotated[Path, typer.Argument(help="The data set as downloaded and unpacked: its file or folder.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for the stacks, one per scene.")],
    split: Annotated[str | None, typer.Option(help="test, train, val, all; left out, what tables use.")] = None,
    frames: Annotated[str | None, typer.Option(help="Only these frames of each stack: 0,2,4,6,9.")] = None,
    renderer: Annotated[str, typer.Option(help="nyuv2: aperture (our camera) or published (theirs).")] = "aperture",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many scenes.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite stacks that exist.")] = False,
) -> None:
    """Make focal stacks, with truth, of a published data set that you have downloaded."""
    from reconstruct import datasets

    try:
        chosen = None if frames is None else [int(part) for part in frames.split(",")]
    except ValueError:
        raise UsageError(f"--frames is {frames!r}; it must be numbers with commas, like 0,2,4,6,9") from None
    datasets.import_dataset(
        kind,
        source,
        out,
        split=split,
        frames=chosen,
        renderer=renderer,
        limit=limit,
        overwrite=force,
    )


@app.command("view")
def view_command(
    out: Annotated[Path, typer.Argument(help="Folder that `daif reconstruct` wrote.")],
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback is up to you.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free port.")] = 0,
) -> None:
    """Look at results in the browser: refocus, measure, turn in 3-D, compare two with a wipe."""
    from reconstruct import viewer

    viewer.run(out, host, port)


@app.command("session")
def session_command(
    camera: Annotated[str, typer.Option(help="gphoto2:, opencv:0, picamera2:, simulated:SCENE or replay:FOLDER.")],
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder of the session; an existing one is continued.")],
    lens: Annotated[str | None, typer.Option(help="lens.yaml of a calibration, or optics: '50mm f/2.8 12um'.")] = None,
    method: Annotated[str, typer.Option(help="network or plane-sweep; first looks are plane sweeps.")] = "plane-sweep",
    weights: Annotated[str, typer.Option(help="Weights of the network: a name or a file.")] = "default",
    refine: Annotated[int, typer.Option(min=0, help="Gradient steps through the renderer after the first answer.")] = 0,
    manual_focus: Annotated[bool, typer.Option("--manual-focus", help="You turn the ring by hand.")] = False,
    allow_drift: Annotated[bool, typer.Option("--allow-drift", help="Keep frames whose brightness changed.")] = False,
    train_steps: Annotated[int | None, typer.Option(min=1, help="Steps of a fine-tuning run on site.")] = None,
    device: Device = "auto",
    host: Annotated[str, typer.Option(help="Address to listen on; beyond loopback is up to you.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free port.")] = 0,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in the browser.")] = True,
) -> None:
    """Shoot with the camera on a cable: live view, sweep button, depth seconds after the last frame."""
    from capture.sweep import SweepOptions
    from reconstruct import session

    session.run(
        camera,
        out,
        lens=lens,
        method=method,
        weights=weights,
        refine_steps=refine,
        device=device,
        manual_focus=manual_focus,
        options=SweepOptions(allow_drift=allow_drift),
        train_steps=train_steps,
        host=host,
        port=port,
        browser=browser,
    )


@app.command("demo")
def demo_command(
    out: Annotated[Path, typer.Option("--output", "-o", help="Folder for what the demo makes.")] = Path("demo"),
) -> None:
    """Simulated sweep to report, without any hardware, with errors against the truth."""
    from reconstruct import demo

    demo.run(out)


capture.cli.register(app)
calibration.cli.register(app)
reconstruct.train_cli.register(app)


def main() -> None:
    """Run `daif`; an error becomes one sentence on stderr and the exit code of design section 4."""
    _unwind_on_sigterm()
    try:
        app()
    except DaifError as error:
        _fail(str(error), error.exit_code)
    except SystemExit as end:
        if end.code == INTERRUPTED and isinstance(end.__context__, typer.Exit):  # what typer makes of Ctrl-C
            _fail("interrupted; run the same command again to continue", INTERRUPTED)
        if end.code == TERMINATED:  # from the handler below: nothing was said yet
            _fail("terminated; run the same command again to continue", TERMINATED)
        raise
    except OSError as error:
        if disk_is_full(error):
            _fail(
                f"no space left on the device while writing {error.filename or 'the result'}; free some and run again",
                7,
            )
        _fail(f"this is a bug in daif: {type(error).__name__}: {error} (--debug shows where)", 1)
    except Exception as error:
        _fail(f"this is a bug in daif: {type(error).__name__}: {error} (--debug shows where)", 1)


def _unwind_on_sigterm() -> None:
    """SIGTERM shall end this process as Ctrl-C does, through every `with`; forked children keep the default.

    Ranks of torchrun keep it too: it waits for their end, and one that waits for the others would not hear of it.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return
    main_process = os.getpid()

    def end(number: int, _: object) -> None:
        if os.getpid() != main_process:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        raise SystemExit(TERMINATED)  # no Exception, so that whoever goes on past failures does not go on past this

    signal.signal(signal.SIGTERM, end)


def _fail(sentence: str, exit_code: int) -> None:
    if _options["debug"]:
        traceback.print_exc()
    print(f"daif: {sentence}", file=sys.stderr)
    raise SystemExit(exit_code)
