"""PyTorch Lightning: a LightningModule whose `training_step` returns `self.balance(losses)`.

`balance` hands Lightning the sum of the losses to look at, and the module's `backward` hook, which automatic
optimization calls for it, runs the balanced passes. So everything else stays Lightning's own: clipping, gradient
accumulation, precision, learning-rate schedulers, callbacks. Manual optimization works by
`self.manual_backward(self.balance(losses))`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from torch import Tensor

from igb_kernels._compile import uncompiled
from igb_kernels._log import warn_once
from igb_kernels.balancer import Balancer
from igb_kernels.capture import Losses
from igb_kernels.integrations import _trainers
from igb_kernels.result import BalanceResult

if not any(importlib.util.find_spec(name) for name in ("lightning", "pytorch_lightning")):
    raise ModuleNotFoundError("igb_kernels.integrations.lightning needs Lightning: pip install lightning")

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule as Module
else:
    Module = object  # `lightning` and `pytorch_lightning` each have a LightningModule: the user's class brings its own

KEY = "igb_kernels"
"""Of the balancer's state in checkpoints."""


class BalancedModule(Module):
    """In front of a LightningModule, trains it with `self.balancer`::

        class Net(BalancedModule, lightning.LightningModule):
            def __init__(self):
                super().__init__()
                self.encoder, self.heads = ...
                self.balancer = igb_kernels.Balancer("igb_v1+db_mtl", shared=self.encoder)

            def training_step(self, batch, batch_idx):
                return self.balance({"depth": ..., "normals": ...})

            def configure_optimizers(self):
                return torch.optim.Adam(self.parameters())  # and *self.balancer.param_groups(), if it learns weights

    The GradScaler of precision="16-mixed", `accumulate_grad_batches` and `gradient_clip_val` are respected; the
    balancer's state is in checkpoints, and `end_epoch` is called. Steps after the optimizer's are for the module's
    `on_train_batch_end` (FAMO: `self.balancer.after_step(...)`).

    Raises:
        TypeError: for a class that has LightningModule first.
        RuntimeError: at the start of a training with several processes.
        ValueError: at the start, where the shared parameters are not the module's, or learned ones in no optimizer;
            in a step, for losses that cannot be balanced, or where `training_step` returns others than `balance` gave.
    """

    balancer: Balancer
    decide_per: str = "step"
    """With accumulate_grad_batches: "step" makes one decision for all of a step's micro-batches, as for one big batch,
    and keeps K gradients between them; "micro_batch" takes the mean of a decision for each."""
    log_balance: bool = True
    """Whether the tasks' losses, and weights on them, are logged: as "task_loss/..." and "task_weight/..."."""
    balance_result: BalanceResult | None = None
    """What the last decision was."""
    _balancing: tuple[Losses, dict[str, Any]] | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = [base.__name__ for base in cls.__mro__]
        if "LightningModule" in order[: order.index("BalancedModule")]:
            raise TypeError(f"{cls.__name__} must name BalancedModule before LightningModule among its bases")

    @uncompiled
    def balance(self, losses: Losses, **options: Any) -> Tensor:
        """Takes a step's K losses, and returns what `training_step` returns: their sum, without a graph.

        Args:
            losses, options: as for `Balancer.backward`; the scaler is the trainer's.
        """
        if not isinstance(getattr(self, "balancer", None), Balancer):
            raise ValueError(f"{type(self).__name__}.balancer must be an igb_kernels.Balancer: set it in __init__")
        self._balancing = losses, options
        return _trainers.total(losses)

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: runs the balanced passes in place of `loss.backward()`."""
        given, self._balancing = self._balancing, None
        if given is None and not self.automatic_optimization:
            super().backward(loss, *args, **kwargs)
            return
        if given is None or loss.requires_grad:
            found = "another loss" if given is None else "that and further terms that require grad"
            raise ValueError(f"training_step must return self.balance(losses), found {found}; each term is a task")
        trainer = self.trainer
        self._progress.before_backward(self.balancer, trainer.current_epoch)
        self.balance_result = _trainers.backward(
            self.balancer,
            given[0],
            decide_per=self.decide_per,
            micro_batches=trainer.accumulate_grad_batches,
            last=not trainer.fit_loop._should_accumulate(),
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **given[1],
            **kwargs,
        )
        self._progress.after_backward(self.balance_result, trainer.current_epoch)

    @property
    def _progress(self) -> _trainers.Progress:
        """Made when first asked for: a mixin's `__init__` may never be called."""
        progress: _trainers.Progress = self.__dict__.setdefault("_balance_progress", _trainers.Progress())
        return progress

    def configure_callbacks(self) -> Any:
        """Lightning's hook: adds what keeps the balancer in step with the trainer."""
        callbacks = super().configure_callbacks()
        return [*(callbacks if isinstance(callbacks, list | tuple) else [callbacks]), _callback_class(self)()]


def _callback_class(module: BalancedModule) -> Any:
    """Of a callback in the package that the module's LightningModule is from.

    The module's own hooks would be lost in classes that override them without a call of super, as most do.
    """
    home = next(base.__module__ for base in type(module).__mro__ if base.__name__ == "LightningModule")
    return _callback_class_in(home.partition(".core")[0])


@functools.cache  # a trainer's second fit replaces callbacks of the same class
def _callback_class_in(home: str) -> Any:
    package: Any = importlib.import_module(home)

    class Balancing(package.Callback):
        """Checkpoints, checks and logs for the module's balancer."""

        def __init__(self) -> None:
            self._loaded: dict[str, Any] | None = None

        def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
            if stage != "fit":
                return
            if not isinstance(trainer.strategy, package.strategies.SingleDeviceStrategy):
                raise RuntimeError(
                    f"balancing needs one process and one device: Trainer(devices=1) without a strategy; found "
                    f"{type(trainer.strategy).__name__} with {trainer.world_size} processes"
                )
            if isinstance(balancer := getattr(pl_module, "balancer", None), Balancer):
                _trainers.move_parameters(balancer, trainer.strategy.root_device)

        def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            if isinstance(balancer := getattr(pl_module, "balancer", None), Balancer):
                checkpoint[KEY] = self._loaded or pl_module._progress.saved(balancer)

        def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
            if KEY not in checkpoint:
                warn_once("the checkpoint has no balancer's state: the balancer goes on with what it has")
            self._loaded = checkpoint.get(KEY)

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            _trainers.checked_decision(pl_module.decide_per)
            if not isinstance(balancer := getattr(pl_module, "balancer", None), Balancer):
                return  # `balance` says so
            _trainers.check_model(balancer, pl_module)
            _trainers.check_optimized(balancer, trainer.optimizers)
            pl_module._progress.start(balancer)
            if self._loaded is not None:  # not before the model has come to its device
                pl_module._progress.restore(self._loaded, balancer)
                self._loaded = None

        def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
            result = pl_module.balance_result
            if result is None or not (pl_module.log_balance and trainer._logger_connector.should_update_logs):
                return
            for kind, values in (("task_loss", result.losses), ("task_weight", result.total_weights)):
                pl_module.log_dict({f"{kind}/{name}": values[k] for k, name in _trainers.tasks_of(result)})

        def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
            if waiting := pl_module._progress.waiting:
                raise RuntimeError(
                    "training_step returned None for the last micro-batch of a step, and the decision on the "
                    f'{waiting} before it comes with the last; decide_per = "micro_batch" decides on each'
                )

    return Balancing
