"""`daif session` with pretended training: the first run gets no better, the second "brings" the shipped weights.

What a real run does stands in test_train.py; here it is what the page makes of its end. Runs end
when take 3 is there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from reconstruct import session
from reconstruct.cli import main

RUN = """
import shutil, sys, time
from pathlib import Path
run, weights = Path(sys.argv[1]), Path(sys.argv[2])
print("refining 1 stack(s)", file=sys.stderr, flush=True)
deadline = time.monotonic() + 100
while not (run.parents[1] / "takes" / "003.h5").exists() and time.monotonic() < deadline:
    time.sleep(0.05)
better = run.name != "01"
print(f"mean  10.0  {9.0 if better else 11.0}  {'-10.0' if better else '+10.0'} %")
run.mkdir(parents=True)
if better:
    for suffix in (".safetensors", ".json"):
        shutil.copy(weights.with_suffix(suffix), run / ("weights" + suffix))
"""


def quick(stacks: Sequence[Path], out: Path, **options: Any) -> list[str]:
    weights = Path(session.__file__).parent / "weights" / "default.safetensors"
    return [sys.executable, "-c", RUN, str(out), str(weights)]


if __name__ == "__main__":
    session.train_command = quick
    sys.argv[0] = "daif"
    main()
