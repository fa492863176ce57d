"""Builds the unmodified sources of csrc/cuda for the CPU, over the emulation in `emulation/`."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pybind11

ROOT = Path(__file__).resolve().parents[2]
CUDA, EMULATION = ROOT / "csrc" / "cuda", Path(__file__).parent / "emulation"
ORDERS = (0, 1, 2)
"""Of a block's threads between barriers: ascending, descending, scattered."""


def build(folder: Path, edits: Mapping[str, Mapping[str, str]] | None = None, reuse: Path | None = None) -> Path:
    """Compiles the module; `edits` are replacements in its sources, by file name, wherever they occur.

    Of an earlier build in the folder `reuse`, everything but the streaming kernels is taken as it is.
    """
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    for file, replacements in (edits or {}).items():
        path = folder / "csrc" / "cuda" / file
        text = path.read_text()
        for old, new in replacements.items():
            assert old in text, f"{old!r} is not in {file}"
            text = text.replace(old, new)
        path.write_text(text)
    headers = [f"-I{path}" for path in (pybind11.get_include(), sysconfig.get_paths()["include"], EMULATION)]
    common = ["g++", "-O1", "-std=c++17", "-fPIC", "-fvisibility=hidden", *headers]
    # nvcc includes its runtime's header by itself; -fno-strict-aliasing: registers move as 32-bit words.
    as_cuda = ["-x", "c++", "-D__CUDACC__", "-D__CUDA_ARCH__=900", "-include", "cuda_runtime.h"]
    as_cuda += ["-fno-strict-aliasing", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Werror"]
    sources = {
        folder / "csrc" / "cuda" / "multi_tensor.cu": as_cuda,
        folder / "csrc" / "cuda" / "problem.cu": ["-ffp-contract=off", *as_cuda],
        folder / "csrc" / "bindings" / "cuda.cpp": ['-DIGB_CUDA_ARCHITECTURES="emulated"'],
        EMULATION / "module.cpp": [
            f"-I{folder / 'csrc'}",
        ],
        EMULATION / "control.cpp": [],
    }

    def compiled(item: tuple[Path, list[str]]) -> Path:
        source, flags = item
        target = folder / f"{source.stem}.{source.suffix[1:]}.o"
        if reuse is not None and source.name != "multi_tensor.cu":
            return reuse / target.name
        subprocess.run([*common, *flags, "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources.items()))
    module = folder / "emulated_cuda.so"
    subprocess.run([*common, "-shared", *objects, "-o", module], check=True)
    return module


def load(module: Path) -> Any:
    """Imports what `build` made."""
    spec = importlib.util.spec_from_file_location(module.stem, module)
    assert spec is not None
    assert spec.loader is not None
    native = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(native)
    return native
