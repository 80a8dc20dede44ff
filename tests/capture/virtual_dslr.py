"""A Nikon body with a lens, as a stand-in for the `gphoto2` module: libgphoto2's own virtual camera plus a focus motor.

Real: python-gphoto2, libgphoto2's PTP driver and its virtual USB port; detection, settings, capture, events, file
names, download, deletion, EXIF and error codes all come from there. Faked, because the virtual camera has none of it:
the two settings `manualfocusdrive` and `viewfinder` (with Nikon's error texts), the lens behind them (end stops,
backlash, position kept across reconnects), the picture (each capture delivers the scene as this lens sees it, rendered
by `capture.optics`), and the faults that `faults.json` asks for (unplugged, busy, stuck, crashing).

The folder of the rig comes from DAIF_RIG. Run as a program, this file is `daif` with this module as its camera driver:
`python tests/capture/virtual_dslr.py capture --camera gphoto2: ...`.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np

FOLDER = Path(os.environ["DAIF_RIG"])
PICTURES = FOLDER / "card"
PICTURE = PICTURES / "picture.jpg"
STATE = FOLDER / "state.json"
FAULTS = FOLDER / "faults.json"
FILE_BYTES = 400_000  # the virtual camera reads the size once: every picture is padded to this

os.environ["VCAMERADIR"] = str(PICTURES)
os.environ["XDG_CONFIG_HOME"] = str(FOLDER / "config")  # libgphoto2 writes its settings there

import gphoto2 as _gp  # noqa: E402

from capture.lens import Lens  # noqa: E402
from capture.optics import ApertureRenderer  # noqa: E402
from tests.capture.scene_of_rig import scene  # noqa: E402


def __getattr__(name: str) -> Any:
    """Whatever is not replaced here is the real module's."""
    return getattr(_gp, name)


__file__ = _gp.__file__  # where the adapter looks for libgphoto2

LENS = Lens(focal_length_m=0.050, f_number=8.0, pixel_pitch_m=2.4e-5)
STOP_UNITS = 3000  # motor units from the near stop to the far stop
UNITS_PER_STEP = 10  # of configs/cameras/nikon.yaml
BACKLASH_UNITS = 20
NEAR_DPT, FAR_DPT = 2.0, 0.1


def focus_dpt_at(units: float) -> float:
    """Focus of the rig's lens, in dioptres, at a motor position; a mild curve, so that steps are not dioptres."""
    share = units / STOP_UNITS
    return NEAR_DPT + (FAR_DPT - NEAR_DPT) * (0.8 * share + 0.2 * share * share)


_state: dict[str, float] = {"units": 900.0, "gear": 900.0, "captures": 0, "live_view": 0}
_rendered: dict[str, Any] = {}


def _load() -> None:
    if STATE.exists():
        _state.update(json.loads(STATE.read_text()))


def _save() -> None:
    STATE.with_suffix(".tmp").write_text(json.dumps(_state))
    os.replace(STATE.with_suffix(".tmp"), STATE)


def _error(code: int, text: str) -> _gp.GPhoto2Error:
    error = _gp.GPhoto2Error(code)
    error.string = text
    return error


def _fault(moment: str) -> str | None:
    """The fault due at this moment, used up once asked for; "grab:3" in faults.json is the third exposure."""
    if not FAULTS.exists():
        return None
    faults = json.loads(FAULTS.read_text())
    kind = faults.pop(moment, None)
    if kind is not None:
        FAULTS.write_text(json.dumps(faults))
    return kind


def _suffer(kind: str | None) -> None:
    if kind == "unplugged":
        raise _error(-52, "Could not find the requested device on the USB port")
    if kind == "busy":
        raise _error(-110, "I/O in progress")
    if kind == "in use":
        raise _error(-53, "Could not claim the USB device")
    if kind == "stuck":
        time.sleep(1000)
    if kind == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)


# --- lens


def _drive(units: float) -> None:
    """Move the motor: negative is nearer, as on Nikon. Play of the gear: the first units after a turn move nothing."""
    if not _state["live_view"]:
        raise _error(-1, "Nikon manual focus works only in LiveView")
    if abs(units) < 2:
        raise _error(-113, "Nikon manual focus stepping too small")
    low, high = 0.0, float(STOP_UNITS)
    wanted = _state["units"] + units
    _state["units"] = min(max(wanted, low), high)
    gear = _state["gear"]
    lag = -BACKLASH_UNITS if units > 0 else BACKLASH_UNITS
    gear = max(gear, _state["units"] + lag) if units > 0 else min(gear, _state["units"] + lag)
    _state["gear"] = min(max(gear, low), high)
    _save()
    if not low <= wanted <= high:
        raise _error(-113, "Nikon manual focus at limit.")


def write_picture(data: bytes | None = None) -> None:
    """Put the picture that the lens sees now, or `data`, where the virtual camera takes its next one from."""
    if data is None:
        focus_dpt = focus_dpt_at(_state["gear"])
        if not _rendered:
            _rendered["renderer"] = ApertureRenderer(scene(), float(LENS.kappa_px_per_dpt(NEAR_DPT)))
        image = _rendered["renderer"].frame(focus_dpt, float(LENS.kappa_px_per_dpt(focus_dpt)), quality="fast")
        # a little of each picture's own noise: no two exposures of a real sensor are the same
        noise = np.random.default_rng(int(_state["captures"]) + 1).normal(0.0, 0.003, image.shape)
        linear = np.clip(image + noise, 0.0, 1.0)
        srgb = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * np.maximum(linear, 1e-9) ** (1 / 2.4) - 0.055)
        done, jpeg = cv2.imencode(
            ".jpg", (srgb[..., ::-1] * 255 + 0.5).astype(np.uint8), [cv2.IMWRITE_JPEG_QUALITY, 97]
        )
        assert done
        data = with_exif(
            jpeg.tobytes(), exif(1.0 / focus_dpt + LENS.image_distance_m(focus_dpt))
        )  # cameras count from the sensor
    PICTURES.mkdir(parents=True, exist_ok=True)
    temporary = FOLDER / "picture.tmp"
    temporary.write_bytes(data.ljust(FILE_BYTES, b"\0"))
    os.replace(temporary, PICTURE)


