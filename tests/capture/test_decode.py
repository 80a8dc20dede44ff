"""Camera bytes to linear pixels: exact curves, RGB order, no rotation, and damaged files refused."""

import struct
import sys
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from capture.decode import decode_image, linear_to_transfer, to_linear, to_srgb8, to_srgb16, transfer_to_linear
from capture.errors import DataError

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data" / "exif"


def needs(name):
    path = SHARED / name
    return pytest.param(path, marks=pytest.mark.skipif(not path.exists(), reason=f"{name} of shared/data is not here"))


def encode(pixels, suffix=".png", **options):
    bgr = pixels[..., ::-1] if pixels.ndim == 3 and pixels.shape[2] == 3 else pixels
    return cv2.imencode(suffix, np.ascontiguousarray(bgr), [x for pair in options.items() for x in pair])[1].tobytes()


@pytest.fixture
def picture():
    """(48, 64, 3) u8: smooth, with red left and blue right, so that swapped channels show."""
    y, x = np.mgrid[0:48, 0:64]
    return np.stack([255 - 4 * x, 5 * y, 4 * x], axis=-1).clip(0, 255).astype(np.uint8)


# --- curves


@pytest.mark.parametrize("transfer", ["linear", "srgb", "rec709"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_every_code_becomes_its_exact_linear_value(transfer, dtype):
    top = np.iinfo(dtype).max
    codes = np.arange(top + 1, dtype=dtype).reshape(-1, 1)
    linear = to_linear(codes, transfer)
    assert linear.shape == (top + 1, 1, 3)
    assert linear.dtype == np.float32
    expected = transfer_to_linear(codes[:, 0] / top, transfer)
    np.testing.assert_allclose(linear[:, 0, 1], expected, rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(linear[:, 0, 0], linear[:, 0, 2])


def test_known_values_of_the_curves():
    # IEC 61966-2-1 and ITU-R BT.709-6: mid grey, and both sides of each curve's corner
    np.testing.assert_allclose(transfer_to_linear(np.array([0.5, 0.04, 1.0]), "srgb"), [0.21404114, 0.04 / 12.92, 1.0])
    np.testing.assert_allclose(
        transfer_to_linear(np.array([0.5, 0.04, 1.0]), "rec709"), [0.259589, 0.04 / 4.5, 1.0], rtol=1e-4
    )


@pytest.mark.parametrize("transfer", ["linear", "srgb", "rec709"])
def test_encoding_inverts_decoding(transfer):
    values = np.linspace(0, 1, 1001)
    back = linear_to_transfer(transfer_to_linear(values, transfer), transfer)
    np.testing.assert_allclose(back, values, atol=3e-4 if transfer == "rec709" else 1e-6)


@pytest.mark.parametrize("encode_srgb", [to_srgb8, to_srgb16])
def test_srgb_survives_the_round_trip(encode_srgb):
    dtype = np.uint8 if encode_srgb is to_srgb8 else np.uint16
    codes = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(-1, 1, 1).repeat(3, axis=2)
    back = encode_srgb(to_linear(codes, "srgb"))
    assert back.dtype == dtype
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("encode_srgb", [to_srgb8, to_srgb16])
def test_srgb_clips_and_takes_nan_as_black(encode_srgb):
    top = np.iinfo(encode_srgb(np.zeros(1)).dtype).max
    np.testing.assert_array_equal(
        encode_srgb(np.array([-1.0, 0.0, 1.0, 7.0, np.inf, np.nan])), [0, 0, top, top, top, 0]
    )


def test_values_above_the_white_level_are_white():
    linear = to_linear(np.array([[0, 1000, 4000, 60000]], np.uint16), "linear", 4000.0)
    np.testing.assert_allclose(linear[0, :, 0], [0, 0.25, 1, 1])


# --- files


@pytest.mark.parametrize("suffix", [".png", ".tiff"])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_lossless_files_come_back_exactly_in_rgb_order(picture, suffix, dtype):
    pixels = picture.astype(dtype) * (257 if dtype is np.uint16 else 1)
    found = decode_image(encode(pixels, suffix), name=f"a{suffix}")
    np.testing.assert_array_equal(found.pixels, pixels)
    assert found.pixels.dtype == dtype
    assert found.transfer == "srgb"
    assert found.white_level == np.iinfo(dtype).max
    assert bool(found.notes) == (dtype is np.uint16)


@pytest.mark.parametrize("progressive", [0, 1])
def test_jpeg(picture, tmp_path, progressive):
    path = tmp_path / "a.JPG"
    path.write_bytes(encode(picture, ".jpg", **{}) if not progressive else jpeg(picture, progressive=1))
    found = decode_image(path)
    assert found.pixels.dtype == np.uint8
    assert np.abs(found.pixels.astype(int) - picture).mean() < 6


def jpeg(pixels, quality=95, progressive=0):
    options = [cv2.IMWRITE_JPEG_QUALITY, quality, cv2.IMWRITE_JPEG_PROGRESSIVE, progressive]
    return cv2.imencode(".jpg", np.ascontiguousarray(pixels[..., ::-1]), options)[1].tobytes()


def with_exif(data, block):
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 8) + b"Exif\0\0" + block
    return data[:2] + segment + data[2:]


def orientation_block(orientation):
    return b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_the_exif_orientation_turns_nothing(picture, orientation):
    plain = decode_image(jpeg(picture))
    turned = decode_image(with_exif(jpeg(picture), orientation_block(orientation)))
    np.testing.assert_array_equal(turned.pixels, plain.pixels)
    assert turned.exif == orientation_block(orientation)
    assert plain.exif is None


def test_grey_and_alpha(picture):
    grey = decode_image(encode(picture[..., 0]))
    np.testing.assert_array_equal(grey.pixels, picture[..., :1])
    with_alpha = np.dstack([picture[..., ::-1], np.full(picture.shape[:2], 9, np.uint8)])
    found = decode_image(encode(with_alpha))
    np.testing.assert_array_equal(found.pixels, picture)
    assert found.notes == ("its alpha channel was dropped",)


@pytest.mark.parametrize("progressive", [0, 1])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_jpeg_is_refused(share, progressive):
    rng = np.random.default_rng(0)
    data = jpeg(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8), progressive=progressive)
    cut = data[: int(len(data) * share)]
    for content in (cut, cut + bytes(len(data) - len(cut))):  # as an interrupted copy leaves it: short, or zeros
        with pytest.raises(DataError, match=r"x\.jpg is truncated, .*copy it from the camera again"):
            decode_image(content, name="x.jpg")


def test_a_jpeg_may_be_followed_by_other_data(picture):
    plain = decode_image(jpeg(picture))
    with_video = decode_image(jpeg(picture) + b"\0\0\0\x18ftypmp42" + bytes(1000))
    np.testing.assert_array_equal(with_video.pixels, plain.pixels)


def test_a_thumbnails_end_marker_is_not_the_pictures(picture):
    thumbnail = orientation_block(1) + jpeg(picture[:16, :16])
    data = with_exif(jpeg(picture), thumbnail)
    decode_image(data)
    with pytest.raises(DataError, match="truncated"):
        decode_image(data[: len(thumbnail) + 400])


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_truncated_png_and_tiff_are_refused(share):
    pixels = np.random.default_rng(0).integers(0, 65536, (90, 120, 3), dtype=np.uint16)
    for suffix in (".png", ".tiff"):
        data = encode(pixels, suffix)
        with pytest.raises(DataError, match="truncated"):
            decode_image(data[: int(len(data) * share)], name=f"a{suffix}")


def test_a_damaged_png_is_refused(picture):
    data = bytearray(encode(picture))
    data[len(data) // 2] ^= 0x10
    with pytest.raises(DataError, match=r"checksum of its b'IDAT' chunk is wrong"):
        decode_image(bytes(data), name="a.png")


def chunk(kind, content):
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def test_bombs_are_refused_by_their_header():
    png = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
        + chunk(b"IEND", b"")
    )
    jpeg_header = b"\xff\xd8\xff\xc0" + struct.pack(">HBHHB", 17, 8, 65_000, 65_000, 3) + bytes(9) + b"\xff\xda\0\x02"
    tiff = b"II*\0\x08\0\0\0\x02\0" + struct.pack("<HHII", 256, 4, 1, 90_000) + struct.pack("<HHII", 257, 4, 1, 90_000)
    for data in (png, jpeg_header, tiff + bytes(4)):
        with pytest.raises(DataError, match=r"header claims \d+ x \d+ px"):
            decode_image(data, name="bomb")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"GIF89a" + bytes(50), "expected JPEG, PNG, TIFF or camera RAW"),
        (b"\xff\xd8\xff\xd9", "truncated"),
        (b"II*\0\x08\0\0\0\0\0\0\0\0\0", "its size is missing"),
        (b"\x89PNG\r\n\x1a\n" + chunk(b"IEND", b""), "cannot be decoded"),
    ],
)
def test_what_is_no_image_is_named(data, words):
    with pytest.raises(DataError, match=words) as caught:
        decode_image(data, name="shelf/x.jpg")
    assert "shelf/x.jpg" in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"a\.png cannot be read: No such file"):
        decode_image(tmp_path / "a.png")


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(
    ("layout", "says"),
    [
        ({"photometric": "rgb", "planarconfig": "separate"}, "PlanarConfiguration 2"),
        ({"photometric": "miniswhite"}, "PhotometricInterpretation 0"),
        ({"photometric": "rgb"}, None),
        ({"photometric": "minisblack"}, None),
    ],
)
def test_unusual_tiff_is_read_right_or_refused(tmp_path, picture, bits, layout, says):
    tifffile = pytest.importorskip("tifffile")
    expected = picture.astype(np.uint16) * 257 if bits == 16 else picture
    if layout["photometric"] != "rgb":
        expected = expected[..., :1]
    stored = np.moveaxis(expected, 2, 0) if "planarconfig" in layout else expected.squeeze()
    stored = np.iinfo(stored.dtype).max - stored if layout["photometric"] == "miniswhite" else stored
    tifffile.imwrite(tmp_path / "a.tif", stored, **layout)
    if bits == 16 and says:
        with pytest.raises(DataError, match=rf"a\.tif: expected 16-bit .*{says}.*; export it"):
            decode_image(tmp_path / "a.tif")
    else:
        np.testing.assert_array_equal(decode_image(tmp_path / "a.tif").pixels, expected)


