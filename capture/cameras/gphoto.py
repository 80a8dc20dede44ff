"""DSLRs and mirrorless bodies through libgphoto2; meant to run inside `worker.py`'s process.

Rules for the binding, each of them a measured trap (notes/capture.md 1.7): the empty text, menu or radio setting that
segfaults version 2.6.4 is asked for through ctypes first; a setting is fetched fresh, set and read back one at a time,
because whole-tree writes skip values that look unchanged; only listed choices are sent, since others crash the next
read; message translation is off, because values are translated too; event loops are bounded by a clock, never by a
count.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import locale
import logging
import math
import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capture.cameras.base import (
    CameraBusy,
    CameraClosed,
    CameraDisconnected,
    CameraError,
    CameraInfo,
    CameraInUse,
    CameraNotFound,
    CameraStorageFull,
    CameraTimeout,
    Capabilities,
    CaptureFailed,
    ControlRejected,
    ExposureSettings,
    FocusLimit,
    FocusNotHomed,
    FocusNotReady,
    FocusRange,
    FocusReport,
    FocusStepTooSmall,
    Frame,
    UnsupportedControl,
)
from capture.cameras.profiles import CameraProfile, FocusDrive, profile_for
from capture.cameras.worker import WorkerCamera

logger = logging.getLogger(__name__)

DRIVER = "gphoto2"  # module to import; the tests' rig around the virtual camera takes its place

PAIR_WAIT_S = 15.0  # for the second file of a RAW+JPEG pair
EVENT_POLL_S = 0.005
BUSY_S = 10.0
STILL_MOVING_S = 1.0  # Nikon's driver waits 1 s for the motor and then says busy while a long rack goes on
ABSOLUTE_TRIES = 5
JPEG_SUFFIXES = (".jpg", ".jpeg")


class GphotoCamera:
    """One body, found by model name or port; a `Camera`.

    Args:
        model: part of the model's name, any case; empty for the first camera found.
        port: libgphoto2 port such as "usb:001,004"; empty for any.
        profile: what is known of the brand; None looks it up by the model that answers.
        delete_from_camera: name pictures on the card in `Frame.on_card`, to be deleted once they are stored; pictures
            in the camera's memory are always deleted after download, since that memory holds only a few.
        manual_focus: leave the motor alone; the operator turns the ring.
        driver: module with gphoto2's interface.
    """

    def __init__(
        self,
        *,
        model: str = "",
        port: str = "",
        profile: CameraProfile | None = None,
        delete_from_camera: bool = False,
        manual_focus: bool = False,
        driver: str = DRIVER,
    ) -> None:
        self._wanted_model, self._wanted_port = model, port
        self._given_profile = profile
        self._delete = delete_from_camera
        self._manual_focus = manual_focus
        self._driver = driver
        self.gp: Any = None
        self._camera: Any = None
        self.context: Any = None
        self._messages: list[str] = []
        self._profile: CameraProfile | None = None
        self._restore: dict[str, Any] = {}
        self._count: float | None = None  # dead-reckoned steps from the near stop
        self._live_view = False
        self._opened_s = 0.0
        self._in_memory = False
        self._setting_names: set[str] | None = None

    # --- opening and closing

    def open(self) -> CameraInfo:
        self.close()
        self.load()
        with self._errors("open"):
            found = detect(self.gp, self.context)
            model, port = self._choose(found)
            camera = self.gp.Camera()
            ports = self.gp.PortInfoList()
            ports.load()
            camera.set_port_info(ports[ports.lookup_path(port)])
            camera.init(self.context)
        self._camera, self._opened_s = camera, time.monotonic()
        self._messages.clear()
        try:
            self._profile = self._given_profile or profile_for(model)
            self._count = None
            for name, values in self._profile.capture.settings.items() if self._profile else ():
                self._set_first_offered(name, values)
            self._in_memory = "ram" in (self._read("capturetarget") or "").lower()
            for name in self._profile.mirror_lockup_widgets if self._profile else ():
                if (self._read(name) or "").lower() in ("1", "on", "yes"):
                    logger.warning("mirror lock-up (%s) is on: tethered capture often fails busy; switch it off", name)
            return CameraInfo(
                make=self._read("manufacturer") or model.split()[0],
                model=model,
                serial=self._read("serialnumber") or "",
                driver=f"gphoto2 {port}",
                capabilities=self._capabilities(),
                battery=self._read("batterylevel"),
            )
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        camera = self._camera
        if camera is None:
            return
        if self._live_view:
            self._quietly("live view", lambda: self.set_live_view(False))
        for name, value in reversed(self._restore.items()):
            self._quietly(name, lambda name=name, value=value: self._write(name, value))
        self._restore.clear()
        self._camera = None
        self._quietly("exit", lambda: camera.exit(self.context))
        self._count, self._live_view, self._setting_names = None, False, None

    def __enter__(self) -> GphotoCamera:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def load(self) -> None:
        """Import the driver with translations off."""
        os.environ.pop("LANGUAGE", None)
        os.environ["LC_MESSAGES"] = "C"
        if self.gp is None:
            try:
                self.gp = importlib.import_module(self._driver)
            except ImportError as error:
                raise CameraNotFound(
                    f"the gphoto2 package cannot be imported ({error}); it exists for Linux and macOS", stage="open"
                ) from None
            self.context = self.gp.Context()
            self._callback = self.context.set_error_func(self._on_message, None)  # unregistered when collected
        locale.setlocale(locale.LC_MESSAGES, "C")  # widget values are translated too: "Near 1" would be "Nah 1"

    def _on_message(self, context: Any, text: Any, data: Any) -> None:
        self._messages.append(text.decode("utf-8", "replace") if isinstance(text, bytes) else str(text))

    def _choose(self, found: list[tuple[str, str]]) -> tuple[str, str]:
        for model, port in found:
            if self._wanted_port and self._wanted_port != port:
                continue
            if self._wanted_model.lower() in model.lower():
                return model, port
        wanted = self._wanted_port or self._wanted_model
        if not found:
            raise CameraNotFound("no camera answers on USB", stage="open")
        names = ", ".join(f"{model} at {port}" for model, port in found)
        raise CameraNotFound(f"no camera matches {wanted!r}; found: {names}", stage="open")

    def _capabilities(self) -> Capabilities:
        offered = self._names()
        focus = self._focus_or_none()
        preview = bool(self._camera.get_abilities().operations & self.gp.GP_OPERATION_CAPTURE_PREVIEW)
        return Capabilities(
            focus="manual" if focus is None else "absolute" if focus.method == "absolute" else "relative",
            focus_unit="driver" if focus and focus.method == "absolute" else "step" if focus else "m",
            focus_readback=bool(focus and focus.method == "absolute"),
            needs_live_view=bool(focus and focus.live_view),
            preview=preview,
            raw=any(self._offers_raw(name) for name in self._format_widgets() if name in offered),
            exposure_lock=any(name in offered for name in ("shutterspeed", "shutterspeed2")),
            end_stop_signal=bool(focus and focus.method == "amount" and focus.limit_text),
            backlash=focus.backlash if focus else 0.0,
            settle_s=focus.settle_s if focus else 0.5,
        )

    def _offers_raw(self, name: str) -> bool:
        return any(word in choice.upper() for choice in self._choices(name) for word in ("RAW", "NEF", "CR"))

    def _format_widgets(self) -> tuple[str, ...]:
        return self._profile.capture.format_widgets if self._profile else ("imageformat", "imagequality")

    # --- exposure

    def lock_exposure(self, settings: ExposureSettings) -> ExposureSettings:
        names = (self._profile or CameraProfile(match=("any",))).exposure
        offered = self._names()
        mode = next((name for name in names.mode if name in offered), None)
        if mode and (value := self._read(mode)) not in (None, *names.manual_words):
            self._set_first_offered(mode, names.manual_words)
            if self._read(mode) not in names.manual_words:
                raise ControlRejected(f"exposure mode is {value!r} and must be manual", stage="lock_exposure")
        time_s = self._lock_number(offered, names.exposure_time_s, settings.exposure_time_s, "exposure_time_s")
        iso = self._lock_number(offered, names.iso, settings.iso, "iso")
        f_number = self._lock_number(offered, names.f_number, settings.f_number, "f_number")
        return ExposureSettings(time_s, iso, f_number, self._lock_white_balance(offered, names, settings))

    def _lock_number(self, offered: set[str], names: tuple[str, ...], wanted: float | None, field: str) -> float | None:
        """Set the first of `names` that the body has to `wanted`; the number read back, None if it has none of them."""
        name = next((name for name in names if name in offered), None)
        if name is None:
            if wanted is not None:
                raise UnsupportedControl(f"this camera has no {field} to set; leave it out", stage="lock_exposure")
            return None
        if wanted is not None:
            choices = {choice: parse_number(choice) for choice in self._choices(name)}
            numbers = {choice: number for choice, number in choices.items() if number is not None and number > 0}
            if not numbers:
                raise UnsupportedControl(f"{name} offers nothing to choose from on this camera", stage="lock_exposure")
            nearest = min(numbers, key=lambda choice: abs(math.log(numbers[choice] / wanted)))
            if abs(math.log(numbers[nearest] / wanted)) > 0.06:  # a third of a stop is 0.23
                raise ControlRejected(
                    f"{name} cannot be {wanted:g}; the nearest that this camera offers is {nearest}",
                    stage="lock_exposure",
                )
            self._set(name, nearest)
        text = self._read(name)
        value = parse_number(text or "")
        if value is None and text is not None and text.lower().startswith("auto"):
            raise ControlRejected(f"{name} is on {text!r} and would change between frames", stage="lock_exposure")
        return value

    def _lock_white_balance(self, offered: set[str], names: Any, settings: ExposureSettings) -> str | None:
        name = next((name for name in names.white_balance if name in offered), None)
        if name is None:
            if settings.white_balance is not None:
                raise UnsupportedControl("this camera has no white balance to set", stage="lock_exposure")
            return None
        if settings.white_balance is not None:
            self._set(name, settings.white_balance)
        elif (self._read(name) or "").lower().startswith("auto"):
            self._set_first_offered(name, ("Daylight", "Sunny", "Direct sunlight", "Fine Weather"))
        value = self._read(name)
        if value is not None and value.lower().startswith("auto"):
            raise ControlRejected("white balance is automatic and would change between frames", stage="lock_exposure")
        return value

    # --- focus

    def set_live_view(self, on: bool) -> None:
        focus = self._focus_or_none()
        name = focus.live_view_widget if focus else "viewfinder"
        if name not in self._names():
            return
        with self._errors("set_live_view"):
            self._write(name, int(on))
        self._live_view = on

    def focus_range(self) -> FocusRange:
        focus = self._focus("focus_range")
        if focus.method != "absolute":
            return FocusRange(0.0, focus.travel, 1.0, "step", "profile")
        with self._errors("focus_range"):
            widget = self._single(focus.widget)
            low, high, step = widget.get_range() if widget.get_type() == self.gp.GP_WIDGET_RANGE else (0, 0, 0)
        source: Literal["device", "profile"] = "device"
        if not high > low:
            low, high, step, source = 0.0, focus.travel, 1.0, "profile"
        near, far = (high, low) if focus.near_sign > 0 else (low, high)
        return FocusRange(float(near), float(far), float(step) or 1.0, "driver", source)

    def home(self, end: Literal["near", "far"] = "near") -> FocusReport:
        focus = self._focus("home")
        limits = self.focus_range()
        if focus.method == "absolute":
            start = self.position()
            target = limits.near if end == "near" else limits.far
            report = self.move_focus(target)
            travelled = None if start is None else abs(start - target)
            return FocusReport(target, report.position, True, report.finished_s, travelled)
        sign = 1 if end == "far" else -1
        if focus.method == "choices":
            names = focus.coarse_far if end == "far" else focus.coarse_near
            names = names or (focus.fine_far if end == "far" else focus.fine_near)
            self._drive_words(focus, names, focus.coarse_moves)
            travelled = None
        else:
            travelled = self._amount_to_stop(focus, sign, limits.far)
        self._count = limits.near if end == "near" else limits.far
        return FocusReport(self._count, self._count, True, time.time(), travelled)

    def _amount_to_stop(self, focus: FocusDrive, sign: int, travel: float) -> float | None:
        """Drive until the body reports its stop, or past the whole travel; steps gone (to half a chunk), else None."""
        gone = 0
        chunk = max(1, min(focus.largest // focus.unit, round(travel / 40)))
        while gone < 1.5 * travel + chunk:
            try:
                self._drive_amount(focus, sign * chunk)
            except FocusLimit:
                return gone + 0.5 * chunk
            gone += chunk
        return None

    def move_focus(self, target: float) -> FocusReport:
        focus = self._focus("move_focus")
        if not self.focus_range().contains(target):
            limits = self.focus_range()
            raise FocusLimit(
                f"position {target:g} is outside this lens's {limits.near:g} to {limits.far:g}", stage="move_focus"
            )
        if focus.method == "absolute":
            return self._move_absolute(focus, target)
        if self._count is None:
            raise FocusNotHomed("the lens position is not known until it was driven to its stop", stage="move_focus")
        steps = round(target - self._count)
        at_limit = False
        if focus.method == "choices":
            self._drive_words(focus, focus.fine_far if steps > 0 else focus.fine_near, abs(steps))
            self._count += steps
        else:
            try:
                self._drive_amount(focus, steps)
                self._count += steps
            except FocusLimit:
                at_limit = True
                self._count = None if steps > 0 else 0.0
        return FocusReport(target, self._count, at_limit, time.time())

    def position(self) -> float | None:
        focus = self._focus_or_none()
        if focus is None:
            return None
        if focus.method == "absolute":
            return parse_number(self._read(focus.position_widget or focus.widget) or "")
        return self._count

    def _move_absolute(self, focus: FocusDrive, target: float) -> FocusReport:
        """Send the position until it reads back: Fuji bodies overshoot."""
        for _ in range(ABSOLUTE_TRIES):
            self._command(focus, round(target))
            position = self.position()
            if position is None or abs(position - target) <= 1:
                return FocusReport(target, position, False, time.time())
        raise ControlRejected(
            f"the lens stands at {position:g} after {ABSOLUTE_TRIES} commands to go to {target:g}", stage="move_focus"
        )

    def _drive_words(self, focus: FocusDrive, names: tuple[str, ...], times: int) -> None:
        if times == 0:
            return
        choices = self._choices(focus.widget)
        word = next((name for name in names if name in choices), None)
        if word is None:
            raise UnsupportedControl(
                f"{focus.widget} offers none of {', '.join(names)} but {', '.join(choices)}; name them in the profile",
                stage="move_focus",
            )
        for _ in range(times):
            self._command(focus, word)

    def _drive_amount(self, focus: FocusDrive, steps: int) -> None:
        remaining = abs(steps) * focus.unit
        sign = focus.near_sign if steps < 0 else -focus.near_sign
        while remaining > 0:
            amount = min(remaining, focus.largest)
            self._command(focus, float(sign * amount))
            remaining -= amount

    def _command(self, focus: FocusDrive, value: Any) -> None:
        """Send one drive command and wait for its end, as far as the driver tells."""
        deadline = time.monotonic() + BUSY_S
        while True:
            try:
                with self._errors("move_focus"):
                    self._write(focus.widget, value)
                break
            except CameraBusy:
                if focus.method == "amount":  # the command was taken: sending it again would move twice
                    time.sleep(STILL_MOVING_S)
                    break
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)
        time.sleep(focus.pause_s)

    def nudge(self, steps: int) -> None:
        """Drive by `steps` of the profile, positive towards far, whatever the count says; for probing."""
        focus = self._focus("move_focus")
        self._count = None
        if focus.method == "choices":
            self._drive_words(focus, focus.fine_far if steps > 0 else focus.fine_near, abs(steps))
        else:
            self._drive_amount(focus, steps)

    def offers(self, name: str) -> tuple[list[str], bool]:
        """Choices of a setting and whether it takes a number; ([], False) if the body lacks it. For probing."""
        self._require_open("settings")
        if name not in self._names():
            return [], False
        with self._errors("settings"):
            is_range = self._single(name).get_type() == self.gp.GP_WIDGET_RANGE
        return self._choices(name), is_range

    def _focus_or_none(self) -> FocusDrive | None:
        self._require_open("focus")
        focus = self._profile.focus if self._profile and not self._manual_focus else None
        return focus if focus is not None and focus.widget in self._names() else None

    def _focus(self, stage: str) -> FocusDrive:
        focus = self._focus_or_none()
        if focus is None:
            raise UnsupportedControl(
                "the focus of this camera cannot be driven; turn the ring by hand (daif capture --manual-focus) "
                "or add a profile with daif cameras --probe",
                stage=stage,
            )
        return focus

    # --- pictures

    def grab(self, timeout_s: float) -> Frame:
        self._require_open("grab")
        capture = (self._profile or CameraProfile(match=("any",))).capture
        wait_s = capture.first_delay_s - (time.monotonic() - self._opened_s)
        if wait_s > 0:
            time.sleep(wait_s)
        deadline = time.monotonic() + timeout_s
        expected = 2 if any("+" in (self._read(name) or "") for name in capture.format_widgets) else 1
        self._drain_events()
        started_s = time.time()
        paths: list[tuple[str, str]] = []
        with self._errors("grab"):
            if capture.method == "capture":
                path = self._camera.capture(self.gp.GP_CAPTURE_IMAGE, self.context)
                paths.append((path.folder, path.name))
            elif capture.method == "trigger":
                self._camera.trigger_capture(self.context)
        if capture.method == "release":
            self._press_and_let_go(capture.release_widget, capture.press, capture.let_go)
        self._collect(paths, expected, deadline)
        originals = tuple((name, self._download(folder, name, deadline)) for folder, name in paths)
        if self._in_memory:
            self.delete_from_card(tuple(paths))
        exposure = self._profile.exposure if self._profile else CameraProfile(match=("any",)).exposure
        position = self.position()
        return Frame(
            image=None,
            originals=tuple(sorted(originals, key=lambda item: item[0].lower().endswith(JPEG_SUFFIXES))),
            on_card=tuple(paths) if self._delete and not self._in_memory else (),
            started_s=started_s,
            finished_s=time.time(),
            exposure_time_s=self._number_of(exposure.exposure_time_s),
            f_number=self._number_of(exposure.f_number),
            iso=self._number_of(exposure.iso),
            focus_position=math.nan if position is None else position,
            metadata=self._extra_metadata(),
        )

    def delete_from_card(self, files: tuple[tuple[str, str], ...]) -> None:
        self._require_open("delete_from_card")
        for folder, name in files:
            try:
                with self._errors("delete_from_card"):
                    self._camera.file_delete(folder, name, self.context)
            except CameraError as error:
                logger.warning("%s could not be deleted from the camera: %s", name, error)

    def preview(self) -> NDArray[np.uint8]:
        import cv2

        self._require_open("preview")
        file = self.gp.CameraFile()
        with self._errors("preview"):
            self._camera.capture_preview(file, self.context)
            data = np.frombuffer(bytes(file.get_data_and_size()), np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
        if image is None:
            raise CaptureFailed("the live view picture cannot be decoded", stage="preview")
        return image

    def _press_and_let_go(self, widget: str, press: tuple[str, ...], let_go: tuple[str, ...]) -> None:
        try:
            if self._set_first_offered(widget, press, restore=False, verify=False) is None:
                raise UnsupportedControl(f"{widget} offers none of {', '.join(press)}", stage="grab")
        finally:
            self._set_first_offered(widget, let_go, restore=False, verify=False)

    def _collect(self, paths: list[tuple[str, str]], expected: int, deadline: float) -> None:
        """Wait for the files of this exposure: all that are expected, or what has come when the clock runs out."""
        gp = self.gp
        pair_deadline = min(deadline, time.monotonic() + PAIR_WAIT_S) if paths else deadline
        while len(paths) < expected:
            if time.monotonic() > (pair_deadline if paths else deadline):
                break
            with self._errors("grab"):
                kind, data = self._camera.wait_for_event(100, self.context)
            if kind == gp.GP_EVENT_FILE_ADDED:
                if (data.folder, data.name) not in paths:
                    paths.append((data.folder, data.name))
                    pair_deadline = min(deadline, time.monotonic() + PAIR_WAIT_S)
            elif kind == gp.GP_EVENT_TIMEOUT:
                time.sleep(EVENT_POLL_S)  # with an empty queue the wait returns at once
        if not paths:
            raise CameraTimeout("the camera released but no file arrived", stage="grab")
        if len(paths) < expected:
            logger.warning("only %s arrived of the RAW+JPEG pair", paths[0][1])

    def _drain_events(self) -> None:
        """Forget events of earlier exposures, so that no old file is taken for the new one."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            with self._errors("grab"):
                kind, _ = self._camera.wait_for_event(1, self.context)
            if kind == self.gp.GP_EVENT_TIMEOUT:
                return

    def _download(self, folder: str, name: str, deadline: float) -> bytes:
        for last in (False, True):
            file = self.gp.CameraFile()  # kept while its bytes are copied
            try:
                with self._errors("download"):
                    self._camera.file_get(folder, name, self.gp.GP_FILE_TYPE_NORMAL, file, self.context)
                    return bytes(file.get_data_and_size())
            except CaptureFailed as error:
                if last or time.monotonic() > deadline:
                    raise CaptureFailed(
                        f"{name} was taken but cannot be downloaded",
                        stage="download",
                        native_code=error.native_code,
                        native_text=error.native_text,
                    ) from None
        raise AssertionError("unreachable")

    def _extra_metadata(self) -> dict[str, Any]:
        found = {name: self._read(name) for name in ("focalposition", "focaldistancemeters", "batterylevel")}
        return {name: value for name, value in found.items() if value is not None}

    def _number_of(self, names: tuple[str, ...]) -> float:
        for name in names:
            value = parse_number(self._read(name) or "")
            if value is not None:
                return value
        return math.nan

    # --- settings, one at a time

    def _names(self) -> set[str]:
        """Names of the settings that this body really has."""
        if self._setting_names is None:
            with self._errors("settings"):
                self._setting_names = set(_leaf_names(self._camera.get_config(self.context)))
        return self._setting_names

    def _single(self, name: str) -> Any:
        return self._camera.get_single_config(name, self.context)

    def _read(self, name: str) -> str | None:
        """Value of a setting as text; None if the body lacks it or it is empty."""
        if name not in self._names():
            return None
        with self._errors("settings"):
            value = widget_value(self.gp, self._single(name))
        return None if value is None else str(value)

    def _choices(self, name: str) -> list[str]:
        if name not in self._names():
            return []
        with self._errors("settings"):
            widget = self._single(name)
            if widget.get_type() not in (self.gp.GP_WIDGET_RADIO, self.gp.GP_WIDGET_MENU):
                return []
            return [widget.get_choice(i) for i in range(widget.count_choices())]

    def _write(self, name: str, value: Any) -> None:
        """Send one value through a fresh widget: a cached one would skip values that look unchanged."""
        widget = self._single(name)
        widget.set_value(value)
        self._camera.set_single_config(name, widget, self.context)

    def _set(self, name: str, value: str) -> None:
        """Set a setting to one of its choices, check by reading back, and remember what to restore."""
        choices = self._choices(name)
        if choices and value not in choices:
            raise ControlRejected(
                f"{name} cannot be {value!r}; this camera offers {', '.join(choices)}", stage="settings"
            )
        before = self._read(name)
        if before == value:
            return
        with self._errors("settings"):
            self._write(name, value)
        if before is not None:
            self._restore.setdefault(name, before)
        after = self._read(name)
        if after != value:
            raise ControlRejected(f"{name} was set to {value!r} and reads back {after!r}", stage="settings")

    def _set_first_offered(
        self, name: str, values: tuple[str, ...], *, restore: bool = True, verify: bool = True
    ) -> str | None:
        """Set `name` to the first of `values` that the body offers; which one, None if it offers none."""
        choices = self._choices(name)
        value = next((value for value in values if value in choices), None)
        if value is None:
            return None
        if restore and verify:
            self._set(name, value)
        else:
            with self._errors("grab"):
                self._write(name, value)
        return value

    # --- errors

    def _require_open(self, stage: str) -> None:
        if self._camera is None:  # libgphoto2 itself crashes on a call after exit
            raise CameraClosed(f"the camera is not open, {stage} needs open() first", stage=stage)

    def _quietly(self, what: str, action: Any) -> None:
        try:
            with self._errors("close"):
                action()
        except CameraError as error:
            logger.warning("%s could not be put back: %s", what, error)

    @contextlib.contextmanager
    def _errors(self, stage: str) -> Iterator[None]:
        """Turn libgphoto2's numbers into our errors."""
        if self._camera is None and stage not in ("open", "close"):
            self._require_open(stage)
        self._messages.clear()
        try:
            yield
        except self.gp.GPhoto2Error as error:
            text = "; ".join(self._messages) or str(error.string)
            raise error_for(error.code, text, stage) from None


