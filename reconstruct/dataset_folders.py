"""Data sets that come as folders of images: DefocusNet (FoD500), ZEDD, Mobile Depth. See `datasets.py`."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capture.decode import decode_image
from capture.errors import DataError, UsageError
from capture.importer import natural_key
from capture.lens import Lens
from capture.stack import distance_problem
from reconstruct.sample import FloatMap, Sample

ZEDD_SIZES = {"val": (480, 640), "test": (1216, 1824)}  # rows, columns that FOSSA's loader makes
CALIBRATED_AS = {
    "metals": "metal",
    "largemotion": "GTLarge",
    "smallmotion": "GTSmall",
    "zeromotion": "GT",
}  # Mobile Depth
INCHES_PER_M = 39.37


class DefocusNet:
    """The 500 released Blender scenes of "Focus on Defocus", 256 x 256: 400 to train, 100 to test.

    Five `NNNNNN*All.tif` in order of focus and one `NNNNNN*Dpt.exr` a scene, whose channel R is depth in metres.
    Camera of its README: 2.9 mm, f/1, 3.1 mm sensor, focused at 0.1, 0.15, 0.3, 0.7, 1.5 m.
    `truth` is depth in metres, 0 where there is none. (The paper's own DefocusNet table is on another rendering that
    was never released.)
    """

    splits = ("test", "train", "all")
    focus_m = (0.1, 0.15, 0.3, 0.7, 1.5)
    lens = Lens(focal_length_m=2.9e-3, f_number=1.0, pixel_pitch_m=3.1e-3 / 256)

    def __init__(self, source: Path, split: str) -> None:
        found: dict[str, dict[str, list[Path]]] = {}
        for path in sorted(_folder(source).iterdir()):
            kind = path.name[-7:]
            if kind in ("All.tif", "Dpt.exr"):
                found.setdefault(path.name[:6], {"All.tif": [], "Dpt.exr": []})[kind].append(path)
        if not found:
            raise DataError(f"{source} holds no *All.tif and *Dpt.exr; give the unpacked folder fs_6 of DefocusNet")
        self.scenes = {}
        for number, files in found.items():
            counts = len(files["All.tif"]), len(files["Dpt.exr"])
            if not number.isdecimal() or counts != (5, 1):
                raise DataError(
                    f"{source}: scene {number} must have a number, 5 *All.tif and 1 *Dpt.exr, found {counts[0]} and "
                    f"{counts[1]}; unpack the data set again"
                )
            if split in ("all", "train" if int(number) < 400 else "test"):
                self.scenes[f"defocusnet_{number}"] = (files["All.tif"], files["Dpt.exr"][0])

    def sample(self, name: str) -> Sample:
        frames = np.stack([_rgb8(path) for path in self.scenes[name][0]])
        depth_m = self.truth(name)
        if depth_m.shape != frames.shape[1:3]:
            raise DataError(
                f"{self.scenes[name][1]} is {depth_m.shape} and its frames {frames.shape[1:3]}; unpack again"
            )
        known = np.where(depth_m > 0, depth_m, np.float32(np.nan))
        return Sample(frames, np.array(self.focus_m), "srgb", self.lens, known)

    def truth(self, name: str) -> FloatMap:
        return np.nan_to_num(_exr_channel(self.scenes[name][1], "R"), nan=0.0, posinf=0.0)


class Zedd:
    """ZEDD (Zero-Shot Depth from Defocus, arXiv 2603.26658): 100 real scenes, 9 focus distances, 6 apertures.

        metadata.txt                       lines "run_1 <tab> 6D3E <tab> 0.82": run, motor position, metres; # comments
        val/val_0001/focus_stack/          img_run_1_motor_6D3E_aperture_F1.4.jpg ... run_9 ... F16.0.jpg
        val/val_0001/gt/                   depth.npy (metres), K.txt
        test/test_0001/                    the same without depth.npy

    As FOSSA's loader for its table: runs 1, 3, 5, 7, 9 at F2.8; `val` scaled to 480 rows (Lanczos; depth by nearest
    neighbour) and cut to the middle 640 columns, `test` to 1824 x 1216. We found the lens's focal length published
    nowhere: no lens is stored, and the blur gain is estimated from the frames.

    `truth` is depth in metres, NaN unless finite and within 0.01 to 1000 m.
    """

    splits = ("val", "test")
    runs = (1, 3, 5, 7, 9)
    f_number = 2.8

    def __init__(self, source: Path, split: str) -> None:
        self.size = ZEDD_SIZES[split]
        self.metadata = _zedd_metadata(_folder(source) / "metadata.txt")
        if not (source / split).is_dir():
            raise DataError(f"{source} has no folder {split}/; give the unpacked ZEDD folder, which holds metadata.txt")
        self.scenes = {f"zedd_{path.name}": path for path in sorted((source / split).iterdir()) if path.is_dir()}
        self.split = split

    def sample(self, name: str) -> Sample:
        frames, distances = [], []
        for run in self.runs:
            motor, distance_m = self.metadata[f"run_{run}"]
            file = f"img_run_{run}_motor_{motor}_aperture_F{self.f_number:.1f}.jpg"
            frames.append(self._fitted(_rgb8(self.scenes[name] / "focus_stack" / file), lanczos=True))
            distances.append(distance_m)
        truth = self.truth(name) if self.split == "val" else None
        return Sample(np.stack(frames), np.array(distances), "srgb", None, truth)

    def truth(self, name: str) -> FloatMap:
        path = self.scenes[name] / "gt" / "depth.npy"
        if self.split == "test":
            raise DataError("the truth of ZEDD's test split is on its server only; take --split val")
        try:
            depth_m = np.load(path, allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}); unpack the data set again") from None
        if depth_m.ndim != 2 or depth_m.dtype.kind != "f":
            raise DataError(
                f"{path} must be (H, W) floats in metres, found {depth_m.shape} {depth_m.dtype}; unpack again"
            )
        depth_m = self._fitted(depth_m.astype(np.float32), lanczos=False)
        return np.where((depth_m >= 0.01) & (depth_m <= 1000), depth_m, np.float32(np.nan))

    def _fitted(self, image: NDArray[Any], *, lanczos: bool) -> NDArray[Any]:
        """`image` scaled to the rows of this split and cut to its middle columns."""
        from PIL import Image

        height, width = self.size
        if image.shape[0] != height:
            scaled = (int(image.shape[1] * (height / image.shape[0])), height)
            how = Image.Resampling.LANCZOS if lanczos else Image.Resampling.NEAREST
            image = np.asarray(Image.fromarray(image).resize(scaled, how))
        left = max(image.shape[1] - width, 0) // 2
        return np.ascontiguousarray(image[:, left : left + width])


def _zedd_metadata(path: Path) -> dict[str, tuple[str, float]]:
    """Motor position and focus distance in metres of every run."""
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
        found = {run: (motor, float(distance)) for run, motor, distance in rows}
    except OSError:
        raise DataError(
            f"{path} is missing; give the unpacked ZEDD folder, which holds it beside val/ and test/"
        ) from None
    except ValueError:
        raise DataError(
            f"{path}: every line must be run, motor position and metres, with tabs; unpack it again"
        ) from None
    missing = [f"run_{run}" for run in Zedd.runs if f"run_{run}" not in found]
    if missing or not all(re.fullmatch(r"[0-9A-Fa-f]+", motor) for motor, _ in found.values()):
        raise DataError(f"{path}: expected {', '.join(missing) or 'hexadecimal motor positions'}; unpack it again")
    return found


class MobileDepth:
    """Mobile Depth (Suwajanakorn et al. 2015): 11 phone stacks of 14 to 33 frames, aligned by the authors, no truth.

    Any folder below `source` with `a<n>.jpg`. Focus distances from `focus_dpth.txt` in it (DFV's reorganised form) or
    the first column, without its last row, of `<scene>/calibrated.txt` anywhere below `source` (the download). They
    are read as inches (/ 39.37), as DEReD does, and known to be relative at best; those of `metals` run backwards,
    and a list that does not rise or fall throughout is dropped: that stack is then uncalibrated.
    """

    splits = ("all",)

    def __init__(self, source: Path, split: str) -> None:
        frames: dict[Path, list[Path]] = {}
        for path in _folder(source).rglob("a*.jpg"):
            if re.fullmatch(r"a\d+\.jpg", path.name):
                frames.setdefault(path.parent, []).append(path)
        if not frames:
            raise DataError(f"{source} holds no folder with a1.jpg, a2.jpg ...; give the unpacked Mobile Depth folder")
        tables = {path.parent.name: path for path in source.rglob("calibrated.txt")}
        self.scenes = {}
        for folder in sorted(frames):
            table = folder / "focus_dpth.txt"
            if not table.is_file():
                wanted = CALIBRATED_AS.get(folder.name, folder.name)
                if wanted not in tables:
                    raise DataError(
                        f"{folder} has no focus_dpth.txt and {source} no {wanted}/calibrated.txt; unpack both"
                    )
                table = tables[wanted]
            self.scenes[f"mobile_{folder.name}"] = (sorted(frames[folder], key=lambda p: natural_key(p.name)), table)

    def sample(self, name: str) -> Sample:
        files, table = self.scenes[name]
        try:
            column = np.loadtxt(table, usecols=0, ndmin=1)
        except (OSError, ValueError) as error:
            raise DataError(f"{table}: the first column must be numbers ({error}); unpack it again") from None
        distances = column[: -1 if table.name == "calibrated.txt" else None] / INCHES_PER_M
        if len(distances) != len(files):
            raise DataError(f"{table} has {len(distances)} distances for {len(files)} frames a*.jpg; unpack both again")
        if name == "mobile_metals":
            distances = distances[::-1]
        problem = distance_problem(distances, [path.name for path in files])
        if problem:
            print(f"daif: {name} becomes uncalibrated: {problem}", file=sys.stderr)
            distances = np.full(len(files), np.nan)
        return Sample(np.stack([_rgb8(path) for path in files]), distances, "srgb")

    def truth(self, name: str) -> FloatMap:
        raise DataError("Mobile Depth has no true depth")


# --- files


def _folder(path: Path) -> Path:
    if not path.is_dir():
        raise UsageError(f"{path} is not a folder; give the folder that the data set was unpacked to")
    return path


def _rgb8(path: Path) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 of an image file, as stored."""
    pixels = decode_image(path).pixels
    if pixels.dtype != np.uint8 or pixels.shape[2] != 3:
        raise DataError(
            f"{path} must be 8-bit RGB, found {pixels.shape[2]} x {pixels.dtype}; unpack the data set again"
        )
    return pixels


def _exr_channel(path: Path, channel: str) -> FloatMap:
    """One channel (H, W) of an OpenEXR file; OpenCV's wheels are built without EXR, hence the `exr` extra."""
    try:
        import OpenEXR
    except ImportError:
        raise UsageError(f"reading {path} needs one more package: pip install 'daif[exr]'") from None
    try:
        with OpenEXR.File(str(path), separate_channels=True) as file:
            channels = file.channels()
            if channel not in channels:
                raise DataError(f"{path} must have a channel {channel}, found {', '.join(channels)}; unpack it again")
            return np.array(channels[channel].pixels, np.float32)
    except RuntimeError as error:
        raise DataError(f"{path} is not a whole OpenEXR file ({error}); unpack the data set again") from None
