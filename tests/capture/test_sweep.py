"""Sweeps on the simulated camera: what is stored, what is survived, what the operator is told."""

import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from capture.cameras.base import (
    CameraError,
    CameraTimeout,
    Capabilities,
    CorruptFrame,
    ExposureDrift,
    ExposureSettings,
    FocusStuck,
)
from capture.cameras.simulated import FAULTS, Behaviour, SimulatedCamera
from capture.cli import _seconds
from capture.errors import DataError, LockedError, NoSpaceError, UsageError
from capture.lease import Lease
from capture.plan import FocusSweep, command_sweep, explicit_sweep
from capture.quality import looks_unchanged, sparkline, summarise
from capture.scenes import procedural_scene
from capture.stack import FocalStack, partial_path
from capture.sweep import StopRequest, SweepInterrupted, SweepOptions, follow, run_sweep, stored_plan
from tests.capture.fault_table import fault_outcomes, print_table
from tests.capture.run_cli import run_daif
from tests.capture.test_lens import make_profile

ROOT = Path(__file__).resolve().parents[2]
SCENE = procedural_scene(3, 72, 96)
STEPS = command_sweep((100.0, 250.0, 400.0, 550.0, 700.0), "step")


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    """Back-off times shortened, their number stays; no waiting for the disk."""
    from capture import sweep

    monkeypatch.setattr(sweep, "STILL_POLL_S", 0.001)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # killed_sweep.py, in its own process, keeps it
    monkeypatch.setattr(sweep, "BUSY_WAITS_S", tuple(0.001 for _ in sweep.BUSY_WAITS_S))
    monkeypatch.setattr(sweep, "RETRY_WAITS_S", tuple(0.001 for _ in sweep.RETRY_WAITS_S))
    monkeypatch.setattr(sweep, "REOPEN_WAITS_S", tuple(0.001 for _ in sweep.REOPEN_WAITS_S))


def camera(**behaviour):
    settings = {"relative": True, "noise": 0.01, "max_coc_px": 12.0, **behaviour}
    return SimulatedCamera(SCENE, behaviour=Behaviour.model_validate(settings))


def from_picture_on(name, first):
    """A fault at picture `first` and at every one after it."""
    return ",".join(f"{name}@{index}x99" for index in range(first, first + 40))


def metres(device, count=5):
    """A plan in metres over most of the lens's range."""
    return FocusSweep(near_m=1.02 / device.near_dpt, far_m=0.98 / max(device.far_dpt, 1e-3), count=count)


# --- what is stored


def test_an_absolute_sweep_is_stored_with_its_distances(tmp_path):
    device = camera(relative=False)
    start = device._motor
    sweep = metres(device)
    seen = []
    result = run_sweep(device, sweep, tmp_path / "a.h5", on_progress=seen.append)
    assert result.n_frames == 5
    assert [progress.n_done for progress in seen] == [0, 1, 2, 3, 4, 5]
    with FocalStack.open(result.path, deep=True) as stack:
        np.testing.assert_allclose(stack.focus_distance_m, sweep.focus_distance_m, rtol=0.01)
        assert stack.focus_distance_source == ["simulated"] * 5
        assert stack.focus_unit == "dioptre"
        assert stack.lens == device.lens
        assert stack.is_metric
        assert FocusSweep.model_validate(stack.plan) == sweep
        assert np.all(stack.focus_measure > 0)
        assert np.all(np.isfinite(stack.settle_time_s))
        assert stack.exposure_time_s[0] == 0.01
        kinds = [event["kind"] for event in stack.events]
        assert kinds[0] == "exposure_locked"
    assert device._motor == pytest.approx(start)  # the lens is back
    assert not device._open


