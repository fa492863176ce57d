"""The report's picture: losses and weights over steps, errors, step time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import matplotlib
import numpy as np
from data import TARGET_NAMES
from loop import Run, delta_m
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray
from tables import baseline_of, test_errors
from timing import StepTime

# Okabe and Ito's colours, which stay apart under colour blindness. The four atomisation energies nearly coincide:
# they share black and differ in dashes.
STYLES: dict[str, tuple[str, str]] = {
    "mu": ("#E69F00", "-"),
    "alpha": ("#56B4E9", "-"),
    "HOMO": ("#009E73", "-"),
    "LUMO": ("#CC79A7", "-"),
    "R2": ("#0072B2", "-"),
    "ZPVE": ("#D55E00", "-"),
    "U0": ("#000000", "-"),
    "U": ("#000000", "--"),
    "H": ("#000000", "-."),
    "G": ("#000000", ":"),
    "Cv": ("#8C8C00", "-"),
}
METHOD_COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9")
PART_COLOURS = {
    "batch": "#BBBBBB",
    "forward": "#56B4E9",
    "backward passes": "#0072B2",
    "balancing": "#D55E00",
    "optimizer": "#009E73",
}
POINTS = 400  # curves are averaged over windows so that about this many points remain


def draw(
    file: Path, runs: Sequence[Run], mean_mae: NDArray[np.float64], times: Mapping[str, StepTime], title: str
) -> None:
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    weighted = [run for run in runs if not _is_constant(run)]
    top = max(len(runs) + len(weighted), 2)
    figure = Figure(figsize=(max(16.0, 5.3 * top), 10), dpi=100, layout="constrained")
    figure.suptitle(title)
    upper, lower = cast(NDArray[Any], figure.subfigures(2, 1, height_ratios=(1.15, 1)))
    panels = upper.subplots(1, top, squeeze=False)[0]
    loss_panels = panels[: len(runs)]
    for run, axes in zip(runs, loss_panels, strict=True):
        _curves(axes, run.losses.double().numpy(), f"Training losses: {run.method}")
        axes.set_ylabel("loss (MSE on standardised targets)")
    limits = [axes.get_ylim() for axes in loss_panels]
    for axes in loss_panels:
        axes.set_ylim(min(low for low, _ in limits), max(high for _, high in limits))
        _label_ends(axes)
    for run, axes in zip(weighted, panels[len(runs) :], strict=False):
        weights = run.weights.double().numpy()
        _curves(axes, weights / weights.mean(axis=1, keepdims=True), f"Task weights: {run.method}")
        axes.set_ylabel("weight on the loss's gradient, mean 1")
        axes.axhline(1, color="#999999", linewidth=0.8, zorder=0)
        _label_ends(axes)
    for axes in panels[len(runs) + len(weighted) :]:
        axes.set_visible(False)
    if times:
        left, right = lower.subplots(1, 2, width_ratios=(1.6, 1))
        _step_times(right, runs, times)
    else:
        left = lower.subplots()
    _errors(left, runs, mean_mae)
    figure.savefig(file)


def _is_constant(run: Run) -> bool:
    weights = run.weights.numpy()
    return bool(np.allclose(weights, weights[:1]))


def _curves(axes: Axes, values: NDArray[np.float64], title: str) -> None:
    window = max(1, len(values) // POINTS, len(values) // 50)
    kernel = np.ones(window) / window
    steps = np.arange(len(values) - window + 1) + window
    for k, name in enumerate(TARGET_NAMES):
        colour, dashes = STYLES[name]
        smooth = np.convolve(values[:, k], kernel, mode="valid")
        axes.plot(steps, smooth, dashes, color=colour, linewidth=1.4, label=name)
    axes.set_yscale("log")
    axes.set_xlabel(f"step (running mean over {window})" if window > 1 else "step")
    axes.set_title(title)


def _label_ends(axes: Axes) -> None:
    """Each curve's name at its end, pushed apart where curves meet."""
    low, high = np.log10(axes.get_ylim())
    lines = [line for line in axes.get_lines() if line.get_label() in STYLES]
    ends = np.array([(np.log10(np.asarray(line.get_ydata())[-1]) - low) / (high - low) for line in lines])
    places = spread(ends, gap=0.045)
    for line, end, place in zip(lines, ends, places, strict=True):
        axes.annotate(str(line.get_label()), xy=(1.0, end), xytext=(1.06, place), xycoords="axes fraction",
                      color=line.get_color(), va="center", fontsize=9, annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": line.get_color(), "linewidth": 0.6,
                                  "linestyle": line.get_linestyle(), "shrinkA": 1, "shrinkB": 0})  # fmt: skip
    axes.margins(x=0)


def spread(places: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """The same order, at least `gap` apart, inside 0..1 if they fit, near where they were."""
    order = np.argsort(places, kind="stable")
    result = places[order].copy()
    for i in range(1, len(result)):
        result[i] = max(result[i], result[i - 1] + gap)
    result -= max(0.0, result[-1] - 1.0)
    for i in range(len(result) - 2, -1, -1):
        result[i] = min(result[i], result[i + 1] - gap)
    spread_out: NDArray[np.float64] = np.empty_like(result)
    spread_out[order] = result
    return spread_out


def _errors(axes: Axes, runs: Sequence[Run], mean_mae: NDArray[np.float64]) -> None:
    baseline = baseline_of(runs)
    others = [run for run in runs if run is not baseline]
    if not others:
        share = test_errors(baseline) / mean_mae * 100
        bars = axes.bar(TARGET_NAMES, share, color=METHOD_COLOURS[0])
        axes.bar_label(bars, fmt="%.0f", fontsize=9)
        axes.set(title=f"Test MAE of {baseline.method}", ylabel="% of predicting the mean")
        return
    width = 0.8 / len(others)
    places = np.arange(len(TARGET_NAMES))
    for i, run in enumerate(others):
        change = (test_errors(run) / test_errors(baseline) - 1) * 100
        label = f"{run.method}: Δm {delta_m(test_errors(run), test_errors(baseline)):+.1f} %"
        bars = axes.bar(places + (i - (len(others) - 1) / 2) * width, change, width,
                        color=METHOD_COLOURS[i % len(METHOD_COLOURS)], label=label)  # fmt: skip
        axes.bar_label(bars, fmt="%+.0f", fontsize=9, padding=2)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xticks(places, TARGET_NAMES)
    axes.margins(y=0.12)
    axes.set(title=f"Test MAE against {baseline.method} (below 0 is better)", ylabel="change of MAE in %")
    axes.legend(frameon=False, loc="best")


def _step_times(axes: Axes, runs: Sequence[Run], times: Mapping[str, StepTime]) -> None:
    rows = []
    for run in runs:
        step = times[run.method]
        rows.append((run.method, step, step.balancing))
        if run.balancer.gradients.name != "equal":
            rows.append((f"{run.method}\nreference backend", step, step.reference_balancing))
    left = np.zeros(len(rows))
    for part, colour in PART_COLOURS.items():
        widths = np.array([_part(step, balancing, part) for _, step, balancing in rows])
        axes.barh([name for name, _, _ in rows], widths, left=left, color=colour, label=part)
        left += widths
    for row, total in enumerate(left):
        axes.text(total, row, f" {total:.1f} ms", va="center")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set(title="Time of a step (medians)", xlabel="ms")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.14), ncols=5, fontsize=9)


def _part(step: StepTime, balancing: float, part: str) -> float:
    if part == "balancing":
        return max(balancing, 0.0)  # a difference of two medians' worth of noise can come out negative
    return float(getattr(step, "passes" if part == "backward passes" else part))
