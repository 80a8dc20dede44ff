"""Small files in the layouts of the published data sets, written from the descriptions in `reconstruct/datasets.py`."""

import cv2
import h5py
import numpy as np
from scipy.io import savemat

PX_M = 1982.0250823695178 / 7317.020641763665 * 1e-3 * 521.4052  # DDFF-12: disparity in px = PX_M / depth


def write_nyuv2(folder, *, scenes=3, height=480, width=640, test=(2, 3), train=(1,)):
    """The labelled .mat (HDF5 behind MATLAB's 512 bytes, axes reversed) and splits.mat; returns depths (N, H, W)."""
    rng = np.random.default_rng(0)
    rows, cols = np.mgrid[:height, :width]
    depth = np.stack([1 + 0.5 * i + 3 * cols / width + rows / height for i in range(scenes)]).astype(np.float32)
    depth[:, :10, :10] = 12.0  # beyond the 10 m where the protocol cuts
    coarse = rng.integers(30, 220, (scenes, height // 8, width // 8, 3), dtype=np.uint8)
    images = np.stack([cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC) for image in coarse])
    path = folder / "nyu_depth_v2_labeled.mat"
    with h5py.File(path, "w", userblock_size=512) as file:
        file["images"] = images.transpose(0, 3, 2, 1)
        file["depths"] = depth.transpose(0, 2, 1)
    savemat(folder / "splits.mat", {"testNdxs": np.array(test)[:, None], "trainNdxs": np.array(train)[:, None]})
    return path, images, depth


def write_defocusnet(folder, *, numbers=(399, 400, 401), size=32):
    """fs_6: NNNNNN_FFAll.tif and NNNNNNDpt.exr (half floats)."""
    import OpenEXR

    folder.mkdir()
    rng = np.random.default_rng(1)
    depths = {}
    for number in numbers:
        depth = np.full((size, size), 0.5, np.float16)
        depth[:, size // 2 :] = 1.25
        depth[0, 0] = 0  # no truth
        depths[number] = depth.astype(np.float32)
        header = {"compression": OpenEXR.ZIP_COMPRESSION, "type": OpenEXR.scanlineimage}
        other = np.zeros_like(depth)
        with OpenEXR.File(header, {"R": depth, "G": other, "B": other}) as file:
            file.write(str(folder / f"{number:06d}Dpt.exr"))
        for frame in range(5):
            image = np.full((size, size, 3), 40 * frame, np.uint8)
            image[..., 0] = rng.integers(0, 255, (size, size))  # blue, as OpenCV orders
            cv2.imwrite(str(folder / f"{number:06d}_{frame:02d}All.tif"), image)
    return depths


def write_ddff12(path, *, scenes=2, height=24, width=32, kind=np.uint8, extra_axis=False):
    """trainval h5: stacks 0 to 255, disparity in px with 0 = unknown; returns the val disparities (N, H, W)."""
    rng = np.random.default_rng(2)
    disparity = rng.uniform(0.03, 0.25, (scenes, height, width)).astype(np.float32)
    disparity[:, :3, :4] = 0
    stored = disparity[:, None] if extra_axis else disparity
    with h5py.File(path, "w") as file:
        for split in ("train", "val"):
            file[f"stack_{split}"] = rng.integers(0, 256, (scenes, 10, height, width, 3)).astype(kind)
            file[f"disp_{split}"] = stored
        file["stack_test"] = np.zeros((1, 10, height, width, 3), np.uint8)
    return disparity


ZEDD_MOTORS = ("6D3E", "4EA8", "3B39", "2D09", "2371", "1DB4", "183F", "1657", "1113")
ZEDD_DISTANCES_M = (0.82, 0.97, 1.2, 1.5, 1.9, 2.6, 3.8, 5.4, 8.1)


def write_zedd(folder, *, scenes=2, height=152, width=228):
    """ZEDD/ with metadata.txt, val/ and test/; the red of each picture is its column. Returns the val depths."""
    folder.mkdir()
    rows = zip(range(1, 10), ZEDD_MOTORS, ZEDD_DISTANCES_M, strict=True)
    lines = ["# run_id\thex_code\tfocus_distance", *(f"run_{run}\t{motor}\t{m}" for run, motor, m in rows)]
    (folder / "metadata.txt").write_text("\n".join(lines) + "\n")
    depths = {}
    for split in ("val", "test"):
        for scene in range(1, scenes + 1):
            place = folder / split / f"{split}_{scene:04d}"
            (place / "focus_stack").mkdir(parents=True)
            (place / "gt").mkdir()
            for run, motor in enumerate(ZEDD_MOTORS, 1):
                image = np.full((height, width, 3), 20 * run, np.uint8)
                image[..., 2] = np.arange(width)
                for f_number in (1.4, 2.8, 16.0):
                    name = f"img_run_{run}_motor_{motor}_aperture_F{f_number:.1f}.jpg"
                    cv2.imwrite(str(place / "focus_stack" / name), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
            np.savetxt(place / "gt" / "K.txt", np.diag([200.0, 200.0, 1.0]))
            if split == "val":
                depth = np.add.outer(np.linspace(1, 2, height), np.linspace(0, 3, width)).astype(np.float32)
                depth[0, width // 2], depth[1, width // 2] = np.inf, 0.0
                np.save(place / "gt" / "depth.npy", depth)
                depths[f"zedd_val_{scene:04d}"] = depth
    return depths


def write_mobile_depth(folder, *, reorganised):
    """Mobile Depth as DFV reorganises it, or as downloaded: three scenes of 11 frames, one with useless distances."""
    inches = np.linspace(8, 60, 11)
    scenes = {"balls": inches, "metals": inches[::-1], "window": np.array([*inches[:5], *inches[4::-1], 99.0])}
    for name, distances in scenes.items():
        place = folder / name if reorganised else folder / "Aligned" / "Figure6" / name
        place.mkdir(parents=True)
        for frame in range(11):
            cv2.imwrite(str(place / f"a{frame}.jpg"), np.full((16, 24, 3), 10 * frame, np.uint8))
        cv2.imwrite(str(place / "1.jpg"), np.zeros((16, 24, 3), np.uint8))  # the unaligned ones lie beside
        if reorganised:
            np.savetxt(place / "focus_dpth.txt", distances, fmt="%5.6f")
        else:
            table = folder / "Photos_Calibration_Results" / "calibration" / {"metals": "metal"}.get(name, name)
            table.mkdir(parents=True)
            rows = [f"{d:.4f} 1.5" for d in distances] + ["3.9 0"]  # the last row is the focal length
            (table / "calibrated.txt").write_text("\n".join(rows) + "\n")
    return inches / 39.37
