"""Who may talk to Ray: whoever can, may run any code. A token keeps others out, from a cluster and from our own Ray.

`python -m search token` makes the token of a cluster to be, readable by its owner alone, and prints where it is.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any, Literal

from search.errors import StudyError

OPEN_VARIABLE = "SEARCH_ALLOW_OPEN_CLUSTER"
"""Environment variable: 1 allows a cluster that asks nobody for a token."""
WAIT_S = 5.0
Answer = Literal["open", "guarded", "none"]


def prepare(environment: MutableMapping[str, str]) -> None:
    """Say how this process and all that it starts deal with Ray, which reads it once, when it is first imported.

    A Ray of our own is reachable from this machine only, with a token of its own instead of a file in the home folder.
    A cluster that RAY_ADDRESS names is shown the token that is there; Ray itself does so only where it is told to.
    """
    protect(environment)
    if "RAY_ADDRESS" in environment:
        if has_token(environment):
            environment.setdefault("RAY_AUTH_MODE", "token")
        return
    environment.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    environment.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_AUTH_MODE" not in environment:
        environment.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))


def has_token(environment: MutableMapping[str, str]) -> bool:
    """Return whether there is a token to show."""
    return bool(environment.get("RAY_AUTH_TOKEN")) or token_file(environment).is_file()


def token_file(environment: MutableMapping[str, str]) -> Path:
    """Return where Ray looks for a token."""
    given = environment.get("RAY_AUTH_TOKEN_PATH")
    return Path(given).expanduser() if given else Path.home() / ".ray" / "auth_token"


def protect(environment: MutableMapping[str, str]) -> None:
    """Keep the token from all but its owner: Ray writes it readable for everybody on the machine."""
    path = token_file(environment)
    try:
        state = path.stat()
        if state.st_uid == os.getuid() and state.st_mode & 0o077:
            path.chmod(0o600)
    except OSError:
        return  # none is there, or it is mounted so that nobody can change it


def make(environment: MutableMapping[str, str]) -> Path:
    """Return the token's file, made with a new token where there is none; others can at no moment read it."""
    path = token_file(environment)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        protect(environment)
        return path
    with os.fdopen(descriptor, "w") as stream:
        stream.write(secrets.token_hex(32))
    return path


def refuse_open(address: str) -> None:
    """Refuse a cluster on other machines that answers without a token: anybody near it can run code in our trials.

    Raises:
        StudyError: saying what to do.
    """
    host = address.rpartition(":")[0].strip("[]")
    if os.environ.get(OPEN_VARIABLE) == "1" or is_loopback(host) or answer(address) != "open":
        return
    raise StudyError(
        f"RAY_ADDRESS={address}: this cluster asks nobody for a token, so that whoever reaches it can run any code; "
        "start every node of it with RAY_AUTH_MODE=token and one token (`python -m search token` makes it), or set "
        f"{OPEN_VARIABLE}=1 if nobody else can reach it"
    )


def is_loopback(host: str) -> bool:
    """Return whether an address is this machine's own, which no other can reach."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def answer(address: str, wait_s: float = WAIT_S) -> Answer:
    """Return how the cluster at a HOST:PORT answers somebody who shows no token.

    Ray's own client would show what token it has, so that this asks as a stranger would.
    """
    import grpc
    from ray.core.generated import gcs_service_pb2

    messages: Any = gcs_service_pb2

    with grpc.insecure_channel(address) as channel:
        try:
            ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
            reply = messages.GetClusterIdReply.FromString(ask(b"", timeout=wait_s))
            known = (("ray_cluster_id", reply.cluster_id.hex()),)
            channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetAllNodeInfo")(b"", timeout=wait_s, metadata=known)
        except grpc.RpcError as error:
            refused = (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
            return "guarded" if error.code() in refused else "none"
    return "open"
