"""The schema of search spaces: what editors refuse, the search refuses too."""

import copy
import json
import re

import pytest
import yaml
from jsonschema import Draft202012Validator

from search import schema, spec_file
from search.errors import SpecError
from tests.conftest import ROOT

FOLDER = ROOT / spec_file.FOLDER
SPACES = sorted(FOLDER.glob("*.yaml"))
LR = {"type": "float", "low": 1e-4, "high": 1e-2}
MINIMAL = {"workload": "pairs", "objective": {"metric": "val_mean_iou"}, "parameters": {"lr": LR}}
SPACE = {
    "workload": "pairs",
    "objective": {"metric": "val_mean_iou", "mode": "max"},
    "parameters": {
        "lr": {"type": "float", "low": 1e-3, "high": 3e-2, "log": True},
        "batch_size": {"type": "categorical", "choices": [4, 8, 16]},
        "loss.dice": {"type": "float", "low": 0.0, "high": 1.0},
    },
    "fixed": {"network.name": "tinyunet", "epochs": 15},
    "data": {"tile": 64},
    "search": {"trials": 16, "seed": 0},
    "stopping": {"rule": "asha", "min_epochs": 2, "reduction": 3},
    "promotion": {"k": 2},
}
ABSENT = object()


@pytest.fixture(scope="module")
def made():
    return schema.schema()


@pytest.fixture(scope="module")
def validator(made):
    return Draft202012Validator(made)


def changed(content, path, value):
    """Return a copy in which the place that a path of keys names has another value."""
    content = copy.deepcopy(content)
    *above, last = path
    section = content
    for key in above:
        section = section.setdefault(key, {})
    if value is ABSENT:
        del section[last]
    else:
        section[last] = value
    return content


def load(content, folder):
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(content))
    return spec_file.load(str(path))


def test_the_committed_schema_is_current():
    found = (FOLDER / "schema.json").read_text()
    assert found == schema.text(), "search_spaces/schema.json is not current: run python -m search.schema"


def test_it_is_a_schema_and_the_text_holds_all_of_it(made):
    Draft202012Validator.check_schema(made)
    assert json.loads(schema.text()) == json.loads(json.dumps(made))


def test_every_reference_leads_somewhere(made):
    references = set(re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(made)))
    assert len(references) > 100
    for reference in references:
        place = made
        for key in reference.split("/"):
            place = place[key]


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.name)
def test_every_search_space_is_valid_and_names_the_schema(validator, path):
    text = path.read_text()
    assert text.startswith("# yaml-language-server: $schema=schema.json\n")
    assert not list(validator.iter_errors(yaml.safe_load(text)))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["fixed"], {"network": {"name": "unet"}, "loss.dice_empty": "legacy"}),
        (["fixed"], None),
        (["fixed"], {"preset": "debug", "network.name": "tinyunet"}),
        (["data"], {"fractions": [0.6, 0.2, 0.2]}),
        (["fixed", "data"], {"tile": 64}),
        (["parameters", "loss"], {"tversky": {"type": "float", "low": 0, "high": 1}}),
        (["parameters", "network"], {"name": {"choices": ["unet", "tinyunet"], "when": {"lr": 0.001}}}),
        (["parameters", "optimizer"], {"type": "categorical", "choices": ["adam", "sgd"]}),
        (["parameters", "data.channels"], {"type": "categorical", "choices": [1, 3]}),
        (["objective"], {"metric": "val_loss"}),
        (["objective"], [{"metric": "val_mean_iou", "mode": "max"}, {"metric": "val_loss", "mode": "min"}]),
        (["constraints"], ["lr * 2 <= 1"]),
        (["constraints"], ["params <= 0.5 * parent", "lr < 1 and gmacs < 0.9 * parent.gmacs"]),
        (["parent"], {"train": {"epochs": 6, "rewind_epoch": 2}}),
        (["parent"], {"train": {"network": {"name": "unet"}, "lr": 0.1}, "scan": False}),
        (["parent"], {"checkpoint": "runs/nuclei/models/best"}),
        (["parent"], {"study": "runs/nuclei"}),
        (["parent"], None),
        (["parameters", "prune.encoders.0"], {"type": "float", "low": 0, "high": 0.7}),
        (
            ["parameters", "prune"],
            {"encoders.0": {"type": "float", "low": 0, "high": 0.7}, "mode": {"choices": ["none"]}},
        ),
        (["parameters", "prune"], {"encoders": {"0": {"choices": [0.0, 0.5]}, "1": {"choices": [0.0, 0.5]}}}),
        (["fixed"], {"prune": {"encoders": {"0": 0.3}, "importance": "l2"}}),
        (["fixed"], {"prune.encoders.0": 0.3, "prune.bottleneck": 0}),
        (["stopping"], None),
        (["search", "wall_time_s"], 60),
        (["resources"], {"slots": "auto", "gpus_per_worker": 0.5}),
    ],
)
def test_what_the_search_accepts_is_valid(validator, tmp_path, path, value):
    content = changed(MINIMAL, path, value)
    assert load(content, tmp_path)
    assert not list(validator.iter_errors(content))


