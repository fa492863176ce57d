"""Where TorchJD's weights differ from ours, ours solve the method's own problem, and TorchJD's do not."""

from __future__ import annotations

import pytest

from benchmarks import differences
from benchmarks.differences import RATIOS, RESIDUALS, torchjd, worst

pytestmark = pytest.mark.filterwarnings("ignore:You are solving a parameterized problem")

OURS = 1e-5
"""On float32 rows, with weights that are rounded to it."""
OURS_OF_MGDA = 1e-3
"""Its gap is in units of |d|², and rounding in those of the longest row's products with d."""
THEIRS = {"UPGrad": 0.3, "DualProj": 0.3, "MGDA": 1.0, "CAGrad": 1.0, "IMTLG": 0.9, "NashMTL": 10.0, "AlignedMTL": 10.0}
"""At least, for rows of which one is 10,000 times as long as another. ConFIG's and FairGrad's stay small."""


@pytest.mark.parametrize("name", RESIDUALS)
def test_residuals(name):
    ours, theirs = torchjd()[name]
    found = [worst(RESIDUALS[name], ours, ratio) for ratio in RATIOS]
    expected = [worst(RESIDUALS[name], theirs, ratio) for ratio in RATIOS]
    assert max(found) < (OURS_OF_MGDA if name == "MGDA" else OURS)
    assert expected[-1] > THEIRS.get(name, 0)
    for a, b in zip(found, expected, strict=True):
        assert a <= max(b, OURS)


def test_the_script_prints_a_table(monkeypatch, capsys):
    monkeypatch.setattr(differences, "RATIOS", (1.0,))
    monkeypatch.setattr(differences, "SEEDS", range(1))
    differences.main()
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("torchjd"))
    for name, line in zip(RESIDUALS, lines[start + 2 :], strict=False):
        found = line.split()
        assert found[0] == name
        assert len([float(number) for number in found[1:]]) == 2
