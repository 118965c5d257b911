"""Which strips a folder holds, in Kaggle's or Supervisely's form, what is refused, and which strips are the same."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from segmentation import splits
from segmentation.epoch import DataError
from workloads._severstal import annotations, duplicates, generator, reader
from workloads._severstal.annotations import TITLES, encode_runs
from workloads._severstal.generator import Synthetic
from workloads._severstal.reader import find, read_mask

SMALL = Synthetic(samples=16, width=256, height=64, form="both")
MASK = np.zeros((4, 6, 8), np.uint8)
MASK[0, 2:4, 1:4] = MASK[2, 0, 5:] = 1


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    return generator.ensure(SMALL, tmp_path_factory.mktemp("generated"))


def _picture(path: Path, size=(8, 6)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, 90).save(path)
    return path


def _kaggle(root: Path, *lines, header="ImageId,ClassId,EncodedPixels", names=("a.jpg", "b.jpg", "c.jpg")) -> Path:
    """Write train.csv of these lines and pictures of these names."""
    for name in names:
        _picture(root / "train_images" / name)
    (root / "train.csv").write_text("\n".join([header, *lines, ""]))
    return root


def _supervisely(home: Path, *names, mask=MASK) -> Path:
    """Write pictures of these names and their annotations."""
    (home / "ann").mkdir(parents=True, exist_ok=True)
    for name in names:
        _picture(home / "img" / name)
        (home / "ann" / f"{name}.json").write_text(json.dumps(annotations.annotation(mask)))
    return home


def _names(found):
    return [source.name for source in found.sources]


def _changed(path: Path, change) -> None:
    """Change the JSON content of a file."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


# One set in two forms


@pytest.mark.row("S23")
def test_the_same_strips_have_the_same_masks_in_both_forms(both):
    kaggle, supervisely = (find(both, form) for form in ("kaggle", "supervisely"))
    assert _names(kaggle) == _names(supervisely) == [generator.name_of(number) for number in range(16)]
    for number, (first, second) in enumerate(zip(kaggle.sources, supervisely.sources, strict=True)):
        mask = read_mask(first)
        assert mask.dtype == np.uint8 and mask.shape == (4, 64, 256)
        assert np.array_equal(mask, generator.strip(SMALL, number).mask)
        assert np.array_equal(mask, read_mask(second))
        shown = set(np.flatnonzero(mask.any(axis=(1, 2))))
        assert reader.classes_of(first) == reader.classes_of(second) == shown


@pytest.mark.shared_data
def test_shared_strips_have_the_same_masks_in_both_forms(shared_data):
    kaggle, supervisely = (find(shared_data / "steel", form).sources for form in ("kaggle", "supervisely"))
    assert len(kaggle) == 40
    for first, second in zip(kaggle, supervisely, strict=True):
        mask = read_mask(first)
        assert first.name == second.name and mask.any()
        assert np.array_equal(mask, read_mask(second))


@pytest.mark.row("S23")
def test_classes_are_merged_to_defect_and_background():
    assert np.array_equal(reader.merged(MASK), MASK[0] | MASK[2])
    assert reader.merged(MASK).dtype == np.uint8


def test_a_folder_in_both_forms_is_refused_until_one_is_chosen(both):
    message = r"both forms, kaggle \(train\.csv\) and supervisely \(supervisely/img\); set data\.form to one of them"
    with pytest.raises(DataError, match=message):
        find(both)


@pytest.mark.parametrize("form", ["kaggle", "supervisely"])
def test_the_form_is_found_and_another_choice_refused(tmp_path, form):
    if form == "kaggle":
        _kaggle(tmp_path, "a.jpg,1,1 2")
    else:
        _supervisely(tmp_path, "a.jpg")
    assert find(tmp_path).form == form
    other = {"kaggle": "supervisely", "supervisely": "kaggle"}[form]
    with pytest.raises(DataError, match=f"holds nothing in the form '{other}', which was chosen; expected train.csv"):
        find(tmp_path, other)