def test_the_space_that_mistakes_are_made_in_has_none(validator, tmp_path):
    assert load(SPACE, tmp_path)
    assert not list(validator.iter_errors(SPACE))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["workload"], ABSENT),
        (["workload"], "pears"),
        (["parameters"], ABSENT),
        (["parameters"], {}),
        (["paramters"], {}),
        (["objective"], "val_mean_iou"),
        (["objective"], []),
        (["objective", "metric"], "val_mean_io"),
        (["objective", "metric"], "test_mean_iou"),
        (["objective", "mode"], "maximum"),
        (["objective", "weight"], 1),
        (["parameters", "lrr"], LR),
        (["parameters", "loss"], {"dise": LR}),
        (["parameters", "lr", "low"], "1e-5"),
        (["parameters", "lr", "low"], ABSENT),
        (["parameters", "lr", "low"], 0.0),
        (["parameters", "lr", "step"], 0.1),
        (["parameters", "lr", "lo"], 0.1),
        (["parameters", "lr", "type"], "loguniform"),
        (["parameters", "lr", "log"], "yes"),
        (["parameters", "lr", "choices"], [0.1]),
        (["parameters", "lr"], [0.1, 0.2]),
        (["parameters", "loss.dice", "step"], 0),
        (["parameters", "loss.dice", "type"], ABSENT),
        (["parameters", "plateau_patience"], {"type": "float", "low": 1, "high": 5}),
        (["parameters", "plateau_patience"], {"type": "int", "low": 1.5, "high": 5}),
        (["parameters", "flips"], {"type": "int", "low": 0, "high": 1}),
        (["parameters", "flips"], {"choices": [0, 1]}),
        (["parameters", "optimizer"], {"choices": ["adam", "adamax"]}),
        (["parameters", "optimizer"], {"choices": []}),
        (["parameters", "batch_size", "choices"], [4, 4]),
        (["fixed", "epochs"], "15"),
        (["fixed", "epochs"], 1.5),
        (["fixed", "epoch"], 15),
        (["fixed", "network.nme"], "unet"),
        (["fixed", "network"], {"nme": "unet"}),
        (["fixed", "optimizer"], "adamm"),
        (["fixed", "flips"], "yes please"),
        (["fixed", "preset"], "tiny"),
        (["fixed", "data.fractions"], [0.5, 0.5]),
        (["fixed", "data.class_names"], "nucleus"),
        (["data", "til"], 64),
        (["data", "tile"], "64"),
        (["search", "trails"], 16),
        (["search", "trials"], 0),
        (["search", "trials"], "many"),
        (["search", "sampler"], "bayes"),
        (["stopping", "rule"], "hyperband"),
        (["stopping", "reduction"], 1),
        (["stopping"], ["asha"]),
        (["resources", "slots"], "all"),
        (["resources", "slots"], 0),
        (["promotion", "k"], 0),
        (["evaluation", "cpu"], 1),
        (["tracking", "wandb"], "on"),
        (["constraints"], "lr < 1"),
        (["parent"], "runs/nuclei"),
        (["parent"], {"chekpoint": "runs/nuclei"}),
        (["parent"], {"study": 3}),
        (["parameters", "prune.encoders.0"], {"type": "float", "low": "none", "high": 0.7}),
        (["parameters", "prune"], {"encoders.0": {"type": "float", "low": 0, "hihg": 0.7}}),
        (["parameters", "prune.mode"], {"choices": ["rewound"]}),
        (["fixed", "prune.encoders.0"], "much"),
        (["fixed", "prune"], {"encoders": {"0": [0.3]}}),
    ],
)
def test_mistakes_are_refused_by_the_schema_and_by_the_search(validator, tmp_path, path, value):
    content = changed(SPACE, path, value)
    assert list(validator.iter_errors(content)), "the schema accepts it"
    with pytest.raises(SpecError):
        load(content, tmp_path)


@pytest.mark.parametrize(
    "place",
    [{"data": {"classes": 2}}, {"fixed": {"data.classes": 2}}, {"fixed": {"data": {"classes": 2}}}],
    ids=["data", "dotted", "nested"],
)
def test_metrics_are_free_where_their_names_depend_on_a_value_that_is_set(validator, tmp_path, place):
    content = changed(MINIMAL, ["objective", "metric"], "val_iou_class1")
    assert list(validator.iter_errors(content))
    with pytest.raises(SpecError, match="val_iou_class1"):
        load(content, tmp_path)
    assert load({**content, **place}, tmp_path)
    assert not list(validator.iter_errors({**content, **place}))


def test_metrics_of_every_choice_are_listed(validator):
    content = yaml.safe_load((FOLDER / "telescope.yaml").read_text())
    for metric in ("iou_el", "iou_none", "train_mean_iou"):
        assert not list(validator.iter_errors(changed(content, ["objective", "metric"], metric)))


def test_a_workload_of_ones_own_is_left_to_the_search(validator):
    content = {"workload": "mine.cells", "objective": {"metric": "f1"}, "parameters": {"speed": LR}, "fixed": {"a": 1}}
    assert not list(validator.iter_errors(content))


def test_the_help_of_a_value_is_its_description(made):
    values = made["$defs"]["value"]["toy"]
    assert values["lr"] == {"type": "number", "description": "Learning rate; 1e-2 is best.", "default": 1e-3}
