"""Where and with what something was measured."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

import igb_kernels
from igb_kernels.backends import backends
from igb_kernels.bench.results import Measurement, Results
from igb_kernels.doctor.installation import driver, processor

PEERS = {"torchjd": "torchjd", "libmtl": "LibMTL", "torch_geometric": "torch_geometric"}
"""Modules of other packages that are measured or measured with, by our name for them."""
USUAL_CACHE = 32 << 20


def machine(device: torch.device | str = "cpu") -> dict[str, Any]:
    """What a result says of the machine, with its GPU where that was measured on."""
    device = torch.device(device)
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else processor(),
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "driver": driver() if gpu else None,
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "igb_kernels": igb_kernels.__version__,
        "backends": {name: str(there) for name, there in backends().items()},
        "peers": {name: version for name, module in PEERS.items() if (version := _version(module)) is not None},
    }


def commit() -> str:
    """Of the checkout that the package is in, "-dirty" where it has changes; the version where it is installed."""
    package = Path(igb_kernels.__file__).resolve().parent
    top = _git(package, "rev-parse", "--show-toplevel")
    # A package in site-packages may be inside of some other checkout.
    if not top or Path(top).resolve() != package.parent:
        return igb_kernels.__version__
    return _git(package, "describe", "--always", "--dirty", "--exclude", "*")


def results(measurements: Sequence[Measurement], command: str, device: torch.device | str) -> Results:
    """A run that ends now, here."""
    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Results(machine(device), commit(), command, date, list(measurements))


@cache
def cache_bytes(device: torch.device) -> int:
    """The last level of cache, of the CPU where it says so, at most 256 MiB."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    found = [USUAL_CACHE]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        size = path.read_text().strip()
        if size.endswith("K"):
            found.append(int(size[:-1]) << 10)
    return min(max(found), 1 << 28)


def free_bytes(device: torch.device) -> int | None:
    """What can be allocated; None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.exists() else ():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    return None


def _version(module: str) -> str | None:
    if find_spec(module) is None:
        return None
    try:
        return metadata.version(module)
    except metadata.PackageNotFoundError:
        return "there, without a version"


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; nothing where it is not there, or the folder is not in a checkout."""
    try:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""
