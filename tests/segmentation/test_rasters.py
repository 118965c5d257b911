"""Rasters of any number of bands come back as they were stored, or not at all."""

import numpy as np
import pytest
import tifffile
from PIL import Image

from segmentation import images
from segmentation.epoch import DataError
from segmentation.rasters import raster_size, read_raster

BANDS = (np.random.default_rng(0).random((6, 24, 30)) * 200).astype(np.float32)
LAYOUTS = {"samples": ("contig", (1, 2, 0)), "planes": ("separate", (0, 1, 2)), "pages": (None, (0, 1, 2))}


def saved(path, array, **options):
    tifffile.imwrite(path, array, **{"photometric": "minisblack", **options})
    return path


def laid_out(path, bands, layout, **options):
    """Write bands (C, H, W) as samples of a pixel, as planes, or as pages."""
    planar, axes = LAYOUTS[layout]
    return saved(path, bands.transpose(axes), **({"planarconfig": planar} if planar else {}), **options)


@pytest.mark.row("A3")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", ["u1", "u2", "i2", "f4", "f8", ">u2", ">f4"])
@pytest.mark.parametrize(
    "packed", [{}, {"compression": "lzw", "predictor": True}, {"compression": "zstd"}, {"tile": (16, 16)}]
)
def test_bands_come_back_as_stored_however_they_are_laid_out(tmp_path, layout, kind, packed):
    bands = BANDS.astype(kind)
    path = laid_out(tmp_path / "a.tif", bands, layout, byteorder="><"[kind[0] != ">"], **packed)
    back = read_raster(path)
    assert back.dtype == np.dtype(kind).newbyteorder("=")
    assert np.array_equal(back, bands)
    assert raster_size(path) == images.image_size(path) == (24, 30)
    assert np.array_equal(images.read_image(path), np.moveaxis(bands, 0, -1).astype(np.float32))


