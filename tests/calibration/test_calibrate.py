"""From frames to lens.yaml: an independent aperture-sampled camera, and everything that can be wrong with a sweep."""

import math
import re
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.board import Board
from calibration.calibrate import BoardStack, board_with_ruler, calibrate, load_board_stack
from calibration.check import check_profile
from calibration.edges import CalibrationError, Sweep, locate, measure
from calibration.report import report_html, verdict_of
from capture.errors import DataError, UsageError
from capture.lens import Lens, LensProfile, Measured
from capture.plan import FocusSweep
from capture.stack import StackWriter
from reconstruct.cli import app
from tests.calibration.board_camera import BoardCamera

BOARD = Board(square_m=0.04, measured=True)
CAMERA = BoardCamera(height=320, width=480, focal_px=1000.0, breathing=-0.8)
STEPS = np.linspace(0, 1000, 9)
POSES = ({"distance_m": 0.75, "tilt_deg": 3, "roll_deg": 4}, {"distance_m": 1.3, "tilt_deg": -40, "roll_deg": -3})
FOCAL = Measured(value=float(CAMERA.focal_at(500)), std=1.0, source="user")


def stack_of(images, name="a.h5", **changes) -> BoardStack:
    sweep = Sweep(name, images, changes.pop("positions", STEPS[: len(images)]), changes.pop("board", BOARD))
    fields = {"unit": "step", "binning": 1, "full_size": images.shape[1:], "lens": None, "camera": "", "warnings": ()}
    fields |= {"f_number": math.nan, "sha256": name}
    return BoardStack(sweep=sweep, path=Path(name), **{**fields, **changes})


def every_other(images, name="a.h5", **changes) -> BoardStack:
    """Every second frame: as many as most refusals need, and half the time."""
    return stack_of(images[::2], name, positions=STEPS[: len(images)][::2], **changes)


@pytest.fixture(scope="module")
def frames():
    return [CAMERA.sweep(BOARD, CAMERA.pose(BOARD, **pose), STEPS, seed=k) for k, pose in enumerate(POSES)]


@pytest.fixture(scope="module")
def calibration(frames):
    return calibrate([stack_of(images, f"{k}.h5") for k, images in enumerate(frames)], focal_px=FOCAL)


def test_aperture_and_focus_come_out_of_images(calibration):
    profile = calibration.profile
    span = CAMERA.near_dpt - CAMERA.far_dpt
    assert profile.pupil_diameter_m.value == pytest.approx(CAMERA.pupil_m, rel=0.01)
    error = profile.focus_dpt(STEPS) - CAMERA.focus_dpt(STEPS)
    assert np.sqrt(np.mean(error**2)) < 0.0025 * span
    assert abs(profile.pupil_diameter_m.value - CAMERA.pupil_m) < 4 * profile.pupil_diameter_m.std


def test_stacks_that_do_not_belong_together_are_told_apart(frames):
    one, other = (every_other(images, f"{k}.h5", f_number=2.8) for k, images in enumerate(frames))
    for changes, says in (
        ({"f_number": 3.2}, r"0\.h5 and 1\.h5 differ in f-number \(2\.8 and 3\.2\)"),
        ({"sha256": one.sha256}, r"0\.h5 and 1\.h5 are the same sweep, which says nothing new"),
    ):
        with pytest.raises(DataError, match=says):
            calibrate([one, replace(other, **changes)], focal_px=FOCAL)
    few = stack_of(frames[0][:3], "few.h5")
    with pytest.raises(DataError, match=r"few\.h5 has 3 frames; a sweep of the board needs 4"):
        calibrate([few], focal_px=FOCAL)


def test_the_profile_says_at_which_aperture_it_holds(frames, calibration):
    assert calibration.profile.f_number is None
    stacks = [stack_of(images, f"{k}.h5", f_number=2.8) for k, images in enumerate(frames)]
    assert calibrate(stacks, focal_px=FOCAL).profile.f_number == 2.8


def test_breathing_is_measured_with_its_sign(calibration):
    truth = CAMERA.focal_at(STEPS) / CAMERA.focal_at(500)
    np.testing.assert_allclose(calibration.profile.optics(STEPS).scale, truth, atol=3e-4)
    assert truth[-1] < truth[0]


def test_the_floor_is_found(calibration):
    assert calibration.profile.floor_sigma_px.value == pytest.approx(CAMERA.floor_px, abs=0.1)


