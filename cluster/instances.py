"""What common instance types have, by the cloud's own names: CPUs (virtual ones, as Ray counts them) and GPUs."""

from __future__ import annotations

import re

SIZES = {"large": 2, "xlarge": 4, "2xlarge": 8, "4xlarge": 16, "8xlarge": 32, "12xlarge": 48, "16xlarge": 64}
ONE_OR_MORE = {
    "xlarge": (4, 1),
    "2xlarge": (8, 1),
    "4xlarge": (16, 1),
    "8xlarge": (32, 1),
    "12xlarge": (48, 4),
    "16xlarge": (64, 1),
    "24xlarge": (96, 4),
    "48xlarge": (192, 8),
}
OLDER = {**SIZES, "24xlarge": 96, "metal": 96}
NEWER = {**SIZES, "24xlarge": 96, "32xlarge": 128, "metal": 128}
AWS = {
    **{f"{kind}.{size}": (cpus, 0) for kind in ("m5", "r5") for size, cpus in OLDER.items()},
    **{f"{kind}.{size}": (cpus, 0) for kind in ("m6i", "c6i", "r6i") for size, cpus in NEWER.items()},
    **{f"{kind}.{size}": has for kind in ("g5", "g6", "g6e") for size, has in ONE_OR_MORE.items()},
    **{f"g4dn.{size}": (cpus, 1) for size, cpus in SIZES.items() if size != "large"},
    "g4dn.12xlarge": (48, 4),
    "g4dn.metal": (96, 8),
    "p3.2xlarge": (8, 1),
    "p3.8xlarge": (32, 4),
    "p3.16xlarge": (64, 8),
    "p3dn.24xlarge": (96, 8),
    "p4d.24xlarge": (96, 8),
    "p4de.24xlarge": (96, 8),
    "p5.48xlarge": (192, 8),
    "p5en.48xlarge": (192, 8),
}
GCP = {
    **{f"e2-standard-{cpus}": (cpus, 0) for cpus in (2, 4, 8, 16, 32)},
    **{f"n2-standard-{cpus}": (cpus, 0) for cpus in (2, 4, 8, 16, 32, 48, 64, 80, 96, 128)},
    **{f"n1-standard-{cpus}": (cpus, 0) for cpus in (1, 2, 4, 8, 16, 32, 64, 96)},
    **{f"g2-standard-{cpus}": (cpus, 1) for cpus in (4, 8, 12, 16, 32)},
    "g2-standard-24": (24, 2),
    "g2-standard-48": (48, 4),
    "g2-standard-96": (96, 8),
    **{f"a2-highgpu-{gpus}g": (12 * gpus, gpus) for gpus in (1, 2, 4, 8)},
    **{f"a2-ultragpu-{gpus}g": (12 * gpus, gpus) for gpus in (1, 2, 4, 8)},
    "a2-megagpu-16g": (96, 16),
    **{f"a3-highgpu-{gpus}g": (26 * gpus, gpus) for gpus in (1, 2, 4, 8)},
    "a3-megagpu-8g": (208, 8),
}
AZURE = {
    **{f"Standard_D{cpus}s_v{version}": (cpus, 0) for cpus in (2, 4, 8, 16, 32, 48, 64, 96) for version in (3, 4, 5)},
    "Standard_NC4as_T4_v3": (4, 1),
    "Standard_NC8as_T4_v3": (8, 1),
    "Standard_NC16as_T4_v3": (16, 1),
    "Standard_NC64as_T4_v3": (64, 4),
    "Standard_NC6s_v3": (6, 1),
    "Standard_NC12s_v3": (12, 2),
    "Standard_NC24s_v3": (24, 4),
    "Standard_NC24ads_A100_v4": (24, 1),
    "Standard_NC48ads_A100_v4": (48, 2),
    "Standard_NC96ads_A100_v4": (96, 4),
    "Standard_ND96asr_v4": (96, 8),
    "Standard_ND96amsr_A100_v4": (96, 8),
    "Standard_NC40ads_H100_v5": (40, 1),
    "Standard_NC80adis_H100_v5": (80, 2),
    "Standard_ND96isr_H100_v5": (96, 8),
    "Standard_NV36ads_A10_v5": (36, 1),
    "Standard_NV72ads_A10_v5": (72, 2),
}
KNOWN = {"aws": AWS, "gcp": GCP, "azure": AZURE}
FORM = {
    "aws": re.compile(r"[a-z]+[0-9][a-z0-9-]*\.(nano|micro|small|medium|large|[0-9]*xlarge|metal(-[0-9]+xl)?)"),
    "gcp": re.compile(r"[a-z][0-9][a-z]*-[a-z0-9]+(-[a-z0-9]+)*"),
    "azure": re.compile(r"Standard_[A-Z]+[0-9]+[A-Za-z0-9-]*(_[A-Za-z0-9]+)*"),
}
"""How a name looks: what does not is a slip of the pen, what does may be newer than this table."""


def family(provider: str, name: str) -> str:
    """Return what instance types of several sizes have in common."""
    if provider == "aws":
        return name.partition(".")[0]
    return name.rpartition("-")[0] if provider == "gcp" else re.sub(r"\d+", "#", name, count=1)


def sizes(provider: str, name: str) -> list[str]:
    """Return the instance types that we know of the same family."""
    return [known for known in KNOWN[provider] if family(provider, known) == family(provider, name)]