@pytest.mark.parametrize("bands", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("kind", ["u1", "u2", "f4"])
def test_any_number_of_bands_is_kept(tmp_path, bands, kind):
    """Pillow would show some of these as grey, with fewer bands or 8 of 16 bits."""
    array = BANDS[:bands].astype(kind)
    for layout, photometric in [("samples", "rgb"), ("samples", "minisblack"), ("planes", "minisblack")]:
        if bands > 1 and not (photometric == "rgb" and bands < 3):
            back = images.read_image(laid_out(tmp_path / "a.tif", array, layout, photometric=photometric))
            assert np.array_equal(back, np.moveaxis(array, 0, -1))
    back = images.read_image(laid_out(tmp_path / "a.tif", array, "pages"))
    assert np.array_equal(back, array[0] if bands == 1 else np.moveaxis(array, 0, -1))


def test_large_values_of_the_other_byte_order_are_read_right_where_they_are_packed(tmp_path):
    path = saved(tmp_path / "a.tif", BANDS[0], byteorder=">", compression="lzw")
    assert np.array_equal(images.read_image(path), BANDS[0])


def test_a_stack_as_imagej_writes_it_is_bands(tmp_path):
    saved(tmp_path / "a.tif", BANDS, imagej=True, metadata={"axes": "CYX"})
    assert np.array_equal(read_raster(tmp_path / "a.tif"), BANDS)


def test_smaller_copies_and_masks_of_a_raster_are_left_alone(tmp_path):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for kind, step in ((0, 1), (1, 2)):
            samples = np.moveaxis(BANDS[:, ::step, ::step], 0, -1)
            file.write(samples, photometric="minisblack", planarconfig="contig", subfiletype=kind)
        file.write(BANDS[0] > 1, photometric="mask", subfiletype=4)
    assert np.array_equal(read_raster(tmp_path / "a.tif"), BANDS)


@pytest.mark.parametrize(
    ("pages", "problem"),
    [
        ([BANDS[0], BANDS[0, :12]], r"a\.tif: holds \(24, 30\), \(12, 30\); expected one raster"),
        ([BANDS[0], BANDS[0].astype(np.uint8)], r"a\.tif: holds \(24, 30\), \(24, 30\); expected one raster"),
        ([np.moveaxis(BANDS[:3], 0, -1).astype(np.uint8)] * 2, r"a\.tif: holds \(2, 24, 30, 3\); expected one raster"),
    ],
)
def test_pictures_that_are_no_bands_of_one_raster_are_refused(tmp_path, pages, problem):
    with tifffile.TiffWriter(tmp_path / "a.tif") as file:
        for page in pages:
            file.write(page, photometric="minisblack" if page.ndim == 2 else "rgb", metadata=None)
    for read in (read_raster, images.read_image):
        with pytest.raises(DataError, match=problem):
            read(tmp_path / "a.tif")


def test_a_compression_that_could_swell_is_refused_with_those_that_cannot(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((5, 24, 30), np.uint8), photometric="minisblack", compression="jpeg")
    with pytest.raises(DataError, match=r"a\.tif: compressed by JPEG; expected one of none, LZW, deflate, PackBits"):
        read_raster(tmp_path / "a.tif")


def test_values_that_are_not_finite_are_counted_and_refused(tmp_path):
    bands = BANDS.copy()
    bands[2, :2, 0] = np.nan, np.inf
    for read in (read_raster, images.read_image):
        with pytest.raises(DataError, match=r"a\.tif: 2 values are NaN or infinite"):
            read(saved(tmp_path / "a.tif", bands))


def test_bands_are_no_mask(tmp_path):
    path = saved(tmp_path / "a.tif", BANDS.astype(np.uint8))
    with pytest.raises(DataError, match="expected one class id a pixel, not colours"):
        images.read_mask(path)
    with pytest.raises(DataError, match=r"a\.tif: has 6 bands; expected grey or colours"):
        images.read_rgb(path)


def test_a_mask_may_be_a_raster_of_one_band(tmp_path):
    mask = (BANDS[0] > 100).astype(np.float64)
    back = images.read_mask(saved(tmp_path / "a.tif", mask, compression="zstd"))
    assert back.dtype.kind == "i"
    assert np.array_equal(back, mask)


@pytest.mark.parametrize("read", [read_raster, raster_size])
def test_what_is_no_raster_is_refused_by_name(tmp_path, read):
    with pytest.raises(DataError, match=r"a\.tif: no such file"):
        read(tmp_path / "a.tif")
    (tmp_path / "a.tif").write_bytes(b"II*\0 nothing more")
    with pytest.raises(DataError, match=r"a\.tif: unreadable or truncated"):
        read(tmp_path / "a.tif")


def outcome(path, content):
    path.write_bytes(content)
    try:
        same = np.array_equal(images.read_image(path), np.moveaxis(BANDS, 0, -1))
    except DataError as error:
        return str(error)
    return "" if same else "other values"


@pytest.mark.row("A4")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("compression", [None, "zlib"])
def test_a_raster_cut_short_anywhere_is_refused_or_read_right(tmp_path, layout, compression):
    path = laid_out(tmp_path / "a.tif", BANDS, layout, compression=compression)
    whole = path.read_bytes()
    problems = [outcome(path, whole[:length]) for length in range(0, len(whole), len(whole) // 97)]
    assert all(f"{path}: " in problem for problem in problems if problem), set(problems)
    assert sum(bool(problem) for problem in problems) >= len(problems) - 2


@pytest.mark.row("A4")
def test_a_byte_changed_anywhere_gives_values_or_an_error_that_names_the_file(tmp_path):
    path = laid_out(tmp_path / "a.tif", BANDS[:, :8, :8], "pages", compression="zlib")
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for place in rng.integers(0, len(whole), 200):
        changed = bytearray(whole)
        changed[place] ^= rng.integers(1, 256)
        problem = outcome(path, bytes(changed))
        assert problem in ("", "other values") or problem.startswith(f"{path}: "), problem


def test_pillow_writes_what_is_read_here(tmp_path):
    """A reference of its own: what Pillow stores of one band or of three, both readers give alike."""
    for array in (BANDS[0], np.moveaxis(BANDS[:3], 0, -1).astype(np.uint8)):
        Image.fromarray(array).save(tmp_path / "a.tif", compression="tiff_lzw")
        bands = array[None] if array.ndim == 2 else np.moveaxis(array, -1, 0)
        assert np.array_equal(read_raster(tmp_path / "a.tif"), bands)
        assert np.array_equal(images.read_image(tmp_path / "a.tif"), array)
