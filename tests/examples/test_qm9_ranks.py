"""The QM9 example by torchrun: two processes come to the figures of one, and one of them reports."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "qm9"))

import train
from ranks import Ranks

ROOT = Path(__file__).parents[2]
ARGUMENTS = ["--data", "tiny", "--steps", "4", "--batch-size", "30", "--timing-steps", "0", "--threads", "1"]


def test_two_ranks_come_to_the_figures_of_one_process(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    outs = [tmp_path / "one", tmp_path / "two"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    process = subprocess.Popen(
        [*command, str(train.__file__), *ARGUMENTS, "--out", str(outs[1])],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        assert train.main([*ARGUMENTS, "--out", str(outs[0])]) == 0
    finally:
        torch.set_num_threads(threads)
        printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert printed.count("Test MAE") == 1
    assert "ranks    2, each with 15 of 30 molecules a step" in printed
    one, two = (json.loads((out / "metrics.json").read_text()) for out in outs)
    assert (one["environment"]["ranks"], two["environment"]["ranks"]) == (1, 2)
    history = [np.load(out / "history.npz") for out in outs]
    for method, found in two["methods"].items():
        for what in ("losses", "weights"):
            np.testing.assert_allclose(*(h[f"{method}/{what}"] for h in history), rtol=1e-4, err_msg=method)
        for target, error in one["methods"][method]["test_mae"].items():
            assert found["test_mae"][target] == pytest.approx(error, rel=1e-4)


def test_batches_must_have_a_part_for_each_rank(capsys: pytest.CaptureFixture[str]) -> None:
    args = train.parse_arguments([*ARGUMENTS, "--batch-size", "25"])
    assert train.run_on(Ranks(None, 0, 2), args) == 2
    assert "--batch-size must be a multiple of the 2 ranks; found 25" in " ".join(capsys.readouterr().out.split())
    assert train.run_on(Ranks(None, 1, 2), args) == 2
    assert capsys.readouterr().out == "", "the first rank alone prints"
