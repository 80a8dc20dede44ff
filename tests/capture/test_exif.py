"""What camera files say about their optics, against exiftool's reading of the same files."""

import json
import math
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest

from capture.exif import Exif, exif_block, from_sensor_plane, merge_maker_notes, read_exif, read_files, read_tags
from capture.importer import import_folder
from capture.stack import FocalStack

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "exif"
EXPECTED = SHARED / "expected.json"
needs_samples = pytest.mark.skipif(not EXPECTED.exists(), reason="shared/data/exif is not here")
needs_exiftool = pytest.mark.skipif(shutil.which("exiftool") is None, reason="the exiftool program is not installed")


def expected():
    return json.loads(EXPECTED.read_text())["files"] if EXPECTED.exists() else {}


def tiff(tags, order="<"):
    """A TIFF structure with IFD0 and EXIF directory; `tags` maps numbers to text, int or Fraction."""
    first = {tag: value for tag, value in tags.items() if tag < 0x8000 and tag != 0x829D}
    second = {tag: value for tag, value in tags.items() if tag not in first}
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8)
    size = 2 + 12 * (len(first) + 1) + 4
    body, extra = b"", b""
    data_start = 8 + size + 2 + 12 * len(second) + 4

    def entry(tag, value):
        nonlocal extra
        if isinstance(value, int):
            return struct.pack(order + "HHII", tag, 4, 1, value)
        if isinstance(value, Fraction | tuple):
            top, bottom = value if isinstance(value, tuple) else (value.numerator, value.denominator)
            kind, n, data = 5, 1, struct.pack(order + "II", top, bottom)
        else:
            data = value.encode() + b"\0"
            kind, n = 2, len(data)
        if len(data) <= 4:
            return struct.pack(order + "HHI", tag, kind, n) + data.ljust(4, b"\0")
        place = data_start + len(extra)
        extra += data + b"\0" * (len(data) % 2)
        return struct.pack(order + "HHII", tag, kind, n, place)

    body += struct.pack(order + "H", len(first) + 1) + b"".join(entry(*item) for item in first.items())
    body += struct.pack(order + "HHII", 0x8769, 4, 1, 8 + size) + bytes(4)
    body += struct.pack(order + "H", len(second)) + b"".join(entry(*item) for item in second.items()) + bytes(4)
    return head + body + extra


TAGS = {
    0x010F: "Acme",
    0x0110: "Model 1",
    0x829A: Fraction(1, 125),
    0x829D: Fraction(28, 10),
    0x8827: 400,
    0x920A: Fraction(50),
    0xA405: 75,
    0xA002: 6000,
    0xA003: 4000,
    0x9206: Fraction(17853, 1000),
    0xA434: "50mm f/1.8",
}


def jpeg_with(block):
    return b"\xff\xd8\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block + b"\xff\xda\0\x02\xff\xd9"


@pytest.mark.parametrize("order", ["<", ">"])
def test_standard_tags(order):
    found = read_exif(jpeg_with(tiff(TAGS, order)))
    assert (found.make, found.model, found.lens_model) == ("Acme", "Model 1", "50mm f/1.8")
    assert found.focal_length_m == pytest.approx(0.05)
    assert found.f_number == pytest.approx(2.8)
    assert found.iso == 400
    assert found.exposure_time_s == pytest.approx(1 / 125)
    assert found.focus_distance_m == pytest.approx(17.853)
    assert found.focus_distance_source == "exif"
    # 75 mm equivalent of 50 mm: crop 1.5, so a 3:2 sensor is 24 mm wide
    assert found.sensor_width_m == pytest.approx(0.024, rel=1e-3)
    assert found.sensor_width_source == "35 mm equivalent"


@pytest.mark.parametrize(
    ("value", "distance"),
    [((0xFFFFFFFF, 1), math.inf), ((0, 1), math.nan), ((5, 0), math.nan), (Fraction(1, 2), 0.5)],
)
def test_subject_distance(value, distance):
    found = read_exif(jpeg_with(tiff(TAGS | {0x9206: value}))).focus_distance_m
    assert found == pytest.approx(distance, nan_ok=True)


def test_zero_means_unknown():
    found = read_exif(jpeg_with(tiff({0x829D: Fraction(0, 1), 0x920A: Fraction(0, 1), 0x8827: 0})))
    assert all(math.isnan(x) for x in (found.f_number, found.focal_length_m, found.iso, found.sensor_width_m))


