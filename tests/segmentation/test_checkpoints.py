"""A checkpoint gives back what was saved, or says what is wrong with it."""

import json

import pytest
import torch
from torch import nn

from segmentation import checkpoints
from segmentation.checkpoints import CheckpointError, load_state, load_weights, read_meta, save
from segmentation.epoch import DataError
from segmentation.networks.tinyunet import TinyUNet


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyUNet(base=4).eval()


@pytest.fixture
def folder(tmp_path, model):
    save(tmp_path / "best", model=model, meta={"workload": "toy", "epoch": 3}, state={"step": 7, "t": torch.ones(2)})
    return tmp_path / "best"


def test_saved_weights_give_the_same_logits(folder, model):
    other, image = TinyUNet(base=4).eval(), torch.randn(1, 1, 16, 16)
    assert not torch.equal(other(image), model(image))
    load_weights(folder, other)
    assert torch.equal(other(image), model(image))


def test_meta_and_state_come_back(folder):
    meta, state = read_meta(folder), load_state(folder)
    assert (meta["workload"], meta["epoch"], meta["format"]) == ("toy", 3, checkpoints.FORMAT)
    assert meta["versions"]["torch"] == str(torch.__version__)
    assert state["step"] == 7
    assert torch.equal(state["t"], torch.ones(2))
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoint.json", "state.pt", "weights.safetensors"]


def test_saving_again_replaces_and_the_digest_follows_the_weights(folder, model):
    first = checkpoints.digest(folder)
    save(folder, model=model, meta={}, state={})
    assert checkpoints.digest(folder) == first
    nn.init.zeros_(model.outc.bias)
    save(folder, model=model, meta={}, state={})
    assert checkpoints.digest(folder) != first


def test_a_checkpoint_without_state_cannot_be_gone_on_from(tmp_path, model):
    save(tmp_path, model=model, meta={}, state={})
    with pytest.raises(CheckpointError, match=r"no state\.pt"):
        load_state(tmp_path)


def test_an_empty_folder_is_no_checkpoint(tmp_path, model):
    with pytest.raises(CheckpointError, match=r"checkpoint\.json is missing"):
        load_weights(tmp_path, model)


@pytest.mark.parametrize("name", ["weights.safetensors", "state.pt"])
@pytest.mark.parametrize("how", ["cut", "changed", "gone"])
def test_damaged_files_are_found_out(folder, model, name, how):
    path, load = (
        folder / name,
        (lambda: load_weights(folder, model)) if "weights" in name else lambda: load_state(folder),
    )
    content = path.read_bytes()
    if how == "gone":
        path.unlink()
    else:
        path.write_bytes(content[:-9] if how == "cut" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=name):
        load()


def test_a_mixture_of_two_checkpoints_is_found_out(folder, tmp_path, model):
    nn.init.zeros_(model.outc.bias)
    save(tmp_path / "other", model=model, meta={}, state={})
    (folder / "weights.safetensors").write_bytes((tmp_path / "other" / "weights.safetensors").read_bytes())
    with pytest.raises(CheckpointError, match="half overwritten"):
        load_weights(folder, model)


def test_unreadable_meta_is_named(folder, model):
    (folder / "checkpoint.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: damaged"):
        load_weights(folder, model)


def test_weights_of_another_network_are_refused_by_name(folder):
    with pytest.raises(CheckpointError, match=r"outc\.weight is \(3, 4, 1, 1\) instead of \(2, 4, 1, 1\)"):
        load_weights(folder, TinyUNet(classes=2, base=4))
    with pytest.raises(CheckpointError, match=r"weight is missing; bias is missing; .* and 41 more"):
        load_weights(folder, nn.Linear(2, 2))


@pytest.mark.row("A36")
def test_only_the_rows_asked_for_stay_fresh(folder, model):
    torch.manual_seed(5)
    other = TinyUNet(base=4)
    fresh = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    load_weights(folder, other, fresh_rows={"outc": (2,)})
    for name, tensor in other.state_dict().items():
        saved = model.state_dict()[name]
        if name.startswith("outc"):
            assert torch.equal(tensor[:2], saved[:2])
            assert torch.equal(tensor[2], fresh[name][2])
            assert not torch.equal(tensor[2], saved[2])
        else:
            assert torch.equal(tensor, saved)


@pytest.mark.row("A8")
def test_weights_under_the_key_of_another_programs_file_load_strictly(tmp_path, model):
    torch.save({"epoch": 3, "model": model.state_dict(), "optimizer": {}}, tmp_path / "last.pt")
    other, image = TinyUNet(base=4).eval(), torch.randn(1, 1, 16, 16)
    checkpoints.fill(other, checkpoints.torch_weights(tmp_path / "last.pt", "model"), source="last.pt")
    assert torch.equal(other(image), model(image))
    with pytest.raises(CheckpointError, match="no key 'net'; it has epoch, model, optimizer"):
        checkpoints.torch_weights(tmp_path / "last.pt", "net")


def test_a_file_that_would_run_code_is_refused(tmp_path, model):
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="not a file of tensors"):
        checkpoints.torch_weights(tmp_path / "whole.pt")


def test_a_folder_that_cannot_be_written_is_named(tmp_path, model):
    blocked = tmp_path / "weights.safetensors"
    blocked.mkdir()
    (blocked / "x").touch()
    with pytest.raises(DataError, match=r"weights\.safetensors: cannot be written"):
        save(tmp_path, model=model, meta={}, state={})
    assert [path.name for path in tmp_path.iterdir()] == ["weights.safetensors"]


def test_meta_is_plain_json(folder):
    assert json.loads((folder / "checkpoint.json").read_text())["files"]["state.pt"]["bytes"] > 0
