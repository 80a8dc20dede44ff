import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capture.errors import UsageError
from capture.lens import Lens
from capture.plan import (
    FocusSweep,
    assess,
    blur_range_px,
    coc_bound_px,
    command_sweep,
    explicit_sweep,
    place_frames,
    plan_sweep,
    read_lens,
)
from tests.capture.run_cli import run_daif

LENS = Lens(focal_length_m=0.050, f_number=8.0, pixel_pitch_m=1.2e-5)


@pytest.mark.parametrize("spacing", ["dioptre", "geometric", "metre"])
@given(near=st.floats(0.01, 50.0), factor=st.floats(1.001, 1000.0), count=st.integers(2, 60))
@settings(max_examples=60, deadline=None)
def test_both_ends_are_frames_and_frames_lie_near_to_far(spacing, near, factor, count):
    sweep = FocusSweep(near_m=near, far_m=near * factor, count=count, spacing=spacing)
    distances = sweep.focus_distance_m
    assert len(sweep) == len(list(sweep)) == len(distances) == count
    assert distances[0] == near
    assert distances[-1] == near * factor
    assert np.all(np.diff(distances) > 0)


def test_dioptre_spacing_is_uniform_in_blur_and_reaches_infinity():
    sweep = FocusSweep(near_m=0.5, far_m=math.inf, count=9)
    np.testing.assert_allclose(np.diff(sweep.focus_dpt), -0.25)
    assert sweep.focus_distance_m[-1] == math.inf


def test_geometric_and_metre_spacing():
    np.testing.assert_allclose(
        FocusSweep(near_m=1, far_m=8, count=4, spacing="geometric").focus_distance_m, [1, 2, 4, 8]
    )
    np.testing.assert_allclose(FocusSweep(near_m=1, far_m=4, count=4, spacing="metre").focus_distance_m, [1, 2, 3, 4])


def test_the_number_of_frames_follows_from_the_optics():
    sweep = plan_sweep(1.0, 4.0, lens=LENS)
    kappa = LENS.kappa_px_per_dpt(0.5 * (1 + 0.25))
    assert blur_range_px(LENS, 1.0, 4.0) == pytest.approx(kappa * 0.75)
    assert len(sweep) == 1 + math.ceil(kappa * 0.75 / 4.0)
    assert len(plan_sweep(1.0, 1.1, lens=LENS)) == 5
    assert len(plan_sweep(0.1, 4.0, lens=LENS)) == 20


@pytest.mark.parametrize(
    ("plan", "says"),
    [
        ({"near_m": 3, "far_m": 1, "count": 5}, "larger than near_m"),
        ({"near_m": 0, "far_m": 1, "count": 5}, "near_m 0"),
        ({"near_m": float("nan"), "far_m": 1, "count": 5}, "near_m nan"),
        ({"near_m": 1, "far_m": float("nan"), "count": 5}, "far_m nan"),
        ({"near_m": 1, "far_m": math.inf, "count": 5, "spacing": "metre"}, "dioptre"),
        ({"near_m": 1, "far_m": 2, "count": 1}, "greater than or equal to 2"),
        ({"near_m": 1, "far_m": 2, "count": 100000}, "less than or equal"),
        ({"near_m": 1, "far_m": 1 + 4e-16, "count": 5}, "fall together"),
        ({"near_m": 1, "count": 5}, "far_m are needed"),
        ({"spacing": "explicit", "distances_m": [1, 2, 2]}, "without repeats"),
        ({"spacing": "explicit", "distances_m": [2, 1]}, "rise from near to far"),
        ({"spacing": "explicit", "distances_m": [1, 2], "count": 3}, "count is 3"),
        ({"spacing": "explicit", "distances_m": [1]}, "greater than or equal to 2"),
        ({"spacing": "command", "positions": [0, 5, 3]}, "steadily"),
        ({"spacing": "command", "positions": [0, math.inf]}, "finite"),
        ({"near_m": 1, "far_m": 2, "count": 3, "positions": [1, 2, 3]}, "spacing: command"),
        ({"near_m": 1, "far_m": 2, "count": 3, "nera_m": 1}, "Extra inputs"),
    ],
)
def test_impossible_plans_are_refused(plan, says):
    with pytest.raises(ValueError, match=says.replace("(", r"\(")):
        FocusSweep.model_validate(plan)


