"""A LightningModule under the real Trainer, against the plain loop, to the bit."""

from __future__ import annotations

import importlib
import logging
import pathlib
from typing import Any

import pytest
import torch
from balancer.models import same

import igb_kernels as igb

from .training import (
    BATCHES,
    TASKS,
    Log,
    environment_kept,
    examples,
    losses_of,
    make_encoder_and_heads,
    plain_loop,
    uw_pcgrad,
    v1_db_mtl,
)

lightning = pytest.importorskip("lightning.pytorch")

from lightning.pytorch.plugins import MixedPrecision  # noqa: E402

from igb_kernels.integrations.lightning import BalancedModule  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def module_of(home: Any = lightning) -> type:
    class Net(BalancedModule, home.LightningModule):
        """Its own hooks do not call super, as most users' do not."""

        log_steps = False

        def __init__(self, make: Any = v1_db_mtl) -> None:
            super().__init__()
            self.encoder, self.heads = make_encoder_and_heads()
            self.seen = Log()
            if make is not None:
                self.balancer = self.seen.watch(make(self.encoder.parameters()))

        def losses(self, batch: Any) -> dict[str, torch.Tensor]:
            return losses_of(self.encoder, self.heads, *batch)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.balance(self.losses(batch))

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val", sum(self.losses(batch).values()))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD([{"params": self.parameters()}, *self.balancer.param_groups()], 0.05, 0.9)

        def on_train_start(self) -> None:
            pass

        def on_save_checkpoint(self, checkpoint: Any) -> None:
            pass

        def on_load_checkpoint(self, checkpoint: Any) -> None:
            pass

    return Net


Net = module_of()


def loader(size: int = 4) -> torch.utils.data.DataLoader:
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*examples()), size)


def fit(net: Any, data: Any = None, home: Any = lightning, ckpt_path: Any = None, **options: Any) -> list[object]:
    trainer = home.Trainer(**{"max_epochs": 3, **QUIET, **options})
    trainer.fit(net, data or loader(), ckpt_path=ckpt_path)
    return net.seen.of(net, net.balancer)


@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
@pytest.mark.parametrize("home", ["lightning.pytorch", "pytorch_lightning"])
def test_the_bits_of_the_plain_loop(make, home):
    home = importlib.import_module(home)
    assert same(fit(module_of(home)(make), home=home), plain_loop(make))


def test_options_of_backward_reach_it():
    class AtRepresentation(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            z = self.encoder(x)
            losses = {task: (head(z) - y[:, k]).square().mean() for k, (task, head) in enumerate(self.heads.items())}
            return self.balance(losses, representation=z)

    net, other = (kind(lambda shared: igb.Balancer("imtl_g", shared=shared)) for kind in (AtRepresentation, Net))
    fit(net, max_epochs=1)
    fit(other, max_epochs=1)
    first, at_parameters = net.seen.results[0], other.seen.results[0]
    assert same(first.losses, at_parameters.losses)
    assert not same(first.weights, at_parameters.weights)
    with pytest.raises(ValueError, match=r"\['representation'\] must stay out of micro-batches"):
        fit(net, accumulate_grad_batches=2)


@pytest.mark.parametrize("decide_per", ["step", "micro_batch"])
@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
def test_accumulate_grad_batches(make, decide_per):
    net = Net(make)
    net.decide_per = decide_per
    seen = fit(net, accumulate_grad_batches=2, gradient_clip_val=0.5)
    expected = plain_loop(make, micro_batches=2, divide_by=lambda count: 2, decide_per=decide_per, clip=0.5)
    assert same(seen, expected)


@pytest.mark.parametrize("micro_batches", [1, 2])
@pytest.mark.parametrize("precision", ["bf16-mixed", "16-mixed", "16-mixed overflow"])
def test_mixed_precision(precision, micro_batches):
    """An initial scale of 2^40 overflows, and steps are skipped until it does not."""
    scale = 2.0**40 if "overflow" in precision else 2.0**8
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3) for _ in range(2)]
    if precision == "bf16-mixed":
        seen = fit(Net(), precision=precision, accumulate_grad_batches=micro_batches, gradient_clip_val=0.5)
        half = {"autocast": torch.bfloat16}
    else:
        plugin = MixedPrecision("16-mixed", "cpu", scalers[0])
        seen = fit(Net(), plugins=[plugin], accumulate_grad_batches=micro_batches, gradient_clip_val=0.5)
        half = {"autocast": torch.float16, "scaler": scalers[1]}
    divide_by = {"micro_batches": micro_batches, "divide_by": lambda count: micro_batches}
    assert same(seen, plain_loop(v1_db_mtl, clip=0.5, **half, **divide_by))
    assert scalers[0].state_dict() == scalers[1].state_dict()