def test_a_relative_lens_is_homed_approached_from_near_and_returned(tmp_path):
    device = camera(backlash=6)
    targets = []
    move = device.move_focus
    device.move_focus = lambda target: (targets.append(target), move(target))[1]
    result = run_sweep(device, STEPS, tmp_path / "a.h5")
    assert targets == [*STEPS, 350.0]
    with FocalStack.open(result.path) as stack:
        for command, details in zip(stack.focus_command, stack.metadata, strict=True):
            assert details["true_focus_dpt"] == pytest.approx(device.focus_dpt_at(command))  # no play left in the gear
        assert not stack.is_metric
    assert device._motor == 350.0


def test_a_descending_plan_is_still_taken_from_the_near_side(tmp_path):
    backwards = command_sweep(tuple(reversed(list(STEPS))), "step")
    device = camera(backlash=6)
    order = []
    result = run_sweep(device, backwards, tmp_path / "a.h5", on_progress=lambda p: order.append(p.index))
    assert order == [-1, 4, 3, 2, 1, 0]
    with FocalStack.open(result.path) as stack:
        np.testing.assert_array_equal(stack.focus_command, list(backwards))


def test_the_cameras_own_files_are_kept(tmp_path):
    device = camera(files="png")
    result = run_sweep(device, STEPS, tmp_path / "a.h5")
    with FocalStack.open(result.path) as stack:
        for i, name in enumerate(stack.original_name):
            from capture.decode import decode_image

            np.testing.assert_array_equal(decode_image(tmp_path / name).pixels, stack.raw(i))


def test_a_camera_that_reports_one_distance_twice_still_delivers_its_sweep(tmp_path):
    class Rounds(SimulatedCamera):
        def grab(self, timeout_s):
            frame = super().grab(timeout_s)
            frame.focus_distance_m, frame.focus_distance_source = round(frame.focus_distance_m, 1), "exif"
            return frame

    device = Rounds(SCENE, behaviour=Behaviour(noise=0.01, max_coc_px=12.0))
    near_m = round(1.05 / device.near_dpt, 1) + 0.06
    result = run_sweep(device, explicit_sweep((near_m, near_m + 0.04, near_m + 0.9)), tmp_path / "a.h5")
    assert any("duplicate focus distance" in text for text in result.warnings)
    with FocalStack.open(result.path) as stack:
        assert stack.is_metric
        assert np.all(np.diff(stack.focus_distance_m) > 0)


def test_live_view_is_switched_on_where_the_lens_needs_it(tmp_path):
    assert run_sweep(camera(live_view=True), STEPS, tmp_path / "a.h5").n_frames == 5


def test_an_adaptive_plan_becomes_explicit_and_lies_where_the_scene_is(tmp_path):
    device = camera(relative=False, noise=0.0)
    whole = metres(device)
    sweep = FocusSweep(near_m=whole.near_m, far_m=whole.far_m, count=8, spacing="adaptive")
    result = run_sweep(device, sweep, tmp_path / "a.h5")
    with FocalStack.open(result.path) as stack:
        plan = FocusSweep.model_validate(stack.plan)
        assert plan.spacing == "explicit"
        assert stack.n_frames == len(plan) <= 8
        inverse = 1.0 / SCENE.depth_m[np.isfinite(SCENE.depth_m)]
        reach = (1 / whole.near_m - 1 / whole.far_m) / 8
        assert stack.focus_dpt.max() <= np.quantile(inverse, 0.99) + 2 * reach
        assert stack.focus_dpt.min() >= np.quantile(inverse, 0.01) - 2 * reach


def test_an_operator_turns_the_ring(tmp_path):
    class ByHand(SimulatedCamera):
        def open(self):
            info = super().open()
            return type(info)(
                **{**vars(info), "capabilities": Capabilities(focus="manual", focus_unit="m", settle_s=0)}
            )

    device = ByHand(SCENE, behaviour=Behaviour(noise=0.01, max_coc_px=8.0))
    distances = iter(np.array([0.9, 1.2, 2.0]))
    told = []

    def prompt(text):
        told.append(text)
        device._motor = device._lens = device._step_for(1.0 / next(distances))

    result = run_sweep(device, explicit_sweep((0.9, 1.2, 2.0)), tmp_path / "a.h5", prompt=prompt)
    assert told[0] == "frame 1 of 3: turn the focus ring to 0.9 m"
    assert len(told) == result.n_frames == 3
    with pytest.raises(CameraError, match="--manual-focus"):
        run_sweep(device, explicit_sweep((0.9, 1.2, 2.0)), tmp_path / "b.h5")