def gphoto_worker(
    place: str,
    *,
    profile: CameraProfile | None = None,
    delete_from_camera: bool = False,
    manual_focus: bool = False,
) -> WorkerCamera:
    """The camera at `place` (model, port or nothing) in a worker process."""
    is_port = place.split(":", 1)[0] in ("usb", "ptpip", "serial", "usbscsi", "usbdiskdirect", "disk")
    arguments = {
        "model": "" if is_port else place,
        "port": place if is_port else "",
        "profile": profile,
        "delete_from_camera": delete_from_camera,
        "manual_focus": manual_focus,
        "driver": DRIVER,
    }
    return WorkerCamera("capture.cameras.gphoto:GphotoCamera", arguments)


def error_for(code: int, text: str, stage: str) -> CameraError:
    """The error class for a libgphoto2 result code and the text that came with it (notes/capture.md 7.2)."""
    known: dict[int, tuple[type[CameraError], str]] = {
        -105: (CameraNotFound, "no such camera is connected"),
        -60: (CameraInUse, "another program holds the camera's USB port"),
        -53: (CameraInUse, "another program holds the camera's USB port"),
        -52: (CameraDisconnected, "the camera is gone from USB"),
        -7: (CameraDisconnected, "the connection to the camera broke"),
        -34: (CameraDisconnected, "the connection to the camera broke"),
        -35: (CameraDisconnected, "the connection to the camera broke"),
        -110: (CameraBusy, "the camera is busy"),
        -10: (CameraTimeout, "the camera did not answer in time"),
        -115: (CameraStorageFull, "the camera has no space for another picture"),
        -3: (CameraStorageFull, "the camera has no space for another picture"),
        -6: (UnsupportedControl, f"the camera does not support {stage}"),
        -2: (UnsupportedControl, f"the camera does not know the setting used in {stage}"),
    }
    lower = text.lower()
    if stage == "move_focus":
        if "liveview" in lower.replace(" ", ""):
            return FocusNotReady("the lens moves only in live view", stage=stage, native_code=code, native_text=text)
        if "limit" in lower:
            return FocusLimit("the lens has reached its stop", stage=stage, native_code=code, native_text=text)
        if "too small" in lower:
            return FocusStepTooSmall("the step is too small", stage=stage, native_code=code, native_text=text)
    if code in known:
        kind, sentence = known[code]
        return kind(sentence, stage=stage, native_code=code, native_text=text)
    if stage in ("grab", "download", "preview"):
        return CaptureFailed("the camera did not take the picture", stage=stage, native_code=code, native_text=text)
    if stage in ("settings", "lock_exposure", "move_focus", "set_live_view"):
        return ControlRejected("the camera refused a setting", stage=stage, native_code=code, native_text=text)
    return CameraError(f"the camera failed at {stage}", stage=stage, native_code=code, native_text=text)


