"""How much of a search a cluster holds, by numbers worked by hand."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from cluster import files, fit
from cluster.__main__ import main
from search import spec_file
from search.errors import BadInput, SpecError
from search.spec import Evaluation, Resources, SearchSpec

ROOT = Path(__file__).resolve().parents[2]
TOY = ROOT / "search_spaces/toy.yaml"
CLOUD = """
provider: {type: aws}
max_workers: MOST
head_node_type: head
available_node_types:
  head: {resources: {CPU: 0}}
  small: {resources: {CPU: 4, GPU: 1}, min_workers: 1, max_workers: 4}
  large: {resources: {CPU: 48, GPU: 4}, min_workers: 0, max_workers: 2}
  plain: {resources: {CPU: 16}, max_workers: 3}
"""


def cloud(folder: Path, most: int) -> files.ClusterFile:
    path = folder / "cloud.yaml"
    path.write_text(CLOUD.replace("MOST", str(most)), encoding="utf-8")
    return files.read(path)


def needs(**given: Any) -> SearchSpec:
    """Return the toy search whose trials ask for this; the toy itself trains in one process only."""
    spec = spec_file.load(str(TOY))
    return dataclasses.replace(spec, resources=Resources(**given))


def told(file: files.ClusterFile, **given: Any) -> list[str]:
    return fit.text(needs(**given), file).splitlines()


def ends(file: files.ClusterFile, **given: Any) -> tuple[str, str]:
    """Return how many fit at the start and at the most."""
    lines = dict(line.split(": ", 1) for line in told(file, **given)[1:] if line.startswith("at the "))
    return lines["at the start"], lines["at the most"]


@pytest.mark.parametrize(
    ("most", "given", "start", "at_most"),
    [
        # small holds 1 of 1 GPU, large 4: 1 now; 4 x 1 + 2 x 4 = 12
        (9, {"gpus_per_worker": 1}, "1 slot on 1 node (1 small)", "12 slots on 6 nodes (4 small, 2 large)"),
        # the cap leaves 3 nodes: the small one that always runs, and both large: 1 + 2 x 4
        (3, {"gpus_per_worker": 1}, "1 slot on 1 node (1 small)", "9 slots on 3 nodes (1 small, 2 large)"),
        # half a GPU each: 2 on small, 8 on large; at the most 4 x 2 + 2 x 8 = 24
        (9, {"gpus_per_worker": 0.5}, "2 slots on 1 node (1 small)", "24 slots on 6 nodes (4 small, 2 large)"),
        # 8 CPUs each: none on small, min(48 / 8, 4 / 1) = 4 on large: 8 in all
        (
            6,
            {"gpus_per_worker": 1, "cpus_per_worker": 8},
            "0 slots on 1 node (1 small)",
            "8 slots on 3 nodes (1 small, 2 large)",
        ),
        # gangs of 3 may span nodes: 12 workers make 4
        (
            9,
            {"gpus_per_worker": 1, "workers": 3},
            "0 gangs on 1 node (1 small)",
            "4 gangs on 6 nodes (4 small, 2 large)",
        ),
        # without GPUs: 4 now; plain holds 16, large 48, small 4: 4 x 4 + 2 x 48 + 3 x 16 = 160
        (
            9,
            {"gpus_per_worker": 0},
            "4 slots on 1 node (1 small)",
            "160 slots on 9 nodes (4 small, 2 large, 3 plain)",
        ),
    ],
)
@pytest.mark.row("C5")
def test_a_cloud_by_hand(tmp_path: Path, most: int, given: dict[str, Any], start: str, at_most: str) -> None:
    assert ends(cloud(tmp_path, most), **given) == (start, at_most)


@pytest.mark.row("C5")
def test_what_never_fits_is_said(tmp_path: Path) -> None:
    lines = told(cloud(tmp_path, 9), gpus_per_worker=1, cpus_per_worker=8)
    assert "never: a worker on small: it takes 8 CPU, 1 GPU of 4 CPU, 1 GPU" in lines
    assert "never: a worker on plain: it takes 8 CPU, 1 GPU of 16 CPU, 0 GPU" in lines
    assert not any("worker on large" in line for line in lines)
    assert "a node large: 48 CPU, 4 GPU, 4 workers, 16 CPU, 0 GPU left over; 0 to 2 of them" in lines


def test_an_evaluation_job_that_never_fits_is_said(tmp_path: Path) -> None:
    spec = dataclasses.replace(needs(), evaluation=Evaluation(cpus=64, gpus=1))
    assert fit.text(spec, cloud(tmp_path, 9)).endswith(
        "never: an evaluation job: it takes 64 CPU, 1 GPU on one node; lower evaluation.cpus or evaluation.gpus"
    )


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (
            {"cpus_per_worker": 64, "gpus_per_worker": 1},
            "resources: a worker takes 64 CPU, 1 GPU and has to fit one node, but of FILE small has 4 CPU, 1 GPU; "
            "large has 48 CPU, 4 GPU; plain has 16 CPU, 0 GPU; "
            "lower resources.cpus_per_worker or resources.gpus_per_worker, or take larger nodes",
        ),
        (
            {"workers": 13, "gpus_per_worker": 1},
            "resources: 1 slots x 13 workers x (1 CPU, 1 GPU) = 13 CPU, 13 GPU, but FILE at its largest has "
            "112 CPU, 12 GPU, room for 12 workers of 13; lower resources.workers or what each worker gets",
        ),
        (
            {"slots": 13, "gpus_per_worker": 1},
            "resources: 13 slots x (1 CPU, 1 GPU) = 13 CPU, 13 GPU, but FILE at its largest has 112 CPU, 12 GPU; "
            "lower resources.slots or what each slot gets",
        ),
    ],
)
def test_what_cannot_run_is_refused_with_the_arithmetic(tmp_path: Path, given: dict[str, Any], problem: str) -> None:
    file = cloud(tmp_path, 9)
    with pytest.raises(SpecError) as caught:
        told(file, **given)
    assert str(caught.value) == problem.replace("FILE", str(file.path))


def test_auto_is_a_gpu_where_the_cluster_may_have_any(tmp_path: Path) -> None:
    assert told(cloud(tmp_path, 9))[1] == "a trial: (1 CPU, 1 GPU)"


@pytest.mark.parametrize(
    ("name", "start", "at_most"),
    [
        # nodes of one GPU that come when asked: 8 under the cap are 4 gangs of 2
        ("aws.yaml", "0 gangs on 0 nodes", "4 gangs on 8 nodes (8 gpu_spot)"),
        ("azure.yaml", "0 gangs on 0 nodes", "4 gangs on 8 nodes (8 gpu_spot)"),
        ("gcp.yaml", "0 gangs on 0 nodes", "4 gangs on 8 nodes (8 gpu_spot)"),
        # KubeRay caps each group alone: 8 + 4
        ("raycluster.yaml", "0 gangs on 0 nodes", "6 gangs on 12 nodes (8 gpu-spot, 4 gpu-on-demand)"),
        ("rayjob.yaml", "0 gangs on 0 nodes", "6 gangs on 12 nodes (8 gpu-spot, 4 gpu-on-demand)"),
        # 4 nodes x 4 GPUs / 2
        ("on_premise.yaml", "8 gangs on 4 nodes (4 host)", "8 gangs on 4 nodes (4 host)"),
        ("slurm/train.sbatch", "8 gangs on 4 nodes (4 node)", "8 gangs on 4 nodes (4 node)"),
        ("slurm/predict.sbatch", "2 gangs on 1 node (1 node)", "2 gangs on 1 node (1 node)"),
    ],
)
@pytest.mark.row("C5")
def test_shipped_files_by_hand(name: str, start: str, at_most: str) -> None:
    assert ends(files.read(ROOT / "cluster" / name), workers=2, gpus_per_worker=1) == (start, at_most)


def test_a_cluster_that_does_not_grow_has_its_replicas(tmp_path: Path) -> None:
    path = tmp_path / "fixed.yaml"
    text = (ROOT / "cluster/raycluster.yaml").read_text(encoding="utf-8")
    text = text.replace("Autoscaling: true", "Autoscaling: false").replace(" replicas: 0", " replicas: 3")
    path.write_text(text, encoding="utf-8")
    same = "6 slots on 6 nodes (3 gpu-spot, 3 gpu-on-demand)"
    assert ends(files.read(path), gpus_per_worker=1) == (same, same)


def test_hosts_whose_size_is_unknown_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "hosts.yaml"
    text = (ROOT / "cluster/on_premise.yaml").read_text(encoding="utf-8")
    path.write_text(text.replace(" --num-cpus=32 --num-gpus=4", ""), encoding="utf-8")
    with pytest.raises(BadInput, match="worker_start_ray_commands: does not say what a host has; add --num-cpus=N"):
        told(files.read(path))


@pytest.mark.row("C5")
def test_the_command_prints_it(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["fit", str(TOY), str(ROOT / "cluster/aws.yaml"), "--set", "resources.slots=3"]
    assert main(command) == 0
    assert capsys.readouterr().out.endswith("at the most: 8 slots on 8 nodes (8 gpu_spot)\nasked for: 3 slots\n")
    assert main([*command[:-1], "resources.slots=9"]) == 2
    assert "python -m cluster: resources: 9 slots" in capsys.readouterr().err