# --- what is refused


def test_plan_and_camera_must_speak_of_the_same_thing(tmp_path):
    with pytest.raises(UsageError, match=r"counts in step and .* in dioptre"):
        run_sweep(camera(relative=False), STEPS, tmp_path / "a.h5")
    with pytest.raises(UsageError, match=r"give --lens with the lens\.yaml"):
        run_sweep(camera(), explicit_sweep((0.9, 1.2)), tmp_path / "a.h5")
    with pytest.raises(UsageError, match="goes from 0 to 1000"):
        run_sweep(camera(), command_sweep((0, 5000), "step"), tmp_path / "a.h5")
    assert not list(tmp_path.glob("*.h5*"))


def test_nothing_is_overwritten(tmp_path):
    run_sweep(camera(), STEPS, tmp_path / "a.h5")
    before = (tmp_path / "a.h5").read_bytes()
    with pytest.raises(UsageError, match="exists already"):
        run_sweep(camera(), STEPS, tmp_path / "a.h5")
    assert (tmp_path / "a.h5").read_bytes() == before
    run_sweep(camera(), STEPS, tmp_path / "a.h5", options=SweepOptions(overwrite=True))
    with pytest.raises(UsageError, match="does not exist; create it"):
        run_sweep(camera(), STEPS, tmp_path / "none" / "a.h5")


def test_a_place_that_cannot_be_written_is_refused_before_the_camera_moves(tmp_path, monkeypatch):
    options = SweepOptions(overwrite=True)
    device = camera()
    with pytest.raises(UsageError, match="is a folder"):
        run_sweep(device, STEPS, tmp_path, options=options)
    monkeypatch.setattr(os, "access", lambda folder, mode: False)  # what a read-only disk answers, to root too
    with pytest.raises(UsageError, match="is not writable"):
        run_sweep(device, STEPS, tmp_path / "a.h5", options=options)
    assert device._frames_taken == 0
    assert not list(tmp_path.iterdir())


def test_a_second_writer_is_told_who_holds_the_stack(tmp_path):
    device = camera()
    with Lease(tmp_path / "a.h5"), pytest.raises(LockedError, match=rf"process {os.getpid()} on ") as caught:
        run_sweep(device, STEPS, tmp_path / "a.h5")
    assert caught.value.exit_code == 5
    assert device._frames_taken == 0  # found out before the first picture


# --- faults


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_every_fault_at_first_middle_and_last_frame(tmp_path, thorough):
    """The taxonomy table: what heals by itself and what the operator reads otherwise; run with -s to see it."""
    outcomes = fault_outcomes(tmp_path, thorough=thorough)
    print_table(outcomes)
    assert {outcome.fault for outcome in outcomes} == set(FAULTS)
    for outcome in outcomes:
        if outcome.times == 1 and outcome.fault in HEALS:
            assert outcome.exit_code == 0, outcome
        if outcome.times > 1 and (outcome.fault, outcome.moment) not in UNSEEN:
            assert outcome.exit_code == 4, outcome
        if outcome.exit_code:
            assert "\n" not in outcome.text
            assert "safe in" in outcome.text or "nothing was stored" in outcome.text
            assert outcome.camera_closed
        else:
            assert outcome.lens_returned, outcome
        assert outcome.resumed == 5, outcome  # the same plan, to its end, once the fault is gone


# Faults that look like a healthy camera: all pictures are small or bright from the first on.
UNSEEN = {("corrupt", "first"), ("wrong_size", "first"), ("drift", "first")}
HEALS = {
    "busy", "capture_failed", "corrupt", "crash", "disconnect", "timeout", "wrong_size", "not_ready", "not_homed",
    "black", "repeat", "stuck", "drift",
}  # fmt: skip


