"""Names that lead out of their folder, and weights that hold code: refused, nothing read elsewhere, nothing run."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import durable
from search import service
from search.record import StudyPaths
from search.results import leaderboard, report
from segmentation import checkpoints, splits
from segmentation.checkpoints import CheckpointError
from segmentation.epoch import DataError
from segmentation.pruning import PlanError, plan
from tests.security.conftest import Within
from workloads._esd import processed, reader, subtiles
from workloads._spark import training_files
from workloads._telescope import transfer

SECRET = b"not of this folder"
OUTSIDE = {
    "one up": "../secret",
    "up by a detour": "inside/../../secret",
    "round about": "inside/../weights",
    "absolute": "{outside}/secret",
    "absolute, two slashes": "/{outside}/secret",
    "another spelling": "./weights",
    "windows, one up": "..\\secret",
    "windows, a drive": "C:\\secret",
    "windows, a drive's folder": "C:secret",
    "windows, a server": "\\\\server\\secret",
    "a zero byte": "weights\0",
    "a line break": "weights\n",
    "nothing": "",
    "the folder": ".",
    "a link": "link",
    "below a link": "linked/secret",
    "a pipe": "pipe",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a secret beside it, and links and a pipe inside."""
    folder = tmp_path / "folder"
    (folder / "inside").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(SECRET)
    for name in ("weights", "..\\secret", "C:\\secret", "C:secret", "\\\\server\\secret", "weights\n"):
        (folder / name).write_bytes(SECRET)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "linked").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    return folder


@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.row("N2")
def test_a_manifest_vouches_for_plain_files_of_its_folder_only(folder: Path, within: Within, case: str) -> None:
    name = OUTSIDE[case].format(outside=folder.parent)
    size = 0 if case == "a pipe" else len(SECRET)
    plain = {"size": len(SECRET), "sha256": hashlib.sha256(SECRET).hexdigest()}
    (folder / durable.MANIFEST).write_text(json.dumps({"weights": plain}))
    assert durable.sealed(folder) is not None
    (folder / durable.MANIFEST).write_text(json.dumps({"weights": plain, name: {**plain, "size": size}}))
    with within(seconds=1, megabytes=200):
        assert durable.sealed(folder) is None


@pytest.mark.parametrize("text", ["[]", "{", "1", '{"weights": 1}', '{"weights": {"size": 18}}', "[" * 100_000])
def test_a_manifest_of_another_form_vouches_for_nothing(folder: Path, within: Within, text: str) -> None:
    (folder / durable.MANIFEST).write_text(text)
    with within(seconds=1, megabytes=200):
        assert durable.sealed(folder) is None


@pytest.mark.parametrize("name", ["weights", "inside/a", "a b", "ä.png", "TOD_1.ar5:f090.png", "..a", "a..b"])
def test_plain_names_are_below_their_folder(tmp_path: Path, name: str) -> None:
    assert durable.below(tmp_path, name) == tmp_path / name
    assert durable.below(tmp_path, None) is durable.below(tmp_path, 3) is None


def test_a_linked_folder_is_below_where_links_may_be(folder: Path) -> None:
    assert durable.below(folder, "linked/secret", links=True) == folder / "linked" / "secret"
    assert durable.below(folder, "linked/../secret", links=True) is None


def test_the_report_embeds_no_picture_from_elsewhere(tmp_path: Path, leaderboard_row: Any) -> None:
    paths = StudyPaths(tmp_path / "study")
    paths.evaluation("1").mkdir(parents=True)
    (paths.evaluation("1") / "a.png").write_bytes(b"mine")
    (tmp_path / "secret.png").write_bytes(SECRET)
    (paths.evaluation("1") / "link.png").symlink_to(tmp_path / "secret.png")
    names = ["a.png", "../../../secret.png", str(tmp_path / "secret.png"), "link.png"]
    shown = report._examples(paths, [leaderboard_row(figures=names)])
    assert [bool(example["source"]) for example in shown] == [True, *[False] * (len(shown) - 1)]
    assert len(shown) > 1 and shown[1]["left_out"] == "../../../secret.png is missing"


