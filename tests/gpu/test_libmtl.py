"""LibMTL's protocol on the GPU."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from integrations.libmtl_on_cpu import TASKS, losses_of, model_of

libmtl = pytest.importorskip("igb_kernels.integrations.libmtl")


@pytest.mark.parametrize("multi_input", [False, True], ids=["one input", "an input for each task"])
@pytest.mark.parametrize("rep_grad", [False, True], ids=["parameters", "representations"])
@pytest.mark.parametrize("name", ["EW", "UW", "IMTL", "MGDA", "Nash_MTL", "GradNorm", "ExcessMTL"])
def test_steps_are_those_of_the_cpu(name, rep_grad, multi_input):
    models = [
        model_of(libmtl.weighting(name), rep_grad=rep_grad, multi_input=multi_input, device=device)
        for device in ("cpu", "cuda")
    ]
    for seed in range(3):
        weights = []
        for model in models:
            model.zero_grad()
            weights.append(model.backward(losses_of(model, seed)))
        np.testing.assert_allclose(weights[1], weights[0], rtol=1e-3, atol=1e-5)
        for (key, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-3, atol=1e-4, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", ["DB_MTL", "IMTL", "Nash_MTL"])
def test_losses_put_into_a_tensor_wait_for_nothing(cuda_backend, name):
    """Below it, each task starts its own pass, and which elements were assigned is found without a look at numbers."""
    model = model_of(libmtl.weighting(name), device="cuda")
    model.backward(losses_of(model))
    runs = dict.fromkeys(TASKS, 0)
    for task in TASKS:
        hook = lambda *_, task=task: runs.__setitem__(task, runs[task] + 1)  # noqa: E731
        model.decoders[task].weight.register_post_accumulate_grad_hook(hook)
    losses = losses_of(model, 1)
    try:
        torch.cuda.set_sync_debug_mode("error")
        model.balancer.backward(losses)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert runs == dict.fromkeys(TASKS, 1)