def test_floating_tiff_is_refused(tmp_path):
    tifffile = pytest.importorskip("tifffile")
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((4, 5, 3), np.float32), photometric="rgb")
    with pytest.raises(DataError, match="expected 8 or 16 bits per channel, found float32"):
        decode_image(tmp_path / "a.tif")


def check_mutations(count, seed, picture):
    rng = np.random.default_rng(seed)
    kinds = [jpeg(picture), jpeg(picture, progressive=1), encode(picture), encode(picture, ".tiff")]
    messages = []
    for i in range(count):
        data = bytearray(kinds[i % len(kinds)])
        for _ in range(rng.integers(1, 12)):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            found = decode_image(bytes(data), name="m.img")
        except DataError as error:
            messages.append(str(error))
        else:
            assert found.pixels.ndim == 3
    assert all("m.img" in message and "\n" not in message for message in messages)
    return len(messages)


def test_mutated_images_are_decoded_or_refused(picture, capfd):
    assert check_mutations(400, 0, picture) > 100


@pytest.mark.slow
def test_many_mutated_images_are_decoded_or_refused(picture, capfd):
    check_mutations(20_000, 1, picture)


# --- RAW


def write_dng(path, mosaic, white_balance=(1.0, 1.0, 1.0), black=256, white=4095):
    """A CFA TIFF with the twenty tags that make it a DNG (notes/capture.md 6); `mosaic` (H, W) u16, RGGB."""
    tifffile = pytest.importorskip("tifffile")
    s_rational, rational = 10, 5
    matrix = [10000, 10000, 0, 10000, 0, 10000, 0, 10000, 10000, 10000, 0, 10000, 0, 10000, 0, 10000, 10000, 10000]
    neutral = [x for gain in white_balance for x in (round(10000 / gain), 10000)]
    extra = [
        (50706, 1, 4, (1, 4, 0, 0), True),  # DNGVersion
        (50708, 2, 0, "daif test", True),
        (33421, 3, 2, (2, 2), True),
        (33422, 1, 4, (0, 1, 1, 2), True),  # RGGB
        (50714, 3, 1, black, True),
        (50717, 3, 1, white, True),
        (50721, s_rational, 9, matrix, True),
        (50728, rational, 3, neutral, True),
        (50778, 3, 1, 21, True),
    ]
    tifffile.imwrite(path, mosaic, photometric=32803, extratags=extra, metadata=None)


