"""What is recorded is what steps gave, to the bit, and recording waits for nothing."""

from __future__ import annotations

import math
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import igb_kernels as igb
from igb_kernels import _log
from igb_kernels.monitor import Block, Thresholds
from igb_kernels.result import BalanceResult

from .problems import TASKS, random_gradients, steps


class Kept:
    """A writer that keeps the blocks."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.closed = 0

    def write(self, block: Block) -> None:
        assert not self.closed
        self.blocks.append(block)

    def close(self) -> None:
        self.closed += 1


def same(found: Tensor, want: Tensor) -> bool:
    """The same bits, up to kinds of NaN."""
    return (
        found.dtype is want.dtype
        and found.shape == want.shape
        and torch.equal(found.nan_to_num(7e77), want.nan_to_num(7e77))
    )


def want_of(result: BalanceResult) -> dict[str, Tensor]:
    """A step's numbers in float64, NaN for missing tasks."""
    there = torch.zeros(len(result.weights), dtype=torch.bool)
    there[list(range(len(there)) if result.active is None else result.active)] = True
    want = {"losses": result.losses, "scales": result.scales, "weights": result.weights}
    if result.norms is not None:
        want["norms"] = result.norms
    want = {name: value.double().where(there, torch.nan) for name, value in want.items()}
    if result.cosines is not None:
        want["cosines"] = result.cosines.where(there[:, None] & there, torch.nan)
    return want


def check(block: Block, results: list[BalanceResult]) -> None:
    assert len(block) == len(results)
    for i, result in enumerate(results):
        want = want_of(result)
        for name in ("losses", "scales", "weights", "norms", "cosines"):
            found = getattr(block, name)
            assert (found is None) == (name not in want)
            if found is not None:
                assert same(found[i], want[name]), (i, name)
        assert block.status[i] == result.status
        active = range(len(result.weights)) if result.active is None else result.active
        assert block.active[i].nonzero().flatten().tolist() == [*active]


