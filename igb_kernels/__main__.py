"""`python -m igb_kernels`: what runs here, whether it is right and how fast, where the time of a script's steps goes,
and a page of what was measured."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from igb_kernels.bench import command as benchmarks
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


def profile(options: argparse.Namespace) -> int:
    """Runs the script and prints a profile of each balancer; 1 where the script fails or none takes steps."""
    from igb_kernels.profiling.script import profile_script

    # What the script prints is not JSON.
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        profiles, right = profile_script(
            options.script,
            options.arguments,
            warmup=options.warmup,
            steps=options.steps,
            reference=not options.without_reference,
            to_end=options.to_end,
        )
    if options.trace is not None:
        for i, found in enumerate(profiles):
            found.export_chrome_trace(options.trace.with_stem(options.trace.stem + (f"-{i}" if i else "")))
    if options.json:
        print(json.dumps([found.to_dict() for found in profiles], indent=1))
    else:
        for found in profiles:
            print()
            show(found.sections())
    if not profiles:
        print(f"{options.script} took no step with an igb_kernels.Balancer", file=sys.stderr)
    return 0 if right and profiles else 1


def report(options: argparse.Namespace) -> int:
    """Writes the page; 1 where there is nothing to show."""
    from igb_kernels.report import find, page
    from igb_kernels.report.words import number

    try:
        found = find(options.folder)
    except NotADirectoryError as error:
        print(error, file=sys.stderr)
        return 1
    there = bool(found.runs or found.profiles)
    if there:
        options.out.write_text(page(found), encoding="utf-8")
    if options.json:
        shown = sorted({run.name for run in found.runs} | {profile.name for profile in found.profiles})
        print(
            json.dumps(
                {"page": str(options.out) if there else None, "shown": shown, "skipped": found.skipped}, indent=1
            )
        )
        return 0 if there else 1
    for name, why in found.skipped.items():
        print(f"skipped: {name} {why}", file=sys.stderr)
    if there:
        print(f"{options.out}: {number(len(found.runs), 'run')} and {number(len(found.profiles), 'profile')}")
    else:
        print(f"{options.folder} has no results of `bench` or `profile --json` (*.json)", file=sys.stderr)
    return 0 if there else 1


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

    command = commands.add_parser(
        "profile", parents=[shared], help="run a training script, and show where the steps of its balancers go"
    )
    command.add_argument("--steps", type=int, default=20, help="steps to measure (default: %(default)s)")
    command.add_argument("--warmup", type=int, default=5, help="steps before (default: %(default)s)")
    command.add_argument("--without-reference", action="store_true", help="do not run the reference backend beside")
    command.add_argument("--to-end", action="store_true", help="do not stop the script when all is measured")
    command.add_argument("--trace", type=Path, metavar="PATH", help="where to write a chrome trace")
    command.add_argument("script", type=Path)
    command.add_argument("arguments", nargs=argparse.REMAINDER, help="the script's own arguments")
    command.set_defaults(run=profile)

    command = commands.add_parser(
        "bench", parents=[shared], help="time operations, solvers and steps beside a copy, PyTorch and other libraries"
    )
    benchmarks.add_arguments(command)
    command.set_defaults(run=benchmarks.run, error=command.error)

    command = commands.add_parser(
        "report", parents=[shared], help="one HTML page of all results and profiles in a folder"
    )
    command.add_argument("folder", type=Path, metavar="DIR", help="with files of `bench` and of `profile --json`")
    command.add_argument("--out", type=Path, default=Path("report.html"), help="(default: %(default)s)")
    command.set_defaults(run=report)
    return whole


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parser().parse_args(arguments)
    options.line = shlex.join(["python", "-m", "igb_kernels", *(sys.argv[1:] if arguments is None else arguments)])
    result: int = options.run(options)
    return result


if __name__ == "__main__":
    sys.exit(main())
