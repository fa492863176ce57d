"""A small BERT with two heads under the real Trainer, against the plain loop, to the bit."""

from __future__ import annotations

import contextlib
import gc
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from balancer.models import same
from torch import Tensor, nn
from torch.nn import functional as F

import igb_kernels as igb

from .training import TORCHRUN, Log, environment_kept, v1_db_mtl

transformers = pytest.importorskip("transformers")

from accelerate.state import AcceleratorState, GradientState  # noqa: E402

from igb_kernels.integrations.huggingface import BalancedTrainer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")

EPOCHS, EXAMPLES, SIZE = 3, 10, 2


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """Accelerators share their state within a process, and older TrainingArguments leave the precision behind."""
    with environment_kept():
        yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> Iterator[None]:
    """Each training collects garbage, in seconds where all that was imported is looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


def uw_pcgrad(shared: Any) -> igb.Balancer:
    return igb.Balancer(igb.PCGrad(seed=3), losses=igb.UW(num_tasks=2), shared=shared)


class TwoHeads(transformers.PreTrainedModel):
    """Classifies tokens and scores texts."""

    config_class = transformers.BertConfig
    with_loss = with_hidden = False

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.bert = transformers.BertModel(config, add_pooling_layer=False)
        self.tag, self.score = nn.Linear(8, 3), nn.Linear(8, 1)
        self.post_init()

    def forward(self, input_ids: Tensor, labels: Tensor | None = None, scores: Tensor | None = None) -> dict[str, Any]:
        return self.run(input_ids, labels, scores, lambda loss, count: loss / count)

    def run(self, input_ids: Tensor, labels: Tensor, scores: Tensor, mean: Any) -> dict[str, Any]:
        z = self.bert(input_ids).last_hidden_state
        tags, score = self.tag(z), self.score(z[:, 0])[:, 0]
        outputs = {"logits": tags, "score": score}
        if self.with_hidden:
            outputs["hidden"] = z
        if labels is not None:
            tagging = F.cross_entropy(tags.flatten(0, 1), labels.flatten(), reduction="sum")
            scoring = 5 * F.mse_loss(score, scores, reduction="sum")
            outputs["losses"] = {"tag": mean(tagging, labels.numel()), "score": mean(scoring, len(scores))}
            if self.with_loss:
                outputs["loss"] = 2 * outputs["losses"]["tag"]
        return outputs


class OfAllItems(TwoHeads):
    """Takes the Trainer's count of labels, as causal language models do."""

    def forward(
        self, input_ids: Tensor, labels: Tensor | None = None, scores: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        count = kwargs.get("num_items_in_batch")
        return self.run(input_ids, labels, scores, lambda loss, own: loss / (own if count is None else count))


def make_model(kind: type = TwoHeads, dropout: float = 0.0) -> TwoHeads:
    torch.manual_seed(0)
    return kind(
        transformers.BertConfig(
            vocab_size=11,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
            hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout,
        )
    )


def data() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 11, (EXAMPLES, 4), generator=generator)
    scores = torch.randn(EXAMPLES, generator=generator)
    return [{"input_ids": t, "labels": t % 3, "scores": s} for t, s in zip(tokens, scores, strict=True)]


class Run:
    """A trainer, and the batches that it takes."""

    def __init__(
        self,
        folder: pathlib.Path,
        make: Callable[..., igb.Balancer] = v1_db_mtl,
        model: Any = None,
        trainer: type = BalancedTrainer,
        decide_per: str = "step",
        scaler: torch.amp.GradScaler | None = None,
        init: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        self.log, self.batches = Log(), []
        self.model = make_model() if model is None else model
        self.balancer = self.log.watch(make(self.model.bert.parameters()))
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": str(folder),
                "use_cpu": True,
                "report_to": [],
                "disable_tqdm": True,
                "log_level": "error",
                "save_strategy": "no",
                "num_train_epochs": EPOCHS,
                "per_device_train_batch_size": SIZE,
                "learning_rate": 0.05,
                "lr_scheduler_type": "constant",
                "optim": "adamw_torch",
                "remove_unused_columns": False,
                **options,
            }
        )
        self.trainer = trainer(
            model=self.model,
            args=arguments,
            train_dataset=data(),
            eval_dataset=data()[:4],
            data_collator=self.collate,
            balancer=self.balancer,
            decide_per=decide_per,
            **(init or {}),
        )
        self.trainer.pop_callback(transformers.PrinterCallback)
        if scaler is not None:  # what Accelerate sets itself, but on CPUs
            self.trainer.accelerator.scaler, self.trainer.accelerator.native_amp = scaler, True
            self.trainer.accelerator.state._mixed_precision = "fp16"

    def collate(self, features: list[dict[str, Any]]) -> dict[str, Tensor]:
        self.batches.append({name: torch.stack([f[name] for f in features]) for name in features[0]})
        return dict(self.batches[-1])

    def train(self, **options: Any) -> list[object]:
        self.trainer.train(**options)
        return self.log.of(self.model, self.balancer)


