"""Many stacks, one after the other: find them, skip finished ones, keep going past failures.

`process_stack` is the whole job for one stack; the same function runs in this process and on Dask workers.
"""

from __future__ import annotations

import hashlib
import platform
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from capture.decode import to_srgb8
from capture.errors import DaifError, DataError, SomeFailedError, UsageError
from capture.importer import IMAGE_SUFFIXES, import_folder
from capture.lens import LensProfile
from capture.stack import FocalStack
from reconstruct import export, metrics, report, result
from reconstruct.infer import Report, Settings, reconstruct


@dataclass(frozen=True)
class Job:
    """What to do with every stack; everything in it can be sent to another machine."""

    out: Path
    settings: Settings = field(default_factory=Settings)
    lens: Path | None = None
    depth_unit: export.DepthUnit = "mm"
    formats: tuple[str, ...] = ()
    force: bool = False


def stack_name(path: Path) -> str:
    """The name of the output folder of a stack file or an image folder."""
    return path.name.removesuffix(".partial").removesuffix(".h5") if path.is_file() else path.resolve().name


def find_stacks(paths: Iterable[Path]) -> list[Path]:
    """Stack files and image folders among `paths` and, recursively, below those that are folders.

    Raises UsageError for a path that does not exist, DataError when nothing is found, or two stacks would
    write the same output folder.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UsageError(f"{path} does not exist; give a stack (.h5) or a folder of stacks or photographs")
        found += [path] if path.is_file() else _below(path)
    if not found:
        listed = ", ".join(str(path) for path in paths)
        raise DataError(f"no focal stack in {listed}: expected .h5 files or folders with at least two photographs")
    names: dict[str, Path] = {}
    for path in found:
        other = names.setdefault(stack_name(path), path)
        if other != path:
            raise UsageError(f"{other} and {path} would both write {stack_name(path)}/; rename one of them")
    return found


def _below(folder: Path) -> list[Path]:
    found = sorted(folder.glob("*.h5"))
    images = [p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES]
    if (folder / "stack.yaml").is_file() or (len(images) >= 2 and not result.is_complete(folder)):
        found.append(folder)
    for child in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if not result.is_complete(child):
            found += _below(child)
    return found


def process_stack(path: Path, job: Job, progress: Report = lambda what, share: None) -> dict[str, Any]:
    """Reconstruct one stack into `job.out` and return its record; raises DaifError with one clear sentence."""
    profile = LensProfile.read(job.lens) if job.lens else None
    if path.is_dir():
        with tempfile.TemporaryDirectory(prefix="daif-import-") as scratch:
            imported = Path(scratch) / f"{stack_name(path)}.h5"
            import_folder(path, imported)
            return _process_file(imported, path, job, profile, progress)
    return _process_file(path, path, job, profile, progress)


def _process_file(file: Path, source: Path, job: Job, profile: LensProfile | None, progress: Report) -> dict[str, Any]:
    with FocalStack.open(file, allow_partial=file.suffix == ".partial") as stack:
        answer = reconstruct(stack, job.settings, profile, progress)
        answer.name = stack_name(source)
        answer.record["input"] = {"file": str(source), "sha256": _sha256(file), "frames": stack.n_frames}
        answer.record["lens_profile"] = (
            {"file": str(job.lens), "sha256": _sha256(job.lens)} if job.lens is not None else None
        )
        answer.record["versions"] = {
            "daif": metadata.version("daif"),
            "python": platform.python_version(),
            **{name: metadata.version(name) for name in ("torch", "numpy", "h5py")},
        }
        truth = truth_of(stack, answer)
        page = report.render_report(answer, thumbnails(stack), truth)
        folder = result.save(
            answer,
            job.out,
            depth_unit=job.depth_unit,
            extra_formats=job.formats,
            exif=stack.exif,
            report_html=page,
            replace=job.force,
        )
    return {"folder": folder, **answer.record}


def thumbnails(stack: FocalStack) -> list[tuple[np.ndarray, str]]:
    """(sRGB image, label) of every frame, small."""
    pictures = []
    for i in range(stack.n_frames):
        linear = stack.linear(i)
        scale = min(1.0, report.THUMBNAIL_PX / stack.width)
        size = max(1, round(stack.width * scale)), max(1, round(stack.height * scale))
        small = cv2.resize(linear, size, interpolation=cv2.INTER_AREA)
        distance = stack.focus_distance_m[i]
        where = "unknown focus distance" if np.isnan(distance) else f"focused at {report.format_length(distance)}"
        pictures.append((to_srgb8(small), f"frame {i}: {where}"))
    return pictures


def truth_of(stack: FocalStack, answer: result.Reconstruction) -> report.Truth | None:
    """The stack's own ground truth (simulated stacks) as the report wants it, or None."""
    if stack.truth_depth_m is None or not answer.metric:
        return None
    scores = metrics.depth_metrics(answer, stack.truth_depth_m)
    if stack.truth_aif is not None:
        scores |= metrics.image_metrics(answer.aif, stack.truth_aif)
    answer.record["errors"] = scores
    rows = [[metrics.LABELS.get(name, name), f"{value:.4g}"] for name, value in scores.items()]
    return report.Truth(stack.truth_depth_m, ["measure", answer.record["method"]["name"]], rows, metrics.NOTE)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass
class Outcome:
    """What became of one stack."""

    path: Path
    status: str  # "done", "skipped" or "failed"
    seconds: float = 0.0
    error: str = ""


def run(paths: Sequence[Path], job: Job) -> list[Outcome]:
    """Process `paths` one after the other with a progress bar; a failed stack is named and the others finish.

    Raises SomeFailedError at the end if any failed; the error itself when there was only one stack.
    """
    console = Console(stderr=True)
    outcomes = []
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TimeElapsedColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bars:
        for number, path in enumerate(paths, start=1):
            name = stack_name(path)
            if result.is_complete(job.out / name) and not job.force:
                outcomes.append(Outcome(path, "skipped"))
                print(f"{job.out / name}: complete already, skipped (--force does it again)")
                continue
            task = bars.add_task(name, total=1.0)

            def show(what: str, share: float, task: TaskID = task, name: str = name) -> None:
                bars.update(task, description=f"{name}: {what}", completed=share)

            try:
                record = process_stack(path, job, show)
            except DaifError as error:
                if len(paths) == 1:
                    raise
                console.print(f"daif: {error}", markup=False, highlight=False, soft_wrap=True)
                outcomes.append(Outcome(path, "failed", error=str(error)))
                continue
            finally:
                bars.remove_task(task)
            seconds = record["summary"]["seconds"]
            outcomes.append(Outcome(path, "done", seconds))
            for warning in record["warnings"]:
                console.print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)
            print(f"{record['folder']}: {number} of {len(paths)}, {seconds:.1f} s; open {record['folder']}/report.html")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if failed:
        names = ", ".join(stack_name(outcome.path) for outcome in failed)
        raise SomeFailedError(f"{len(failed)} of {len(paths)} stacks failed: {names}; the others are in {job.out}")
    return outcomes
