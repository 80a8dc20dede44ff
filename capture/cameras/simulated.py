"""A camera that photographs a `Scene` through its own optics (`capture/optics.py`)."""

from __future__ import annotations

from capture.optics import CONDITIONS, Condition, SimulatedSweep, render_frame, simulate_sweep

__all__ = ["CONDITIONS", "Condition", "SimulatedSweep", "render_frame", "simulate_sweep"]
