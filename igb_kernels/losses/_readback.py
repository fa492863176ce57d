"""Numbers that a step leaves for the host."""

from __future__ import annotations

import torch
from torch import Tensor


class Readback:
    """Brings the numbers of one step to the host, where they are read during the next.

    From a GPU they are copied to pinned memory when the step ends, and that copy alone is waited for: not for the
    forward pass that has been put on the GPU since.
    """

    def __init__(self) -> None:
        self._unread: Tensor | None = None
        self._pinned: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def put(self, numbers: Tensor) -> None:
        """A step has ended and leaves these; what it left before must have been taken."""
        assert self._unread is None
        if numbers.device.type == "cuda":
            if self._pinned is None or self._pinned.shape != numbers.shape:
                self._pinned = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            assert self._copied is not None
            with torch.cuda.device(numbers.device):
                numbers = self._pinned.copy_(numbers, non_blocking=True)
                self._copied.record()
        self._unread = numbers

    def take(self) -> Tensor | None:
        """The numbers on the CPU, once; None where there are none."""
        numbers, self._unread = self._unread, None
        if numbers is None:
            return None
        if numbers is self._pinned and self._copied is not None:
            self._copied.synchronize()
            return numbers.clone()
        return numbers.cpu()
