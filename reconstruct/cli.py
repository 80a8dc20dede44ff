"""The `daif` command: reconstruction commands, and the assembly of all the others."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Annotated

import typer

import calibration.cli
import capture.cli
from capture.errors import DaifError

app = typer.Typer(
    name="daif",
    help="From a focus sweep to metric depth and an all-in-focus image.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
_options = {"debug": False}


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


capture.cli.register(app)
calibration.cli.register(app)


def main() -> None:
    """Run `daif`; an error becomes one sentence on stderr and the exit code of design section 4."""
    try:
        app()
    except DaifError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted; run the same command again to continue", 130)
    except OSError as error:
        if error.errno == 28:  # ENOSPC
            _fail(
                f"no space left on the device while writing {error.filename or 'the result'}; free some and run again",
                7,
            )
        _fail(f"this is a bug in daif: {type(error).__name__}: {error} (--debug shows where)", 1)
    except Exception as error:
        _fail(f"this is a bug in daif: {type(error).__name__}: {error} (--debug shows where)", 1)


def _fail(sentence: str, exit_code: int) -> None:
    if _options["debug"]:
        traceback.print_exc()
    print(f"daif: {sentence}", file=sys.stderr)
    raise SystemExit(exit_code)
