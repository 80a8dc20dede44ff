"""The whole job for one stack: read, reconstruct, report, write. Runs in this process or on a worker alike."""

from __future__ import annotations

import contextlib
import platform
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from capture.decode import to_srgb8
from capture.errors import DaifError, without_password
from capture.importer import import_folder
from capture.lens import LensProfile
from capture.stack import FocalStack, file_sha256
from reconstruct import evaluate, export, metrics, remote, report, result
from reconstruct.infer import Clock, Overview, Report, Settings, plan_memory, read_overview, reconstruct


@dataclass(frozen=True)
class Job:
    """What to do with every stack; everything in it can be sent to another machine.

    Attributes:
        out: folder of the results, a local path or a URL that fsspec knows.
        settings: how to reconstruct.
        lens: lens profile to use instead of what the stack says.
        depth_unit: unit of depth.png.
        formats: extra output formats.
        force: replace results that are there.
    """

    out: str
    settings: Settings = field(default_factory=Settings)
    lens: Path | None = None
    depth_unit: export.DepthUnit = "mm"
    formats: tuple[str, ...] = ()
    force: bool = False


@dataclass
class Solved:
    """A reconstruction that only has to be written."""

    answer: result.Reconstruction
    page: str
    exif: bytes | None


def stack_name(location: str) -> str:
    """The name of the output folder of a stack file or an image folder."""
    name = location.rstrip("/").rsplit("/", 1)[-1] or Path(location).resolve().name
    return name.removesuffix(".partial").removesuffix(".h5") or Path(location).resolve().name


def process_stack(location: str, job: Job, progress: Report = lambda what, share: None) -> dict[str, Any]:
    """Reconstruct one stack into `job.out` and return its record; raises DaifError with one clear sentence."""
    return write(solve(location, job, progress), job)


def solve(
    location: str,
    job: Job,
    progress: Report = lambda what, share: None,
    announce: Callable[[str], None] = lambda line: None,
) -> Solved:
    """The reconstruction of the stack at `location`: a file or a folder of photographs, by path or URL.

    `announce` gets the memory that will be used, before it is.
    """
    clock = Clock()
    export.check_formats(job.formats)  # again: this may be another machine than the one that was asked
    profile = LensProfile.read(job.lens) if job.lens else None
    with tempfile.TemporaryDirectory(prefix="daif-") as scratch, _named(location, scratch):
        file = remote.fetch(location, Path(scratch))
        if file.is_dir():
            folder, file = file, Path(scratch) / f"{stack_name(location)}.h5"
            import_folder(folder, file)
        with FocalStack.open(file, allow_partial=file.suffix == ".partial") as stack:
            announce(str(plan_memory(stack, job.settings, profile)))
            overview = read_overview(stack)
            source_sha256 = file_sha256(file)
            clock.lap("read")
            answer = reconstruct(stack, job.settings, profile, progress, overview=overview)
            inner = Clock()
            answer.name = stack_name(location)
            answer.record["input"] = {
                "file": without_password(location),
                "sha256": source_sha256,
                "frames": stack.n_frames,
            }
            lens_sha256 = file_sha256(job.lens) if job.lens else None
            answer.record["lens_profile"] = {"file": str(job.lens), "sha256": lens_sha256} if job.lens else None
            answer.record["versions"] = {
                "daif": metadata.version("daif"),
                "python": platform.python_version(),
                **{name: metadata.version(name) for name in ("torch", "numpy", "h5py")},
            }
            truth = _truth(stack, answer)
            page = report.render_report(answer, _thumbnails(stack, overview), truth)
            inner.lap("report")
            for name in ("seconds", "cpu_seconds"):
                stages = {**getattr(clock, name), **answer.record[name], **getattr(inner, name)}
                stages["read"] = getattr(clock, name)["read"] + answer.record[name]["read"]
                answer.record[name] = stages
            return Solved(answer, page, stack.exif)


@contextlib.contextmanager
def _named(location: str, scratch: str) -> Iterator[None]:
    """Errors about a copy of a stack in `scratch` are told as errors of the stack."""
    try:
        yield
    except DaifError as error:
        copies = f"{re.escape(scratch)}/{re.escape(stack_name(location))}(\\.h5)?"
        error.args = (re.sub(copies, lambda _: location, str(error)),)
        raise


def write(solved: Solved, job: Job) -> dict[str, Any]:
    """Write the result folder and return its record with `folder` added."""
    answer = solved.answer
    clock = Clock()
    with remote.output_folder(job.out) as out:
        folder = result.save(
            answer,
            out,
            depth_unit=job.depth_unit,
            extra_formats=job.formats,
            exif=solved.exif,
            report_html=solved.page,
            replace=job.force,
        )
    clock.lap("write")
    for name in ("seconds", "cpu_seconds"):
        answer.record[name] |= getattr(clock, name)
    return {"folder": remote.shown_folder(job.out, folder.name), **answer.record}


def _thumbnails(stack: FocalStack, overview: Overview) -> list[tuple[np.ndarray, str]]:
    """(sRGB image, label) of every frame, small."""
    pictures = []
    height, width = overview.frames.shape[1:3]
    scale = min(1.0, report.THUMBNAIL_PX / width)
    size = max(1, round(width * scale)), max(1, round(height * scale))
    for i, frame in enumerate(overview.frames):
        small = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        distance = stack.focus_distance_m[i]
        where = "unknown focus distance" if np.isnan(distance) else f"focused at {report.format_length(distance)}"
        pictures.append((to_srgb8(small), f"frame {i + 1}: {where}"))
    return pictures


def _truth(stack: FocalStack, answer: result.Reconstruction) -> report.Truth | None:
    """The stack's own ground truth (simulated stacks) as the report wants it, or None."""
    truth_m = stack.truth_depth_m
    if truth_m is None or not answer.metric or not metrics.known_pixels(truth_m).any():
        return None
    columns = [answer] if answer.baseline is None else [answer, answer.baseline]
    columns = [column for column in columns if column.confidence.shape == truth_m.shape]
    scores = [evaluate.score(column, truth_m, stack.truth_aif) for column in columns]
    names = [column.record["method"]["name"] for column in columns]
    answer.record["errors"] = dict(zip(names, scores, strict=True))
    rows = [[metrics.LABELS.get(name, name), *(f"{score[name]:.4g}" for score in scores)] for name in scores[0]]
    return report.Truth(truth_m, ["measure", *names], rows, metrics.NOTE)
