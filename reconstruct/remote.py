"""Stacks and results that live elsewhere: any URL that fsspec and the user's drivers know (s3://, gs://, memory://).

A stack is copied here, worked on, and its result copied back; nothing else of the project knows about URLs.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from capture.errors import DataError, UsageError
from reconstruct import result


def is_url(location: str) -> bool:
    """Whether `location` is a URL rather than a path."""
    return "://" in location


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of `url` and the path in it; UsageError when its driver is not installed."""
    import fsspec

    try:
        return fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url}: {error}") from None


def find(url: str) -> list[str]:
    """URLs of the stack files at or below `url`; raises UsageError if there is nothing at that address."""
    files, path = filesystem(url)
    if not files.exists(path):
        raise UsageError(f"{url} does not exist")
    if files.isfile(path):
        return [url]
    return [files.unstrip_protocol(name) for name in sorted(files.find(path)) if name.endswith(".h5")]


def fetch(location: str, scratch: Path) -> Path:
    """`location` as a local path; a URL is copied into `scratch`."""
    if not is_url(location):
        return Path(location)
    files, path = filesystem(location)
    target = scratch / path.rstrip("/").rsplit("/", 1)[-1]
    try:
        files.get_file(path, str(target))
    except FileNotFoundError:
        raise DataError(f"{location} does not exist any more") from None
    return target


def is_complete(out: str, name: str) -> bool:
    """Whether the result `name` is finished in `out`."""
    if not is_url(out):
        return result.is_complete(Path(out) / name)
    files, path = filesystem(out)
    return bool(files.exists(f"{path.rstrip('/')}/{name}/{result.RECORD}"))


def read_record(out: str, name: str) -> dict[str, Any]:
    """The record of the finished result `name` in `out`, with `folder` as `job.write` adds it."""
    folder = f"{out.rstrip('/')}/{name}"
    if is_url(out):
        files, path = filesystem(folder)
        text = files.cat_file(f"{path}/{result.RECORD}").decode()
    else:
        text = (Path(folder) / result.RECORD).read_text(encoding="utf-8")
    return {"folder": folder, **json.loads(text)}


def prepare_output(out: str) -> None:
    """Make the output folder, clear it of what killed runs left, and try to write there before hours of work.

    Raises UsageError if it cannot be written.
    """
    try:
        if is_url(out):
            files, path = filesystem(out)
            files.makedirs(path, exist_ok=True)
            return
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        result.remove_leftovers(Path(out))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{out} cannot be written ({reason}); choose another output folder with -o") from None


@contextlib.contextmanager
def output_folder(out: str) -> Iterator[Path]:
    """A local folder to write results into; for a URL they are uploaded at the end, the record last."""
    if not is_url(out):
        yield Path(out)
        return
    files, path = filesystem(out)
    with tempfile.TemporaryDirectory(prefix="daif-") as scratch:
        yield Path(scratch)
        written = sorted(Path(scratch).rglob("*"), key=lambda file: file.name == result.RECORD)
        for file in (file for file in written if file.is_file()):
            target = f"{path.rstrip('/')}/{file.relative_to(scratch).as_posix()}"
            files.makedirs(target.rsplit("/", 1)[0], exist_ok=True)
            files.put_file(str(file), target)
