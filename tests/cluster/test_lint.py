"""The shipped files are fine; each of many slips in them is found, under its key."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from cluster import files, lint
from cluster.__main__ import main
from search.errors import BadInput

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = sorted(path for pattern in ("*.yaml", "slurm/*.sbatch") for path in (ROOT / "cluster").glob(pattern))
KUBERAY = ("rayclusters.v1.schema.json", "rayjobs.v1.schema.json")
SPOT = "available_node_types.gpu_spot"
HEAD = "spec.headGroupSpec"
GROUP = "spec.workerGroupSpecs"
IN_JOB = "spec.rayClusterSpec"

# file, what is replaced, by what, the key that has to be named
MUTATIONS = [
    # Ray's launcher: what `ray up` itself refuses
    ("aws.yaml", "max_workers: 8  #", "max_worker: 8  #", "the file"),
    ("aws.yaml", '"driver": 8', '"driver": 8.5', "available_node_types.head.resources.driver"),
    ("gcp.yaml", "head_node_type: head", "head_node_type: had", "head_node_type"),
    # amounts
    ("aws.yaml", "min_workers: 0\n    max_workers: 8", "min_workers: 9\n    max_workers: 8", f"{SPOT}.min_workers"),
    ("azure.yaml", "min_workers: 0", "min_workers: 4", "max_workers"),
    ("gcp.yaml", "    max_workers: 8", "    max_workers: 80", f"{SPOT}.max_workers"),
    ("gcp.yaml", "    max_workers: 8", "    max_workers: -1", f"{SPOT}.max_workers"),
    ("aws.yaml", "upscaling_speed: 4.0", "upscaling_speed: 0", "upscaling_speed"),
    ("aws.yaml", "idle_timeout_minutes: 10", "idle_timeout_minutes: 1", "idle_timeout_minutes"),
    ("aws.yaml", "    priority: 10", "    priority: 10\n    idle_timeout_s: 30", f"{SPOT}.idle_timeout_s"),
    ("raycluster.yaml", "96 CPU, 12 GPU", "128 CPU, 16 GPU", "spec.headGroupSpec.template.spec.containers[0].env"),
    # instances
    ("aws.yaml", "InstanceType: g5.2xlarge", "InstanceType: g5.2xlrge", f"{SPOT}.node_config.InstanceType"),
    ("gcp.yaml", "machineType: g2-standard-8", "machineType: L4", f"{SPOT}.node_config.machineType"),
    ("azure.yaml", "vmSize: Standard_NC4as", "vmSize: NC4as", f"{SPOT}.node_config.azure_arm_parameters.vmSize"),
    ("aws.yaml", "InstanceType: g5.2xlarge", "InstanceType: g5.12xlarge", f"{SPOT}.resources.GPU"),
    ("gcp.yaml", "machineType: g2-standard-8", "machineType: n2-standard-8", f"{SPOT}.resources.GPU"),
    ("azure.yaml", '"CPU": 4, "GPU": 1', '"CPU": 40, "GPU": 1', f"{SPOT}.resources.CPU"),
    (
        "azure.yaml",
        "imageVersion: CHANGE-ME",
        "imageVersion: latest",
        f"{SPOT}.node_config.azure_arm_parameters.imageVersion",
    ),
    (
        "gcp.yaml",
        "scheduling: [{onHost",
        "schedule: [{onHost",
        "available_node_types.gpu_on_demand.node_config.scheduling",
    ),
    ("aws.yaml", "InstanceType: g5.2xlarge", "InstanceType: g5.3xlarge", f"{SPOT}.node_config.InstanceType"),
    ("gcp.yaml", "machineType: g2-standard-8", "machineType: g2-standard-7", f"{SPOT}.node_config.machineType"),
    ("azure.yaml", "NC4as_T4", "NC5as_T4", f"{SPOT}.node_config.azure_arm_parameters.vmSize"),
    ("aws.yaml", "region: us-west-2", "region: us-wets-2", "provider.region"),
    ("gcp.yaml", "availability_zone: us-central1-a", "availability_zone: us-west1-a", "provider.availability_zone"),
    ("azure.yaml", "  location: westus2\n", "", "provider.location"),
    ("aws.yaml", "auth: {ssh_user: ubuntu}", "auth: {}", "auth.ssh_user"),
    ("aws.yaml", "max_workers: 8", "max_workers: 0", "max_workers"),
    # head and spot
    ("aws.yaml", '"GPU": 1}', '"GPU": 1, "driver": 1}', f"{SPOT}.resources.driver"),
    ("aws.yaml", "--head --port", "--port", "head_start_ray_commands"),
    ("aws.yaml", "--port=6379", "--port=6380", "worker_start_ray_commands"),
    ("gcp.yaml", " --autoscaling-config=~/ray_bootstrap_config.yaml", "", "head_start_ray_commands"),
    ("aws.yaml", '{"CPU": 0, "GPU": 0', '{"CPU": 8, "GPU": 0', "available_node_types.head.resources.CPU"),
    ("aws.yaml", '"CPU": 0, "GPU": 0', '"GPU": 0', "available_node_types.head.resources.CPU"),
    ("gcp.yaml", ', "driver": 8', "", "available_node_types.head.resources.driver"),
    ("aws.yaml", "InstanceType: m6i.2xlarge", "InstanceType: g5.2xlarge", "available_node_types.head.node_config"),
    (
        "aws.yaml",
        "InstanceType: m6i.2xlarge",
        "InstanceType: m6i.2xlarge\n      InstanceMarketOptions: {MarketType: spot}",
        "available_node_types.head.node_config",
    ),
    ("aws.yaml", "max_workers: 0", "max_workers: 2", "available_node_types.head.max_workers"),
    ("azure.yaml", "max_workers: 4", "max_workers: 0", SPOT),
    ("gcp.yaml", "priority: 10", "priority: 0", f"{SPOT}.priority"),
    ("aws.yaml", " RAY_enable_autoscaler_v2=1", "", "head_start_ray_commands"),
    # who gets in
    ("aws.yaml", "RAY_AUTH_MODE=token RAY_enable", "RAY_enable", "head_start_ray_commands[1]"),
    ("gcp.yaml", "- RAY_AUTH_MODE=token ray start", "- ray start", "worker_start_ray_commands[1]"),
    ("gcp.yaml", "RAY_AUTH_MODE=token RAY_e", "RAY_AUTH_MODE=disabled RAY_e", "head_start_ray_commands[1]"),
    ("azure.yaml", "--port=6379", "--port=6379 --dashboard-host 0.0.0.0", "head_start_ray_commands[1]"),
    ("azure.yaml", '  "~/.ray/auth_token": "~/.ray/auth_token"\n', "", "file_mounts"),
    ("aws.yaml", "; chmod 600 ~/.ray/auth_token\n", "\n", "setup_commands"),
    ("aws.yaml", "RAY_AUTH_MODE=token RAY_e", "RAY_AUTH_TOKEN_PATH=/token RAY_AUTH_MODE=token RAY_e", "file_mounts"),
    ("aws.yaml", "chmod 600 ~/.ray/auth_token\n", "chmod 644 ~/.ray/auth_token\n", "setup_commands"),
    ("aws.yaml", "file_mounts:", 'file_mounts:\n  "~/.aws": "~/.aws"', "file_mounts.~/.aws"),
    ("aws.yaml", "RAY_AUTH_MODE=token ray start", "RAY_AUTH_TOKEN=0123abcd RAY_AUTH_MODE=token ray start", "line"),
    ("aws.yaml", "cluster_name: search", f"cluster_name: search  # {'AKIA' + 'Q' * 16}", "line"),
    (
        "aws.yaml",
        "  cache_stopped",
        "  security_group: {GroupName: all, IpPermissions: [{FromPort: 0, ToPort: 65535, IpProtocol: tcp,"
        " IpRanges: [{CidrIp: 0.0.0.0/0}]}]}\n  cache_stopped",
        "provider.security_group.IpPermissions[0]",
    ),
    ("gcp.yaml", "- ray stop", "- ray stop --force", "head_start_ray_commands[0]"),
    ("gcp.yaml", "- ray stop", "- pkill -f raylet", "head_start_ray_commands[0]"),
    ("gcp.yaml", '"-v ', '"--privileged", "-v ', "docker.run_options"),
    ("gcp.yaml", '"-v ', '"-p 8265:8265", "-v ', "docker.run_options"),
    # versions
    ("gcp.yaml", "py311-gpu", "py311-cpu", "docker.worker_image"),
    ("gcp.yaml", "py311-gpu", "py39-gpu", "docker.worker_image"),
    ("aws.yaml", "ray:2.60.0-py311-gpu", "ray:latest-gpu", "docker.worker_image"),
    ("aws.yaml", "ray:2.60.0-py311-gpu", "ray", "docker.worker_image"),
    ("aws.yaml", "ray:2.60.0-py311-gpu", "ray:2.9.0-py311-gpu", "docker.worker_image"),
    ("gcp.yaml", "--require-hashes ", "", "setup_commands[1]"),
    ("gcp.yaml", "client==1.7.8", "client", "head_setup_commands[0]"),
    ("gcp.yaml", "--no-deps --require-hashes -r ~/requirements.lock", "ray==2.9.0", "setup_commands[1]"),
    ("on_premise.yaml", "\nsetup_commands:", "\nother_commands:", "setup_commands"),
    ("aws.yaml", "head_start_ray_commands:", "other_commands:", "head_start_ray_commands"),
    # where results go
    ("aws.yaml", '"-v /mnt/shared:/mnt/shared", ', "", "docker.run_options"),
    ("aws.yaml", "mountpoint -q /mnt/shared || sudo mount", "echo", "initialization_commands"),
    ("azure.yaml", "--runs /mnt/shared/runs", "--runs runs", "--runs"),
    ("gcp.yaml", "-v /mnt/shared:/mnt/shared", "-v /mnt/shared:/data", "--runs"),
    ("gcp.yaml", " --runs /mnt/shared/runs", "", "--runs"),
    # how drivers are submitted
    ("aws.yaml", "--entrypoint-num-cpus 0", "--entrypoint-num-gpus 1", "--entrypoint-num-gpus"),
    ("aws.yaml", """--entrypoint-resources '{"driver": 1}' """, "", "--entrypoint-resources"),
    # a list of hosts
    ("on_premise.yaml", "  head_ip: 192.168.1.10\n", "", "provider.head_ip"),
    ("on_premise.yaml", "192.168.1.12,", "192.168.1.11,", "provider.worker_ips"),
    ("on_premise.yaml", "[192.168.1.11,", "[192.168.1.10,", "provider.worker_ips"),
    ("on_premise.yaml", "max_workers: 4", "max_workers: 40", "max_workers"),
    ("on_premise.yaml", "max_workers: 4", "max_workers: 2", "min_workers"),
    ("on_premise.yaml", "--num-cpus=0 ", "", "head_start_ray_commands"),
    ("on_premise.yaml", """ --resources='{"driver": 8}'""", "", "head_start_ray_commands"),
    # KubeRay
    ("raycluster.yaml", "ray.io/v1\n", "ray.io/v1alpha1\n", "apiVersion"),
    ("raycluster.yaml", "rayVersion: 2.60.0", "rayVersion: 2.9.0", "spec.rayVersion"),
    ("raycluster.yaml", "mode: token", "mode: disabled", "spec.authOptions.mode"),
    ("raycluster.yaml", "version: v2", "version: v1", "spec.autoscalerOptions.version"),
    ("raycluster.yaml", "Seconds: 600", "Seconds: 60", "spec.autoscalerOptions.idleTimeoutSeconds"),
    ("raycluster.yaml", "Autoscaling: true", "Autoscaling: false", "spec.enableInTreeAutoscaling"),
    ("raycluster.yaml", "gcsFaultToleranceOptions:", "gcs:", "spec.gcsFaultToleranceOptions"),
    (
        "raycluster.yaml",
        "valueFrom: {secretKeyRef: {name: search-redis, key: password}}",
        "value: hunter2",
        "spec.gcsFaultToleranceOptions.redisPassword.value",
    ),
    (
        "raycluster.yaml",
        "{name: PYTHONUSERBASE, value: /mnt",
        "{name: WANDB_API_KEY, value: mnt",
        f"{HEAD}.template.spec.containers[0].env[0].value",
    ),
    ("raycluster.yaml", "serviceType: ClusterIP", "serviceType: LoadBalancer", f"{HEAD}.serviceType"),
    ("raycluster.yaml", "serviceType: ClusterIP", "enableIngress: true", f"{HEAD}.enableIngress"),
    ("raycluster.yaml", 'num-cpus: "0", ', "", f"{HEAD}.rayStartParams.num-cpus"),
    ("raycluster.yaml", r"\"driver\"", r"\"chauffeur\"", f"{HEAD}.rayStartParams.resources"),
    ("raycluster.yaml", "search/market: on-demand", "search/market: spot", f"{HEAD}.template.spec.nodeSelector"),
    ("raycluster.yaml", "minReplicas: 0", "minReplicas: 9", f"{GROUP}[0].minReplicas"),
    ("raycluster.yaml", "replicas: 0", "replicas: 9", f"{GROUP}[0].replicas"),
    ("raycluster.yaml", "priority: 10", "priority: 0", f"{GROUP}[0].priority"),
    ("raycluster.yaml", "maxReplicas: 4", "maxReplicas: 0", f"{GROUP}[0]"),
    ("raycluster.yaml", "rayStartParams: {}", 'rayStartParams: {num-gpus: "2"}', f"{GROUP}[0].rayStartParams.num-gpus"),
    ("raycluster.yaml", "2.60.0-py311-gpu", "nightly", f"{GROUP}[0].template.spec.containers[0].image"),
    (
        "raycluster.yaml",
        "persistentVolumeClaim: {claimName: search-shared}",
        "emptyDir: {}",
        f"{HEAD}.template.spec.volumes",
    ),
    ("raycluster.yaml", "restartPolicy: Never", "restartPolicy: Always", f"{HEAD}.template.spec.restartPolicy"),
    ("raycluster.yaml", "metadata: {name: search}", "metadata: {}", "metadata.name"),
    ("raycluster.yaml", "groupName: gpu-on-demand", "groupName: gpu-spot", GROUP),
    ("raycluster.yaml", "redisAddress", "redisHost", "spec.gcsFaultToleranceOptions.redisAddress"),
    ("raycluster.yaml", "redisPassword", "redisWord", "spec.gcsFaultToleranceOptions.redisPassword"),
    ("raycluster.yaml", "name: PYTHONUSERBASE", "name: RAY_AUTH_MODE", f"{HEAD}.template.spec.containers[0].env[0]"),
    (
        "raycluster.yaml",
        "rayStartParams: {}",
        """rayStartParams: {resources: '{"driver": 1}'}""",
        f"{GROUP}[0].rayStartParams.resources",
    ),
    ("rayjob.yaml", " --runs /mnt/shared/runs", "", "spec.entrypoint"),
    ("rayjob.yaml", "entrypointNumGpus: 0", "entrypointNumGpus: 1", "spec.entrypointNumGpus"),
    ("rayjob.yaml", "entrypointNumCpus: 0", "entrypointNumCpus: 1", "spec.entrypointNumCpus"),
    ("rayjob.yaml", """'{"driver": 1}'""", "'{}'", "spec.entrypointResources"),
    ("rayjob.yaml", """'{"driver": 1}'""", """'{"driver": 9}'""", "spec.entrypointResources"),
    ("rayjob.yaml", "JobFinishes: true", "JobFinishes: false", "spec.shutdownAfterJobFinishes"),
    ("rayjob.yaml", "mode: token", "mode: disabled", f"{IN_JOB}.authOptions.mode"),
    ("rayjob.yaml", "--runs /mnt/shared/runs", "--runs /home/ray/runs", "--runs"),
    # Slurm
    ("slurm/train.sbatch", "#!/bin/bash", "# bash", "line 1"),
    ("slurm/train.sbatch", "set -euo pipefail", "set -x", "set"),
    ("slurm/train.sbatch", "--cpus-per-task=32", "--cpu-per-task=32", "--cpu-per-task"),
    ("slurm/train.sbatch", "#SBATCH --requeue\n", "", "--requeue"),
    ("slurm/train.sbatch", "#SBATCH --signal=B:USR1@180\n", "", "--signal"),
    ("slurm/train.sbatch", "B:USR1@180", "USR1@180", "--signal"),
    ("slurm/train.sbatch", "B:USR1@180", "B:USR1@5", "--signal"),
    ("slurm/train.sbatch", "B:USR1@180", "B:TERM@180", "trap"),
    ("slurm/train.sbatch", "    scontrol requeue", "    echo", "trap"),
    ("slurm/train.sbatch", 'wait "$search"', "true", "wait"),
    ("slurm/train.sbatch", "--open-mode=append", "--open-mode=truncate", "--open-mode"),
    ("slurm/train.sbatch", "--time=24:00:00", "--time=long", "--time"),
    ("slurm/train.sbatch", "#SBATCH --exclusive\n", "", "--exclusive"),
    ("slurm/train.sbatch", "#SBATCH --requeue", "set -e\n#SBATCH --requeue", "line"),
    ("slurm/train.sbatch", "--nodes=4", "--nodes=3", "--min-nodes"),
    ("slurm/train.sbatch", "--gpus-per-node=4", "--gpus-per-node=8", "--num-gpus"),
    ("slurm/train.sbatch", "--gpus-per-node=4", "--gres=gpu:a100:2", "--num-gpus"),
    ("slurm/train.sbatch", "--ntasks-per-node=1", "--ntasks-per-node=4", "--ntasks-per-node"),
    ("slurm/train.sbatch", "RAY_AUTH_MODE=token ", "", "ray symmetric-run"),
    ("slurm/train.sbatch", "--num-gpus 4 --", "--num-gpus 4", "ray symmetric-run"),
    ("slurm/train.sbatch", "--num-cpus 32", "--head --num-cpus 32", "ray symmetric-run"),
    ("slurm/train.sbatch", "srun ray", "ray", "ray symmetric-run"),
    ("slurm/train.sbatch", '--address "$head:', '--address "127.0.0.1:', "--address"),
    ("slurm/train.sbatch", 'env RAY_ADDRESS="$head:6379" ', "", "RAY_ADDRESS"),
    ("slurm/train.sbatch", "RUN_CLUSTER_WAIT_TIMEOUT=600", "X=1", "RAY_SYMMETRIC_RUN_CLUSTER_WAIT_TIMEOUT"),
    ("slurm/evaluate.sbatch", "--gpus-per-node=1", "--gpus-per-node=4", "--gpus-per-node"),
    ("slurm/evaluate.sbatch", "--gpus-per-node=1", "--exclusive", "--gpus-per-node"),
    ("slurm/evaluate.sbatch", '--out "$HOME/runs', '--out "/tmp/runs', "--out"),
    ("slurm/predict.sbatch", "--workers 4", "--workers 8", "--workers"),
    ("slurm/predict.sbatch", "--workers 4", "--workers 2", "--gpus-per-node"),
    ("slurm/predict.sbatch", "--nodes=1", "--nodes=2", "--nodes"),
]


@pytest.fixture(scope="module")
def crds(shared_data: Path) -> list[str]:
    """Return the flags that name KubeRay's schemas."""
    return [word for name in KUBERAY for word in ("--crd", str(shared_data / "kuberay" / name))]


