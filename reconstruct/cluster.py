"""Stacks on many workers: Dask carries the calls, this file decides who does what and what a death means.

Every worker thread gets one stack at a time, pinned to it. So a worker that dies takes down only the stacks it
was working on; those are tried once more elsewhere, and a stack that is there at two deaths is set aside and
named. (Dask's own retries also fail innocent stacks that were queued on the dying worker, notes/ecosystem.md 3c.)
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capture.errors import DaifError, SomeFailedError, UsageError

logger = logging.getLogger(__name__)

MAX_DEATHS = 2
POLL_S = 0.1
NO_WORKER_LIMIT_S = 300.0  # a restarted worker imports torch, a queued one waits for its machine
FETCH_LIMIT_S = 10.0  # for one record, some kB
RESTART_LIMIT_S = 100.0  # a local worker that has not restarted by then never will


@dataclass
class Finished:
    """One stack's end: its record, or the sentence that says why there is none."""

    item: str
    record: dict[str, Any] | None = None
    error: str = ""


@dataclass
class _Board:
    """Who is working on what."""

    waiting: deque[str]
    running: dict[Any, tuple[str, str]] = field(default_factory=dict)  # future -> stack, worker address
    deaths: Counter[str] = field(default_factory=Counter)
    misfits: dict[str, str] = field(default_factory=dict)  # worker address -> what is wrong with its versions, if any

    @property
    def left(self) -> int:
        return len(self.waiting) + len(self.running)


