"""What a person sees of a sweep in the terminal: a live line with a sharpness sparkline, or plain lines."""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from capture.quality import sparkline

if TYPE_CHECKING:
    from capture.sweep import SweepProgress


class SweepDisplay:
    """Shows progress on stderr: rewritten in place on a terminal, one line per frame otherwise."""

    def __init__(self, live: Any) -> None:
        self._live = live
        self._began = time.monotonic()

    def update(self, progress: SweepProgress) -> None:
        """Show the state after a frame."""
        text = self._text(progress)
        if self._live is not None:
            self._live.update(text, refresh=True)
        elif progress.index >= 0 or progress.message:
            print(text, file=sys.stderr, flush=True)

    def ask(self, instruction: str) -> None:
        """Tell the operator what to do and wait for Enter."""
        if self._live is not None:
            self._live.stop()
        print(f"{instruction}, then press Enter ", end="", file=sys.stderr, flush=True)
        sys.stdin.readline()
        if self._live is not None:
            self._live.start()

    def _text(self, progress: SweepProgress) -> str:
        done, total = progress.n_done, progress.n_frames
        if progress.message:
            return progress.message
        parts = [f"frame {done}/{total}"]
        if not math.isnan(progress.position):
            parts.append(f"at {progress.position:.4g} {progress.unit}")
        parts.append(f"sharpness {sparkline(list(progress.focus_measure))}")
        if 0 < done < total:
            left_s = (time.monotonic() - self._began) / done * (total - done)
            parts.append(f"{left_s:.0f} s left")
        return "  ".join(parts)


@contextlib.contextmanager
def sweep_display() -> Iterator[SweepDisplay]:
    """A display for one sweep."""
    if not sys.stderr.isatty():
        yield SweepDisplay(None)
        return
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), auto_refresh=False) as live:
        yield SweepDisplay(live)
