"""Many stacks: find them, skip finished ones, share them out, keep going past failures, say what became of each."""

from __future__ import annotations

import functools
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from capture import sweep
from capture.decode import is_image_name
from capture.errors import DaifError, DataError, NoSpaceError, SomeFailedError, UsageError, without_password
from capture.importer import STACK_FILE
from reconstruct import cluster, memory, remote, result
from reconstruct.checkpoint import weights_file
from reconstruct.infer import Report
from reconstruct.job import Job, process_stack, solve, stack_name, write

SETTLED_S = 3.0  # what appears in a hot folder must have kept its size for so long
POLL_S = 2.0


@dataclass
class Outcome:
    """What became of one stack: `done`, `skipped` or `failed`."""

    stack: str
    status: str
    seconds: float = 0.0
    folder: str = ""
    error: str = ""
    cpu_seconds: dict[str, float] = field(default_factory=dict)


def find_stacks(locations: Sequence[str]) -> list[str]:
    """Stack files and image folders among `locations` and, recursively, below those that are folders; largest first.

    Raises UsageError for one that does not exist or when two stacks would write the same result, DataError when
    nothing is found.
    """
    found = _sizes(locations)
    if not found:
        raise DataError(
            f"no focal stack in {', '.join(locations)}: expected .h5 files or folders of at least two photographs"
        )
    names: dict[str, str] = {}
    for stack in found:
        other = names.setdefault(stack_name(stack), stack)
        if other != stack:
            raise UsageError(f"{other} and {stack} would both write {stack_name(stack)}/; rename one of them")
    return sorted(found, key=lambda stack: -found[stack])


def _sizes(locations: Sequence[str]) -> dict[str, int]:
    """Every stack at or below `locations` with its size in bytes."""
    found: dict[str, int] = {}
    for location in locations:
        if remote.is_url(location):
            for folder, sizes in remote.listing(location).items():
                found |= {f"{folder}/{name}": size for name, size in sizes.items() if name.endswith(".h5")}
                if _holds_photographs(sizes):
                    found[folder] = sum(sizes.values())
            continue
        path = Path(location)
        if not path.exists():
            raise UsageError(f"{path} does not exist; give a stack (.h5) or a folder of stacks or photographs")
        found |= {str(p): _size(p) for p in ([path] if path.is_file() else _below(path))}
    return found


def _holds_photographs(names: Collection[str]) -> bool:
    return STACK_FILE in names or sum(map(is_image_name, names)) > 1


def _below(folder: Path) -> Iterator[Path]:
    children = sorted(folder.iterdir())
    yield from (child for child in children if child.suffix == ".h5" and child.name[0] != "." and child.is_file())
    if _holds_photographs([child.name for child in children]):
        yield folder
    for child in children:
        if child.is_dir() and not child.name.startswith(".") and not result.is_complete(child):
            yield from _below(child)


def _size(path: Path) -> int:
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())


def run(
    stacks: Sequence[str],
    job: Job,
    *,
    workers: int = 1,
    address: str | None = None,
    ended: list[Outcome] | None = None,
) -> list[Outcome]:
    """Reconstruct `stacks`, here or on Dask workers; prints a line for each and writes `batch.json` into the output.

    A stack whose result would take the place of anything but a result fails before any work is done.

    Args:
        ended: what became of other stacks before; `batch.json` lists it too, and what ends here is added to it.

    Raises SomeFailedError at the end if any failed; with a single stack its own error instead.
    """
    remote.prepare_output(job.out)
    todo = [stack for stack in stacks if job.force or not remote.is_complete(job.out, stack_name(stack))]
    outcomes = [
        Outcome(stack, "skipped", folder=remote.shown_folder(job.out, stack_name(stack)))
        for stack in stacks
        if stack not in todo
    ]
    for outcome in outcomes:
        print(f"{outcome.folder}: complete already, skipped (--force does it again)")
    console = Console(stderr=True)
    for stack in list(todo):
        try:
            remote.check_target(job.out, stack_name(stack), stack, replace=job.force)
        except UsageError as error:
            outcomes.append(_failed(stack, error, alone=len(stacks) == 1))
            todo.remove(stack)
            _say_failed(console, outcomes[-1])
    ended = [] if ended is None else ended
    _write_summary(job, ended + outcomes)  # if it cannot be written, better now than after hours of work
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        whole = bars.add_task("stacks", total=len(todo), visible=len(todo) > 1)
        if not todo:
            ends: Iterator[Outcome] = iter(())
        elif workers > 1 or address is not None:
            ends = _on_workers(todo, job, workers, address)
        else:
            ends = _here(todo, job, bars)
        try:
            for outcome in ends:
                outcomes.append(outcome)
                bars.advance(whole)
                if outcome.status == "failed":
                    _say_failed(console, outcome)
                else:
                    print(
                        f"{outcome.folder}: {outcome.seconds:.1f} s; look at {outcome.folder}/report.html", flush=True
                    )
        finally:
            ended += outcomes
            _write_summary(job, ended)
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    if len(stacks) > 1:
        _print_table(outcomes)
    if failed:
        names = ", ".join(stack_name(outcome.stack) for outcome in failed)
        raise SomeFailedError(f"{len(failed)} of {len(stacks)} stacks failed: {names}; the others are in {job.out}")
    return outcomes


