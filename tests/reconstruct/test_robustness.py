"""A batch whose workers and whose own process are killed: every good stack once, the bad ones named, no orphans."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from tests.reconstruct.small_stack import small_scene, write_small_stack

ROOT = Path(__file__).parents[2]
BAD = ("corrupt1", "corrupt2", "poison")


class Batch:
    """The driver as a child process."""

    def __init__(self, kind, folder, out):
        self.out = out
        driver = [sys.executable, str(Path(__file__).with_name("batch_driver.py")), kind, str(folder), str(out)]
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            driver, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def workers(self, timeout_s):
        """The living workers; waits for one where the run is just starting or replacing its last."""
        deadline = time.monotonic() + timeout_s
        while True:
            found = []
            with contextlib.suppress(psutil.Error):
                for child in psutil.Process(self.process.pid).children(recursive=True):
                    with contextlib.suppress(psutil.Error):  # it died in between
                        if "spawn_main" in " ".join(child.cmdline()):
                            found.append(child)
            if found:
                return found
            if self.process.poll() is not None:
                raise AssertionError(f"no worker to kill, the batch has ended: {self.finish(10)}")
            assert time.monotonic() < deadline, f"no worker to kill within {timeout_s} s"
            time.sleep(0.05)

    def done(self):
        return sum(1 for path in self.out.glob("*/reconstruction.json")) if self.out.exists() else 0

    def wait_for(self, count, timeout_s):
        """Until `count` results are there."""
        deadline = time.monotonic() + timeout_s
        while self.done() < count:
            found = f"{self.done()} of {count} results"
            if self.process.poll() is not None:
                raise AssertionError(f"{found}, then the batch ended: {self.finish(10)}")
            assert time.monotonic() < deadline, f"{found} after {timeout_s} s"
            time.sleep(0.05)

    def kill_worker(self, rng, timeout_s):
        """SIGKILL to a living worker; True when it is gone, False if it died by itself just before."""
        victim = rng.choice(self.workers(timeout_s))
        try:
            victim.kill()
        except psutil.NoSuchProcess:
            return False
        _, alive = psutil.wait_procs([victim], timeout=60)
        assert not alive
        return True

    def kill(self, timeout_s):
        """SIGKILL to the whole run; its workers must end by themselves. False if it had ended just before."""
        workers = self.workers(timeout_s)
        self.process.send_signal(signal.SIGKILL)
        self.process.communicate(timeout=60)
        _, alive = psutil.wait_procs(workers, timeout=60)
        assert not alive
        return self.process.returncode == -signal.SIGKILL

    def finish(self, timeout_s):
        stdout, stderr = self.process.communicate(timeout=timeout_s)
        return self.process.returncode, stdout, stderr


def torture(kind, folder, out, *, good, worker_kills, run_kills, timeout_s):
    """Kill workers and runs at even distances, every kill seen to land, then let it finish: the end of the last run."""
    rng = random.Random(0)
    kills = ["worker"] * worker_kills + ["run"] * run_kills
    rng.shuffle(kills)
    landed = Counter()
    batch = Batch(kind, folder, out)
    try:
        for i, what in enumerate(kills):
            batch.wait_for(1 + i * (good - 2) // len(kills), timeout_s)
            if what == "worker":
                while not batch.kill_worker(rng, timeout_s):
                    pass
            else:
                assert batch.kill(timeout_s), "the run had ended before it was killed"
                batch = Batch(kind, folder, out)
            landed[what] += 1
        end = batch.finish(timeout_s)
    finally:
        batch.process.kill()  # nothing, if it has ended
    assert landed == {"worker": worker_kills, "run": run_kills}
    return end


def check(kind, folder, out, end, names, timeout_s):
    code, _, stderr = end
    assert code == 3
    named = re.search("failed: ([^;]*)", stderr.splitlines()[-1]).group(1)
    assert sorted(named.split(", ")) == sorted(BAD)
    finished = {path.parent.name for path in out.glob("*/reconstruction.json")}
    assert finished == set(names)
    for name in BAD:  # a second run has nothing left to do
        (folder / f"{name}.h5").unlink()
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    code, stdout, _ = Batch(kind, folder, out).finish(timeout_s)
    assert code == 0
    assert before == {path: path.stat().st_mtime_ns for path in out.glob("*/*")}
    return stdout


@pytest.mark.timeout(600)
def test_killed_workers_and_a_killed_run(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = [f"stack{i:02}" for i in range(21)]
    for name in (*names, *BAD):
        (folder / f"{name}.h5").touch()
    end = torture("quick", folder, out, good=len(names), worker_kills=3, run_kills=1, timeout_s=250)
    assert "nothing to do" in check("quick", folder, out, end, names, 250)
    written = (out / "written.log").read_text().split()
    assert len(written) == len(set(written))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_hundred_stacks(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    folder.mkdir()
    names = [f"stack{i:03}" for i in range(197)]
    data = write_small_stack(tmp_path / "one.h5", scene=small_scene(48, 64)).read_bytes()
    for name in (*names, "poison"):
        (folder / f"{name}.h5").write_bytes(data)
    for name in ("corrupt1", "corrupt2"):
        (folder / f"{name}.h5").write_bytes(data[: len(data) // 2])
    end = torture("real", folder, out, good=len(names), worker_kills=10, run_kills=5, timeout_s=1800)
    assert check("real", folder, out, end, names, 1800).count("complete already, skipped") == len(names)
