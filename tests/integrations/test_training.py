"""What the trainers' modules have in common."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch

import igb_kernels as igb
from igb_kernels.integrations import _trainers

from .training import make_encoder_and_heads


@pytest.mark.parametrize(
    ("module", "packages"),
    [
        ("lightning", ["lightning", "pytorch_lightning"]),
        ("huggingface", ["transformers"]),
        ("accelerate", ["accelerate"]),
    ],
)
def test_what_to_install_is_said_where_it_is_not(module, packages, monkeypatch):
    for package in packages:
        monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"igb_kernels.integrations.{module}", raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install .*" + packages[0]):
        importlib.import_module(f"igb_kernels.integrations.{module}")


def test_a_sum_of_the_losses_that_there_are():
    one, two = torch.tensor(1.0, requires_grad=True), torch.tensor(2.0, dtype=torch.float64)
    for losses in ([one, None, two], {"a": one, "b": None, "c": two}, torch.stack([one, two.float()])):
        total = _trainers.total(losses)
        assert total.item() == 3
        assert not total.requires_grad


def test_a_stacked_tensor_of_losses_in_micro_batches():
    encoder, heads = make_encoder_and_heads()
    balancer = igb.Balancer("imtl_g", shared=encoder)
    losses = torch.stack([head(encoder(torch.ones(4, 6))).square().mean() for head in heads.values()])
    for last in (False, True):
        result = _trainers.backward(balancer, losses, decide_per="step", micro_batches=2, last=last, retain_graph=True)
    torch.testing.assert_close(result.losses, losses.detach())