def test_listing_reads_no_pixel_and_no_annotation(tmp_path, monkeypatch):
    _kaggle(tmp_path / "k", "a.jpg,1,1 2")
    _supervisely(tmp_path / "s", "a.jpg")
    monkeypatch.setattr(Image, "open", None)
    monkeypatch.setattr(json, "loads", None)
    assert len(find(tmp_path / "k").sources) == 3
    assert len(find(tmp_path / "s").sources) == 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            shutil.rmtree,
            "no such folder; data.root should hold train.csv and train_images/, or img/ and ann/, or train",
        ),
        (lambda root: None, "holds none of the known layouts; expected train.csv and train_images/"),
        (lambda root: [(root / name).mkdir() for name in ("img", "ann")], "holds no strip; expected"),
        (lambda root: (root / "img").mkdir(), "ann: no such folder; it should hold an annotation such as a.jpg.json"),
        (lambda root: (root / "train.csv").touch(), "train_images: no such folder; it should hold the strips"),
        (lambda root: _picture(root / "train_images" / "a.jpg"), "train.csv: no such file; expected columns ImageId, "),
    ],
)
def test_a_folder_without_strips_is_refused(tmp_path, make, message):
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        find(tmp_path)


# Kaggle's table


def test_rows_become_channels_and_a_picture_without_one_is_clean(tmp_path):
    found = find(
        _kaggle(tmp_path, f"a.jpg,1,{encode_runs(MASK[0])}", f"a.jpg,3,{encode_runs(MASK[2])}", "b.jpg,2,48 1")
    )
    assert _names(found) == ["a.jpg", "b.jpg", "c.jpg"]
    assert np.array_equal(read_mask(found.sources[0]), MASK)
    assert read_mask(found.sources[1])[1, 5, 7] == 1
    assert not read_mask(found.sources[2]).any()
    assert [reader.classes_of(source) for source in found.sources] == [{0, 2}, {1}, set()]


def test_the_older_table_has_image_and_class_in_one_column_and_empty_cells(tmp_path):
    lines = [f"{name}_{number},{'1 2' if (name, number) == ('a_1.jpg', 2) else ''}" for name in ("a_1.jpg", "b.jpg")
             for number in (1, 2, 3, 4)]  # fmt: skip
    found = find(_kaggle(tmp_path, *lines, header="ImageId_ClassId,EncodedPixels", names=("a_1.jpg", "b.jpg")))
    assert [reader.classes_of(source) for source in found.sources] == [{1}, set()]
    assert read_mask(found.sources[0])[1, :2, 0].tolist() == [1, 1]


def test_a_byte_order_mark_and_long_cells_are_read(tmp_path):
    # More runs than the csv module takes by default: every second pixel of a column of 100,000.
    runs = " ".join(f"{start} 1" for start in range(1, 60_001, 2))
    _kaggle(tmp_path, f"a.jpg,4,{runs}", header="\ufeffImageId,ClassId,EncodedPixels")
    _picture(tmp_path / "train_images" / "a.jpg", (100, 1000))
    assert len(runs) > 131_072
    assert read_mask(find(tmp_path).sources[0])[3].sum() == 30_000


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["a.jpg,5,1 2"], "line 2: ClassId of a.jpg says '5'; expected a class from 1 to 4: declare it, or remove the"),
        (["a.jpg,1,1 2", "b.jpg,defect,1 2"], "line 3: ClassId of b.jpg says 'defect'; expected a class"),
        (["a.jpg,1,1 2", "a.jpg,1,5 2"], "line 3: a.jpg has class 1 in line 2 too; join them into one row"),
        ([",1,1 2"], "line 2: names no image; write its file name, or remove the row"),
        (["a.jpg"], "line 2: ClassId of a.jpg says ''"),
        ([], "holds no row; expected one for each class that a strip shows"),
    ],
)
def test_a_table_that_cannot_be_is_refused_with_its_line(tmp_path, lines, message):
    with pytest.raises(DataError, match=r"train\.csv: " + message):
        find(_kaggle(tmp_path, *lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"image,rle\na.jpg,1 2\n",
            "has columns image, rle; expected ImageId, ClassId, EncodedPixels, or ImageId_Clas",
        ),
        (b"", "has columns none; expected ImageId"),
        (b"ImageId,ClassId,EncodedPixels\n\xff\xfe,1,1 2\n", "cannot be read as CSV .*; save it as CSV in UTF-8"),
        (b"ImageId,ClassId,EncodedPixels\na.jpg,1," + b"1 " * 2**23, "cannot be read as CSV .*field larger"),
    ],
)
def test_a_file_that_is_no_such_table_is_refused(tmp_path, content, message):
    _kaggle(tmp_path)
    (tmp_path / "train.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"train\.csv: " + message):
        find(tmp_path)


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("1 2 5", "got 3 numbers, an odd count"),
        ("1 4 3 2", "runs '1 4' and '3 2' overlap"),
        ("48 2", "run '48 2' ends at pixel 49; the image is 8x6, 48 pixels"),
        ("0 1", "got run '0 1'; pixels and lengths are counted from 1"),
        ("one 1", "got 'one'; expected whole numbers"),
    ],
)
def test_run_lengths_that_cannot_be_name_file_line_image_and_class(tmp_path, runs, message):
    found = find(_kaggle(tmp_path, "b.jpg,1,1 2", f"a.jpg,3,{runs}"))
    with pytest.raises(DataError, match=r"train\.csv: line 3 \(a\.jpg, class 3\): " + message):
        read_mask(found.sources[0])


