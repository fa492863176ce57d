"""Steps are measured beside what does the same, and a speed-up is one of the same result."""

import json
import math
import subprocess
import sys

import pytest
import torch

from igb_kernels.backends import resolve
from igb_kernels.bench import eager, loops, step
from igb_kernels.bench.cases import Options
from igb_kernels.bench.measure import Harness
from igb_kernels.bench.models import MODELS, SMALL, Model
from igb_kernels.bench.results import Timing

from .tiny import tiny

CPU = torch.device("cpu")
NET = Model("tiny-mlp", "", MODELS["mlp-33k"].make, {"batch": 8}, {"batch": 8}, {"widths": (6, 9, 7)})


def measured(method: str, peers: tuple[str, ...] = (), harness: Harness | None = None):
    """A step of a tiny network, in as few rounds as there can be."""
    harness = harness or Harness(seconds=1e-3, least_rounds=2, most_rounds=2)
    return step.measure(NET, 3, method, Options(peers=peers), 60.0, harness)


@pytest.mark.parametrize(
    ("method", "flat"),
    [
        ("igb_v1+nash_mtl", True),
        ("db_mtl", True),
        ("db_mtl-beta0", False),
        ("grad_drop", False),
        ("moco", False),
        ("uw+imtl_g", True),
        ("grad_norm", True),
        ("igb_v1", False),
    ],
)
def test_a_step_beside_what_does_the_same(method, flat):
    found = measured(method)
    assert (found.suite, found.name, found.model, found.tasks) == ("step", method, "tiny-mlp", 3)
    assert found.params == 6 * 9 + 9 + 9 * 7 + 7
    assert found.error < 1e-5
    assert set(found.rivals) == {"passes", "passes + copy", "reference"} | ({"eager"} if flat else set())
    for name, rival in found.rivals.items():
        assert rival.speed_up > 0
        assert rival.error < 1e-5 if name == "eager" else rival.error is None


def test_libraries_are_compared_with_their_forward_pass():
    pytest.importorskip("torchjd")
    harness = Harness(seconds=1e-3, least_rounds=2, most_rounds=2)
    found = measured("igb_v1+imtl_g", ("torchjd", "libmtl", "torchjd"), harness)
    peer, ours = found.rivals["torchjd"], found.rivals[step.WITH_FORWARD]
    assert peer.speed_up > 0
    assert peer.error < 1e-4
    assert peer.note == "forward pass included in both; igb_v1 in plain PyTorch before"
    assert ours.speed_up == pytest.approx(ours.timing.ms / found.timing.ms)
    assert "passes" in found.rivals
    assert Timing.of(harness.rounds) == found.timing


def test_nothing_is_faster_that_comes_to_something_else(monkeypatch):
    pytest.importorskip("torchjd")
    monkeypatch.setitem(loops.TORCHJD, "imtl_g", "MGDA")
    found = measured("imtl_g", ("torchjd",))
    peer = found.rivals["torchjd"]
    assert peer.speed_up is None
    assert peer.error > step.ANGLE
    assert "results disagree" in peer.note
    assert found.rivals["reference"].speed_up is not None


def test_a_library_without_the_method_is_left_out_in_words(monkeypatch):
    harness = Harness(seconds=1e-3, least_rounds=2, most_rounds=2)
    found = measured("grad_drop", ("torchjd", "libmtl"), harness)
    assert harness.remarks == [f"{name} has no grad_drop that can be compared" for name in ("torchjd", "libmtl")]
    assert step.WITH_FORWARD not in found.rivals
    monkeypatch.setattr(loops, "find_spec", lambda name: None)
    harness.remarks.clear()
    measured("imtl_g", ("torchjd", "libmtl"), harness)
    assert harness.remarks == ["torchjd is not installed", "libmtl is not installed"]
    harness.remarks.clear()
    measured("uw+imtl_g", ("torchjd",), harness)
    assert harness.remarks == ["torchjd is not compared at uw+imtl_g: it has no uw"]


def angle(task, method: str, library: str) -> float:
    whole = step.WholeStep(task, method)
    contender = whole.of_library(library)
    assert contender.error is not None
    return contender.error()


@pytest.mark.filterwarnings("ignore::UserWarning")  # cvxpy's
@pytest.mark.parametrize("method", loops.TORCHJD)
def test_torchjd_steps_are_the_same(method):
    pytest.importorskip("torchjd")
    assert angle(tiny("mlp-33k"), method, "torchjd") < step.ANGLE


@pytest.mark.parametrize("name", ["segnet-mtan", "mmoe", "ple", "bert-base"])
@pytest.mark.parametrize("library", ["torchjd", "libmtl"])
def test_libraries_take_every_kind_of_model(name, library):
    pytest.importorskip({"torchjd": "torchjd"}.get(library, "json"))
    try:
        assert angle(tiny(name), "igb_v1+imtl_g", library) < step.ANGLE
    except loops.NotThere as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("library", "rule"), [("torchjd", "igb_v1"), ("torchjd", "log"), ("libmtl", "log")])
def test_losses_are_balanced_before_other_libraries_balance_gradients(library, rule):
    task = tiny("mlp-33k")
    task.targets = [torch.tensor(target) for target in (1.0, 3.0, 0.3)]
    try:
        assert angle(task, f"{rule}+cagrad", library) < step.ANGLE
    except loops.NotThere as reason:
        pytest.skip(str(reason))
    whole = step.WholeStep(task, f"{rule}+cagrad")
    assert whole.angle(step.WholeStep(task, "cagrad").of_library(library).call) > step.ANGLE


