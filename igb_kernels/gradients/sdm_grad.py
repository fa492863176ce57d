"""SDMGrad: stochastic direction-oriented weights."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import project_on_simplex
from igb_kernels.gradients._shares import SharesOfOne
from igb_kernels.gradients.base import Needs, check_number
from igb_kernels.status import Status


class SDMGrad(SharesOfOne):
    """Min-norm weights near equal ones, from batches whose noise is independent (Xiao et al., NeurIPS 2023).

    On w, which is kept between steps, `iterations` steps of projected gradient descent with momentum follow
    A (w + lam/K) with A = J₁J₂ᵀ of two further batches, in units of the squared mean norm; the update is that of the
    batch itself with weights (w + lam/K) / (1 + lam) (algorithm 1)::

        balancer.backward(losses, independent=[losses_of_second_batch, losses_of_third_batch])

    With one independent batch, A is that of the batch and the other one; without any, A is the batch's own Gramian,
    whose noise biases the weights.

    Args:
        lam: how strongly the update keeps to the mean gradient.
        lr: step of the descent (LibMTL: 5, TorchJD: 10).
        momentum, iterations: of the descent.
        eps: added to the squared mean norm; LibMTL and TorchJD add 1e-8, which slows the descent for small gradients.
    """

    name = "sdm_grad"
    crosses = True
    card = Card(
        title="SDMGrad",
        paper="Xiao et al., NeurIPS 2023",
        formula="(w + lam/K) / (1 + lam), w by projected descent on J₁J₂ᵀ",
        inputs="cross-Gramian of two batches, or the Gramian",
        memory="2K gradients (with independent batches), or K",
        passes="2K + 2 (three batches), 2K (two) or K",
        degree=1.0,
        hazards="chaotic: the descent's last steps amplify rounding; lr and iterations decide as much as the objective",
        parity="lr=5, eps=1e-8: LibMTL; lr=10, eps=1e-8: TorchJD",
    )

    def __init__(
        self, lam: float = 0.3, lr: float = 5.0, momentum: float = 0.5, iterations: int = 20, *, eps: float = 0.0
    ) -> None:
        super().__init__()
        self.lam, self.lr = check_number("lam", lam, 0), check_number("lr", lr, 0)
        self.momentum = check_number("momentum", momentum, 0, 1)
        if not isinstance(iterations, int) or iterations < 1:
            raise ValueError(f"iterations must be an integer of at least 1, found {iterations!r}")
        self.iterations, self.eps = iterations, check_number("eps", eps, 0)

    def options(self) -> dict[str, float]:
        return {
            "lam": self.lam,
            "lr": self.lr,
            "momentum": self.momentum,
            "iterations": float(self.iterations),
            "eps": self.eps,
        }

    def needs(self) -> Needs:
        return Needs.GRAM


@ops.register_solver(
    "sdm_grad",
    options={"lam": 0.3, "lr": 5.0, "momentum": 0.5, "iterations": 20.0, "eps": 0.0},
    needs_gram=True,
    initial_state=lambda tasks, options: [1 / tasks] * tasks,
)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    options, w = problem.options, problem.state
    assert w is not None  # checked by the op
    scale = float(problem.gram.diagonal().clamp_min(0).sqrt().mean() ** 2 + options["eps"])
    cross = problem.gram / (scale or 1.0)
    pull = options["lam"] / len(w)
    velocity = torch.zeros_like(w)
    for _ in range(int(options["iterations"])):
        velocity = options["momentum"] * velocity + cross @ (w + pull)
        w.copy_(project_on_simplex(w - options["lr"] * velocity))
    return (w + pull) / (1 + options["lam"]), Status(0)
