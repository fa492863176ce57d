"""The tracked files build and install off line, and say the same version everywhere; the guides run."""

import contextlib
import io
import os
import pathlib
import re
import shutil
import socket
import subprocess
import sys

import pytest
import torch

import igb_kernels as igb

ROOT = pathlib.Path(__file__).resolve().parents[2]
README = ROOT / "README.md"

CHECK = """
import pathlib, sys
import igb_kernels as igb, torch
assert pathlib.Path(igb.__file__).is_relative_to(sys.argv[1]), igb.__file__
assert igb.backends()["cpu"], igb.backends()["cpu"]
p = torch.nn.Parameter(torch.ones(3))
result = igb.Balancer("igb_v1+nash_mtl", shared=[p]).backward([(p * k).square().sum() for k in (1.0, 2.0)])
assert result.flags & ~igb.Status.PARETO_STATIONARY == 0, str(result)
print(igb.__version__)
"""


def tracked_files() -> list[str]:
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("needs a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split("\0") if name and (ROOT / name).is_file()]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """What `pip install` makes of the tracked files, without network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in tracked_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, source / name)
    # The CUDA kernels take minutes to compile, and are in the build that all other tests use.
    environment = {**os.environ, "CMAKE_ARGS": "-DIGB_CUDA=OFF"}
    environment |= {"PATH": f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--target"]
    result = subprocess.run(
        [*command, str(target), str(source)], capture_output=True, text=True, timeout=540, env=environment
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def test_an_installed_copy_works(installed, tmp_path):
    path = os.pathsep.join([str(installed), str(pathlib.Path(torch.__file__).parents[1])])
    result = subprocess.run(
        [sys.executable, "-P", "-c", CHECK, str(installed)] if sys.version_info >= (3, 11) else
        [sys.executable, "-c", CHECK, str(installed)],
        capture_output=True, text=True, timeout=120, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == igb.__version__


def test_an_installed_copy_is_complete(installed):
    package = installed / "igb_kernels"
    assert (package / "py.typed").is_file()
    assert len(list(package.glob("_C*.so"))) == 1
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "igb_kernels").rglob("*.py")} & set(tracked_files())
    assert {name for name in modules if not (installed / name).is_file()} == set()
    assert {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")} == {"igb_kernels"}
    assert any(path.name == "LICENSE" for path in installed.rglob("LICENSE"))


def test_version_and_requirements():
    text = (ROOT / "pyproject.toml").read_text()
    assert re.search(r'^version = "(.+)"$', text, re.MULTILINE).group(1) == igb.__version__
    assert 'requires-python = ">=3.10"' in text
    assert re.search(r'^dependencies = \["torch>=2\.9"\]$', text, re.MULTILINE)
    for extra in ("demo", "igbv2", "test", "dev"):
        assert re.search(rf"^{extra} = \[", text, re.MULTILINE), extra
    build = re.search(r"^\[build-system\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL).group(1)
    assert "torch" not in build, "no torch at build time"


def test_licence_and_changelog():
    assert "MIT" in (ROOT / "LICENSE").read_text()
    assert re.search(rf"^## \[?({re.escape(igb.__version__)}|Unreleased)\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
TEXT = README.read_text() if README.is_file() else ""
BLOCKS = {f"line {TEXT[: match.start()].count(chr(10)) + 1}": match[1] for match in BLOCK.finditer(TEXT)}


def test_the_readme_has_examples():
    assert BLOCKS


@pytest.mark.parametrize("at", BLOCKS)
def test_the_readme_runs(at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # it may write files
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(BLOCKS[at], str(README), "exec"), {"__name__": "__main__"})


GUIDE = ROOT / "igb_kernels" / "TRAINING.md"
GUIDE_TEXT = GUIDE.read_text()


def test_the_training_guide_runs():
    """Its snippets build on each other."""
    names: dict[str, object] = {"__name__": "__main__"}
    torch.manual_seed(0)
    for match in BLOCK.finditer(GUIDE_TEXT):
        exec(compile(match[1], str(GUIDE), "exec"), names)
    assert "weights_of" in names


INTEGRATIONS = ROOT / "igb_kernels" / "INTEGRATIONS.md"
SNIPPETS = [match[1] for match in BLOCK.finditer(INTEGRATIONS.read_text())]


@pytest.mark.parametrize("at", range(len(SNIPPETS)))
def test_snippets_of_the_integrations_run(at, tmp_path):
    """Each by itself, in a process of its own: they change the libraries they are for."""
    libmtl = "import integrations.libmtl_on_cpu\n" if "import libmtl" in SNIPPETS[at] else ""  # whatever torchvision is
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    result = subprocess.run(
        [sys.executable, "-c", libmtl + SNIPPETS[at]],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr


DISTRIBUTED = ROOT / "igb_kernels" / "DISTRIBUTED.md"
SNIPPETS_FOR_RANKS = [match[1] for match in BLOCK.finditer(DISTRIBUTED.read_text())]


@pytest.mark.parametrize("at", range(len(SNIPPETS_FOR_RANKS)))
def test_snippets_for_several_ranks_run(at, tmp_path):
    """Each by itself on two ranks, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "train.py"
    script.write_text(SNIPPETS_FOR_RANKS[at])
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    running = [
        subprocess.Popen(
            [sys.executable, script.name],
            cwd=tmp_path,
            env={**environment, "WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in running:
            printed, _ = process.communicate(timeout=120)
            assert process.returncode == 0, printed
    finally:
        for process in running:
            process.kill()


def test_the_tests_that_the_training_guide_names_exist():
    named = re.findall(r"`(test_\w+\.py)((?:::test_\w+)?)`((?:, `::test_\w+`)*)", GUIDE_TEXT)
    assert len(named) > 15
    for file, first, more in named:
        text = (ROOT / "tests" / "balancer" / file).read_text()
        for test in re.findall(r"::(test_\w+)", first + more):
            assert f"def {test}(" in text, f"{file}::{test}"