def test_poses_and_evidence_are_recorded(calibration, tmp_path):
    distances = [source.distance_m for source in calibration.profile.sources]
    np.testing.assert_allclose(distances, [0.75, 1.3], rtol=3e-3)
    assert calibration.profile.sources[1].tilt_deg == pytest.approx(40, abs=1)
    assert calibration.profile.board == BOARD.model_dump()
    calibration.profile.write(tmp_path / "lens.yaml")
    assert LensProfile.read(tmp_path / "lens.yaml") == calibration.profile


def test_the_report_is_one_file_with_every_figure_and_a_verdict(calibration):
    page = report_html(calibration)
    assert page.count("<svg") == 8
    assert "nan" not in page.lower().replace("finance", "")
    assert "http" not in page
    assert verdict_of(calibration)[0] in page


def test_an_unmeasured_print_is_said_and_a_ruler_corrects_it():
    assert board_with_ruler(Board(square_m=0.035), 98.0, 100.0).square_m == pytest.approx(0.0343)
    with pytest.raises(UsageError, match=r"--ruler-mm 9\.8"):
        board_with_ruler(Board(), 9.8, 100.0)


def test_check_accepts_the_same_lens_and_refuses_a_shifted_one(calibration, frames):
    same = check_profile(calibration.profile, every_other(frames[0]))
    assert same.holds, same.sentence
    shifted = check_profile(calibration.profile, stack_of(frames[0][:8:2], positions=STEPS[1::2]))
    assert not shifted.holds
    assert "no longer holds" in shifted.sentence
    assert shifted.shift_dpt == pytest.approx(-np.mean(np.diff(CAMERA.focus_dpt(STEPS))), rel=0.4)


def test_one_frontal_distance_is_refused(frames):
    with pytest.raises(CalibrationError, match=r"add a sweep at another distance.*\[ONE_DISTANCE\]"):
        calibrate([every_other(frames[0])], focal_px=FOCAL)


def test_frontal_boards_without_lens_data_do_not_tell_the_focal_length(frames):
    with pytest.raises(CalibrationError, match=r"give --focal-px \[NO_FOCAL_LENGTH\]"):
        calibrate([every_other(frames[0])])


def test_no_board_names_the_closest_frame(frames):
    blurred = np.stack([cv2.GaussianBlur(image, (0, 0), 12.0) for image in frames[0]])
    with pytest.raises(CalibrationError, match=r"closest is frame \d.*\[NO_BOARD\]"):
        locate(stack_of(blurred).sweep)


def test_a_wrong_board_description_is_named(frames):
    with pytest.raises(CalibrationError, match=r"not 5 x 7 squares but 7 x 5.*\[LEGACY_PATTERN\]"):
        locate(stack_of(frames[0], board=Board(columns=5, rows=7)).sweep)


@pytest.mark.parametrize(("columns", "rows"), [(9, 7), (11, 8), (8, 6)])
def test_a_board_of_another_size_is_not_called_one_turned_round(frames, columns, rows):
    sweep = stack_of(frames[0][5:8], board=Board(columns=columns, rows=rows)).sweep
    words = rf"a\.h5: 17 markers are seen, but not placed as on a board of {columns} x {rows} squares; .*\[NO_BOARD\]"
    with pytest.raises(CalibrationError, match=words):
        locate(sweep)


def test_a_board_that_moved_is_named(frames):
    moved = frames[0].copy()
    moved[4] = np.roll(moved[4], 5, axis=1)
    with pytest.raises(CalibrationError, match=r"in frame 2; .*\[MOVED\]"):
        calibrate([every_other(moved)], focal_px=FOCAL)


def test_a_board_within_the_depth_of_field_is_refused(frames):
    sharp = np.stack([frames[0][6]] * 5)
    with pytest.raises(CalibrationError, match=r"within the depth of field.*\[TOO_SHARP\]"):
        calibrate([stack_of(sharp)], focal_px=FOCAL)


def test_blur_larger_than_the_squares_is_refused(frames):
    index = [6, 6, 6, 6, 6]
    blurred = np.stack(
        [cv2.GaussianBlur(frames[0][i], (0, 0), s) for i, s in zip(index, (0.1, 0.2, 30, 35, 40), strict=True)]
    )
    with pytest.raises(CalibrationError, match=r"print larger squares.*\[BLUR_TOO_LARGE\]"):
        calibrate([stack_of(blurred)], focal_px=FOCAL)


def sharpened(images, amount=0.6, sigma=1.2):
    return np.stack([image + amount * (image - cv2.GaussianBlur(image, (0, 0), sigma)) for image in images])


