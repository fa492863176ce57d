"""Balanced steps over losses whose values are given, and over quadratics that are trained."""

from __future__ import annotations

import torch
from golden import linear_losses

from igb_kernels import Balancer


class Training:
    """A Balancer over two linear losses whose values each step are given."""

    def __init__(self, rule, backend, gradients="imtl_g"):
        self.rule = rule
        self.parameters = torch.zeros(3, dtype=torch.float64, requires_grad=True)
        methods = (rule,) if gradients is None else (gradients, rule)
        self.balancer = Balancer(*methods, shared=[self.parameters], backend=backend)

    def step(self, losses, rows=((1.0, 0.0, 2.0), (0.0, 3.0, 1.0))):
        rows, losses = (torch.as_tensor(v, dtype=torch.float64) for v in (rows, losses))
        return self.balancer.backward(linear_losses(self.parameters, rows, losses))

    def epoch(self, steps):
        results = [self.step(losses) for losses in steps]
        self.balancer.end_epoch()
        return results


class Quadratics:
    """Two tasks that pull the same parameters to different points, in units 50 apart; trained with Adam."""

    def __init__(self, rule, backend="cpu", gradients="equal"):
        self.parameters = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        self.balancer = Balancer(gradients, rule, shared=[self.parameters], backend=backend)
        groups = [{"params": [self.parameters], "lr": 0.02}, *self.balancer.param_groups()]
        self.optimizer = torch.optim.Adam(groups, lr=0.02)

    def losses(self):
        first, second = self.parameters
        return [50 * ((first - 1) ** 2 + second**2 + 0.1), (first + 1) ** 2 + (second - 1) ** 2 + 0.1]

    def train(self, steps):
        """Returns the results of all steps."""
        results = []
        for _ in range(steps):
            self.optimizer.zero_grad()
            results.append(self.balancer.backward(self.losses()))
            self.optimizer.step()
            with torch.no_grad():
                self.balancer.after_step(self.losses())
        return results
