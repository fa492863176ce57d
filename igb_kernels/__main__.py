"""`python -m igb_kernels`: `doctor` says what runs here, and whether it is right."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

from igb_kernels.printing import show


def doctor(options: argparse.Namespace) -> int:
    """Prints what is found; 1 where something is wrong."""
    from igb_kernels.doctor import diagnose

    found = diagnose()
    if options.json:
        print(json.dumps(found.to_dict(), indent=1))
    else:
        show(found.sections())
    return 1 if found.problems else 0


def parser() -> argparse.ArgumentParser:
    """Every command is a function of its options that returns the exit code."""
    whole = argparse.ArgumentParser(prog="python -m igb_kernels", description="Loss and gradient balancing.")
    commands = whole.add_subparsers(required=True, metavar="command")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", action="store_true", help="print JSON, and nothing else, to the standard output")

    command = commands.add_parser(
        "doctor", parents=[shared], help="what is installed, which backend each device gets, and a self-test"
    )
    command.set_defaults(run=doctor)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    result: int = options.run(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
