"""Masks of steel defects as text: Supervisely's bitmaps and Kaggle's run lengths, both ways, and what is refused."""

import base64
import io
import json
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image
from torchvision.io import ImageReadMode, decode_image

from segmentation import limits
from segmentation.epoch import DataError
from workloads._severstal import annotations
from workloads._severstal.annotations import decode_runs, encode_bitmap, encode_runs, read_annotation

RING = [[1, 1, 1], [1, 0, 1], [1, 1, 1]]
SDK_VECTOR = (
    "eJzrDPBz5+WS4mJgYOD19HAJAtLMIMwIInOeqf8BUmwBPiGuQPr///9Lb86/C2QxlgT5BTM4PLuRBuTwebo4hlTMSa44sKHhISMDuxpTYrr03F6g"
    "DIOnq5/LOqeEJgDM5ht6"
)
"""The ring, from the documentation of Supervisely's SDK."""


def _png(pixels, palette=None, **options) -> bytes:
    picture, stream = Image.fromarray(np.asarray(pixels)), io.BytesIO()
    if palette:
        picture.putpalette(palette)
    picture.save(stream, "PNG", **options)
    return stream.getvalue()


def _packed(png: bytes) -> str:
    return base64.b64encode(zlib.compress(png)).decode()


def _object(data=SDK_VECTOR, origin=(1, 2), title="defect_1", **others):
    bitmap = {"data": data, "origin": list(origin)}
    return {"id": 7, "classTitle": title, "geometryType": "bitmap", "bitmap": bitmap, **others}


def _file(folder: Path, *objects, size=(8, 6)) -> Path:
    """Write an annotation of an image of this width and height."""
    path = folder / "a.jpg.json"
    path.write_text(json.dumps({"size": {"width": size[0], "height": size[1]}, "objects": objects}))
    return path


def _read(folder: Path, *objects):
    return read_annotation(_file(folder, *objects), (6, 8))


def _at(top, left, pixels=RING, shape=(6, 8)):
    mask = np.zeros(shape, np.uint8)
    pixels = np.asarray(pixels)
    mask[top : top + pixels.shape[0], left : left + pixels.shape[1]] = pixels
    return mask


# Supervisely's bitmaps


@pytest.mark.row("S21")
def test_the_vector_of_the_sdk_is_a_ring_and_its_origin_is_x_y(tmp_path):
    mask = _read(tmp_path, _object())
    assert mask.dtype == np.uint8
    assert mask.shape == (4, 6, 8)
    assert np.array_equal(mask[0], _at(2, 1))
    assert not mask[1:].any()


BINARY = np.array(RING, np.uint8)
GREY = np.where(BINARY, 0, 90).astype(np.uint8)
SDK_PALETTE = [0, 0, 0, 255, 255, 255]
KINDS = {
    "RGBA, dark where marked": _png(np.stack([GREY, GREY, GREY, BINARY * 200], axis=-1)),
    "LA, dark where marked": _png(np.stack([GREY, BINARY * 200], axis=-1)),
    "L": _png(BINARY * 3),
    "L, a value transparent": _png(GREY, transparency=90),
    "16 bits": _png(BINARY.astype(np.uint16) * 256),
    "1 bit": _png(BINARY > 0),
    "1 bit, one of them transparent": _png(BINARY == 0, transparency=1),
    "RGB, a colour transparent": _png(np.stack([GREY, GREY, GREY], axis=-1), transparency=(90, 90, 90)),
    "P": _png(BINARY, SDK_PALETTE),
    "P, white where not marked": _png(BINARY, SDK_PALETTE[::-1]),
    "P, an entry transparent": _png(BINARY, SDK_PALETTE, transparency=0),
    "P, the second entry transparent": _png(1 - BINARY, SDK_PALETTE, transparency=1),
    "P, a table of alphas": _png(BINARY, SDK_PALETTE, transparency=b"\x00\x80"),
}


@pytest.mark.row("S21")
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_png_is_the_same_ring(tmp_path, kind):
    assert np.array_equal(_read(tmp_path, _object(_packed(KINDS[kind])))[0], _at(2, 1))


@pytest.mark.row("S21")
def test_objects_of_a_class_are_joined_and_those_of_another_kept_apart(tmp_path):
    mask = _read(tmp_path, _object(origin=(0, 0)), _object(origin=(1, 1)), _object(origin=(1, 1), title="defect_3"))
    assert np.array_equal(mask[0], _at(0, 0) | _at(1, 1))
    assert np.array_equal(mask[2], _at(1, 1))


@pytest.mark.row("S21")
@pytest.mark.parametrize(
    ("origin", "top", "left", "rows", "columns"),
    [
        ((6, 4), 4, 6, slice(0, 2), slice(0, 2)),
        ((-1, -2), 0, 0, slice(2, 3), slice(1, 3)),
        ((7, -1), 0, 7, slice(1, 3), slice(0, 1)),
    ],
)
def test_an_object_that_overflows_the_image_is_clipped(tmp_path, origin, top, left, rows, columns):
    mask = _read(tmp_path, _object(origin=origin))
    assert np.array_equal(mask[0], _at(top, left, np.array(RING)[rows, columns]))