def exif(distance_m: float) -> bytes:
    """A TIFF block with maker, model, exposure, focal length and subject distance."""
    texts = {0x010F: b"NIKON CORPORATION\0", 0x0110: b"NIKON D750\0"}
    ratios = {0x829A: (1, 100), 0x829D: (40, 10), 0x9206: (round(distance_m * 1000), 1000), 0x920A: (500, 10)}
    first, second = 8, 8 + 2 + 12 * 3 + 4
    data_at = second + 2 + 12 * len(ratios) + 4
    entries, blob = b"", b""
    for tag, text in texts.items():
        entries += struct.pack("<HHII", tag, 2, len(text), data_at + len(blob))
        blob += text + b"\0" * (len(text) % 2)
    entries += struct.pack("<HHII", 0x8769, 4, 1, second)
    inner = b""
    for tag, ratio in ratios.items():
        inner += struct.pack("<HHII", tag, 5, 1, data_at + len(blob))
        blob += struct.pack("<II", *ratio)
    return (
        struct.pack("<2sHI", b"II", 42, first)
        + struct.pack("<H", 3) + entries + struct.pack("<I", 0)
        + struct.pack("<H", len(ratios)) + inner + struct.pack("<I", 0)
        + blob
    )  # fmt: skip


def with_exif(jpeg: bytes, block: bytes) -> bytes:
    """`jpeg` with an EXIF segment after its start."""
    content = b"Exif\0\0" + block
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(content) + 2) + content + jpeg[2:]


# --- the module's stand-ins


class _Widget:
    """One of the two faked settings: what a range or toggle widget of libgphoto2 offers."""

    def __init__(self, name: str, kind: int, value: Any) -> None:
        self._name, self._kind, self._value = name, kind, value

    def get_name(self) -> str:
        return self._name

    def get_type(self) -> int:
        return self._kind

    def count_children(self) -> int:
        return 0

    def get_range(self) -> tuple[float, float, float]:
        return -32767.0, 32767.0, 1.0

    def get_value(self) -> Any:
        return self._value

    def set_value(self, value: Any) -> None:
        self._value = value


class _Tree:
    """The body's settings and ours beside them."""

    def __init__(self, tree: Any, more: list[_Widget]) -> None:
        self._tree, self._more = tree, more

    def count_children(self) -> int:
        return self._tree.count_children() + len(self._more)

    def get_child(self, index: int) -> Any:
        real = self._tree.count_children()
        return self._tree.get_child(index) if index < real else self._more[index - real]


class Camera:
    """gphoto2.Camera with a lens on it; what is not defined here goes to the real one."""

    autodetect = staticmethod(_gp.Camera.autodetect)

    def __init__(self) -> None:
        self._camera = _gp.Camera()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._camera, name)

    def init(self, context: Any) -> None:
        _load()
        _suffer(_fault("open"))
        _state["live_view"] = 0
        write_picture()
        self._camera.init(context)

    def exit(self, context: Any) -> None:
        (FOLDER / "exits").open("a").write("exit\n")
        self._camera.exit(context)

    def get_config(self, context: Any) -> _Tree:
        return _Tree(self._camera.get_config(context), [self._focus_widget(), self._live_view_widget()])

    def get_single_config(self, name: str, context: Any) -> Any:
        if name == "manualfocusdrive":
            return self._focus_widget()
        if name == "viewfinder":
            return self._live_view_widget()
        return self._camera.get_single_config(name, context)

    def set_single_config(self, name: str, widget: Any, context: Any) -> None:
        if name == "manualfocusdrive":
            _suffer(_fault(f"move:{int(_state['captures']) + 1}"))
            _drive(widget.get_value())
        elif name == "viewfinder":
            _state["live_view"] = int(widget.get_value())
        else:
            self._camera.set_single_config(name, widget, context)

    def capture(self, kind: int, context: Any) -> Any:
        _state["captures"] += 1
        _save()
        fault = _fault(f"grab:{int(_state['captures'])}")
        _suffer(fault)
        write_picture()
        if fault == "refused":  # libgphoto2 itself fails to read the picture
            with PICTURE.open("r+b") as file:
                file.truncate(1000)
        path = self._camera.capture(kind, context)
        if fault == "truncated":  # delivered with the right length, but without its second half
            whole = PICTURE.read_bytes()
            end = whole.rindex(b"\xff\xd9") + 2
            write_picture(whole[: end // 2])
        if fault == "noise":
            write_picture(np.random.default_rng(0).bytes(FILE_BYTES))
        if fault == "download":
            PICTURE.unlink()
        return path

    def file_get(self, folder: str, name: str, kind: int, file: Any, context: Any) -> Any:
        try:
            return self._camera.file_get(folder, name, kind, file, context)
        finally:
            if not PICTURE.exists():
                write_picture()

    def _focus_widget(self) -> _Widget:
        return _Widget("manualfocusdrive", _gp.GP_WIDGET_RANGE, 0.0)

    def _live_view_widget(self) -> _Widget:
        return _Widget("viewfinder", _gp.GP_WIDGET_TOGGLE, _state["live_view"])


if __name__ == "__main__":
    from capture.cameras import gphoto
    from reconstruct.cli import main

    gphoto.DRIVER = "tests.capture.virtual_dslr"
    sys.argv[0] = "daif"
    main()