def plain_loop(
    batches: list[dict[str, Tensor]],
    make: Callable[..., igb.Balancer] = v1_db_mtl,
    *,
    micro_batches: int = 1,
    decide_per: str = "step",
    autocast: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    representation: bool = False,
) -> list[object]:
    """The same training without a Trainer."""
    model, log = make_model(), Log()
    model.with_hidden = representation
    balancer = log.watch(make(model.bert.parameters()))
    optimizer = torch.optim.AdamW([{"params": model.parameters()}, *balancer.param_groups()], 0.05, weight_decay=0.0)
    of_epoch = EXAMPLES // SIZE
    for epoch in range(EPOCHS):
        if epoch:
            balancer.end_epoch()
        left = batches[epoch * of_epoch : (epoch + 1) * of_epoch]
        while left:
            window, left = left[:micro_batches], left[micro_batches:]
            for i, batch in enumerate(window):
                with torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext():
                    outputs = model(**batch)
                losses, at = outputs["losses"], {"representation": outputs["hidden"]} if representation else {}
                if decide_per == "step":
                    step = balancer.backward if i == len(window) - 1 else balancer.accumulate
                    step({task: loss / len(window) for task, loss in losses.items()}, scaler=scaler, **at)
                else:
                    balancer.backward(losses, scaler=scaler)
            if decide_per != "step":
                for p in [*model.parameters(), *balancer.parameters()]:
                    p.grad = None if p.grad is None else p.grad / len(window)
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            optimizer.zero_grad()
    return log.of(model, balancer)


@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
def test_the_bits_of_the_plain_loop(make, tmp_path):
    run = Run(tmp_path, make)
    assert same(run.train(), plain_loop(run.batches, make))


@pytest.mark.parametrize("decide_per", ["step", "micro_batch"])
@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
def test_gradient_accumulation(make, decide_per, tmp_path):
    run = Run(tmp_path, make, decide_per=decide_per, gradient_accumulation_steps=2)
    assert same(run.train(), plain_loop(run.batches, make, micro_batches=2, decide_per=decide_per))


@pytest.mark.parametrize(("steps", "scale"), [(1, 2.0**24), (2, 2.0**24), (2, 2.0**8)])
def test_a_scaler(steps, scale, tmp_path):
    """2^24 overflows, so that steps are skipped."""
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3) for _ in range(2)]
    run = Run(tmp_path, scaler=scalers[0], gradient_accumulation_steps=steps)
    seen = run.train()
    half = {"autocast": torch.float16, "scaler": scalers[1]}
    assert same(seen, plain_loop(run.batches, micro_batches=steps, **half))
    assert scalers[0].state_dict() == scalers[1].state_dict()
    assert (scalers[0].get_scale() < scale) == (scale > 2**20)


def test_bfloat16(tmp_path):
    run = Run(tmp_path, bf16=True)
    assert same(run.train(), plain_loop(run.batches, autocast=torch.bfloat16))


def test_tasks_compared_at_a_representation(tmp_path):
    def make(shared: Any) -> igb.Balancer:
        return igb.Balancer("imtl_g", shared=shared)

    run = Run(tmp_path, make, init={"representation": "hidden"})
    run.model.with_hidden = True
    assert same(run.train(), plain_loop(run.batches, make, representation=True))
    assert len(run.trainer.predict(data()[:4]).predictions) == 2


@pytest.mark.parametrize("decide_per", ["step", "micro_batch"])
def test_losses_that_the_model_divides_by_all_items(decide_per, tmp_path):
    """What micro-batches have are shares then, and the Trainer divides nothing."""
    run = Run(tmp_path, model=make_model(OfAllItems), decide_per=decide_per, gradient_accumulation_steps=2, max_steps=1)
    run.train()
    model = make_model(OfAllItems)
    balancer, window = v1_db_mtl(model.bert.parameters()), run.batches[:2]
    shares = [model(**batch, num_items_in_batch=torch.tensor(2 * SIZE * 4))["losses"] for batch in window]
    if decide_per == "step":
        balancer.accumulate(shares[0])
        want = balancer.backward(shares[1])
    else:
        results = [balancer.backward({task: 2 * loss for task, loss in share.items()}) for share in shares]
        want = results[-1]
        for p in model.parameters():
            p.grad = None if p.grad is None else p.grad / 2
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    torch.optim.AdamW(model.parameters(), 0.05, weight_decay=0.0).step()
    assert same(run.log.results[-1].losses, want.losses)
    assert same([*run.model.parameters()], [*model.parameters()])
    logged = run.trainer.state.log_history[-1]["train_loss"]
    assert logged == pytest.approx(sum(float(loss) for share in shares for loss in share.values()))


