"""The field's data sets, scene by scene, as focal stacks and as the truth their published tables are scored on.

Layouts as the authors' own loaders read them (facts only; none of their code):

    nyuv2         nyu_depth_v2_labeled.mat (MATLAB 7.3, so HDF5 with reversed axes) and splits.mat beside it
    defocusnet    fs_6/ of "Focus on Defocus", called FoD500 by others (dvl-tum/defocus-net, fuy34/DFV)
    ddff12        ddff-dataset-trainval.h5 or DFV's my_ddff_trainVal.h5 (soyers/ddff-pytorch, fuy34/DFV)
    zedd          ZEDD/ with metadata.txt, val/ and test/ (princeton-vl/FOSSA, dataset/zedd.py)
    mobile-depth  Suwajanakorn et al. 2015, as downloaded or as DFV reorganises it; no truth exists

One scene is in memory at a time, however large the file.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cv2
import h5py
import numpy as np
from numpy.typing import NDArray

from capture.decode import to_linear
from capture.errors import DaifError, DataError, SomeFailedError, UsageError
from capture.lens import Lens
from capture.optics import NOTES_FOCUS_M, NOTES_LENS, Condition, simulate_sweep
from capture.scenes import Scene
from reconstruct import remote
from reconstruct.dataset_folders import DefocusNet, MobileDepth, Zedd
from reconstruct.sample import DataSet, FloatMap, Sample

RENDERERS = ("aperture", "published")

_LARGEST_SCENE = 1 << 28  # values; a bigger claim is a damaged or hostile header


def open_dataset(kind: str, source: Path, split: str | None = None, renderer: str = "aperture") -> DataSet:
    """The data set `kind` (a name in `KINDS`) at `source`; UsageError or DataError in one sentence if it is not."""
    if kind not in KINDS:
        raise UsageError(f"unknown data set {kind!r}; it must be one of {', '.join(KINDS)}")
    reader = KINDS[kind]  # its first split is the one that tables use
    split = split or reader.splits[0]
    if split not in reader.splits:
        raise UsageError(f"--split is {split!r}; {kind} has {', '.join(reader.splits)}")
    if renderer not in RENDERERS:
        raise UsageError(f"--renderer is {renderer!r}; it must be one of {', '.join(RENDERERS)}")
    if renderer != "aperture" and kind != "nyuv2":
        raise UsageError(f"--renderer is for nyuv2, whose frames are rendered; leave it out for {kind}")
    if not source.exists():
        raise UsageError(f"{source} does not exist; give the {kind} data set as it was downloaded and unpacked")
    return Nyuv2(source, split, renderer) if kind == "nyuv2" else reader(source, split)


def import_dataset(
    kind: str,
    source: Path,
    out: Path,
    *,
    split: str | None = None,
    frames: Sequence[int] | None = None,
    renderer: str = "aperture",
    limit: int | None = None,
    overwrite: bool = False,
) -> None:
    """Write every scene of a split as `out/<scene>.h5` and print its path; finished ones are skipped.

    Args:
        frames: only these frames of each stack, e.g. (0, 2, 4, 6, 9) of DDFF-12's ten, which DFV and FOSSA use.
        limit: only the first so many scenes.

    Raises:
        SomeFailedError: some scenes could not be read; each was named and the others were written.
    """
    from rich.console import Console
    from rich.progress import track

    data = open_dataset(kind, source, split, renderer)
    names = list(data.scenes)[:limit]
    if not names:
        raise DataError(f"{source} holds no scene of the {kind} split asked for; check that all of it was unpacked")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; -o must name a folder for the stacks")
    remote.prepare_output(str(out))
    failed = 0
    console = Console(stderr=True)
    for name in track(names, description=kind, console=console, disable=not console.is_terminal):
        path = out / f"{name}.h5"
        if path.exists() and not overwrite:
            print(f"{path}: already there, skipped")
            continue
        try:
            sample = data.sample(name)
            print((sample.only(frames) if frames else sample).write(path, source=kind))
        except DataError as error:
            print(f"daif: {error}", file=sys.stderr)
            failed += 1
    if failed:
        raise SomeFailedError(f"{failed} of {len(names)} scenes failed, each named above")


class Nyuv2:
    """NYU Depth v2, labelled part, 1449 RGB-D scenes; the stacks are rendered, as in the paper, at 320 x 240.

    Camera of the paper's generator (`notes/method.md` section 5): 50 mm, f/8, 12 um, focused at 1, 1.5, 2.5, 4, 6 m.
    `renderer` "aperture" is our simulated camera (`capture/optics.py`: disc bokeh, occlusion, linear light, 8 bit
    sRGB). "published" is the generator's own arithmetic: bilinear resizing, the 7 x 7 Gaussian of
    `render.published_blur` on the encoded values, cut to 8 bit; for such stacks the stored values are what was
    blurred, so they are declared linear. Depth is cut to 0.1 to 10 m in both, as there.

    `truth` is the filled depth at its full 640 x 480, in metres.
    """

    splits = ("test", "train", "all")

    def __init__(self, source: Path, split: str, renderer: str = "aperture") -> None:
        self.source, self.renderer = source, renderer
        with _hdf5(source) as file:
            count, _, *size = _field(file, "images", ("N", 3, "W", "H"), kinds="u").shape
            depths = _field(file, "depths", ("N", "W", "H")).shape
        if depths != (count, *size):
            raise DataError(
                f"{source}: depths must be {(count, *size)} to match images, found {depths}; download it again"
            )
        ids = range(1, count + 1) if split == "all" else _nyu_split(source.with_name("splits.mat"), split, count)
        self.scenes = {f"nyuv2_{i:04d}": i - 1 for i in ids}

    def sample(self, name: str) -> Sample:
        with _hdf5(self.source) as file:
            rgb = np.ascontiguousarray(_read(file, "images", self.scenes[name]).transpose(2, 1, 0))
        depth_m = np.clip(self.truth(name), 0.1, 10.0)
        distances = np.array(NOTES_FOCUS_M)
        if self.renderer == "aperture":
            scene = Scene(to_linear(rgb, "srgb"), depth_m, name).resized(240, 320)
            sweep = simulate_sweep(scene, NOTES_LENS, 1 / distances, Condition(bits=8))
            return Sample(sweep.frames, distances, "srgb", NOTES_LENS, scene.depth_m, scene.aif)
        aif = cv2.resize(rgb, (320, 240)).astype(np.float32) / 255
        depth_m = cv2.resize(depth_m, (320, 240))
        return Sample(_published_stack(aif, depth_m), distances, "linear", NOTES_LENS, depth_m, aif)

    def truth(self, name: str) -> FloatMap:
        with _hdf5(self.source) as file:
            return np.ascontiguousarray(_read(file, "depths", self.scenes[name]).T, np.float32)


def _nyu_split(path: Path, split: str, count: int) -> list[int]:
    """Numbers from 1 of the scenes of the official split (795 train, 654 test)."""
    from scipy.io import loadmat

    if not path.is_file():
        raise DataError(
            f"{path} is missing: it names the official 795 training and 654 test scenes; put the splits.mat of the "
            "NYU Depth v2 site beside the .mat, or take --split all"
        )
    try:
        ids = np.sort(loadmat(path)[f"{split}Ndxs"].astype(np.intp).ravel())
    except KeyError:
        raise DataError(f"{path} has no field {split}Ndxs; download splits.mat again") from None
    except Exception as error:  # scipy raises a dozen types on damaged files
        raise DataError(f"{path} is not MATLAB's splits.mat ({error}); download it again") from None
    if len(ids) == 0 or ids[0] < 1 or ids[-1] > count:
        raise DataError(f"{path}: {split}Ndxs must hold scene numbers from 1 to {count}; it belongs to another file")
    return [int(i) for i in ids]


def _published_stack(aif: FloatMap, depth_m: FloatMap) -> NDArray[np.uint8]:
    """(S, H, W, 3) frames as the paper's generator makes them of encoded `aif` (H, W, 3)."""
    import torch

    from reconstruct.render import published_blur

    focus_dpt = 1 / np.array(NOTES_FOCUS_M)[:, None, None]
    radius_px = np.abs(np.asarray(NOTES_LENS.kappa_px_per_dpt(focus_dpt)) * (focus_dpt - 1 / depth_m)) / 2
    image = torch.from_numpy(aif.transpose(2, 0, 1)[None].copy())
    blurred = published_blur(image, torch.from_numpy(radius_px[None].astype(np.float32)))[0].numpy()
    return (blurred.transpose(0, 2, 3, 1) * 255).astype(np.uint8)  # cut, not rounded, as there