@pytest.mark.parametrize(
    ("code", "words", "change"),
    [
        (
            "NOT_LINEAR",
            "mid tones are brighter .*correct `transfer`",
            lambda images: np.clip(images, 0, 1) ** (1 / 2.2),
        ),
        ("NOT_LINEAR", "mid tones are darker .*correct `transfer`", lambda images: np.clip(images, 0, 1) ** 1.5),
        ("SHARPENED", "switch sharpening", sharpened),
    ],
    ids=["gamma taken for linear", "decoded twice", "sharpened"],
)
def test_what_the_camera_did_to_the_light_is_named(frames, code, words, change):
    with pytest.raises(CalibrationError, match=rf"{words}.*\[{code}\]"):
        calibrate([every_other(change(images), f"{k}.h5") for k, images in enumerate(frames)], focal_px=FOCAL)


def test_a_stack_of_another_board_is_refused(frames):
    with pytest.raises(CalibrationError, match=r"; .*\[NO_BOARD\]"):
        locate(stack_of(frames[0][5:8], board=Board(columns=8, rows=6, square_m=0.035)).sweep)


def test_what_the_other_sweeps_predict_is_recorded(calibration):
    page = report_html(calibration)
    for left, source in zip(calibration.left_out, calibration.profile.sources, strict=True):
        if left is None:  # a single sweep of a small board need not determine a fit
            assert source.left_out_shift_dpt is None and "cannot be told" in page
        else:
            assert left.agrees
            assert source.left_out_shift_dpt == left.shift_dpt
            assert f"{left.shift_dpt:+.4f} &plusmn;" in page
    assert calibration.left_out[1] is None  # one frontal sweep alone predicts nothing


def test_what_the_numbers_cannot_show_is_warned_about(frames):
    board = BOARD.model_copy(update={"square_m": 0.05, "measured": False})
    lens = Lens(focal_length_m=0.050, f_number=2.8, pixel_pitch_m=0.050 / 1000.0)
    stacks = [every_other(images, f"{k}.h5", board=board, lens=lens) for k, images in enumerate(frames)]
    warnings = calibrate(stacks, focal_px=FOCAL).profile.warnings
    assert [warning for warning in warnings if warning.startswith("SCALE_UNCHECKED: nobody measured")]
    assert [w for w in warnings if w.startswith("IMPLAUSIBLE_APERTURE: 22.") and "where f / N is 17.9 mm" in w]


@pytest.mark.slow
@pytest.mark.parametrize("k1", [0.06, -0.06])
def test_distortion_is_estimated_from_tilted_boards(k1):
    camera = BoardCamera(height=320, width=480, focal_px=700.0, distortion=k1, noise=0.005)
    poses = [
        {"distance_m": 0.62, "tilt_deg": 28, "roll_deg": 4},
        {"distance_m": 0.9, "turn_deg": -40, "roll_deg": -3},
        {"distance_m": 0.7, "tilt_deg": -35, "turn_deg": 15},
    ]
    steps = np.linspace(0, 1000, 5)
    stacks = [
        stack_of(camera.sweep(BOARD, camera.pose(BOARD, **pose), steps, seed=k), f"{k}.h5", positions=steps)
        for k, pose in enumerate(poses)
    ]
    profile = calibrate(stacks).profile
    assert profile.intrinsics.distortion[0] == pytest.approx(k1, abs=0.02)
    assert profile.intrinsics.focal_length_px.value == pytest.approx(float(camera.focal_at(500)), rel=0.005)
    assert profile.pupil_diameter_m.value == pytest.approx(camera.pupil_m, rel=0.01)


def test_stacks_of_different_cameras_are_refused(frames):
    with pytest.raises(DataError, match="differ in camera"):
        calibrate([stack_of(frames[0]), stack_of(frames[1], camera="another")], focal_px=FOCAL)


def test_a_packed_copy_of_a_sweep_is_refused(frames):
    stacks = [every_other(frames[k], name) for k, name in ((0, "a.h5"), (1, "b.h5"), (0, "a_packed.h5"))]
    with pytest.raises(DataError, match=r"^a\.h5 and a_packed\.h5 are the same sweep"):
        calibrate(stacks, focal_px=FOCAL)


def test_check_refuses_a_sweep_at_another_aperture(calibration, frames):
    profile = calibration.profile.model_copy(update={"f_number": 2.8})
    with pytest.raises(UsageError, match=r"a\.h5 was taken at f/5\.6 and the profile at f/2\.8; sweep at"):
        check_profile(profile, every_other(frames[0], f_number=5.6))
    for f_number in (2.83, math.nan):
        assert check_profile(profile, every_other(frames[0], f_number=f_number)).holds