# ---- Checkpoints ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [v1_db_mtl, uw_pcgrad])
def test_a_resumed_training_has_the_bits_of_an_uninterrupted_one(make, tmp_path: pathlib.Path):
    """From within an epoch, and from the last step of one; IGBv1 counts them."""
    whole = Run(tmp_path, make, make_model(dropout=0.1), save_strategy="steps", save_steps=1)
    whole.train()
    for step in (5, 7):
        again = Run(tmp_path / "again", make, make_model(dropout=0.1))
        seen = again.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert same(seen, whole.log.of(whole.model, whole.balancer, step))


def test_a_checkpoint_without_a_balancer(tmp_path, caplog):
    run = Run(tmp_path, save_strategy="steps", save_steps=5, max_steps=5)
    run.train()
    (tmp_path / "checkpoint-5" / "balancer.pt").unlink()
    again = Run(tmp_path / "again")
    with caplog.at_level("WARNING", logger="igb_kernels"):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert len(again.log.results) == 10
    assert "checkpoint-5 has no balancer.pt" in caplog.text


def test_a_checkpoint_of_the_model_alone(tmp_path):
    Run(tmp_path, save_strategy="steps", save_steps=1, max_steps=1, save_only_model=True).train()
    assert not (tmp_path / "checkpoint-1" / "balancer.pt").exists()


# ---- Logs, evaluation, models that are made anew -------------------------------------------------------------------


def test_mean_losses_and_weights_are_logged_with_the_loss(tmp_path):
    run = Run(tmp_path, logging_steps=5)
    run.train()
    logged = [log for log in run.trainer.state.log_history if "loss" in log]
    assert len(logged) == EPOCHS
    for i, log in enumerate(logged):
        results = run.log.results[5 * i : 5 * i + 5]
        for k, task in enumerate(("tag", "score")):
            assert log[f"task_loss/{task}"] == pytest.approx(sum(r.losses[k].item() for r in results) / 5)
            assert log[f"task_weight/{task}"] == pytest.approx(sum(r.total_weights[k].item() for r in results) / 5)
        assert log["loss"] == pytest.approx(log["task_loss/tag"] + log["task_loss/score"], rel=1e-4)
    assert not any("task_loss/tag" in log for log in run.trainer.state.log_history if "loss" not in log)