def lines(path: Path, text: str) -> list[lint.Problem]:
    path.write_text(text, encoding="utf-8")
    return [each for each in lint.problems(files.read(path)) if not each.note]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.row("C1", "N6")
def test_a_shipped_file_is_fine(path: Path) -> None:
    assert [each for each in lint.problems(files.read(path)) if not each.note] == []


@pytest.mark.row("C1")
def test_nine_files_are_shipped() -> None:
    assert len(SHIPPED) == 9


@pytest.mark.shared_data
@pytest.mark.row("C2")
def test_shipped_files_are_fine_by_kuberays_schema(crds: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    shipped = [str(path) for path in SHIPPED if path.name.startswith("ray")]
    assert main(["lint", *shipped, *crds]) == 0
    assert capsys.readouterr().out.count(": fine") == 2


@pytest.mark.shared_data
@pytest.mark.parametrize(
    ("before", "after", "key"),
    [
        ("maxReplicas: 8", 'maxReplicas: "8"', "spec.workerGroupSpecs[0].maxReplicas"),
        ("maxReplicas: 8", "maxReplica: 8", "spec.workerGroupSpecs[0].maxReplica"),
        ("mode: token", "mode: tokens", "spec.authOptions.mode"),
        ("    template:\n", "    templates:\n", "spec.headGroupSpec"),
    ],
)
@pytest.mark.row("C4")
def test_kuberays_schema_refuses(
    crds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], before: str, after: str, key: str
) -> None:
    path = tmp_path / "raycluster.yaml"
    path.write_text((ROOT / "cluster/raycluster.yaml").read_text(encoding="utf-8").replace(before, after))
    assert main(["lint", str(path), *crds]) == 2
    assert f"{path}: {key}: " in capsys.readouterr().out


