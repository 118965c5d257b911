import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from segmentation import tiling
from segmentation.tiling import Window

IGNORED = 255
sizes = st.tuples(st.integers(1, 40), st.integers(1, 40))


def pictures(height, width):
    mask = (np.arange(height * width) % 200).astype(np.uint8).reshape(height, width)
    return np.arange(height * width).astype(np.uint16).reshape(1, height, width), mask


@given(sizes, st.integers(1, 16))
def test_cutting_and_stitching_gives_the_picture_back_with_every_pixel_counted_once(size, tile):
    image, mask = pictures(*size)
    stitched, seen = np.full(size, -1), np.zeros(size, int)
    for window in tiling.tiles(Window(0, 0, *size), tile, tile):
        picture, classes = tiling.cut(image, mask, window, IGNORED)
        assert picture.shape == (1, tile, tile)
        assert classes.shape == (tile, tile)
        for y, x in np.argwhere(classes != IGNORED):
            stitched[window.top + y, window.left + x] = picture[0, y, x]
            seen[window.top + y, window.left + x] += 1
            assert classes[y, x] == mask[window.top + y, window.left + x]
    assert (seen == 1).all()
    assert np.array_equal(stitched, image[0])


@given(sizes, st.integers(2, 16), st.data())
def test_overlapping_tiles_reach_every_pixel(size, tile, data):
    stride = data.draw(st.integers(1, tile - 1))
    seen = np.zeros(size, int)
    for window in tiling.tiles(Window(0, 0, *size), tile, stride):
        _, classes = tiling.cut(*pictures(*size), window, IGNORED)
        inside = classes[: size[0] - window.top, : size[1] - window.left]
        assert (inside != IGNORED).all()
        seen[window.top : window.top + tile, window.left : window.left + tile] += 1
    assert seen.min() >= 1


@given(sizes, st.integers(1, 16))
def test_regions_cover_the_picture_once_and_are_no_smaller_than_asked(size, side):
    seen = np.zeros(size, int)
    for area in tiling.regions(*size, side):
        seen[area.top : area.top + area.height, area.left : area.left + area.width] += 1
        assert area.height >= min(side, size[0])
        assert area.width >= min(side, size[1])
    assert (seen == 1).all()


def test_a_last_tile_moves_back_and_ignores_what_it_repeats():
    windows = tiling.tiles(Window(0, 0, 4, 10), 4, 4)
    assert [(window.left, window.fresh_left) for window in windows] == [(0, 0), (4, 0), (6, 2)]


def test_padding_repeats_the_border_and_is_ignored():
    image, mask = pictures(2, 3)
    picture, classes = tiling.cut(image, mask, Window(0, 0, 3, 4), IGNORED)
    assert picture[0].tolist() == [[0, 1, 2, 2], [3, 4, 5, 5], [3, 4, 5, 5]]
    assert classes.tolist() == [[0, 1, 2, 255], [3, 4, 5, 255], [255, 255, 255, 255]]


@pytest.mark.parametrize(("height", "width", "expected"), [(512, 512, 64), (1024, 163, 32), (63, 63, 1)])
def test_number_of_regions(height, width, expected):
    assert len(tiling.regions(height, width, 64)) == expected