def test_a_plan_survives_its_file_and_keeps_its_identity(tmp_path):
    for sweep in (
        plan_sweep(0.6, math.inf, lens=LENS),
        explicit_sweep((0.5, 1.0, math.inf)),
        command_sweep((200.0, 100.0, 0.0), "driver"),
        FocusSweep(near_m=0.5, far_m=3, count=7, spacing="adaptive"),
    ):
        sweep.write(tmp_path / "plan.yaml")
        again = FocusSweep.read(tmp_path / "plan.yaml")
        assert again == sweep
        assert again.sha256 == sweep.sha256
        assert FocusSweep.model_validate(json.loads(json.dumps(sweep.model_dump(mode="json")))) == sweep
    assert plan_sweep(0.6, 3, count=5).sha256 != plan_sweep(0.6, 3, count=6).sha256


def test_a_misspelt_key_is_named_with_its_line(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("near_m: 1\nfar_m: 2\ncont: 5\n")
    with pytest.raises(UsageError, match=r"plan.yaml:3: unknown key 'cont'; did you mean 'count'"):
        FocusSweep.read(path)


def test_assessment_follows_the_optics():
    sweep = plan_sweep(1.0, 4.0, lens=LENS)
    found = assess(sweep, LENS, image_shape=(480, 640))
    assert found.widest_step_px <= 4.0 * 1.05
    assert found.frames[0].focus_distance_m == 1.0
    assert math.isnan(found.frames[-1].step_px)
    assert not found.warnings
    # dZ = Z^2 dc / kappa
    last = found.frames[-1]
    assert last.bound_m == pytest.approx(16 * found.coc_bound_px / LENS.kappa_px_per_dpt(0.25))
    assert last.typical_m > last.bound_m
    assert found.bytes == pytest.approx(len(sweep) * 480 * 640 * 3.4)


def test_bound_reads_its_table_and_grows_beyond_it():
    assert coc_bound_px(16, 5) == pytest.approx(0.046)
    assert coc_bound_px(64, 10) == pytest.approx(0.092)
    assert 0.046 < coc_bound_px(24, 5) < 0.073
    assert coc_bound_px(128, 10) == pytest.approx(2 * 0.092)


def test_warnings_say_what_to_do():
    blind = assess(plan_sweep(1, 4, lens=(phone := Lens(focal_length_m=0.004, f_number=8, pixel_pitch_m=4e-6))), phone)
    assert "cannot see this depth" in blind.warnings[0]
    wide = assess(plan_sweep(0.5, math.inf, lens=LENS, count=5), LENS)
    assert "stop down to f/" in wide.warnings[0]
    dense = assess(plan_sweep(1, 1.2, lens=LENS, count=20), LENS)
    assert "gains nothing" in dense.warnings[0]


@pytest.mark.parametrize("text", ["50mm f/8 12um", "50 mm, f8, 12 µm", "50mm f/8 pitch 12um"])
def test_lens_in_words(text):
    assert read_lens(text) == LENS


def test_lens_from_a_file_and_nonsense(tmp_path):
    (tmp_path / "lens.yaml").write_text("focal_length_m: 0.05\nf_number: 8\npixel_pitch_m: 1.2e-5\n")
    assert read_lens(str(tmp_path / "lens.yaml")) == LENS
    with pytest.raises(UsageError, match="in words such as"):
        read_lens("50mm")
    with pytest.raises(UsageError, match=r"0\.3 to 128"):
        read_lens("50mm f/900 12um")
    with pytest.raises(UsageError, match="does not exist"):
        read_lens(str(tmp_path / "none.yaml"))


def test_adaptive_frames_go_where_the_scene_is():
    scout = np.linspace(2.0, 0.0, 9)
    measure = np.full((9, 40), 0.1)
    measure[1, :20] = 5.0  # half of the tiles at 1.75 dpt, half at 0.75 dpt, nothing between
    measure[5, 20:] = 5.0
    sweep = place_frames(scout, measure, 10)
    dpt = sweep.focus_dpt
    assert len(sweep) == 10
    assert dpt.max() <= 2.0
    assert dpt.min() >= 0.5 - 1e-9
    near_content = np.minimum(abs(dpt - 1.75), abs(dpt - 0.75)) <= 0.25 + 1e-9
    assert near_content.sum() >= 7
    with pytest.raises(UsageError, match="nothing sharp"):
        place_frames(scout, np.ones((9, 40)), 10)


def test_command_prints_plan_and_writes_it(tmp_path):
    plan = tmp_path / "plan.yaml"
    done = run_daif("plan", "--lens", "50mm f/8 12um", "--near", "1", "--far", "4", "-o", str(plan), "--json")
    assert done.exit_code == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed["plan"]["count"] == len(FocusSweep.read(plan)) == len(printed["assessment"]["frames"])
    table = run_daif("plan", "--lens", "50mm f/8 12um", "--near", "1", "--far", "inf")
    assert "blur step px" in table.stdout


def test_command_overwrites_nothing_unasked(tmp_path):
    words = ["plan", "--near", "1", "--far", "4", "--count", "5", "-o"]
    notes = tmp_path / "notes.txt"
    notes.write_text("precious")
    for place, says in (
        (notes, "exists already; choose another name, or overwrite it with --force"),
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "plan.yaml", "none does not exist; create it"),
    ):
        done = run_daif(*words, str(place))
        assert (done.exit_code, done.stdout) == (2, "")
        assert says in done.stderr
        assert done.stderr.count("\n") == 1
    assert notes.read_text() == "precious"
    assert run_daif(*words, str(notes), "--force").exit_code == 0
    assert len(FocusSweep.read(notes)) == 5
    assert list(tmp_path.iterdir()) == [notes]
    done = run_daif("cameras", "--probe", "gphoto2:", "-o", str(notes))
    assert done.exit_code == 2
    assert "notes.txt exists already" in done.stderr