def test_focal_plane_resolution_gives_the_sensor_width():
    found = read_exif(jpeg_with(tiff(TAGS | {0xA20E: Fraction(6000 * 254, 10 * 36)})))  # pixels per inch of 36 mm
    assert found.sensor_width_m == pytest.approx(0.036, rel=1e-3)
    assert found.sensor_width_source == "focal-plane resolution"


@pytest.mark.parametrize(
    "tags",
    [{0xA20E: Fraction(6000 * 254, 10 * 36), 0xA20F: Fraction(6000 * 254, 10 * 36)},
     {0xA20E: Fraction(6000 * 254, 10 * 36)},
     {0xA405: 50}, {0x0110: "NIKON D3100"}],
)  # fmt: skip
def test_the_sensor_is_as_large_in_an_upright_picture(tags):
    lying = read_exif(jpeg_with(tiff(TAGS | tags)))
    upright = read_exif(jpeg_with(tiff(TAGS | tags | {0xA002: 4000, 0xA003: 6000})))
    assert upright.sensor_width_m == pytest.approx(lying.sensor_width_m)
    assert upright.sensor_width_source == lying.sensor_width_source


def test_pixels_of_an_upright_and_a_lying_picture_have_one_pitch(tmp_path):
    facts = TAGS | {0xA20E: Fraction(64 * 254, 10 * 36), 0xA20F: Fraction(64 * 254, 10 * 36)}
    pitches = []
    for name, width, height in (("lying", 64, 48), ("upright", 48, 64)):
        (tmp_path / name).mkdir()
        block = tiff(facts | {0xA002: width, 0xA003: height})
        for i in range(2):
            image = np.random.default_rng(i).integers(0, 255, (height, width, 3), np.uint8)
            jpeg = cv2.imencode(".jpg", image)[1].tobytes()
            segment = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
            (tmp_path / name / f"{i}.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
        with FocalStack.open(import_folder(tmp_path / name, tmp_path / f"{name}.h5")) as stack:
            pitches.append(stack.lens.pixel_pitch_m)
    assert pitches == pytest.approx([0.036 / 64] * 2)


@pytest.mark.parametrize("n_values", [0, 2])
def test_a_resolution_unit_that_is_no_number_is_skipped(n_values):
    entry = struct.pack("<HHI", 0xA210, 3, n_values) + struct.pack("<HH", 2, 2)
    assert read_exif(jpeg_with(b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4))).width_px != 0


@pytest.mark.parametrize("pointer", [-10, -500])
def test_a_negative_pointer_is_skipped(pointer):
    entry = struct.pack("<HHIi", 0x8769, 9, 1, pointer)
    assert read_exif(jpeg_with(b"II*\0" + struct.pack("<IH", 8, 1) + entry + bytes(4))).model == ""


def test_a_directory_at_the_end_of_a_large_tiff_is_read(tmp_path):
    place = 3 << 20
    directory = struct.pack("<HHHII", 1, 0x8769, 4, 1, place + 18) + bytes(4)
    directory += struct.pack("<HHHII", 1, 0x8827, 3, 1, 400) + bytes(4)
    (tmp_path / "a.tif").write_bytes((b"II*\0" + struct.pack("<I", place)).ljust(place, b"\0") + directory)
    assert read_files([tmp_path / "a.tif"])[0].iso == 400


def test_files_without_exif_say_nothing():
    for data in (b"", b"\xff\xd8\xff\xd9", b"\x89PNG\r\n\x1a\n", b"II*\0", b"no image"):
        assert read_exif(data) == Exif()
        assert exif_block(data) is None


def test_a_damaged_block_never_raises():
    good, rng = tiff(TAGS), np.random.default_rng(0)
    for _ in range(3000):
        data = bytearray(good[: rng.integers(1, len(good) + 1)])
        for _ in range(rng.integers(0, 8)):
            data[rng.integers(len(data))] = rng.integers(256)
        read_tags(bytes(data))
        read_exif(jpeg_with(bytes(data)))


