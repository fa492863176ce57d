"""IGBv2's agent learning on a thread: what it does to the weights, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
import time

import pytest
import torch

import igb_kernels as igb
from igb_kernels.agents import learner
from igb_kernels.agents.learner import Burst
from igb_kernels.agents.sac import SACAgent
from igb_kernels.backends import resolve

CPU = resolve("auto", "cpu")
OPTIONS = {
    "base_losses": [1.0, 2.0],
    "steps_per_epoch": 1,
    "update_after": 0,
    "start_epoch": 0,
    "hidden": (16, 16),
    "update_every": 5,
    "batch_size": 16,
    "seed": 3,
}


def started(**options):
    rule = igb.IGBv2(**{**OPTIONS, **options})
    rule.start(2, torch.device("cpu"))
    return rule


def step(rule, i):
    losses = torch.tensor([0.9 ** (0.1 * i) + 0.01 * (i * 7 % 5), 2 * 0.99**i])
    scales, status = rule.scales(losses, CPU)
    rule.commit(losses, scales, status)
    return scales * losses


def agent_threads():
    return [thread for thread in threading.enumerate() if thread.name == "igb_kernels agent"]


def gone(seconds=5.0):
    """Whether all agents' threads end soon."""
    end = time.monotonic() + seconds
    while agent_threads() and time.monotonic() < end:
        time.sleep(0.01)
    return not agent_threads()


@pytest.fixture
def slow(monkeypatch):
    """Updates that outlast many steps."""
    train = SACAgent.train

    def slowly(self, batch, seed):
        time.sleep(0.02)
        train(self, batch, seed)

    monkeypatch.setattr(SACAgent, "train", slowly)


# ---- What it does -------------------------------------------------------------------------------------------------


@pytest.fixture
def busy():
    """A thread that wants the interpreter all the time."""
    stop = threading.Event()

    def spin():
        while not stop.is_set():
            sum(range(1000))

    thread = threading.Thread(target=spin)
    thread.start()
    yield
    stop.set()
    thread.join()


def trace(steps=41):
    rule = started()
    return torch.stack([step(rule, i) for i in range(steps)])


@pytest.fixture(scope="module")
def expected():
    return trace()


def test_weights_do_not_depend_on_who_is_faster(expected, slow):
    assert torch.equal(trace(), expected)


def test_weights_do_not_depend_on_load(expected, busy):
    assert torch.equal(trace(), expected)


def test_what_is_learned_is_acted_on_from_the_next_burst_on(expected):
    """Each time a burst ends; in the foreground one burst earlier."""
    background, foreground = started(), started(background=False)
    actors = {True: [], False: []}
    for i in range(26):
        for rule in (background, foreground):
            step(rule, i)
            rule.state_dict()  # waits
            actors[rule.background].append(rule._learner.actor.layers[0].clone())
    for i in range(1, 26):
        for key, first in ((True, 10), (False, 5)):
            changed = not torch.equal(actors[key][i], actors[key][i - 1])
            assert changed == (i % 5 == 0 and i >= first), (key, i)
    assert torch.equal(actors[True][10], actors[False][5])  # the same first burst


def test_steps_go_on_beside_a_burst(slow):
    rule = started(update_every=40)
    for i in range(40):
        step(rule, i)
    assert not agent_threads()
    step(rule, 40)
    start = time.perf_counter()
    for i in range(41, 45):
        step(rule, i)
    assert time.perf_counter() - start < 0.2  # of 20 updates, 0.4 s at least
    assert agent_threads()
    rule._learner.wait()
    assert not agent_threads()


# ---- Errors -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("background", [False, True])
def test_what_an_update_raises_the_next_step_raises(background, monkeypatch):
    p = torch.ones(2, requires_grad=True)
    rule = igb.IGBv2(**OPTIONS, background=background)
    balancer = igb.Balancer(rule, shared=[p])

    def backward():
        p.grad = None
        balancer.backward(list((p * torch.tensor([1.0, 2.0])).square()))
        rule._learner.wait()

    for _ in range(7):
        backward()
    good = balancer.state_dict()

    def fail(self, batch, seed):
        raise ArithmeticError("planned")

    with monkeypatch.context() as patch:
        patch.setattr(SACAgent, "train", fail)
        for _ in range(4):
            backward()
    p.grad = None
    for _ in range(2):
        with pytest.raises(RuntimeError, match="failed to train") as raised:
            balancer.backward(list(p.square()))
        assert isinstance(raised.value.__cause__, ArithmeticError)
        assert p.grad is None
    assert gone()
    balancer.load_state_dict(good)
    for _ in range(10):
        backward()


# ---- Ends ---------------------------------------------------------------------------------------------------------


def test_a_balancer_that_goes_takes_its_thread_along(slow):
    rule = started(update_every=200)
    for i in range(201):
        step(rule, i)
    assert agent_threads()
    del rule
    assert gone(1.0)  # of 100 updates of 20 ms