def watch(locations: Sequence[str], job: Job, **where: Any) -> None:
    """Reconstruct every stack that appears in `locations`, until interrupted; a failed one is tried once."""
    tried: set[str] = set()
    ended: list[Outcome] = []
    seen: dict[str, tuple[int, float]] = {}  # stack: its size, and since when it has had it
    said = ""
    sizes = _sizes(locations)
    print(f"watching {without_password(', '.join(locations))}   (Ctrl-C ends it)", flush=True)
    while True:
        now = time.monotonic()
        seen |= {stack: (size, now) for stack, size in sizes.items() if seen.get(stack, (-1, now))[0] != size}
        settled = [stack for stack in sizes if stack not in tried and now - seen[stack][1] >= SETTLED_S]
        try:
            fresh = [stack for stack in settled if not remote.is_complete(job.out, stack_name(stack))]
            tried.update(settled)
            if fresh:
                run(fresh, job, ended=ended, **where)
            time.sleep(POLL_S)
            sizes = _sizes(locations)
        except (DaifError, OSError) as error:  # also a bucket that is out of reach for a while
            if str(error) != said:
                Console(stderr=True).print(f"daif: {error}", markup=False, highlight=False, soft_wrap=True)
            said = str(error)


def follow(location: str, job: Job) -> None:
    """Reconstruct a stack that is still being captured, again whenever frames were added, until it is complete.

    Each answer replaces the one before, an older run's too, and nothing else.
    Raises DataError if the capture ends before two frames are there; UsageError where something else lies there.
    """
    remote.prepare_output(job.out)
    remote.check_target(job.out, stack_name(location), location, replace=True)
    again = replace(job, force=True)
    done, warnings = 0, []
    for state in sweep.follow(Path(location)):
        if state.n_frames < 2 or state.n_frames == done:
            continue
        record = process_stack(str(state.path), again)
        done, warnings = state.n_frames, record["warnings"]
        print(
            f"{record['folder']}: {done} of {state.n_planned} frames, {record['summary']['seconds']:.1f} s", flush=True
        )
    _say_warnings(warnings)
    if done == 0:
        raise DataError(f"{location}: no two frames were captured; start `daif capture` first, or give the right path")


def _here(stacks: Sequence[str], job: Job, bars: Progress) -> Iterator[Outcome]:
    """In this process; while one stack is computed the one before it is written."""
    with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
        writing: tuple[str, Future[dict[str, Any]]] | None = None
        said: set[str] = set()

        def announce(line: str) -> None:
            what = line.partition(" of ")[0]
            if what not in said:  # once for every size of stack
                said.add(what)
                bars.console.print(line, markup=False, highlight=False, soft_wrap=True)

        for stack in stacks:
            task = bars.add_task(stack_name(stack), total=1.0)
            try:
                solved = solve(stack, job, _shown(bars, task, stack_name(stack)), announce)
            except Exception as error:
                solved, problem = None, error
            finally:
                bars.remove_task(task)
            if writing is not None:
                yield _ended(*writing, alone=len(stacks) == 1)
                writing = None
            if solved is None:
                yield _failed(stack, problem, alone=len(stacks) == 1)
            else:
                writing = stack, writer.submit(write, solved, job)
        if writing is not None:
            yield _ended(*writing, alone=len(stacks) == 1)


def _shown(bars: Progress, task: TaskID, name: str) -> Report:
    return lambda what, share: bars.update(task, description=f"{name}: {what}", completed=share)


def _ended(stack: str, future: Future[dict[str, Any]], *, alone: bool) -> Outcome:
    try:
        record = future.result()
    except Exception as error:
        return _failed(stack, error, alone=alone)
    return _done(stack, record)


