"""A batch that gets killed: run as `python batch_driver.py real|quick IN OUT` by test_robustness.py.

`real` is `batch.run` on two workers, `quick` the same engine with work that takes no time. In both a stack called
poison kills its worker, as one that the kernel's out-of-memory killer picks would.
"""

import functools
import os
import signal
import sys
import time
from pathlib import Path

from capture.errors import DaifError, DataError, SomeFailedError
from reconstruct import cluster


def poisoned(stack, job, threads):
    """Stands in for `batch._process_on_worker`; pickled by value because it lives in __main__."""
    if "poison" in stack:
        os.kill(os.getpid(), signal.SIGKILL)
    from reconstruct import batch

    return batch._process_on_worker(stack, job, threads)


def real(folder, out):
    from reconstruct import batch
    from reconstruct.infer import Settings
    from reconstruct.job import Job

    batch._process_on_worker = poisoned
    settings = Settings(device="cpu", align=False, method="plane-sweep")
    batch.run(batch.find_stacks([str(folder)]), Job(str(out), settings), workers=2)


def work(item, out):
    name = Path(item).stem
    if "poison" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "corrupt" in name:
        raise DataError(f"{item} is damaged")
    target = Path(out) / name
    if not target.exists():
        time.sleep(0.15)
        staging = Path(out) / f".{name}.{os.getpid()}"
        staging.mkdir()
        (staging / "reconstruction.json").write_text("{}")
        staging.rename(target)  # fails if another worker did this stack too
        with (Path(out) / "written.log").open("a") as log:
            log.write(f"{name}\n")
    return {"name": name}


def quick(folder, out):
    out.mkdir(exist_ok=True)
    stacks = sorted(str(path) for path in folder.iterdir() if not (out / path.stem).exists())
    if not stacks:
        print("nothing to do")
        return
    with cluster.connect(2, None) as client:
        ends = list(cluster.run_on(client, stacks, functools.partial(work, out=str(out))))
    failed = sorted(Path(end.item).stem for end in ends if end.record is None)
    if failed:
        raise SomeFailedError(f"{len(failed)} stacks failed: {', '.join(failed)}")


if __name__ == "__main__":
    try:
        {"real": real, "quick": quick}[sys.argv[1]](Path(sys.argv[2]), Path(sys.argv[3]))
    except DaifError as error:
        print(f"daif: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
