"""Pictures, volumes and arrays that swell, lie, or are none: an error that names the file, and little memory."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from segmentation import images, limits, nifti
from segmentation.epoch import DataError
from segmentation.images import image_size, read_image, read_mask, read_rgb
from segmentation.rasters import read_raster
from tests.security.conftest import Within
from workloads._acdc import reader as acdc
from workloads._esd import reader as esd
from workloads._esd import subtiles
from workloads._esd.satellites import GT
from workloads._pairs import dataset as pairs
from workloads._severstal import annotations, predictions
from workloads._spark import reader as spark
from workloads._spark import submission
from workloads._telescope import observation
from workloads._telescope import reader as telescope

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8)
COLOURS = np.stack([GREY, GREY[::-1], GREY.T], axis=-1)
Read = Callable[[Path], Any]


def png(width: int, height: int, bits: int = 8, colour: int = 0, data: bytes = b"") -> bytes:
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))
    palette = chunk(b"PLTE", bytes(range(12))) if colour == 3 else b""
    return b"\x89PNG\r\n\x1a\n" + head + palette + chunk(b"IDAT", data or swollen(10_000)) + chunk(b"IEND", b"")


def tiff(
    width: int,
    height: int,
    pages: int = 1,
    circle: bool = False,
    *,
    bands: int = 1,
    bits: int = 8,
    packing: int = 8,
    kind: int = 1,
    data: bytes = b"",
    others: dict[int, int] | None = None,
) -> bytes:
    """Return a TIFF, deflated, whose pages all have these sides; in a circle, the first follows the last.

    packing, kind: TIFF's numbers for another compression and another type of values. others: further fields.
    """
    data = data or swollen(400_000)
    place = {273: 8, 278: height, 279: len(data)}
    values = {
        256: width,
        257: height,
        258: bits,
        259: packing,
        262: 1,
        277: bands,
        339: kind,
        **place,
        **(others or {}),
    }
    fields = sorted(values.items())
    first, length = 8 + len(data), 2 + 12 * len(fields) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields)
    heads = []
    for page in range(pages):
        after = first + (page + 1) * length if page + 1 < pages else first * circle
        heads.append(struct.pack("<H", len(fields)) + entries + struct.pack("<I", after))
    return struct.pack("<2sHI", b"II", 42, first) + data + b"".join(heads)


def with_counts(content: bytes, counts: dict[int, int]) -> bytes:
    """Return a TIFF of one page of whose fields some tell that they have so many values, elsewhere in the file."""
    changed = bytearray(content)
    (first,) = struct.unpack_from("<I", content, 4)
    for place in range(first + 2, first + 2 + 12 * struct.unpack_from("<H", content, first)[0], 12):
        (tag,) = struct.unpack_from("<H", content, place)
        if tag in counts:
            struct.pack_into("<II", changed, place + 4, counts[tag], 8)
    return bytes(changed)


def zstd(size: int) -> bytes:
    """Return zeros, packed by ZSTD."""
    from imagecodecs import zstd_encode

    return bytes(zstd_encode(bytes(size)))


def swollen(size: int) -> bytes:
    """Return zeros, deflated."""
    packer, zeros = zlib.compressobj(1), bytes(100_000)
    return b"".join(packer.compress(zeros) for _ in range(-(-size // len(zeros)))) + packer.flush()


def picture(array: Any, kind: str = "PNG", **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind, **options)
    return stream.getvalue()


def several(kind: str) -> bytes:
    return picture(GREY, kind, save_all=True, append_images=[Image.fromarray(GREY + 1)])


def jpeg(side: int) -> bytes:
    content = picture(GREY, "JPEG")
    place = content.index(b"\xff\xc0") + 5
    return content[:place] + struct.pack(">HH", side, side) + content[place + 4 :]


def bmp(side: int) -> bytes:
    content = picture(GREY, "BMP")
    return content[:18] + struct.pack("<ii", side, side) + content[26:]


def npy(array: Any) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def npy_head(shape: tuple[int, ...], kind: str = "|u1") -> bytes:
    stream = io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": kind, "fortran_order": False, "shape": shape})
    return stream.getvalue()


def npz(how: int = zipfile.ZIP_DEFLATED, **entries: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", how, compresslevel=1) as archive:
        for name, content in entries.items():
            archive.writestr(f"{name}.npy", content)
    return stream.getvalue()


def volume(
    shape: tuple[int, ...] = (8, 8, 8),
    kind: int = 2,
    bits: int = 8,
    first: float = 352,
    magic: bytes = b"n+1\0",
    notes: bytes = b"\0\0\0\0",
    values: bytes = bytes(512),
    slope: float = 0,
) -> bytes:
    """Return a NIfTI file whose head says this."""
    head = bytearray(348)
    struct.pack_into("<i", head, 0, 348)
    struct.pack_into("<8h", head, 40, len(shape), *shape, *[1] * (7 - len(shape)))
    struct.pack_into("<hh", head, 70, kind, bits)
    struct.pack_into("<8f", head, 76, *[1] * 8)
    struct.pack_into("<ff", head, 108, first, slope)
    head[344:348] = magic
    return bytes(head) + notes + values


def noted(size: int) -> bytes:
    """Return a NIfTI file with a note before its values that says that it has so many bytes."""
    return volume(first=4096, notes=b"\1\0\0\0" + struct.pack("<ii", size, 6))


def zeros_after(start: bytes, size: int) -> bytes:
    """Return a gzip file of some bytes and then zeros, of which a member of it holds 32 MiB."""
    member = gzip.compress(bytes(2**25), 1)
    return gzip.compress(start) + member * (size // 2**25)


def classes(path: Path) -> Any:
    return pairs.to_classes(read_mask(path), pairs.Data(classes=3), path)


def pair_with(path: Path) -> Any:
    return pairs._read_pair(
        pairs.Data(), saved(path.with_name("image.png"), picture(np.zeros((64, 64), np.uint8))), path
    )


def pair_in_archive(path: Path) -> Any:
    return pairs._read_pair(pairs.Data(npz_keys=("img", "msk"), classes=2), path, path)


def acdc_image(path: Path) -> Any:
    return acdc.read_image(path)


def of_telescope(path: Path) -> Any:
    return observation.read(path, 32)


def annotated(png_data: bytes) -> bytes:
    """Return a Supervisely file of one object, whose picture is in deflated bytes."""
    bitmap = {"data": base64.b64encode(png_data).decode(), "origin": [0, 0]}
    thing = {"geometryType": "bitmap", "classTitle": "defect_1", "bitmap": bitmap}
    return json.dumps({"size": {"height": 8, "width": 8}, "objects": [thing]}).encode()


def swollen_bytes(pieces: int) -> bytes:
    """Return deflated zeros, 32 MiB for each piece."""
    deflate = zlib.compressobj(1)
    return b"".join([*(deflate.compress(bytes(2**25)) for _ in range(pieces)), deflate.flush()])


def steel_annotation(path: Path) -> Any:
    return annotations.read_annotation(path, (8, 8))


def steel_prediction(path: Path) -> Any:
    given = predictions.Predictions(source=path.parent, task="binary", pictures={"a": path}, rows={})
    return given.read("a.jpg", (8, 8))


def cells_of_tile(path: Path) -> Any:
    return esd.read_labels(esd.Tile("a", path.parent, (), path))


def arrays_of_subtile(path: Path) -> Any:
    return subtiles.load_arrays(below(path, subtiles.SUBTILES), path.stem, [GT])


def note_of_subtile(path: Path) -> Any:
    return subtiles.load_metadata(below(path, subtiles.METADATA), path.stem)


def below(path: Path, folder: str) -> Path:
    """Move a file into a folder beside it; return what both lie in."""
    (path.parent / folder).mkdir()
    path.rename(path.parent / folder / path.name)
    return path.parent


def note(**changed: Any) -> bytes:
    """Return what is noted of the subtile a_0_0, with some of it changed."""
    return json.dumps({"parent_tile_id": "a", "x_gt": 0, "y_gt": 0, "subtile_size": 4, **changed}).encode()


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


FLOATS = GREY.astype(np.float32)
NAN = np.where(GREY == 3, np.nan, FLOATS).astype(np.float32)
NANS = b"\xff" * 8 * 8 * 6 * 4
CASES: dict[str, tuple[str, Read, Callable[[], bytes]]] = {
    "PNG bomb": ("a.png", read_image, lambda: png(16_000, 16_000, data=swollen(256_016_000))),
    "PNG bomb, mask": ("a.png", classes, lambda: png(16_000, 16_000, data=swollen(256_016_000))),
    "PNG bomb of a bit a pixel": ("a.png", read_image, lambda: png(13_000, 13_000, bits=1)),
    "PNG bomb of colours": ("a.png", read_rgb, lambda: png(8000, 8000, colour=2)),
    "PNG bomb of deep colours": ("a.png", telescope.read_grey, lambda: png(5000, 5000, bits=16, colour=2)),
    "PNG bomb of a palette": ("a.png", telescope.read_colours, lambda: png(13_000, 13_000, bits=8, colour=3)),
    "PNG larger than anything": ("a.png", read_image, lambda: png(2**31 - 1, 2**31 - 1)),
    "PNG of no width": ("a.png", read_image, lambda: png(0, 5)),
    "PNG cut short": ("a.png", read_image, lambda: picture(COLOURS)[:60]),
    "PNG without pixels": ("a.png", read_image, lambda: picture(COLOURS)[:33]),
    "PNG of two pictures": ("a.png", read_image, lambda: several("PNG")),
    "TIFF bomb": ("a.tif", read_image, lambda: tiff(20_000, 20_000)),
    "TIFF bomb, mask": ("a.tif", read_mask, lambda: tiff(13_000, 13_000)),
    "TIFF of two pages": ("a.tif", read_mask, lambda: several("TIFF")),
    "TIFF of very many pages": ("a.tif", read_image, lambda: tiff(8, 8, pages=20_000)),
    "TIFF that goes in a circle": ("a.tif", read_image, lambda: tiff(8, 8, pages=2, circle=True)),
    "TIFF that goes in a large circle": ("a.tif", read_image, lambda: tiff(8, 8, pages=150, circle=True)),
    "TIFF of many pages that go in a circle": ("a.tif", image_size, lambda: tiff(8, 8, pages=20_000, circle=True)),
    "TIFF whose last page is missing": ("a.tif", read_image, lambda: tiff(8, 8, pages=3)[:-20]),
    "TIFF of pages within pages": (
        "a.tif",
        read_image,
        lambda: with_counts(tiff(8, 8, bands=5, data=bytes(800_000), others={330: 8}), {330: 200_000}),
    ),
    "TIFF of very many strips": (
        "a.tif",
        read_image,
        lambda: with_counts(tiff(8, 2**18, bands=5, data=bytes(2**20), others={278: 1}), {273: 2**18, 279: 2**18}),
    ),
    "raster bomb": ("a.tif", read_image, lambda: tiff(20_000, 20_000, bands=6, bits=32, kind=3)),
    "raster bomb, mask": ("a.tif", read_mask, lambda: tiff(8000, 8000, bands=5)),
    "raster bomb in a tile": (
        "a.tif",
        read_image,
        lambda: tiff(64, 64, bands=6, others={322: 60_000, 323: 60_000, 324: 8, 325: 1000}),
    ),
    "raster that swells": ("a.tif", read_image, lambda: tiff(64, 64, bands=6, data=swollen(2**29))),
    "raster that swells by ZSTD": ("a.tif", read_image, lambda: tiff(64, 64, bands=6, packing=50000, data=zstd(2**29))),
    "raster of JPEG": ("a.tif", read_image, lambda: tiff(64, 64, bands=6, packing=7, data=jpeg(65_500))),
    "raster cut short": ("a.tif", read_image, lambda: tiff(64, 64, bands=6, packing=1, data=bytes(64 * 64 * 5))),
    "raster of a strip larger than its file": (
        "a.tif",
        read_image,
        lambda: tiff(4000, 4000, bands=6, packing=1, others={279: 2**32 - 1}),
    ),
    "raster of NaN": ("a.tif", read_image, lambda: tiff(8, 8, bands=6, bits=32, kind=3, packing=1, data=NANS)),
    "raster of complex numbers": (
        "a.tif",
        read_image,
        lambda: tiff(8, 8, bands=6, bits=64, kind=6, packing=1, data=bytes(3072)),
    ),
    "raster as a mask": ("a.tif", read_mask, lambda: tiff(8, 8, bands=6, packing=1, data=bytes(range(6)) * 64)),
    "TIFF without a page": ("a.tif", read_image, lambda: struct.pack("<2sHI", b"II", 42, 2**31)),
    "BMP bomb": ("a.bmp", read_image, lambda: bmp(30_000)),
    "JPEG bomb": ("a.jpg", read_image, lambda: jpeg(65_500)),
    "JPEG cut short": ("a.jpg", spark.read_mask, lambda: picture(COLOURS, "JPEG")[:300]),
    "GIF that moves": ("a.png", read_image, lambda: several("GIF")),
    "PostScript": ("a.png", read_image, lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\nshowpage\n"),
    "SVG": ("a.png", read_image, lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>"),
    "text": ("a.png", telescope.read_grey, lambda: b"not a picture"),
    "empty": ("a.png", read_image, lambda: b""),
    "empty TIFF": ("a.tif", read_mask, lambda: b""),
    "NaN": ("a.tif", read_image, lambda: picture(NAN, "TIFF")),
    "infinite": ("a.npy", acdc_image, lambda: npy(np.where(GREY == 3, np.inf, FLOATS))),
    "complex numbers": ("a.npy", read_image, lambda: npy(GREY * 1j)),
    "words": ("a.npy", read_mask, lambda: npy(np.array([["a", "b"]]))),
    "objects": ("a.npy", read_image, lambda: npy(np.array([[{}]], dtype=object))),
    "array without pixels": ("a.npy", read_image, lambda: npy(GREY[:0])),
    "mask without pixels": ("a.npy", read_mask, lambda: npy(GREY[:0])),
    "array of four axes": ("a.npy", images.image_size, lambda: npy(GREY[None, None])),
    "array larger than its file": ("a.npy", read_image, lambda: npy_head((40_000, 40_000))),
    "array larger than anything": ("a.npy", read_image, lambda: npy_head((2**40, 2**40))),
    "archive as an array": ("a.npy", read_image, lambda: npz(a=npy(GREY))),
    "labels out of range": ("a.png", classes, lambda: picture(GREY)),
    "labels of 16 bits": ("a.png", classes, lambda: picture(GREY.astype(np.uint16) * 600)),
    "labels below 0": ("a.npy", classes, lambda: npy(-GREY.astype(np.int16))),
    "labels with fractions": ("a.tif", classes, lambda: picture(FLOATS / 3, "TIFF")),
    "labels that are NaN": ("a.tif", classes, lambda: picture(NAN, "TIFF")),
    "colours for labels": ("a.png", classes, lambda: picture(COLOURS)),
    "mask of another size": ("a.png", pair_with, lambda: picture(np.zeros((8, 9), np.uint8))),
    "16 bits where 8 are meant": ("a.png", read_rgb, lambda: picture(GREY.astype(np.uint16) * 600)),
    "colours of no class": ("a.png", spark.read_mask, lambda: picture(np.full((8, 8, 3), (200, 200, 0), np.uint8))),
    "colours that are not known": ("a.png", telescope.read_colours, lambda: picture(COLOURS)),
    "colours for greys": ("a.png", telescope.read_grey, lambda: picture(COLOURS)),
    "object that swells": ("a.jpg.json", steel_annotation, lambda: annotated(swollen_bytes(16))),
    "object of gigabytes": ("a.jpg.json", steel_annotation, lambda: annotated(zlib.compress(png(16_000, 16_000)))),
    "object cut short": ("a.jpg.json", steel_annotation, lambda: annotated(zlib.compress(picture(GREY))[:40])),
    "annotation that is text": ("a.jpg.json", steel_annotation, lambda: b"not a JSON file"),
    "annotation without end": ("a.jpg.json", steel_annotation, lambda: b"[" * 10_000_000),
    "prediction that is a PNG bomb": ("a.png", steel_prediction, lambda: png(16_000, 16_000)),
    "prediction that is NaN": ("a.tif", steel_prediction, lambda: picture(NAN, "TIFF")),
    "prediction in colours": ("a.png", steel_prediction, lambda: picture(COLOURS)),
    "raster that goes in a circle": ("a.tif", read_raster, lambda: tiff(8, 8, pages=2, circle=True)),
    "raster without a page": ("a.tif", read_raster, lambda: struct.pack("<2sHI", b"II", 42, 2**31)),
    "raster that is NaN": ("a.tif", read_raster, lambda: picture(NAN, "TIFF")),
    "raster that is a PNG": ("a.tif", read_raster, lambda: png(16_000, 16_000, data=b"x")),
    "empty raster": ("a.tif", read_raster, lambda: b""),
    "cells that are a TIFF bomb": ("a.tif", cells_of_tile, lambda: tiff(13_000, 13_000)),
    "cells of another number": ("a.tif", cells_of_tile, lambda: picture(GREY, "TIFF")),
    "cells of other classes": ("a.tif", cells_of_tile, lambda: picture(np.zeros((16, 16), np.uint8), "TIFF")),
    "subtile that is a bomb of arrays": ("a.npz", arrays_of_subtile, lambda: npz(gt=npy_head((2**29,)) + bytes(2**28))),
    "subtile larger than its archive": ("a.npz", arrays_of_subtile, lambda: npz(gt=npy_head((2**36,), "<f8"))),
    "subtile of objects": ("a.npz", arrays_of_subtile, lambda: npz(gt=npy(np.array([{}], dtype=object)))),
    "subtile packed unusually": ("a.npz", arrays_of_subtile, lambda: npz(zipfile.ZIP_LZMA, gt=npy(GREY))),
    "subtile cut short": ("a.npz", arrays_of_subtile, lambda: npz(gt=npy(GREY))[:60]),
    "subtile without its arrays": ("a.npz", arrays_of_subtile, lambda: npz(viirs=npy(GREY))),
    "note without end": ("a_0_0.json", note_of_subtile, lambda: b"[" * 10_000_000),
    "note that is no text": ("a_0_0.json", note_of_subtile, lambda: b"\xff\xfe" * 100),
    "note that is a number": ("a_0_0.json", note_of_subtile, lambda: b"1"),
    "note without a place": ("a_0_0.json", note_of_subtile, lambda: b'{"parent_tile_id": "a"}'),
    "note of a subtile elsewhere": ("a_0_0.json", note_of_subtile, lambda: note(parent_tile_id="../a")),
    "note of a long name": ("a_0_0.json", note_of_subtile, lambda: note(parent_tile_id="a" * 10**6)),
    "note of a place beyond": ("a_9_0.json", note_of_subtile, lambda: note(x_gt=9)),
    "note of no size": ("a_0_0.json", note_of_subtile, lambda: note(subtile_size=0)),
    "note of a size that is not finite": ("a_0_0.json", note_of_subtile, lambda: note(subtile_size=float("inf"))),
    "volume bomb": ("a.nii.gz", nifti.read, lambda: zeros_after(volume((512, 512, 2000)), 2**29)),
    "volume bomb by scaling": ("a.nii.gz", nifti.read, lambda: zeros_after(volume((512, 512, 120), slope=2), 2**25)),
    "volume with a long tail": ("a.nii.gz", nifti.read, lambda: zeros_after(volume(), 2**29)),
    "volume after a long start": ("a.nii.gz", nifti.head, lambda: zeros_after(volume(first=1e9), 2**29)),
    "volume with a long note": ("a.nii.gz", nifti.head, lambda: zeros_after(noted(2**30), 2**29)),
    "volume with a note without end": ("a.nii.gz", nifti.head, lambda: zeros_after(noted(0), 2**29)),
    "volume with a note and no start": (
        "a.nii.gz",
        nifti.head,
        lambda: zeros_after(volume(first=0, notes=b"\1\0\0\0"), 2**29),
    ),
    "volume of two files": ("a.nii.gz", nifti.head, lambda: zeros_after(volume(magic=b"ni1\0"), 2**29)),
    "volume larger than its file": ("a.nii", nifti.read, lambda: volume((2000, 2000, 2000))),
    "volume cut short": ("a.nii.gz", nifti.read, lambda: gzip.compress(volume())[:-30]),
    "volume without voxels": ("a.nii.gz", nifti.head, lambda: gzip.compress(volume((8, 0, 8)))),
    "volume of less than no voxels": ("a.nii.gz", nifti.head, lambda: gzip.compress(volume((8, -8, 8)))),
    "volume of an unknown type": ("a.nii.gz", nifti.read, lambda: gzip.compress(volume(kind=77))),
    "volume of NaN": ("a.nii.gz", acdc_image, lambda: gzip.compress(volume(kind=16, bits=32, values=b"\xff" * 2048))),
    "empty volume": ("a.nii.gz", nifti.read, lambda: b""),
    "text for a volume": ("a.nii", nifti.head, lambda: b"x" * 1000),
    "bomb of arrays": ("a.npz", of_telescope, lambda: npz(tod=npy_head((2**29,)) + bytes(2**28))),
    "arrays larger than the archive": ("a.npz", of_telescope, lambda: npz(tod=npy_head((2**36,), "<f8"))),
    "arrays of objects": ("a.npz", of_telescope, lambda: npz(tod=npy(np.array([{}], dtype=object)))),
    "arrays packed unusually": ("a.npz", of_telescope, lambda: npz(zipfile.ZIP_LZMA, tod=npy(GREY))),
    "bomb of a scene": ("a.npz", pair_in_archive, lambda: npz(img=npy_head((2**14, 2**14)) + bytes(2**28))),
    "scene of objects": ("a.npz", pair_in_archive, lambda: npz(img=npy(np.array([{}], dtype=object)))),
    "scene of words": ("a.npz", pair_in_archive, lambda: npz(img=npy(np.array([["a"]])), msk=npy(GREY))),
    "scene of NaN": ("a.npz", pair_in_archive, lambda: npz(img=npy(NAN), msk=npy(GREY))),
    "scene without a mask": ("a.npz", pair_in_archive, lambda: npz(img=npy(GREY))),
    "scene cut short": ("a.npz", pair_in_archive, lambda: npz(img=npy(GREY), msk=npy(GREY))[:200]),
    "bomb of a prediction": ("a.npz", submission.load, lambda: npz(data=npy_head((2**14, 2**14)) + bytes(2**28))),
    "prediction cut short": ("a.npz", submission.load, lambda: npz(data=npy(GREY))[:60]),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.row("N3")
def test_a_hostile_file_is_refused_by_name_with_little_memory(tmp_path: Path, within: Within, case: str) -> None:
    name, read, content = CASES[case]
    path = saved(tmp_path / name, content())
    with within(seconds=2, megabytes=300), pytest.raises(DataError, match=name.replace(".", r"\.")) as caught:
        read(path)
    assert len(str(caught.value)) < 1000
    assert "bomb" not in case or "cut it into parts" in str(caught.value)


def test_an_array_that_is_mostly_a_hole_is_refused(tmp_path: Path, within: Within) -> None:
    path = saved(tmp_path / "a.npy", npy_head((2**17, 2**15), "<f4"))
    os.truncate(path, path.stat().st_size + 2**34)
    with within(seconds=1, megabytes=300), pytest.raises(DataError, match="16,384 MiB to read"):
        read_image(path)


def test_what_is_just_small_enough_takes_no_more_than_it_may(tmp_path: Path, within: Within) -> None:
    side = 11_500
    path = saved(tmp_path / "a.png", png(side, side, data=swollen((side + 1) * side)))
    with within(seconds=3, megabytes=300):
        assert read_image(path).shape == (side, side)


@pytest.mark.parametrize(("bits", "kind"), [(8, 1), (16, 1), (16, 2), (32, 2), (32, 3), (64, 3)])
def test_a_raster_that_is_just_small_enough_takes_no_more_than_it_may(
    tmp_path: Path, within: Within, bits: int, kind: int
) -> None:
    side = int((2**30 / 6 / bits) ** 0.5)
    data = zlib.compress(bytes(side * side * 6 * bits // 8), 1)
    path = saved(tmp_path / "a.tif", tiff(side, side, bands=6, bits=bits, kind=kind, data=data))
    with within(seconds=3, megabytes=300):
        assert read_image(path).shape == (side, side, 6)


def test_a_volume_may_begin_where_its_head_does_not_say(tmp_path: Path) -> None:
    path = saved(tmp_path / "a.nii.gz", gzip.compress(volume(first=0)))
    assert nifti.read(path)[0].shape == (8, 8, 8)
    path = saved(tmp_path / "b.nii", volume(first=352 + 32, notes=b"\1\0\0\0" + struct.pack("<ii", 32, 6) + bytes(24)))
    assert nifti.read(path)[0].shape == (8, 8, 8)


def test_the_limit_is_the_person_s_to_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "a.png", picture(np.zeros((1000, 1000), np.uint8)))
    assert path.stat().st_size * limits.RATIO < 2 * 10**6
    monkeypatch.setenv(limits.VARIABLE, "1")
    with pytest.raises(DataError, match=rf"would take 2 MiB to read; .* set {limits.VARIABLE}=2 if you know"):
        read_image(path)
    monkeypatch.setenv(limits.VARIABLE, "2")
    assert read_image(path).shape == (1000, 1000)
    monkeypatch.setenv(limits.VARIABLE, "a lot")
    with pytest.raises(DataError, match="got 'a lot'; expected a whole number of MiB"):
        read_image(path)


def test_a_large_file_may_be_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (3000, 1000), np.uint8)
    monkeypatch.setenv(limits.VARIABLE, "1")
    path = saved(tmp_path / "a.png", picture(noise))
    assert np.array_equal(read_image(path), noise)
    assert np.array_equal(read_mask(path), noise)


@pytest.mark.parametrize("cell", ["../../secret.jpg", "/etc/hosts", "..\\secret.jpg", "C:/secret.jpg"])
def test_a_table_names_pictures_of_its_folders_only(tmp_path: Path, cell: str) -> None:
    table = tmp_path / "train.csv"
    table.write_text(f"Class,Image name,Mask name\nA,{cell},b.jpg\n")
    with pytest.raises(DataError, match=r"train\.csv: .* is no name below a folder"):
        spark.find("train", table, tmp_path / "images", tmp_path / "mask")
