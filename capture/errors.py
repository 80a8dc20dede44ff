"""Errors that end a command with one sentence and a documented exit code."""

from __future__ import annotations

import re
import signal


def without_password(text: str) -> str:
    """`text`, a URL or anything that URLs stand in, as it may be shown and stored: user names without passwords."""
    return re.sub(r"""(://[^\s/:@"']*):[^\s/"']*@""", r"\1@", text)


class DaifError(Exception):
    """Something the user can act on; its text is the one sentence that they see.

    The sentence names the file, the field, what was expected, what was found and what to do.
    """

    exit_code = 1

    def __str__(self) -> str:
        return without_password(super().__str__())


class UsageError(DaifError):
    """Bad command line or configuration."""

    exit_code = 2


class SomeFailedError(DaifError):
    """Some items of a list failed; each was named, the others were finished."""

    exit_code = 3


class StoppedError(DaifError):
    """Asked to stop, by Ctrl-C (exit code 130) or by the system (143); the text says how to go on."""

    def __init__(self, message: str, signal_number: int = signal.SIGINT) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class LockedError(DaifError):
    """Another process, which the text names, holds the file or the camera."""

    exit_code = 5


class DataError(DaifError):
    """A file cannot be trusted: damaged, of the wrong shape, or out of physical range."""

    exit_code = 6


class NoSpaceError(DaifError):
    """The disk, or the memory, is too small for what was asked."""

    exit_code = 7
