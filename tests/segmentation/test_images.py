import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from segmentation import images
from segmentation.epoch import DataError

GREY8 = np.arange(35, dtype=np.uint8).reshape(5, 7) * 7


def saved(array, path, mode=None):
    Image.fromarray(array, mode).save(path) if mode else Image.fromarray(array).save(path)
    return path


@pytest.mark.row("A3")
@pytest.mark.parametrize(
    ("array", "name"),
    [
        (GREY8, "a.png"),
        (GREY8, "a.bmp"),
        (GREY8, "a.tif"),
        (GREY8.astype(np.uint16) * 257, "a.png"),
        (GREY8.astype(np.uint16) * 257, "a.tif"),
        (GREY8.astype(np.float32) / 3 - 20, "a.tif"),
        (np.stack([GREY8, GREY8 // 2, GREY8 // 3], axis=-1), "a.png"),
        (np.stack([GREY8, GREY8 // 2, GREY8 // 3, GREY8], axis=-1), "a.png"),
        (np.stack([GREY8, GREY8 // 2], axis=-1), "a.png"),
    ],
)
def test_values_come_back_as_stored(tmp_path, array, name):
    back = images.read_image(saved(array, tmp_path / name))
    assert back.dtype == array.dtype
    assert np.array_equal(back, array)
    assert images.image_size(tmp_path / name) == (5, 7)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        (np.float64, np.float32),
        (np.uint16, np.uint16),
        (np.bool_, np.uint8),
        (np.int64, np.uint16),
        (">u2", np.uint16),
    ],
)
def test_arrays_keep_their_values_in_the_narrowest_type(tmp_path, stored, expected):
    array = (np.arange(2 * 3 * 6).reshape(2, 3, 6) % 2).astype(stored)
    np.save(tmp_path / "a.npy", array)
    back = images.read_image(tmp_path / "a.npy")
    assert back.dtype == expected
    assert np.array_equal(back, array)
    assert images.image_size(tmp_path / "a.npy") == (2, 3)


def deep_png(array):
    """16-bit colours, written by hand: Pillow can neither write nor read them."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", array.shape[1], array.shape[0], 16, 2, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in array)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_colours_of_16_bits_keep_all_of_them(tmp_path):
    array = np.random.default_rng(0).integers(0, 2**16, (5, 7, 3)).astype(np.uint16)
    (tmp_path / "a.png").write_bytes(deep_png(array))
    back = images.read_image(tmp_path / "a.png")
    assert back.dtype == np.uint16
    assert np.array_equal(back, array)


def palette_picture(path):
    picture = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    picture.putpalette([0, 0, 0, 255, 0, 0, 0, 0, 255])
    picture.save(path)
    return path


def test_a_palette_is_colours_in_an_image_and_numbers_in_a_mask(tmp_path):
    path = palette_picture(tmp_path / "a.png")
    assert images.read_image(path)[0, 1].tolist() == [255, 0, 0]
    assert images.read_mask(path).tolist() == [[0, 1], [2, 1]]


@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32, np.float32, np.bool_])
def test_masks_of_any_type_are_whole_numbers(tmp_path, kind):
    array = np.array([[0, 1], [1, 0]]).astype(kind)
    mask = images.read_mask(saved(array, tmp_path / "a.tif"))
    assert mask.dtype.kind in "iu"
    assert np.array_equal(mask, array)


def test_a_grey_mask_stored_as_rgb_is_read_as_grey(tmp_path):
    assert np.array_equal(images.read_mask(saved(np.stack([GREY8] * 3, -1), tmp_path / "a.png")), GREY8)


@pytest.mark.parametrize(
    "array", [np.stack([GREY8, GREY8, GREY8 // 2], -1), GREY8 / np.float32(2), GREY8 * np.float32("nan")]
)
def test_colours_and_fractions_are_no_mask(tmp_path, array):
    path = saved(array, tmp_path / ("a.png" if array.ndim == 3 else "a.tif"))
    with pytest.raises(DataError, match=r"a\.(png|tif): .*(expected one class id a pixel|expected whole class ids)"):
        images.read_mask(path)


def outcome(path, content, expected):
    path.write_bytes(content)
    try:
        same = np.array_equal(images.read_image(path), expected)
    except DataError as error:
        return str(error)
    return "" if same else "other pixels"


@pytest.mark.row("A4")
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.bmp", "a.tif", "a.npy"])
def test_a_file_cut_short_anywhere_is_refused_or_read_right(tmp_path, name):
    path, array = tmp_path / name, np.random.default_rng(0).integers(0, 255, (24, 24)).astype(np.uint8)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path)
    whole, expected = path.read_bytes(), images.read_image(path)
    problems = [outcome(path, whole[:length], expected) for length in range(0, len(whole), 13)]
    assert all(f"{path}: unreadable or truncated" in problem for problem in problems if problem)
    assert sum(bool(problem) for problem in problems) >= len(problems) - 8


def test_a_flipped_bit_in_a_png_is_noticed(tmp_path):
    """Uncompressed, so that no decompressor stumbles over it: only checksums can tell."""
    path = tmp_path / "a.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 24)).astype(np.uint8)).save(path, compress_level=0)
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)
    with pytest.raises(DataError, match="unreadable or truncated"):
        images.read_image(path)


def test_text_in_a_picture_s_name_is_refused(tmp_path):
    (tmp_path / "a.png").write_text("not a picture")
    for read in (images.read_image, images.read_mask, images.image_size):
        with pytest.raises(DataError, match=r"a\.png: unreadable or truncated"):
            read(tmp_path / "a.png")


def test_a_missing_file_is_refused_by_name(tmp_path):
    for name in ("a.png", "a.npy"):
        with pytest.raises(DataError, match=rf"{name}: no such file"):
            images.read_image(tmp_path / name)


def test_a_pickle_in_an_array_s_clothes_is_not_opened(tmp_path):
    np.save(tmp_path / "a.npy", np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="unreadable"):
        images.read_image(tmp_path / "a.npy")


def test_a_picture_too_large_to_decode_is_refused_from_its_head(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(deep_png(np.zeros((1, 1, 3))))
    head = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    data = path.read_bytes()
    path.write_bytes(data[:12] + b"IHDR" + head + struct.pack(">I", zlib.crc32(b"IHDR" + head)) + data[33:])
    with pytest.raises(DataError, match="cut it into parts"):
        images.read_image(path)


@pytest.mark.parametrize(("name", "second"), [("a.png", GREY8 + 1), ("a.tif", GREY8[:3])])
def test_a_stack_of_pictures_is_refused(tmp_path, name, second):
    frames = [Image.fromarray(GREY8), Image.fromarray(second)]
    frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=r"holds several pictures|expected one raster"):
        images.read_image(tmp_path / name)


def test_pages_of_one_size_are_bands_of_an_image_and_no_mask(tmp_path):
    frames = [Image.fromarray(GREY8 + page) for page in range(3)]
    frames[0].save(tmp_path / "a.tif", save_all=True, append_images=frames[1:])
    assert np.array_equal(images.read_image(tmp_path / "a.tif"), np.stack([GREY8, GREY8 + 1, GREY8 + 2], -1))
    with pytest.raises(DataError, match="is no mask"):
        images.read_mask(tmp_path / "a.tif")


def test_values_that_are_not_finite_are_counted_and_refused(tmp_path):
    array = np.ones((3, 3), np.float32)
    array[0, :2] = np.nan, np.inf
    with pytest.raises(DataError, match="2 values are NaN or infinite"):
        images.read_image(saved(array, tmp_path / "a.tif"))


def test_listing_finds_names_with_dots_and_colons_below_folders(tmp_path):
    names = ["TOD_1567419530.1567428401.ar5:f090_converted_10914-11427.png", "deep/b.TIF", ".hidden.png", "notes.txt"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [str(path.relative_to(tmp_path)) for path in images.list_images(tmp_path)] == [names[0], names[1]]


@pytest.mark.row("A4")
def test_a_missing_or_empty_folder_names_the_path_expected(tmp_path):
    with pytest.raises(DataError, match=f"{tmp_path}/images: no such folder"):
        images.list_images(tmp_path / "images")
    with pytest.raises(DataError, match=f"{tmp_path}: holds no picture"):
        images.list_images(tmp_path)


def test_channels_go_first():
    assert images.channels_first(GREY8).shape == (1, 5, 7)
    turned = images.channels_first(np.stack([GREY8, GREY8 + 1], -1))
    assert turned.flags.c_contiguous
    assert np.array_equal(turned[1], GREY8 + 1)
