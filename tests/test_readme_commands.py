"""README.md's commands run as they stand; a few more flags only make them short, and paths are put in for examples."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import processes
from tests.test_readme import COMMANDS, README, ROOT
from workloads._acdc import generator as hearts
from workloads._acdc.generator import Synthetic as Hearts
from workloads._esd import generator as tiles
from workloads._esd.generator import Synthetic as Tiles
from workloads._pairs.dataset import EMBEDDED
from workloads._severstal import generator as steel
from workloads._severstal.generator import Synthetic as Steel
from workloads._spark import generator as spacecraft
from workloads._spark.generator import Synthetic as Spacecraft
from workloads._telescope import generator
from workloads._telescope.generator import Synthetic

SHORTER = {
    "make help": "",
    "make tune": " SPACE=toy.yaml ARGS='--runs {runs}/make --set search.trials=2'",
    "python -m benchmarks NAME": "",
    "python -m workloads list": "",
    "python -m workloads backbones": " resnet18 --size 64",
    "python -m workloads train pairs --set lr=3e-4": " --set epochs=1 --set network.base=4 --out {runs}/pairs-train",
    "python -m workloads lr pairs": " --steps 20 --set network.base=4 --out {runs}/lr",
    "python -m workloads train acdc --config FILE": " --set data.size=32 --set data.synthetic.patients=6"
    " --set data.synthetic.slices=2 --set data.synthetic.size=32 --set network.widths=[2,4] --out {runs}/acdc-train",
    "python -m workloads evaluate pairs CHECKPOINT": " --out {runs}/evaluate",
    "python -m workloads predict pairs CHECKPOINT IMAGES": " --out {runs}/predict",
    "python -m workloads cost pairs CHECKPOINT": " --out {runs}/cost",
    "python -m workloads export pairs CHECKPOINT --int8": " --out {runs}/export",
    "python -m search predict pairs CHECKPOINT IMAGES --workers 2": " --out {runs}/sharded",
    "python -m search list": " --json --runs {runs}",
    "python -m search promote STUDY --trial 7": " --help",
    "python -m workloads filters pairs CHECKPOINT --set prune.default=0.3": " --out {runs}/filters",
    "python -m cluster lint cluster/aws.yaml": "",
    "python -m cluster fit unet3plus.yaml cluster/aws.yaml": "",
    "python -m workloads inspect pairs": " --out {runs}/inspect",
    "python -m workloads inspect pairs --set data.root=mine --set data.classes=2": " --out {runs}/inspect-mine",
    "python tune.py --space nuclei.yaml --dry-run": " --runs {runs}/dry",
    "python tune.py --space nuclei.yaml --set search.trials=64": " --runs {runs}/more --dry-run",
    "python tune.py --space nuclei.yaml --set data.root=mine --set data.classes=2": " --runs {runs}/mine --dry-run",
    "python tune.py --space unet3plus_debug.yaml": " --runs {runs}/spacecraft --dry-run",
    "python tune.py --space unet3plus.yaml --set data.root=/data/spark": " --runs {runs}/spark --dry-run"
    " --set parameters.data.target_size.choices=[64,96]"
    " --set parameters.network.encoder.choices=[resnet34]",
    "python tune.py --space spacecraft_pairs.yaml --set data.root=mine": " --runs {runs}/spacecraft-pairs --dry-run",
    "python tune.py --space acdc_pruning.yaml --set data.root=/data/acdc": " --runs {runs}/acdc-pruning --dry-run",
    "python tune.py --space acdc.yaml --set data.root=/data/acdc": " --runs {runs}/acdc --dry-run"
    " --set data.size=64 --set parameters.network.base.choices=[4,8]",
    "python tune.py --space severstal.yaml --set data.root=/data/severstal": " --runs {runs}/severstal --dry-run"
    " --set parameters.network.encoder.choices=[resnet10t] --set data.image_size=[128,32]",
    "python tune.py --space severstal_debug.yaml": " --runs {runs}/severstal-debug --dry-run"
    " --set data.image_size=[128,32] --set data.synthetic.samples=20",
    "python -m workloads train severstal -- --encoder resnet50 --lr 1e-4": " --set network.encoder=resnet10t"
    " --set network.pretrained=false --set data.root=/data/severstal --set data.test_images=0 --set epochs=1"
    " --set data.image_size=[128,32] --set loader_workers=0 --out {runs}/severstal-train",
    "python -m workloads evaluate severstal runs/severstal-train --external sam2=MASKS": " --help",
    "python tune.py --space esd.yaml --set data.root=/data/dse": " --help",  # tiles of its size take a minute
    "python tune.py --space esd_debug.yaml": " --runs {runs}/esd-debug --dry-run",
    "python tune.py --space landsat_clouds.yaml --set data.root=/data/landsat": " --runs {runs}/landsat --dry-run",
    "python tune.py --space scripts/sweeps/unet.yml --workload esd": " --runs {runs}/sweep --dry-run"
    " --set data.synthetic.tiles=6 --set data.synthetic.pixels=4 --set fixed.network.scale_factor=4",
    "python -m workloads sanity pairs": " --set preset=debug --out {runs}/sanity",
    "python -m workloads describe pairs": "",
    "python -m search prepare esd --set data.root=/data/dse --workers 2": " --set network.scale_factor=4"
    " --set network.pool_sizes=[2,2]",
    "python -m scripts.train --model_type=SegmentationCNN --max_epochs=5": " --help",
    "python tune.py --space acdc_full_experiment.yaml": " --runs {runs}/experiment --dry-run"
    " --set data.synthetic.patients=6 --set data.synthetic.slices=2 --set data.size=32",
    "python tune.py --space telescope.yaml --set data.root=/data/telescope": " --runs {runs}/telescope --dry-run",
}
"""What is added to each command; a new one in the README has to be added here."""
TRAIN = "python -m workloads train pairs --set lr=3e-4"
ELSEWHERE = {"make test": "runs these tests", "make faults": "takes its time"}


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return what stands for the README's examples: folders of images, and where results go."""
    folder = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    for kind, values in (("images", 256), ("masks", 2)):
        (folder / "mine" / kind).mkdir(parents=True)
        for name in "abcd":
            content = rng.integers(0, values, (64, 64), dtype=np.uint8)
            Image.fromarray(content).save(folder / "mine" / kind / f"{name}.png")
    (folder / "original.yaml").write_text("training: {num_epochs: 1, learning_rate: 1e-3}\n")
    return {
        "mine": str(folder / "mine"),
        "FILE": str(folder / "original.yaml"),
        "/data/telescope": str(generator.ensure(Synthetic(samples=40), folder)),
        "/data/acdc": str(hearts.ensure(Hearts(patients=10, slices=2, size=48), folder)),
        "/data/severstal": str(steel.ensure(Steel(samples=20, width=256, height=64), folder)),
        "/data/dse": str(tiles.ensure(Tiles(tiles=6, pixels=4), folder)),
        "/data/landsat": str(_scenes(folder)),
        "/data/spark": str(spacecraft.ensure(Spacecraft(samples=40, size=64), folder)),
        "IMAGES": str(EMBEDDED / "images"),
        "runs": str(folder / "runs"),
        "CHECKPOINT": str(folder / "runs/pairs-train/best"),
        "NAME": "",
        "said": str(folder),
    }


