"""Cameras by URI; a backend and its driver are imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from capture.cameras.base import Camera
from capture.errors import UsageError

if TYPE_CHECKING:
    from capture.cameras.profiles import CameraProfile

SCHEMES = ("gphoto2", "opencv", "picamera2", "simulated", "replay")


def open_camera(
    uri: str,
    *,
    profile: CameraProfile | None = None,
    delete_from_camera: bool = False,
    manual_focus: bool = False,
) -> Camera:
    """The camera that `uri` names; it connects at its `open()`.

    `gphoto2:` (first found), `gphoto2:MODEL`, `gphoto2:usb:001,004`; `opencv:0` or `opencv:video.avi`; `picamera2:`;
    `simulated:SCENE`; `replay:FOLDER`. Options of a backend follow as `?name=value&...`.

    Args:
        profile: what is known of a gphoto2 body, instead of the profile that fits its model.
        delete_from_camera: gphoto2: delete pictures from the card once they are stored.
        manual_focus: the operator turns the ring; a focus motor is left alone.

    Raises:
        UsageError: no such kind of camera, or an option that it does not have.
    """
    from capture.config import did_you_mean

    scheme, colon, rest = uri.partition(":")
    if not colon or scheme not in SCHEMES:
        raise UsageError(f"camera {uri!r}: {scheme!r} is no kind of camera{did_you_mean(scheme, SCHEMES)}")
    place, _, query = rest.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    if scheme == "gphoto2":
        _no_options(uri, options)
        from capture.cameras.gphoto import gphoto_worker

        return gphoto_worker(place, profile=profile, delete_from_camera=delete_from_camera, manual_focus=manual_focus)
    if scheme == "opencv":
        from capture.cameras.opencv import opencv_worker

        return opencv_worker(place or "0", options, manual_focus=manual_focus)
    if scheme == "picamera2":
        _no_options(uri, options)
        from capture.cameras.worker import WorkerCamera

        return WorkerCamera("capture.cameras.picamera:PicameraCamera", {"index": int(place) if place.isdigit() else 0})
    if scheme == "simulated":
        from capture.cameras.simulated import simulated_camera

        return simulated_camera(place, options)
    _no_options(uri, options)
    from capture.cameras.replay import ReplayCamera

    return ReplayCamera(Path(place))


def _no_options(uri: str, options: Mapping[str, str]) -> None:
    if options:
        raise UsageError(f"camera {uri!r}: there is no option '{next(iter(options))}' for this kind of camera")