class Ddff12:
    """DDFF 12-Scene: light fields of a plenoptic camera, refocused to ten frames of 552 x 383.

    `stack_<split>` (N, 10, H, W, 3), values 0 to 255 in uint8 or float, and `disp_<split>` (N, H, W) or
    (N, 1, H, W), disparity in pixels with 0 = unknown. One pixel of disparity is `PX_M` / depth. The frames were
    refocused evenly in disparity from 0.5 to 7 m (ddff-toolbox, refocus.py), 0.2825 to 0.0202 px, which later
    loaders round to 0.28 and 0.02.

    A frame is the mean of 9 x 9 views (light fields of 383 x 552 x 9 x 9: macrohuang1993/Focal-Stack-Camera-Compare),
    each shifted by the disparity of focus: a square synthetic aperture. The lens is the disc with the same second
    moment, in front of a focal length of 521.4 px. Views were averaged as they are encoded, so the stored values are
    declared linear.

    `truth` is disparity in pixels.
    """

    splits = ("val", "train", "test")
    FOCAL_PX = 521.4052
    BASELINE_M = 1982.0250823695178 / 7317.020641763665 * 1e-3  # between neighbouring views
    PX_M = BASELINE_M * FOCAL_PX  # 0.1412: disparity = PX_M / depth
    lens = Lens(
        focal_length_m=1e-3,  # short, so that the gain is the same in every frame; only the products below count
        f_number=1e-3 / (BASELINE_M * (16 * (9**2 - 1) / 12) ** 0.5),
        pixel_pitch_m=1e-3 / FOCAL_PX,
    )

    def __init__(self, source: Path, split: str) -> None:
        self.source, self.split = source, split
        with _hdf5(source) as file:
            count, _, *size = _field(file, f"stack_{split}", ("N", "S", "H", "W", 3)).shape[:4]
            if split != "test":
                known = _field(file, f"disp_{split}", ("N", "H", "W"), ("N", 1, "H", "W")).shape
                if (known[0], *known[-2:]) != (count, *size):
                    raise DataError(
                        f"{source}: disp_{split} must be {(count, *size)} to match its stacks, found {known}; "
                        "download it again"
                    )
        self.scenes = {f"ddff12_{split}_{i:04d}": i for i in range(count)}

    def sample(self, name: str) -> Sample:
        with _hdf5(self.source) as file:
            values = _read(file, f"stack_{self.split}", self.scenes[name])
        if values.min() < 0 or values.max() > 255 or (values.dtype.kind == "f" and values.max() <= 1):
            raise DataError(
                f"{self.source}: stack_{self.split} scene {self.scenes[name]} must hold values from 0 to 255, found "
                f"{values.min():g} to {values.max():g}; write it as the authors' script does"
            )
        distances = self.PX_M / np.linspace(self.PX_M / 0.5, self.PX_M / 7, len(values))
        known = None
        if self.split != "test":
            disparity = self.truth(name)
            known = np.divide(self.PX_M, disparity, out=np.full_like(disparity, np.nan), where=disparity > 0)
        return Sample(np.rint(values).astype(np.uint8), distances, "linear", self.lens, known)

    def truth(self, name: str) -> FloatMap:
        if self.split == "test":
            raise DataError(f"{self.source}: the truth of DDFF-12's test split is not public; take --split val")
        with _hdf5(self.source) as file:
            disparity = _read(file, f"disp_{self.split}", self.scenes[name])
        return np.nan_to_num(disparity.reshape(disparity.shape[-2:]).astype(np.float32), posinf=0.0)


