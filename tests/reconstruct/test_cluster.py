"""A real Dask scheduler and real worker processes, killed for real."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

import cloudpickle
import psutil
import pytest
from distributed import Future

from capture.errors import DataError, SomeFailedError, UsageError
from reconstruct import cluster
from tests.reconstruct.small_stack import write_small_stack

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import a test file


def work(item):
    """Stands in for a reconstruction: leaves a mark, and misbehaves by the stack's name."""
    path = Path(item)
    with path.open("a") as log:
        log.write(f"{os.getpid()}\n")
    if "poison" in path.name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "corrupt" in path.name:
        raise DataError(f"{path.name}: dataset /stack/frames is damaged")
    time.sleep(0.05)
    return {"name": path.name}


@pytest.fixture(scope="module")
def client():
    with cluster.connect(2, None) as client:
        yield client


def marks(paths):
    return {path.name: len(path.read_text().split()) for path in paths}


def test_workers_keep_freed_memory_and_one_thread(client):
    """Dask's default, to return memory at once, doubled the CPU time of every stack."""
    for environment in client.run(lambda: dict(os.environ)).values():
        assert "MALLOC_TRIM_THRESHOLD_" not in environment
        assert environment["OMP_NUM_THREADS"] == "1"


def test_every_stack_is_done_once(client, tmp_path):
    paths = [tmp_path / f"stack{i:02}" for i in range(12)]
    finished = list(cluster.run_on(client, [str(path) for path in paths], work))
    assert {f.record["name"] for f in finished} == {p.name for p in paths}
    assert set(marks(paths).values()) == {1}


def test_a_poisoned_stack_is_named_after_two_deaths_and_takes_nobody_with_it(client, tmp_path):
    paths = [tmp_path / name for name in ("a", "poison", "b", "corrupt", "c", "d")]
    ends = {Path(f.item).name: f for f in cluster.run_on(client, [str(path) for path in paths], work)}
    assert {name for name, f in ends.items() if f.record} == {"a", "b", "c", "d"}
    assert "set aside" in ends["poison"].error
    assert ends["corrupt"].error == "corrupt: dataset /stack/frames is damaged"
    assert marks(paths)["poison"] == cluster.MAX_DEATHS


def test_workers_killed_from_outside_lose_no_stack(client, tmp_path):
    paths = [tmp_path / f"stack{i:02}" for i in range(20)]
    done = []
    kills = 0
    for finished in cluster.run_on(client, [str(path) for path in paths], work):
        done.append(finished)
        if len(done) in {3, 9}:
            worker_pids = client.run(os.getpid)
            os.kill(next(iter(worker_pids.values())), signal.SIGKILL)
            kills += 1
    assert kills == 2
    assert Counter(bool(f.record) for f in done) == {True: 20}


@pytest.mark.timeout(120)
def test_a_worker_killed_before_its_record_is_fetched(client, tmp_path, monkeypatch):
    """Dask's own `result()` never returns then: the stack is pinned to a worker that is no more."""
    monkeypatch.setattr(cluster, "FETCH_LIMIT_S", 1.0)
    fetch = Future.result
    killed = []

    def fetch_too_late(future, timeout=None):
        if not killed:
            ((holder,),) = client.who_has([future]).values()
            killed.append(client.run(os.getpid, workers=[holder])[holder])
            os.kill(killed[0], signal.SIGKILL)
            psutil.wait_procs([psutil.Process(killed[0])] if psutil.pid_exists(killed[0]) else [])
        return fetch(future, timeout=timeout)

    monkeypatch.setattr(Future, "result", fetch_too_late)
    paths = [tmp_path / f"stack{i}" for i in range(4)]
    ends = list(cluster.run_on(client, [str(path) for path in paths], work))
    assert sorted(f.record["name"] for f in ends) == [path.name for path in paths]
    assert killed
    assert sorted(marks(paths).values()) == [1, 1, 1, 2]  # done again: `work` leaves nothing to find


def address_in(file, within_s=60):
    """The address in a scheduler file, once the scheduler has written all of it."""
    deadline = time.monotonic() + within_s
    while True:
        try:
            return json.loads(file.read_text())["address"]
        except (FileNotFoundError, json.JSONDecodeError):  # the file is there before its text is
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


@contextlib.contextmanager
def started_by_hand(folder, workers=2, path=""):
    """A scheduler and `workers` as a user starts them: (address, the scheduler's process, start another worker)."""
    file = folder / "scheduler.json"
    common = ["--scheduler-file", str(file), "--host", "127.0.0.1", "--no-dashboard"]
    started = []

    def start(program, *options, path=""):
        command = [sys.executable, "-m", f"distributed.cli.dask_{program}", *common, *options]
        environment = os.environ | {"PYTHONPATH": f"{path}:{Path(__file__).parents[2]}"}
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, env=environment, cwd=folder))

    def start_worker(path=""):
        start("worker", "--nthreads", "1", "--local-directory", str(folder), "--death-timeout", "60", path=path)

    try:
        start("scheduler", "--port", "0", path=path)
        address = address_in(file)
        for _ in range(workers):
            start_worker()
        yield address, started[0], start_worker
    finally:
        for process in reversed(started):
            process.terminate()
        for process in started:
            process.wait(timeout=60)


