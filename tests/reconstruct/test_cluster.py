"""A real Dask scheduler and real worker processes, killed for real."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cloudpickle
import pytest

from capture.errors import DataError, UsageError
from reconstruct import cluster

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


def test_a_cluster_started_by_hand(tmp_path):
    """A scheduler and two workers as a user starts them, joined by address."""
    port_file = tmp_path / "scheduler.json"
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler"]
    started = [
        subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(port_file)],
            stderr=subprocess.DEVNULL,
        )
    ]
    try:
        deadline = time.monotonic() + 60
        while not port_file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        worker = [sys.executable, "-m", "distributed.cli.dask_worker", "--scheduler-file", str(port_file)]
        worker += ["--host", "127.0.0.1", "--nworkers", "2", "--nthreads", "1", "--no-dashboard"]
        started.append(subprocess.Popen([*worker, "--local-directory", str(tmp_path)], stderr=subprocess.DEVNULL))
        address = json.loads(port_file.read_text())["address"]
        paths = [tmp_path / f"stack{i}" for i in range(4)]
        with cluster.connect(0, address) as client:
            client.wait_for_workers(2, timeout=60)
            assert len(list(cluster.run_on(client, [str(path) for path in paths], work))) == 4
    finally:
        for process in reversed(started):
            process.terminate()
            process.wait(timeout=30)


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
    found = [
        client.submit(read_sent, str(weights), workers=[address], pure=False) for address in cluster._workers(client)
    ]
    records = [future.result() for future in found]
    assert {record["text"] for record in records} == {"1 MB of weights"}
    assert len({record["pid"] for record in records}) == 2


def test_a_file_that_is_not_there_is_one_sentence(client, tmp_path):
    with pytest.raises(UsageError, match=r"none\.safetensors cannot be read"):
        cluster.send_files(client, [tmp_path / "none.safetensors"])
