"""Which cameras are connected, and what each can do; a driver that crashes or hangs costs its own lines only."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from capture.cameras.base import CameraError, CameraInfo
from capture.cameras.worker import WorkerCamera


def found_cameras() -> list[dict[str, str]]:
    """uri, model and abilities of every camera found."""
    return [*_gphoto_cameras(), *_video_devices(), *_pi_cameras()]


def abilities(info: CameraInfo) -> str:
    """What a camera can do, in words."""
    can = info.capabilities
    words = [f"{can.focus} focus ({can.focus_unit})" if can.focus != "manual" else "manual focus"]
    words += ["position read back"] if can.focus_readback else []
    words += ["RAW"] if can.raw else []
    words += ["live view"] if can.preview else []
    words += ["needs live view to focus"] if can.needs_live_view else []
    return ", ".join(words)


def _gphoto_cameras() -> list[dict[str, str]]:
    if importlib.util.find_spec("gphoto2") is None:
        return []
    from capture.cameras import gphoto

    lister = WorkerCamera("capture.cameras.gphoto:GphotoLister", {"driver": gphoto.DRIVER})
    try:
        with lister:
            lister.start()
            found = lister.call("cameras", deadline_s=20.0)
    except CameraError as error:
        return [{"uri": "gphoto2:", "model": "libgphoto2", "focus": str(error)}]
    return [_describe(f"gphoto2:{port}", model) for model, port in found]


def _video_devices() -> list[dict[str, str]]:
    """V4L2 devices; other systems do not list theirs without opening them one by one."""
    if not sys.platform.startswith("linux"):
        return []
    devices = sorted(path for path in Path("/dev").glob("video*") if path.name[5:].isdigit())
    return [_describe(f"opencv:{path.name[5:]}", str(path)) for path in devices]


def _pi_cameras() -> list[dict[str, str]]:
    return [] if importlib.util.find_spec("picamera2") is None else [_describe("picamera2:", "Raspberry Pi camera")]


def _describe(uri: str, model: str) -> dict[str, str]:
    from capture.cameras import open_camera

    try:
        with open_camera(uri) as camera:
            info = camera.open()
        return {"uri": uri, "model": info.model or model, "focus": abilities(info)}
    except CameraError as error:
        return {"uri": uri, "model": model, "focus": str(error)}