def test_a_scheduler_and_a_clip_by_value_are_lightnings_own():
    class Scheduled(Net):
        def configure_optimizers(self) -> Any:
            optimizer = super().configure_optimizers()
            return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1), "interval": "step"}]

    net = Scheduled()
    fit(net, max_epochs=1, gradient_clip_val=1e-3, gradient_clip_algorithm="value")
    assert net.trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.1**2)
    assert max(p.grad.abs().max() for p in net.parameters()) <= 1e-3


# ---- Checkpoints -------------------------------------------------------------------------------------------------


class StatefulLoader:
    """Goes on where it was, as plain DataLoaders do not."""

    def __init__(self) -> None:
        self.at = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Any:
        batches = list(loader())
        self.at %= BATCHES
        while self.at < BATCHES:
            self.at += 1
            yield batches[self.at - 1]

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
@pytest.mark.parametrize("when", ["mid-epoch", "validation", "epoch end", "last step"])
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(make, when, tmp_path: pathlib.Path):
    """IGBv1 counts epochs: one that is ended twice, or never, shows."""
    saver = lightning.callbacks.ModelCheckpoint(
        tmp_path,
        filename="{step}",
        save_top_k=-1,
        every_n_train_steps={"mid-epoch": 7, "last step": 5}.get(when),
        save_on_train_epoch_end={"epoch end": True, "validation": False}.get(when),
    )
    validate = loader() if when == "validation" else None
    whole, again = Net(make), Net(make)
    options = {**QUIET, "max_epochs": 4, "num_sanity_val_steps": 0}
    saving = {**options, "enable_checkpointing": True, "callbacks": [saver]}
    lightning.Trainer(**saving).fit(whole, StatefulLoader(), validate)
    at = 7 if when == "mid-epoch" else 5
    lightning.Trainer(**options).fit(again, StatefulLoader(), validate, ckpt_path=tmp_path / f"step={at}.ckpt")
    assert same(again.seen.of(again, again.balancer), whole.seen.of(whole, whole.balancer, at))


def test_a_checkpoint_without_a_balancer(tmp_path: pathlib.Path, caplog):
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert state.pop("igb_kernels")["balancer"]["tasks"] == 3
    torch.save(state, tmp_path / "b.ckpt")
    net = Net()
    with caplog.at_level("WARNING", logger="igb_kernels"):
        fit(net, ckpt_path=tmp_path / "b.ckpt", max_epochs=2)
    assert len(net.seen.results) == 5
    assert "no balancer's state" in caplog.text


def test_a_checkpoint_that_is_saved_before_the_first_step_holds_what_was_loaded(tmp_path: pathlib.Path):
    class Early(Net):
        def on_fit_start(self) -> None:
            self.trainer.save_checkpoint(tmp_path / "b.ckpt")

    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(Net(), loader())
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    fit(Early(), ckpt_path=tmp_path / "a.ckpt")
    first, second = (torch.load(tmp_path / name, weights_only=True)["igb_kernels"] for name in ("a.ckpt", "b.ckpt"))
    assert same(first, second)


def test_another_fit_is_another_epoch():
    """Of a new trainer, whose epochs count from 0 again."""

    class WithoutMomentum(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.05)

    net, once = (WithoutMomentum(lambda shared: igb.Balancer("igb_v1", shared=shared)) for _ in range(2))
    for _ in range(4):
        seen = fit(net, max_epochs=1)
    assert same(seen, fit(once, max_epochs=4))


def test_another_fit_of_one_trainer_has_one_callback():
    net = Net()
    trainer = lightning.Trainer(max_epochs=1, **QUIET)
    trainer.fit(net, loader())
    trainer.fit_loop.max_epochs = 3
    trainer.fit(net, loader())
    assert [type(callback).__name__ for callback in trainer.callbacks].count("Balancing") == 1


def test_a_training_that_was_interrupted_leaves_nothing_in_the_next():
    class Interrupted(Net):
        stop = True

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            if self.stop:
                raise ValueError("stop")

    net, fresh = Interrupted(), Interrupted()
    with pytest.raises(ValueError, match="stop"):
        fit(net, accumulate_grad_batches=2)
    net.stop = fresh.stop = False
    net.zero_grad()
    assert same(fit(net, accumulate_grad_batches=2), fit(fresh, accumulate_grad_batches=2))


# ---- Logs, manual optimization, compilation ----------------------------------------------------------------------


class ListLogger(lightning.loggers.Logger):
    name, version = "list", "0"

    def __init__(self) -> None:
        super().__init__()
        self.metrics: list[tuple[int, dict[str, float]]] = []

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.metrics.append((step, metrics))


def test_losses_and_weights_are_logged_where_lightning_logs():
    logger, net = ListLogger(), Net()
    fit(net, logger=logger, log_every_n_steps=3, max_epochs=2)
    fit(net, logger=False, log_every_n_steps=1, max_epochs=1)
    assert [step for step, _ in logger.metrics] == [2, 5, 8]
    for step, metrics in logger.metrics:
        result = net.seen.results[step]
        for k, task in enumerate(TASKS):
            assert metrics[f"task_loss/{task}"] == result.losses[k].item()
            assert metrics[f"task_weight/{task}"] == pytest.approx(result.total_weights[k].item(), rel=1e-6)