@pytest.mark.parametrize(("name", "before", "after", "key"), MUTATIONS)
@pytest.mark.row("C4", "N6")
def test_a_slip_is_named(tmp_path: Path, name: str, before: str, after: str, key: str) -> None:
    text = (ROOT / "cluster" / name).read_text(encoding="utf-8")
    assert before in text
    found = lines(tmp_path / Path(name).name, text.replace(before, after))
    keys = [re.sub(r"^line \d+$", "line", each.key) if key == "line" else each.key for each in found]
    assert key in keys, found


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
@pytest.mark.row("C1")
def test_each_begins_with_the_three_lines_to_type(path: Path) -> None:
    head = path.read_text(encoding="utf-8").removeprefix("#!/bin/bash\n").splitlines()[:4]
    assert all(re.match(r"# (ray|RAY_AUTH_MODE=token|kubectl|sbatch|tail|cat|ls) ", line) for line in head[:3])
    assert head[3] == "#"
    assert f"cluster/{'slurm/' * (path.suffix == '.sbatch')}{path.name}" in "".join(head)


@pytest.mark.row("C4")
def test_what_is_wrong_is_told_in_a_line_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "predict.sbatch"
    text = (ROOT / "cluster/slurm/predict.sbatch").read_text(encoding="utf-8")
    path.write_text(text.replace("--workers 4", "--workers 8").replace("#SBATCH --requeue\n", ""))
    assert main(["lint", str(path)]) == 2
    assert capsys.readouterr().out == (
        f"{path}: --requeue: missing, so a job that is taken away does not come back; add #SBATCH --requeue\n"
        f"{path}: --workers: 8 workers x 1 GPU = 8, but a node has 4; lower --workers or --gpus-per-worker, "
        "or ask for more\n"
        f"{path}: --workers: 8 workers x 8 CPU = 64, but a node has 32; lower --workers or --cpus-per-worker, "
        "or ask for more\n"
    )


