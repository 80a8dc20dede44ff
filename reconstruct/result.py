"""What reconstructing one stack gives, and the folder it is kept in.

`OUT/<stack name>/` is written under a temporary name and renamed: it is complete or it does not exist
(design section 4).
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from numpy.typing import NDArray

from capture.decode import decode_image, to_linear, to_srgb8
from capture.errors import DataError, NoSpaceError, UsageError
from capture.output import disk_is_full
from reconstruct import export

RECORD = "reconstruction.json"
_MANY_LOST = 0.01  # share of the known pixels that depth.png may lose without a word
_MIN_INVERSE_DEPTH_DPT = 1e-3  # beyond a kilometre nothing is known from defocus


@dataclass
class Reconstruction:
    """Depth, confidence and all-in-focus image of one stack.

    Attributes:
        inverse_depth_dpt: (H, W) float32, 1/m; in relative mode the position along the sweep, see `metric`.
        std_dpt: (H, W) float32, standard deviation of `inverse_depth_dpt`.
        confidence: (H, W) float32, 0 to 1.
        aif: (H, W, 3) float32, linear RGB, 0 to 1.
        metric: True if depths are metres. False for an uncalibrated stack: `depth` is then ordered and
            unitless, 0 at the nearest focus setting and 1 at the farthest.
        baseline: the plane sweep's answer at the working scale, where it was asked for; not saved.
        record: everything else worth keeping (inputs, lens, versions, timings, residuals), JSON-ready.
    """

    name: str
    inverse_depth_dpt: NDArray[np.float32]
    std_dpt: NDArray[np.float32]
    confidence: NDArray[np.float32]
    aif: NDArray[np.float32]
    metric: bool
    intrinsics: export.Intrinsics
    focus_dpt: NDArray[np.float64]
    kappa_px_per_dpt: NDArray[np.float64]
    record: dict[str, Any] = field(default_factory=dict)
    baseline: Reconstruction | None = None

    @property
    def depth(self) -> NDArray[np.float32]:
        """(H, W) metres, NaN where unknown; in relative mode 0 (near end of the sweep) to 1 (far end)."""
        if self.metric:
            q = self.inverse_depth_dpt
            return np.where(q > _MIN_INVERSE_DEPTH_DPT, 1 / np.maximum(q, _MIN_INVERSE_DEPTH_DPT), np.nan)
        near, far = self.focus_dpt.max(), self.focus_dpt.min()
        return ((near - self.inverse_depth_dpt) / max(near - far, 1e-9)).astype(np.float32)

    @property
    def depth_std(self) -> NDArray[np.float32]:
        """Standard deviation of `depth`, first order: std / q^2 in metres."""
        if self.metric:
            return (self.std_dpt * self.depth**2).astype(np.float32)
        return (self.std_dpt / max(np.ptp(self.focus_dpt), 1e-9)).astype(np.float32)

    @cached_property
    def aif_srgb8(self) -> NDArray[np.uint8]:
        """(H, W, 3) sRGB for the screen."""
        out = np.empty(self.aif.shape, np.uint8)
        for row in range(0, len(out), 64):  # in bands: the conversion takes several times the memory of its result
            out[row : row + 64] = to_srgb8(self.aif[row : row + 64])
        return out

    def near_far(self) -> tuple[float, float]:
        """Robust nearest and farthest depth (1st and 99th percentile)."""
        known = self.depth[np.isfinite(self.depth)]
        if known.size == 0:
            return np.nan, np.nan
        return float(np.percentile(known, 1)), float(np.percentile(known, 99))


def is_complete(folder: Path) -> bool:
    """Whether `folder` holds a finished reconstruction."""
    return (folder / RECORD).is_file()


def check_target(target: Path, *, replace: bool) -> None:
    """Raise UsageError unless `target` may become a result: it is free, empty, or a result itself and `replace` is set.

    Anything else that lies there is somebody's work and is never touched.
    """
    if not os.path.lexists(target):
        return
    ours = target.is_dir() and not target.is_symlink()
    if ours and not any(target.iterdir()):
        return
    if not (ours and is_complete(target)):
        raise UsageError(
            f"{target} is where the result would go, and what lies there is no result of daif, so it is never "
            "replaced; choose another output folder with -o, or move it away"
        )
    if not replace:
        raise UsageError(f"{target} already exists; remove it, choose another -o, or add --force to replace it")


def who() -> str:
    """This process among all that write into one folder, from one machine or many."""
    return f"{platform.node()}-{os.getpid()}"


def remove_leftovers(out: Path) -> None:
    """Delete what killed runs of this machine left in `out`; other machines' work, alive or dead, is not touched."""
    for kind in ("partial", "retired"):
        for folder in out.glob(f".*.{kind}-{platform.node()}-*"):
            number = folder.name.rpartition("-")[2]
            if number.isdecimal() and not psutil.pid_exists(int(number)):
                shutil.rmtree(folder, ignore_errors=True)