@pytest.mark.parametrize("every", [1, 4, 11])
@pytest.mark.parametrize("method", ["nash_mtl", "igb_v1+imtl_g", "db_mtl", "emtl", "equal", "grad_drop", "excess_mtl"])
def test_steps_to_the_bit(method, every):
    """With steps that are not finite, and steps without some of the tasks."""
    results = []
    with igb.Monitor(kept := Kept(), every=every, warn=None) as monitor:
        for result in steps(
            method,
            random_gradients(),
            10,
            missing=lambda step: {3: [1], 4: [0, 2], 8: [0]}.get(step, ()),
            offset=lambda step: torch.tensor([1.0, math.nan if step in (2, 8) else 0.1, 30.0]),
        ):
            assert monitor.record(result) is result
            results.append(result)
    assert [len(block) for block in kept.blocks] == [every] * (10 // every) + ([10 % every] if 10 % every else [])
    assert all(block.tasks == TASKS for block in kept.blocks)
    check(Block.cat(kept.blocks), results)
    assert torch.cat([block.steps for block in kept.blocks]).tolist() == list(range(10))
    times = torch.cat([block.times for block in kept.blocks])
    assert bool((times.diff() >= 0).all())
    assert kept.closed == 1


def test_what_is_kept_is_a_copy():
    """A result's tensors may be written to again, as the replays of a CUDA graph do."""
    results = list(steps("nash_mtl", random_gradients(), 4))
    static = BalanceResult(**{name: v.clone() if isinstance(v, Tensor) else v for name, v in vars(results[0]).items()})
    with igb.Monitor(kept := Kept(), warn=None) as monitor:
        for result in results:
            for name in ("losses", "scales", "weights", "status", "measured"):
                getattr(static, name).copy_(getattr(result, name))
            monitor.record(static)
    check(kept.blocks[0], results)


def test_no_graph_is_kept():
    loss = torch.ones(2, requires_grad=True) * 2
    monitor = igb.Monitor(every=3)
    monitor.record(BalanceResult(None, loss, loss, loss.double(), torch.zeros((), dtype=torch.int32), None))
    assert not any(column.requires_grad for column in monitor.history().values())


def test_cosines_of_a_gradient_that_vanishes():
    """They are 0, and so is its share."""
    monitor = igb.Monitor(warn=None)
    for result in steps("upgrad", lambda step: random_gradients()(step) * torch.tensor([[1.0], [0.0], [1.0]]), 2):
        monitor.record(result)
    history = monitor.history()
    names = ("cosine/depth/normals", "cosine/normals/edges", "norm/normals", "share/normals")
    assert [history[name].tolist() for name in names] == [[0.0, 0.0]] * 4
    assert history["cosine/depth/edges"].isfinite().all()


def test_shares_are_of_the_update():
    results = list(steps("imtl_g", random_gradients(), 5))
    monitor = igb.Monitor(warn=None)
    for result in results:
        monitor.record(result)
    history = monitor.history()
    for i, result in enumerate(results):
        parts = result.weights.abs() * result.norms
        for k, task in enumerate(TASKS):
            assert float(history[f"share/{task}"][i]) == pytest.approx(float(parts[k] / parts.sum()), rel=1e-12)


def test_shares_without_norms_are_of_the_weights():
    monitor = igb.Monitor(warn=None)
    for result in steps("equal", random_gradients(), 3, missing=lambda step: [2] if step == 1 else ()):
        monitor.record(result)
    share = torch.stack([monitor.history()[f"share/{task}"] for task in TASKS], dim=1)
    assert share.nan_to_num(-1).tolist() == [[1 / 3] * 3, [0.5, 0.5, -1], [1 / 3] * 3]


# ---- Waiting for nothing -----------------------------------------------------------------------------------------


class Watched(TorchDispatchMode):
    """Notes every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.seen.add(function._schema.name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", ["nash_mtl", "db_mtl", "equal"])
def test_recording_only_copies(method):
    """No value is read on the host, and nothing goes to another device: between blocks `copy_` is all there is."""
    monitor = igb.Monitor(every=100)
    results = list(steps(method, random_gradients(), 30, missing=lambda step: [1] if step % 7 == 3 else ()))
    monitor.record(results[0])
    with Watched() as watched:
        for result in results[1:]:
            monitor.record(result)
    assert watched.seen == {"aten::copy_"}


def test_recording_needs_no_values():
    """Tensors without data are recorded: nothing of them can be read."""
    (result,) = steps("nash_mtl", random_gradients(), 1)
    meta = BalanceResult(**{name: v.to("meta") if isinstance(v, Tensor) else v for name, v in vars(result).items()})
    monitor = igb.Monitor(every=10)
    for _ in range(9):
        monitor.record(meta)
    with pytest.raises(NotImplementedError):  # only now they are wanted
        monitor.record(meta)
    monitor._room = None  # nothing can be written at the end


def test_writers_get_whole_blocks():
    with igb.Monitor(kept := Kept(), every=7) as monitor:
        for result in steps("equal", random_gradients(), 20):
            monitor.record(result)
        assert [len(block) for block in kept.blocks] == [7, 7]
        monitor.flush()
        monitor.flush()
        assert [len(block) for block in kept.blocks] == [7, 7, 6]
    assert len(kept.blocks) == 3


def test_another_default_device(tmp_path):
    """What is worked out on the host is on the host, whatever `torch.set_default_device` says."""
    results = list(steps("nash_mtl", random_gradients(), 6, missing=lambda step: [1] if step == 2 else ()))
    want = igb.Monitor(warn=None)
    with torch.device("meta"):
        monitor = igb.Monitor([tmp_path / "log.csv", kept := Kept()], every=3, warn=Thresholds(window=3))
        for result in results:
            monitor.record(result)
        found = monitor.history()
        points = list(kept.blocks[0].points(2))
        monitor.figure()
    for result in results:
        want.record(result)
    assert all(same(found[name], column) for name, column in want.history().items() if name != "time")
    assert len(points) == 2


def test_within_a_compiled_step():
    """What the host counts is no reason to compile anew."""
    p = torch.nn.Parameter(torch.ones(3))
    balancer, monitor = igb.Balancer("imtl_g", shared=[p]), igb.Monitor(every=2)

    @torch.compile(backend="eager")
    def step(x: Tensor) -> BalanceResult:
        return monitor.record(balancer.backward([(p * x).square().sum(), (p - x).square().sum()]))

    inputs = [torch.full((3,), i + 1.0) for i in range(5)]
    for x in inputs[:2]:
        step(x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for x in inputs[2:]:
            step(x)
    assert monitor.history()["loss/0"].tolist() == [3.0, 12.0, 27.0, 48.0, 75.0]


# ---- Step numbers, names, layout ---------------------------------------------------------------------------------


def test_step_numbers():
    monitor = igb.Monitor(every=3)
    for i, result in enumerate(steps("equal", random_gradients(), 6)):
        monitor.record(result, step={2: 10, 5: 4}.get(i))
    assert monitor.history()["step"].tolist() == [0, 1, 10, 11, 12, 4]
    resumed = igb.Monitor()
    resumed.load_state_dict(monitor.state_dict())
    resumed.record(result)
    assert resumed.history()["step"].tolist() == [5]


def test_columns():
    monitor = igb.Monitor(tasks=["a", "b/c", "d"], warn=None)
    for result in steps("nash_mtl", random_gradients(), 2, names=None):
        monitor.record(result)
    own = [f"{kind}/{task}" for kind in ("loss", "scale", "weight", "norm", "share") for task in ("a", "b/c", "d")]
    pairs = ["cosine/a/b/c", "cosine/a/d", "cosine/b/c/d"]
    expected = ["step", "time", "status", "active/a", "active/b/c", "active/d", *own, *pairs]
    history = monitor.history()
    assert [*history] == expected
    integers = {name for name, column in history.items() if column.dtype is torch.int64}
    assert integers == {"step", "status", "active/a", "active/b/c", "active/d"}


def test_names_without_names():
    monitor = igb.Monitor()
    assert monitor.history() == {}
    for result in steps("emtl", random_gradients(2), 1, names=None):
        monitor.record(result)
    assert {"norm/0", "norm/1"} <= {*monitor.history()}
    assert not [name for name in monitor.history() if name.startswith("cosine")]


def test_steps_that_measure_nothing_leave_gaps():
    """Nash-MTL that holds its weights for three steps, with one pass in between."""
    p, own = torch.nn.Parameter(torch.ones(4)), torch.nn.Parameter(torch.ones(2))
    method = igb.NashMTL(update_every=3)
    balancer = igb.Balancer(method, shared=[p], heads="weighted", task_parameters=[own])
    monitor, results = igb.Monitor(kept := Kept(), every=4, warn=None), []
    for step in range(7):
        x = random_gradients(2, 4)(step)
        results.append(monitor.record(balancer.backward([(p * x[k]).square().sum() * own[k] for k in range(2)])))
    assert {result.measured is None for result in results} == {True, False}
    monitor.close()
    known = monitor.history()["cosine/0/1"].isfinite().tolist()
    assert known == [result.measured is not None for result in results]
    points = [point for block in kept.blocks for _, _, point in block.points(1)]
    assert ["norm/0" in point for point in points] == known


def test_a_first_step_that_measures_nothing():
    """Its block's Gramians still have a place."""
    with_gram = next(steps("nash_mtl", random_gradients(), 1))
    without = BalanceResult(**{**vars(with_gram), "measured": None})
    monitor = igb.Monitor(every=3, warn=None)
    for result in (without, with_gram, without, with_gram):
        monitor.record(result)
    assert monitor.history()["cosine/depth/edges"].isfinite().tolist() == [False, True, False, True]
    assert same(monitor.history()["norm/edges"][3], with_gram.norms[2])


@pytest.mark.parametrize("method", ["nash_mtl", "emtl"])
def test_a_first_block_that_measures_nothing(said, method):
    """Files have their columns by then; that nothing more comes in is said."""
    _log.warn_once.cache_clear()
    measured = next(steps(method, random_gradients(), 1))
    without = BalanceResult(**{**vars(measured), "measured": None})
    monitor = igb.Monitor(every=1, warn=None)
    for result in (without, measured, measured):
        monitor.record(result)
    assert not {name for name in monitor.history() if name.startswith(("norm", "cosine"))}
    assert len(said) == 1
    assert "no place for norms and cosines of later steps" in said[0]


# ---- Memory and ends ---------------------------------------------------------------------------------------------


def test_only_the_last_steps_are_kept():
    results = list(steps("nash_mtl", random_gradients(), 1)) * 95
    for keep, found in ((20, range(70, 95)), (30, range(60, 95)), (0, ()), (None, range(95)), (1000, range(95))):
        monitor = igb.Monitor(every=10, keep=keep, warn=None)
        for result in results:
            monitor.record(result)
        monitor.flush()
        history = monitor.history()
        assert (history["step"].tolist() if history else []) == [*found]


def test_after_close():
    with igb.Monitor(kept := Kept()) as monitor:
        for result in steps("equal", random_gradients(), 3):
            monitor.record(result)
    monitor.close()
    assert kept.closed == 1
    assert monitor.history()["step"].tolist() == [0, 1, 2]
    with pytest.raises(RuntimeError, match="the monitor is closed"):
        monitor.record(result)


def test_an_error_in_the_loop_loses_nothing():
    kept = Kept()

    def train() -> None:
        with igb.Monitor(kept) as monitor:
            for result in steps("equal", random_gradients(), 3):
                monitor.record(result)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert len(kept.blocks[0]) == 3
    assert kept.closed == 1


def test_a_monitor_that_is_dropped_is_closed():
    monitor = igb.Monitor(kept := Kept())
    for result in steps("equal", random_gradients(), 3):
        monitor.record(result)
    del monitor
    assert len(kept.blocks[0]) == 3
    assert kept.closed == 1


def test_a_writer_that_fails_leaves_the_others_alone():
    class Full(Kept):
        def write(self, block: Block) -> None:
            raise OSError("no space left")

        def close(self) -> None:
            super().close()
            raise OSError("still none")

    writers = Kept(), Full(), Kept()
    monitor = igb.Monitor(writers, every=2)
    first, second, third = steps("equal", random_gradients(), 3)
    monitor.record(first)
    with pytest.raises(OSError, match="no space"):
        monitor.record(second)
    monitor.record(third)
    with pytest.raises(OSError, match="still none"):
        monitor.close()
    assert [len(block) for block in writers[0].blocks] == [len(block) for block in writers[2].blocks] == [2, 1]
    assert [writer.closed for writer in writers] == [1, 1, 1]
    assert monitor.history()["step"].tolist() == [0, 1, 2]


AT_EXIT = """
import sys, torch
import igb_kernels as igb
p = torch.nn.Parameter(torch.ones(3))
balancer = igb.Balancer("nash_mtl", shared=[p])
monitor = igb.Monitor(["log.csv", "log.parquet", igb.monitor.WandB(dir=".", project="exit")])
for step in range(5):
    monitor.record(balancer.backward([(p * k).square().sum() for k in (1.0, 2.0)]))
assert not {"matplotlib"} & set(sys.modules)
raise SystemExit(3)
"""


def test_the_end_of_the_process_writes_the_rest(tmp_path):
    """Before the writers' own libraries end."""
    from pyarrow import parquet

    from .test_writers import wandb_rows

    root = str(pathlib.Path(igb.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": root, "WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    done = subprocess.run(
        [sys.executable, "-c", AT_EXIT], cwd=tmp_path, capture_output=True, text=True, env=environment, timeout=120
    )
    assert done.returncode == 3, done.stderr
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 6
    assert parquet.read_table(tmp_path / "log.parquet").num_rows == 5
    assert [row["balancing/step"] for row in wandb_rows(tmp_path)] == [4]


# ---- Errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"every": 0}, ValueError, "every must be a number of steps, at least 1; found 0"),
        ({"every": 2.5}, ValueError, "every must be a number of steps, at least 1; found 2.5"),
        ({"keep": -1}, ValueError, "keep must be a number of steps or None, found -1"),
        ({"tasks": "depth"}, ValueError, "tasks must name at least one task, and each once, found 'depth'"),
        ({"tasks": ["a", "a"]}, ValueError, r"tasks must name at least one task, and each once, found \['a', 'a'\]"),
        ({"warn": True}, TypeError, "warn must be Thresholds or None, found bool"),
        ({"to": [object()]}, TypeError, r"to must hold paths, or writers .* object has no \['write', 'close'\]"),
        (
            {"to": "log.json"},
            ValueError,
            "to must be \"wandb\", a .csv or .parquet file, or a folder .* found 'log.json'",
        ),
    ],
)
def test_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        igb.Monitor(**arguments)


@pytest.mark.parametrize("name", ["starved", "conflict_rate", "stationary", "unusable", "conflict_cosine"])
def test_thresholds(name):
    with pytest.raises(ValueError, match=f"{name} must be (0|-1) to 1, found 1.5"):
        Thresholds(**{name: 1.5})


def test_a_window_of_nothing():
    with pytest.raises(ValueError, match="window must be a number of steps, at least 1; found 0"):
        Thresholds(window=0)


def test_results_that_do_not_fit():
    monitor = igb.Monitor()
    (first,) = steps("nash_mtl", random_gradients(), 1)
    monitor.record(first)
    wrong = [
        (next(steps("nash_mtl", random_gradients(), 1, names=("a", "b", "c"))), r"must be of the tasks \['depth'"),
        (next(steps("nash_mtl", random_gradients(2), 1, names=None)), "must be of 3 tasks, found 2"),
        (
            next(steps("emtl", random_gradients(), 1)),
            r"must have the shape \(3, 3\) like the first or be None, found \(3,\)",
        ),
        (
            BalanceResult(**{**vars(first), "weights": first.weights.to("meta")}),
            "must be on cpu like the first, found meta",
        ),
    ]
    for result, message in wrong:
        with pytest.raises(ValueError, match=message):
            monitor.record(result)
    with pytest.raises(TypeError, match="step must be an int, found float"):
        monitor.record(first, step=1.0)
    monitor.record(first)
    assert monitor.history()["step"].tolist() == [0, 1]
    with pytest.raises(ValueError, match=r"tasks must name the 3 tasks of the result, found \['a'\]"):
        igb.Monitor(tasks=["a"]).record(first)


def test_columns_that_would_have_one_name():
    monitor = igb.Monitor(tasks=["a", "b/c", "a/b", "c"])
    (result,) = steps("nash_mtl", random_gradients(4), 1, names=None)
    with pytest.raises(
        ValueError, match=r"tasks must have names whose pairs a/b differ, found \['a', 'b/c', 'a/b', 'c'\]"
    ):
        monitor.record(result)


def test_what_is_kept_is_lean(tmp_path):
    """Blocks in memory hold what was recorded, not what was worked out of it for writers."""
    monitor = igb.Monitor(tmp_path / "log.csv", every=2, warn=Thresholds(window=2))
    for result in steps("nash_mtl", random_gradients(), 4):
        monitor.record(result)
    fields = {*Block.__dataclass_fields__}
    assert [{*vars(block)} for block in monitor._blocks] == [fields, fields]
