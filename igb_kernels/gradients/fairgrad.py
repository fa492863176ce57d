"""FairGrad: α-fair gradient balancing."""

from __future__ import annotations

import torch
from torch import Tensor

from igb_kernels import ops
from igb_kernels.backends.reference import Problem
from igb_kernels.card import Card
from igb_kernels.gradients._reference import measure, unit_diagonal
from igb_kernels.gradients.base import GradientBalancer, check_number
from igb_kernels.status import Status


class FairGrad(GradientBalancer):
    """The w > 0 with G w = w^(−1/α) (Ban & Ji, ICML 2024, equation 5): α-fair shares of the tasks' descent g_k · d.

    α = 1 is Nash-MTL; as α goes to 0 the weights go to 1, and the larger it is, the more equal become the products
    g_k · d. The weights are unique and found exactly by Newton's method. Where a nonnegative combination of gradients
    vanishes there are none; a ridge then keeps them finite (status PARETO_STATIONARY).

    The update is not scale free: gradients multiplied by c multiply it by c^((1−α)/(1+α)), so with α > 1 it shrinks as
    the gradients grow.

    Args:
        alpha: α, at least 0. With α of 20 or more and gradients of very different norms the weights span hundreds of
            decades, and the iterations may not suffice (status ITERATION_CAP; the weights are finite).
        max_norm: the update's norm is clipped to this; 0: no clipping.
    """

    name = "fairgrad"
    card = Card(
        title="FairGrad",
        paper="Ban & Ji, ICML 2024, arXiv:2402.15638",
        formula="G w = w^(-1/alpha)",
        inputs="Gramian",
        memory="K gradients",
        passes="K",
        degree=0.0,
        hazards="the update's length depends on alpha: degree (1 - alpha) / (1 + alpha) in the gradients",
        parity="LibMTL and TorchJD do not clip; the official code multiplies by K and clips to 1 (alpha=1: max_norm=1)",
    )

    def __init__(self, alpha: float = 1.0, *, max_norm: float = 0.0) -> None:
        super().__init__()
        self.alpha = check_number("alpha", alpha, 0)
        self.max_norm = check_number("max_norm", max_norm, 0)

    def options(self) -> dict[str, float]:
        return {"alpha": self.alpha, "max_norm": self.max_norm}


RIDGE = 1e-10
"""The first ridge on the cosines where a nonnegative combination of gradients vanishes: no finite solution without."""


def _newton(cosines: Tensor, r: Tensor, p: float, ridge: float = 0.0) -> Tensor | None:
    """t > 0 with (C + ridge) t = r (t/r)^−p: Newton's method on p log(t/r) + log(q/r) = 0 and q = (C + ridge) t.

    Both t and q stay positive, as in a primal-dual interior-point method. None if t grows without bound.
    """
    k = len(cosines)
    matrix = cosines + ridge * torch.eye(k, dtype=torch.float64)
    t = r * (r.square().sum() / torch.clamp(r @ matrix @ r, min=0.1 * float(r.square().sum()))) ** (1 / (1 + p))
    q = r * (t / r) ** -p
    best, smallest, stalled = t, float("inf"), 0
    for _ in range(500):
        misfit = q * (t / r) ** p / r  # 1 at the solution
        infeasible = q - matrix @ t
        product = matrix @ t * (t / r) ** p / r
        residual = float((product - 1).abs().max())
        if residual < smallest:
            best, smallest, stalled = t, residual, 0
        else:
            stalled += 1
        if smallest <= 1e-14 or (stalled > 20 and smallest < 1e-2):
            break
        # p dt/t + dq/q = −log misfit,  C dt − dq = infeasible
        held = p * q / t
        dt = torch.linalg.solve(matrix + torch.diag(held), infeasible - q * misfit.log())
        dq = matrix @ dt - infeasible
        lowest = float(torch.minimum(dt / t, dq / q).min())
        length = min(1.0, 0.9 / max(-lowest, 1e-300))
        t, q = t + length * dt, q + length * dq
        if not ridge:
            # Barrier terms above 1 would drown the small eigenvalues in rounding.
            barrier = (p * r * (t / r) ** -p / t).clamp_max(1)
            if float(torch.linalg.eigvalsh(matrix + torch.diag(barrier))[0]) < 2 * RIDGE:
                return None
    return best


@ops.register_solver("fairgrad", options={"alpha": 1.0, "max_norm": 0.0}, needs_gram=True)
def _reference(problem: Problem) -> tuple[Tensor, Status]:
    gram, alpha, max_norm = problem.gram, problem.options["alpha"], problem.options["max_norm"]
    tasks = measure(gram)
    status = tasks.status
    if not tasks.any:
        return torch.ones_like(tasks.norms), status
    norms = tasks.norms[tasks.active]
    lengths: Tensor | None = norms
    if alpha > 0:
        cosines, degree = unit_diagonal(gram, tasks), (1 - alpha) / (1 + alpha)
        r, ridge = (norms / norms.max()) ** degree, RIDGE
        lengths = _newton(cosines, r, 1 / alpha)
        if lengths is None:
            status |= Status.PARETO_STATIONARY
            while float(torch.linalg.eigvalsh(cosines)[0]) + ridge <= 0:
                ridge *= 1e3
            lengths = _newton(cosines, r, 1 / alpha, ridge)
        assert lengths is not None, "a ridge bounds them"
        lengths = lengths * norms.max() ** degree
    assert lengths is not None
    weights = tasks.spread(lengths / norms)
    norm = float((weights @ gram @ weights).clamp_min(0).sqrt())
    return (weights * (max_norm / norm) if 0 < max_norm < norm else weights), status
