"""What is said to be an element's edge is one: gradients along it are those of the element."""

import random

import pytest
import torch
from torch import Tensor

from igb_kernels.peel import element_edges

SIZE = 5


def random_vector(rng: random.Random, leaf: Tensor) -> Tensor:
    """A vector made from scalars by a random program, most often of nothing but arrangements."""

    def scalar() -> Tensor:
        return leaf[rng.randrange(len(leaf))].sin() * rng.uniform(0.5, 2)

    start = rng.choice(["zeros", "stack", "joined", "computed"])
    vector = torch.zeros(SIZE)
    if start == "stack":
        vector = torch.stack([scalar() if rng.random() < 0.8 else torch.ones(()) for _ in range(SIZE)])
    elif start == "joined":
        vector = torch.cat([torch.stack([scalar(), scalar()]), *(scalar().reshape(1) for _ in range(SIZE - 2))])
    elif start == "computed":
        vector = leaf[:SIZE].cos()
    steps = {
        "scalar": 12,
        "all": 3,
        "part": 3,
        "number": 2,
        "fill": 1,
        "multiply": 1,
        "add": 1,
        "draw": 0.5,
        "reshape": 1,
        "rows": 1,
        "copy": 1,
    }
    for step in rng.choices([*steps], [*steps.values()], k=rng.randrange(8)):
        k = rng.randrange(SIZE)
        if step == "scalar":
            vector[k] = scalar() if rng.random() < 0.5 else scalar().reshape(1)
        elif step == "all":
            for element in rng.sample(range(SIZE), SIZE):
                vector[element] = scalar()
        elif step == "part":
            first, stride = rng.randrange(3), rng.choice([1, 2])
            part = vector[first::stride]
            part.copy_(torch.stack([scalar() for _ in part]) if rng.random() < 0.7 else scalar())
        elif step == "number":
            vector[k] = 2.0 if rng.random() < 0.5 else torch.tensor(2.0)
        elif step == "fill":
            vector[k].fill_(scalar())
        elif step == "multiply":
            vector[k].mul_(scalar() if rng.random() < 0.5 else 1.0)
        elif step == "add":
            vector[k] += scalar()
        elif step == "draw":
            vector[k].bernoulli_(scalar().square() / 4)
        elif step == "reshape":
            vector = rng.choice([lambda v: v[None].squeeze(0), lambda v: v.view(1, -1).view(-1), torch.clone])(vector)
        elif step == "rows":
            rows = [vector, torch.zeros(SIZE), torch.stack([scalar() for _ in range(SIZE)])]
            rng.shuffle(rows)
            rows = torch.stack(rows) if rng.random() < 0.5 else torch.stack(rows).squeeze(0)
            vector = rows[rng.randrange(3)] if rng.random() < 0.8 else rows[:, rng.randrange(SIZE)].repeat(2)[:SIZE]
        elif step == "copy":
            vector = torch.stack([*vector.unbind()])
    return vector


def test_gradients_along_the_edges_are_the_elements():
    understood, peeled = 0, 0
    for seed in range(600):
        rng = random.Random(seed)
        leaf = torch.linspace(-1, 1, 9).requires_grad_()
        vector = random_vector(rng, leaf)
        if not vector.requires_grad or (edges := element_edges(vector)) is None:
            continue
        understood += 1
        assert len(edges) == SIZE
        for k, edge in enumerate(edges):
            seed_of_element = torch.zeros(SIZE)
            seed_of_element[k] = 1.5
            (want,) = torch.autograd.grad(vector, leaf, seed_of_element, retain_graph=True)
            if edge is None:
                assert not want.any()
                continue
            peeled += 1
            root = torch.autograd.graph.GradientEdge(*edge)
            (got,) = torch.autograd.grad(root, leaf, torch.tensor(1.5), retain_graph=True)
            assert torch.equal(got, want), (seed, k)
    assert understood > 150
    assert peeled > 600


def test_needs_no_numbers():
    """So nothing waits for a GPU."""
    scalars = [torch.ones((), device="meta", requires_grad=True).sin() for _ in range(3)]
    vector = torch.zeros(3, device="meta")
    for k in (2, 0, 1):
        vector[k] = scalars[k]
    assert element_edges(vector) == [(scalar.grad_fn, 0) for scalar in scalars]


def test_the_graph_can_still_be_used():
    leaf = torch.ones(3, requires_grad=True)
    vector = torch.zeros(3)
    for k in range(3):
        vector[k] = (k + 2) * leaf[k]
    element_edges(vector)
    vector.sum().backward()
    torch.testing.assert_close(leaf.grad, torch.tensor([2.0, 3.0, 4.0]))


def test_scalars_from_another_device_are_not_peeled():
    vector = torch.zeros(2, device="meta")
    vector[0] = torch.ones((), device="meta", requires_grad=True).sin()
    vector[1] = torch.ones((), requires_grad=True).sin().to("meta")
    assert element_edges(vector) is not None
    vector[1] = torch.ones((), requires_grad=True).sin()
    assert element_edges(vector) is None


@pytest.mark.parametrize("watch", [lambda v: v.retain_grad(), lambda v: v.register_hook(lambda g: g)])
def test_a_vector_that_is_watched_is_not_peeled(watch):
    vector = torch.stack([torch.ones((), requires_grad=True).sin() for _ in range(2)])
    assert element_edges(vector) is not None
    watch(vector)
    assert element_edges(vector) is None
