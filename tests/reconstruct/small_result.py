"""A small made-up reconstruction for tests of what is done with results."""

import numpy as np

from reconstruct.export import Intrinsics
from reconstruct.result import Reconstruction


def small_result(name="take", *, metric=True, height=24, width=32, depth_m=2.0):
    rng = np.random.default_rng(0)
    inverse = np.full((height, width), 1 / depth_m, np.float32)
    inverse[:, width // 2 :] = 0.25
    focus_dpt, kappa = np.array([0.5, 0.25]), np.array([20.0, 20.0])
    return Reconstruction(
        name=name,
        inverse_depth_dpt=inverse,
        std_dpt=np.full((height, width), 0.01, np.float32),
        confidence=np.full((height, width), 0.8, np.float32),
        aif=rng.random((height, width, 3), np.float32),
        metric=metric,
        intrinsics=Intrinsics(40.0, (width - 1) / 2, (height - 1) / 2),
        focus_dpt=focus_dpt,
        kappa_px_per_dpt=kappa,
        record={
            "metric": metric,
            "method": {"name": "plane-sweep"},
            "optics": {"focus_dpt": focus_dpt.tolist(), "kappa_px_per_dpt": kappa.tolist()},
            "intrinsics": {"focal_px": 40.0, "centre_x_px": (width - 1) / 2, "centre_y_px": (height - 1) / 2},
            "summary": {"seconds": 1.0, "alignment_residual_px": None},
            "warnings": [] if metric else ["this stack is uncalibrated"],
        },
    )
