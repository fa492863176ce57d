"""Hugging Face's Trainer for models that return several losses."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from igb_kernels._log import warn_once
from igb_kernels.balancer import Balancer
from igb_kernels.capture import Losses
from igb_kernels.integrations import _trainers
from igb_kernels.losses import LossBalancer

try:
    from accelerate.utils.memory import clear_device_cache
    from transformers import Trainer
except ModuleNotFoundError as error:
    error.msg += ": igb_kernels.integrations.huggingface needs pip install transformers accelerate"
    raise

from igb_kernels.integrations.accelerate import check_one_process

FILE = "balancer.pt"
"""The balancer's state in a checkpoint's folder."""


class BalancedTrainer(Trainer):
    """A Trainer that balances the K `losses` of the model's output, a dict or a list beside its `loss`, if any::

        trainer = BalancedTrainer(
            model, args, train_dataset=..., balancer=igb_kernels.Balancer("igb_v1+db_mtl", shared=model.encoder)
        )
        trainer.train()

    Models that return no losses: override `compute_losses`. Gradient accumulation, mixed precision, clipping and
    schedulers are the Trainer's. Learned weights become a group of the optimizer that it makes; the tasks' mean losses
    and weights are logged with its loss, as "task_loss/..." and "task_weight/..."; checkpoints hold the balancer's
    state, and `end_epoch` is called. Evaluation reports the model's `loss`, or else the sum of its losses.

    Args:
        balancer: a Balancer, or a function that makes one from the model (needed with `model_init`).
        decide_per: with gradient_accumulation_steps, "step" makes one decision for all of a step's micro-batches, as
            for one big batch, and keeps K gradients between them; "micro_batch" takes the mean of a decision for each.
        args, kwargs: the Trainer's.

    Raises:
        RuntimeError: with several processes or GPUs.
        ValueError, TypeError: for shared parameters of another model, and for what goes with one loss alone: label
            smoothing, `compute_loss_func`, optimizers that step within the backward pass, FAMO (it needs losses after
            the step). In training, as `Balancer.backward`.
    """

    def __init__(
        self, *args: Any, balancer: Balancer | Callable[[nn.Module], Balancer], decide_per: str = "step", **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.decide_per = _trainers.checked_decision(decide_per)
        if not (isinstance(balancer, Balancer) or callable(balancer)):
            raise TypeError(f"balancer must be a Balancer, or a function of the model, found {balancer!r}")
        if isinstance(balancer, Balancer) and self.model_init is not None:
            raise ValueError("balancer must be a function of the model where model_init makes a new one to train")
        self._make_balancer, self._balanced_model, self._stepped = balancer, None, True
        self._use_balancer()
        check_one_process(self.accelerator)
        if self.args.n_gpu > 1:
            raise RuntimeError(f"balancing needs one GPU, found {self.args.n_gpu}: set CUDA_VISIBLE_DEVICES to one")
        if self.label_smoother is not None or self.compute_loss_func is not None:
            raise ValueError("label_smoothing_factor and compute_loss_func must stay out: override compute_losses")
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optim or "layerwise" in optim:
            raise ValueError(f"optim must step after all backward passes, {optim!r} does within them")
        if type(self.balancer.losses).after_step is not LossBalancer.after_step:
            raise ValueError(f"{self.balancer.losses!r} needs the losses after each step, which the Trainer has not")

    def _use_balancer(self) -> None:
        """Has `balancer` be that of the present model, which `model_init` may have made anew."""
        if self._balanced_model is not self.model:
            made = self._make_balancer
            self.balancer: Balancer = made if isinstance(made, Balancer) else made(self.model)
            _trainers.check_model(self.balancer, self.model)
            self._balanced_model, self._progress, self._means = self.model, _trainers.Progress(), _trainers.Means()
        _trainers.move_parameters(self.balancer, self.args.device)

    # ---- Losses ----

    def compute_losses(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> tuple[Losses, Any]:
        """The K losses and the model's output, from which these are taken by default.

        Args:
            num_items_in_batch: the labels in all micro-batches of the step, if the Trainer has counted them: losses
                are then sums over the micro-batch, divided by it.
        """
        if self.model_accepts_loss_kwargs and num_items_in_batch is not None:
            inputs = {**inputs, "num_items_in_batch": num_items_in_batch}
        outputs = model(**inputs)
        losses = outputs.get("losses") if isinstance(outputs, Mapping) else getattr(outputs, "losses", None)
        if losses is None:
            found = list(outputs) if isinstance(outputs, Mapping) else type(outputs).__name__
            raise ValueError(f"the model must return `losses`, or compute_losses be overridden; found {found}")
        return losses, outputs

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Trainer's hook, for evaluation: the model's own `loss`, or else the sum of its losses."""
        losses, outputs = self.compute_losses(model, inputs, num_items_in_batch)
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else None
        loss = _trainers.total(losses) if loss is None else loss
        return (loss, outputs) if return_outputs else loss

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Trainer's hook: `losses` are no predictions."""
        if ignore_keys is None:
            config = getattr(self.model, "config", None)
            ignore_keys = getattr(config, "keys_to_ignore_at_inference", ["past_key_values"] if config else [])
        return super().prediction_step(model, inputs, prediction_loss_only, [*ignore_keys, "losses"])

    # ---- Training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Trainer's."""
        self._progress.start(self.balancer)
        return super().train(*args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        """Trainer's hook: learned weights are optimized, too."""
        self._use_balancer()
        is_new = self.optimizer is None
        optimizer: torch.optim.Optimizer = super().create_optimizer(*args, **kwargs)
        for group in self.balancer.param_groups() if is_new else ():
            optimizer.add_param_group({"weight_decay": 0.0, **group})
        _trainers.check_optimized(self.balancer, [optimizer])
        return optimizer

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Trainer's hook: a micro-batch's forward and balanced backward passes."""
        model.train()
        if callable(getattr(self.optimizer, "train", None)):
            self.optimizer.train()
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            losses, _ = self.compute_losses(model, inputs, num_items_in_batch)
        every = self.args.torch_empty_cache_steps
        if every is not None and self.state.global_step % every == 0:
            clear_device_cache()
        are_shares = getattr(self, "loss_is_scaled_for_ga", None)
        if are_shares is None:
            are_shares = self.model_accepts_loss_kwargs and num_items_in_batch is not None
        micro_batches = getattr(self, "current_gradient_accumulation_steps", self.args.gradient_accumulation_steps)
        if self._stepped:
            for p in self.balancer.parameters():  # the Trainer knows the model's alone
                p.grad = None
        epoch = int(self.state.epoch or 0)
        self._progress.before_backward(self.balancer, epoch)
        result = _trainers.backward(
            self.balancer,
            losses,
            decide_per=self.decide_per,
            micro_batches=micro_batches,
            last=self.accelerator.sync_gradients,
            are_shares=are_shares,
            scaler=self.accelerator.scaler,
        )
        self._progress.after_backward(result, epoch)
        self._stepped = self.accelerator.sync_gradients
        if result is not None:
            self._means.add(result)
        return _trainers.total(losses) / (1 if are_shares else micro_batches)

    # ---- Logs and checkpoints ----

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Trainer's hook: where the loss is logged, so are the tasks'."""
        super().log({**logs, **self._means.take()} if "loss" in logs else logs, *args, **kwargs)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        torch.save(self._progress.saved(self.balancer), os.path.join(output_dir, FILE))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if not os.path.isfile(path := os.path.join(checkpoint, FILE)):
            warn_once(f"{checkpoint} has no {FILE}: the balancer goes on with what it has")
            return
        self._progress.restore(torch.load(path, map_location="cpu", weights_only=True), self.balancer)
