"""Imports go one way, csrc knows no framework, and what is public is documented."""

import ast
import importlib
import inspect
import json
import pathlib
import re
import subprocess
import sys

import pytest

import igb_kernels as igb
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES
from igb_kernels.methods import table

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "igb_kernels"
CSRC = ROOT / "csrc"
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))

FOUNDATION = {"_log", "_seed", "_compile", "status", "card", "active"}
OPERATIONS = FOUNDATION | {"backends", "ops"}
ALLOWED = {
    "_log": set(),
    "_seed": set(),
    "_compile": set(),
    "status": set(),
    "card": set(),
    "active": set(),
    "_native": {"_C"},
    "backends": FOUNDATION | {"_native", "_C"},
    "ops": FOUNDATION | {"backends"},
    "agents": set(),
    "losses": OPERATIONS | {"agents"},
    "gradients": OPERATIONS | {"losses"},  # a method names the loss balancing that is part of it
    "peel": set(),
    "capture": FOUNDATION | {"peel"},
    "store": OPERATIONS,
    "hooks": FOUNDATION | {"capture", "store"},
    "representation": {"capture"},
    "result": FOUNDATION,
    "arguments": OPERATIONS | {"losses", "gradients"},
    "passes": OPERATIONS | {"gradients", "capture", "store", "hooks", "representation"},
    "balancer": OPERATIONS
    | {
        "losses",
        "gradients",
        "capture",
        "store",
        "hooks",
        "result",
        "arguments",
        "passes",
        "representation",
        "distributed",
    },
    "distributed": OPERATIONS | {"gradients", "capture", "store", "hooks", "passes"},
    "methods": {"gradients", "losses"},
    "__init__": {"ops", "backends", "balancer", "gradients", "losses", "status", "result", "monitor", "profiling"},
    "monitor": OPERATIONS | {"result"},
    "printing": set(),
    "doctor": OPERATIONS | {"_native", "losses", "gradients", "balancer", "printing"},
    "profiling": OPERATIONS | {"losses", "gradients", "capture", "representation", "balancer", "printing"},
    "bench": OPERATIONS | {"_native", "losses", "gradients", "balancer", "profiling", "printing", "doctor"},
    "report": {"bench", "printing"},
    "__main__": {"doctor", "profiling", "printing", "bench", "report"},
    "integrations": OPERATIONS
    | {"losses", "gradients", "peel", "capture", "store", "hooks", "passes", "balancer", "result", "monitor"},
}
"""What each room may import, from the bottom to the top."""


