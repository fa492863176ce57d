"""Compiles the Triton kernels for GPUs that need not be there and prints, as JSON, what became of them.

`test_ahead_of_time.py` runs this without TRITON_INTERPRET, which has to be unset before triton is imported.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from igb_kernels.backends import _triton_kernels as kernels
from igb_kernels.backends.triton import CHUNK, FEW_TASKS, LANES, OPTIONS, ROWS_AT_ONCE, tile_for

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

COUNTS = ("params", "before", "total", "tasks")
DOUBLES = ("partials", "out", "weights", "decay", "scales", "eps", "counter", "leaks")
VECTORS = {tl.float32: 4, tl.float64: 2, tl.bfloat16: 8, tl.float16: 8}

Variant = tuple[triton.JITFunction, dict[str, object], int]


def variants() -> Iterator[Variant]:
    """Kernels, their compile-time arguments, and how many loads of 16 bytes there are in a wide path at least."""
    for square in (False, True):
        yield kernels.sum_partials, {"SQUARE": square, "BLOCK": 1024}, 0
    for dtype, vector in VECTORS.items():
        acc = tl.float64 if dtype is tl.float64 else tl.float32
        dtypes = {"DTYPE": dtype, "ACC": acc, "CHUNK": CHUNK}
        for tasks in (1, 3, FEW_TASKS):
            yield kernels.gram_of_few, {**dtypes, "TASKS": tasks, "LANES": LANES, "VECTOR": vector}, tasks
        for tasks in (16, 32, 128):
            tile, block = tile_for(tasks, dtype)
            yield kernels.gram_of_many, {**dtypes, "TILE": tile, "BLOCK": block, "ONE_TILE": tasks <= tile}, 1
        yield kernels.sq_norms, {**dtypes, "BLOCK": LANES * vector}, 1
        for scales in ({"scales": None}, {}):
            yield kernels.ema, {**dtypes, **scales, "BLOCK": LANES * vector}, 2
        yield kernels.accumulate_squares, {**dtypes, "BLOCK": LANES * vector}, 2
        yield from combinations(dtype, dtype, acc, vector)
    yield from combinations(tl.float32, tl.bfloat16, tl.float32, VECTORS[tl.float32])
    yield from combinations(tl.bfloat16, tl.float32, tl.float32, VECTORS[tl.bfloat16])
    for dtype in (tl.float32, tl.float64):
        yield kernels.rollback, {"DTYPE": dtype, "BLOCK": LANES * VECTORS[dtype]}, 0


def combinations(dtype: tl.dtype, out: tl.dtype, acc: tl.dtype, vector: int) -> Iterator[Variant]:
    fixed = {"DTYPE": dtype, "OUT": out, "ACC": acc, "BLOCK": LANES * vector, "CHUNK": CHUNK}
    dropped = {"DTYPE": dtype, "OUT": out, "ACC": acc, "STREAMS": LANES, "CHUNK": CHUNK}
    for leaks in ({"leaks": None}, {}):
        yield kernels.sign_drop, {**dropped, **leaks, "GROUP": ROWS_AT_ONCE}, ROWS_AT_ONCE if dtype.itemsize >= 4 else 0
    for group, accumulate in ((3, False), (ROWS_AT_ONCE, True)):
        yield kernels.combine, {**fixed, "ACCUMULATE": accumulate, "GROUP": group}, group


def type_of(argument: str) -> str:
    if argument in COUNTS:
        return "i32"
    return "*i32" if argument == "status" else "*fp64" if argument in DOUBLES else "*i64"


def compiled(kernel: triton.JITFunction, fixed: dict[str, object], wide: int, capability: int) -> dict[str, object]:
    signature = {name: "constexpr" if name in fixed else type_of(name) for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=fixed, attrs=aligned)
    asm = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=OPTIONS).asm
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    loads = re.findall(r"ld\.global\S*\.(?:v4\.[bf]32|v2\.[bf]64)|cp\.async\.cg\.shared\.global [^;]*0x10", asm["ptx"])
    return {
        "name": f"{kernel.__name__} sm_{capability} { ({k: str(v) for k, v in fixed.items()}) }",
        "registers": registers,
        "stack": stack + local,
        "loads": len(loads),
        "expected_loads": wide,
    }


if __name__ == "__main__":
    capability = int(sys.argv[1])
    print(json.dumps([compiled(*variant, capability) for variant in variants()]))
