"""A job that is killed and started again goes on as if nothing had been; balancers are copied as optimizers are."""

import os
import pickle
import signal
import subprocess
import sys

import pytest

import igb_kernels as igb
from igb_kernels.gradients import METHODS
from igb_kernels.losses import RULES

from .models import make_net
from .resume_worker import JOBS, ROUNDS, train


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
