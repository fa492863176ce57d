"""A job that is killed and started again goes on as if nothing had been; balancers are copied as optimizers are."""

import copy
import os
import pickle
import signal
import subprocess
import sys

import pytest

import igb_kernels as igb
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES

from .models import make_net, same
from .resume_worker import JOBS, ROUNDS, train
from .test_state import Run


@pytest.mark.skipif(not hasattr(os, "fork"), reason="each attempt is a forked process")
def test_a_killed_job_goes_on_bit_for_bit(tmp_path):
    """Killed in the second backward pass of a step, then while it saves; the third attempt ends it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-m", "balancer.resume_worker", str(tmp_path)]
    with subprocess.Popen(command, env=environment) as worker:
        want = train()
        assert worker.wait(timeout=300) == 0
    statuses, curves = pickle.loads((tmp_path / "result.pkl").read_bytes())
    assert statuses == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert list(curves) == list(JOBS)
    for name, curve in curves.items():
        assert len(curve) == ROUNDS
        for step, (got, expected) in enumerate(zip(curve, want[name], strict=True)):
            assert got == expected, f"{name}: step {step} of the resumed job differs"


def test_every_method_and_rule_is_in_the_job():
    named = {part for make in JOBS.values() for part in _names(make())}
    assert named == {*METHODS, *RULES}


def _names(arguments: dict[str, object]) -> list[str]:
    balancer = igb.Balancer(**arguments, shared=make_net().shared)
    return [balancer.losses.name, balancer.gradients.name]


# ---- Copies and pickles -------------------------------------------------------------------------------------------

COPIES = {"copy": copy.deepcopy, "pickle": lambda run: pickle.loads(pickle.dumps(run))}


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", JOBS)
def test_a_copy_with_its_model_goes_on_bit_for_bit(name, how):
    run = Run(JOBS[name])
    run.steps(0, 5)
    copied = COPIES[how](run)
    assert copied.balancer.shared[0] is next(copied.net.parameters())
    assert copied.balancer.shared[0] is not run.balancer.shared[0]
    assert same(copied.steps(5, 8), run.steps(5, 8))


def test_a_copy_before_the_first_step():
    run = Run(JOBS["igb_v2 in the background"])
    copied = copy.deepcopy(run)
    assert same(copied.steps(0, 6), run.steps(0, 6))


def test_a_copy_leaves_the_rows_of_the_last_step_behind():
    net = make_net()
    balancer = igb.Balancer("imtl_g", shared=net.shared)
    balancer.backward(net.losses())
    net.zero_grad()
    fresh = igb.Balancer("imtl_g", shared=net.shared)
    assert len(pickle.dumps(balancer)) < len(pickle.dumps(fresh)) + 200


# ---- Other options ------------------------------------------------------------------------------------------------


def test_a_state_of_other_options_is_said_once(warnings_said):
    net = make_net()
    state = igb.Balancer(igb.DBMTL(0.9), shared=net.shared).state_dict()
    for _ in range(2):
        igb.Balancer(igb.DBMTL(0.9), shared=net.shared).load_state_dict(state)
        assert not warnings_said
    other = igb.Balancer(igb.DBMTL(0.5), shared=net.shared)
    other.load_state_dict(state)
    other.load_state_dict(state)
    assert len(warnings_said) == 1
    assert "beta=0.9" in warnings_said[0]
    assert "beta=0.5" in warnings_said[0]
    assert other.gradients.beta == 0.5


@pytest.mark.parametrize("name", JOBS)
def test_training_changes_no_options(name, warnings_said):
    run = Run(JOBS[name])
    run.steps(0, 4)
    warnings_said.clear()
    Run(JOBS[name]).balancer.load_state_dict(run.balancer.state_dict())
    assert not warnings_said
