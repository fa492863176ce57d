"""The command line."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import torch

METHODS = ("equal", "igb_v1+db_mtl")
MOLECULES = 8000
EPOCHS = 8
# By default half of PyTorch's threads, up to so many. The small network's operations are short, so that its threads
# mostly wait for each other, for very long if one of them shares its core with something else.
MOST_THREADS = 4
OUT = Path(__file__).parent / "runs" / "latest"
DESCRIPTION = """\
Multi-task training on QM9: 11 molecular properties, one encoder, every balancing method from the same start.

    python examples/qm9/train.py
    python examples/qm9/train.py --full --epochs 100 --batch-size 120 --lr 1e-3 --encoder nnconv --device cuda
"""


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments; `device` is a torch.device, `epochs` is None only where `steps` is given."""
    parser = _parser()
    args = parser.parse_args(argv)
    for name in ("epochs", "steps", "batch_size", "threads"):
        value = getattr(args, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1; found {value}")
    if args.timing_steps < 0:
        parser.error(f"--timing-steps must be at least 0; found {args.timing_steps}")
    if not (args.lr > 0 and math.isfinite(args.lr)):
        parser.error(f"--lr must be positive and finite; found {args.lr}")
    if len(set(args.methods)) != len(args.methods):
        parser.error(f"--methods must not repeat a name; found {' '.join(args.methods)}")
    if args.full and args.data == "tiny":
        parser.error("--full takes all of --data qm9pack; found --data tiny")
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device must be a device of this machine; found {args.device}: {str(error).splitlines()[0]}")
    args.device = torch.device(args.device)
    if args.molecules is None and not args.full and args.data == "qm9pack":
        args.molecules = MOLECULES
    if args.threads is None:
        args.threads = max(1, min(torch.get_num_threads() // 2, MOST_THREADS))
    if args.epochs is None and args.steps is None:
        args.epochs = EPOCHS
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter)

    what = parser.add_argument_group("what is trained")
    what.add_argument(
        "--methods",
        nargs="+",
        default=list(METHODS),
        metavar="NAME",
        help=f"names for igb_kernels.Balancer; compared with 'equal', or else the first ({' '.join(METHODS)})",
    )
    what.add_argument(
        "--encoder",
        choices=("schnet", "nnconv"),
        default="schnet",
        help="light continuous-filter network, or the benchmark's NNConv + GRU + Set2Set, for GPUs (%(default)s)",
    )
    what.add_argument(
        "--data",
        choices=("qm9pack", "tiny"),
        default="qm9pack",
        help="the PyPI package, or the 400 molecules kept in the repository (%(default)s)",
    )
    size = what.add_mutually_exclusive_group()
    size.add_argument(
        "--molecules",
        type=int,
        metavar="N",
        help=f"molecules sampled at random; a quarter of them are held out ({MOLECULES}; tiny: all)",
    )
    size.add_argument("--full", action="store_true", help="all 130,831 molecules, 10,000 each to validate and to test")

    how = parser.add_argument_group("how")
    length = how.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=int, metavar="N", help=f"passes over the training molecules ({EPOCHS})")
    length.add_argument("--steps", type=int, metavar="N", help="optimizer steps, instead of --epochs")
    how.add_argument("--batch-size", type=int, default=32, metavar="N", help="molecules a step (%(default)s)")
    how.add_argument("--lr", type=float, default=2e-3, metavar="RATE", help="Adam's peak learning rate (%(default)s)")
    how.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of sample, split, initialisation and batches (%(default)s)"
    )

    where = parser.add_argument_group("where")
    where.add_argument("--device", default="cpu", help="torch device, such as cpu or cuda (%(default)s)")
    where.add_argument(
        "--threads", type=int, metavar="N", help=f"CPU threads (half of PyTorch's, up to {MOST_THREADS})"
    )
    where.add_argument("--backend", default="auto", metavar="NAME", help="igb_kernels backend (%(default)s)")
    where.add_argument(
        "--timing-steps", type=int, default=20, metavar="N", help="steps timed in parts, 0 for none (%(default)s)"
    )
    where.add_argument(
        "--out",
        type=Path,
        default=OUT,
        metavar="DIR",
        help="folder for metrics.json, history.npz and report.png, which replace earlier ones (%(default)s)",
    )
    return parser
