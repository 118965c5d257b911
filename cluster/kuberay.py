"""KubeRay's RayCluster and RayJob."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import configuration
from cluster import shell
from cluster.files import ClusterFile, listing, mapping, whole
from cluster.problem import Problem

LEAST_IDLE_S = 300
GPU = "nvidia.com/gpu"
PUBLIC = ("LoadBalancer", "NodePort")


def rules(file: ClusterFile, ray: str) -> Iterator[Problem]:
    """Check a RayCluster or RayJob."""
    if file.content.get("apiVersion") != "ray.io/v1":
        yield Problem("apiVersion", f"got {file.content.get('apiVersion')!r}; write ray.io/v1")
    if not file.ray:
        yield Problem(file.ray_key, "missing; describe the cluster there")
        return
    if file.content.get("kind") == "RayJob":
        yield from _job(file)
    named = mapping(file.content.get("metadata"))
    if not named.get("name") and not named.get("generateName"):
        yield Problem("metadata.name", "missing; write a name")
    groups = [str(each.get("groupName")) for each in worker_groups(file).values()]
    if not groups:
        yield Problem(f"{file.ray_key}.workerGroupSpecs", "missing, so no trial ever runs; describe a group")
    if len(set(groups)) < len(groups):
        yield Problem(f"{file.ray_key}.workerGroupSpecs", "two groups of one groupName; name each once")
    yield from _whole_cluster(file, ray)
    yield from _head(file)
    for key, group in worker_groups(file).items():
        yield from _worker_group(file, key, group)
    for key, group in all_groups(file).items():
        yield from _pod(key, group, ray)
    yield from _public(file)
    yield from _shared(file)


def worker_groups(file: ClusterFile) -> dict[str, Mapping[str, Any]]:
    """Return the groups of workers by the key that they stand under."""
    groups = listing(file.ray.get("workerGroupSpecs"))
    return {f"{file.ray_key}.workerGroupSpecs[{index}]": mapping(each) for index, each in enumerate(groups)}


def all_groups(file: ClusterFile) -> dict[str, Mapping[str, Any]]:
    """Return the head's group and those of workers."""
    return {f"{file.ray_key}.headGroupSpec": mapping(file.ray.get("headGroupSpec")), **worker_groups(file)}


def amounts(group: Mapping[str, Any]) -> tuple[float, float]:
    """Return the CPUs and GPUs of a pod, as Ray's autoscaler reads them."""
    given, start = mapping(group.get("resources")), mapping(group.get("rayStartParams"))
    asked = mapping(_container(group).get("resources"))
    pod = {**mapping(asked.get("requests")), **mapping(asked.get("limits"))}
    cpus = given.get("CPU", start.get("num-cpus", pod.get("cpu", 0)))
    gpus = given.get("GPU", start.get("num-gpus", pod.get(GPU, 0)))
    return quantity(cpus), quantity(gpus)