@contextlib.contextmanager
def connect(workers: int, address: str | None) -> Iterator[Any]:
    """A Dask client: of the cluster at `address`, or of `workers` new processes on this machine's loopback.

    Raises UsageError if no scheduler answers at `address`, or one of other versions, or one with such workers.
    """
    import dask

    quiet = {"distributed": "critical", "distributed.client": "critical"}  # what matters is said here, in a sentence
    patient = {  # the default, 15 s, is too short for a busy machine
        "distributed.deploy.lost-worker-timeout": f"{RESTART_LIMIT_S}s",
        "distributed.comm.timeouts.connect": "30s",
        "distributed.worker.daemon": False,
    }
    with dask.config.set({"distributed.logging": quiet, "distributed.admin.log-format": "%(message)s", **patient}):
        from distributed import Client, LocalCluster  # takes its log levels from there when it is imported
        from distributed.versions import VersionMismatchWarning

        if address is not None:
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", VersionMismatchWarning)  # `_misfits` tells
                    client = Client(address, timeout="10s")
            except (OSError, ValueError) as error:
                raise UsageError(
                    f"no Dask scheduler answers at {address} ({error}); start one with `dask scheduler`"
                ) from None
            with client:
                for problem in filter(None, _misfits(client).values()):
                    raise UsageError(problem)
                yield client
            return
        # Dask has its workers return freed memory at once; mapping it again took more time than the work itself
        environment = dask.config.get("distributed.nanny.pre-spawn-environ")
        kept = {name: value for name, value in environment.items() if "MALLOC" not in name}
        with (
            dask.config.set({"distributed.nanny.pre-spawn-environ": kept}),
            LocalCluster(
                n_workers=workers,
                threads_per_worker=1,
                host="127.0.0.1",
                dashboard_address="127.0.0.1:0",  # None still listens, on port 8787 of every interface
                silence_logs=50,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield client


def send_files(client: Any, files: Sequence[Path]) -> None:
    """Put `files` on every worker, each worker once, those that join later too; `sent_file` finds them there.

    Raises UsageError if one cannot be read here.
    """
    if not files:
        return
    from distributed import WorkerPlugin

    class Files(WorkerPlugin):
        """Writes the files into the worker's own folder when it starts."""

        name = "daif-files"

        def __init__(self, contents: dict[str, bytes]) -> None:
            self.contents = contents

        def setup(self, worker: Any) -> None:
            for name, content in self.contents.items():
                target = Path(worker.local_directory) / name
                target.parent.mkdir(exist_ok=True)
                target.write_bytes(content)

    try:
        contents = {_sent_name(file): file.read_bytes() for file in files}
    except OSError as error:
        raise UsageError(f"{error.filename} cannot be read ({error.strerror}); correct the path") from None
    client.register_plugin(Files(contents))


def sent_file(file: Path) -> Path:
    """On a worker: where `send_files` put what the client calls `file`."""
    from distributed import get_worker

    return Path(get_worker().local_directory) / _sent_name(file)


def _sent_name(file: Path) -> str:
    """Its own name, in a folder that tells files of one name apart and keeps weights beside their description."""
    return f"daif-{hashlib.sha256(str(file.parent).encode()).hexdigest()[:8]}/{file.name}"


def run_on(client: Any, items: Sequence[str], call: Callable[[str], dict[str, Any]]) -> Iterator[Finished]:
    """Call `call(item)` on the client's workers and yield each item as it ends, in any order.

    Raises SomeFailedError if the scheduler goes away or no worker is there for `NO_WORKER_LIMIT_S`; what was yielded
    stays done.
    """
    board = _Board(waiting=deque(items))
    alone_since: float | None = None
    while board.left:
        capacity = _workers(client, board)
        if capacity is None:
            raise SomeFailedError(
                f"the Dask scheduler has gone away and {board.left} stacks are left; what was finished stays finished, "
                "start a scheduler and run again to do the rest"
            )
        if not capacity:
            alone_since = alone_since or time.monotonic()
            if time.monotonic() - alone_since > NO_WORKER_LIMIT_S:
                raise SomeFailedError(
                    f"no worker has been there for {NO_WORKER_LIMIT_S:.0f} s and {board.left} stacks are left; "
                    "start workers and run again"
                )
        else:
            alone_since = None
        _replace_lost(client, capacity)
        yield from _bury(board, capacity)
        _hand_out(client, board, capacity, call)
        yield from _collect(board)
        time.sleep(POLL_S)


def _workers(client: Any, board: _Board) -> dict[str, int] | None:
    """Threads of every worker that is there now and has our versions; None if there is no scheduler any more.

    One that joined late with other versions would fail every stack that it is given.
    """
    if client.status != "running":
        return None
    from distributed import TimeoutError

    try:  # not `client.scheduler_info`: its cache is emptied of workers every few seconds, also while one reads it
        known = client.sync(client.scheduler.identity, n_workers=-1)["workers"]
        if known.keys() - board.misfits.keys():
            found = _misfits(client)
            for address in found.keys() - board.misfits.keys():
                if found[address]:
                    logger.warning("not used: %s", found[address])
            board.misfits |= found
    except (TimeoutError, OSError):  # went away while it was asked
        return None
    return {address: info["nthreads"] for address, info in known.items() if board.misfits.get(address) == ""}


def _misfits(client: Any) -> dict[str, str]:
    """By address of the scheduler and of every worker, what to say if its versions are not ours, else "".

    The scheduler too unpacks what is sent to the workers.
    """
    found = client.get_versions(packages=["daif"])
    ours = _versions(found["client"])
    machines = {client.scheduler.address: found["scheduler"], **found["workers"]}
    return {
        address: ""
        if (theirs := _versions(about)) == ours
        else f"{address} runs {_listed(theirs)} and this machine {_listed(ours)}; install the same versions on all"
        for address, about in machines.items()
    }


def _versions(about: dict[str, Any]) -> dict[str, str]:
    """What has to be the same on all machines."""
    installed = about["packages"]
    python = ".".join(installed["python"].split(".")[:2])
    return {"Python": python, **{name: installed.get(name) or "missing" for name in ("daif", "distributed")}}


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _replace_lost(client: Any, capacity: dict[str, int]) -> None:
    """Have local workers started in place of those that are gone for good.

    Dask restarts a worker that dies, but not one that dies while it starts; it forgets that one after a while.
    """
    local = client.cluster
    if local is not None and len(capacity) < len(local.worker_spec):
        local.scale(len(local.worker_spec))


def _hand_out(client: Any, board: _Board, capacity: dict[str, int], call: Callable[[str], dict[str, Any]]) -> None:
    busy = Counter(address for _, address in board.running.values())
    for address, threads in capacity.items():
        for _ in range(threads - busy[address]):
            if not board.waiting:
                return
            item = board.waiting.popleft()
            future = client.submit(call, item, workers=[address], allow_other_workers=False, pure=False, retries=0)
            board.running[future] = item, address


def _collect(board: _Board) -> Iterator[Finished]:
    """Take in what has ended.

    A record stays on its worker until it is fetched. If the worker dies before that, Dask would wait for ever for it
    to be computed again there; so the wait is short, and a stack whose record did not come stays on the board, where
    `_bury` finds that its worker is gone.
    """
    from concurrent.futures import CancelledError

    from distributed import TimeoutError  # on Python 3.10 not the built-in one

    for future in [future for future in board.running if future.done()]:
        record = None
        if future.status == "finished":
            try:
                record = future.result(timeout=FETCH_LIMIT_S)
            except (TimeoutError, OSError, CancelledError):
                continue
        item, _ = board.running.pop(future)
        if record is not None:
            yield Finished(item, record=record)
        elif future.status == "error":
            error = future.exception()
            if type(error).__name__ == "KilledWorker":
                yield from _count_death(board, item)
            else:
                yield Finished(
                    item, error=str(error) if isinstance(error, DaifError) else f"{type(error).__name__}: {error}"
                )
        else:  # lost with its worker or cancelled by the scheduler
            yield from _count_death(board, item)


def _bury(board: _Board, capacity: dict[str, int]) -> Iterator[Finished]:
    """Take back the stacks of workers that are gone."""
    for future, (item, address) in list(board.running.items()):
        if address not in capacity and not future.done():
            future.cancel(force=True)
            del board.running[future]
            yield from _count_death(board, item)


def _count_death(board: _Board, item: str) -> Iterator[Finished]:
    board.deaths[item] += 1
    if board.deaths[item] < MAX_DEATHS:
        board.waiting.append(item)
    else:
        yield Finished(
            item,
            error=f"{item} was set aside: its worker died {MAX_DEATHS} times while working on it "
            "(out of memory, or a damaged file); try it alone with --workers 1",
        )
