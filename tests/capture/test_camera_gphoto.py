"""The gphoto2 backend on libgphoto2's own virtual camera; what is real and what is faked stands in virtual_dslr.py.

Everything that calls libgphoto2 runs in a worker or a subprocess: a segmentation fault fails one test, not the run.
No real lens was driven by any of these tests.
"""

import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from capture.cameras import gphoto, open_camera
from capture.cameras.base import (
    CameraBusy,
    CameraClosed,
    CameraCrashed,
    CameraDisconnected,
    CameraError,
    CameraInUse,
    CameraNotFound,
    CameraStorageFull,
    CaptureFailed,
    ControlRejected,
    ExposureSettings,
    FocusLimit,
    FocusNotHomed,
    FocusNotReady,
    FocusStepTooSmall,
    UnsupportedControl,
)
from capture.cameras.gphoto import error_for, parse_number
from capture.cameras.profiles import CameraProfile, profile_for, read_profile, shipped_folder
from capture.exif import read_exif
from capture.plan import FocusSweep, command_sweep
from capture.stack import FocalStack
from tests.capture.scene_of_rig import STRIP_DEPTH_M, STRIP_WIDTH_PX

ROOT = Path(__file__).resolve().parents[2]
RIG = Path(__file__).with_name("virtual_dslr.py")
FIRST_DPT, LAST_DPT = 2.0, 0.1


def has_virtual_camera():
    gphoto2 = pytest.importorskip("gphoto2")
    return any(Path(gphoto2.__file__).parent.rglob("vusb*.so"))


pytestmark = pytest.mark.skipif(not has_virtual_camera(), reason="this gphoto2 has no virtual USB port")


@pytest.fixture
def rig(tmp_path, monkeypatch):
    """Folder of a fresh virtual DSLR; `open_camera("gphoto2:")` finds it."""
    folder = tmp_path / "rig"
    folder.mkdir()
    monkeypatch.setenv("DAIF_RIG", str(folder))
    monkeypatch.setattr(gphoto, "DRIVER", "tests.capture.virtual_dslr")
    return folder


def state(rig):
    return json.loads((rig / "state.json").read_text())


def from_sensor_m(focus_dpt):
    """What a body with the rig's 50 mm lens writes as subject distance: cameras count from the sensor."""
    return 1.0 / focus_dpt + 0.050 / (1.0 - 0.050 * focus_dpt)