def save(
    result: Reconstruction,
    out: Path,
    *,
    depth_unit: export.DepthUnit = "mm",
    extra_formats: tuple[str, ...] = (),
    exif: bytes | None = None,
    report_html: str | None = None,
    replace: bool = False,
) -> Path:
    """Write every file of design section 4 into `out/<name>/` and return that folder.

    Raises UsageError if the folder may not be written, see `check_target`, or `out` cannot be; NoSpaceError
    if the disk is full. Nothing partial is left behind.
    """
    target = out / result.name
    check_target(target, replace=replace)
    staging = out / f".{result.name}.partial-{who()}"
    retired = out / f".{result.name}.retired-{who()}"
    try:
        staging.mkdir(parents=True)
        _write_files(result, staging, depth_unit, extra_formats, exif)
        if report_html is not None:
            (staging / "report.html").write_text(report_html, encoding="utf-8")
        (staging / RECORD).write_text(json.dumps(json_ready(result.record), indent=2) + "\n", encoding="utf-8")
        check_target(target, replace=replace)  # a minute later somebody else's folder may be there
        if target.exists():
            target.rename(retired)
        staging.rename(target)
    except OSError as error:
        if disk_is_full(error):
            raise NoSpaceError(
                f"{out}: the disk is full; reconstructing {result.name} needs about "
                f"{result.aif.nbytes * 3 / 1e6:.0f} MB there; free some space and run again"
            ) from error
        raise UsageError(f"{out} cannot be written ({error.strerror}); choose another output folder with -o") from error
    finally:
        if retired.exists() and not target.exists():  # stopped between the two renames
            retired.rename(target)
        for folder in (staging, retired):
            shutil.rmtree(folder, ignore_errors=True)
    return target


def _write_files(
    result: Reconstruction,
    folder: Path,
    depth_unit: export.DepthUnit,
    extra_formats: tuple[str, ...],
    exif: bytes | None,
) -> None:
    depth = result.depth
    rgb = result.aif_srgb8
    np.save(folder / "depth.npy", depth)
    np.save(folder / "depth_std.npy", result.depth_std)
    np.save(folder / "confidence.npy", result.confidence)
    export.write_png(folder / "aif.png", rgb, exif=exif)
    export.write_png(folder / "depth_color.png", export.colorize_inverse_depth(result.inverse_depth_dpt)[0])
    warnings = result.record.setdefault("warnings", [])
    if result.metric:
        unstored = export.write_depth_png(folder / "depth.png", depth, depth_unit)
        result.record["depth_png"] = {"unit": depth_unit, "unknown": 0, "pixels_out_of_range": unstored}
        lost = unstored / max(int(np.isfinite(depth).sum()), 1)
        if lost > _MANY_LOST:
            farthest_m = export.PNG_MAX / export.UNITS_PER_METRE[depth_unit]
            warnings.append(
                f"depth.png is 0 at {lost:.0%} of the known pixels: in {depth_unit} it ends at {farthest_m:.3g} m; "
                "depth.npy holds them all" + (", --depth-unit mm reaches 65.5 m" if depth_unit != "mm" else "")
            )
        solid_m = depth
    else:
        levels = np.where(np.isfinite(depth), 1 + np.clip(depth, 0, 1) * 65534, 0)
        export.write_png(folder / "depth.png", np.rint(levels).astype(np.uint16))
        result.record["depth_png"] = {"unit": "relative: 1 nearest, 65535 farthest", "unknown": 0}
        solid_m = (1.0 + np.clip(depth, 0, 1)).astype(np.float32)  # a shape to look at; the scale is arbitrary
    result.record["points"] = export.write_ply(
        folder / "points.ply", solid_m, rgb, result.confidence, result.intrinsics, metric=result.metric
    )
    if "glb" in extra_formats and not export.write_glb(folder / "mesh.glb", solid_m, rgb, result.intrinsics):
        warnings.append("mesh.glb is left out: depth is unknown or torn everywhere, so there is no surface")
    if "tiff" in extra_formats:
        export.write_float_tiff(folder / "depth.tiff", depth)
    if "exr" in extra_formats:
        export.write_exr(folder / "depth.exr", depth, result.aif)
    if "nerfstudio" in extra_formats:
        in_mm = result.metric and depth_unit == "mm"
        height, width = depth.shape
        export.write_nerfstudio(folder / "transforms.json", height, width, result.intrinsics, depth_in_mm=in_mm)
        if not in_mm:
            reason = (
                f"depth.png is in {depth_unit}, see --depth-unit" if result.metric else "relative depth has no unit"
            )
            warnings.append(f"transforms.json names no depth: nerfstudio takes it as millimetres; {reason}")