KINDS: dict[str, Any] = {
    "nyuv2": Nyuv2,
    "defocusnet": DefocusNet,
    "ddff12": Ddff12,
    "zedd": Zedd,
    "mobile-depth": MobileDepth,
}


# --- files


@contextlib.contextmanager
def _hdf5(path: Path) -> Iterator[h5py.File]:
    """`path` opened for reading; damage met inside becomes a DataError."""
    if not path.is_file():
        raise UsageError(f"{path} is not a file; give the data set's .h5 or .mat file itself")
    try:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    except DaifError:
        raise
    except (OSError, RuntimeError) as error:
        raise DataError(f"{path} is not a whole HDF5 (or MATLAB 7.3) file ({error}); download it again") from None


def _field(file: h5py.File, name: str, *layouts: tuple[str | int, ...], kinds: str = "uif") -> h5py.Dataset:
    """Data set `name`, which must have one of the `layouts`: a number is an axis of that length, a letter any.

    `kinds` are NumPy's letters of the types it may have.
    """
    data = file.get(name)
    if not isinstance(data, h5py.Dataset):
        raise DataError(
            f"{file.filename}: no data set {name}, found {', '.join(file) or 'nothing'}; is it the right file?"
        )
    wanted = " or ".join(f"({', '.join(map(str, layout))})" for layout in layouts)
    fits = any(
        len(layout) == data.ndim
        and all(isinstance(axis, str) or axis == n for axis, n in zip(layout, data.shape, strict=True))
        for layout in layouts
    )
    if not fits or data.dtype.kind not in kinds or 0 in data.shape or np.prod(data.shape[1:]) > _LARGEST_SCENE:
        raise DataError(
            f"{file.filename}: {name} must be numbers of shape {wanted}, found {data.shape} {data.dtype}; "
            "is it the right file?"
        )
    return data


def _read(file: h5py.File, name: str, index: int) -> NDArray[Any]:
    return np.asarray(file[name][index])
