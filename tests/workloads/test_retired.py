"""Checkpoints, runs and parents made before a key of the configuration went."""

import json

import pytest

import configuration
from configuration import ConfigError
from segmentation import checkpoints
from workloads import __main__ as command
from workloads import pairs

VALUES = ("preset=debug", "epochs=1", "device=cpu")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose configuration has every key that is retired, as it had when it was made."""
    folder = tmp_path_factory.mktemp("run") / "old"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEGMENTATION_CACHE", str(folder.parent / "cache"))
        flags = [part for value in VALUES for part in ("--set", value)]
        assert command.main(["train", "pairs", *flags, "--out", str(folder)]) == 0
        for path in (folder / "run.json", *folder.glob(f"*/{checkpoints.META_FILE}")):
            record = json.loads(path.read_text())
            record["config"] |= dict.fromkeys(configuration.RETIRED, False)
            path.write_text(json.dumps(record))
        yield folder


def test_retired_keys_are_no_keys_of_a_configuration():
    known = configuration.fields(pairs.Config)
    for key in configuration.RETIRED:
        assert configuration.find(known, key) is None
        with pytest.raises(ConfigError, match=f"{key}: unknown key"):
            configuration.build(pairs.Config, {key: False})


def test_an_old_checkpoint_is_loaded(run):
    config, _, _ = pairs.load(run / "best", {"device": "cpu"})
    assert config.network == pairs.Config.debug().network


def test_an_old_run_goes_on(run):
    assert command.main(["train", "pairs", "--resume", "--set", "epochs=2", "--out", str(run)]) == 0
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert not set(configuration.RETIRED) & json.loads((run / "run.json").read_text())["config"].keys()


def test_an_old_checkpoint_may_be_a_parent(run):
    config = configuration.build(pairs.Config, {"preset": "debug", "epochs": 1, "parent": str(run)})
    (metrics,) = [epoch.metrics for epoch in pairs.train(config)]
    assert 0 <= metrics["val_mean_iou"] <= 1
