"""Hugging Face Accelerate: `backward(accelerator, balancer, losses)` for `accelerator.backward(sum(losses))`."""

from __future__ import annotations

from typing import Any

from igb_kernels.balancer import Balancer
from igb_kernels.capture import Losses
from igb_kernels.integrations import _trainers
from igb_kernels.result import BalanceResult

try:
    from accelerate import Accelerator
    from accelerate.utils import DistributedType
except ModuleNotFoundError as error:
    error.msg += ": igb_kernels.integrations.accelerate needs Accelerate, pip install accelerate"
    raise


def backward(
    accelerator: Accelerator,
    balancer: Balancer,
    losses: Losses,
    *,
    decide_per: str = "step",
    **options: Any,
) -> BalanceResult | None:
    """The balanced step's backward passes, with the accelerator's GradScaler and gradient accumulation::

        accelerator.register_for_checkpointing(balancer)
        for batch in loader:
            with accelerator.accumulate(model):
                backward(accelerator, balancer, model.losses(batch))
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()

    Args:
        losses, options: as for `Balancer.backward`; as for `accelerator.backward`, the losses of a micro-batch are not
            divided by the number of micro-batches.
        decide_per: with gradient_accumulation_steps, "step" makes one decision for all of a step's micro-batches, as
            for one big batch, and keeps K gradients between them; "micro_batch" takes the mean of a decision for each.

    Returns:
        As `Balancer.backward`; None for a micro-batch whose step is decided later.

    Raises:
        RuntimeError: with several processes, DeepSpeed and the like.
        ValueError, TypeError: as `Balancer.backward`.
    """
    check_one_process(accelerator)
    return _trainers.backward(
        balancer,
        losses,
        decide_per=decide_per,
        micro_batches=accelerator.gradient_accumulation_steps,
        last=accelerator.sync_gradients,
        scaler=accelerator.scaler,
        **options,
    )


def check_one_process(accelerator: Accelerator) -> None:
    """RuntimeError where gradients would be averaged between processes, or belong to another engine."""
    if accelerator.distributed_type != DistributedType.NO:
        raise RuntimeError(
            f"balancing needs one process without a distributed engine; found {accelerator.distributed_type} with "
            f"{accelerator.num_processes} processes"
        )
