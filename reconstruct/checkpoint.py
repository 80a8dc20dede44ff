"""What a network leaves on disk: safetensors beside a JSON file that holds their SHA-256, checked on load.

Neither safetensors nor torch's own format notices flipped bytes (notes/ecosystem.md 3e), hence the hash. Nothing
here is ever pickled. A *weights* file is `NAME.safetensors` with `NAME.json`; a *training state* is a folder
`step-00000123` holding model, averaged model, optimiser and `state.json`, renamed into place when complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from capture.errors import DataError
from capture.output import room_in

FORMAT = 1
DEFAULT_WEIGHTS = Path(__file__).parent / "weights" / "default.safetensors"
RUN_WEIGHTS = "weights.safetensors"  # what `daif train` leaves in its folder


def save_weights(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write `path` (*.safetensors) and the JSON beside it; `about` needs at least a "preset"."""
    payload = _packed(tensors)
    description = {"format": FORMAT, "sha256": hashlib.sha256(payload).hexdigest(), **about}
    path.parent.mkdir(parents=True, exist_ok=True)
    _write_whole(path, payload)
    _write_whole(path.with_suffix(".json"), (json.dumps(description, indent=1) + "\n").encode())


def weights_file(weights: str | Path) -> Path:
    """The file that is meant by `weights`: itself, beside its JSON, or in the folder of a run of `daif train`.

    Raises DataError for a folder without weights.
    """
    path = Path(weights)
    if not path.is_dir():
        return path.with_suffix(".safetensors") if path.suffix == ".json" else path
    if not (path / RUN_WEIGHTS).exists():
        raise DataError(
            f"{path} holds no {RUN_WEIGHTS}; give a weights file, or the folder of a `daif train` run that ended "
            "better than it began"
        )
    return path / RUN_WEIGHTS


def load_weights(path: str | Path, preset: str | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a weights file and what its JSON says about them.

    Raises DataError, naming the file, if one of the two files is missing or damaged, or if they are weights of
    another preset than `preset`.
    """
    path = Path(path)
    about = _read_json(path.with_suffix(".json"))
    if preset is not None and about.get("preset") != preset:
        raise DataError(f"{path}: weights of preset {about.get('preset')!r}, expected {preset!r}")
    return _read_checked(path, about.get("sha256")), about


def save_state(run: Path, step: int, parts: Mapping[str, Mapping[str, Tensor]], about: Mapping[str, Any]) -> Path:
    """Write the folder `run/step-...` with one safetensors file per part; it appears whole or not at all.

    Raises NoSpaceError if the disk is full.
    """
    final = run / f"step-{step:08d}"
    partial = run / f".partial-{step:08d}"
    shutil.rmtree(partial, ignore_errors=True)
    hashes = {}
    try:
        partial.mkdir(parents=True)
        for name, tensors in parts.items():
            payload = _packed(tensors)
            hashes[name] = hashlib.sha256(payload).hexdigest()
            _write_whole(partial / f"{name}.safetensors", payload)
        document = {"format": FORMAT, "step": step, "sha256": hashes, **about}
        _write_whole(partial / "state.json", (json.dumps(document, indent=1) + "\n").encode())
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return final


def latest_state(run: Path) -> Path | None:
    """The newest complete training state in `run`, or None."""
    return max(run.glob("step-*"), default=None)


def load_state(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Parts and description of a training state; DataError if anything in it is missing or damaged."""
    about = _read_json(folder / "state.json")
    hashes = about.get("sha256")
    if not isinstance(hashes, dict):
        raise DataError(f"{folder / 'state.json'}: sha256 is missing; start again without --resume")
    return {name: _read_checked(folder / f"{name}.safetensors", digest) for name, digest in hashes.items()}, about


def _packed(tensors: Mapping[str, Tensor]) -> bytes:
    return save_tensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _write_whole(path: Path, payload: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        with room_in(path.parent, f"{path.name} ({len(payload) / 1e6:.1f} MB)"), partial.open("wb") as file:
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        about = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: missing; weights are a .safetensors file with a .json file beside it") from None
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise DataError(f"{path}: not a description of daif weights (expected format {FORMAT})")
    return about


def _read_checked(path: Path, digest: object) -> dict[str, Tensor]:
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    found = hashlib.sha256(payload).hexdigest()
    if found != digest:
        raise DataError(
            f"{path}: damaged; its SHA-256 is {found[:12]}..., the JSON beside it says {str(digest)[:12]}..."
        )
    try:
        return load_tensors(payload)
    except SafetensorError as error:
        raise DataError(f"{path}: not a safetensors file ({error})") from error
