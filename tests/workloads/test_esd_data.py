"""The satellite tiles' way from files to samples: names, formulas, subtiles, folders that resume, splits, manifest."""

import dataclasses
import json
import os
import shutil
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import tifffile
from scipy.ndimage import gaussian_filter

import durable
from segmentation import splits
from segmentation.epoch import DataError
from workloads import esd
from workloads._esd import dataset, generator, preprocessing, processed, reader, satellites, subtiles
from workloads._esd.dataset import Bands, Data
from workloads._esd.generator import Synthetic
from workloads._esd.processed import FOLDERS, Target
from workloads._esd.satellites import GT, SATELLITES

pytestmark = pytest.mark.usefixtures("own_cache")

SMALL = Synthetic(tiles=6, pixels=2)
SIDE = 32
NAMES = [f"Tile{number}" for number in range(1, 7)]
ARRAYS = ["viirs", "sentinel1", "sentinel2", "landsat", "viirs_maxproj", "gt"]
S2 = [*(f"{band:02}" for band in range(1, 10)), "11", "12", "8A"]
LANDSAT = ["1", "10", "11", *map(str, range(2, 10))]


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    """A folder of six tiles as the contest gives them; to be read only."""
    root = tmp_path_factory.mktemp("raw")
    generator.write(SMALL, root)
    return root


@pytest.fixture(scope="module")
def stacks(raw):
    return reader.read(reader.find_tile(raw / "Train/Tile1"))


@pytest.fixture(scope="module")
def arrays(raw):
    return processed.arrays(reader.find_tile(raw / "Train/Tile1"), "float16")


@pytest.fixture(scope="module")
def done(raw, tmp_path_factory):
    """The folder of all tiles, processed; to be read only."""
    folder = tmp_path_factory.mktemp("done")
    data = Data(root=str(raw), processed=str(folder))
    assert dataset.process(data, dataset.pieces(data)) == NAMES
    return folder / "4x4"


@pytest.fixture
def tile(raw, tmp_path):
    """A tile of one's own, to be broken."""
    return shutil.copytree(raw / "Train/Tile1", tmp_path / "own/Tile1")


@pytest.fixture
def three(raw, tmp_path):
    """Three tiles of one's own."""
    for name in NAMES[:3]:
        shutil.copytree(raw / "Train" / name, tmp_path / "three" / name)
    return tmp_path / "three"


def read(folder, **how):
    for found in reader.find(folder, **how):
        reader.read(found)
        if found.labels:
            reader.read_labels(found)


def refused(folder, *problems, **how):
    with pytest.raises(DataError) as caught:
        read(folder, **how)
    for problem in problems:
        assert problem in str(caught.value)


def rewrite(path, change):
    tifffile.imwrite(path, change(tifffile.imread(path)))