@pytest.mark.row("S22")
def test_rows_without_a_picture_are_all_listed(tmp_path, caplog):
    _kaggle(tmp_path, "a.jpg,1,1 2", *(f"x{number}.jpg,1,1 2" for number in range(8)), "../train.csv,1,1 2")
    listed = ["train_images/../train.csv", *(f"train_images/x{number}.jpg" for number in range(8))]
    with pytest.raises(DataError, match="9 files are missing, whose other halves are there: ") as error:
        find(tmp_path)
    assert ", ".join(listed) in str(error.value)
    assert "add them, or move their other halves away" in str(error.value)
    found = find(tmp_path, strict=False)
    assert _names(found) == ["a.jpg", "b.jpg", "c.jpg"]
    assert list(found.missing) == listed
    assert ", ".join(listed) in caplog.text


def test_a_table_of_other_pictures_is_refused_whether_strict_or_not(tmp_path):
    # Else all of them would be taken for clean.
    with pytest.raises(DataError, match="1 files are missing"):
        find(_kaggle(tmp_path, "a.png,1,1 2"), strict=False)


# Supervisely's folders


@pytest.mark.row("S22")
@pytest.mark.parametrize("place", ["", "supervisely", "raw/severstal"])
def test_pairs_are_found_by_the_name_of_the_picture_with_its_suffix(tmp_path, place):
    _supervisely(tmp_path / place, "b.jpg", "a.jpg", "a.png")
    (tmp_path / place / "img" / ".hidden.jpg").touch()
    found = find(tmp_path)
    assert _names(found) == ["a.jpg", "a.png", "b.jpg"]
    assert found.sources[0].mask == reader.Bitmaps(tmp_path / place / "ann" / "a.jpg.json")
    assert {source.part for source in found.sources} == {""}
    assert np.array_equal(read_mask(found.sources[0]), MASK)


def test_splits_are_told_and_what_they_were_made_from_is_left_alone(tmp_path):
    for folder, name in (("train_split", "b.jpg"), ("val_split", "a.jpg"), ("test_split", "c.jpg")):
        _supervisely(tmp_path / folder, name)
    _supervisely(tmp_path / "raw/severstal", "a.jpg", "b.jpg", "c.jpg")
    parts = [(source.name, source.part) for source in find(tmp_path).sources]
    assert parts == [("a.jpg", "validation"), ("b.jpg", "train"), ("c.jpg", "test")]


def test_a_strip_in_two_splits_is_refused(tmp_path):
    _supervisely(tmp_path / "train_split", "a.jpg", "b.jpg")
    _supervisely(tmp_path / "test_split", "a.jpg")
    with pytest.raises(DataError, match=r"1 strips stand in two splits: a\.jpg; keep each in one, or rename it"):
        find(tmp_path)


