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

from capture.errors import DaifError, DataError, NoSpaceError, UsageError, without_password
from capture.output import disk_is_full
from reconstruct import result


def is_url(location: str) -> bool:
    """Whether `location` is a URL rather than a path."""
    return "://" in location


@contextlib.contextmanager
def _reaching(url: str) -> Iterator[tuple[Any, str]]:
    """The fsspec file system of `url`, nothing in its memory of listings, and the path in it.

    Raises UsageError for whatever its driver raises, and each driver has exceptions of its own.
    """
    import fsspec

    try:
        files, path = fsspec.core.url_to_fs(url)
        files.invalidate_cache()
        yield files, path.rstrip("/")
    except (ImportError, ValueError) as error:
        raise UsageError(f"{url}: {error}") from None
    except DaifError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and disk_is_full(error):
            raise NoSpaceError(f"{tempfile.gettempdir()} has no room for {url}; set TMPDIR to another disk") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UsageError(
            f"{url} cannot be reached or used ({reason}); check the address, the network and your credentials"
        ) from None


def listing(url: str) -> dict[str, dict[str, int]]:
    """Size in bytes of every file below `url`, {URL of its folder: {name: size}}; of `url` itself if it is a file.

    Folders of finished results and hidden ones are left out. Raises UsageError if there is nothing at that address.
    """
    with _reaching(url) as (files, path):
        if not files.exists(path):
            raise UsageError(f"{url} does not exist")
        if files.isfile(path):
            folder, _, name = url.rpartition("/")
            return {folder: {name: files.size(path)}}
        folders: dict[str, dict[str, int]] = {}
        for found, about in sorted(files.find(path, detail=True).items()):
            inside, _, name = found[len(path) :].rpartition("/")
            folders.setdefault(inside, {})[name] = about["size"]
    return {
        url.rstrip("/") + inside: sizes
        for inside, sizes in folders.items()
        if result.RECORD not in sizes and not any(part.startswith(".") for part in inside.split("/"))
    }


def state(location: str) -> str:
    """What tells the file at `location` from another that is or was there: its size, its time, and more for a URL."""
    if is_url(location):
        with _reaching(location) as (files, path):
            return f"{location} {files.info(path)}"
    file = Path(location)
    try:
        stat = file.stat()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror})") from None
    return f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def fetch(location: str, scratch: Path) -> Path:
    """`location`, a file or a folder of photographs, as a local path; a URL is copied into `scratch`."""
    if not is_url(location):
        return Path(location)
    with _reaching(location) as (files, path):
        target = scratch / path.rpartition("/")[2]
        if files.isfile(path):
            files.get_file(path, str(target))
        elif files.isdir(path):
            target.mkdir()
            for about in files.ls(path, detail=True):
                if about["type"] == "file":
                    files.get_file(about["name"], str(target / about["name"].rpartition("/")[2]))
        else:
            raise DataError(f"{location} does not exist any more")
    return target


def is_complete(out: str, name: str) -> bool:
    """Whether the result `name` is finished in `out`."""
    if not is_url(out):
        return result.is_complete(Path(out) / name)
    with _reaching(out) as (files, path):
        return bool(files.exists(f"{path}/{name}/{result.RECORD}"))


def check_target(out: str, name: str, stack: str, *, replace: bool) -> None:
    """Raise UsageError if the result `name` in `out` would take the place of `stack` itself or of what is no result.

    In a bucket nothing is ever removed, and what a killed upload left there looks like anybody's folder: only the
    stack itself is protected.
    """
    if is_url(out):
        holds_stack = f"{stack.rstrip('/')}/".startswith(f"{out.rstrip('/')}/{name}/")
    else:
        holds_stack = not is_url(stack) and Path(stack).resolve().is_relative_to((Path(out) / name).resolve())
    if holds_stack:
        raise UsageError(
            f"{stack}: its result would go to {shown_folder(out, name)}, where the stack itself lies; "
            "choose another output folder with -o"
        )
    if not is_url(out):
        result.check_target(Path(out) / name, replace=replace)


def shown_folder(out: str, name: str) -> str:
    """Where the result `name` in `out` lies, as users are told."""
    return without_password(f"{out.rstrip('/')}/{name}")


def read_record(out: str, name: str) -> dict[str, Any]:
    """The record of the finished result `name` in `out`, with `folder` as `job.write` adds it."""
    if is_url(out):
        with _reaching(out) as (files, path):
            text = files.cat_file(f"{path}/{name}/{result.RECORD}").decode()
    else:
        text = (Path(out) / name / result.RECORD).read_text(encoding="utf-8")
    return {"folder": shown_folder(out, name), **json.loads(text)}


def prepare_output(out: str) -> None:
    """Make the output folder, clear it of what killed runs left, and try to write there before hours of work.

    Raises UsageError if it cannot be written.
    """
    if is_url(out):
        with _reaching(out) as (files, path):
            files.makedirs(path, exist_ok=True)
        return
    try:
        Path(out).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        result.remove_leftovers(Path(out))
    except OSError as error:
        reason = error.strerror or str(error)
        raise UsageError(f"{out} cannot be written ({reason}); choose another output folder with -o") from None


@contextlib.contextmanager
def output_folder(out: str) -> Iterator[Path]:
    """A local folder to write results into; for a URL they are uploaded at the end.

    The record, which makes a result complete, goes up last; that of a result to be replaced goes first, so that no
    mixture of the two ever counts as complete.
    """
    if not is_url(out):
        yield Path(out)
        return
    with tempfile.TemporaryDirectory(prefix="daif-") as scratch:
        yield Path(scratch)
        written = sorted(
            (file for file in Path(scratch).rglob("*") if file.is_file()), key=lambda file: file.name == result.RECORD
        )
        with _reaching(out) as (files, path):
            targets = {file: f"{path}/{file.relative_to(scratch).as_posix()}" for file in written}
            for file, target in targets.items():
                if file.name == result.RECORD and files.exists(target):
                    files.rm_file(target)
            for file, target in targets.items():
                files.makedirs(target.rpartition("/")[0], exist_ok=True)
                files.put_file(str(file), target)
