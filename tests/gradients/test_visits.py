"""Random orders of visits: the generator, the shuffle, and the seeds of PCGrad and GradVac."""

from __future__ import annotations

import copy
from itertools import permutations, product

import pytest
import torch
from samplers import gramian, jacobian

from igb_kernels import Balancer, ops
from igb_kernels._seed import SEEDS
from igb_kernels.backends._random import philox, philox_words
from igb_kernels.gradients import GradVac, PCGrad
from igb_kernels.gradients._visits import random_orders

METHODS = {"pcgrad": PCGrad, "gradvac": GradVac}
every_method = pytest.mark.parametrize("method", METHODS)

KNOWN_ANSWERS = {
    (0, 0, 0): (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    (2**64 - 1, 2**64 - 1, 2**64 - 1): (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    (0x299F31D0A4093822, 0x0370734413198A2E, 0x85A308D3243F6A88): (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
}
"""Random123's kat_vectors for Philox4x32-10: seed, step and stream to words."""


@pytest.mark.parametrize("given", KNOWN_ANSWERS)
def test_philox_has_the_published_answers(given):
    seed, step, stream = given
    assert philox(seed, step, stream) == KNOWN_ANSWERS[given]
    signed = stream - 2**64 if stream >= 2**63 else stream
    assert tuple(philox_words(seed, step, torch.tensor([signed]))[0].tolist()) == KNOWN_ANSWERS[given]


def test_philox_of_many_streams():
    streams = torch.tensor([[0, 1, 2**31], [2**32 - 1, 2**32, 2**40 + 7]])
    words = philox_words(2**52 + 3, 2**33 + 1, streams)
    assert words.shape == (2, 3, 4)
    for stream, found in zip(streams.flatten().tolist(), words.reshape(-1, 4).tolist(), strict=True):
        assert tuple(found) == philox(2**52 + 3, 2**33 + 1, stream)


def chi_square(counts: list[int]) -> float:
    expected = sum(counts) / len(counts)
    return sum((count - expected) ** 2 / expected for count in counts)


@pytest.mark.parametrize("seed", [0, 1, 2**53 - 1])
def test_orders_are_uniform_permutations(seed):
    counts = dict.fromkeys(permutations(range(4)), 0)
    for step in range(600):
        for order in random_orders(4, seed, step).tolist():
            counts[tuple(order)] += 1
    assert chi_square(list(counts.values())) < 52  # 23 degrees of freedom: p = 5e-4


@pytest.mark.parametrize("tasks", [1, 2, 5, 64, 300])
def test_orders_are_permutations(tasks):
    assert torch.equal(random_orders(tasks, 3, 5).sort(dim=1).values, torch.arange(tasks).repeat(tasks, 1))


def test_positions_are_uniform_among_many_tasks():
    orders = random_orders(512, 9, 0)
    for position in (0, 3, 4, 255, 510, 511):
        counts = torch.bincount(orders[:, position] // 32, minlength=16)
        assert chi_square(counts.tolist()) < 40  # 15 degrees of freedom: p = 5e-4


def test_compiled_orders_are_uniform_and_independent():
    """With three conflicting tasks the weights tell which of two orders each gradient took: 8 outcomes."""
    gram = torch.tensor([[1.0, -0.3, -0.2], [-0.3, 0.8, -0.1], [-0.2, -0.1, 0.7]], dtype=torch.float64)
    outcomes = {}
    for first in product((1, 2), (0, 2), (0, 1)):  # whom each visits first
        times = torch.ones(3, 3).scatter_(1, torch.tensor(first)[:, None], 0.0)
        outcomes[tuple(round(w, 9) for w in ops.solve("pcgrad", gram, per_task=times)[0].tolist())] = 0
    state = ops.SOLVERS["pcgrad"].new_state(3, torch.device("cpu"))
    for _ in range(1600):
        weights, _ = ops.solve("pcgrad", gram, state=state)
        outcomes[tuple(round(w, 9) for w in weights.tolist())] += 1
    assert state.tolist() == [0, 1600]
    assert len(outcomes) == 8
    assert chi_square(list(outcomes.values())) < 26  # 7 degrees of freedom: p = 5e-4


@every_method
def test_seeds_and_steps_make_a_difference(method, backend):
    gram = gramian(jacobian("random", 24)) - 3 * torch.ones(24, 24, dtype=torch.float64)
    gram += 80 * torch.eye(24, dtype=torch.float64)

    def first_two(seed):
        state = ops.SOLVERS[method].new_state(24, gram.device)
        state[0] = seed
        if method == "gradvac":  # whose second step would differ for its goals as well
            return [ops.solve(method, gram, state=state, backend=backend, beta=0.0)[0] for _ in range(2)]
        return [ops.solve(method, gram, state=state, backend=backend)[0] for _ in range(2)]

    runs = [first_two(seed) for seed in (0, 1, 2**32, 2**53 - 1)]
    assert all(map(torch.equal, runs[1], first_two(1)))
    seen = [weights for run in runs for weights in run]
    assert not any(torch.equal(a, b) for i, a in enumerate(seen) for b in seen[:i])


# ---- Seeds of a balancer -----------------------------------------------------------------------------------------

CONFLICTING = torch.tensor([[1.0, 0.2, 0.0], [-0.9, 0.3, 0.1], [-0.2, -0.8, 0.3], [0.1, -0.4, -1.0]])


def steps(balancer: Balancer, count: int) -> list[torch.Tensor]:
    (parameters,) = balancer.shared
    return [balancer.backward([parameters @ row for row in CONFLICTING]).weights for _ in range(count)]


def balancer_with(gradients) -> Balancer:
    return Balancer(gradients, shared=[torch.zeros(3, requires_grad=True)])


@every_method
def test_torch_s_seed_decides_where_none_is_given(method):
    runs = []
    for seed in (5, 5, 6):
        torch.manual_seed(seed)
        runs.append(torch.stack(steps(balancer_with(METHODS[method](seed=None)), 5)))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@every_method
def test_a_given_seed_is_independent_of_torch_s(method):
    runs = []
    for seed in (5, 6):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        runs.append(torch.stack(steps(balancer_with(METHODS[method](seed=7)), 5)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*runs)


@every_method
@pytest.mark.parametrize("seed", [None, SEEDS - 1])
def test_the_state_has_seed_and_step(method, seed):
    first, second = balancer_with(METHODS[method](seed=seed)), balancer_with(METHODS[method](seed=1))
    steps(first, 3)
    state = copy.deepcopy(first.state_dict())
    assert state["gradients"]["state"][1] == 3
    if seed is not None:
        assert state["gradients"]["state"][0] == seed
    second.load_state_dict(state)
    assert torch.equal(torch.stack(steps(first, 5)), torch.stack(steps(second, 5)))


@every_method
def test_a_step_that_is_not_finite_does_not_count(method):
    balancer = balancer_with(METHODS[method](seed=3))
    steps(balancer, 2)
    before = balancer.gradients.state.clone()
    (parameters,) = balancer.shared
    balancer.backward([parameters @ row * torch.nan for row in CONFLICTING])
    assert torch.equal(balancer.gradients.state, before)


@every_method
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_times_that_are_not_finite(method, backend, value):
    times = torch.zeros(3, 3)
    times[1, 2] = value
    state = ops.SOLVERS[method].new_state(3, torch.device("cpu"))
    before = state.clone()
    weights, status = ops.solve(method, torch.eye(3), per_task=times, state=state, backend=backend)
    assert weights.isnan().all()
    assert int(status) == 1
    assert torch.equal(state, before)


@every_method
@pytest.mark.parametrize("seed", [-1, 2**53, 1.5, True, "1"])
def test_bad_seeds(method, seed):
    with pytest.raises(ValueError, match="seed must be None or an integer, 0 to 2"):
        METHODS[method](seed=seed)


@every_method
def test_repr_names_the_seed(method):
    assert repr(METHODS[method](seed=7)).startswith(f"{METHODS[method].__name__}(seed=7, ")