def test_an_unknown_instance_type_is_a_note(tmp_path: Path) -> None:
    text = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8").replace("g5.2xlarge", "g9q.2xlarge")
    path = tmp_path / "aws.yaml"
    assert lines(path, text) == []
    notes = [each.text for each in lint.problems(files.read(path)) if "g9q" in each.text]
    assert notes == ["g9q.2xlarge is not in our table, so its CPUs and GPUs were not compared"] * 2


def test_a_token_may_lie_elsewhere(tmp_path: Path) -> None:
    text = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8")
    text = text.replace('"~/.ray/auth_token":', '"~/token":').replace(
        "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH=~/token RAY_AUTH_MODE"
    )
    text = text.replace("chmod 600 ~/.ray/auth_token\n", "chmod 600 ~/token\n")
    assert lines(tmp_path / "aws.yaml", text) == []


def test_spot_and_its_fallback_differ_in_size(tmp_path: Path) -> None:
    text = (ROOT / "cluster/aws.yaml").read_text(encoding="utf-8")
    spot, plain = text.split("gpu_on_demand:")
    plain = plain.replace("g5.2xlarge", "g5.4xlarge").replace('"CPU": 8', '"CPU": 16')
    assert [each.key for each in lines(tmp_path / "aws.yaml", f"{spot}gpu_on_demand:{plain}")] == [SPOT]