def _done(stack: str, record: dict[str, Any]) -> Outcome:
    _say_warnings(record["warnings"])
    return Outcome(stack, "done", sum(record["seconds"].values()), record["folder"], cpu_seconds=record["cpu_seconds"])


def _say_warnings(warnings: Sequence[str]) -> None:
    for warning in warnings:
        Console(stderr=True).print(f"note: {warning}", markup=False, highlight=False, soft_wrap=True)


def _say_failed(console: Console, outcome: Outcome) -> None:
    console.print(f"daif: {outcome.error}", markup=False, highlight=False, soft_wrap=True)


def _failed(stack: str, error: BaseException, *, alone: bool) -> Outcome:
    if memory.ran_out(error) and not isinstance(error, DaifError):
        error = NoSpaceError(f"{stack}: not enough memory; close other programs, or reduce the frames first")
    if alone:
        raise error
    sentence = (
        str(error) if isinstance(error, DaifError) else f"{stack}: a bug in daif, {type(error).__name__}: {error}"
    )
    return Outcome(stack, "failed", error=sentence)


def _on_workers(stacks: Sequence[str], job: Job, workers: int, address: str | None) -> Iterator[Outcome]:
    threads = max(1, (os.cpu_count() or 1) // max(workers, 1)) if address is None else None
    if address is None:
        job = replace(job, settings=replace(job.settings, memory_share=1 / workers))
    if job.settings.method == "network" and job.settings.weights != "default":
        # here, where it can be seen whether that is a folder
        job = replace(job, settings=replace(job.settings, weights=str(weights_file(job.settings.weights))))
    call: Callable[[str], dict[str, Any]] = functools.partial(_process_on_worker, job=job, threads=threads)
    with cluster.connect(workers, address) as client:
        cluster.send_files(client, _files_of(job))
        for finished in cluster.run_on(client, stacks, call):
            if finished.record is None:
                yield Outcome(finished.item, "failed", error=finished.error)
            else:
                yield _done(finished.item, finished.record)


def _files_of(job: Job) -> list[Path]:
    """The files on this machine that every worker needs: the lens profile, and weights that are not the package's."""
    files = [job.lens] if job.lens else []
    if job.settings.method == "network" and job.settings.weights != "default":
        weights = Path(job.settings.weights)
        files += [weights, weights.with_suffix(".json")]
    return files


def _process_on_worker(stack: str, job: Job, threads: int | None) -> dict[str, Any]:
    """One stack on a worker: its share of the threads, and its own GPU if there are several.

    A worker may have died between finishing the stack and saying so: then the result is there already.
    """
    import torch
    from distributed import get_worker

    if not job.force and remote.is_complete(job.out, stack_name(stack)):
        return remote.read_record(job.out, stack_name(stack))
    lens = cluster.sent_file(job.lens) if job.lens else None
    weights = job.settings.weights
    if job.settings.method == "network" and weights != "default":
        weights = str(cluster.sent_file(Path(weights)))
    job = replace(job, lens=lens, settings=replace(job.settings, weights=weights))
    if threads is not None:
        torch.set_num_threads(threads)
    if job.settings.device == "auto" and torch.cuda.device_count() > 1:
        index = abs(hash(get_worker().name)) if not isinstance(get_worker().name, int) else get_worker().name
        device = f"cuda:{index % torch.cuda.device_count()}"
        job = replace(job, settings=replace(job.settings, device=device))
    return process_stack(stack, job)


def _write_summary(job: Job, outcomes: Sequence[Outcome]) -> None:
    """`batch.json` in the output folder: one entry a stack."""
    with remote.output_folder(job.out) as out:
        partial = out / f".batch.json.{os.getpid()}"
        entries = json.dumps([asdict(o) for o in outcomes], indent=2)
        partial.write_text(without_password(entries) + "\n", encoding="utf-8")
        partial.replace(out / "batch.json")


def _print_table(outcomes: Sequence[Outcome]) -> None:
    counts = {status: sum(o.status == status for o in outcomes) for status in ("done", "skipped", "failed")}
    table = Table()
    for column in ("stack", "status", "s"):
        table.add_column(column, justify="right" if column == "s" else "left")
    for outcome in outcomes:
        table.add_row(stack_name(outcome.stack), outcome.status, f"{outcome.seconds:.1f}" if outcome.seconds else "")
    Console().print(table)
    print(", ".join(f"{count} {status}" for status, count in counts.items()))