def test_two_places_below_one_root_are_refused(tmp_path):
    _supervisely(tmp_path, "a.jpg")
    _supervisely(tmp_path / "supervisely", "b.jpg")
    message = "holds strips in img and in supervisely/img; set data.root so that it holds one"
    with pytest.raises(DataError, match=message):
        find(tmp_path)


@pytest.mark.row("S22")
def test_missing_halves_are_all_listed_and_left_out_unless_strict(tmp_path, caplog):
    _supervisely(tmp_path, *(f"{letter}.jpg" for letter in "abcdefgh"))
    for letter in "abcdef":
        (tmp_path / "ann" / f"{letter}.jpg.json").unlink()
    (tmp_path / "img" / "g.jpg").unlink()
    (tmp_path / "ann" / "h.json").touch()
    listed = [*(f"ann/{letter}.jpg.json" for letter in "abcdef"), "img/g.jpg", "img/h"]
    with pytest.raises(DataError, match="8 files are missing, whose other halves are there: ") as error:
        find(tmp_path)
    assert ", ".join(listed) in str(error.value)
    found = find(tmp_path, strict=False)
    assert _names(found) == ["h.jpg"]
    assert list(found.missing) == listed
    assert "8 files are missing" in caplog.text and "left out" in caplog.text


def test_no_pair_at_all_is_refused_whether_strict_or_not(tmp_path):
    _supervisely(tmp_path, "a.jpg")
    (tmp_path / "ann" / "a.jpg.json").rename(tmp_path / "ann" / "a.json")
    with pytest.raises(DataError, match=r"ann/a\.jpg\.json, img/a;"):
        find(tmp_path, strict=False)


def test_an_annotation_of_another_size_is_refused_with_both_sizes(tmp_path):
    _supervisely(tmp_path, "a.jpg")
    _picture(tmp_path / "img" / "a.jpg", (16, 6))
    with pytest.raises(DataError, match=r"a\.jpg\.json: size is 8x6, its image is 16x6; they must be the same"):
        read_mask(find(tmp_path).sources[0])


def test_a_title_nobody_declared_is_refused_even_where_only_classes_are_asked_for(tmp_path):
    _supervisely(tmp_path, "a.jpg")
    _changed(tmp_path / "ann" / "a.jpg.json", lambda content: content["objects"][1].update(classTitle="rust"))
    source = find(tmp_path).sources[0]
    for ask in (read_mask, reader.classes_of):
        with pytest.raises(DataError, match=r"objects\[1\] \(id 3\): classTitle is 'rust'; expected one of defect_1, "):
            ask(source)
    assert reader.classes_of(source, [*TITLES, "rust"]) == {0, 4}


def test_files_are_each_named_once(both):
    kaggle, supervisely = (reader.files(find(both, form).sources) for form in ("kaggle", "supervisely"))
    assert len(kaggle) == 17 and both / "train.csv" in kaggle
    assert len(supervisely) == 32


# Duplicates


def _sources(*paths):
    return [reader.Source(f"{place:03}", path, "", reader.Runs(path, ())) for place, path in enumerate(paths)]


def _saved(pixels, path: Path, **options) -> Path:
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path, **options)
    return path


@pytest.mark.row("S48")
def test_duplicates_by_bytes_and_by_look_are_one_group_and_counted(tmp_path):
    config = Synthetic(samples=12, width=256, height=64, duplicates=4, seed=3)
    found = find(generator.ensure(config, tmp_path))
    groups = duplicates.group(found.sources)
    expected = [generator.name_of(generator.origin(config, number)) for number in range(12)]
    assert list(groups.names) == expected
    assert (groups.same_bytes, groups.same_look) == (2, 2)
    made = splits.split(_names(found), groups.names, fractions=(0.5, 0.25, 0.25))
    where = {made.names[index]: name for name in splits.NAMES for index in made[name]}
    assert all(where[generator.name_of(number)] == where[expected[number]] for number in range(12))