def environment(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the variables that the container gets whose values stand in the file."""
    variables = [mapping(each) for each in listing(_container(group).get("env"))]
    return {str(each.get("name")): each["value"] for each in variables if "value" in each}


def quantity(value: Any) -> float:
    """Return a Kubernetes quantity of CPUs or GPUs, rounded up as Ray does: 500m is 1."""
    text = str(value)
    try:
        return math.ceil(float(text[:-1]) / 1000 if text.endswith("m") else float(text))
    except ValueError:
        return 0


def is_spot(group: Mapping[str, Any]) -> bool:
    """Return whether the pods are placed on machines that may be taken away."""
    pod = _pod_spec(group)
    chosen = [f"{key}={value}" for key, value in mapping(pod.get("nodeSelector")).items()]
    text = " ".join([*chosen, str(pod.get("affinity", ""))]).lower()
    return bool(re.search(r"gke-spot['\": =]+true|preemptible['\": =]+true|(?<!gke-)\bspot\b", text))


def schema_problems(content: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[Problem]:
    """Ask KubeRay's own schema, and name the keys that it does not know: Kubernetes drops them without a word."""
    import jsonschema

    for error in jsonschema.Draft7Validator(schema).iter_errors(content):
        key = _dotted(error.absolute_path) or "the file"
        yield Problem(key, f"KubeRay refuses it: {error.message[:200]}")
    yield from _unknown(content, schema, "")


def _unknown(content: Any, schema: Mapping[str, Any], key: str) -> Iterator[Problem]:
    if isinstance(content, list):
        for index, each in enumerate(content):
            yield from _unknown(each, mapping(schema.get("items")), f"{key}[{index}]")
    known = mapping(schema.get("properties"))
    if not isinstance(content, Mapping) or not known or schema.get("x-kubernetes-preserve-unknown-fields"):
        return
    for name, value in content.items():
        path = f"{key}.{name}".lstrip(".")
        if name in known:
            yield from _unknown(value, mapping(known[name]), path)
        elif not schema.get("additionalProperties"):
            yield Problem(path, configuration.unknown_key(str(name), map(str, known)).problem)


def _dotted(path: Any) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")


def _pod_spec(group: Mapping[str, Any]) -> Mapping[str, Any]:
    return mapping(mapping(group.get("template")).get("spec"))


def _container(group: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the container that Ray runs in: the first."""
    return mapping(next(iter(listing(_pod_spec(group).get("containers"))), None))


def _whole_cluster(file: ClusterFile, ray: str) -> Iterator[Problem]:
    spec, key = file.ray, file.ray_key
    if str(spec.get("rayVersion")) != ray:
        yield Problem(
            f"{key}.rayVersion", f"got {spec.get('rayVersion')}, but requirements.lock has {ray}; write {ray}"
        )
    if mapping(spec.get("authOptions")).get("mode") != "token":
        yield Problem(f"{key}.authOptions.mode", "no token, so anyone in the network runs code; write token")
    fault = mapping(spec.get("gcsFaultToleranceOptions"))
    if not fault:
        yield Problem(f"{key}.gcsFaultToleranceOptions", "missing, so all falls with the head; name a Redis")
    elif fault.get("backend", "redis") == "redis" and not fault.get("redisAddress"):
        yield Problem(f"{key}.gcsFaultToleranceOptions.redisAddress", "missing; write host:port of a Redis")
    elif fault.get("backend", "redis") == "redis" and not fault.get("redisPassword"):
        yield Problem(f"{key}.gcsFaultToleranceOptions.redisPassword", "missing; refer to a secret")
    if spec.get("enableInTreeAutoscaling") is not True:
        for at, group in worker_groups(file).items():
            if group.get("minReplicas") != group.get("maxReplicas"):
                came = f"minReplicas {group.get('minReplicas')}, maxReplicas {group.get('maxReplicas')}"
                at = f"{key}.enableInTreeAutoscaling"
                yield Problem(at, f"off, yet {group.get('groupName')} has {came}; write true, or make them equal")
        return
    options = mapping(spec.get("autoscalerOptions"))
    if options.get("version") != "v2":
        came = options.get("version", "nothing")
        yield Problem(f"{key}.autoscalerOptions.version", f"got {came}; write v2, which alone knows priority")
    if whole(options.get("idleTimeoutSeconds"), 60) < LEAST_IDLE_S:
        came = options.get("idleTimeoutSeconds", "nothing, which is 60")
        at = f"{key}.autoscalerOptions.idleTimeoutSeconds"
        yield Problem(at, f"got {came}, shorter than a rung may wait; write {LEAST_IDLE_S} or more")


def _head(file: ClusterFile) -> Iterator[Problem]:
    key = f"{file.ray_key}.headGroupSpec"
    head = mapping(file.ray.get("headGroupSpec"))
    cpus, gpus = amounts(head)
    if cpus:
        yield Problem(f"{key}.rayStartParams.num-cpus", f'the head has {cpus:g} CPU for trials; write "0"')
    if gpus:
        yield Problem(f"{key}.rayStartParams.num-gpus", f'the head has {gpus:g} GPU for trials; write "0"')
    if not drivers(head):
        at = f"{key}.rayStartParams.resources"
        yield Problem(at, f'no resource for drivers; write \'"{{\\"{shell.DRIVER}\\": 8}}"\'')
    if is_spot(head):
        yield Problem(f"{key}.template.spec.nodeSelector", "the head is spot, and every driver goes with it")


def drivers(head: Mapping[str, Any]) -> int:
    """Return how many drivers the head takes."""
    given = mapping(head.get("resources"))
    start = shell.resources(mapping(head.get("rayStartParams")).get("resources"))
    return whole(given.get(shell.DRIVER, start.get(shell.DRIVER)))


def _worker_group(file: ClusterFile, key: str, group: Mapping[str, Any]) -> Iterator[Problem]:
    if not isinstance(group.get("groupName"), str):
        yield Problem(f"{key}.groupName", f"got {group.get('groupName')!r}; write a name")
    least, most = whole(group.get("minReplicas")), whole(group.get("maxReplicas"))
    if least > most:
        yield Problem(f"{key}.minReplicas", f"got {least}, more than maxReplicas {most}; lower it")
    elif not least <= whole(group.get("replicas"), least) <= most:
        yield Problem(f"{key}.replicas", f"got {group.get('replicas')}; expected {least} to {most}")
    if drivers(group):
        yield Problem(f"{key}.rayStartParams.resources", "drivers may land here, beside trials; leave it to the head")
    idle_s = group.get("idleTimeoutSeconds")
    if idle_s is not None and whole(idle_s) < LEAST_IDLE_S:
        yield Problem(f"{key}.idleTimeoutSeconds", f"got {idle_s}; write {LEAST_IDLE_S} or more")
    if not is_spot(group):
        return
    others = [each for at, each in worker_groups(file).items() if at != key and not is_spot(each)]
    same = [each for each in others if amounts(each) == amounts(group) and whole(each.get("maxReplicas"))]
    if not same:
        yield Problem(key, "spot without a way out when there is none; add an on-demand group of the same size")
    elif whole(group.get("priority")) <= max(whole(each.get("priority")) for each in same):
        came = group.get("priority", 0)
        yield Problem(f"{key}.priority", f"got {came}, no higher than on demand; raise it: spot first")


def _pod(key: str, group: Mapping[str, Any], ray: str) -> Iterator[Problem]:
    spec, container = _pod_spec(group), _container(group)
    at = f"{key}.template.spec"
    yield from shell.image(container.get("image"), f"{at}.containers[0].image", ray)
    if spec.get("restartPolicy") != "Never":
        came = spec.get("restartPolicy", "nothing, which is Always")
        yield Problem(f"{at}.restartPolicy", f"got {came}; write Never: autoscaler v2 replaces pods itself")
    if spec.get("hostNetwork"):
        yield Problem(f"{at}.hostNetwork", "opens Ray's ports on the machine; leave it out")
    if mapping(container.get("securityContext")).get("privileged"):
        yield Problem(f"{at}.containers[0].securityContext.privileged", "a trial could take the machine; leave it out")
    for index, each in enumerate(listing(container.get("env"))):
        if mapping(each).get("name") == "RAY_AUTH_MODE" and mapping(each).get("value") != "token":
            yield Problem(f"{at}.containers[0].env[{index}]", "turns the token off; leave it to authOptions")
    asked = mapping(container.get("resources"))
    limits, requests = mapping(asked.get("limits")), mapping(asked.get("requests"))
    for name in ("cpu", "memory"):
        if name not in limits:
            yield Problem(f"{at}.containers[0].resources.limits.{name}", "missing, so Ray takes the whole machine's")
    if quantity(requests.get(GPU, limits.get(GPU, 0))) != quantity(limits.get(GPU, 0)):
        yield Problem(f"{at}.containers[0].resources.requests", f"{GPU} differs from that of limits; make them equal")
    has, start = quantity(limits.get(GPU, 0)), mapping(group.get("rayStartParams")).get("num-gpus")
    if start is not None and quantity(start) != has:
        yield Problem(f"{key}.rayStartParams.num-gpus", f"got {start}, but the pod has {has:g}; leave it out")
    given = mapping(group.get("resources")).get("GPU")
    if given is not None and quantity(given) != has:
        yield Problem(f"{key}.resources.GPU", f"got {given}, but the pod has {has:g}; leave it out")


def _public(file: ClusterFile) -> Iterator[Problem]:
    head = mapping(file.ray.get("headGroupSpec"))
    key = f"{file.ray_key}.headGroupSpec"
    kinds = {
        f"{key}.serviceType": head.get("serviceType"),
        f"{key}.headService.spec.type": mapping(mapping(head.get("headService")).get("spec")).get("type"),
    }
    kinds |= {
        f"{each.get('kind')}.spec.type": mapping(each.get("spec")).get("type")
        for each in file.beside
        if each.get("kind") == "Service"
    }
    for at, kind in kinds.items():
        if kind in PUBLIC:
            yield Problem(at, f"got {kind}, which opens the cluster to others; write ClusterIP and forward the port")
    if head.get("enableIngress"):
        yield Problem(f"{key}.enableIngress", "opens the dashboard to others; leave it out and forward the port")
    for each in file.beside:
        if each.get("kind") in ("Ingress", "HTTPRoute", "Route"):
            yield Problem(str(each["kind"]), "opens the cluster to others; leave it out and forward the port")


def _shared(file: ClusterFile) -> Iterator[Problem]:
    """Check that every pod sees the folder that results go to."""
    folders = []
    for key, group in all_groups(file).items():
        mounted = _shared_folders(group)
        if not mounted:
            yield Problem(f"{key}.template.spec.volumes", "no shared folder; mount a claim that many nodes may write")
            return
        folders.append(mounted)
    everywhere = set.intersection(*folders)
    if not everywhere:
        yield Problem(f"{file.ray_key}.headGroupSpec.template.spec.containers[0].volumeMounts", "mountPath differs "
                      "from that of the workers; mount the shared folder at one path")  # fmt: skip
    for folder in shell.results_folders(f"{file.text}\n"):
        if everywhere and not any(f"{folder}/".startswith(f"{each.rstrip('/')}/") for each in everywhere):
            yield Problem(
                "--runs", f"got {folder}, which is no part of {min(everywhere)}: results would go with the pod"
            )


def _shared_folders(group: Mapping[str, Any]) -> set[str]:
    volumes = [mapping(each) for each in listing(_pod_spec(group).get("volumes"))]
    shared = {str(each.get("name")) for each in volumes if {"persistentVolumeClaim", "nfs", "csi"} & set(each)}
    mounts = [mapping(each) for each in listing(_container(group).get("volumeMounts"))]
    return {
        str(each.get("mountPath")) for each in mounts if str(each.get("name")) in shared and not each.get("readOnly")
    }


def _job(file: ClusterFile) -> Iterator[Problem]:
    spec = mapping(file.content.get("spec"))
    if not spec.get("entrypoint"):
        yield Problem(
            "spec.entrypoint", "missing; write the command, such as python tune.py --space X.yaml --runs FOLDER"
        )
    elif "tune.py" in str(spec["entrypoint"]) and "--runs" not in str(spec["entrypoint"]):
        yield Problem("spec.entrypoint", "no --runs, so results go with the pod; name a folder that all nodes see")
    if quantity(spec.get("entrypointNumGpus", 0)):
        yield Problem("spec.entrypointNumGpus", "a driver computes nothing and would hold a GPU; write 0")
    if quantity(spec.get("entrypointNumCpus", 0)):
        yield Problem("spec.entrypointNumCpus", "the head has no CPU to give, so the job would wait; write 0")
    has = drivers(mapping(file.ray.get("headGroupSpec")))
    yield from shell.needs_driver(spec.get("entrypointResources"), "spec.entrypointResources", has or None)
    if spec.get("shutdownAfterJobFinishes") is not True:
        yield Problem(
            "spec.shutdownAfterJobFinishes", "off, so the cluster goes on costing after the search; write true"
        )
