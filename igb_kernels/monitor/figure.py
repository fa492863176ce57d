"""A figure of recorded steps; needs Matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from igb_kernels.monitor.block import Block, mean_of_finite, means_of

try:
    from matplotlib import colormaps
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("Monitor.figure needs matplotlib: pip install matplotlib") from error

POINTS = 400
"""Curves are means over so many windows of steps."""
MOST_NAMED = 12
"""Tasks with a name in the legend and a number in each cell."""


def draw(block: Block) -> Figure:
    """Weights and scales over steps [N]; mean cosine and rate of conflict of each pair, where there are cosines."""
    pairs = block.cosines is not None and len(block.tasks) > 1
    figure = Figure(figsize=(12, 8 if pairs else 4), layout="constrained")
    panels = figure.subplots(2 if pairs else 1, 2, squeeze=False)
    _curves(panels[0, 0], block, block.weights, "Weights")
    _curves(panels[0, 1], block, block.scales, "Loss scales")
    if len(block.tasks) <= MOST_NAMED:
        panels[0, 1].legend(frameon=False, ncols=2, fontsize="small")
    if pairs:
        assert block.cosines is not None
        finite = block.cosines.isfinite()
        conflict = ((block.cosines < 0) & finite).sum(0) / finite.sum(0)
        _pairs(
            figure,
            panels[1, 0],
            block.tasks,
            mean_of_finite(block.cosines),
            "Mean cosine of gradients",
            "RdBu",
            (-1, 1),
        )
        _pairs(figure, panels[1, 1], block.tasks, conflict, "Steps in conflict (cosine < 0)", "Reds", (0, 1))
    return figure


def _curves(axes: Any, block: Block, values: Tensor, title: str) -> None:
    size = max(1, len(block) // POINTS)
    means, _ = means_of(values, values.isfinite(), size)
    steps = block.steps[size - 1 :: size].tolist()
    steps += block.steps[-1:].tolist() if len(block) % size else []
    palette = colormaps["tab10" if len(block.tasks) <= 10 else "viridis"]
    for k, task in enumerate(block.tasks):
        colour = palette(k if len(block.tasks) <= 10 else k / (len(block.tasks) - 1))
        axes.plot(steps, means[:, k].tolist(), label=task, color=colour, linewidth=1.2)
    known = means[means.isfinite()]
    if len(known) and bool((known > 0).all()) and float(known.max() / known.min()) > 30:
        axes.set_yscale("log")
    axes.set(title=title, xlabel="step" if size == 1 else f"step (means of {size})")


def _pairs(
    figure: Figure,
    axes: Any,
    tasks: Sequence[str],
    values: Tensor,
    title: str,
    palette: str,
    limits: tuple[float, float],
) -> None:
    shown = values.where(~torch.eye(len(tasks), dtype=torch.bool, device="cpu"), torch.nan)
    image = axes.imshow(shown.tolist(), cmap=palette, vmin=limits[0], vmax=limits[1])
    figure.colorbar(image, ax=axes)
    axes.set(title=title)
    axes.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    axes.set_yticks(range(len(tasks)), tasks)
    if len(tasks) <= MOST_NAMED:
        for i, j in ((i, j) for i in range(len(tasks)) for j in range(len(tasks)) if shown[i, j].isfinite()):
            strong = abs(float(shown[i, j])) > 0.6 * limits[1]
            axes.text(j, i, f"{shown[i, j]:.2f}", ha="center", va="center", color="white" if strong else "black")
