"""The models are of the sizes that they are known for, and what they call shared is what tasks share."""

import sys
from types import ModuleType

import pytest
import torch

import igb_kernels as igb
from igb_kernels import _log
from igb_kernels.bench.models import MODELS, Model, Unavailable, base, matrix_flops_per_second, qm9

from .tiny import BATCH, SIZES, tiny

CPU = torch.device("cpu")
TABLES = 26 * 100_000 * 16
EXPERT = (416 * 256 + 256) + (256 * 128 + 128)
NEXT_EXPERT = (128 * 256 + 256) + (256 * 128 + 128)
VGG_16 = 14_723_136  # its convolutions with batch norm
SHARED = {
    "mlp-33k": 64 * 128 + 128 + 128 * 128 + 128 + 128 * 64 + 64,
    "mlp-5.8m": 784 * 2048 + 2048 + 2048 * 2048 + 2048,
    "cnn-4.7m": 4_650_304,
    "resnet-50": 25_557_032 - 1000 * 2049,
    "vit-b": 86_567_656 - 1000 * 769,
    "vit-l": 304_326_632 - 1000 * 1025,
    # the mirror image ends with 64 instead of 3 channels
    "segnet-mtan": 2 * VGG_16 + 9 * 64 * (64 - 3) + sum(a - b for a, b in ((64, 512), (64, 64))) * 3,
    "bert-base": 109_482_240,
    **dict.fromkeys(("mmoe", "mmoe-sparse"), TABLES + 8 * EXPERT),
    **dict.fromkeys(("ple", "ple-sparse"), TABLES + (3 * 2 + 2) * EXPERT + 417 * 8 + 2 * NEXT_EXPERT),
}
"""As torchvision's and Hugging Face's models have them without their last layers."""

models = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def absent(request: pytest.FixtureRequest) -> None:
    """Skips where a model cannot be made."""
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in MODELS and (reason := MODELS[name].missing()):
        pytest.skip(reason)


@pytest.mark.parametrize("name", SHARED)
def test_sizes(name):
    load = MODELS[name].load(3, CPU)
    assert load.shared == SHARED[name]
    assert load.gradient_bytes(3) == 12 * SHARED[name]


def test_sizes_with_the_last_layers_that_they_are_known_with():
    assert MODELS["vit-b"].load(1, CPU, classes=1000).total == 86_567_656
    assert MODELS["vit-l"].load(1, CPU, classes=1000).total == 304_326_632
    assert MODELS["resnet-50"].load(1000, CPU, batch=2, image=32).total == 25_557_032


@pytest.mark.parametrize(("name", "giga"), [("resnet-50", 4.09), ("vit-b", 17.56), ("vit-l", 61.55)])
def test_a_forward_pass_is_as_much_work_as_torchvision_says(name, giga):
    load = MODELS[name].load(1, CPU, batch=1, image=224)
    assert load.forward_flops == pytest.approx(2e9 * giga, rel=0.01)


def test_every_model_has_a_tiny_variant():
    assert set(SIZES) == set(MODELS)
    assert all(model.name == name and model.about for name, model in MODELS.items())


@models
@pytest.mark.parametrize("tasks", [1, 2, 5])
def test_losses_are_scalars(name, tasks):
    losses = tiny(name, tasks).losses()
    assert len(losses) == tasks
    assert all(loss.shape == () and loss.isfinite() for loss in losses)


@models
def test_shared_is_what_several_tasks_reach(name):
    task = tiny(name)
    reached = []
    for k in range(3):
        task.zero_grad()
        task.losses()[k].backward()
        reached.append({i for i, p in enumerate(task.parameters) if p.grad is not None})
    shared = set(range(len(task.shared)))
    assert shared <= set.union(*reached)
    assert not (reached[0] & reached[1] | reached[0] & reached[2] | reached[1] & reached[2]) - shared
    assert all(sum(i in r for r in reached) > 1 for i in shared)
    assert len(set.union(*reached)) == len(task.parameters)