def test_a_lens_that_stopped_moving_is_noticed_and_its_frames_do_not_count(tmp_path):
    device = camera(fault=from_picture_on("stuck", 2))
    with pytest.raises(FocusStuck, match="does not leave its stop") as caught:
        run_sweep(device, command_sweep(tuple(range(100, 900, 100)), "step"), tmp_path / "a.h5")
    assert "continue with --resume" in str(caught.value)
    with FocalStack.open(partial_path(tmp_path / "a.h5"), allow_partial=True) as stack:
        assert list(stack.frame_index) == [0, 1]
    again = run_sweep(camera(), stored_plan(tmp_path / "a.h5"), tmp_path / "a.h5", resume=True)
    assert again.n_frames == 8


def test_a_change_of_light_stops_the_sweep_unless_allowed(tmp_path):
    with pytest.raises(ExposureDrift, match="brightness changed by"):
        run_sweep(camera(drift=0.08), STEPS, tmp_path / "a.h5")
    result = run_sweep(camera(drift=0.08), STEPS, tmp_path / "b.h5", options=SweepOptions(allow_drift=True))
    assert any("brightness" in warning for warning in result.warnings)


def test_over_exposure_is_said(tmp_path):
    options = SweepOptions(exposure=ExposureSettings(exposure_time_s=0.05))
    assert any(
        "over-exposed" in text for text in run_sweep(camera(), STEPS, tmp_path / "a.h5", options=options).warnings
    )


def test_a_picture_that_cannot_be_deleted_is_said_and_the_sweep_goes_on(tmp_path):
    class WithCard(SimulatedCamera):
        deleted = ()

        def grab(self, timeout_s):
            frame = super().grab(timeout_s)
            frame.on_card = (("/card", f"DSC_{self._frames_taken}.JPG"),)
            return frame

        def delete_from_card(self, files):
            if not self.deleted:
                self.deleted = files
                self.close()  # as a worker that was stuck and killed
                raise CameraTimeout("the camera did not answer delete_from_card within 20 s")
            self.deleted += files

    device = WithCard(SCENE, behaviour=Behaviour(relative=True, noise=0.01, max_coc_px=12.0))
    result = run_sweep(device, STEPS, tmp_path / "a.h5")
    assert result.n_frames == 5
    assert [name for _, name in device.deleted] == [f"DSC_{i}.JPG" for i in range(1, 6)]
    assert any("DSC_1.JPG may still be on the camera's card" in text for text in result.warnings)


def test_a_resumed_sweep_completes_the_same_plan_only(tmp_path):
    with pytest.raises(CameraError):
        run_sweep(camera(fault="storage_full@3x9"), STEPS, tmp_path / "a.h5")
    with pytest.raises(DataError, match="another plan"):
        run_sweep(camera(), command_sweep((1.0, 2.0), "step"), tmp_path / "a.h5", resume=True)
    order = []
    run_sweep(camera(), STEPS, tmp_path / "a.h5", resume=True, on_progress=lambda p: order.append(p.index))
    assert order == [-1, 3, 4]
    with pytest.raises(DataError, match="nothing to resume"):
        run_sweep(camera(), STEPS, tmp_path / "a.h5", resume=True)


def begun(path, **options):
    """An unfinished stack of STEPS with three of five frames."""
    with pytest.raises(CameraError):
        run_sweep(camera(fault="storage_full@3x9"), STEPS, path, **options)