# --- files


def write(path, images, board=BOARD, positions=STEPS, **options):
    with StackWriter.create(
        path, n_frames=len(images), height=images.shape[1], width=images.shape[2], channels=1, dtype=np.uint16,
        transfer="linear", board=board and board.model_dump(), sync=False, **options,
    ) as writer:  # fmt: skip
        for i, image in enumerate(images):
            writer.append(
                i, (np.clip(image, 0, 1) * 65535).astype(np.uint16)[..., None], focus_command=float(positions[i])
            )
        writer.finish()
    return path


def test_a_stack_is_binned_and_ordered(tmp_path, frames):
    path = write(tmp_path / "a.h5", frames[0][::-1], positions=STEPS[::-1])
    stack = load_board_stack(path, max_pixels=480 * 320 // 4)
    assert stack.binning == 2
    assert stack.sweep.images.shape == (9, 160, 240)
    np.testing.assert_array_equal(stack.sweep.positions, STEPS)
    expected = cv2.resize(frames[0][0], (240, 160), interpolation=cv2.INTER_AREA)
    np.testing.assert_allclose(stack.sweep.images[0], expected, atol=1e-4)
    assert stack.sweep.board == BOARD


@pytest.mark.parametrize(
    ("code", "change"),
    [
        ("SATURATED", lambda images: np.minimum(images * 1.5, 1.0)),
        ("EXPOSURE_CHANGED", lambda images: images * np.where(np.arange(9) == 4, 0.8, 1.0)[:, None, None]),
    ],
)
def test_wrong_exposure_is_refused(tmp_path, frames, code, change):
    path = write(tmp_path / "a.h5", change(frames[0]))
    with pytest.raises(CalibrationError, match=r"; .*\[" + code):
        load_board_stack(path)


def test_a_stack_must_say_its_board(tmp_path, frames):
    path = write(tmp_path / "a.h5", frames[0], board=None)
    with pytest.raises(UsageError, match="--board"):
        load_board_stack(path)
    assert load_board_stack(path, BOARD).sweep.board == BOARD


def test_the_command_writes_profile_and_report(tmp_path, frames):
    paths = [write(tmp_path / f"{k}.h5", images[::2], positions=STEPS[::2]) for k, images in enumerate(frames)]
    out = tmp_path / "lens.yaml"
    (tmp_path / "camera.yml").write_text(
        f"%YAML:1.0\n---\nimage_width: {CAMERA.width}\nimage_height: {CAMERA.height}\n"
        "camera_matrix: !!opencv-matrix\n   rows: 3\n   cols: 3\n   dt: d\n"
        f"   data: [ {FOCAL.value}, 0., 240.8, 0., {FOCAL.value}, 158.6, 0., 0., 1. ]\n"
        "distortion_coefficients: !!opencv-matrix\n   rows: 1\n   cols: 5\n   dt: d\n   data: [ 0., 0., 0., 0., 0. ]\n"
    )
    args = ["calibrate", *map(str, paths), "-o", str(out), "--intrinsics", str(tmp_path / "camera.yml")]
    both = CliRunner().invoke(app, [*args, "--focal-px", "1000"])
    assert isinstance(both.exception, UsageError) and "exclude each other" in str(both.exception)
    result = CliRunner().invoke(app, args)
    assert result.exit_code == 0, result.output
    assert "from camera.yml, taken to hold at mid focus; the boards agree with them within 0." in result.output
    assert "Aperture 17.9" in result.output or "Aperture 18.0" in result.output
    assert (tmp_path / "report.html").stat().st_size > 20_000
    profile = LensProfile.read(out)
    assert profile.intrinsics.center_x_px == Measured(value=240.8, std=0.96, source="camera.yml")
    assert profile.sources[0].sha256 == load_board_stack(paths[0]).sha256
    checked = CliRunner().invoke(app, ["calibrate", "--check", str(paths[1]), "--lens", str(out)])
    assert checked.exit_code == 0, checked.output
    assert "holds" in checked.output
    again = CliRunner().invoke(app, args)
    assert isinstance(again.exception, UsageError)


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("x.html", r"x\.html: the profile is written as \.yaml or \.yml"),
        ("a.h5", r"a\.h5: the profile is written as"),
        (".", "the profile is written as"),
        ("nodir/lens.yaml", r"nodir does not exist; create it"),
        ("folder.yaml", r"folder\.yaml is a folder"),
        ("sweep.yaml", r"sweep\.yaml would be written, but .*sweep\.yaml is read"),
        ("page.yaml", r"page\.html would be written, but .*page\.html is read"),
        ("board.yaml", r"board\.yaml would be written, but .*board\.yaml is read"),
        ("old.yaml", r"old\.yaml would be written, but .*old\.yaml is read"),
        ("link.yaml", r"link\.yaml would be written, but .*a\.h5 is read"),
        ("camera.yml", r"camera\.yml would be written, but .*camera\.yml is read"),
    ],
)
def test_what_is_read_is_never_written_even_with_force(tmp_path, out, words):
    stacks = [tmp_path / name for name in ("a.h5", "sweep.yaml", "page.html")]
    read = {option: tmp_path / f"{name}" for option, name in
            (("--board", "board.yaml"), ("--lens", "old.yaml"), ("--intrinsics", "camera.yml"))}  # fmt: skip
    for path in (*stacks, *read.values()):
        path.write_text("square_m: 0.035\n")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "link.yaml").symlink_to(tmp_path / "a.h5")
    options = [str(word) for pair in read.items() for word in pair]
    done = CliRunner().invoke(app, ["calibrate", *map(str, stacks), *options, "-o", str(tmp_path / out), "--force"])
    assert isinstance(done.exception, UsageError), done.exception
    assert re.search(words, str(done.exception))
    assert all(path.read_text() == "square_m: 0.035\n" for path in (*stacks, *read.values()))


