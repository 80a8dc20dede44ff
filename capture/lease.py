"""One writer per file: a small `.lock` file that names its holder and outlives nobody."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from capture.errors import LockedError, UsageError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


class Lease:
    """Exclusive right to write `target`, held as `<target>.lock` until `release` or the end of the process.

    The kernel's advisory lock decides (it falls with its process, so a killed holder leaves nothing to clear up);
    the file's JSON text (pid, host, started) is what a second writer is told. A lock left by another machine cannot
    be judged from here and is respected.
    """

    def __init__(self, target: str | Path) -> None:
        """Takes the lease.

        Raises:
            LockedError: another living process holds it; the text names that process.
            UsageError: the lock file cannot be made there.
        """
        self.path = Path(f"{target}.lock")
        self._descriptor: int | None = self._acquire()

    def release(self) -> None:
        """Gives the lease back; a second call does nothing."""
        if self._descriptor is None:
            return
        descriptor, self._descriptor = self._descriptor, None
        self.path.unlink(missing_ok=True)  # before the lock falls: nobody may lock a file about to vanish
        os.close(descriptor)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _acquire(self) -> int:
        while True:
            try:
                descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | (os.O_EXCL if fcntl is None else 0), 0o644)
            except FileExistsError:
                raise self._locked(_holder(self.path)) from None
            except OSError as error:
                raise UsageError(f"{self.path} cannot be written: {error.strerror}; choose another folder") from None
            try:
                if fcntl is not None:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not _still_at(descriptor, self.path):  # its holder released it between our open and our lock
                    os.close(descriptor)
                    continue
                holder = _holder(self.path)
                if holder and holder.get("host") != socket.gethostname():
                    raise self._locked(holder)
            except BlockingIOError:
                os.close(descriptor)
                raise self._locked(_holder(self.path)) from None
            except BaseException:
                os.close(descriptor)
                raise
            text = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps(text).encode())
            return descriptor

    def _locked(self, holder: dict[str, object]) -> LockedError:
        who = "another process"
        if holder:
            who = f"process {holder.get('pid')} on {holder.get('host')} since {holder.get('started')}"
        return LockedError(
            f"{self.path.with_suffix('')} is being written by {who}; "
            f"wait for it, or delete {self.path} if that process is gone"
        )


def _still_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(path: Path) -> dict[str, object]:
    """Who the lock file says holds it; empty when it says nothing readable."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
