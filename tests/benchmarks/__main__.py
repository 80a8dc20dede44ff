"""`make bench` runs every benchmark here; `make bench BENCH="quality speed"` runs the named ones."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

AVAILABLE = sorted(path.stem.removeprefix("bench_") for path in Path(__file__).parent.glob("bench_*.py"))


def main(names: list[str]) -> None:
    """Run the benchmarks called `names` (all of them when empty); each prints a table and writes JSON."""
    unknown = [name for name in names if name not in AVAILABLE]
    if unknown:
        sys.exit(f"no benchmark called {', '.join(unknown)}; there are: {', '.join(AVAILABLE)}")
    for name in names or AVAILABLE:
        print(f"\n== {name}", flush=True)
        importlib.import_module(f"tests.benchmarks.bench_{name}").main([])


if __name__ == "__main__":
    main(sys.argv[1:])