def detect(gp: Any, context: Any) -> list[tuple[str, str]]:
    """(model, port) of every camera that libgphoto2 sees."""
    found = gp.Camera.autodetect(context)
    return [(found.get_name(i), found.get_value(i)) for i in range(len(found))]  # iterating fails before 2.6.4


class GphotoLister:
    """Lists what is connected; runs in the worker, since detection goes through the driver too."""

    def __init__(self, driver: str = DRIVER) -> None:
        self._camera = GphotoCamera(driver=driver)

    def cameras(self) -> list[tuple[str, str]]:
        """(model, port) of every connected camera."""
        self._camera.load()
        return detect(self._camera.gp, self._camera.context)

    def close(self) -> None:
        """Nothing is held."""


_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def parse_number(text: str) -> float | None:
    """Number in a setting's text: "1/125" is 0.008, "f/2.8" is 2.8, "0.0100s" is 0.01, "Auto" is None."""
    fraction = re.fullmatch(r"\s*(\d+)/(\d+)\s*s?\s*", text)
    if fraction:
        return int(fraction[1]) / int(fraction[2]) if int(fraction[2]) else None
    found = _NUMBER.search(text.removeprefix("f/").removeprefix("F"))
    return float(found[0]) if found else None


def _leaf_names(widget: Any) -> Iterator[str]:
    count = widget.count_children()
    if count == 0:
        yield widget.get_name()
    for index in range(count):
        yield from _leaf_names(widget.get_child(index))


