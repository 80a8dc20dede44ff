"""Names that results are written under: what is refused before any work begins, text that is whole or not there, full
disks."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

from capture.errors import NoSpaceError, UsageError

MAX_NAME_BYTES = 240  # file systems take 255, and `.creating` or `.lock` is added while a file is being written


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Raises UsageError unless a file can be written at `path`; an existing one needs `overwrite`."""
    n_bytes = len(os.fsencode(path.name))
    if n_bytes > MAX_NAME_BYTES:
        raise UsageError(
            f"the name {path.name[:40]}... has {n_bytes} bytes, {MAX_NAME_BYTES} at most can be written; shorten it"
        )
    if path.is_dir():
        raise UsageError(f"{path} is a folder and a file is written there; give a file's name, such as {path / 'name'}")
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already; choose another name, or overwrite it with --force")
    check_writable(path.parent)


def check_writable(folder: Path) -> None:
    """Raises UsageError unless files can be made in `folder`."""
    if not folder.is_dir():
        raise UsageError(f"the folder {folder} does not exist; create it, or choose another")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"the folder {folder} is not writable; choose another, or change its permissions")


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path`, whole or not at all; it replaces what `check_output` did not refuse."""
    check_output(path, overwrite=True)
    temporary = path.with_name(f".{os.getpid()}.writing")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror}; choose another name or folder") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def disk_is_full(error: OSError) -> bool:
    """Whether `error` is what the system, or NumPy without the system's number, raise on a full disk."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or "requested and" in str(error)


@contextlib.contextmanager
def room_in(folder: Path, what: str, instead: str = "use another -o") -> Iterator[None]:
    """A full disk, met while `what` is written into `folder`, becomes a NoSpaceError."""
    try:
        yield
    except OSError as error:
        if disk_is_full(error):
            raise NoSpaceError(f"{folder} has no room for {what}; free some, or {instead}") from None
        raise