def mosaic_of(value, peak):
    """A patch of linear `value` beside a highlight of `peak`, both as shares of white."""
    sensor = np.full((160, 240), 256 + value * (4095 - 256))
    sensor[:, 160:] = 256 + peak * (4095 - 256)
    return np.round(sensor).astype(np.uint16)


@pytest.mark.parametrize("peak", [0.5, 0.74, 0.76, 0.9, 1.0])
def test_raw_keeps_its_scale_whatever_the_peak(tmp_path, peak):
    """LibRaw's default would give 0.3290 at a peak of 0.76 and 0.2779 at 0.90 for this patch of 0.25."""
    write_dng(tmp_path / "a.dng", mosaic_of(0.25, peak))
    found = decode_image(tmp_path / "a.dng")
    assert found.transfer == "linear"
    assert found.pixels.shape == (80, 120, 3)
    assert found.pixels.dtype == np.uint16
    patch = to_linear(found.pixels, found.transfer, found.white_level)[10:70, 10:70].mean(axis=(0, 1))
    np.testing.assert_allclose(patch, patch[1], rtol=2e-3)
    np.testing.assert_allclose(patch, 0.25, rtol=4e-3)


def test_raw_is_linear(tmp_path):
    levels = np.linspace(0.05, 0.6, 8)
    measured = []
    for level in levels:
        write_dng(tmp_path / "a.dng", mosaic_of(level, 0.7))
        measured.append(decode_image(tmp_path / "a.dng").pixels[10:70, 10:70].mean() / 65535)
    np.testing.assert_allclose(np.asarray(measured) / measured[0], levels / levels[0], rtol=3e-3)


