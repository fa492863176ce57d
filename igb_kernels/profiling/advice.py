"""What a profile's figures say should be changed."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from igb_kernels.backends import FASTEST_FIRST, backends
from igb_kernels.balancer import Balancer
from igb_kernels.gradients.base import Needs
from igb_kernels.profiling.spans import BALANCING, Phase

MUCH = 0.5
LITTLE = 0.1


@dataclass(frozen=True)
class Figures:
    """What advice is drawn from; times in ms, shares of the step."""

    balancer: Balancer
    step_ms: float
    device_ms: float | None
    """What the device was seen to take, None on the CPU."""
    tasks: int
    shares: dict[Phase, float]
    copy_ms: float | None
    compared: float | None
    """What the operations on gradients take."""
    passes_ms: Sequence[float]
    head_ms: Sequence[float]
    """Until each task's pass came to what all share."""
    at_representation: bool
    stacked_otherwise: bool
    backends: Collection[str]
    optimizer: str | None
    """One that could be fused and is not."""


def advice(figures: Figures) -> list[str]:
    """Sentences, the most important first."""
    said = [_losses(figures), _backend(figures), _passes(figures), _balancing(figures), _rest(figures)]
    return [sentence for sentence in said if sentence]


def _losses(figures: Figures) -> str:
    if not figures.stacked_otherwise:
        return ""
    return (
        "Losses came as one tensor that torch.stack did not make: every backward pass runs all tasks' heads. Give "
        "`backward` a list of scalar losses."
    )


def _backend(figures: Figures) -> str:
    kind = figures.balancer.shared[0].device.type
    if "reference" in figures.backends:
        if figures.balancer.backend == "reference":
            return 'The slow reference backend is used because the balancer was made with backend="reference".'
        why = "; ".join(f"{name}: {backends()[name].detail}" for name in FASTEST_FIRST.get(kind, ()))
        return f"The slow reference backend is used because {why or f'there are no kernels for {kind} tensors'}."
    if "triton" in figures.backends and figures.balancer.backend == "auto":
        return f"The Triton backend is used, not the CUDA kernels: {backends()['cuda'].detail}."
    return ""


def _passes(figures: Figures) -> str:
    share, total, K = figures.shares[Phase.PASS], sum(figures.passes_ms), len(figures.passes_ms)
    if share < MUCH or K < 2 or figures.at_representation:
        return ""
    said = f"{K} backward passes are {share:.0%} of your step"
    method = figures.balancer.gradients
    if method.needs() is Needs.NOTHING:
        return f"{said}."
    if method.ema_decay() is not None or method.needs() is Needs.EXCESS:
        return (
            f"{said}. {method!r} keeps what outlives the batch, so it needs them; methods that do not (Nash-MTL, "
            "IMTL-G, DBMTL(beta=0), ...) can compare gradients at the representation, with one pass through the "
            "encoder: `backward(losses, representation=z)`."
        )
    instead = "`backward(losses, representation=z)`, with z the encoder's output,"
    if not figures.head_ms:
        return f"{said}: comparing gradients at the representation, {instead} takes one pass through the encoder."
    heads = sum(figures.head_ms)
    encoder = max(total / K - heads / len(figures.head_ms), 0.0)
    if heads + encoder > 0.9 * total:
        return f"{said}, most of it in front of the shared parameters: comparing at a representation would gain little."
    return (
        f"{said}, {total:.3g} ms: comparing gradients at the representation, {instead} would take about "
        f"{heads + encoder:.3g} ms in their place ({heads:.3g} ms through the heads, and one pass of {encoder:.3g} ms "
        "through the encoder). It is another algorithm: weights come from gradients at z."
    )


def _balancing(figures: Figures) -> str:
    share = sum(figures.shares[phase] for phase in BALANCING)
    if share <= LITTLE:
        return f"Balancing beside the passes is {share:.1%} of the step: nothing to gain here."
    said = f"Balancing beside the passes is {share:.0%} of the step"
    if figures.copy_ms is not None and figures.compared is not None:
        said += (
            f"; its operations take {figures.compared:.3g} ms, copying the K gradients once {figures.copy_ms:.3g} ms"
        )
        if figures.compared <= 4 * figures.copy_ms:
            return f"{said}: near what memory allows. A larger batch makes its share smaller."
    largest = max(BALANCING, key=lambda phase: figures.shares[phase])
    said += f". The largest part is: {largest.value}"
    if largest in (Phase.BALANCER, Phase.CAPTURE):
        return f"{said}, the host's own time, which does not grow with the batch or the layers' sizes."
    return f"{said}."


def _rest(figures: Figures) -> str:
    said = []
    if (share := figures.shares[Phase.FORWARD]) >= MUCH:
        said.append(f"The forward pass, with loading the batch, is {share:.0%} of the step: look there first.")
    if figures.optimizer is not None and (share := figures.shares[Phase.OPTIMIZER]) >= 0.15:
        said.append(f"The optimizer is {share:.0%} of the step: {figures.optimizer}(..., fused=True) takes less.")
    if figures.device_ms is not None and figures.shares[Phase.BALANCER] + figures.shares[Phase.CAPTURE] >= 0.15:
        said.append("The GPU waits for the host: capture the step in a CUDA graph, or torch.compile the model.")
    return " ".join(said)