@pytest.mark.row("S21")
def test_an_object_larger_than_the_image_is_clipped_on_all_sides(tmp_path):
    data = _packed(_png(np.ones((20, 30), np.uint8)))
    assert _read(tmp_path, _object(data, origin=(-5, -5))).sum() == 6 * 8


def test_a_file_without_objects_is_a_clean_plate(tmp_path):
    assert not _read(tmp_path).any()


@pytest.mark.row("S23")
def test_other_titles_give_other_channels(tmp_path):
    path = _file(tmp_path, _object(title="rust"))
    assert read_annotation(path, (6, 8), ("scale", "rust")).any(axis=(1, 2)).tolist() == [False, True]
    assert annotations.classes_in(path, ("scale", "rust")) == {1}


@pytest.mark.row("S21")
@pytest.mark.filterwarnings("ignore:The image decoding and encoding capabilities of TorchVision")
def test_encoded_bitmaps_are_read_by_other_tools_and_are_cut_to_what_is_marked():
    # libpng, as in OpenCV which Supervisely's SDK calls: the palette becomes colours and alpha.
    bitmap = encode_bitmap(_at(2, 1))
    png = zlib.decompress(base64.b64decode(bitmap["data"]))
    decoded = decode_image(torch.frombuffer(bytearray(png), dtype=torch.uint8), ImageReadMode.RGB_ALPHA)
    assert bitmap["origin"] == [1, 2]
    assert (decoded[3] // 255).tolist() == RING
    assert (decoded[0] // 255).tolist() == RING
    assert b"PLTE\x00\x00\x00\xff\xff\xff" in png
    assert b"tRNS\x00" in png


masks = arrays.arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 12)), elements=st.integers(0, 1))


@pytest.mark.row("S21")
@settings(max_examples=60, deadline=None)
@given(masks)
def test_both_codings_give_back_what_was_written(tmp_path_factory, mask):
    stacked = np.stack([mask, 1 - mask, 0 * mask, mask])
    path = tmp_path_factory.mktemp("coded") / "a.json"
    path.write_text(json.dumps(annotations.annotation(stacked)))
    assert np.array_equal(read_annotation(path, mask.shape), stacked)
    assert np.array_equal(decode_runs(encode_runs(mask), mask.shape, "row"), mask)


