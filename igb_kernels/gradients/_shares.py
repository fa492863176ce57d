"""What MoCo, MoDo and SDMGrad share: weights of sum 1 that are kept from step to step."""

from __future__ import annotations

from torch import Tensor

from igb_kernels import ops
from igb_kernels.active import ActiveTasks
from igb_kernels.gradients.base import GradientBalancer


class SharesOfOne(GradientBalancer):
    """A method whose state are, behind its head, K weights of sum 1.

    Where tasks are missing, the step's tasks share out anew what they have together: of the sum 1 in the step, of their
    own sum among all tasks.
    """

    def _part(self, state: Tensor, active: ActiveTasks) -> Tensor:
        part = super()._part(state, active)
        weights = part[self._head :]
        total = weights.sum()
        weights.copy_((weights / total).where(total > 0, 1 / len(weights)))
        return part

    def _widened(self, state: Tensor, part: Tensor, active: ActiveTasks) -> Tensor:
        total = active.part(state[self._head :]).sum()
        part = part.clone()
        part[self._head :] *= total
        return super()._widened(state, part, active)

    @property
    def _head(self) -> int:
        return ops.SOLVERS[self.name].state_head
