"""Every fault of the taxonomy at the first, middle and last frame of a simulated sweep: what the operator sees.

`python -m tests.benchmarks faults` prints the table.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capture.cameras.simulated import FAULTS, Behaviour, Fault, SimulatedCamera
from capture.errors import DaifError
from capture.plan import command_sweep
from capture.scenes import procedural_scene
from capture.stack import partial_path
from capture.sweep import run_sweep

N_FRAMES = 5
MOMENTS = {"first": 0, "middle": 2, "last": 4}
PERSISTENT = 99  # strikes until the fault is repaired


class Outcome(NamedTuple):
    """What became of one sweep; `resumed` is the number of frames after --resume, or of the finished sweep."""

    fault: str
    moment: str
    times: int
    exit_code: int
    n_frames: int
    text: str
    camera_closed: bool
    lens_returned: bool
    resumed: int


def fault_outcomes(folder: Path, *, thorough: bool = True) -> list[Outcome]:
    """Run every fault at every moment, once and for good; then repair it and resume.

    Without `thorough`, faults that stay strike in the middle only.
    """
    plan = command_sweep(tuple(100.0 + 150.0 * i for i in range(N_FRAMES)), "step")
    scene = procedural_scene(3, 72, 96)
    logging.getLogger("capture").setLevel(logging.ERROR)
    outcomes = []
    views: OrderedDict[float, NDArray[np.float32]] = OrderedDict()  # rendered once for all these cameras
    for name in FAULTS:
        for moment, frame in MOMENTS.items():
            for times in (1, PERSISTENT) if thorough or moment == "middle" else (1,):
                # a camera counts the pictures it takes: for good means at this one and at all that follow
                struck = range(frame, frame + (1 if times == 1 else 40))
                faults = tuple(Fault(name=name, frame=index, times=times) for index in struck)
                if FAULTS[name][0] in ("open", "lock_exposure") and frame:  # met again only after the cable came loose
                    faults += (Fault(name="disconnect", frame=frame),)
                behaviour = Behaviour(relative=True, noise=0.01, max_coc_px=12.0, fault=faults)
                camera = SimulatedCamera(scene, behaviour=behaviour)
                camera._views = views
                start = camera._motor
                path = folder / f"{name}-{moment}-{times}.h5"
                code, text, n_frames = 0, "", 0
                try:
                    n_frames = run_sweep(camera, plan, path).n_frames
                except DaifError as error:
                    code, text = error.exit_code, str(error).replace(str(folder), "DIR")
                closed, returned = not camera._open, abs(camera._motor - start) < 1e-6
                resumed = n_frames
                if code:
                    repaired = SimulatedCamera(scene, behaviour=behaviour.model_copy(update={"fault": ()}))
                    repaired._views = views
                    resumed = run_sweep(repaired, plan, path, resume=partial_path(path).exists()).n_frames
                outcomes.append(Outcome(name, moment, times, code, n_frames, text, closed, returned, resumed))
    logging.getLogger("capture").setLevel(logging.NOTSET)
    return outcomes


def print_table(outcomes: list[Outcome]) -> None:
    """The table for people: one line per fault and moment that was not healed, one per fault that was."""
    print(f"{'fault':<15} {'moment':<7} {'strikes':<8} {'exit':<5} what the operator reads")
    for outcome in outcomes:
        strikes = "once" if outcome.times == 1 else "always"
        text = outcome.text or f"nothing: all {outcome.n_frames} frames were taken"
        print(f"{outcome.fault:<15} {outcome.moment:<7} {strikes:<8} {outcome.exit_code:<5} {text}")
