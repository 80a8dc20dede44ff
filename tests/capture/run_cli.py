"""`daif` inside the test's process: as fast as a function call, with exit code and both streams."""

from __future__ import annotations

import contextlib
import io
import sys
from typing import NamedTuple


class Done(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run_daif(*arguments: str) -> Done:
    """Run `daif` with `arguments`."""
    from reconstruct.cli import main

    before, sys.argv = sys.argv, ["daif", *arguments]
    code = 0
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
        finally:
            sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())