def test_distance_from_the_sensor_plane():
    for u in (0.15, 0.5, 3.0):
        f = 0.05
        v = 1 / (1 / f - 1 / u)
        assert from_sensor_plane(u + v, f) == pytest.approx(u)
    assert from_sensor_plane(math.inf, 0.05) == math.inf
    assert from_sensor_plane(0.7, math.nan) == 0.7
    assert from_sensor_plane(0.15, 0.05) == 0.15  # nearer than 4 f no thin lens can focus
    assert math.isnan(from_sensor_plane(math.nan, 0.05))


@pytest.mark.parametrize(
    ("notes", "distance", "source"),
    [
        ({"Make": "Canon", "FocusDistanceUpper": 0.38, "FocusDistanceLower": 0.36}, 0.36986, "exif, bracket"),
        ({"Make": "Canon", "FocusDistanceUpper": 0.36, "FocusDistanceLower": 0.38}, 0.36986, "exif, bracket"),
        ({"Make": "Canon", "FocusDistanceUpper": 0.72, "FocusDistanceLower": 0.48}, math.nan, ""),
        ({"Make": "Canon", "FocusDistanceUpper": 655.35, "FocusDistanceLower": 5.46}, math.nan, ""),
        ({"Make": "Canon", "FocusDistanceUpper": 0, "FocusDistanceLower": 0}, math.nan, ""),
        ({"Make": "NIKON CORPORATION", "FocusDistance": 0.794328234724282}, 0.79433, "exif, quantised"),
        ({"Make": "NIKON CORPORATION", "FocusDistance": 0.81}, 0.81, "exif"),
        ({"Make": "NIKON CORPORATION", "FocusDistance": 0}, math.nan, ""),
        ({"Make": "NIKON CORPORATION", "FocusDistance": "inf"}, math.inf, "exif"),
        ({"Make": "OLYMPUS", "FocusDistance": "0.705 m"}, 0.705, "exif"),
        ({"Make": "SONY", "FocusDistance": 2.0}, math.nan, ""),
        ({"FocusDistance": "soon"}, math.nan, ""),
        ({}, math.nan, ""),
    ],
)
def test_maker_notes(notes, distance, source):
    found = merge_maker_notes(Exif(), notes)
    assert found.focus_distance_m == pytest.approx(distance, nan_ok=True, rel=1e-4)
    assert found.focus_distance_source == source
    if math.isfinite(distance):
        assert 0 < found.focus_distance_std_m < 0.1 * distance


def test_without_exiftool_the_standard_tags_remain(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    path = tmp_path / "a.jpg"
    path.write_bytes(jpeg_with(tiff(TAGS)))
    assert read_files([path])[0] == read_exif(path.read_bytes())


def test_an_exiftool_that_fails_is_no_failure(tmp_path, monkeypatch):
    for script in ("exit 1", "echo nonsense", "echo '[{}]'", "echo '{\"a\": 1}'"):
        program = tmp_path / "exiftool"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
        path = tmp_path / "a.jpg"
        path.write_bytes(jpeg_with(tiff(TAGS)))
        assert read_files([path])[0].f_number == pytest.approx(2.8)


def close(found, value):
    return (math.isnan(found) and not value) or found == pytest.approx(value or math.nan, rel=1e-3)


@needs_samples
@pytest.mark.parametrize("name", [name for name in expected() if name.endswith((".jpg", ".nef", ".cr2"))])
def test_standard_tags_agree_with_exiftool(name):
    tags = expected()[name]["tags"]
    found = read_exif((SHARED / name).read_bytes())
    assert close(found.f_number, tags.get("FNumber"))
    assert close(found.focal_length_m * 1e3, tags.get("FocalLength"))
    assert close(found.exposure_time_s, tags.get("ExposureTime")) or "ExposureTime" in tags
    assert found.model == tags.get("Model", "")


@needs_samples
@needs_exiftool
def test_maker_notes_of_all_samples():
    names = sorted(expected())
    for name, found in zip(names, read_files([SHARED / name for name in names]), strict=True):
        tags = expected()[name]["tags"]
        known = tags.get("FocusDistance") or tags.get("SubjectDistance")
        low, high = tags.get("FocusDistanceLower") or math.nan, tags.get("FocusDistanceUpper") or math.nan
        if high / low < 1.25:
            known = math.sqrt(low * high)
        assert found.focus_distance_m == pytest.approx(known or math.nan, rel=1e-3, nan_ok=True), name