@pytest.mark.row("C2")
def test_a_service_beside_the_cluster_is_looked_at(tmp_path: Path) -> None:
    text = (ROOT / "cluster/raycluster.yaml").read_text(encoding="utf-8")
    service = "---\nkind: Service\nspec: {type: NodePort}\n---\nkind: Ingress\nspec: {}\n"
    secret = "---\nkind: Secret\nstringData: {password: hunter2}\n"
    found = [each.key for each in lines(tmp_path / "r.yaml", text + service + secret)]
    assert sorted(found) == ["Ingress", "Service.spec.type", "stringData"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a: 1\n", "no cluster file; expected one of Ray's launcher"),
        ("a: &x 1\nb: *x\n", "aliases are not supported"),
        ("a: !!python/object/apply:os.getcwd []\n", "not YAML: could not determine a constructor"),
        ("[" * 1200, "nested too deeply"),
        ("- 1\n", "expected keys and values; got list"),
        ("#" * 2**21, "larger than 1 MiB"),
    ],
)
def test_what_is_no_cluster_file_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BadInput, match=re.escape(problem)):
        files.read(path)


@pytest.mark.parametrize("content", ["{}", "a: 1", "{"])
def test_a_schema_of_something_else_is_refused(
    tmp_path: Path, content: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "crd.yaml"
    path.write_text(content, encoding="utf-8")
    assert main(["lint", str(SHIPPED[0]), "--crd", str(path)]) == 2
    assert f"python -m cluster: {path}: " in capsys.readouterr().err


def test_a_schema_is_found_in_a_resource_definition(tmp_path: Path) -> None:
    path = tmp_path / "crd.yaml"
    path.write_text(
        "spec: {versions: [{name: v1, schema: {openAPIV3Schema: {properties: {spec: {properties: "
        "{headGroupSpec: {type: object}}}}}}}]}"
    )
    assert list(lint.read_crds([path])) == ["RayCluster"]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("raycluster.yaml", "groupName: gpu-spot", "groupName: [1]"),
        ("raycluster.yaml", "limits: {", "limits: [] #"),
        ("aws.yaml", '{"CPU": 8, "GPU": 1}', '{"CPU": [8], "GPU": {}}'),
        ("aws.yaml", "node_config:", "node_config: 1\n    other:"),
        ("on_premise.yaml", "[192.168.1.11, 192.168.1.12, 192.168.1.13, 192.168.1.14]", "{a: 1}"),
        ("slurm/train.sbatch", "--nodes=4", "--nodes=four"),
        ("slurm/predict.sbatch", "--gpus-per-worker 1", "--gpus-per-worker one"),
    ],
)
def test_what_is_of_another_kind_is_a_problem_too(tmp_path: Path, name: str, before: str, after: str) -> None:
    text = (ROOT / "cluster" / name).read_text(encoding="utf-8")
    assert before in text
    assert lines(tmp_path / Path(name).name, text.replace(before, after))


def test_a_file_that_is_not_there_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["lint", "nowhere.yaml"]) == 2
    assert capsys.readouterr().err == "python -m cluster: nowhere.yaml: No such file or directory\n"


@pytest.mark.row("C3")
def test_slurms_options_are_read_as_slurm_does() -> None:
    text = "#!/bin/bash\n#SBATCH -N 2 --gres=gpu:a100:4  # four\n\n#SBATCH --requeue\necho\n#SBATCH --time=1\n"
    assert files.sbatch_options(text) == {"nodes": "2", "gres": "gpu:a100:4", "requeue": ""}


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("30", 1800), ("30:05", 1805), ("1:00:05", 3605), ("2-1", 176400), ("2-1:30", 178200), ("long", None), ("", None)],
)
@pytest.mark.row("C3")
def test_time_limits_by_hand(limit: str, seconds: int | None) -> None:
    from cluster import slurm

    assert slurm._seconds(limit) == seconds