def room(path: pathlib.Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: pathlib.Path) -> set[str]:
    """The rooms of the package that a module imports, in functions and by `import_module`, too."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [part.value for part in ast.walk(node.args[0]) if isinstance(part, ast.Constant)]
    return {name.split(".")[1] for name in names if name.startswith("igb_kernels.")}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    assert room(path) in ALLOWED, f"a new room: place it in {pathlib.Path(__file__).name}"
    wrong = imported_rooms(path) - ALLOWED[room(path)] - {room(path)}
    assert not wrong, f"{room(path)} must not import {sorted(wrong)}"


def test_the_table_of_imports_has_no_cycle():
    order: list[str] = []

    def visit(name: str, above: tuple[str, ...] = ()) -> None:
        assert name not in above, f"cycle: {above} → {name}"
        for below in sorted(ALLOWED.get(name, ())):
            visit(below, (*above, name))
        order.append(name)

    for name in ALLOWED:
        visit(name)


def test_the_compiled_module_is_behind_one_door():
    users = {str(path.relative_to(PACKAGE)) for path in MODULES if "_C" in imported_rooms(path)}
    assert users == {"_native.py", "backends/cpu.py"}


def test_importing_loads_nothing_but_torch_and_the_standard_library():
    script = (
        "import json, sys\nimport torch\nbefore = set(sys.modules)\nimport igb_kernels\n"
        "print(json.dumps([sorted(set(sys.modules) - before), sorted(sys.modules)]))"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    new, loaded = json.loads(result.stdout)
    foreign = {name.split(".")[0] for name in new} - {"igb_kernels", "torch", *sys.stdlib_module_names}
    assert not foreign
    heavy = {"triton", "stable_baselines3", "matplotlib", "rich", "pandas", "torch_geometric", "pybind11"}
    assert not heavy & {name.split(".")[0] for name in loaded}
    assert not result.stderr


def test_public_names():
    methods = {cls.__name__ for cls in [*METHODS.values(), *RULES.values()]}
    assert methods <= set(igb.__all__)
    assert len(set(igb.__all__) - methods) <= 12
    assert sorted(igb.__all__) == sorted(set(igb.__all__))
    for name in igb.__all__:
        assert hasattr(igb, name)
    assert not any(name.startswith("_") for name in igb.__all__)


# ---- Documentation ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_of_modules_classes_and_functions(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module"
    kinds = (ast.ClassDef,) if room(path) == "backends" else (ast.ClassDef, ast.FunctionDef)  # `ops` documents those
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            assert ast.get_docstring(node), node.name


@pytest.mark.parametrize("name", [*igb.__all__, "result.BalanceResult", "backends.Availability"])
def test_docstrings_of_what_is_public(name):
    home, _, attribute = name.rpartition(".")
    thing = getattr(importlib.import_module(f"igb_kernels.{home}") if home else igb, attribute)
    assert inspect.getdoc(thing)
    if inspect.isclass(thing):
        for member, value in vars(thing).items():
            if not member.startswith("_") and (inspect.isfunction(value) or isinstance(value, property)):
                assert inspect.getdoc(getattr(thing, member)), f"{name}.{member}"


def test_the_table_of_methods_is_what_the_classes_say():
    assert (PACKAGE / "METHODS.md").read_text() == table(), "python -m igb_kernels.methods > igb_kernels/METHODS.md"


@pytest.mark.parametrize("cls", [*METHODS.values(), *RULES.values()], ids=lambda cls: cls.__name__)
def test_cards(cls):
    """Every class has its own, with what users look for first."""
    assert "card" in vars(cls)
    card = cls.card
    assert all((card.title, card.formula, card.inputs, card.memory, card.passes))
    assert card.invariance in ("", "direction", "update")
    assert card.paper or cls.name in ("equal", "none")


# ---- csrc ---------------------------------------------------------------------------------------------------------

SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in {".h", ".inl", ".cpp", ".cu", ".cuh"})
FRAMEWORKS = re.compile(r"torch|ATen|c10|THC?/|[Pp]ython|numpy")
CORE_INCLUDES = {"cstdint", "cstddef", "cmath", "math.h", "cfloat", "float.h", "climits", "limits"}


def includes(path: pathlib.Path) -> list[str]:
    return re.findall(r'^\s*#\s*include\s*[<"]([^>"]+)[>"]', path.read_text(), re.MULTILINE)


def code(path: pathlib.Path) -> str:
    """The source without comments and strings."""
    text = re.sub(r"/\*.*?\*/", "", path.read_text(), flags=re.DOTALL)
    return re.sub(r'//[^\n]*|"(\\.|[^"\\])*"', "", text)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_csrc_knows_no_framework(path):
    for header in includes(path):
        assert not FRAMEWORKS.search(header), header
        if path.relative_to(CSRC).parts[0] != "bindings":
            assert "pybind11" not in header, header
    assert not re.search(r"\b(at|torch|c10)::", code(path))


@pytest.mark.parametrize(
    "path", [path for path in SOURCES if "core" in path.parts], ids=lambda path: str(path.relative_to(CSRC))
)
def test_core_is_for_every_compiler_and_allocates_nothing(path):
    assert path.suffix == ".h", "core is header-only"
    for header in includes(path):
        inside = (path.parent / header).resolve()
        assert header in CORE_INCLUDES or inside.is_relative_to(CSRC / "core"), header
    words = set(re.findall(r"\w+", code(path)))
    assert not words & {
        "new",
        "delete",
        "malloc",
        "free",
        "throw",
        "try",
        "printf",
        "cout",
        "thread_local",
        "static_cast_",
    }
    assert "std::vector" not in code(path)
    if path.name != "platform.h":
        assert "__CUDACC__" not in code(path), "platform.h is the only place that knows the compiler"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(CSRC)))
def test_csrc_includes_go_one_way(path):
    """core includes nothing above it, cpu and cuda not each other, and only bindings include them."""
    allowed = {"core": {"core"}, "cpu": {"cpu", "core"}, "cuda": {"cuda", "core"}}
    here = path.relative_to(CSRC).parts[0]
    for header in includes(path):
        inside = (path.parent / header).resolve()
        if inside.is_relative_to(CSRC) and here in allowed:
            assert inside.relative_to(CSRC).parts[0] in allowed[here], header
