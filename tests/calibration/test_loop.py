"""The whole loop: an uncalibrated camera, three sweeps of the board, a profile, another scene in metres."""

import json
from dataclasses import replace

import numpy as np
import pytest
from typer.testing import CliRunner

from calibration.board import Board, board_scene
from capture.cameras.simulated import Behaviour, SimulatedCamera
from capture.lens import Breathing, FocusTable, Intrinsics, Lens, LensProfile, Measured
from capture.plan import FocusSweep
from capture.scenes import Scene, procedural_scene
from capture.sweep import SweepOptions, run_sweep
from reconstruct.cli import app

HEIGHT, WIDTH, FOCAL_PX = 420, 560, 900.0
NEAR_DPT, FAR_DPT = 1.7, 0.4
LENS = Lens(focal_length_m=0.050, f_number=2.8, pixel_pitch_m=0.050 / FOCAL_PX)
# the simulated camera enlarges the scene by 1 at mid focus, where this lens's image distance is f / (1 - f q)
SCENE_FOCAL_PX = FOCAL_PX / (1 - 0.050 * 0.5 * (NEAR_DPT + FAR_DPT))
BOARD = Board(square_m=0.04, measured=True)
POSES = (
    {"distance_m": 0.75, "tilt_deg": 30.0},
    {"distance_m": 1.0, "turn_deg": -35.0, "roll_deg": 4.0},
    {"distance_m": 1.5, "tilt_deg": 4.0},
)


def camera_for(scene, seed) -> SimulatedCamera:
    # a lens that moves as a unit: its image grows by f x (change of focus in dioptres)
    behaviour = Behaviour(
        relative=True, steps=1000, curve=0.3, backlash=12.0, noise=0.01, bits=16, seed=seed,
        breathing=LENS.focal_length_m * (NEAR_DPT - FAR_DPT),
    )  # fmt: skip
    return SimulatedCamera(scene, LENS, behaviour, near_dpt=NEAR_DPT, far_dpt=FAR_DPT)


def true_profile(camera: SimulatedCamera) -> LensProfile:
    """What a perfect calibration would write."""
    steps = np.linspace(0, 1000, 41)
    focus = np.array([camera.focus_dpt_at(step) for step in steps])
    zero = tuple(0.0 * steps)
    middle = 0.5 * (NEAR_DPT + FAR_DPT)
    exact = Measured(value=0.0, std=0.0, source="truth")
    scale = (1 - LENS.focal_length_m * middle) / (1 - LENS.focal_length_m * focus)
    return LensProfile(
        grade="metric",
        width_px=WIDTH,
        height_px=HEIGHT,
        pupil_diameter_m=Measured(value=LENS.aperture_m, std=0.0),
        focus=FocusTable(positions=tuple(steps), focus_dpt=tuple(focus), std_dpt=zero),
        breathing=Breathing(
            reference_position=500.0, scale=tuple(scale), scale_std=zero, shift_x_px=zero, shift_y_px=zero
        ),
        intrinsics=Intrinsics(
            focal_length_px=Measured(value=SCENE_FOCAL_PX, std=0.0),
            center_x_px=exact,
            center_y_px=exact,
        ),
        floor_sigma_px=exact,
    )


def depth_error(out, scene) -> tuple[float, float]:
    """Mean and median absolute error in dioptres of the depth.npy below `out`."""
    depth = np.load(next(out.rglob("depth.npy")))
    known = np.isfinite(depth) & np.isfinite(scene.depth_m)
    assert known.mean() > 0.5
    error = np.abs(1 / depth[known] - 1 / scene.depth_m[known])
    return float(error.mean()), float(np.median(error))


@pytest.mark.slow
def test_a_calibrated_lens_reconstructs_as_well_as_the_true_one(tmp_path):
    plan = FocusSweep(spacing="command", positions=tuple(np.linspace(0, 1000, 11)), unit="step", count=11)
    for k, pose in enumerate(POSES):
        scene = board_scene(BOARD, focal_px=SCENE_FOCAL_PX, height=HEIGHT, width=WIDTH, **pose)
        scene = replace(scene, name="bench")  # the camera's model name holds the scene's
        run_sweep(camera_for(scene, k), plan, tmp_path / f"board{k}.h5", options=SweepOptions(board=BOARD.model_dump()))
    boards = [str(tmp_path / f"board{k}.h5") for k in range(len(POSES))]
    found = CliRunner().invoke(app, ["calibrate", *boards, "-o", str(tmp_path / "lens.yaml")])
    assert found.exit_code == 0, found.output
    profile = LensProfile.read(tmp_path / "lens.yaml")
    assert profile.pupil_diameter_m.value == pytest.approx(LENS.aperture_m, rel=0.02)

    drawn = procedural_scene(5, HEIGHT, WIDTH)
    inverse = 1 / drawn.depth_m
    inverse = 0.5 + 1.1 * (inverse - np.nanmin(inverse)) / np.nanmax(inverse - np.nanmin(inverse))
    scene = Scene(drawn.aif, (1 / inverse).astype(np.float32), "bench", SCENE_FOCAL_PX)
    camera = camera_for(scene, 9)
    far_m, near_m = 1 / 0.5, 1 / 1.6
    run_sweep(camera, FocusSweep(near_m=near_m, far_m=far_m, count=7), tmp_path / "scene.h5", lens=profile)
    true_profile(camera).write(tmp_path / "true.yaml")
    errors = {}
    for name in ("lens", "true"):
        arguments = ["reconstruct", str(tmp_path / "scene.h5"), "-o", str(tmp_path / name), "--method", "plane-sweep"]
        done = CliRunner().invoke(app, [*arguments, "--lens", str(tmp_path / f"{name}.yaml")])
        assert done.exit_code == 0, done.output + str(done.exception)
        errors[name] = depth_error(tmp_path / name, scene)
    print(json.dumps(errors))
    for calibrated, ideal in zip(errors["lens"], errors["true"], strict=True):
        assert calibrated < 1.15 * ideal
