"""The photographed stacks of `shared/data/stacks` as `daif import` wants them: stack.json becomes stack.yaml."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from capture.exif import NIKON_STEP, from_sensor_plane
from capture.importer import spread_ties

STACKS = Path(__file__).resolve().parents[2] / ".." / "shared" / "data" / "stacks"


def write_stack_yaml(source: str | Path, target: str | Path) -> Path:
    """Link the frames of `source` into the folder `target` and write its stack.yaml; returns `target`.

    Maker-note distances (from the sensor, quantised) become distances from the lens, neighbours with one reported
    distance are spread inside the quantisation step, as `daif import` does with EXIF; a webcam's focus register
    becomes the focus command. The lens is written where focal length, f-number and pixel pitch are all known.
    """
    source, target = Path(source).resolve(), Path(target)
    target.mkdir(parents=True, exist_ok=True)
    about = json.loads((source / "stack.json").read_text(encoding="utf-8"))
    optics = [about.get(key) for key in ("focal_length_mm", "f_number", "pixel_pitch_mm_at_this_width")]
    focal_m = optics[0] * 1e-3 if optics[0] else math.nan
    reported = [frame.get("focus_distance_m") or math.nan for frame in about["frames"]]
    frames = []
    for frame, distance_m in zip(about["frames"], spread_ties(reported), strict=True):
        name = frame["file"]
        _link(source / name, target / name)
        entry: dict[str, Any] = {"file": name}
        if not math.isnan(distance_m):
            entry["focus_distance_m"] = round(from_sensor_plane(distance_m, focal_m), 5)
            entry["focus_distance_std_m"] = round(entry["focus_distance_m"] * NIKON_STEP / math.sqrt(12.0), 5)
            entry["focus_distance_source"] = "exif, quantised"
        for ours, theirs in (("focus_command", "focus_register"), ("iso", "iso"), ("exposure_time_s", "exposure_s")):
            if frame.get(theirs) is not None:
                entry[ours] = frame[theirs]
        frames.append(entry)
    document: dict[str, Any] = {"transfer": "srgb"}
    if all(optics):
        focal_mm, f_number, pitch_mm = optics
        document["lens"] = {"focal_length_m": focal_mm * 1e-3, "f_number": f_number, "pixel_pitch_m": pitch_mm * 1e-3}
    document["frames"] = frames
    (target / "stack.yaml").write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
    return target


def _link(source: Path, target: Path) -> None:
    target.unlink(missing_ok=True)
    try:
        os.symlink(source, target)
    except OSError:
        shutil.copyfile(source, target)
