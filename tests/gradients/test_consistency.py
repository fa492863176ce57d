"""What Python and C++ each declare about a method, a rule or a status bit is the same."""

from __future__ import annotations

import pathlib
import re
from math import prod

import pytest
import torch

from igb_kernels import Status, _native, ops
from igb_kernels.backends import reference
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES, LearnedLossBalancer

_C = _native.module
CORE = pathlib.Path(__file__).resolve().parents[2] / "csrc" / "core"
IN_CPP = {"lam": "lambda"}
"""Python's name where it differs: `lambda` is a keyword there."""


def source(path):
    """A header, with those of core that define its structs' bases."""
    text = (CORE / path).read_text()
    for base in re.findall(r"struct \w+ : (\w+)", text):
        (home,) = [header for header in CORE.glob("*.h") if re.search(rf"struct {base}\b", header.read_text())]
        text += home.read_text()
    return text


def enumerators(path, name):
    """The names and, where they are given, the values of a C++ enum."""
    (body,) = re.findall(rf"enum (?:class )?{name}\b[^{{]*{{(.*?)}}", source(path), flags=re.DOTALL)
    entries = [entry.split("=") for entry in re.sub(r"//[^\n]*", "", body).split(",") if entry.strip()]
    return {entry[0].strip(): entry[1].strip() if len(entry) == 2 else None for entry in entries}


def declared_options(path):
    return [name for name in enumerators(path, "Option") if name != "option_count"]


def make_rule(name):
    return RULES[name](num_tasks=3) if issubclass(RULES[name], LearnedLossBalancer) else RULES[name]()


def make_method(name):
    return METHODS[name](num_tasks=3) if name == "grad_norm" else METHODS[name]()


def test_every_method_is_registered_everywhere():
    assert set(METHODS) == set(ops.SOLVERS) == set(reference.SOLVERS) == set(_C.methods)
    assert {name: cls.name for name, cls in METHODS.items()} == {name: name for name in METHODS}


def test_every_rule_is_registered_everywhere():
    assert set(RULES) == set(ops.RULES) == set(reference.RULES) == set(_C.loss_rules)


@pytest.mark.parametrize("method", METHODS)
def test_options_of_methods(method):
    registered = list(ops.SOLVERS[method].options)
    assert registered == list(make_method(method).options())
    assert len(registered) == _C.option_count(_C.methods[method])
    assert [IN_CPP.get(name, name) for name in registered] == declared_options(f"solvers/{method}.h")


@pytest.mark.parametrize("method", METHODS)
def test_defaults_of_methods(method):
    assert ops.SOLVERS[method].options == make_method(method).options()


@pytest.mark.parametrize("rule", RULES)
def test_options_of_rules(rule):
    registered = list(ops.RULES[rule].options)
    assert registered == list(make_rule(rule).options())
    assert len(registered) == _C.rule_option_count(_C.loss_rules[rule])
    assert [IN_CPP.get(name, name) for name in registered] == declared_options(f"rules/{rule}.h")


@pytest.mark.parametrize("rule", RULES)
def test_defaults_of_rules(rule):
    assert ops.RULES[rule].options == make_rule(rule).options()


@pytest.mark.parametrize("tasks", [1, 2, 7, 128])
@pytest.mark.parametrize("method", METHODS)
def test_state_sizes(method, tasks):
    solver, number = ops.SOLVERS[method], _C.methods[method]
    state = solver.new_state(tasks, torch.device("cpu"))
    assert (0 if state is None else len(state)) == _C.state_size(number, tasks)
    assert (0 if solver.per_task is None else prod(solver.per_task(tasks))) == _C.per_task_size(number, tasks)


@pytest.mark.parametrize("tasks", [1, 2, 7, 128])
@pytest.mark.parametrize("name", RULES)
def test_sizes_of_rules(name, tasks):
    rule, number = ops.RULES[name], _C.loss_rules[name]
    state = rule.new_state(tasks, torch.device("cpu"))
    assert (0 if state is None else len(state)) == _C.rule_state_size(number, tasks)
    assert (0 if rule.per_task is None else prod(rule.per_task(tasks))) == _C.rule_per_task_size(number, tasks)


def test_status_bits():
    in_cpp = {name.upper(): eval(value) for name, value in enumerators("status.h", "Status").items()}  # "1 << 0"
    assert in_cpp == {bit.name: bit.value for bit in Status}


@pytest.mark.parametrize("method", METHODS)
def test_what_a_method_needs(method):
    text = source(f"solvers/{method}.h")
    for need in ("needs_gram", "needs_losses"):
        (in_cpp,) = re.findall(rf"{need} = (true|false)", text)
        assert getattr(ops.SOLVERS[method], need) == (in_cpp == "true")


def test_task_limit():
    assert _C.max_tasks == ops.MAX_TASKS