def test_the_board_command_writes_what_calibrate_reads(tmp_path):
    result = CliRunner().invoke(app, ["board", "-o", str(tmp_path / "board.pdf"), "--paper", "A3"])
    assert result.exit_code == 0, result.output
    from capture.config import load_yaml

    assert load_yaml(tmp_path / "board.yaml", Board).square_m == pytest.approx(0.052, abs=0.005)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("board -o {}/b.gif", r"b\.gif: the board is written as \.pdf or \.png; say -o board\.pdf"),
        ("board -o {}/nodir/b.pdf", "nodir does not exist; create it"),
        ("board -o {}/b.png --square-mm 500", r"would be \d+ x \d+ px at 600 dpi, .*; take smaller or fewer"),
        ("calibrate a.h5 -o {}/lens.yaml --temperature nan", "--temperature nan must"),
    ],
)
def test_options_that_cannot_be_are_refused_before_anything_is_written(tmp_path, arguments, words):
    done = CliRunner().invoke(app, arguments.format(tmp_path).split())
    assert isinstance(done.exception, UsageError), done.exception
    assert re.search(words, str(done.exception))
    assert not list(tmp_path.iterdir())


def test_gain_and_offset_of_the_light_change_nothing(frames):
    x = np.linspace(0.6, 1.0, CAMERA.width, dtype=np.float32)
    lit = every_other(frames[1]).sweep
    shaded = every_other(frames[1] * x + 0.02).sweep
    where = locate(lit)
    camera = np.array([[FOCAL.value, 0, 239.5], [0, FOCAL.value, 159.5], [0, 0, 1]])
    plain, dimmed = measure(lit, where, camera), measure(shaded, where, camera)
    np.testing.assert_array_equal(dimmed.frame, plain.frame)
    np.testing.assert_array_equal(dimmed.corner, plain.corner)
    change = (dimmed.coc2_px2 - plain.coc2_px2) / np.hypot(dimmed.std_px2, plain.std_px2)
    assert abs(np.median(change)) < 0.2
    assert np.mean(np.abs(change) < 1) > 0.9


def test_the_boards_description_travels_from_capture_to_calibrate(tmp_path):
    FocusSweep(spacing="command", positions=(2.0, 1.5), unit="dioptre", count=2).write(tmp_path / "plan.yaml")
    (tmp_path / "board.yaml").write_text("columns: 9\nrows: 7\nsquare_m: 0.021\nmeasured: true\n")
    args = ["capture", "--camera", "simulated:procedural-3?width=64", "--plan", str(tmp_path / "plan.yaml")]
    out = tmp_path / "a.h5"
    done = CliRunner().invoke(app, [*args, "-o", str(out), "--board", str(tmp_path / "board.yaml")])
    assert done.exit_code == 0, done.output + str(done.exception)
    assert load_board_stack(out).sweep.board == Board(columns=9, rows=7, square_m=0.021, measured=True)
    (tmp_path / "board.yaml").write_text("square_m: 21\n")
    wrong = CliRunner().invoke(app, [*args, "-o", str(tmp_path / "b.h5"), "--board", str(tmp_path / "board.yaml")])
    assert isinstance(wrong.exception, UsageError) and "board.yaml:1: square_m" in str(wrong.exception)
