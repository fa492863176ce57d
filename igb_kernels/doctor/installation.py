"""What is installed and built here."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch

import igb_kernels
from igb_kernels import _native


def installation() -> dict[str, str]:
    """What there is, in words, by what it is."""
    return {
        "igb_kernels": f"{igb_kernels.__version__}, in {Path(igb_kernels.__file__).parent}",
        "compiled module": _compiled_module(),
        "python": f"{platform.python_version()}, {platform.platform()}",
        "torch": f"{torch.__version__}, {_torch_build()}",
        "processor": f"{processor()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads",
        "driver": driver(),
        **{f"GPU {i}": _gpu(i) for i in range(torch.cuda.device_count())},
        "triton": _package("triton", "needed only for GPUs without the compiled CUDA kernels"),
        "nvcc": _nvcc(),
        "stable-baselines3": _package("stable_baselines3", "needed only by IGBv2", "stable-baselines3"),
        "rich": _package("rich", "output is plain text without it"),
    }


def _compiled_module() -> str:
    if _native.module is None:
        return f"none: {_native.reason}"
    built = f"{_native.module.__file__}; instruction set {_native.module.instruction_set()}"
    gpu = getattr(_native.module, "cuda", None)
    if gpu is None:
        return f"{built}; without CUDA kernels"
    return f"{built}; CUDA kernels for the architectures {getattr(gpu, 'architectures', '(not recorded)')}"


def _torch_build() -> str:
    if torch.version.hip is not None:
        return f"built for ROCm {torch.version.hip}"
    return "built without CUDA" if torch.version.cuda is None else f"built for CUDA {torch.version.cuda}"


def processor() -> str:
    """The CPU's name."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def driver() -> str:
    """NVIDIA's, with its version, in words."""
    version = Path("/proc/driver/nvidia/version")
    if version.exists() and (found := re.search(r"(\d+\.\d+(\.\d+)?)", version.read_text())):
        return f"NVIDIA {found[1]}"
    if (tool := shutil.which("nvidia-smi")) is not None:
        found_lines = _output([tool, "--query-gpu=driver_version", "--format=csv,noheader"]).splitlines()
        return f"NVIDIA {found_lines[0]}" if found_lines else "nvidia-smi is there, but names none"
    return "no NVIDIA driver found"


def _gpu(index: int) -> str:
    found = torch.cuda.get_device_properties(index)
    return f"{found.name}, compute capability {found.major}.{found.minor}, {found.total_memory / 2**30:.0f} GiB"


def _package(module: str, absent: str, distribution: str | None = None) -> str:
    if find_spec(module) is None:
        return f"not installed ({absent})"
    try:
        return metadata.version(distribution or module)
    except metadata.PackageNotFoundError:
        return "there, without a version"


def _nvcc() -> str:
    path = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if path is None:
        return "not found (needed only to build the CUDA kernels: put it on the PATH, or name it in CUDACXX)"
    release = re.search(r"release ([\d.]+)", _output([path, "--version"]))
    return f"{path}, {f'release {release[1]}' if release else 'which does not say its version'}"


def _output(command: list[str]) -> str:
    """What it prints; nothing where it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
