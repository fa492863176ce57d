"""Writes `weight_methods.json`: 20 steps of each method of nash-mtl, FAMO and IGB4MTL as their authors wrote them.

    IGB_PEERS=folder/of/checkouts PYTHONPATH=tests python -m integrations.record_weight_methods

The folder holds AvivNavon+nash-mtl, Cranial-XIX+FAMO and YanqiDai+IGB4MTL; they need cvxpy with ECOS, and scipy.
"""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.peers import checkout, importing_from

from .protocol import PAIRS, RUNS, Run, run_pair, run_weight_methods

FILE = Path(__file__).with_name("weight_methods.json")


def rounded(value: Any) -> Any:
    """Numbers with 11 digits: more than any comparison asks for."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.11g}") if isinstance(value, float) else value


def recorded(run: Run) -> dict[str, Any]:
    """What there is; where gradients are not recorded, weights and values of the last step alone."""
    fields = asdict(run)
    if not run.grams:
        fields |= {name: fields[name][-1:] for name in ("weights", "values")}
    return {name: rounded(value) for name, value in fields.items() if value}


def main() -> None:
    cases: dict[str, Any] = {}
    for case in RUNS:
        with importing_from(checkout(case.repository)):
            theirs = importlib.import_module("methods.weight_methods")
            run = run_weight_methods(theirs.WeightMethods, case)
        cases[case.id] = recorded(run)
    with importing_from(checkout("YanqiDai/IGB4MTL")):
        losses = importlib.import_module("methods.loss_weight_methods")
        gradients = importlib.import_module("methods.gradient_weight_methods")
        for loss, gradient in PAIRS:
            run = run_pair(losses.LossWeightMethods, gradients.GradientWeightMethods, loss, gradient)
            cases[f"igb4mtl-{loss}-{gradient}"] = recorded(run)
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(case)}" for name, case in cases.items())
    FILE.write_text(f"{{\n{lines}\n}}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