@models
def test_gradients_can_be_taken_at_the_representation(name):
    """None of its tensors is made from another: else the way through both would be counted twice."""
    task = tiny(name)
    representation = task.encoder(task.batch)
    whole = [representation] if isinstance(representation, torch.Tensor) else [*representation]
    for loss in task.losses_at(representation):
        at = torch.autograd.grad(loss, whole, retain_graph=True, allow_unused=True)
        through = [(t, g) for t, g in zip(whole, at, strict=True) if g is not None]
        outputs, seeds = zip(*through, strict=True)
        found = torch.autograd.grad(outputs, task.shared, seeds, retain_graph=True, allow_unused=True)
        expected = torch.autograd.grad(loss, task.shared, retain_graph=True, allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            if a is None or b is None:
                assert a is b
            else:
                torch.testing.assert_close(a.to_dense(), b.to_dense())


@models
def test_a_balanced_step_agrees_with_the_reference(name):
    task = tiny(name)
    updates = []
    for backend in ("auto", "reference"):
        task.zero_grad()
        balancer = igb.Balancer(igb.IMTLG(), igb.IGBv1(base_losses=[1.0] * 3), shared=task.shared, backend=backend)
        balancer.backward(task.losses())
        updates.append(torch.cat([p.grad.flatten() for p in task.shared]).double())
    ours, truth = updates
    assert 0 < truth.norm() < torch.inf
    assert (ours - truth).norm() <= 1e-5 * truth.norm()


@models
def test_weights_follow_the_batch_to_a_device(name):
    task = tiny(name, 2)
    if MODELS[name].on_meta:
        assert all(loss.device.type == "meta" for loss in task.to(torch.device("meta")).losses())
    moved = tiny(name, 2).to(CPU)
    torch.testing.assert_close(moved.losses(), tiny(name, 2).losses())


@pytest.mark.parametrize("name", ["mmoe", "ple"])
def test_sparse_gradients_are_made_dense_with_a_word(name, caplog):
    updates = []
    for variant in (f"{name}-sparse", name):
        _log.warn_once.cache_clear()
        caplog.clear()
        task = tiny(variant)
        task.losses()[0].backward()
        assert task.encoder.fields.tables[0].weight.grad.is_sparse == (variant != name)
        task.zero_grad()
        igb.Balancer("imtl_g", shared=task.shared).backward(task.losses())
        assert ("has sparse gradients" in caplog.text) == (variant != name)
        updates.append([p.grad for p in task.shared])
    torch.testing.assert_close(*updates)


# ---- Before a model is made ---------------------------------------------------------------------------------------


def test_the_load_is_that_of_the_layers():
    load = MODELS["mlp-33k"].load(2, CPU, widths=(6, 8, 5))
    assert load.forward_flops == 2 * 128 * (6 * 8 + 8 * 5 + 2 * 5)
    assert load.step_flops(2) == 5 * load.forward_flops
    # the input, what each ReLU gives, and the two heads' errors
    assert load.activation_bytes == 4 * 128 * (6 + 8 + 5 + 2)
    assert (load.shared, load.total) == (6 * 8 + 8 + 8 * 5 + 5, 6 * 8 + 8 + 8 * 5 + 5 + 2 * 6)


def test_what_is_too_large_is_left_out_in_words(monkeypatch):
    model = MODELS["vit-l"]
    monkeypatch.setattr(base, "free_bytes", lambda device: 1 << 30)
    assert model.left_out(2, CPU) == "vit-l with 2 tasks is left out: a step holds about 3.8 GiB, 1.0 are free"
    monkeypatch.setattr(base, "free_bytes", lambda device: 4 << 30)
    assert model.left_out(2, CPU) == ""
    assert "a step holds about 6.0 GiB" in model.left_out(2, CPU, copies=2)
    why = model.left_out(2, CPU, seconds=5.0, flops_per_second=100e9)
    assert why == "vit-l with 2 tasks is left out: its passes alone take about 6.2 s a step here, more than 5"
    assert model.left_out(2, CPU, seconds=7.0, flops_per_second=100e9) == ""
    monkeypatch.setattr(base, "free_bytes", lambda device: None)
    assert model.left_out(2, CPU, copies=1000) == ""


def test_matrix_products_take_time():
    assert 1e8 < matrix_flops_per_second(CPU) < 1e15


def test_what_cannot_be_made_says_why(monkeypatch, tmp_path):
    monkeypatch.setattr(qm9, "FOLDER", tmp_path)
    model = MODELS["qm9-schnet"]
    why = "qm9-schnet is not available because examples/qm9 is not installed: it is in a checkout of the repository"
    assert model.left_out(3, CPU) == why
    with pytest.raises(Unavailable, match=why):
        model.build(3, CPU)
    (tmp_path / "models.py").touch()
    monkeypatch.setattr(qm9, "NEEDED", ("numpy", "not_there"))
    assert model.missing() == "not_there is not installed"


def test_no_tasks_are_refused():
    with pytest.raises(ValueError, match="tasks must be at least 1, found 0"):
        MODELS["mlp-33k"].build(0, CPU)


def test_a_batch_of_something_else_is_refused():
    task = tiny("mlp-33k")
    task.batch = {"x": task.batch}
    with pytest.raises(TypeError, match="batch must hold tensors, in a tuple or a dataclass, found dict"):
        task.to(CPU)


@pytest.mark.skipif(bool(qm9.missing()), reason="needs torch_geometric and pandas")
def test_the_example_leaves_no_modules_behind(monkeypatch):
    for name in qm9.MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    own = ModuleType("data")
    monkeypatch.setitem(sys.modules, "data", own)
    path = [*sys.path]
    tiny("qm9-schnet")
    assert [name for name in qm9.MODULES if name in sys.modules] == ["data"]
    assert sys.modules["data"] is own
    assert sys.path == path


def test_sizes_of_the_input_are_the_device_s():
    model = Model("m", "", MODELS["mlp-33k"].make, {"batch": BATCH}, {"batch": 7})
    assert len(model.build(1, CPU).batch) == BATCH
    assert model.load(1, torch.device("cuda")).forward_flops == 7 * 2 * (64 * 128 + 128 * 128 + 128 * 64 + 64)