def test_a_resumed_sweep_keeps_the_lens_profile_that_it_was_begun_with(tmp_path):
    profile = make_profile()
    begun(tmp_path / "a.h5", lens=profile)
    for other in (make_profile(grade="relative"), camera().lens):
        with pytest.raises(UsageError, match=r"a\.h5\.partial was begun with another lens; resume without --lens"):
            run_sweep(camera(), STEPS, tmp_path / "a.h5", lens=other, resume=True)
    result = run_sweep(camera(), STEPS, tmp_path / "a.h5", resume=True)
    with FocalStack.open(result.path) as stack:
        assert stack.focus_distance_source == ["calibrated"] * 5
        np.testing.assert_allclose(stack.focus_dpt, profile.focus_dpt(np.array(list(STEPS))))
    begun(tmp_path / "c.h5", lens=profile)
    assert run_sweep(camera(), STEPS, tmp_path / "c.h5", lens=make_profile(), resume=True).n_frames == 5
    begun(tmp_path / "b.h5")
    with pytest.raises(UsageError, match="was begun with another lens"):  # the camera's own optics
        run_sweep(camera(), STEPS, tmp_path / "b.h5", lens=profile, resume=True)
    assert run_sweep(camera(), STEPS, tmp_path / "b.h5", lens=camera().lens, resume=True).n_frames == 5


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"exposure_time_s": 0.02}, r"exposure_time_s 0\.01 and the camera is at 0\.02; resume with --exposure 0\.01"),
        ({"iso": 800.0}, r"iso 100 and the camera is at 800; resume with --iso 100"),
    ],
)
def test_a_resumed_sweep_refuses_another_exposure(tmp_path, change, says):
    same = SweepOptions(exposure=ExposureSettings(exposure_time_s=0.01, iso=100.0))
    begun(tmp_path / "a.h5", options=same)
    device = camera()
    with pytest.raises(UsageError, match=says):
        run_sweep(
            device, STEPS, tmp_path / "a.h5", resume=True, options=SweepOptions(exposure=ExposureSettings(**change))
        )
    assert device._frames_taken == 0
    assert not device._open
    assert run_sweep(camera(), STEPS, tmp_path / "a.h5", resume=True, options=same).n_frames == 5


def test_a_resumed_sweep_refuses_another_camera(tmp_path):
    class Other(SimulatedCamera):
        def open(self):
            return dataclasses.replace(super().open(), model="another")

    begun(tmp_path / "a.h5")
    other = Other(SCENE, behaviour=Behaviour(relative=True, noise=0.01, max_coc_px=12.0))
    with pytest.raises(UsageError, match="begun with the camera simulated and this is another"):
        run_sweep(other, STEPS, tmp_path / "a.h5", resume=True)


def test_a_resumed_sweep_develops_raw_files_like_its_first_one(tmp_path, monkeypatch):
    from capture import sweep
    from capture.decode import decode_image

    used = []
    own = iter([(2.0, 1.0, 1.5, 1.0), *[(9.0, 9.0, 9.0, 9.0)] * 9])

    def raw(data, *, name, white_balance):
        used.append(white_balance or next(own))
        return decode_image(data, name=name)._replace(white_balance=used[-1])

    monkeypatch.setattr(sweep, "decode_image", raw)
    with pytest.raises(CameraError):
        run_sweep(camera(files="png", fault="storage_full@3x9"), STEPS, tmp_path / "a.h5")
    run_sweep(camera(files="png"), STEPS, tmp_path / "a.h5", resume=True)
    assert used == [(2.0, 1.0, 1.5, 1.0)] * 5


# --- stopping


@pytest.mark.parametrize(("name", "code"), [("SIGKILL", None), ("SIGINT", "130"), ("SIGTERM", "143")])
def test_stopped_at_random_moments(tmp_path, name, code):
    check_stopped(tmp_path, name, code, 50 if name == "SIGKILL" else 20, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "code", "runs"), [("SIGKILL", None, 200), ("SIGINT", "130", 50), ("SIGTERM", "143", 50)]
)
def test_stopped_at_many_random_moments(tmp_path, name, code, runs):
    check_stopped(tmp_path, name, code, runs, seed=2)


