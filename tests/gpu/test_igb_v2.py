"""IGBv2 on the GPU: no wait for it but for the step before, and the CPU's transitions."""

from __future__ import annotations

import pytest
import torch

import igb_kernels as igb

pytest.importorskip("stable_baselines3")


def steps(device: str, **options: object) -> igb.Balancer:
    """Eleven steps without an optimizer, on losses that fall."""
    p = torch.ones(2, device=device, requires_grad=True)
    rule = igb.IGBv2(base_losses=[1.0, 2.0], steps_per_epoch=1, hidden=(16,), update_every=4, seed=0, **options)
    balancer = igb.Balancer(rule, shared=[p], backend="reference" if device == "cpu" else "auto")
    for i in range(11):
        p.grad = None
        scale = torch.tensor([0.9**i, 1.5 * 0.97**i]).to(device)
        result = balancer.backward(list((p * scale).square()))
        assert result.scales.device.type == device
    return balancer


def test_transitions_are_those_of_the_cpu():
    """Under random weights; the policy would see other losses."""
    states = [steps(device, start_epoch=10**6).state_dict()["losses"] for device in ("cuda", "cpu")]
    found, want = ([*s["learner"]["agent"]["transitions"].values()] for s in states)
    for a, b in zip(found[:-1], want[:-1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert states[0]["step"] == states[1]["step"] == 11


@pytest.mark.parametrize("background", [False, True])
def test_the_policy_acts_and_learns(background):
    balancer = steps("cuda", update_after=0, start_epoch=0, background=background)
    state = balancer.state_dict()["losses"]
    assert state["learner"]["updates"] > 0
    other = steps("cuda", update_after=0, start_epoch=0, background=background)
    assert torch.equal(other.state_dict()["losses"]["last"][1], state["last"][1])
    other.load_state_dict(balancer.state_dict())  # which moves it to the GPU and back


def test_a_step_does_not_wait_for_itself(cuda_backend):
    p = torch.ones(2, device="cuda", requires_grad=True)
    rule = igb.IGBv2(base_losses=[1.0, 2.0], steps_per_epoch=1, start_epoch=0, hidden=(16,), seed=0)
    balancer = igb.Balancer(rule, shared=[p], backend=cuda_backend)
    for seed in range(6):
        if seed == 3:
            torch.cuda.set_sync_debug_mode("error")
        try:
            balancer.backward(list(p.square()))
        finally:
            if seed == 5:
                torch.cuda.set_sync_debug_mode("default")
