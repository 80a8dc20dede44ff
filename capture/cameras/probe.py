"""Find out how an unknown body's focus motor behaves, with the operator's eyes, and write it down as a profile.

Four questions: which setting drives the motor, which way is near, how many steps there are from stop to stop, and how
much play the gear has. Pictures answer the last two where they can (a step that changes nothing in a picture of a
textured scene did not move the lens); the operator answers the first two.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import yaml

from capture.cameras import open_camera
from capture.cameras.base import CameraError, FocusLimit, UnsupportedControl
from capture.cameras.profiles import CameraProfile, FocusDrive, profile_for, user_folder
from capture.cameras.worker import WorkerCamera
from capture.decode import decode_image
from capture.errors import UsageError
from capture.output import write_text
from capture.quality import FrameSummary, looks_unchanged, summarise

WIDGETS = ("manualfocusdrive", "manualfocus")
TEST_STEPS = 20
CHUNKS_OF_TRAVEL = 200  # stop looking for the end after this many moves of TEST_STEPS
MOST_BACKLASH = 40
STILL_MOVES = 3  # moves that change nothing before the stop counts as reached

Ask = Callable[[str], str]


def probe_focus(uri: str, *, ask: Ask) -> CameraProfile:
    """The profile of the gphoto2 body at `uri`, from what is known of its brand and what this session shows.

    Args:
        ask: puts a question to the operator and returns the answer.

    Raises:
        UsageError: not a gphoto2 camera.
        UnsupportedControl: the body offers no setting that drives the focus.
    """
    if not uri.startswith("gphoto2:"):
        raise UsageError(f"--probe {uri}: only gphoto2 cameras need a profile; write gphoto2: for the first one")
    camera = open_camera(uri)
    assert isinstance(camera, WorkerCamera)
    with camera:
        info = camera.open()
        known = profile_for(info.model) or CameraProfile(match=(info.model,))
        focus = known.focus or _guess(camera)
    ask(f"{info.model}: put it on a tripod before a textured scene, lens on AF or as its manual says, then press Enter")
    focus = _with_polarity(uri, known, focus, ask)
    profile = known.model_copy(update={"match": (info.model,), "focus": focus})
    camera = open_camera(uri, profile=profile)
    assert isinstance(camera, WorkerCamera)
    with camera:
        camera.open()
        if focus.live_view:
            camera.set_live_view(True)
        travel = _travel(camera, ask)
        backlash = _backlash(camera)
    notes = f"{known.notes} Probed with the lens that was on it: travel and backlash belong to that lens.".strip()
    focus = focus.model_copy(update={"travel": float(travel), "backlash": float(backlash)})
    return profile.model_copy(update={"focus": focus, "notes": notes})


def write_profile(profile: CameraProfile, path: Path | None) -> Path:
    """Write a profile to `path`, or among the user's own, where an earlier one is kept beside it; where it went."""
    text = yaml.safe_dump(profile.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=120)
    if path is None:
        name = "".join(letter if letter.isalnum() else "-" for letter in profile.match[0].lower())
        path = user_folder() / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            path.rename(f"{path}.{time.strftime('%Y-%m-%dT%H-%M-%S', time.localtime(path.stat().st_mtime))}")
    write_text(path, f"# written by daif cameras --probe\n{text}")
    return path


def _guess(camera: WorkerCamera) -> FocusDrive:
    """How a body without a known brand may be driven, from the kind of setting that it has."""
    for widget in WIDGETS:
        choices, is_range = camera.call("offers", widget)
        if is_range:
            return FocusDrive(widget=widget, method="amount", travel=1000, live_view=True)
        near = tuple(word for word in choices if word.lower().startswith("near"))
        far = tuple(word for word in choices if word.lower().startswith("far"))
        if near and far:
            return FocusDrive(
                widget=widget,
                method="choices",
                fine_near=near[:1],
                fine_far=far[:1],
                coarse_near=near[-1:],
                coarse_far=far[-1:],
                travel=1000,
                pause_s=0.1,
                live_view=True,
            )
    raise UnsupportedControl(
        f"this body has none of the settings {', '.join(WIDGETS)} that drive a lens", stage="probe"
    )


def _with_polarity(uri: str, known: CameraProfile, focus: FocusDrive, ask: Ask) -> FocusDrive:
    """`focus` with near and far the right way round, as the operator sees it."""
    if focus.method == "absolute":
        return focus
    camera = open_camera(uri, profile=known.model_copy(update={"focus": focus}))
    assert isinstance(camera, WorkerCamera)
    with camera:
        camera.open()
        if focus.live_view:
            camera.set_live_view(True)
        for _ in range(3):
            try:
                camera.call("nudge", TEST_STEPS)
            except FocusLimit:
                camera.call("nudge", -2 * TEST_STEPS)
                continue
            answer = ask("the lens was moved: did its plane of focus go [f]arther, [n]earer, or [s]tay").strip().lower()
            if answer.startswith("f"):
                return focus
            if answer.startswith("n"):
                return _reversed(focus)
    raise UnsupportedControl(
        f"the lens does not follow {focus.widget}; check its AF/MF switch, and whether live view has to be on",
        stage="probe",
    )


def _reversed(focus: FocusDrive) -> FocusDrive:
    return focus.model_copy(
        update={
            "near_sign": -focus.near_sign,
            "fine_near": focus.fine_far,
            "fine_far": focus.fine_near,
            "coarse_near": focus.coarse_far,
            "coarse_far": focus.coarse_near,
        }
    )


def _travel(camera: WorkerCamera, ask: Ask) -> int:
    """Steps from the near to the far stop."""
    camera.home("near")
    steps, still = 0, 0
    before = _look(camera)
    for _ in range(CHUNKS_OF_TRAVEL):
        try:
            camera.call("nudge", TEST_STEPS)
        except FocusLimit:
            return steps
        after = _look(camera)
        still = still + 1 if looks_unchanged(before, after) else 0
        steps, before = steps + TEST_STEPS, after
        if still >= STILL_MOVES:
            if ask("the picture no longer changes: is the lens at its far stop? [y]es, [n]o").strip().lower() != "n":
                return steps - STILL_MOVES * TEST_STEPS
            still = 0
    return steps


def _backlash(camera: WorkerCamera) -> int:
    """Steps back towards near, after going far, that change nothing yet."""
    camera.home("near")
    camera.call("nudge", 3 * TEST_STEPS)
    start = _look(camera)
    for steps in range(1, MOST_BACKLASH + 1):
        try:
            camera.call("nudge", -1)
        except CameraError:
            return steps
        if not looks_unchanged(start, _look(camera)):
            return steps
    return MOST_BACKLASH


def _look(camera: WorkerCamera) -> FrameSummary:
    """What the camera sees now, from live view or, where it has none, from a picture."""
    try:
        return summarise(camera.preview(), "srgb", 255.0)
    except UnsupportedControl:
        name, data = camera.grab(30.0).originals[-1]
        image = decode_image(data, name=name)
        return summarise(image.pixels, image.transfer, image.white_level)