# --- reading a value without crashing


def widget_value(gp: Any, widget: Any) -> Any:
    """Value of a widget, None if it has none.

    python-gphoto2 2.6.4 calls strlen(NULL) for a text, menu or radio widget without a value (notes/capture.md 1.7), so
    for these types the pointer is looked at through ctypes first.
    """
    holds_text = widget.get_type() in (gp.GP_WIDGET_TEXT, gp.GP_WIDGET_RADIO, gp.GP_WIDGET_MENU)
    if holds_text and hasattr(widget, "this"):
        library = _libgphoto2(gp)
        if library is not None:
            pointer = ctypes.c_void_p()
            library.gp_widget_get_value(ctypes.c_void_p(int(widget.this)), ctypes.byref(pointer))
            if not pointer.value:
                return None
    return widget.get_value()


_libraries: dict[str, ctypes.CDLL] = {}


def _libgphoto2(gp: Any) -> ctypes.CDLL | None:
    """The libgphoto2 that the binding has loaded, found in the process map or in the wheel."""
    if "gphoto2" not in _libraries:
        maps = Path("/proc/self/maps")
        loaded = {line.split()[-1] for line in maps.read_text().splitlines()} if maps.exists() else set()
        paths = [path for path in loaded if re.match(r"libgphoto2[-.]", Path(path).name) and "port" not in path]
        folder = Path(gp.__file__).parent
        paths += [str(path) for path in folder.rglob("libgphoto2.*") if "port" not in path.name and path.is_file()]
        if not paths:
            logger.warning("libgphoto2 was not found in this process: empty settings are not guarded against")
            return None
        _libraries["gphoto2"] = ctypes.CDLL(paths[0])
    return _libraries["gphoto2"]
