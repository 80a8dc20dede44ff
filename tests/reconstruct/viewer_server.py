"""A real `daif view` in its own process."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def viewer(out: Path) -> Iterator[str]:
    """The printed address of a viewer on `out`, which ends on the way out."""
    command = [sys.executable, "-c", "from reconstruct.cli import main; main()", "view", str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        found = re.search(r"http://\S+", process.stdout.readline())
        try:
            assert found is not None
            yield found.group()
        finally:
            process.terminate()
            process.wait(timeout=30)
