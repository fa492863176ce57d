"""Writes `libmtl.json`: the parameters after nine steps with each weighting of today's LibMTL as its authors wrote it.

    IGB_PEERS=folder/of/checkouts PYTHONPATH=tests python -m integrations.record_libmtl

The folder holds median-research-group+LibMTL; it needs cvxpy with ECOS, qpsolvers with quadprog, scipy and
torch_geometric.
"""

from __future__ import annotations

import json
import random
import warnings
from pathlib import Path

from .libmtl_on_cpu import METHODS, TODAY, LibMTL, trained

FILE = Path(__file__).with_name("libmtl.json")


def main() -> None:
    assert TODAY, f"{LibMTL.__file__} is LibMTL 1.1.5"
    random.seed(0)
    lines = []
    for name in METHODS:
        _, after = trained(vars(LibMTL.weighting)[name], name)
        lines.append(f"{json.dumps(name)}: {json.dumps([float(f'{value:.8g}') for value in after.tolist()])}")
    FILE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