def state(folder, *, but=()):
    """Return when each file of a processed folder was written, but for some tiles, and where it is."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.stat().st_ino)
        for path in folder.rglob("*")
        if path.is_file() and path.name.partition("_")[0].partition(".")[0] not in but
    }


def content(folder):
    """Return all stacks and notes of a processed folder by the names of their files, whichever split they lie in."""
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.suffix in (".npz", ".json") and "_" in path.name
    }


def of(three, tmp_path, **changed):
    values = {"root": str(three), "processed": str(tmp_path / "out"), "stratify": False}
    return Data(**{**values, **changed})


# --- names and files


@pytest.mark.row("E22")
def test_files_are_put_in_order_by_date_and_then_band_as_text(tmp_path):
    names = [
        satellite.file(date, band) for satellite in SATELLITES for date in dates(satellite) for band in satellite.bands
    ]
    for name in reversed([*names, "other.tif", "L2A_20200816_B01.tif.aux.xml", "notes.txt"]):
        (tmp_path / name).touch()
    found = {source.satellite.name: source for source in reader.find_tile(tmp_path, labelled=False).sources}
    assert list(found) == ["viirs", "sentinel1", "sentinel2", "landsat"]
    assert found["viirs"].dates == ("A2020221", "A2021001")
    assert [[path.name for path in row] for row in found["sentinel1"].files] == [
        ["S1A_IW_GRDH_20200804_VH.tif", "S1A_IW_GRDH_20200804_VV.tif"],
        ["S1A_IW_GRDH_20201201_VH.tif", "S1A_IW_GRDH_20201201_VV.tif"],
    ]
    assert [path.name for path in found["sentinel2"].files[1]] == [f"L2A_20201201_B{band}.tif" for band in S2]
    assert [path.name for path in found["landsat"].files[0]] == [
        f"LC08_L1TP_2020-08-04_B{band}.tif" for band in LANDSAT
    ]
    assert [S2.index(band) for band in satellites.VISIBLE[1]] == [3, 2, 1]


def dates(satellite):
    """Return two dates, the later first."""
    written = {"viirs": ("A2021001", "A2020221"), "landsat": ("2020-12-01", "2020-08-04")}
    return written.get(satellite.name, ("20201201", "20200804"))


@pytest.mark.row("E22")
@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("DNB_VNP46A1_A2020221.tif", 0, ("A2020221", "0")),
        ("S1A_IW_GRDH_20200804_VV.tif", 1, ("20200804", "VV")),
        ("L2A_20200816_B01.tif", 2, ("20200816", "01")),
        ("L2A_20200816_B8A.tif", 2, ("20200816", "8A")),
        ("LC08_L1TP_2020-08-30_B9.tif", 3, ("2020-08-30", "9")),
    ],
)
def test_the_contests_names_tell_date_and_band(name, number, expected):
    assert [satellite.parse(name) for satellite in SATELLITES] == [expected if n == number else None for n in range(4)]
    assert SATELLITES[number].file(*expected) == name


@pytest.mark.row("E22")
def test_stacks_are_as_stored_and_99_channels_are_counted(raw, stacks):
    assert {name: stack.shape for name, stack in stacks.items()} == {
        "viirs": (9, 1, SIDE, SIDE),
        "sentinel1": (4, 2, SIDE, SIDE),
        "sentinel2": (4, 12, SIDE, SIDE),
        "landsat": (3, 11, SIDE, SIDE),
    }
    source = reader.find_tile(raw / "Train/Tile1").sources[2]
    assert np.array_equal(stacks["sentinel2"][3, 11], tifffile.imread(source.files[3][11]))
    assert source.files[3][11].name.endswith("_B8A.tif")
    assert (
        len(satellites.channels({**{name: len(stack) for name, stack in stacks.items()}, "viirs_maxproj": 1}, {})) == 99
    )


@pytest.mark.row("E22")
def test_tiles_are_found_below_a_folder_below_train_and_alone_in_order_of_number(raw, tmp_path):
    assert [tile.name for tile in reader.find(raw)] == [tile.name for tile in reader.find(raw / "Train")] == NAMES
    assert [tile.name for tile in reader.find(raw / "Train/Tile2")] == ["Tile2"]
    for name in ("Tile10", "Tile9", "Other1", ".Tile3"):
        shutil.copytree(raw / "Train/Tile1", tmp_path / name)
    assert [tile.name for tile in reader.find(tmp_path)] == ["Other1", "Tile9", "Tile10"]


@pytest.mark.row("E22")
def test_a_missing_band_names_tile_and_file(tile):
    names = sorted(path.name for path in tile.glob("L2A_*_B8A.tif"))
    (tile / names[1]).unlink()
    refused(tile.parent, str(tile), names[1], "add it, remove that date's files, or remove the tile")
    (tile / names[2]).unlink()
    refused(tile.parent, f"{tile}: {names[1]} and 1 others missing")


@pytest.mark.row("E22")
def test_a_missing_date_names_tile_and_satellite(three):
    last = sorted((three / "Tile2").glob("DNB_*"))[-1]
    last.unlink()
    refused(
        three, f"{three / 'Tile2'}: 8 dates of viirs (DNB_VNP46A1_....tif: A2020212", "Tile1 and most others have 9"
    )


@pytest.mark.row("E22")
def test_a_missing_satellite_and_a_band_that_there_is_none_of_are_named(tile):
    odd = tile / "L2A_20200730_B10.tif"
    shutil.copy(next(tile.glob("L2A_*")), odd)
    refused(tile.parent, f"{odd}: sentinel2 has no band '10'; remove or rename the file")
    odd.unlink()
    for path in tile.glob("S1A_*"):
        path.unlink()
    refused(tile.parent, f"{tile}: no file of sentinel1 (S1A_IW_GRDH_..._....tif); add them, or remove the tile")


@pytest.mark.row("E22")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda plane: plane[:-1], f"{SIDE}x{SIDE - 1} pixels; the files of Tile1 before it have {SIDE}x{SIDE}"),
        (lambda plane: np.tile(plane, (2, 2)), f"{2 * SIDE}x{2 * SIDE} pixels; the files of Tile1 before it have"),
        (lambda plane: np.stack([plane, plane]), "holds 2 bands; expected one file for each band"),
        (lambda plane: plane * 1j, "holds complex"),
    ],
)
def test_a_file_of_another_size_or_kind_is_named(tile, change, problem):
    path = sorted(tile.glob("LC08_*"))[5]
    rewrite(path, change)
    refused(tile.parent, f"{path}: ", problem)


@pytest.mark.row("E22")
@pytest.mark.parametrize("shape", [(SIDE, SIDE + 16), (SIDE + 1, SIDE + 1)])
def test_tiles_that_cells_do_not_divide_are_refused(tile, shape):
    for path in tile.glob("[!g]*.tif"):
        rewrite(path, lambda plane: np.zeros(shape, plane.dtype))
    refused(tile.parent, f"DNB_VNP46A1_A2020212.tif: {shape[1]}x{shape[0]} pixels; expected a square of which 16 cells")


@pytest.mark.row("E22")
def test_a_file_that_declares_more_pixels_than_it_may_is_refused_unread(tile, monkeypatch):
    path = sorted(tile.glob("S1A_*"))[0]
    tifffile.imwrite(path, np.zeros((2000, 2000), np.uint16), compression="deflate")
    monkeypatch.setenv("SEGMENTATION_MAX_MIB", "1")
    refused(tile.parent, f"{path}: ", "would take", "SEGMENTATION_MAX_MIB=")


def test_files_of_several_types_become_a_stack_of_one_that_holds_all(tile):
    first, second, *_ = sorted(tile.glob("DNB_*"))
    rewrite(first, lambda plane: (plane % 200).astype(np.uint8))
    rewrite(second, lambda plane: plane.astype(np.float32) - 0.5)
    stack = reader.read(reader.find_tile(tile))["viirs"]
    assert stack.dtype == np.float32
    planes = [tifffile.imread(path) for path in sorted(tile.glob("DNB_*"))]
    assert all(np.array_equal(found[0], plane) for found, plane in zip(stack, planes, strict=True))


@pytest.mark.row("E22")
def test_folders_without_tiles_are_named(tmp_path):
    refused(tmp_path / "nowhere", f"{tmp_path}/nowhere: no such folder; it should hold tiles, such as Tile1/")
    (tmp_path / "Train/Tile1").mkdir(parents=True)
    refused(tmp_path, f"{tmp_path}: holds no tile; expected folders such as Tile1/ or Train/Tile1/ with L2A_20200816_B")
    (tmp_path / "file").touch()
    refused(tmp_path / "file", f"{tmp_path}/file: no such folder")


@pytest.mark.row("E15", "E22")
@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda cells: cells[:8], "16x8 in 1 bands; expected one band of 16x16 cells of 500 m"),
        (lambda cells: np.stack([cells] * 2), "16x16 in 2 bands; expected one band"),
        (lambda cells: cells - 1, "holds 0; expected the classes 1, 2, 3 and 4"),
        (lambda cells: np.where(cells == 2, 7, cells).astype(np.uint8), "holds 7; expected the classes"),
        (lambda cells: cells + 0.5, "holds 1.5, 2.5, 3.5, 4.5; expected the classes"),
    ],
)
def test_labels_of_another_shape_or_value_are_named(tile, change, problem):
    path = tile / "groundTruth.tif"
    rewrite(path, change)
    refused(tile.parent, f"{path}: {problem}")


@pytest.mark.row("E22")
def test_labels_are_needed_to_train_and_not_to_predict(tile):
    assert reader.read_labels(reader.find_tile(tile)).dtype == np.uint8
    (tile / "groundTruth.tif").unlink()
    refused(tile.parent, f"{tile}: groundTruth.tif is missing; add it, or remove the tile")
    found = reader.find(tile.parent, labelled=False)[0]
    assert found.labels is None and len(found.files()) == 98
    assert GT not in processed.arrays(found, "float16")


# --- formulas


def reference(stacks):
    """Return what the docstring of `preprocessing` says, step by step, in plain numpy."""

    def clipped(values, part):
        return np.clip(values, *np.quantile(values, (part, 1 - part)))

    def stretched(values):
        low, high = values.min(), values.max()
        return (values - low) / (high - low) if high > low else np.zeros_like(values)

    def each(stack, steps):
        return np.stack([[steps(plane) for plane in bands] for bands in stack.astype(np.float64)])

    def dark(plane):
        above = plane[plane > 0]
        logs = np.log10(np.maximum(plane, above.min() if above.size else 1))
        return stretched(gaussian_filter(clipped(logs, 0.01), 1))

    def gamma(values, part):
        return stretched(np.maximum(clipped(values, part), 0) ** (1 / 2.2))

    viirs = each(stacks["viirs"], lambda plane: stretched(clipped(plane, 0.05)))
    bands = stacks["sentinel2"].astype(np.float64).swapaxes(0, 1)
    return {
        "viirs": viirs,
        "sentinel1": each(stacks["sentinel1"], dark),
        "sentinel2": np.stack([gamma(band, 0.1) for band in bands], axis=1),
        "landsat": each(stacks["landsat"], lambda plane: gamma(plane, 0.05)),
        "viirs_maxproj": stretched(viirs.max(axis=0))[None],
    }


@pytest.mark.row("E23")
@pytest.mark.parametrize("kind", ["uint8", "uint16", "int16", "float32", "fractions"])
def test_each_satellite_is_processed_as_its_formula_says(stacks, kind):
    scale = {"uint8": 1 / 256, "int16": 1 / 2, "fractions": 1 / 7}.get(kind, 1)
    given = {name: (stack * scale).astype("float32" if kind == "fractions" else kind) for name, stack in stacks.items()}
    before = {name: stack.copy() for name, stack in given.items()}
    for dtype, near in (("float32", 2e-6), ("float16", 6e-4)):
        found, expected = preprocessing.preprocess(given, dtype), reference(given)
        assert found.keys() == expected.keys()
        for name, stack in found.items():
            assert stack.dtype == dtype and stack.shape == expected[name].shape
            np.testing.assert_allclose(stack, expected[name], rtol=0, atol=near * (4 if name == "viirs_maxproj" else 1))
    assert all(np.array_equal(given[name], before[name]) for name in given)


@pytest.mark.row("E23")
def test_sentinel_2_is_clipped_over_all_dates_and_landsat_date_by_date():
    bright = np.arange(1, SIDE**2 + 1, dtype=np.uint16).reshape(1, 1, SIDE, SIDE)
    dates = np.concatenate([bright, 10 * bright])
    both = preprocessing.sentinel2(dates, np.dtype(np.float32))
    assert both[1].max() == 1 and both[0].max() < 0.6
    alone = preprocessing.landsat(dates, np.dtype(np.float32))
    assert alone[0].max() == alone[1].max() == 1
    assert np.abs(alone[0] - alone[1]).max() < 1e-6


@pytest.mark.row("E23")
@pytest.mark.parametrize("kind", ["uint16", "float32", "int32"])
@pytest.mark.parametrize("value", [0, 7])
def test_what_is_constant_becomes_zero(stacks, kind, value):
    given = {name: np.full(stack.shape, value, kind) for name, stack in stacks.items()}
    for stack in preprocessing.preprocess(given).values():
        assert not stack.any()


@pytest.mark.row("E23")
@pytest.mark.parametrize("kind", ["uint16", "float32"])
def test_nothing_is_nan_or_infinite_whatever_radar_has_not_seen(stacks, kind):
    given = {name: stack.astype(kind) for name, stack in stacks.items()}
    given["sentinel1"][0, 0, :, :8] = 0
    given["sentinel1"][1, 1] = 0
    given["sentinel1"][2, 0, 3, 3] = 65535
    if kind == "float32":
        given["sentinel1"][3] -= 50
        given["sentinel2"] -= 900
        given["viirs"][0] = -3e38
        given["landsat"][0, 0, 0] = 3e38
    for stack in preprocessing.preprocess(given).values():
        assert np.isfinite(stack).all() and stack.min() >= 0 and stack.max() <= 1
    radar = preprocessing.preprocess(given)["sentinel1"]
    assert not radar[0, 0, :, :4].any() and radar[0, 0].max() == 1 and not radar[1, 1].any()


# --- subtiles


@pytest.mark.row("E20", "E21", "E8")
@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_what_is_cut_and_put_together_is_as_before_in_whatever_order(raw, arrays, tmp_path, size):
    cells = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    given = {**arrays, "prediction": cells}
    pieces = subtiles.grid_slice(given, processed.metadata(reader.find_tile(raw / "Train/Tile1")), size)
    count = 16 // size
    assert [(piece.x_gt, piece.y_gt) for piece in pieces] == [(x, y) for x in range(count) for y in range(count)]
    assert {piece.arrays["sentinel2"].shape for piece in pieces} == {(4, 12, 2 * size, 2 * size)}
    shuffled = [pieces[place] for place in np.random.default_rng(size).permutation(len(pieces))]
    for name, stack in given.items():
        assert np.array_equal(subtiles.join({(p.x_gt, p.y_gt): p.arrays[name] for p in shuffled}), stack)
    if size > 1:
        subtiles.save(shuffled, tmp_path)
        for name, stack in given.items():
            found, _ = subtiles.restitch(tmp_path, name, "Tile1", (0, count), (0, count))
            assert found.dtype == stack.dtype and np.array_equal(found, stack)


@pytest.mark.row("E20")
def test_x_goes_down_the_rows_and_y_along_them(arrays, done):
    split = owner_of(done, "Tile1")
    for (x, y), name in {(0, 3): "viirs", (2, 1): "gt"}.items():
        found = subtiles.load_arrays(done / split, f"Tile1_{x}_{y}", [name])[name]
        side = found.shape[-1]
        assert np.array_equal(found, arrays[name][..., x * side : (x + 1) * side, y * side : (y + 1) * side])
    part, notes = subtiles.restitch(done / split, "landsat", "Tile1", (1, 3), (2, 4))
    assert np.array_equal(part, arrays["landsat"][:, :, 8:24, 16:32])
    assert [[(note["x_gt"], note["y_gt"]) for note in row] for row in notes] == [[(1, 2), (1, 3)], [(2, 2), (2, 3)]]


def owner_of(folder, tile):
    return next(name for name in FOLDERS.values() if (folder / name / f"subtiles/{tile}_0_0.npz").exists())


@pytest.mark.row("E20")
def test_files_of_a_subtile_have_the_originals_names_keys_and_fields(done, arrays):
    folder = done / owner_of(done, "Tile1")
    with np.load(folder / "subtiles/Tile1_2_3.npz") as stored:
        assert sorted(stored.files) == sorted(ARRAYS)
        assert stored["gt"].shape == (1, 1, 4, 4) and stored["gt"].dtype == np.uint8
        assert stored["viirs_maxproj"].shape == (1, 1, 8, 8) and stored["sentinel1"].dtype == np.float16
    note = json.loads((folder / "metadata/Tile1_2_3.json").read_text())
    assert note.keys() == {"parent_tile_id", "x_gt", "y_gt", "subtile_size", "satellites"}
    assert (note["parent_tile_id"], note["x_gt"], note["y_gt"], note["subtile_size"]) == ("Tile1", 2, 3, 4)
    assert set(note["satellites"]) == set(ARRAYS)
    radar = note["satellites"]["sentinel1"]
    assert radar.keys() == {"satellite_type", "bands", "times", "original_filenames"}
    assert (radar["satellite_type"], radar["bands"], len(radar["times"])) == ("sentinel1", ["VH", "VV"], 4)
    assert radar["original_filenames"][0] == [f"S1A_IW_GRDH_{radar['times'][0]}_{band}.tif" for band in ("VH", "VV")]


@pytest.mark.row("E20")
@pytest.mark.parametrize("size", [0, 3, 5, 32, -4])
def test_sizes_that_do_not_divide_a_tile_are_refused(arrays, size):
    with pytest.raises(ValueError, match=f"tile_size_gt: got {size}; expected 1, 2, 4, 8 or 16"):
        Data(tile_size_gt=size)
    with pytest.raises(ValueError, match=f"tile_size_gt: got {size}; expected"):
        subtiles.grid_slice(arrays, subtiles.TileMetadata("Tile1", {}), size)
    with pytest.raises(ValueError, match=r"Tile1: viirs is \(1, 1, 40, 40\); expected"):
        subtiles.grid_slice({"viirs": np.zeros((1, 1, 40, 40))}, subtiles.TileMetadata("Tile1", {}), 4)


@pytest.mark.row("E8")
def test_a_place_without_a_piece_is_named(arrays):
    pieces = {(p.x_gt, p.y_gt): p.arrays["gt"] for p in subtiles.grid_slice(arrays, subtiles.TileMetadata("T", {}), 4)}
    del pieces[2, 1], pieces[3, 3]
    with pytest.raises(ValueError, match=r"no piece at \(2, 1\), of 16 places 2 are empty"):
        subtiles.join(pieces)


# --- processed folders


@pytest.mark.row("E19")
def test_subtiles_lie_in_the_folders_of_their_splits_and_sizes(raw, done):
    owner = dataset.find(Data(root=str(raw))).owner(Data())
    assert {path.name for path in done.iterdir()} == {*FOLDERS.values(), "tiles"}
    for tile, split in owner.items():
        for kind, suffix in (("subtiles", "npz"), ("metadata", "json")):
            where = {path.parent.parent.name for path in done.glob(f"*/{kind}/{tile}_*.{suffix}")}
            assert where == {FOLDERS[split]}
            assert len(list(done.glob(f"*/{kind}/{tile}_*.{suffix}"))) == 16
    assert not list(done.rglob("*.tmp"))


@pytest.mark.row("E19")
def test_a_finished_folder_is_left_alone_and_an_unfinished_one_is_gone_on_with(three, tmp_path):
    data, folder = of(three, tmp_path), tmp_path / "out/4x4"
    assert dataset.process(data, ["Tile1", "Tile3"]) == ["Tile1", "Tile3"]
    first = state(folder)
    assert dataset.pieces(data) == ["Tile2"]
    assert dataset.process(data, NAMES) == ["Tile2"]
    assert state(folder, but=["Tile2"]) == first
    after = state(folder)
    assert dataset.pieces(data) == dataset.process(data, NAMES) == []
    assert len(esd.prepare(esd.Config(data=data, network=network()))["samples"]) == 3
    assert state(folder) == after
    gone = next(folder.glob("*/metadata/Tile1_0_1.json"))
    gone.unlink()
    assert dataset.process(data, NAMES) == ["Tile1"] and gone.exists()
    assert state(folder, but=["Tile1"]) == {name: seen for name, seen in after.items() if "Tile1" not in name}


def network():
    return dataclasses.replace(esd.Config.debug().network, pool_sizes=(2,), scale_factor=2)


@pytest.mark.row("E19")
def test_other_sizes_lie_side_by_side(three, tmp_path):
    folder = tmp_path / "out"
    assert dataset.process(of(three, tmp_path), NAMES) == NAMES[:3]
    before = state(folder / "4x4")
    assert dataset.process(of(three, tmp_path, tile_size_gt=8), NAMES) == NAMES[:3]
    assert len(list(folder.glob("8x8/*/subtiles/*.npz"))) == 3 * 4
    assert dataset.process(of(three, tmp_path), NAMES) == [] and state(folder / "4x4") == before


@pytest.mark.row("E19")
def test_another_split_moves_files_and_processes_none(three, tmp_path):
    folder, seen = tmp_path / "out/4x4", set()
    for seed in (0, 2, 4):
        data = of(three, tmp_path, split_seed=seed)
        assert dataset.process(data, NAMES) == (NAMES[:3] if seed == 0 else [])
        owner = dataset.find(data).owner(data)
        seen.add(tuple(sorted(owner.items())))
        assert {tile: FOLDERS[split] for tile, split in owner.items()} == {n: owner_of(folder, n) for n in NAMES[:3]}
        assert len(list(folder.glob("*/subtiles/*.npz"))) == len(list(folder.glob("*/metadata/*.json"))) == 48
    assert len(seen) > 1


@pytest.mark.row("E19")
def test_a_raw_file_that_changed_is_processed_again(three, tmp_path):
    data = of(three, tmp_path)
    dataset.process(data, NAMES)
    before = content(tmp_path / "out")
    rewrite(sorted((three / "Tile2").glob("L2A_*"))[7], lambda plane: plane[::-1])
    assert dataset.process(data, NAMES) == ["Tile2"]
    changed = {name for name, stored in content(tmp_path / "out").items() if stored != before[name]}
    assert changed == {f"Tile2_{x}_{y}.npz" for x in range(4) for y in range(4)}
    assert dataset.process(dataclasses.replace(data, storage="float32"), NAMES) == NAMES[:3]


@pytest.mark.row("E19")
@pytest.mark.parametrize("written", [5, 32])
def test_a_killed_writer_leaves_nothing_that_is_taken_for_whole(three, tmp_path, written):
    data = of(three, tmp_path)
    dataset.process(data, NAMES)
    before, folder = content(tmp_path / "out"), tmp_path / "out/4x4"
    (folder / "tiles/Tile2.json").unlink()
    with forked() as child:
        if child:
            dies_after(written)
            dataset.process(data, NAMES)
    assert not (folder / "tiles/Tile2.json").exists()
    assert len(list(folder.rglob(".Tile2*.tmp"))) == 1
    assert dataset.pieces(data) == dataset.process(data, NAMES) == ["Tile2"]
    assert content(tmp_path / "out") == before
    assert not list(folder.glob("*/*/.*"))


@contextmanager
def forked():
    """Run the body in another process too, for which it gets True; nothing of it comes back, and it has to die."""
    number = os.fork()
    if number:
        yield False
        assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == -signal.SIGKILL
        return
    try:
        yield True
    finally:
        os._exit(1)


def dies_after(count):
    """Let this process be killed once so many files are whole, and the next is written but not under its name."""
    write, left = durable._temporary, [count]

    def dying(path, content):
        temporary = write(path, content)
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return temporary

    durable._temporary = dying


@pytest.mark.row("E19")
def test_a_tile_that_is_read_or_written_is_waited_for_and_others_are_not(three, tmp_path):
    data = of(three, tmp_path)
    source = dataset.find(data)
    target, owner = source.target(data), source.owner(data)
    same = threading.Thread(target=processed.ensure, args=(source.tiles[:1], dict.fromkeys(NAMES, "test"), target))
    with processed.held(source.tiles[0], "train", target) as new:
        assert new
        same.start()
        assert processed.ensure(source.tiles[1:], owner, target) == ["Tile2", "Tile3"]
        same.join(0.2)
        assert same.is_alive() and owner_of(target.folder, "Tile1") == "Train"
    same.join(10)
    assert owner_of(target.folder, "Tile1") == "Test"


@pytest.mark.row("E19")
def test_two_processes_of_different_splits_read_whole_tiles_from_one_folder(three, tmp_path):
    expected = [sample.image.tobytes() for sample in decoded(of(three, tmp_path, processed=str(tmp_path / "alone")))]
    seeds = (0, 4)
    owners = [dataset.find(of(three, tmp_path)).owner(of(three, tmp_path, split_seed=seed)) for seed in seeds]
    assert owners[0] != owners[1]
    children = []
    for seed in seeds:
        if (number := os.fork()) == 0:
            code = 1
            try:
                for _ in range(4):
                    found = [sample.image.tobytes() for sample in decoded(of(three, tmp_path, split_seed=seed))]
                    assert found == expected
                code = 0
            finally:
                os._exit(code)
        children.append(number)
    assert [os.waitpid(number, 0)[1] for number in children] == [0, 0]
    assert content(tmp_path / "out") == content(tmp_path / "alone")


def decoded(data):
    return list(dataset.decode(data, dataset.find(data)))


@pytest.mark.row("E19")
def test_subtiles_beside_the_raw_tiles_are_not_taken_for_all_of_them(three, tmp_path):
    data = of(three, tmp_path, processed=str(three))
    assert dataset.process(data, ["Tile1"]) == ["Tile1"]
    assert dataset.pieces(data) == ["Tile2", "Tile3"]
    assert dataset.process(data, NAMES) == ["Tile2", "Tile3"]
    assert dataset.manifest(data)["form"] == "raw"


def test_a_folder_that_cannot_be_written_is_named(three, tmp_path):
    (tmp_path / "file").touch()
    data = of(three, tmp_path, processed=str(tmp_path / "file"))
    with pytest.raises(DataError, match=rf"{tmp_path}/file/4x4: cannot write subtiles .*name another data\.processed"):
        dataset.process(data, NAMES)


@pytest.mark.row("E19")
def test_hashes_of_raw_files_are_kept_in_the_cache_that_is_named(three, tmp_path, monkeypatch):
    monkeypatch.setenv("SEGMENTATION_CACHE", str(tmp_path / "not this"))
    monkeypatch.setattr("segmentation.cache.SETTLED_NS", -1)
    data = of(three, tmp_path, processed="", cache=str(tmp_path / "cache"))
    dataset.manifest(data)
    assert list((tmp_path / "cache").rglob("*.npz")) and (tmp_path / "cache/hashes").is_dir()
    assert not (tmp_path / "not this").exists()


# --- samples and splits


@pytest.fixture(scope="module")
def loaded(raw, done, own_cache):
    data = Data(root=str(raw), processed=str(done.parent))
    return data, *dataset.load(data)


@pytest.mark.row("E15", "E17", "E42")
def test_samples_are_the_subtiles_of_all_tiles(raw, loaded, arrays):
    samples = loaded[1]
    assert len(samples) == 6 * 16
    assert samples.names[:5] == ("Tile1_0_0", "Tile1_0_1", "Tile1_0_2", "Tile1_0_3", "Tile1_1_0")
    assert samples.shape(0) == (99, 8, 8) and dataset.scale(samples) == 2
    stacked = np.concatenate([arrays[name].reshape(-1, SIDE, SIDE) for name in ARRAYS[:-1]])
    with splits.test_split_open():
        at = {dataset.place_of(samples, index): index for index in range(16)}
        assert samples.image(0).dtype == np.float16 and samples.mask(0).dtype == np.uint8
        assert np.array_equal(subtiles.join({place: samples.image(index) for place, index in at.items()}), stacked)
        cells = subtiles.join({place: samples.mask(index) for place, index in at.items()})
    assert np.array_equal(cells + 1, tifffile.imread(raw / "Train/Tile1/groundTruth.tif"))
    assert set(np.unique(cells)) == {0, 1, 2, 3}


@pytest.mark.row("E17")
@pytest.mark.parametrize("seed", range(4))
def test_no_tile_is_in_two_splits_and_each_has_all_its_subtiles(loaded, seed):
    data, samples, _ = loaded
    made = dataset.find(data).deal(dataclasses.replace(data, split_seed=seed), samples)
    assert made.key == "tile"
    tiles = {name: {samples.groups[index] for index in made[name]} for name in splits.NAMES}
    assert sorted(tile for group in tiles.values() for tile in group) == NAMES
    assert all(len(made[name]) == 16 * len(tiles[name]) for name in splits.NAMES)


@pytest.mark.row("E18")
def test_each_stratum_is_dealt_by_itself(raw, tmp_path):
    for name in NAMES:
        (tmp_path / name).mkdir()
        for path in (raw / "Train" / name).iterdir():
            (tmp_path / name / path.name).symlink_to(path)
    dark = set(NAMES[:3])
    for name in NAMES[3:]:
        (tmp_path / name / "groundTruth.tif").unlink()
        cells = tifffile.imread(raw / "Train" / name / "groundTruth.tif")
        tifffile.imwrite(tmp_path / name / "groundTruth.tif", np.where(cells == 1, 2, cells).astype(np.uint8))

    def tested(**values):
        data = Data(root=str(tmp_path), **values)
        owner = dataset.find(data).owner(data)
        return tuple(sum(owner[name] == "test" for name in names) for names in (dark, set(NAMES) - dark))

    assert {tested(split_seed=seed) for seed in range(12)} == {(1, 1)}
    assert len({tested(split_seed=seed, stratify=False) for seed in range(12)}) > 1


@pytest.mark.row("E24")
def test_selected_bands_are_the_channels_in_the_order_of_the_stack(raw, loaded):
    data, samples, _ = loaded
    bands = Bands(sentinel2=("8A", "04"), viirs_maxproj=("0",), landsat=("11",))
    chosen = dataclasses.replace(data, selected_bands=bands)
    few, _ = dataset.load(chosen)
    every, wanted = dataset.channels_of(data, samples), dataset.channels_of(chosen, few)
    assert [(one.source, one.band) for one in wanted] == [
        *[("sentinel2", "04"), ("sentinel2", "8A")] * 4,
        *[("landsat", "11")] * 3,
        ("viirs_maxproj", "0"),
    ]
    with splits.test_split_open():
        assert np.array_equal(few.image(5), samples.image(5)[[every.index(one) for one in wanted]])
    config = esd.Config(data=chosen, network=network())
    assert few.shape(0) == (12, 8, 8) and esd.parts(config).model(few_batch(few)).shape == (1, 4, 4, 4)


def few_batch(samples):
    import torch

    with splits.test_split_open():
        return torch.from_numpy(samples.image(0).astype(np.float32))[None]


@pytest.mark.row("E24")
@pytest.mark.parametrize(
    ("bands", "problem"),
    [
        ({"sentinel2": ("4",)}, "sentinel2 has no band '4'; its bands are 01, 02"),
        ({"sentinel1": ("VV", "VV")}, "expected each band once"),
    ],
)
def test_bands_that_there_are_none_of_are_refused(bands, problem):
    with pytest.raises(ValueError, match=f"selected_bands: .*{problem}"):
        Bands(**bands)
    with pytest.raises(ValueError, match="no satellite 'sentinel3'; here are viirs"):
        satellites.check_selected({"sentinel3": ("1",)})


@pytest.mark.row("E42")
def test_float16_takes_half_the_room_and_is_the_same_rounded(three, done, loaded, tmp_path):
    small = loaded[1]
    large, _ = dataset.load(of(three, tmp_path, storage="float32"))
    with splits.test_split_open():
        assert large.image(3).dtype == np.float32 and large.image(3).nbytes == 2 * small.image(3).nbytes
        np.testing.assert_allclose(small.image(3), large.image(3), rtol=0, atol=6e-4)
    subtile, other = (next(folder.rglob("Tile1_1_1.npz")) for folder in (tmp_path, done))
    assert subtile.stat().st_size > 1.4 * other.stat().st_size


@pytest.mark.row("E42")
def test_one_tile_is_processed_at_a_time_as_samples_are_asked_for(raw, tmp_path):
    data = Data(root=str(raw), processed=str(tmp_path))
    found = dataset.decode(data, dataset.find(data))
    assert [next(found).group for _ in range(16)] == ["Tile1"] * 16
    assert [path.stem for path in (tmp_path / "4x4/tiles").glob("*.json")] == ["Tile1"]
    assert next(found).group == "Tile2"
    found.close()


# --- processed folders as they come


@pytest.fixture
def two(done, tmp_path):
    """A processed folder as the original makes them: Train and Val, and nothing else."""
    for split, name in (("Train", "Train"), ("Val", "Val"), ("Test", "Train")):
        for kind in ("subtiles", "metadata"):
            (tmp_path / "two" / name / kind).mkdir(parents=True, exist_ok=True)
            for path in (done / split / kind).iterdir():
                shutil.copy(path, tmp_path / "two" / name / kind)
    return tmp_path / "two"


@pytest.mark.row("E19", "E17")
def test_the_folders_of_a_processed_root_are_its_splits(two, done, loaded):
    data = Data(root=str(two))
    manifest = dataset.manifest(data)
    assert manifest["form"] == "processed" and manifest["groups"]["test"] == 0
    assert sum(manifest["groups"].values()) == 6 and manifest["samples"]["train"] == 16 * manifest["groups"]["train"]
    assert manifest["warnings"] == [
        "there is no tile in split test: nothing that is trained can be tested; set data.folders=false"
    ]
    samples, made = dataset.load(data)
    assert {samples.groups[index] for index in made.validation} == {
        path.stem[:5] for path in two.glob("Val/subtiles/*")
    }
    assert dataset.pieces(data) == dataset.process(data, NAMES) == []
    with splits.test_split_open():
        for index, name in enumerate(samples.names):
            assert np.array_equal(samples.image(index), loaded[1].image(loaded[1].names.index(name)))
    with_test = dataset.manifest(Data(root=str(done.parent)))
    assert with_test["groups"]["test"] >= 1 and with_test["warnings"] == []


@pytest.mark.row("E17", "E18")
def test_tiles_of_a_processed_root_may_be_dealt_anew(two, loaded):
    data = Data(root=str(two), folders=False)
    samples, made = dataset.load(data)
    _, expected = loaded[1:]
    assert [{samples.groups[i] for i in made[name]} for name in splits.NAMES] == [
        {expected.groups[i] for i in expected[name]} for name in splits.NAMES
    ]


def test_a_processed_root_that_is_not_whole_is_refused(two):
    def problem():
        with pytest.raises(DataError) as caught:
            dataset.load(Data(root=str(two)))
        return str(caught.value)

    first = sorted(two.glob("Train/subtiles/*.npz"))[5]
    tile = first.stem.partition("_")[0]
    kept = first.read_bytes()
    first.unlink()
    assert problem() == f"{two}: {first.stem} is missing; process {tile} again"
    first.write_bytes(kept)
    for kind, suffix in (("subtiles", "npz"), ("metadata", "json")):
        shutil.copy(two / "Train" / kind / f"{first.stem}.{suffix}", two / "Val" / kind)
    assert problem() == f"{two}: {tile} lies in Train and in Val; remove it from one"


def test_a_processed_root_of_another_size_is_refused(two):
    with pytest.raises(DataError, match=r"\.json: subtiles of 4 cells; set data\.tile_size_gt=4, or name"):
        dataset.load(Data(root=str(two), tile_size_gt=8))


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"gt": np.full((1, 1, 4, 4), 5, np.uint8)}, "gt holds other classes than 1, 2, 3 and 4"),
        ({"gt": np.ones((4, 4), np.uint8)}, r"gt is \(4, 4\); expected \(1, 1, 4, 4\)"),
        ({"landsat": np.zeros((3, 10, 8, 8))}, r"landsat is \(3, 10, 8, 8\); expected \(dates, 11, H, H\)"),
        ({"landsat": np.zeros((3, 11, 16, 16))}, r"landsat is \(3, 11, 16, 16\)"),
        ({"viirs": np.float32(1)}, r"viirs is \(\); expected"),
        ({"viirs": np.zeros((0, 1, 8, 8))}, r"viirs is \(0, 1, 8, 8\); expected"),
        ({"sentinel1": np.full((4, 2, 8, 8), np.nan)}, "sentinel1 holds other values than finite numbers"),
        ({"sentinel1": np.full((4, 2, 8, 8), "a")}, "sentinel1 holds other values than finite numbers"),
        ({"viirs_maxproj": None}, "has no 'viirs_maxproj', only gt, landsat"),
    ],
)
def test_arrays_of_another_kind_are_refused_by_file(two, changed, problem):
    path = sorted(two.glob("Val/subtiles/*.npz"))[0]
    with np.load(path) as stored:
        content = {**stored, **changed}
    np.savez(path, **{name: array for name, array in content.items() if array is not None})
    with pytest.raises(DataError, match=rf"{path}: {problem}.*process the tile again"):
        dataset.load(Data(root=str(two)))


# --- manifest and generated tiles


@pytest.mark.row("E17", "E24")
def test_the_manifest_tells_what_there_is(raw, loaded):
    data = loaded[0]
    told = dataset.manifest(data)
    assert (told["form"], told["group_key"], told["split_seed"]) == ("raw", "tile", 0)
    assert (told["sample_shape"], told["pixels_a_cell"], told["synthetic"]) == ([99, 8, 8], 2, False)
    assert told["samples"] == {name: 16 * count for name, count in told["groups"].items()}
    counts = np.sum([list(cells.values()) for cells in told["cells_of_class"].values()], axis=0)
    cells = np.stack([tifffile.imread(path) for path in raw.rglob("groundTruth.tif")])
    assert counts.tolist() == [(cells == label).sum() for label in (1, 2, 3, 4)]
    assert json.loads(json.dumps(told)) == told and told["warnings"] == []
    assert dataset.manifest(dataclasses.replace(data, split_seed=1))["sha256"] == told["sha256"]


def test_generated_data_are_told_as_such(tmp_path):
    told = dataset.manifest(Data(synthetic=dataclasses.replace(SMALL, tiles=3), cache=str(tmp_path)))
    assert told["synthetic"] and "3 generated tiles" in told["warnings"][0] and "set data.root" in told["warnings"][0]


@pytest.mark.row("E22")
def test_generated_tiles_have_all_classes_and_the_contests_files(raw):
    for name in NAMES:
        assert set(np.unique(tifffile.imread(raw / "Train" / name / "groundTruth.tif"))) == {1, 2, 3, 4}
    found = reader.find(raw)[0]
    assert {source.satellite.name: len(source.dates) for source in found.sources} == {
        satellite.name: satellite.dates for satellite in SATELLITES
    }
    assert len(found.files()) == len(list(found.folder.iterdir())) == 99
    assert found.sources[0].files[0][0].name == "DNB_VNP46A1_A2020212.tif"
    assert found.sources[3].files[0][0].name == "LC08_L1TP_2020-07-30_B1.tif"
    assert all(stack.dtype == np.uint16 and stack.any() for stack in reader.read(found).values())


def test_the_same_seed_gives_the_same_files(raw, tmp_path):
    def files(seed):
        generator.write_tile(dataclasses.replace(SMALL, seed=seed), 2, tmp_path / str(seed))
        return {path.name: path.read_bytes() for path in (tmp_path / str(seed)).iterdir()}

    stored = {path.name: path.read_bytes() for path in (raw / "Train/Tile2").iterdir()}
    other = files(1)
    assert files(0) == stored and other.keys() == stored.keys()
    assert not any(other[name] == stored[name] for name in stored)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"tiles": 2}, "tiles: got 2; expected at least 3"),
        ({"pixels": 1}, "pixels: got 1; expected at least 2"),
        ({"contrast": 0.0}, "contrast: got 0"),
        ({"clouds": 1.0}, "clouds: got 1"),
    ],
)
def test_impossible_settings_are_refused(values, problem):
    with pytest.raises(ValueError, match=problem):
        Synthetic(**values)


def test_houses_are_bright_to_radar_and_lamps_to_viirs_alone():
    config = Synthetic(tiles=3, pixels=8, clouds=0.0)
    land = generator.make_land(config, np.random.default_rng(0))
    seen = dict(generator.pictures(config, land, np.random.default_rng(1)))
    cell = {name: values.reshape(16, 8, 16, 8).mean(axis=(1, 3)) for name, values in seen.items()}
    lit, settled = np.isin(land.labels, (3, 4)), np.isin(land.labels, (1, 3))
    radar, night = (next(cell[name] for name in cell if name.startswith(start)) for start in ("S1A", "DNB"))
    assert radar[settled].mean() > 1.3 * radar[~settled].mean()
    assert night[lit].mean() > 2 * night[~lit].mean()


def test_a_target_of_another_storage_or_size_has_another_mark(raw, tmp_path):
    tile = reader.find_tile(raw / "Train/Tile1")
    targets = [Target(tmp_path, size, storage, tmp_path) for size in (4, 8) for storage in ("float16", "float32")]
    assert len({processed.mark_of(tile, target) for target in targets}) == 4