def check_stopped(folder, name, code, runs, seed):
    """No acknowledged frame is lost, every file opens and verifies, --resume completes, signals return the lens."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed_sweep.py")), str(folder), name, str(runs), str(seed)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == runs
    for run in found:
        assert set(run["acknowledged"]) <= set(run["on_disk"]), run
        assert run["kept"], run
        assert run["complete"], run
        assert run["resumed"] == ["done"], run
        if code and run["end"]:
            how, motor, is_open = run["end"]
            assert how in (code, "done"), run
            assert motor == 350.0, run  # where the lens stood before
            assert not is_open, run
    interrupted = [run for run in found if (run["end"][:1] == [code] if code else run["status"] == 9)]
    assert len(interrupted) >= runs // 3


def test_a_second_signal_stops_at_once(tmp_path):
    device = camera(latency_s=5.0)
    stop = StopRequest()
    timer = threading.Timer(0.5, lambda: [os.kill(os.getpid(), 2), time.sleep(0.2), os.kill(os.getpid(), 2)])
    began = time.monotonic()
    timer.start()
    with stop, pytest.raises(SweepInterrupted, match="stopped at once") as caught:
        run_sweep(device, STEPS, tmp_path / "a.h5", stop=stop)
    timer.join()
    assert time.monotonic() - began < 4.0
    assert caught.value.exit_code == 130
    assert not device._open


# --- a full disk


def test_a_disk_too_small_is_refused_before_the_sweep(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: type("Usage", (), {"free": 10_000})())
    with pytest.raises(NoSpaceError, match=r"needs .* MB and .* has 0\.0 MB free") as caught:
        run_sweep(camera(), STEPS, tmp_path / "a.h5")
    assert caught.value.exit_code == 7


@pytest.mark.parametrize("kind", ["tmpfs", "injected"])
def test_a_disk_that_fills_up_mid_way(tmp_path, kind, monkeypatch):
    """On a real size-limited file system where the machine lets us mount one, else with injected ENOSPC."""
    folder = tmp_path / "small"
    folder.mkdir()
    device = camera(files="png")
    filler = folder / "filler"
    if kind == "tmpfs":
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)], capture_output=True, check=False
        )
        if mounted.returncode:
            pytest.skip("this machine does not let us mount a tmpfs")
    try:
        if kind == "tmpfs":

            def fill(progress):
                if progress.index == 2:  # another program takes the rest of the disk
                    filler.write_bytes(b"x" * (shutil.disk_usage(folder).free - 4096))

            on_progress = fill
        else:
            count = itertools.count()
            fsync = os.fsync

            def failing(descriptor):
                if 12 <= next(count) < 20:
                    raise OSError(28, "No space left on device")
                fsync(descriptor)

            monkeypatch.setattr(os, "fsync", failing)
            on_progress = None
        with pytest.raises(NoSpaceError, match=r"disk is full .* MB more are needed.*--resume") as caught:
            run_sweep(device, STEPS, folder / "a.h5", on_progress=on_progress)
        assert caught.value.exit_code == 7
        assert not device._open
        assert device._motor == 350.0
        with FocalStack.open(partial_path(folder / "a.h5"), allow_partial=True, deep=True) as stack:
            kept = stack.n_frames
            assert kept >= 1
        filler.unlink(missing_ok=True)
        monkeypatch.undo()
        assert run_sweep(camera(files="png"), STEPS, folder / "a.h5", resume=True).n_frames == 5
    finally:
        if kind == "tmpfs":
            subprocess.run(["umount", str(folder)], check=True)


# --- watching, following, the command


def test_follow_yields_as_frames_are_committed(tmp_path):
    path = tmp_path / "a.h5"
    thread = threading.Thread(target=lambda: run_sweep(camera(latency_s=0.15), STEPS, path))
    thread.start()
    states = list(follow(path, poll_s=0.02, idle_s=20))
    thread.join()
    assert states[-1].complete
    assert states[-1].n_frames == 5
    counts = [state.n_frames for state in states]
    assert counts == sorted(counts)
    assert len(set(counts)) >= 3
    assert [state.complete for state in follow(tmp_path / "none.h5", poll_s=0.01, idle_s=0.05)] == []


def test_command_captures_resumes_and_speaks_clearly(tmp_path):
    plan, stack = str(tmp_path / "plan.yaml"), str(tmp_path / "a.h5")
    uri = "simulated:procedural-3?width=64&noise=0.01&relative=1&max_coc_px=8"
    assert run_daif("plan", "--positions", "100:700:5", "-o", plan).exit_code == 0
    dry = run_daif("capture", "--camera", uri, "--plan", plan, "-o", stack, "--dry-run")
    assert dry.exit_code == 0
    assert "5 frames at step: 100, 250" in dry.stdout
    assert not list(tmp_path.glob("a.h5*"))
    failed = run_daif("capture", "--camera", f"{uri}&fault=storage_full@3x9", "--plan", plan, "-o", stack)
    assert failed.exit_code == 4
    last = failed.stderr.splitlines()[-1]
    assert last.startswith("daif: frame 4 of 5: the camera's card is full")
    assert last.endswith("continue with --resume")
    resumed = run_daif("capture", "--camera", uri, "-o", stack, "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert "5 frames in" in resumed.stdout
    assert "frame 5/5  at 700 step  sharpness" in resumed.stderr
    assert run_daif("capture", "--camera", uri, "-o", stack).exit_code == 2
    assert run_daif("capture", "--camera", uri, "-o", str(tmp_path / "b.h5"), "--resume").exit_code == 6
    again = run_daif("capture", "--camera", uri, "--plan", plan, "-o", stack)
    assert again.exit_code == 2
    assert "--force" in again.stderr


@pytest.mark.parametrize(
    ("text", "seconds"), [(".5", 0.5), ("1e-3", 1e-3), ("1/60.5", 1 / 60.5), ("1/60", 1 / 60), ("0.5", 0.5), ("30", 30)]
)
def test_exposure_times_are_read_as_they_are_written(text, seconds):
    assert _seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["10ms", "-1", "0", "", "1/0", "1/", "/60", "nan", "inf", "1/inf", "1/60/2", "-1/-60"])
def test_exposure_times_that_cannot_be_meant_are_refused(text):
    with pytest.raises(UsageError, match="must be seconds above 0"):
        _seconds(text)


@pytest.mark.parametrize(
    "words",
    [("--exposure", "10ms"), ("--iso", "-100"), ("--iso", "nan"), ("--f-number", "0"), ("--f-number", "inf"),
     ("--settle", "inf"), ("--timeout", "inf")],
)  # fmt: skip
def test_command_refuses_impossible_settings(tmp_path, words):
    plan = tmp_path / "plan.yaml"
    STEPS.write(plan)
    uri = "simulated:procedural-3?width=64&relative=1&max_coc_px=8"
    done = run_daif("capture", "--camera", uri, "--plan", str(plan), "-o", str(tmp_path / "a.h5"), *words)
    assert done.exit_code == 2, done
    assert done.stderr.startswith(f"daif: {words[0]} ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == [plan]


# --- checks of single frames


def test_noise_alone_is_no_change_and_focus_is():
    generator = np.random.default_rng(0)
    device = camera(noise=0.0)
    device.open()
    device.home()

    def shot(step):
        device.move_focus(step)
        image = device.grab(5.0).image.astype(float) + generator.normal(0, 2.0, (72, 96, 3))
        return summarise(np.clip(image, 0, 255).astype(np.uint8), "srgb", 255.0)

    assert looks_unchanged(shot(300), shot(300))
    assert not looks_unchanged(shot(300), shot(450))


def test_sparkline():
    assert sparkline([0.0, 3.0, float("nan"), 7.0]) == "▁▄ █"
    assert sparkline([]) == ""


def test_frames_without_structure_are_corrupt(tmp_path):
    device = camera(fault=from_picture_on("black", 0))
    with pytest.raises(CorruptFrame, match="is the cap on"):
        run_sweep(device, STEPS, tmp_path / "a.h5")
