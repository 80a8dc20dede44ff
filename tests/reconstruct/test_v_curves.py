"""V-curves: points measured in the frames lie on the lines of the right optics, and not on those of wrong ones."""

from dataclasses import replace

import numpy as np
import pytest

from capture.optics import Condition
from capture.stack import FocalStack
from reconstruct import infer, job, report
from reconstruct.v_curves import misfit_px, v_curves
from tests.reconstruct.small_result import small_result
from tests.reconstruct.small_stack import LENS, small_scene, write_small_stack


def reconstructed(path, lens=LENS):
    """The stack of a scene of 3 planes, taken with LENS and reconstructed as if with `lens`."""
    write_small_stack(path, scene=small_scene(96, 128), condition=Condition(noise_std=0.003, breathing=0.02), lens=lens)
    with FocalStack.open(path) as stack:
        overview = infer.read_overview(stack)
        answer = infer.reconstruct(stack, infer.Settings(device="cpu"), overview=overview)
        return answer, job._thumbnails(stack, overview)


@pytest.fixture(scope="module")
def right(tmp_path_factory):
    return reconstructed(tmp_path_factory.mktemp("v") / "right.h5")


def test_points_lie_on_the_lines_of_the_right_optics(right):
    answer, frames = right
    curves = v_curves(answer, [image for image, _ in frames])
    assert len(curves) >= 2 and np.diff([curve.inverse_depth_dpt for curve in curves]).min() > 0.05
    assert misfit_px(answer, curves) < 0.8
    for curve in curves:  # each is a V: lowest where the frame is focused at that depth
        assert abs(answer.focus_dpt[np.nanargmin(curve.measured_px)] - curve.inverse_depth_dpt) <= 0.2


def test_a_wrong_aperture_is_seen(right):
    answer, frames = right
    wrong = replace(answer, kappa_px_per_dpt=2 * answer.kappa_px_per_dpt)
    images = [image for image, _ in frames]
    assert misfit_px(wrong, v_curves(wrong, images)) > 2 * misfit_px(answer, v_curves(answer, images))


def test_the_report_draws_them_only_where_the_optics_were_known(right):
    answer, frames = right
    assert "not calibrated" in report.render_report(answer, frames)
    assert '"curves":null' in report.render_report(small_result(metric=False), frames)
