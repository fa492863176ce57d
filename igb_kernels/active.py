"""The tasks that take part in a step where some are missing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ActiveTasks:
    """A of K tasks. A step without the others is one of these alone; what belongs to the others stays as it is."""

    ids: tuple[int, ...]
    """Ascending, of 0 to K - 1."""
    index: Tensor
    """The same, int64 [A], where the step's numbers are."""
    tasks: int
    """K."""

    @classmethod
    def of(cls, ids: Iterable[int], tasks: int, device: torch.device) -> ActiveTasks:
        """Waits for nothing; but the copy to a GPU cannot be part of a CUDA graph."""
        ids = tuple(ids)
        index = torch.tensor(ids, device="cpu")
        if device.type == "cuda":
            index = index.pin_memory()  # from the caching allocator, which keeps it until the copy is done
        return cls(ids, index.to(device, non_blocking=True), tasks)

    def part(self, values: Tensor) -> Tensor:
        """Of numbers for K tasks [..., K], those for the active ones [..., A]."""
        return values.index_select(-1, self.index)

    def part_of_pairs(self, values: Tensor) -> Tensor:
        """Of numbers for pairs of tasks [K, K], those for pairs of active ones [A, A]."""
        return values.index_select(0, self.index).index_select(1, self.index)

    def put_(self, values: Tensor, part: Tensor) -> Tensor:
        """Writes numbers for the active tasks [..., A] to their places in `values` [..., K]."""
        return values.index_copy_(-1, self.index, part)

    def put_pairs_(self, values: Tensor, part: Tensor) -> Tensor:
        """As `put_`, for pairs of tasks: [A, A] in [K, K]."""
        return values.index_put_((self.index[:, None], self.index), part)

    def spread(self, part: Tensor, fill: float = 0.0) -> Tensor:
        """Numbers for the active tasks [A], or their pairs [A, A], as [K] or [K, K], with `fill` for the others."""
        whole = part.new_full((self.tasks,) * part.dim(), fill)
        return self.put_(whole, part) if part.dim() == 1 else self.put_pairs_(whole, part)