def test_logs_can_be_turned_off_and_know_no_missing_tasks():
    class OneAway(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            losses = self.losses(batch)
            del losses["normals"]
            return self.balance(losses)

    net = OneAway(lambda shared: igb.Balancer("imtl_g", shared=shared, tasks=TASKS))
    fit(net, log_every_n_steps=1)
    assert set(net.trainer.callback_metrics) == {
        f"task_{kind}/{t}" for t in ("depth", "edges") for kind in ("loss", "weight")
    }
    net.log_balance = False
    fit(net, log_every_n_steps=1)
    assert not net.trainer.callback_metrics


def test_manual_optimization_with_a_loss_that_is_not_balanced():
    class Manual(Net):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.critic = torch.nn.Linear(5, 1)

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer, critics = self.optimizers()
            critics.zero_grad()
            self.manual_backward(self.critic(self.encoder(batch[0]).detach()).square().mean())
            critics.step()
            optimizer.zero_grad()
            self.manual_backward(self.balance(self.losses(batch)))
            optimizer.step()

        def configure_optimizers(self) -> Any:
            params = [*self.encoder.parameters(), *self.heads.parameters()]
            return torch.optim.SGD(params, 0.05, 0.9), torch.optim.SGD(self.critic.parameters(), 0.1)

    net = Manual()
    before = net.critic.weight.detach().clone()
    seen, plain = fit(net), plain_loop(v1_db_mtl)
    assert same(seen[:-1], plain[:-1])
    assert same(seen[-1][: len(plain[-1])], plain[-1])
    assert not same(before, net.critic.weight.detach())


def test_a_compiled_module():
    net = Net()
    lightning.Trainer(max_epochs=1, **QUIET).fit(torch.compile(net, backend="eager"), loader())
    torch.testing.assert_close(
        [r.losses for r in net.seen.results], [step[0] for step in plain_loop(v1_db_mtl, epochs=1)[:-1]]
    )


# ---- What does not go ---------------------------------------------------------------------------------------------


def returning(change: Any) -> Any:
    class Wrong(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return change(self, self.losses(batch), batch_idx)

    return Wrong()


WRONG = {
    "another loss": (lambda net, losses, i: sum(losses.values()), "must return self.balance.* found another loss"),
    "an addition": (
        lambda net, losses, i: net.balance(losses) + net.heads["depth"].weight.square().sum(),
        "found that and further terms",
    ),
    "one scalar": (lambda net, losses, i: net.balance(sum(losses.values())), "losses must be a 1-D tensor"),
    "a number": (lambda net, losses, i: net.balance({**losses, "edges": 1.0}), r"losses\['edges'\] must be a tensor"),
    "no loss": (lambda net, losses, i: net.balance([]), "losses must hold at least one loss"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_training_step_must_not_return(case):
    change, message = WRONG[case]
    with pytest.raises((ValueError, TypeError), match=message):
        fit(returning(change))


def test_the_last_micro_batch_cannot_be_left_out():
    def skip(net: Any, losses: Any, i: int) -> Any:
        return None if i % 2 else net.balance(losses)

    with pytest.raises(RuntimeError, match="None for the last micro-batch"):
        fit(returning(skip), accumulate_grad_batches=2)
    net = returning(skip)
    net.decide_per = "micro_batch"
    fit(net, accumulate_grad_batches=2)
    fit(returning(skip))


def test_a_balancer_must_be_there():
    net = Net(None)
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"Net\.balancer must be an igb_kernels\.Balancer"):
        fit(net)


def test_parameters_must_be_the_modules_own():
    net = Net()
    net.balancer = v1_db_mtl(make_encoder_and_heads()[0].parameters())
    with pytest.raises(ValueError, match="found 4 of 4 that are not"):
        fit(net)


def test_learned_parameters_must_be_optimized():
    net = Net(uw_pcgrad)
    net.configure_optimizers = lambda: torch.optim.SGD(net.parameters(), 0.1)
    with pytest.raises(ValueError, match=r"\*balancer\.param_groups\(\)"):
        fit(net)


def test_decide_per_is_one_of_two():
    net = Net()
    net.decide_per = "epoch"
    with pytest.raises(ValueError, match="decide_per must be one of"):
        fit(net)


def test_the_mixin_comes_first():
    with pytest.raises(TypeError, match="BalancedModule before LightningModule"):

        class Wrong(lightning.LightningModule, BalancedModule):
            pass


def test_several_processes_are_refused():
    with environment_kept(), pytest.raises(RuntimeError, match=r"one process and one device.*DDPStrategy"):
        fit(Net(), strategy="ddp", devices=1)