def test_bursts_begin_while_others_do(monkeypatch):
    """Threads of several agents: each notes its own, and looks which others have ended."""
    numbers = iter(range(10**9, 10**9 + 9))

    def another_begins(thread: int) -> bool:
        learner._os_threads.add(next(numbers))
        return False

    monkeypatch.setattr(learner, "_os_threads", {1, 2, 3})
    monkeypatch.setattr(learner, "_is_alive", another_begins)
    done = []
    burst = Burst(done.append, 4, size=0, owner=another_begins)
    burst.join()
    assert done == [0, 1, 2, 3]


def test_a_burst_is_waited_for_at_a_fork():
    done = []
    owner = type("Owner", (), {})()
    burst = Burst(lambda i: (time.sleep(0.05), done.append(i)), 4, size=0, owner=owner)
    child = os.fork()
    if child == 0:
        os._exit(0 if done == [0, 1, 2, 3] and not burst._thread.is_alive() else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


START = """
import os, sys, threading, time, torch
import igb_kernels as igb
from igb_kernels.agents.sac import SACAgent
torch.set_num_threads(1)
train = SACAgent.train
def slowly(self, batch, seed):
    time.sleep(0.05)
    train(self, batch, seed)
def steps(balancer, count):
    for _ in range(count):
        p.grad = None
        balancer.backward(list((p * torch.tensor([1.0, 2.0])).square()))
def new(**options):
    rule = igb.IGBv2(base_losses=[1., 2.], steps_per_epoch=1, update_after=0, start_epoch=0, hidden=(16,),
                     batch_size=16, update_every=100, seed=0, **options)
    return igb.Balancer(rule, shared=[p])
p = torch.ones(2, requires_grad=True)
def running():
    return sum(thread.name == "igb_kernels agent" for thread in threading.enumerate())
"""


def script(text, timeout=60, code=0):
    """Runs START and the text; returns what it prints, and its errors."""
    source = START + textwrap.dedent(text)
    result = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=timeout)
    assert result.returncode == code, result.stderr
    return result.stdout, result.stderr


ENDS = {
    "the end of the script": ("", 0),
    "an exception": ("raise ValueError('planned')", 1),
    "the balancer goes first": ("del balancer", 0),
}


@pytest.mark.parametrize("end", ENDS)
def test_the_interpreter_ends_amid_a_burst(end):
    """50 updates of at least 50 ms have begun; the exit waits for the one that runs."""
    text, code = ENDS[end]
    out, err = script(
        f"""
        import atexit
        balancer = new()
        steps(balancer, 100)
        SACAgent.train = slowly
        steps(balancer, 1)
        assert running() == 1
        start = time.monotonic()
        atexit.register(lambda: print(time.monotonic() - start))
        {text}
        """,
        code=code,
    )
    assert float(out) < 1.5
    assert "Exception ignored" not in err


def test_an_update_that_raises_at_the_end_does_not_hang():
    _, err = script(
        """
        def fail(self, batch, seed):
            raise ArithmeticError("planned")
        balancer = new()
        steps(balancer, 100)
        SACAgent.train = fail
        steps(balancer, 1)
        """
    )
    assert not err


def test_a_forked_process_goes_on_as_its_parent_does():
    """Amid a burst: both have its result, and their next steps are the same."""
    out, _ = script(
        """
        balancer = new()
        steps(balancer, 100)
        SACAgent.train = slowly
        steps(balancer, 1)
        read, write = os.pipe()
        child = os.fork()
        assert running() == 0
        SACAgent.train = train
        steps(balancer, 150)
        p.grad = None
        weights = balancer.backward(list((p * torch.tensor([1.0, 2.0])).square())).scales
        if child == 0:
            os.write(write, weights.numpy().tobytes())
        else:
            found = os.read(read, 100)
            assert found == weights.numpy().tobytes()
            assert os.waitpid(child, 0)[1] == 0
            print("same")
        """
    )
    assert out == "same\n"


def test_spawned_processes(tmp_path):
    """A file, because spawning imports the main module anew."""
    file = tmp_path / "spawn.py"
    file.write_text(
        START
        + textwrap.dedent(
            """
            import multiprocessing
            def work(queue):
                balancer = new()
                steps(balancer, 250)
                p.grad = None
                queue.put(balancer.backward(list((p * torch.tensor([1.0, 2.0])).square())).scales.tolist())
            if __name__ == "__main__":
                balancer = new()
                steps(balancer, 101)
                context = multiprocessing.get_context("spawn")
                queue = context.Queue()
                workers = [context.Process(target=work, args=(queue,)) for _ in range(2)]
                for worker in workers:
                    worker.start()
                found = [queue.get() for _ in workers]
                for worker in workers:
                    worker.join()
                    assert worker.exitcode == 0
                assert found[0] == found[1]
                print("same")
            """
        )
    )
    result = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, timeout=120)
    assert result.stdout == "same\n", result.stderr
