"""The golden vectors in tests/golden: what the methods' original implementations gave, in float64.

A case is trusted where the original agrees with an independent float64 solution; elsewhere it is wrong, raises, or the
answer is not unique, and tests look at properties.
"""

from __future__ import annotations

import json
import pathlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

FOLDER = pathlib.Path(__file__).resolve().parent / "golden"


@dataclass(frozen=True)
class Case:
    """One case of a file; its fields, or those of one of its steps, as attributes."""

    fields: dict[str, Any]
    file: dict[str, Any]

    def __getattr__(self, name: str) -> Tensor:
        """A field as a float64 tensor."""
        value = self.fields.get(name)
        if value is None:
            raise AttributeError(name)
        return torch.tensor(_floats(value), dtype=torch.float64)

    @property
    def trust(self) -> bool:
        return bool(self.fields["trust"])

    @property
    def tags(self) -> set[str]:
        return set(self.fields["tags"])

    @property
    def params(self) -> dict[str, float]:
        return self.file["params"]

    @property
    def steps(self) -> list[Case]:
        shared = {key: self.fields[key] for key in ("trust", "tags")}
        return [Case({**step, **shared}, self.file) for step in self.fields["steps"]]

    def assert_update(self, found: Tensor) -> None:
        """`found` is the case's update as closely as its file asks for, in Euclidean norm."""
        compare, expected = self.file["compare"], self.update
        largest = self.jacobian.norm(dim=1).max()
        absolute = compare.get("atol_rel_to_largest_row", 1e-9 * compare["rtol"])
        error, limit = (found - expected).norm(), compare["rtol"] * expected.norm() + absolute * largest
        assert error <= limit, f"update is off by {error:.3g}, allowed are {limit:.3g}"

    def assert_weights(self, found: Tensor) -> None:
        torch.testing.assert_close(found, self.weights, rtol=self.file["compare"]["rtol"], atol=0.0)


def _floats(value: Any) -> Any:
    return [_floats(v) for v in value] if isinstance(value, list) else float(value)


@cache
def load(name: str) -> list[Case]:
    file = json.loads((FOLDER / f"{name}.json").read_text())
    return [Case(case, file) for case in file["cases"]]


def cases(*names: str) -> list[Any]:
    """All cases of the files as pytest parameters."""
    return [pytest.param(case, id=f"{name}-{case.fields['id']}") for name in names for case in load(name)]


def linear_losses(parameters: Tensor, jacobian: Tensor, losses: Tensor) -> list[Tensor]:
    """Losses with these values and these gradients, for parameters [D] that are 0."""
    return [parameters @ row + loss for row, loss in zip(jacobian, losses, strict=True)]