def test_a_cluster_started_by_hand_and_its_scheduler_killed(tmp_path):
    paths = [tmp_path / f"stack{i:02}" for i in range(400)]
    done = []

    def run(client, scheduler):
        for finished in cluster.run_on(client, [str(path) for path in paths], work):
            done.append(finished.record["name"])
            if len(done) == 4:
                scheduler.kill()

    with started_by_hand(tmp_path) as (address, scheduler, _), cluster.connect(0, address) as client:
        client.wait_for_workers(2, timeout=120)
        with pytest.raises(SomeFailedError, match=r"scheduler has gone away and \d+ stacks are left") as raised:
            run(client, scheduler)
    assert raised.value.exit_code == 3
    assert len(done) >= 4
    assert all((tmp_path / name).exists() for name in done)


@pytest.fixture
def another_daif(tmp_path):
    """A folder that, on the path, makes Python believe that another version of daif is installed."""
    about = tmp_path / "other" / "daif-9.9.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: daif\nVersion: 9.9\n")
    return about.parent


def test_a_scheduler_of_another_version_is_one_sentence(tmp_path, another_daif):
    ours = rf"and this machine Python 3\.\d+, daif {re.escape(version('daif'))}, distributed \S+; install"
    with (
        started_by_hand(tmp_path, workers=0, path=another_daif) as (address, *_),
        pytest.raises(UsageError, match=rf"^{address} runs Python 3\.\d+, daif 9\.9, distributed \S+ {ours}"),
        cluster.connect(0, address),
    ):
        pass


def test_a_worker_that_joins_with_another_version_is_not_used(tmp_path, another_daif, caplog):
    paths = [tmp_path / f"stack{i:02}" for i in range(12)]
    with started_by_hand(tmp_path, workers=1) as (address, _, start_worker), cluster.connect(0, address) as client:
        client.wait_for_workers(1, timeout=120)
        start_worker(another_daif)
        client.wait_for_workers(2, timeout=120)
        ends = list(cluster.run_on(client, [str(path) for path in paths], work))
    assert all(end.record for end in ends)
    assert len({path.read_text() for path in paths}) == 1
    assert "not used: tcp://127.0.0.1" in caplog.text and "daif 9.9" in caplog.text


def test_python_of_another_minor_version_differs():
    def about(python):
        return {"packages": {"python": python, "daif": "0.1.0", "distributed": "2026.8.0"}}

    assert cluster._versions(about("3.11.7.final.0")) == cluster._versions(about("3.11.2.final.0"))
    assert cluster._versions(about("3.11.7.final.0")) != cluster._versions(about("3.12.7.final.0"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_reconstruct_on_a_cluster_started_by_hand(tmp_path):
    stacks = tmp_path / "in"
    stacks.mkdir()
    for seed in range(3):
        write_small_stack(stacks / f"stack{seed}.h5", seed=seed)
    with started_by_hand(tmp_path) as (address, *_):
        command = [sys.executable, "-c", "from reconstruct.cli import main; main()", "reconstruct", str(stacks)]
        command += ["-o", str(tmp_path / "out"), "--on", address, "--device", "cpu"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert sorted(path.parent.name for path in (tmp_path / "out").glob("*/depth.npy")) == ["stack0", "stack1", "stack2"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_worker_killed_while_it_restarts_is_replaced(tmp_path, monkeypatch):
    """Dask's nanny gives up on a worker that dies before it is ready."""
    monkeypatch.setattr(cluster, "RESTART_LIMIT_S", 10.0)

    def processes():
        found = {}
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if "spawn_main" in " ".join(child.cmdline()):
                    found[child.pid] = child
        return found

    before = processes()
    with cluster.connect(1, None) as client:
        (first,) = processes().keys() - before.keys()
        os.kill(first, signal.SIGKILL)
        while not (fresh := processes().keys() - before.keys() - {first}):
            time.sleep(0.02)
        os.kill(fresh.pop(), signal.SIGKILL)
        (finished,) = cluster.run_on(client, [str(tmp_path / "stack")], work)
    assert finished.record == {"name": "stack"}


def test_no_scheduler_is_one_sentence():
    with (
        pytest.raises(UsageError, match="no Dask scheduler answers at tcp"),
        cluster.connect(0, "tcp://127.0.0.1:1"),
    ):
        pass


def read_sent(item):
    return {"text": cluster.sent_file(Path(item)).read_text(), "pid": os.getpid()}


def test_files_travel_to_every_worker_once(client, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_text("1 MB of weights")
    cluster.send_files(client, [weights])
    weights.unlink()  # another machine does not have it
    found = [client.submit(read_sent, str(weights), workers=[address], pure=False) for address in client.nthreads()]
    records = [future.result() for future in found]
    assert {record["text"] for record in records} == {"1 MB of weights"}
    assert len({record["pid"] for record in records}) == 2


def test_a_file_that_is_not_there_is_one_sentence(client, tmp_path):
    with pytest.raises(UsageError, match=r"none\.safetensors cannot be read"):
        cluster.send_files(client, [tmp_path / "none.safetensors"])