def test_raw_frames_are_developed_with_the_first_ones_white_balance(tmp_path):
    write_dng(tmp_path / "a.dng", mosaic_of(0.2, 0.4), white_balance=(2.0, 1.0, 1.5))
    write_dng(tmp_path / "b.dng", mosaic_of(0.2, 0.4), white_balance=(1.2, 1.0, 2.5))
    first = decode_image(tmp_path / "a.dng")
    own = decode_image(tmp_path / "b.dng")
    fixed = decode_image(tmp_path / "b.dng", white_balance=first.white_balance)
    assert np.abs(own.pixels.astype(int) - first.pixels).max() > 1000
    np.testing.assert_array_equal(fixed.pixels, first.pixels)


def test_raw_at_full_size(tmp_path):
    write_dng(tmp_path / "a.dng", mosaic_of(0.2, 0.4))
    assert decode_image(tmp_path / "a.dng", half_size=False).pixels.shape == (160, 240, 3)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.8])
def test_a_truncated_raw_is_refused(tmp_path, share):
    path = tmp_path / "a.dng"
    mosaic = np.random.default_rng(0).integers(300, 4000, (160, 240), dtype=np.uint16)
    write_dng(path, mosaic)
    data = path.read_bytes()
    with pytest.raises(DataError, match=r"a\.dng (cannot be developed|has no picture|is truncated|is empty)"):
        decode_image(data[: int(len(data) * share)], name="a.dng")


@pytest.mark.parametrize(
    "path",
    [
        needs("exiftool_CanonRaw.cr2"),
        needs("exiftool_CanonRaw.cr3"),
        needs("exiftool_Nikon.nef"),
        needs("exiftool_DNG.dng"),
        needs("exiftool_Panasonic.rw2"),
    ],
)
def test_raw_headers_without_pixels_are_one_sentence(path, capfd):
    with pytest.raises(DataError) as caught:
        decode_image(path)
    assert path.name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", [needs("tinydng_colorchart.dng")])
def test_a_camera_dng_is_developed(path):
    found = decode_image(path)
    assert found.pixels.shape == (578, 867, 3)
    assert found.pixels.std() > 1000
    data = path.read_bytes()
    with pytest.raises(DataError):
        decode_image(data[: len(data) // 2], name=path.name)


def test_importing_decode_does_not_import_opencv():
    import subprocess

    script = "import sys, capture.decode; sys.exit('cv2' in sys.modules or 'rawpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[2], check=False).returncode == 0
