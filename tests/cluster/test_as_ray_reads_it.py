"""Ray's autoscaler reads the same amounts from the files as we do."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from cluster import files, fit, kuberay

CLUSTER = Path(__file__).resolve().parents[2] / "cluster"


@pytest.mark.parametrize("name", ["aws.yaml", "gcp.yaml", "azure.yaml"])
@pytest.mark.row("C1")
def test_a_cloud_file_by_the_autoscaler(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".ssh").mkdir()
    for key in ("id_rsa", "id_rsa.pub"):
        (tmp_path / ".ssh" / key).write_text("the autoscaler hashes it", encoding="utf-8")
    content = yaml.safe_load((CLUSTER / name).read_text(encoding="utf-8"))
    config = AutoscalingConfig(content, skip_content_hash=True)
    types = config.get_node_type_configs()
    head = types.pop(config.get_head_node_type())
    assert head.resources == {"CPU": 0, "GPU": 0, "driver": 8}
    assert head.max_worker_nodes == 1
    groups, cap = fit.groups(files.read(CLUSTER / name))
    assert cap == config.get_max_num_worker_nodes()
    assert {group.name: (group.cpus, group.gpus, group.least, group.most) for group in groups} == {
        name: (each.resources["CPU"], each.resources["GPU"], each.min_worker_nodes, each.max_worker_nodes)
        for name, each in types.items()
    }
    assert types["gpu_spot"].priority > types["gpu_on_demand"].priority
    assert config.get_idle_timeout_s() == 600


@pytest.mark.parametrize("name", ["raycluster.yaml", "rayjob.yaml"])
@pytest.mark.row("C2")
def test_a_kuberay_file_by_the_autoscaler(name: str) -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

    file = files.read(CLUSTER / name)
    config = _derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "search", "namespace": "default"}, "spec": dict(file.ray)}
    )
    types = config["available_node_types"]
    head = types.pop(config["head_node_type"])
    head["resources"].pop("memory")
    assert head["resources"] == {"CPU": 0, "GPU": 0, "driver": kuberay.drivers(file.ray["headGroupSpec"])}
    groups, _ = fit.groups(file)
    assert {group.name: (group.cpus, group.gpus, group.least, group.most) for group in groups} == {
        name: (each["resources"]["CPU"], each["resources"]["GPU"], each["min_workers"], each["max_workers"])
        for name, each in types.items()
    }
    assert types["gpu-spot"]["priority"] > types["gpu-on-demand"]["priority"]
    assert config["idle_timeout_minutes"] == 10