@pytest.mark.row("S48")
def test_clean_plates_of_one_steel_are_no_duplicates(tmp_path):
    # The same brightness, light and gap for all of them: only the grain is another.
    rows, columns = np.mgrid[:128, :800]
    light = 100 + 20 * np.sin(rows / 40) + columns / 20
    light[:, :100] = 3
    rng = np.random.default_rng(0)
    plates = [light + (light > 3) * rng.normal(0, 4, light.shape) for _ in range(12)]
    groups = duplicates.group(_sources(*(_saved(one, tmp_path / f"{n}.png") for n, one in enumerate(plates))))
    assert len(set(groups.names)) == 12


@pytest.mark.row("S48")
def test_plain_pictures_with_the_same_mark_in_a_corner_are_no_duplicates(tmp_path):
    plain = [np.full((256, 1600), grey) for grey in (90, 120)]
    for one in plain:
        one[4:40, 4:200] = 255
    first, second = (_saved(one, tmp_path / f"{place}.png") for place, one in enumerate(plain))
    hashes = [duplicates.difference_hash(path) for path in (first, second)]
    assert hashes[0].any() and np.array_equal(*hashes)
    assert duplicates.group(_sources(first, second)).same_look == 0


@pytest.mark.row("S48")
def test_pictures_without_any_feature_are_duplicates_by_their_bytes_alone(tmp_path):
    flat = [_saved(np.full((64, 256), grey), tmp_path / f"{place}.png") for place, grey in enumerate((90, 120, 90))]
    groups = duplicates.group(_sources(*flat))
    assert groups.names == ("000", "001", "000")
    assert (groups.same_bytes, groups.same_look) == (1, 0)


@pytest.mark.row("S48")
@pytest.mark.parametrize("number", range(2))
def test_a_strip_looks_like_itself_however_it_was_saved(tmp_path, number):
    shown = generator.strip(Synthetic(), number).image
    picture = Image.fromarray(shown)
    first = duplicates.difference_hash(_saved(shown, tmp_path / "a.png"))
    changed = {
        "compressed": _saved(shown, tmp_path / "b.jpg", quality=50),
        "brighter": _saved(ImageEnhance.Brightness(picture).enhance(1.2), tmp_path / "c.png"),
        "half": _saved(picture.resize((800, 128)), tmp_path / "d.png"),
    }
    for path in changed.values():
        assert duplicates.likeness(first, duplicates.difference_hash(path)) > duplicates.ALIKE + 0.3
    moved = _saved(np.roll(shown, 16, axis=1), tmp_path / "e.png")
    mirrored = _saved(shown[:, ::-1], tmp_path / "f.png")
    for path in (moved, mirrored):
        assert duplicates.likeness(first, duplicates.difference_hash(path)) < duplicates.ALIKE - 0.1


@pytest.mark.row("S48")
def test_chains_of_likeness_are_one_group_over_blocks(monkeypatch):
    rng = np.random.default_rng(0)
    hashes = rng.choice(np.array([-1, 1], np.int8), (7, duplicates.GRID[0] * duplicates.GRID[1]))
    # 0 is like 3, and 3 like 6, of which 0 shares too little.
    hashes[3, :1000], hashes[6, 600:] = hashes[0, :1000], hashes[3, 600:]
    monkeypatch.setattr(duplicates, "BLOCK", 2)
    monkeypatch.setattr(duplicates, "_hashes", lambda paths: hashes)
    assert set(duplicates._alike(hashes)) == {(0, 3), (3, 6)}
    assert duplicates._by_look([Path()] * 7) == [0, 1, 2, 0, 4, 5, 0]


@pytest.mark.row("S48")
@pytest.mark.shared_data
def test_shared_strips_are_no_duplicates_of_each_other(shared_data):
    groups = duplicates.group(find(shared_data / "steel", "kaggle").sources)
    assert len(set(groups.names)) == 40
    assert (groups.same_bytes, groups.same_look) == (0, 0)


def test_a_picture_that_cannot_be_read_is_named(tmp_path):
    path = _picture(tmp_path / "a.jpg")
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.jpg: unreadable or truncated"):
        duplicates.group(_sources(path))