def _scenes(folder: Path) -> Path:
    """Return a folder with an archive of a scene of six bands and its mask."""
    rng = np.random.default_rng(0)
    (folder / "landsat").mkdir()
    mask = rng.choice([0, 1, 3, 4], (256, 256, 1)).astype(np.uint8)
    np.savez(folder / "landsat" / "scene.npz", img=rng.random((256, 256, 6), np.float32), msk=mask)
    return folder / "landsat"


def run(command: str, places: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one command of the README with what makes it short."""
    before, dashes, flags = command.partition(" -- ")
    text = f"{before}{SHORTER[command].format(**places)}{dashes}{flags}"
    text = text.replace("data.root=mine", f"data.root={places['mine']}")
    for name in (
        "/data/telescope",
        "/data/spark",
        "/data/dse",
        "/data/landsat",
        "/data/acdc",
        "/data/severstal",
        "IMAGES",
        "CHECKPOINT",
        "FILE",
        "NAME",
    ):
        text = text.replace(name, places[name])
    # What `source .venv/bin/activate` does.
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = shlex.split(text)
    if words[0] == "python":
        module, rest = (words[2], words[3:]) if words[1] == "-m" else (Path(words[1]).stem, words[2:])
        if importlib.util.find_spec(module).submodule_search_locations:
            module += ".__main__"
        files = [Path(places["said"]) / name for name in ("out.txt", "err.txt")]
        for file in files:
            file.unlink(missing_ok=True)
        code = processes.command(module, rest, *files, environment, timeout_s=110)
        return subprocess.CompletedProcess(words, code, *(file.read_text() for file in files))
    text += f" VENV={sys.prefix}"
    return subprocess.run(
        text, shell=True, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=110, check=False
    )


@pytest.fixture(scope="module")
def trained(places: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the README's training, whose checkpoint others use."""
    return run(TRAIN, places)


@pytest.mark.parametrize("command", [c.strip() for c in COMMANDS if c.strip() not in ELSEWHERE])
def test_each_command_runs(command: str, places: dict[str, str], trained: subprocess.CompletedProcess[str]) -> None:
    done = trained if command == TRAIN else run(command, places)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "Traceback" not in done.stderr


def test_tensorboard_starts_on_the_runs(places: dict[str, str], trained: object) -> None:
    command = re.search(r"`(tensorboard [^`]+)`", README)
    assert command
    program = command[1].replace("runs/", places["runs"]).split()
    program[0] = str(Path(sys.executable).with_name(program[0]))
    process = subprocess.Popen(
        [*program, "--port=0", "--load_fast=false"], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert process.stderr is not None
        until = time.monotonic() + 60
        lines = []
        while time.monotonic() < until and "http://localhost:" not in "".join(lines):
            lines.append(process.stderr.readline())
        assert "http://localhost:" in "".join(lines)
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=20)
        process.stderr.close()