def _chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def _large_png(side: int) -> bytes:
    """Return a PNG of some bytes that says it is a square of this side."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + _chunk(b"IDAT", zlib.compress(bytes(1000))) + _chunk(b"IEND", b"")


def _without(item, key):
    return {name: value for name, value in item.items() if name != key}


HERE = r"a\.jpg\.json: objects\[1\] \(id 7\): "
AGAIN = "export it again, or remove the object"
REFUSED = {
    "no object": ("text", r"objects\[1\] is 'text'; expected an object: " + AGAIN),
    "no title": (_without(_object(), "classTitle"), HERE + "has no classTitle; " + AGAIN),
    "no geometry": (_without(_object(), "geometryType"), HERE + "has no geometryType"),
    "no bitmap": (_without(_object(), "bitmap"), HERE + "has no bitmap"),
    "no data": (_object(bitmap={"origin": [1, 2]}), HERE + "has no data"),
    "no origin": (_object(bitmap={"data": SDK_VECTOR}), HERE + "has no origin"),
    "a title nobody declared": (
        _object(title="rust"),
        HERE + r"classTitle is 'rust'; expected one of defect_1, .*defect_4: declare it, or rename it",
    ),
    "a polygon": (
        _object(geometryType="polygon"),
        HERE + "geometryType is 'polygon'; expected 'bitmap': convert it, or remove the object",
    ),
    "data of another type": (_object(data=5), HERE + "data is 5; expected text"),
    "three numbers": (_object(origin=(1, 2, 3)), HERE + r"origin is \[1, 2, 3\]; expected \[x, y\], whole numbers"),
    "fractions": (_object(origin=(1.5, 2)), HERE + r"origin is \[1\.5, 2\]; expected"),
    "truth values": (_object(origin=(True, 2)), HERE + r"origin is \[True, 2\]; expected"),
    "no base64": (_object(data="eJz!"), HERE + "data is no base64 .*; " + AGAIN),
    "base64 cut short": (_object(data=SDK_VECTOR[:-1]), HERE + "data is no base64 .*padding"),
    "no zlib": (_object(data="AAAA"), HERE + "data cannot be inflated .*; " + AGAIN),
    "zlib cut short": (
        _object(data=base64.b64encode(base64.b64decode(SDK_VECTOR)[:60]).decode()),
        HERE + "data ends too early, after 60 bytes; " + AGAIN,
    ),
    "no PNG": (_object(data=_packed(b"GIF89a")), HERE + "data holds no PNG that can be read .*; " + AGAIN),
    "a PNG cut short": (_object(data=_packed(_png(np.ones((40, 40), np.uint8))[:60])), HERE + "data holds no PNG"),
    "a PNG of a wrong checksum": (
        _object(data=_packed(KINDS["L"].replace(b"IDAT", b"IDAS"))),
        HERE + "data holds no PNG that can be read",
    ),
    "colours": (
        _object(data=_packed(_png(np.ones((3, 3, 3), np.uint8)))),
        HERE + "data is a PNG of mode RGB, colours without transparency; expected alpha, a palette, grey or 1 bit",
    ),
    "nothing marked": (
        _object(data=_packed(_png(np.zeros((3, 3), np.uint8)))),
        HERE + r"marks no pixel of the image, which is 8x6; origin is \[1, 2\]: " + AGAIN,
    ),
    "outside": (_object(origin=(2, 8)), HERE + r"marks no pixel of the image, which is 8x6; origin is \[2, 8\]"),
}


@pytest.mark.row("S21")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_corrupt_object_is_an_error_that_names_file_and_object(tmp_path, kind):
    item, message = REFUSED[kind]
    with pytest.raises(DataError, match=message):
        _read(tmp_path, _object(), item)


@pytest.mark.row("S21")
@pytest.mark.parametrize("bomb", [zlib.compress(bytes(3 * limits.MIB)), zlib.compress(_large_png(2000))])
def test_an_object_that_swells_is_refused(tmp_path, monkeypatch, bomb):
    monkeypatch.setenv(limits.VARIABLE, "1")
    with pytest.raises(DataError, match=HERE + r"data would take \d+ MiB or more to read; .* SEGMENTATION_MAX_MIB"):
        _read(tmp_path, _object(), _object(data=base64.b64encode(bomb).decode()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"a\.jpg\.json: cannot be read as JSON .*; export it again"),
        ("[" * 100_000, r"a\.jpg\.json: cannot be read as JSON"),
        ("[1]", r"a\.jpg\.json: got \[1\]; expected an object with size and objects"),
        ('{"objects": []}', r"a\.jpg\.json: has no size; export it again"),
        ('{"size": {"width": 8}, "objects": []}', r"a\.jpg\.json: size: has no height"),
        ('{"size": {"width": 8, "height": "6"}, "objects": []}', "size: height is '6'; expected a whole number"),
        ('{"size": {"width": 8, "height": 6}}', r"a\.jpg\.json: has no objects; export it again"),
        ('{"size": {"width": 8, "height": 6}, "objects": {}}', r"a\.jpg\.json: objects is \{\}; expected a list"),
        (
            '{"size": {"width": 6, "height": 8}, "objects": []}',
            r"a\.jpg\.json: size is 6x8, its image is 8x6; they must be the same: take the image that was marked",
        ),
    ],
)
def test_a_file_that_is_no_annotation_of_its_image_is_refused(tmp_path, text, message):
    path = tmp_path / "a.jpg.json"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_annotation(path, (6, 8))


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match=r"gone\.json: no such file"):
        read_annotation(tmp_path / "gone.json", (6, 8))


# Kaggle's run lengths


def test_runs_are_counted_from_one_down_the_columns():
    # Column 0 holds pixels 1 to 3, column 1 pixels 4 to 6.
    assert decode_runs("1 1 3 2 8 1", (3, 4), "row").tolist() == [[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert encode_runs(np.array([[1, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]])) == "1 1 3 2 8 1"


def test_runs_may_stand_in_any_order_and_touch():
    assert decode_runs("4 2 1 3", (3, 2), "row").tolist() == [[1, 1], [1, 1], [1, 0]]


def test_the_last_pixel_is_inside_and_no_runs_mark_nothing():
    assert decode_runs("12 1", (3, 4), "row")[2, 3] == 1
    assert not decode_runs("", (3, 4), "row").any()
    assert encode_runs(np.zeros((3, 4))) == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 2 5", "got 3 numbers, an odd count, the last 5; expected a length for each start: the row may be cut"),
        ("1 2 2 3", "runs '1 2' and '2 3' overlap; expected each pixel once: join them into one run"),
        ("5 1 1 9", "runs '1 9' and '5 1' overlap"),
        ("3 1 3 1", "runs '3 1' and '3 1' overlap"),
        ("0 2", "got run '0 2'; pixels and lengths are counted from 1: add 1 if yours begin at 0"),
        ("5 0", "got run '5 0'; pixels and lengths are counted from 1"),
        ("-3 2", "got run '-3 2'; pixels and lengths"),
        ("3 -2", "got run '3 -2'; pixels and lengths"),
        ("11 3", "run '11 3' ends at pixel 13; the image is 4x3, 12 pixels: take the image that the runs were"),
        ("13 1", "run '13 1' ends at pixel 13; the image is 4x3"),
        ("1 999999999999999", "run '1 999999999999999' ends at pixel 999999999999999; the image"),
        ("1 2 x 4", "got 'x'; expected whole numbers: start length start length"),
        ("1.0 2", r"got '1\.0'; expected whole numbers"),
        ("1 " + "9" * 5000, r"got '9+\.\.\.; expected whole numbers"),
        ("nan", "got 'nan'; expected whole numbers"),
    ],
)
def test_runs_that_cannot_be_are_refused_with_file_row_and_remedy(text, message):
    with pytest.raises(DataError, match=r"^train\.csv: line 5: " + message):
        decode_runs(text, (3, 4), "train.csv: line 5")