def test_a_profile_probed_again_keeps_the_earlier_one(tmp_path, monkeypatch):
    from capture.cameras.probe import write_profile
    from capture.cameras.profiles import CameraProfile, read_profile

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    profiles = [CameraProfile(match=("Acme 1",), notes=notes) for notes in ("first", "second")]
    path = write_profile(profiles[0], None)
    assert write_profile(profiles[1], None) == path
    assert read_profile(path) == profiles[1]
    (earlier,) = set(path.parent.iterdir()) - {path}
    assert "first" in earlier.read_text()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--near", "0.04", "--far", "2", "--lens", "50mm f/8 12um", "--count", "3"], "can be focused that close"),
        (["--near", "1"], "--far M"),
        (["--near", "1", "--far", "2"], "--lens"),
        (["--near", "1", "--far", "2", "--count", "3", "--spacing", "dioptr"], "did you mean 'dioptre'"),
        (["--positions", "0:9"], "FIRST:LAST:COUNT"),
        (["--positions", "0,x"], "'x' is not a number"),
        (["--near", "2", "--far", "1", "--count", "3"], "larger than near_m"),
        (["--near", "1", "--far", "2", "--lens", "50mm f/8 12um", "--image", "640"], "WIDTHxHEIGHT"),
    ],
)
def test_command_refuses_with_one_sentence(arguments, says):
    done = run_daif("plan", *arguments)
    assert done.exit_code == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
