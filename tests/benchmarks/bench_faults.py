"""What the operator sees of every fault at the first, middle and last frame of a sweep."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from capture import sweep
from tests.capture.fault_table import fault_outcomes, print_table


def main(argv: list[str]) -> None:
    """Print the table, and write bench-results/faults.json."""
    sweep.BUSY_WAITS_S = tuple(0.001 for _ in sweep.BUSY_WAITS_S)  # the number of tries stays
    sweep.RETRY_WAITS_S = tuple(0.001 for _ in sweep.RETRY_WAITS_S)
    sweep.REOPEN_WAITS_S = tuple(0.001 for _ in sweep.REOPEN_WAITS_S)
    with tempfile.TemporaryDirectory() as folder:
        outcomes = fault_outcomes(Path(folder))
    print_table(outcomes)
    results = Path("bench-results")
    results.mkdir(exist_ok=True)
    (results / "faults.json").write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=2))
