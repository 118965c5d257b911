"""Files of Ray's cluster launcher: machines of a cloud by node type, or a list of hosts."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator, Mapping
from typing import Any

from cluster import instances, shell
from cluster.files import ClusterFile, flag, listing, mapping, whole
from cluster.problem import Problem

LEAST_IDLE_MIN = 5
"""A node that leaves sooner is gone when the slots of a rung are wanted again."""
OWN_COMMANDS = {
    "setup_commands": "Ray's default installs a nightly build",
    "head_start_ray_commands": "Ray's default opens the dashboard, and asks for no token",
    "worker_start_ray_commands": "Ray's default asks for no token",
}
WHERE = {"aws": "region", "gcp": "region", "azure": "location"}
REGION = {
    "aws": re.compile(r"[a-z]{2}(-gov|-iso[a-z]?)?-(north|south|east|west|central){1,2}-\d"),
    "gcp": re.compile(r"[a-z]+-(north|south|east|west|central){1,2}\d{1,2}"),
}
TOKEN_FILE = re.compile(r"(^|/)\.?ray/auth_token$")


def cloud(file: ClusterFile, ray: str) -> Iterator[Problem]:
    """Check a file that starts machines of a cloud."""
    yield from _schema(file)
    yield from _place(file)
    yield from _head(file)
    for name, node_type in node_types(file).items():
        key = f"available_node_types.{name}"
        yield from _amounts(file, key, node_type)
        yield from _instance(file, key, node_type)
        if name != file.content.get("head_node_type"):
            yield from _fallback(file, key, name, node_type)
            if shell.DRIVER in mapping(node_type.get("resources")):
                at = f"{key}.resources.{shell.DRIVER}"
                yield Problem(at, "drivers may land here, beside trials; leave it to the head")
    yield from _sums(file)
    yield from _every_launcher_file(file, ray)


def hosts(file: ClusterFile, ray: str) -> Iterator[Problem]:
    """Check a file that lists hosts."""
    provider = mapping(file.content.get("provider"))
    workers = listing(provider.get("worker_ips"))
    if not provider.get("head_ip"):
        yield Problem("provider.head_ip", "missing; write the host that the drivers run on")
    if not workers:
        yield Problem("provider.worker_ips", "missing; list the hosts that trials run on")
    if provider.get("head_ip") and workers:
        yield from _schema(file)
    if provider.get("head_ip") in workers:
        yield Problem("provider.worker_ips", f"{provider['head_ip']} is the head too; list it once")
    twice = sorted({str(each) for each in workers if workers.count(each) > 1})
    if twice:
        yield Problem("provider.worker_ips", f"{', '.join(twice)} stands twice; list each host once")
    least, most = (whole(file.content.get(key), len(workers)) for key in ("min_workers", "max_workers"))
    if least > most:
        yield Problem("min_workers", f"got {least}, more than max_workers {most}; lower it")
    if most > len(workers):
        yield Problem("max_workers", f"got {most}, but worker_ips lists {len(workers)} hosts; lower it or list more")
    start = start_words(file, "head_start_ray_commands")
    key = "head_start_ray_commands"
    if flag(start, "--num-cpus") != "0":
        yield Problem(
            key, f"got --num-cpus {flag(start, '--num-cpus')}, so trials run beside drivers; write --num-cpus=0"
        )
    if whole(shell.resources(flag(start, "--resources")).get(shell.DRIVER)) < 1:
        yield Problem(key, f"no resource for drivers; write --resources='{{\"{shell.DRIVER}\": 8}}'")
    yield from _every_launcher_file(file, ray)


def node_types(file: ClusterFile) -> dict[str, Mapping[str, Any]]:
    """Return the node types by name."""
    return {str(name): mapping(each) for name, each in mapping(file.content.get("available_node_types")).items()}


def _worker_types(file: ClusterFile) -> list[tuple[str, Mapping[str, Any]]]:
    return [(name, each) for name, each in node_types(file).items() if name != file.content.get("head_node_type")]


def start_words(file: ClusterFile, key: str) -> list[str]:
    """Return the words of the command that starts Ray."""
    for command in listing(file.content.get(key)):
        if "ray start" in str(command):
            with contextlib.suppress(ValueError):
                return shlex.split(str(command))
    return []


def is_spot(file: ClusterFile, node_type: Mapping[str, Any]) -> bool:
    """Return whether the cloud may take such a machine away."""
    config = mapping(node_type.get("node_config"))
    if file.provider == "aws":
        return mapping(config.get("InstanceMarketOptions")).get("MarketType") == "spot"
    if file.provider == "azure":
        return str(mapping(config.get("azure_arm_parameters")).get("priority", "")).lower() in ("spot", "low")
    plans = config.get("scheduling")
    each = [mapping(plan) for plan in (plans if isinstance(plans, list) else [plans])]
    return any(plan.get("preemptible") is True or plan.get("provisioningModel") == "SPOT" for plan in each)


def instance(file: ClusterFile, node_type: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of the instance type, and the key that it stands under."""
    config = mapping(node_type.get("node_config"))
    if file.provider == "azure":
        return str(mapping(config.get("azure_arm_parameters")).get("vmSize", "")), "azure_arm_parameters.vmSize"
    key = "InstanceType" if file.provider == "aws" else "machineType"
    return str(config.get(key, "")).rpartition("/")[2], key