@pytest.mark.parametrize("method", ["imtl_g", "mgda", "cagrad", "db_mtl", "nash_mtl", "upgrad"])
def test_libmtl_steps_are_the_same(method):
    try:
        assert angle(tiny("mlp-33k"), method, "libmtl") < step.ANGLE
    except loops.NotThere as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize("method", ["igb_v1+nash_mtl", "db_mtl", "emtl", "log+cagrad", "metabalance"])
def test_plain_pytorch_goes_the_same_way(method):
    """For three steps: moving averages and all that is kept between steps are the same, too."""
    task = tiny("cnn-4.7m")
    whole = step.WholeStep(task, method)
    ours, theirs = whole.balancer("auto"), whole.balancer("auto")
    assert eager.Step.can(theirs.gradients)
    flat = eager.Step(task.shared, theirs.gradients, theirs.losses, resolve("auto", "cpu"))
    for scale in (1.0, 0.3, -2.0):
        task.batch *= scale
        ours.backward(*whole.losses())
        expected = whole.update()
        flat(*whole.losses())
        assert (whole.update() - expected).norm() <= 1e-5 * expected.norm()


def test_a_step_that_is_off_is_seen():
    whole = step.WholeStep(tiny("mlp-33k"), "imtl_g")
    right = whole.balanced("auto")
    assert right.error() < 1e-6 < step.TOLERANCE
    other = whole.balancer("auto").backward
    assert whole.distance(lambda losses: other([losses[0], losses[1], 1.1 * losses[2]])) > step.TOLERANCE
    assert whole.angle(lambda: torch.stack(whole.task.losses()).sum().backward()) > step.ANGLE


# ---- What is measured ---------------------------------------------------------------------------------------------


def test_what_is_too_large_is_left_out():
    harness = Harness()
    assert step.measure(MODELS["vit-b"], 3, "db_mtl", Options(), 1e-6, harness) is None
    (remark,) = harness.remarks
    assert remark.startswith("vit-b with 3 tasks is left out: its passes alone take about")


def test_steps_are_of_float32():
    harness = Harness(seconds=1e-3, least_rounds=1, most_rounds=1)
    both = Options(dtypes=(torch.bfloat16, torch.float32))
    assert step.measure(NET, 3, "equal", Options(dtypes=(torch.bfloat16,)), 60.0, harness) is None
    assert harness.remarks == ["steps are measured in float32 alone"]
    assert step.measure(NET, 3, "equal", both, 60.0, harness).dtype == "float32"


def test_the_reference_may_be_ours():
    harness = Harness(seconds=1e-3, least_rounds=1, most_rounds=1)
    found = step.measure(NET, 3, "imtl_g", Options(backend="reference"), 60.0, harness)
    assert (found.backend, found.error) == ("reference", 0.0)
    assert set(found.rivals) == {"cpu", "passes", "passes + copy", "eager"}
    assert found.rivals["cpu"].error < 1e-5


def test_cases():
    labels = [case.label for case in step.cases(Options())]
    assert len(labels) == len(SMALL) * len(step.TASKS) * len(step.DEFAULTS)
    assert [case.label for case in step.cases(Options(quick=True))] == ["igb_v1+nash_mtl, K = 3, mlp-33k"]
    chosen = Options(tasks=(4,), models=("vit-l", "ple"), methods=("gram", "imtl_g"))
    assert [case.label for case in step.cases(chosen)] == ["imtl_g, K = 4, vit-l", "imtl_g, K = 4, ple"]
    assert not list(step.cases(Options(methods=("gram",))))
    everything = step.cases(Options(tasks=(2,), models=("all",), methods=("equal",)))
    assert len(list(everything)) == len(MODELS)


def test_names():
    for name in ("db_mtl", "igb_v1", "igb_v1+db_mtl", "db_mtl-beta0", "uw+db_mtl-beta0"):
        assert step.accepts(name)
    for name in ("gram", "igb_v1+gram", "db_mtl+igb_v1", "a+b+c", "", "igb_v1+"):
        assert not step.accepts(name)
    assert {"nash_mtl", "igb_v1", "db_mtl-beta0"} <= set(step.names())


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "igb_kernels", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command():
    done = run(
        "step", "--models", "mlp-33k", "--tasks", "3", "--quick", "--seconds", "0.1", "--compare", "none", "--json"
    )
    assert done.returncode == 0, done.stderr
    (found,) = json.loads(done.stdout)["measurements"]
    assert (found["model"], found["tasks"], found["name"]) == ("mlp-33k", 3, "igb_v1+nash_mtl")
    assert math.isfinite(found["rivals"]["passes"]["speed_up"])


def test_the_command_knows_its_models():
    done = run("step", "--models", "resnet-51")
    assert done.returncode == 2
    assert "model must be one of mlp-33k," in done.stderr
    assert "found 'resnet-51'" in done.stderr


def test_memory_beyond_the_passes():
    """Of imtl_g, K - 1 gradients are kept, and one becomes `.grad`; whoever flattens holds them twice, and more."""
    net = Model("wide", "", MODELS["mlp-33k"].make, {"batch": 4}, {}, {"widths": (64, 512, 512)})
    harness = Harness(seconds=1e-3, least_rounds=1, most_rounds=1)
    found = step.measure(net, 3, "imtl_g", Options(memory=True), 60.0, harness)
    gradient = 4 * found.params
    assert found.extra_bytes / gradient == pytest.approx(2, abs=0.1)
    assert found.rivals["eager"].extra_bytes / gradient > 5
    assert found.rivals["reference"].extra_bytes is not None
    assert found.rivals["passes"].extra_bytes is None
    assert measured("imtl_g").extra_bytes is None