def run_on_rig(rig, *arguments, env=None):
    """`daif` in a subprocess with the rig as its camera driver."""
    command = [sys.executable, str(RIG), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DAIF_RIG": str(rig), **(env or {})}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, cwd=rig, check=False)


def in_subprocess(rig, code, **env):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DAIF_RIG": str(rig), **env}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


# --- the backend on the virtual body


def test_the_body_is_found_described_and_driven(rig):
    with open_camera("gphoto2:") as camera:
        info = camera.open()
        assert info.model == "Nikon DSC D750"
        assert info.capabilities.focus == "relative"
        assert info.capabilities.needs_live_view
        assert info.capabilities.end_stop_signal
        locked = camera.lock_exposure(ExposureSettings(exposure_time_s=0.02, f_number=4.0))
        assert locked.exposure_time_s == pytest.approx(0.02)
        assert locked.f_number == 4.0
        with pytest.raises(FocusNotHomed):
            camera.move_focus(10)
        camera.set_live_view(True)
        home = camera.home("near")
        assert home.at_limit
        assert state(rig)["units"] == 0
        assert home.travelled == pytest.approx(90, abs=8)  # the rig's lens started 900 motor units from the stop
        report = camera.move_focus(120)
        assert report.position == 120 == camera.position()
        assert state(rig)["units"] == 1200
        with pytest.raises(FocusLimit, match="outside"):
            camera.move_focus(400)
        frame = camera.grab(20.0)
        assert [name for name, _ in frame.originals] == ["GPH_0099.JPG"]
        assert frame.f_number == 4.0
        exif = read_exif(frame.originals[0][1])
        assert exif.model == "NIKON D750"
        assert exif.focus_distance_m == pytest.approx(from_sensor_m(focus_dpt_at(1180)), rel=1e-3)  # 20 units of play
        with pytest.raises(UnsupportedControl):
            camera.preview()
    with pytest.raises(CameraClosed):
        camera.position()


def focus_dpt_at(units):
    share = units / 3000
    return FIRST_DPT + (LAST_DPT - FIRST_DPT) * (0.8 * share + 0.2 * share * share)


def test_selection_by_model_and_port(rig):
    for uri in ("gphoto2:d750", "gphoto2:usb:001,001"):
        with open_camera(uri) as camera:
            assert camera.open().model == "Nikon DSC D750"
    with pytest.raises(CameraNotFound, match="no camera matches 'EOS'; found: Nikon DSC D750 at usb:001,001"):
        open_camera("gphoto2:EOS").open()


def test_settings_are_checked_read_back_and_put_back(rig):
    with open_camera("gphoto2:") as camera:
        camera.open()
        with pytest.raises(ControlRejected, match=r"the nearest that this camera offers is f/22"):
            camera.lock_exposure(ExposureSettings(f_number=64.0))
        with pytest.raises(UnsupportedControl, match="no iso"):
            camera.lock_exposure(ExposureSettings(iso=100))
        assert camera.lock_exposure(ExposureSettings(f_number=22.0)).f_number == 22.0


def test_live_view_and_limits_come_as_errors_of_the_taxonomy(rig):
    with open_camera("gphoto2:") as camera:
        camera.open()
        with pytest.raises(FocusNotReady) as caught:
            camera.home("near")
        assert caught.value.recovery == "live_view"
        camera.set_live_view(True)
        camera.home("near")
        with pytest.raises(FocusLimit):
            camera.call("nudge", -5)
        profile = profile_for("Nikon DSC D750")
    tiny = profile.model_copy(update={"focus": profile.focus.model_copy(update={"unit": 1})})
    with open_camera("gphoto2:", profile=tiny) as camera:
        camera.open()
        camera.set_live_view(True)
        with pytest.raises(FocusStepTooSmall):
            camera.call("nudge", 1)


def test_faults_of_the_driver_become_our_errors(rig):
    faults = {"grab:1": "busy", "grab:2": "unplugged", "grab:3": "refused", "grab:4": "crash"}
    (rig / "faults.json").write_text(json.dumps(faults))
    with open_camera("gphoto2:") as camera:
        camera.open()
        for kind in (CameraBusy, CameraDisconnected, CaptureFailed, CameraCrashed):
            with pytest.raises(kind):
                camera.grab(20.0)
        camera.open()
        assert camera.grab(20.0).originals
    (rig / "faults.json").write_text(json.dumps({"open": "in use"}))
    with pytest.raises(CameraInUse, match="eject it"), open_camera("gphoto2:") as camera:
        camera.open()


def test_a_failed_download_is_tried_again(rig):
    (rig / "faults.json").write_text(json.dumps({"grab:1": "download"}))
    with open_camera("gphoto2:") as camera:
        camera.open()
        frame = camera.grab(20.0)
        assert frame.originals[0][1][:2] == b"\xff\xd8"


def test_the_card_runs_full(rig):
    """libgphoto2's virtual card holds 26 pictures after each connect."""
    code = """
        from tests.capture import virtual_dslr
        from capture.cameras.gphoto import GphotoCamera
        virtual_dslr.Camera.capture = lambda self, kind, context: self._camera.capture(kind, context)
        with GphotoCamera(driver="tests.capture.virtual_dslr") as camera:
            camera.open()
            camera._in_memory = False
            for n in range(40):
                try:
                    camera.grab(20.0)
                except Exception as error:
                    print(n, type(error).__name__, error)
                    break
    """
    done = in_subprocess(rig, code)
    assert done.stdout.startswith("26 CameraStorageFull the camera has no space"), done.stderr
    assert "--delete-from-camera" in done.stdout


def test_pictures_are_deleted_from_the_card_only_when_they_are_stored(rig, tmp_path):
    """Two good frames and, between them, one that arrives cut in half: rejected pictures stay on the card."""
    (rig / "faults.json").write_text(json.dumps({"grab:2": "truncated"}))
    code = f"""
        from pathlib import Path
        from tests.capture import virtual_dslr
        from capture.cameras.gphoto import GphotoCamera
        from capture.cameras.profiles import profile_for
        from capture.plan import command_sweep
        from capture.stack import StackWriter
        from capture.sweep import run_sweep
        grabbed = []
        def deleted(self, folder, name, context):
            print("deleted picture", grabbed.index(name) + 1)
            self._camera.file_delete(folder, name, context)
        virtual_dslr.Camera.file_delete = deleted
        append = StackWriter.append
        def stored(self, index, *args, originals, **kwargs):
            append(self, index, *args, originals=originals, **kwargs)
            print("stored frame", index, "from picture", grabbed.index(originals[0][0]) + 1)
        StackWriter.append = stored
        profile = profile_for("Nikon DSC D750")
        capture = profile.capture.model_copy(update={{"settings": {{"capturetarget": ("Memory card",)}}}})
        class Card(GphotoCamera):
            def grab(self, timeout_s):
                frame = super().grab(timeout_s)
                grabbed.extend(name for name, _ in frame.originals)
                return frame
        camera = Card(
            profile=profile.model_copy(update={{"capture": capture}}), delete_from_camera=True,
            driver="tests.capture.virtual_dslr",
        )
        run_sweep(camera, command_sweep((0, 90), "step"), Path({str(tmp_path / "a.h5")!r}))
    """
    done = in_subprocess(rig, code)
    lines = [line for line in done.stdout.splitlines() if "picture" in line]
    assert lines == [
        "stored frame 0 from picture 1", "deleted picture 1", "stored frame 1 from picture 3", "deleted picture 3",
    ], done.stderr  # fmt: skip


def test_german_locale_does_not_translate_values(rig):
    code = """
        import locale
        try:
            locale.setlocale(locale.LC_ALL, "")
        except locale.Error:
            pass
        from capture.cameras.gphoto import GphotoCamera
        with GphotoCamera(driver="tests.capture.virtual_dslr") as camera:
            camera.open()
            print(camera._choices("autofocus"), camera._read("capturetarget"))
    """
    done = in_subprocess(rig, code, LANGUAGE="de", LANG="de_DE.UTF-8", LC_ALL="C.UTF-8")
    assert "['On', 'Off'] Internal RAM" in done.stdout, done.stderr


def test_an_empty_setting_reads_as_none_instead_of_crashing(rig):
    """f/9.7 is no choice of the body: its widget then has no value, which kills the plain read of 2.6.4 (notes 1.4)."""
    code = """
        import sys
        from tests.capture import virtual_dslr as gp
        from capture.cameras.gphoto import widget_value
        camera, context = gp.Camera(), gp.Context()
        camera.init(context)
        widget = camera.get_single_config("f-number", context)
        widget.set_value("f/9.7")
        camera.set_single_config("f-number", widget, context)
        widget = camera.get_single_config("f-number", context)
        print(widget_value(gp, widget), flush=True)
        if "plain" in sys.argv:
            widget.get_value()
    """
    assert in_subprocess(rig, code).stdout == "None\n"


def test_the_shipped_profiles_are_valid_and_found():
    files = sorted(shipped_folder().glob("*.yaml"))
    assert {path.stem for path in files} == {"canon", "fuji", "nikon", "olympus", "panasonic", "sony"}
    for path in files:
        profile = read_profile(path)
        assert profile.focus is not None
        assert profile_for(profile.match[0] + " XYZ") == profile
    assert profile_for("Unheard Of") is None


def test_a_users_profile_comes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    folder = tmp_path / "daif" / "cameras"
    folder.mkdir(parents=True)
    (folder / "mine.yaml").write_text(
        "match: [Nikon DSC D750]\nfocus: {widget: manualfocusdrive, method: amount, travel: 77}\n"
    )
    profile = profile_for("Nikon DSC D750")
    assert isinstance(profile, CameraProfile)
    assert profile.focus.travel == 77


@pytest.mark.parametrize(
    ("text", "number"),
    [("1/125", 0.008), ("0.0100s", 0.01), ("f/2.8", 2.8), ("30", 30.0), ("Auto", None), ("", None), ("1/0", None)],
)
def test_numbers_in_settings(text, number):
    assert parse_number(text) == pytest.approx(number)


@pytest.mark.parametrize(
    ("code", "text", "stage", "kind"),
    [
        (-105, "", "open", CameraNotFound),
        (-60, "", "open", CameraInUse),
        (-53, "", "open", CameraInUse),
        (-52, "", "grab", CameraDisconnected),
        (-7, "", "grab", CameraDisconnected),
        (-110, "", "grab", CameraBusy),
        (-3, "", "grab", CameraStorageFull),
        (-115, "", "grab", CameraStorageFull),
        (-6, "", "preview", UnsupportedControl),
        (-113, "Nikon manual focus at limit.", "move_focus", FocusLimit),
        (-113, "Nikon manual focus stepping too small", "move_focus", FocusStepTooSmall),
        (-1, "works only in LiveView", "move_focus", FocusNotReady),
        (-1, "", "move_focus", ControlRejected),
        (-1, "", "grab", CaptureFailed),
        (-1, "", "close", CameraError),
    ],
)
def test_native_codes_map_to_the_taxonomy(code, text, stage, kind):
    error = error_for(code, text, stage)
    assert type(error) is kind
    assert error.native_code == code


# --- the whole command on the virtual body


def test_capture_end_to_end_on_real_libgphoto2(rig, tmp_path):
    """11 frames through `daif capture --camera gphoto2:`: EXIF kept, focus peaks where the scene is, lens returned."""
    plan = tmp_path / "plan.yaml"
    command_sweep(tuple(range(0, 300, 29)), "step").write(plan)
    stack = tmp_path / "scene.h5"
    done = run_on_rig(rig, "capture", "--camera", "gphoto2:", "--plan", plan, "-o", stack, "--settle", "0")
    assert done.returncode == 0, done.stderr
    assert "11 frames" in done.stdout
    with FocalStack.open(stack, deep=True) as found:
        assert found.n_frames == 11
        np.testing.assert_array_equal(found.focus_command, np.arange(0, 300, 29))
        assert found.camera["model"] == "Nikon DSC D750"
        assert b"NIKON D750" in found.exif
        distances = []
        for name in found.original_name:
            exif = read_exif((stack.parent / name).read_bytes(), name=name)
            assert exif.f_number == 4.0
            distances.append(exif.focus_distance_m)
        # the gear has 20 units of play: taken up towards near at the stop, towards far at every frame after it
        focus_dpt = [focus_dpt_at(20 if steps == 0 else 10 * steps - 20) for steps in range(0, 300, 29)]
        np.testing.assert_allclose(distances, [from_sensor_m(q) for q in focus_dpt], rtol=2e-3)
        check_peaks(found, np.array(focus_dpt))
    assert abs(state(rig)["units"] - 900) <= 50  # back where it stood, as well as a relative lens can know


def check_peaks(stack, focus_dpt):
    """Every board is sharpest in the frame that was focused nearest to it."""
    levels = stack.linear_stack()[..., 1]
    margin = 16  # blur of the neighbouring board reaches over its edge
    for board, depth_m in enumerate(STRIP_DEPTH_M):
        columns = slice(board * STRIP_WIDTH_PX + margin, (board + 1) * STRIP_WIDTH_PX - margin)
        tiles = levels[:, margin:-margin, columns]
        sharpness = np.square(np.diff(tiles, axis=2)).mean((1, 2)) / np.square(tiles.mean((1, 2)))
        assert sharpness.argmax() == abs(focus_dpt - 1.0 / depth_m).argmin(), (board, sharpness)


def test_capture_survives_faults_on_the_way(rig, tmp_path):
    """Unplugged, crashed, refused, cut short, busy, and a download that fails: same frames, same plan, one command."""
    (rig / "faults.json").write_text(
        json.dumps(
            {"grab:1": "refused", "grab:3": "crash", "move:5": "unplugged", "grab:5": "busy", "grab:7": "truncated"}
        )
    )
    plan = tmp_path / "plan.yaml"
    command_sweep((0, 60, 120, 180, 240), "step").write(plan)
    stack = tmp_path / "scene.h5"
    done = run_on_rig(rig, "capture", "--camera", "gphoto2:", "--plan", plan, "-o", stack, "--settle", "0")
    assert done.returncode == 0, done.stderr
    assert json.loads((rig / "faults.json").read_text()) == {}
    with FocalStack.open(stack, deep=True) as found:
        assert found.n_frames == 5
        kinds = {event.get("error") for event in found.events if event["kind"] == "retry"}
        assert kinds == {"CaptureFailed", "CameraCrashed", "CameraDisconnected", "CameraBusy", "CorruptFrame"}


def test_a_plan_in_metres_needs_a_calibration(rig, tmp_path):
    plan = tmp_path / "plan.yaml"
    FocusSweep(near_m=0.5, far_m=math.inf, count=5).write(plan)
    done = run_on_rig(rig, "capture", "--camera", "gphoto2:", "--plan", plan, "-o", tmp_path / "a.h5")
    assert done.returncode == 2
    assert "give --lens with the lens.yaml of a calibration" in done.stderr


def test_cameras_lists_the_body_and_what_it_can(rig):
    done = run_on_rig(rig, "cameras")
    assert done.returncode == 0, done.stderr
    assert "gphoto2:usb:001,001" in done.stdout
    assert "relative focus (step)" in done.stdout


@pytest.mark.slow
def test_probe_measures_polarity_travel_and_backlash(rig):
    from capture.cameras.probe import probe_focus, write_profile

    answers = {"was moved": "n", "no longer changes": "y"}
    asked = []

    def ask(question):
        asked.append(question)
        return next((answer for words, answer in answers.items() if words in question), "")

    profile = probe_focus("gphoto2:", ask=ask)
    assert profile.match == ("Nikon DSC D750",)
    assert profile.focus.near_sign == 1  # the operator said that it went nearer
    path = write_profile(profile, rig / "body.yaml")
    assert read_profile(path) == profile
    answers["was moved"] = "f"
    profile = probe_focus("gphoto2:", ask=ask)
    assert profile.focus.near_sign == -1
    assert profile.focus.travel == pytest.approx(300, abs=25)
    assert 1 <= profile.focus.backlash <= 6