def _schema(file: ClusterFile) -> Iterator[Problem]:
    """Ask Ray itself, as `ray up` would."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            validate_config(prepare_config(dict(file.content)))
    except jsonschema.ValidationError as error:
        key = ".".join(str(part) for part in error.absolute_path) or "the file"
        yield Problem(key, f"Ray refuses it: {error.message[:200]}")
    except Exception as error:  # Ray's own checks raise whatever comes to hand; each is a refusal
        yield Problem("the file", f"Ray refuses it: {type(error).__name__} {error}")


def _place(file: ClusterFile) -> Iterator[Problem]:
    if file.provider not in WHERE:
        yield Problem("provider.type", f"got {file.provider!r}; expected one of {', '.join(WHERE)}, or local")
        return
    provider = mapping(file.content.get("provider"))
    if not provider.get(WHERE[file.provider]):
        yield Problem(f"provider.{WHERE[file.provider]}", "missing, so Ray picks one; write where your quota is")
    region = str(provider.get("region", ""))
    zones = [zone.strip() for zone in str(provider.get("availability_zone", "")).split(",") if zone.strip()]
    if file.provider in REGION and region:
        if not REGION[file.provider].fullmatch(region):
            yield Problem("provider.region", f"got {region!r}, which is no region of {file.provider}; look the name up")
        for zone in zones:
            if not zone.startswith(region):
                yield Problem("provider.availability_zone", f"got {zone}, which is not in {region}; write one that is")
    rules = listing(mapping(provider.get("security_group")).get("IpPermissions"))
    for index, rule in enumerate(rules):
        ports = {mapping(rule).get("FromPort"), mapping(rule).get("ToPort")}
        if re.search(r"'(0\.0\.0\.0|::)/0'", str(rule)) and ports != {22}:
            key = f"provider.security_group.IpPermissions[{index}]"
            yield Problem(key, "lets the whole internet in; name your network, or forward the port over ssh")


def _head(file: ClusterFile) -> Iterator[Problem]:
    name = file.content.get("head_node_type")
    head = node_types(file).get(str(name))
    if head is None:
        known = ", ".join(node_types(file)) or "none"
        yield Problem("head_node_type", f"got {name!r}; expected one of available_node_types: {known}")
        return
    key = f"available_node_types.{name}"
    has = mapping(head.get("resources"))
    for each in ("CPU", "GPU"):
        if has.get(each, 0 if each == "GPU" else None) != 0:
            came = has.get(each, "nothing")
            yield Problem(f"{key}.resources.{each}", f"got {came}, so trials run beside the drivers; write 0")
    if whole(has.get(shell.DRIVER)) < 1:
        yield Problem(f"{key}.resources.{shell.DRIVER}", "missing, so no driver can ask for the head; write 8")
    if is_spot(file, head):
        yield Problem(f"{key}.node_config", "the head is spot, and every driver goes with it; make it on demand")
    if whole(head.get("max_workers")) > 0:
        yield Problem(f"{key}.max_workers", f"got {head['max_workers']}, so more heads are started; write 0")
    config = mapping(head.get("node_config"))
    if file.provider in instances.KNOWN:
        known_as = instances.KNOWN[file.provider].get(instance(file, head)[0])
        if (known_as and known_as[1]) or config.get("guestAccelerators"):
            yield Problem(f"{key}.node_config", "the head has GPUs that no trial can use; take a machine without")


def _amounts(file: ClusterFile, key: str, node_type: Mapping[str, Any]) -> Iterator[Problem]:
    cap = whole(file.content.get("max_workers"), 2)
    least, most = whole(node_type.get("min_workers")), whole(node_type.get("max_workers"), cap)
    if least < 0 or most < 0:
        yield Problem(f"{key}.min_workers" if least < 0 else f"{key}.max_workers", "less than 0; write 0 or more")
    if least > most:
        yield Problem(f"{key}.min_workers", f"got {least}, more than max_workers {most}; lower it")
    if most > cap:
        yield Problem(
            f"{key}.max_workers", f"got {most}, but the whole cluster has at most {cap}; lower it or raise that"
        )
    idle_s = node_type.get("idle_timeout_s")
    if isinstance(idle_s, int | float) and idle_s < LEAST_IDLE_MIN * 60:
        yield Problem(f"{key}.idle_timeout_s", f"got {idle_s}; expected at least {LEAST_IDLE_MIN * 60}")


def _instance(file: ClusterFile, key: str, node_type: Mapping[str, Any]) -> Iterator[Problem]:
    name, where = instance(file, node_type)
    where = f"{key}.node_config.{where}"
    if file.provider not in instances.KNOWN:
        return
    if not name:
        yield Problem(where, "missing; write the instance type")
        return
    if not instances.FORM[file.provider].fullmatch(name):
        yield Problem(where, f"got {name!r}, which is no instance type of {file.provider}; look the name up")
        return
    config = mapping(node_type.get("node_config"))
    arm = mapping(config.get("azure_arm_parameters"))
    if arm.get("imageVersion") == "latest":
        yield Problem(f"{key}.node_config.azure_arm_parameters.imageVersion", "got latest; write one version")
    known = instances.KNOWN[file.provider].get(name)
    if known is None and (others := instances.sizes(file.provider, name)):
        yield Problem(where, f"got {name!r}, a size that there is not; expected one of {', '.join(others)}")
        return
    if known is None:
        yield Problem(where, f"{name} is not in our table, so its CPUs and GPUs were not compared", note=True)
        return
    cpus, gpus = known
    gpus += sum(whole(mapping(each).get("acceleratorCount")) for each in listing(config.get("guestAccelerators")))
    if file.provider == "gcp" and gpus and "TERMINATE" not in str(config.get("scheduling")):
        yield Problem(f"{key}.node_config.scheduling", "a machine with GPUs needs [{onHostMaintenance: TERMINATE}]")
    if key == f"available_node_types.{file.content.get('head_node_type')}":
        return
    has = mapping(node_type.get("resources"))
    if whole(has.get("GPU")) != gpus:
        yield Problem(f"{key}.resources.GPU", f"got {has.get('GPU', 0)}, but {name} has {gpus}; write {gpus}")
    if "CPU" not in has or whole(has["CPU"]) > cpus:
        yield Problem(f"{key}.resources.CPU", f"got {has.get('CPU', 'nothing')}, but {name} has {cpus}; write {cpus}")


def _fallback(file: ClusterFile, key: str, name: str, node_type: Mapping[str, Any]) -> Iterator[Problem]:
    if not is_spot(file, node_type):
        return
    others = {
        other: each
        for other, each in node_types(file).items()
        if other not in (name, file.content.get("head_node_type")) and not is_spot(file, each)
    }
    same = {
        other: each
        for other, each in others.items()
        if mapping(each.get("resources")) == mapping(node_type.get("resources")) and whole(each.get("max_workers"), 1)
    }
    if not same:
        yield Problem(
            key,
            "spot without a way out when there is none; add an on-demand type of the same resources, lower priority",
        )
    elif whole(node_type.get("priority")) <= max(whole(each.get("priority")) for each in same.values()):
        yield Problem(
            f"{key}.priority",
            f"got {node_type.get('priority', 0)}, no higher than that of {' and '.join(same)}; raise it: spot first",
        )


def _sums(file: ClusterFile) -> Iterator[Problem]:
    least = sum(whole(each.get("min_workers")) for each in node_types(file).values())
    most = whole(file.content.get("max_workers"), 2)
    if not most or not any(whole(each.get("max_workers"), most) for _, each in _worker_types(file)):
        yield Problem("max_workers", "no node for trials can ever come; write how many may")
    if least > most:
        yield Problem(
            "max_workers", f"got {most}, less than all min_workers together, {least}; raise it or lower those"
        )
    if "max_workers" not in file.content:
        yield Problem("max_workers", "missing, so Ray's 2; write how many nodes the bill may grow to")


def _every_launcher_file(file: ClusterFile, ray: str) -> Iterator[Problem]:
    content = file.content
    for key, why in OWN_COMMANDS.items():
        if not content.get(key):
            yield Problem(key, f"missing, and {why}; write it out")
    idle = content.get("idle_timeout_minutes", LEAST_IDLE_MIN)
    if isinstance(idle, int | float) and idle < LEAST_IDLE_MIN:
        yield Problem(
            "idle_timeout_minutes", f"got {idle}, shorter than a rung may wait; write {LEAST_IDLE_MIN} or more"
        )
    if not mapping(content.get("auth")).get("ssh_user"):
        yield Problem("auth.ssh_user", "missing; write the user that your machines' image lets in by ssh")
    if content.get("upscaling_speed") == 0:
        yield Problem("upscaling_speed", "got 0, so no node is ever added; write 1 or more")
    yield from _starts(file)
    yield from _token_file(file)
    yield from _versions(file, ray)
    yield from _shared(file)


def _commands(file: ClusterFile) -> Iterator[tuple[str, str]]:
    for key in file.content:
        if str(key).endswith("_commands"):
            for index, command in enumerate(listing(file.content[key])):
                yield f"{key}[{index}]", str(command)


def _starts(file: ClusterFile) -> Iterator[Problem]:
    for key, command in _commands(file):
        yield from shell.starts_ray(command, key)
    head = start_words(file, "head_start_ray_commands")
    worker = start_words(file, "worker_start_ray_commands")
    port = flag(head, "--port") or "6379"
    if head and "--head" not in head:
        yield Problem("head_start_ray_commands", "no --head, so nobody is the head; add it")
    if worker and flag(worker, "--address") != f"$RAY_HEAD_IP:{port}":
        came = flag(worker, "--address") or "nothing"
        yield Problem("worker_start_ray_commands", f"got --address {came}; write --address=$RAY_HEAD_IP:{port}")
    if head and flag(head, "--autoscaling-config") is None:
        yield Problem("head_start_ray_commands", "no --autoscaling-config=~/ray_bootstrap_config.yaml: no worker comes")
    if head and "RAY_enable_autoscaler_v2=1" not in head:
        yield Problem(
            "head_start_ray_commands",
            "not autoscaler v2, which alone knows priority; write RAY_enable_autoscaler_v2=1 before `ray start`",
        )


def _token_file(file: ClusterFile) -> Iterator[Problem]:
    mounts = {str(there): str(here) for there, here in mapping(file.content.get("file_mounts")).items()}
    told = {path for _, command in _commands(file) for path in re.findall(r"RAY_AUTH_TOKEN_PATH=(\S+)", command)}
    token = next((there for there in mounts if (there in told if told else TOKEN_FILE.search(there))), None)
    setup = [command for key, command in _commands(file) if "setup_commands" in key]
    if token is None:
        yield Problem("file_mounts", 'no token for the nodes; add "~/.ray/auth_token": "~/.ray/auth_token"')
    elif not any(re.search(rf"chmod (0?600|go=|go-rwx)\b.* {re.escape(token)}(\s|$)", command) for command in setup):
        yield Problem("setup_commands", f"others on a node can read the token; add `chmod 600 {token}`")
    for there, here in mounts.items():
        if re.search(r"(^|/)(\.ssh|\.aws|\.azure|\.kube|\.env)\b|\.pem$|id_(rsa|ed25519)$|\.config/gcloud", here):
            yield Problem(
                f"file_mounts.{there}", f"carries your own keys ({here}) to every node; give nodes a role instead"
            )


def _versions(file: ClusterFile, ray: str) -> Iterator[Problem]:
    docker = mapping(file.content.get("docker"))
    images = {key: docker[key] for key in ("image", "head_image", "worker_image") if docker.get(key)}
    for key, name in images.items():
        yield from shell.image(name, f"docker.{key}", ray)
    wants_gpu = any(whole(mapping(each.get("resources")).get("GPU")) for _, each in _worker_types(file))
    for key, name in images.items():
        if key != "head_image" and wants_gpu and str(name).endswith("-cpu"):
            yield Problem(f"docker.{key}", f"got {name}, which knows no GPU, for nodes with GPUs; write -gpu")
    for key, command in _commands(file):
        yield from shell.installs(command, key, ray)
    setup = " ".join(command for key, command in _commands(file) if "setup_commands" in key)
    if not images and "requirements.lock" not in setup and not re.search(r"\bray(\[[\w,]+\])?==", setup):
        yield Problem("setup_commands", f"nothing says which Ray; name an image, or install ray=={ray}")


def _shared(file: ClusterFile) -> Iterator[Problem]:
    """Check that every node sees the folder that results go to."""
    text = " ".join(command for _, command in _commands(file))
    mounted = set(re.findall(r"\bmountpoint -q (/\S+)", text)) | set(re.findall(r"\bmount -t nfs4? .*?\s(/\S+)", text))
    if not mounted:
        yield Problem("initialization_commands", "no shared folder is mounted; mount one, for studies and checkpoints")
        return
    seen = sorted(mounted)
    if docker := mapping(file.content.get("docker")):
        options = " ".join(str(each) for key in docker if key.endswith("run_options") for each in listing(docker[key]))
        binds = re.findall(r"(?:-v|--volume)[ =]([^\s:]+):([^\s:]+)", options)
        seen = [inside for outside, inside in binds if outside in mounted]
        if re.search(r"--privileged|(^|\s)(-p|--publish)\b", options):
            yield Problem("docker.run_options", "--privileged and published ports let others in; leave them out")
        if not seen:
            folder = min(mounted)
            yield Problem("docker.run_options", f"the container does not see {folder}; add '-v {folder}:{folder}'")
    for folder in shell.results_folders(file.text):
        if seen and not any(f"{folder}/".startswith(f"{each.rstrip('/')}/") for each in seen):
            yield Problem("--runs", f"got {folder}, which is no part of {seen[0]}: results would go with the head")