def test_models_are_copied_from_the_study_only(tmp_path: Path, leaderboard_row: Any) -> None:
    paths = StudyPaths(tmp_path / "study")
    for name in ("elsewhere", "study/trials/1", "study/models"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "weights").write_bytes(SECRET)
    for name in ("../elsewhere", str(tmp_path / "elsewhere")):
        service._write_models(paths, [leaderboard_row(checkpoint=name)])
        assert not paths.model("1").exists()
    service._write_models(paths, [leaderboard_row(checkpoint="trials/1")])
    assert (paths.model("1") / "weights").read_bytes() == SECRET


@pytest.fixture
def leaderboard_row() -> Callable[..., leaderboard.Row]:
    def made(checkpoint: str = "", figures: Any = ()) -> leaderboard.Row:
        none = leaderboard.Interval(None)
        facts: dict[str, Any] = {"params": {}, "validation": {}, "metric": "m", "test": none, "difference": none}
        content = {"figures": list(figures)}
        return leaderboard.Row(
            rank=1, trial=1, name="1", role="promoted", epochs=1, slot_s=1.0, checkpoint=checkpoint,
            evaluation=content, **facts,
        )  # fmt: skip

    return made


class Trap:
    """Makes a folder when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.mark),)


def trapped(mark: Path) -> dict[str, bytes]:
    """Return files that run code when they are read as they should not be, and some that are only broken."""
    new, old, swollen = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"model": Trap(mark)}, new)
    torch.save({"model": Trap(mark)}, old, _use_new_zipfile_serialization=False)
    plain = io.BytesIO()
    torch.save({"model": torch.zeros(10_000_000)}, plain)
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(swollen, "w", zipfile.ZIP_DEFLATED) as target:
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    return {
        "torch.save": new.getvalue(),
        "torch.save of old": old.getvalue(),
        "pickle": pickle.dumps(Trap(mark)),
        "pickle 0": pickle.dumps(Trap(mark), protocol=0),
        "pickle in a dict": pickle.dumps({"model": Trap(mark)}),
        "numpy": _numpy(Trap(mark)),
        "a bomb": swollen.getvalue(),
        "cut": new.getvalue()[:200],
        "empty": b"",
        "text": b"import os\n",
        "a loop": b"\x80\x02" + b"]q\x00h\x00a" * 3,
    }


KINDS = (
    "torch.save",
    "torch.save of old",
    "pickle",
    "pickle 0",
    "pickle in a dict",
    "numpy",
    "a bomb",
    "cut",
    "empty",
    "text",
    "a loop",
)


@pytest.fixture(scope="module")
def traps(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bytes], Path]:
    mark = tmp_path_factory.mktemp("traps") / "mark"
    content = trapped(mark)
    assert tuple(content) == KINDS
    return content, mark


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.row("N2")
def test_weights_that_hold_code_are_refused_and_it_does_not_run(
    tmp_path: Path, within: Within, traps: Any, kind: str
) -> None:
    content, mark = traps
    readers: dict[str, Callable[[Path], Any]] = {
        "a.pt": lambda path: checkpoints.torch_weights(path, "model"),
        "a.ckpt": transfer.weights,
        "b.pt": training_files.load_model,
        "a.safetensors": checkpoints.safetensors_weights,
    }
    for name, read in readers.items():
        (tmp_path / name).write_bytes(content[kind])
        with within(seconds=1, megabytes=200), pytest.raises(CheckpointError, match=name):
            read(tmp_path / name)
    assert not mark.exists()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.row("N2")
def test_a_state_that_holds_code_is_refused_though_its_hash_is_right(
    tmp_path: Path, within: Within, traps: Any, kind: str
) -> None:
    content, mark = traps
    model = torch.nn.Linear(1, 1)
    checkpoints.save(tmp_path, model=model, meta={}, state={"a": 1})
    assert checkpoints.load_state(tmp_path) == {"a": 1}
    (tmp_path / checkpoints.STATE_FILE).write_bytes(content[kind])
    meta = checkpoints.read_meta(tmp_path)
    told = {"bytes": len(content[kind]), "sha256": hashlib.sha256(content[kind]).hexdigest()}
    meta["files"][checkpoints.STATE_FILE] = told
    (tmp_path / checkpoints.META_FILE).write_text(json.dumps(meta))
    with within(seconds=1, megabytes=200), pytest.raises(CheckpointError, match=r"state\.pt"):
        checkpoints.load_state(tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "[]", "3", '{"a": ' * 50_000, "\ud800".encode("utf-8", "surrogatepass")]
)
def test_json_of_another_form_names_its_file(tmp_path: Path, within: Within, text: str | bytes) -> None:
    path = tmp_path / checkpoints.META_FILE
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    readers: tuple[tuple[Callable[[Path], Any], type[Exception]], ...] = (
        (durable.read_json, ValueError),
        (lambda path: checkpoints.read_meta(path.parent), CheckpointError),
        (splits.read, DataError),
        (plan.read, PlanError),
        (_note_of_subtile, DataError),
    )
    for read, error in readers:
        with within(seconds=1, megabytes=200), pytest.raises(error, match=r"checkpoint\.json: "):
            read(path)


@pytest.mark.parametrize("case", OUTSIDE)
@pytest.mark.row("N2")
def test_a_satellite_tile_is_named_as_its_files_are_and_nothing_is_read_elsewhere(
    folder: Path, within: Within, case: str
) -> None:
    note = {"parent_tile_id": OUTSIDE[case].format(outside=folder.parent), "x_gt": 0, "y_gt": 0, "subtile_size": 16}
    durable.write_json(folder / "Train" / subtiles.METADATA / "Tile1_0_0.json", note)
    durable.write(folder / "Train" / subtiles.SUBTILES / "Tile1_0_0.npz", SECRET)
    with within(seconds=1, megabytes=200), pytest.raises(DataError, match=r"Train/metadata/Tile1_0_0\.json: damaged"):
        processed.tiles_in(folder)
    durable.write_json(folder / "Train" / subtiles.METADATA / "Tile1_0_0.json", {**note, "parent_tile_id": "Tile1"})
    assert processed.tiles_in(folder) == {"Tile1": "train"}


@pytest.mark.parametrize("split", ["..", "{outside}", "", None, 3, ["Train"]])
@pytest.mark.row("N2")
def test_what_is_noted_of_a_done_tile_leads_to_no_other_folder(folder: Path, split: Any) -> None:
    split = split.format(outside=folder.parent) if isinstance(split, str) else split
    tile = reader.Tile("Tile1", folder, (), None)
    target = processed.Target(folder, 16, "float16", folder)
    durable.write_json(folder / processed.DONE / "Tile1.json", {"sha256": "", "split": split})
    for kind, name in ((subtiles.SUBTILES, "Tile1_0_0.npz"), (subtiles.METADATA, "Tile1_0_0.json")):
        durable.write(folder.parent / kind / name, SECRET)
    assert processed._note(tile, target) is None


def test_everything_is_loaded_by_what_runs_no_code() -> None:
    """A new reader that would run code is found here."""
    root = Path(durable.__file__).parent
    code = {
        path: path.read_text()
        for part in ("search", "segmentation", "workloads")
        for path in (root / part).rglob("*.py")
    }
    lines = [line for text in code.values() for line in text.splitlines()]
    loads = [line for line in lines if "torch.load(" in line]
    arrays = [line for line in lines if "np.load(" in line]
    assert loads and all("weights_only=True" in line for line in loads)
    assert arrays and all("allow_pickle=False" in line for line in arrays)
    forbidden = (
        "import pickle",
        "pickle.load",
        "cloudpickle",
        "joblib",
        "shelve",
        "marshal",
        "torch.jit.load",
        " eval(",
        " exec(",
    )
    assert [line for line in lines if any(word in line for word in forbidden)] == []


def _note_of_subtile(path: Path) -> Any:
    (path.parent / subtiles.METADATA).mkdir(exist_ok=True)
    shutil.copy(path, path.parent / subtiles.METADATA)
    return subtiles.load_metadata(path.parent, path.stem)


def _numpy(trap: Trap) -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array([trap], dtype=object), allow_pickle=True)
    return stream.getvalue()
