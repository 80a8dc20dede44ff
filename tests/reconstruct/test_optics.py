"""Focus and gain of a stack: from what it says, and refused where that cannot be."""

import pytest

from capture.errors import DataError
from capture.stack import FocalStack
from reconstruct.optics import optics_of
from tests.reconstruct.small_stack import LENS, write_small_stack


@pytest.mark.parametrize("focal_length_m", [0.999, 1.0, 1.5])
def test_focus_inside_the_focal_length_is_refused(tmp_path, focal_length_m):
    lens = LENS.model_copy(update={"focal_length_m": focal_length_m})
    path = write_small_stack(tmp_path / "close.h5", lens=lens)
    with FocalStack.open(path) as stack, pytest.raises(DataError, match=r"h5: frame 0 is focused at 1 m, .* can"):
        optics_of(stack)