def test_means_leave_missing_tasks_out(tmp_path):
    class Sometimes(BalancedTrainer):
        def compute_losses(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            losses, outputs = super().compute_losses(model, inputs, num_items_in_batch)
            if self.state.global_step:
                losses["score"] = None
            return losses, outputs

    run = Run(tmp_path, trainer=Sometimes, logging_steps=2, max_steps=4)
    run.train()
    first, second = (log for log in run.trainer.state.log_history if "loss" in log)
    assert first["task_loss/score"] == run.log.results[0].losses[1].item()
    assert "task_loss/score" not in second


@pytest.mark.parametrize("with_loss", [False, True])
def test_evaluation_is_the_trainers_own(with_loss, tmp_path):
    """The loss that a Trainer without balancing reports, or the sum of the losses; and no losses among predictions."""
    run = Run(tmp_path, per_device_eval_batch_size=4)
    run.model.with_loss = with_loss
    before = run.balancer.state_dict()
    evaluation = run.trainer.evaluate()
    predictions = run.trainer.predict(data()[:4]).predictions
    batch = run.batches[-1]
    with torch.no_grad():
        outputs = run.model(**batch)
    loss = outputs["loss"] if with_loss else sum(outputs["losses"].values())
    assert evaluation["eval_loss"] == pytest.approx(float(loss))
    assert [p.shape for p in predictions] == [(4, 4, 3), (4,)]
    assert same(before, run.balancer.state_dict())
    if with_loss:
        plain = transformers.Trainer(run.model, run.trainer.args, run.collate, eval_dataset=data()[:4])
        assert plain.evaluate()["eval_loss"] == evaluation["eval_loss"]


def test_evaluation_in_between_changes_nothing(tmp_path):
    run = Run(tmp_path, eval_strategy="steps", eval_steps=2)
    quiet = Run(tmp_path)
    assert same(run.train(), quiet.train())


def test_losses_of_ones_own(tmp_path):
    class Own(BalancedTrainer):
        def compute_losses(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            outputs = model(inputs["input_ids"])
            tag = F.cross_entropy(outputs["logits"].flatten(0, 1), inputs["labels"].flatten(), reduction="sum")
            score = 5 * F.mse_loss(outputs["score"], inputs["scores"], reduction="sum")
            return {"tag": tag / inputs["labels"].numel(), "score": score / len(inputs["scores"])}, outputs

    assert same(Run(tmp_path, trainer=Own).train(), Run(tmp_path).train())


def test_a_model_that_is_made_anew(tmp_path):
    """As hyperparameter searches do."""
    run, made = Run(tmp_path), []

    def make(model: nn.Module) -> igb.Balancer:
        made.append(model)
        return v1_db_mtl(model.bert.parameters())

    trainer = BalancedTrainer(
        args=run.trainer.args,
        model_init=lambda: make_model(),
        data_collator=run.collate,
        train_dataset=data(),
        balancer=make,
    )
    trainer.pop_callback(transformers.PrinterCallback)
    want = run.train()[-1]
    for _ in range(2):
        trainer.train()
        assert made[-1] is trainer.model
        assert same([p.detach() for p in trainer.model.parameters()], want)


def test_another_training_is_another_epoch(tmp_path):
    run = Run(tmp_path, lambda shared: igb.Balancer("igb_v1", shared=shared), num_train_epochs=1)
    for _ in range(3):
        run.train()
    scales = [r.scales for r in run.log.results]
    assert same(run.balancer.losses.state_dict()["epoch"], 2), scales


def test_a_training_that_was_interrupted_leaves_nothing_in_the_next(tmp_path):
    """As where auto_find_batch_size tries again."""

    class Interrupted(BalancedTrainer):
        stop = True

        def compute_losses(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Any:
            if self._progress.waiting and self.stop:
                raise ValueError("stop")
            return super().compute_losses(model, inputs, num_items_in_batch)

    runs = [Run(tmp_path, uw_pcgrad, trainer=Interrupted, gradient_accumulation_steps=2) for _ in range(2)]
    with pytest.raises(ValueError, match="stop"):
        runs[0].train()
    for run in runs:
        run.trainer.stop = False
    assert same(*(run.train() for run in runs))


# ---- What does not go ---------------------------------------------------------------------------------------------

FAMO = lambda shared: igb.Balancer("famo", shared=shared)  # noqa: E731
WRONG = {
    "label smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor and compute_loss_func must stay out"),
    "compute_loss_func": ({"init": {"compute_loss_func": print}}, "compute_loss_func must stay out"),
    "layerwise": ({"optim": "galore_adamw_layerwise"}, "'galore_adamw_layerwise' does within them"),
    "famo": ({"make": FAMO}, "needs the losses after each step"),
    "decide_per": ({"decide_per": "batch"}, "decide_per must be one of"),
    "another model": (
        {"make": lambda shared: v1_db_mtl(make_model().bert.parameters())},
        r"parameters of the TwoHeads that is trained, found (\d+) of \1 that are not",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_go_with_several_losses(case, tmp_path):
    options, message = WRONG[case]
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, **options)


def test_several_processes_are_refused(tmp_path):
    os.environ |= TORCHRUN
    with pytest.raises(RuntimeError, match=r"one process .* found .*MULTI_CPU"):
        Run(tmp_path)


def test_balancers_that_cannot_be(tmp_path):
    args = Run(tmp_path).trainer.args
    with pytest.raises(TypeError, match="balancer must be a Balancer, or a function of the model, found 'db_mtl'"):
        BalancedTrainer(make_model(), args, balancer="db_mtl")
    args._n_gpu = 2
    with pytest.raises(RuntimeError, match="one GPU, found 2: set CUDA_VISIBLE_DEVICES"):
        BalancedTrainer(model := make_model(), args, balancer=v1_db_mtl(model.parameters()))
    with pytest.raises(ValueError, match="must be a function of the model where model_init"):
        BalancedTrainer(None, args, model_init=lambda: make_model(), balancer=v1_db_mtl(make_model().parameters()))


def test_learned_weights_in_ones_own_optimizer(tmp_path):
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = Run(tmp_path, uw_pcgrad, model, init={"optimizers": (optimizer, None)})
    with pytest.raises(ValueError, match=r"\*balancer\.param_groups\(\)"):
        run.train()


def test_models_without_losses(tmp_path):
    model = make_model()
    model.forward = lambda input_ids, labels=None, scores=None: {"loss": model.tag.weight.sum()}
    with pytest.raises(ValueError, match=r"must return `losses`, or compute_losses be overridden; found \['loss'\]"):
        Run(tmp_path, model=model).train()


def test_one_loss_is_not_several(tmp_path):
    model = make_model()
    model.forward = lambda input_ids, labels=None, scores=None: {"losses": model.tag.weight.sum()}
    with pytest.raises(ValueError, match="losses must be a 1-D tensor"):
        Run(tmp_path, model=model).train()