def load(folder: Path) -> Reconstruction:
    """Read back what `save` wrote; the AIF as linear light from its 8-bit PNG. Raises DataError."""
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        depth, std, confidence = (read_map(folder / f"{name}.npy") for name in ("depth", "depth_std", "confidence"))
        optics = record["optics"]
        metric = bool(record["metric"])
        focus_dpt = np.asarray(optics["focus_dpt"], dtype=np.float64)
        kappa = np.asarray(optics["kappa_px_per_dpt"], dtype=np.float64)
        intrinsics = export.Intrinsics(**record["intrinsics"])
    except FileNotFoundError as error:
        raise DataError(f"{folder} is not a finished reconstruction: {Path(error.filename).name} is missing") from None
    except (ValueError, KeyError, TypeError, DataError) as error:
        raise DataError(f"{folder} is damaged ({error}); reconstruct the stack again") from None
    aif = decode_image(folder / "aif.png")
    if not depth.shape == std.shape == confidence.shape == aif.pixels.shape[:2]:
        raise DataError(
            f"{folder} is damaged: depth, depth_std, confidence and aif.png are not of one size; "
            "reconstruct the stack again"
        )
    if metric:
        inverse = np.divide(1, depth, out=np.full_like(depth, np.nan), where=depth > 0)
        std_dpt = std * inverse**2
    else:
        near, span = focus_dpt.max(), np.ptp(focus_dpt)
        inverse = near - depth * span
        std_dpt = std * span
    return Reconstruction(
        name=folder.name,
        inverse_depth_dpt=inverse.astype(np.float32),
        std_dpt=std_dpt.astype(np.float32),
        confidence=confidence,
        aif=to_linear(aif.pixels, aif.transfer, aif.white_level),
        metric=metric,
        intrinsics=intrinsics,
        focus_dpt=focus_dpt,
        kappa_px_per_dpt=kappa,
        record=record,
    )


def read_map(path: Path) -> NDArray[np.float32]:
    """An (H, W) map of numbers from an .npy file. Raises DataError, FileNotFoundError."""
    try:
        values = np.lib.format.open_memmap(path, mode="r")  # a header that promises too much allocates nothing
    except FileNotFoundError:
        raise
    except (OSError, EOFError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path} cannot be read as a NumPy array ({reason})") from None
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        found = f"{values.dtype} of shape {values.shape}"
        raise DataError(f"{path} must hold one number for every pixel, (H, W), found {found}")
    return np.array(values, dtype=np.float32)


def json_ready(value: Any) -> Any:
    """`value` as JSON can hold it: None for NaN and infinity, plain numbers and lists for NumPy's."""
    if isinstance(value, dict):
        return {key: json_ready(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_ready(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, np.ndarray):
        return json_ready(value.tolist())
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
