"""What differs between camera brands, as data: `CameraProfile`, read from `configs/cameras/*.yaml`.

A user adds a body without code by putting a file into `~/.config/daif/cameras/` (`daif cameras --probe` writes one).
Sources of the shipped profiles: libgphoto2 2.5.34's drivers and the reports listed in notes/capture.md 2.1. None was
tried on a real body by us.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from capture.config import load_yaml
from capture.errors import UsageError


class FocusDrive(BaseModel):
    """How a brand's focus motor is driven through one libgphoto2 setting.

    Attributes:
        widget: name of the setting.
        method: "choices" sends one of the listed words per step; "amount" sends a signed number of motor units;
            "absolute" sends a position and reads it back.
        fine_near, fine_far: "choices": one step towards near and far; the first name that the body offers is taken.
        coarse_near, coarse_far: "choices": a large move, used for homing only: large and small moves are not multiples
            of each other on any body (notes/capture.md 2.1, 4).
        near_sign: "amount": sign of the number that moves towards near; +1 or -1. "absolute": which end is the nearer.
        unit: "amount": motor units per step of ours.
        largest: "amount": most motor units in one call; longer moves are split.
        travel: steps from stop to stop; homing over-drives by this, and it is the far end of the range.
        pause_s: wait after each command, since most bodies do not say when the motor has stopped.
        live_view: focus moves only while the setting `live_view_widget` is on.
        limit_text, too_small_text: words in the driver's message that mean an end stop, or too small a step.
        position_widget: a setting that reads back where the lens is, empty if there is none.
        backlash, settle_s: see `Capabilities`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    widget: str
    method: Literal["choices", "amount", "absolute"]
    fine_near: tuple[str, ...] = ()
    fine_far: tuple[str, ...] = ()
    coarse_near: tuple[str, ...] = ()
    coarse_far: tuple[str, ...] = ()
    coarse_moves: int = Field(default=30, ge=1)
    near_sign: Literal[-1, 1] = -1
    unit: int = Field(default=1, ge=1)
    largest: int = Field(default=32767, ge=1)
    travel: float = Field(gt=0)
    pause_s: float = Field(default=0.0, ge=0, le=10)
    live_view: bool = False
    live_view_widget: str = "viewfinder"
    limit_text: tuple[str, ...] = ("limit",)
    too_small_text: tuple[str, ...] = ("too small",)
    position_widget: str = ""
    backlash: float = Field(default=0.0, ge=0)
    settle_s: float = Field(default=0.5, ge=0, le=30)

    @model_validator(mode="after")
    def _complete(self) -> FocusDrive:
        if self.method == "choices" and not (self.fine_near and self.fine_far):
            raise ValueError("method: choices needs fine_near and fine_far")
        return self


class CaptureMethod(BaseModel):
    """How a picture is released and where it goes.

    Attributes:
        method: "capture" (libgphoto2's own), "trigger" (release, then wait for files) or "release" (press and let go
            through `release_widget`: no half-press, so no autofocus).
        press, let_go: "release": values of `release_widget`; the first that the body offers is taken.
        format_widgets: settings whose value holds a "+" when the body writes RAW and JPEG.
        first_delay_s: wait before the first picture after connecting.
        settings: settings to make at the start and put back at the end, where the body has them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: Literal["capture", "trigger", "release"] = "capture"
    release_widget: str = "eosremoterelease"
    press: tuple[str, ...] = ()
    let_go: tuple[str, ...] = ()
    format_widgets: tuple[str, ...] = ("imageformat", "imagequality")
    first_delay_s: float = Field(default=0.0, ge=0, le=30)
    settings: dict[str, tuple[str, ...]] = Field(default_factory=dict)


class ExposureWidgets(BaseModel):
    """Names of the exposure settings; the first that a body has is used."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exposure_time_s: tuple[str, ...] = ("shutterspeed", "shutterspeed2")
    iso: tuple[str, ...] = ("iso",)
    f_number: tuple[str, ...] = ("aperture", "f-number")
    white_balance: tuple[str, ...] = ("whitebalance",)
    mode: tuple[str, ...] = ("expprogram", "autoexposuremode")
    manual_words: tuple[str, ...] = ("Manual", "M")


class CameraProfile(BaseModel):
    """Everything that is particular to a family of bodies.

    Attributes:
        match: parts of the model's name, any case; the longest match of all profiles wins.
        notes: what is known, and what is not established, for people.
        mirror_lockup_widgets: settings that make tethered capture fail when on; warned about.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    match: tuple[str, ...] = Field(min_length=1)
    focus: FocusDrive | None = None
    capture: CaptureMethod = CaptureMethod()
    exposure: ExposureWidgets = ExposureWidgets()
    mirror_lockup_widgets: tuple[str, ...] = ("mirrorlock", "mirrorupstatus")
    notes: str = ""


def shipped_folder() -> Path:
    """Folder of the profiles that come with the package: installed, or of the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "profiles"
    return installed if installed.is_dir() else package.parent / "configs" / "cameras"


def user_folder() -> Path:
    """Where a user's own profiles lie."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "daif" / "cameras"


@functools.cache
def _profiles_in(folder: Path) -> tuple[CameraProfile, ...]:
    return tuple(load_yaml(path, CameraProfile) for path in sorted(folder.glob("*.yaml")))


def profile_for(model: str) -> CameraProfile | None:
    """The profile whose `match` fits `model` best, the user's before the shipped; None if nothing is known of it."""
    for folder in (user_folder(), shipped_folder()):
        best, best_length = None, 0
        for profile in _profiles_in(folder):
            length = max((len(word) for word in profile.match if word.lower() in model.lower()), default=0)
            if length > best_length:
                best, best_length = profile, length
        if best is not None:
            return best
    return None


def read_profile(path: Path) -> CameraProfile:
    """The profile in `path`; `UsageError` names the line of what is wrong."""
    if not path.is_file():
        raise UsageError(f"camera profile {path} does not exist")
    return load_yaml(path, CameraProfile)
