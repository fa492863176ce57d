"""The table of all methods and rules, made from the cards on their classes.

`python -m igb_kernels.methods` prints it as Markdown; `METHODS.md` beside this file is what it prints.
"""

from __future__ import annotations

from collections.abc import Iterable

from igb_kernels.gradients import METHODS, GradientBalancer
from igb_kernels.losses import RULES, LossBalancer

Balancing = type[GradientBalancer] | type[LossBalancer]

HEADER = """# Methods

A gradient-balancing method gives the weights w_k of the update Σ_k w_k g_k of the shared parameters; a loss-balancing
rule the scales s_k of the losses. They combine freely, `igb.Balancer("igb_v1+nash_mtl", ...)`: the gradients are then
those of s_k L_k, at no further pass, and G becomes diag(s) G diag(s).

- *Memory* is what a step holds beyond a plain one, in gradients of the shared parameters; *passes* are backward passes.
- *Degree* q: multiplying all gradients by c multiplies the update by c^q. *Rescaled losses*: what stays when each loss
  is multiplied by its own constant. Both with default options; "–": none.
"""

COLUMNS = ("name", "what", "formula", "from", "memory", "passes", "degree", "rescaled losses", "mind", "parity")


def table() -> str:
    """Everything as one Markdown text."""
    scale_free = [method for method in METHODS.values() if method.card.invariance]
    no_effect = ", ".join(f"`{method.name}`" for method in scale_free)
    parts = [
        HEADER,
        "## Gradient balancing\n",
        _rows(METHODS.values()),
        "## Loss balancing\n",
        _rows(RULES.values()),
        "## Combinations without effect\n",
        f"The update of {no_effect} keeps its direction when each gradient is multiplied by its own positive\n"
        "number (with moving averages: by one that stays the same over the steps). A loss scale in front of them acts\n"
        "on task-specific parameters alone.\n",
    ]
    return "\n".join(parts)


def _rows(classes: Iterable[Balancing]) -> str:
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(_row(cls) for cls in sorted(classes, key=lambda cls: cls.name))]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def _row(cls: Balancing) -> tuple[str, ...]:
    card = cls.card
    degree = "–" if card.degree is None else f"{card.degree:g}"
    rate = "" if cls.learning_rate is None else f" learning rate {cls.learning_rate:g} recommended"
    return (
        f"`{cls.name}`, `{cls.__name__}`",
        f"{card.title}. {card.paper}" if card.paper else card.title,
        card.formula,
        card.inputs,
        card.memory,
        card.passes,
        degree,
        f"{card.invariance} stays" if card.invariance else "–",
        "; ".join(filter(None, (card.hazards, rate.strip()))),
        card.parity,
    )


if __name__ == "__main__":
    print(table(), end="")
