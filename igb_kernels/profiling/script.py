"""A user's training script, run with every balancer that it makes profiled."""

from __future__ import annotations

import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from igb_kernels.balancer import Balancer
from igb_kernels.profiling.profile import profile


class _Enough(BaseException):
    """Ends the script: all balancers have been measured."""


def profile_script(
    path: Path, arguments: Sequence[str], *, warmup: int, steps: int, reference: bool, to_end: bool
) -> tuple[list[profile], bool]:
    """Runs the script as `python path arguments` would, until each of its balancers that takes steps has been measured,
    or, with `to_end`, to its end. Returns the profiles of those that took steps, and whether the script went well; if
    not, its traceback has been printed."""
    profiles: list[profile] = []
    make: Any = Balancer.__init__
    backward: Any = Balancer.backward

    def make_profiled(balancer: Balancer, *rest: Any, **options: Any) -> None:
        make(balancer, *rest, **options)
        profiles.append(profile(balancer, warmup=warmup, steps=steps, reference=reference).__enter__())

    def backward_or_end(balancer: Balancer, *rest: Any, **options: Any) -> Any:
        begun = [p for p in profiles if p.begun]
        if not to_end and begun and all(p.finished for p in begun):
            raise _Enough
        return backward(balancer, *rest, **options)

    before = sys.argv, sys.path[:], Balancer.__init__, Balancer.backward
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.resolve().parent)
    Balancer.__init__, Balancer.backward = make_profiled, backward_or_end  # type: ignore[assignment, method-assign]
    try:
        right = _run(path)
    finally:
        sys.argv, sys.path[:], Balancer.__init__, Balancer.backward = before  # type: ignore[method-assign]
        for p in reversed(profiles):
            p.__exit__(None, None, None)
    return [p for p in profiles if p.begun], right


def _run(path: Path) -> bool:
    try:
        runpy.run_path(str(path), run_name="__main__")
    except _Enough:
        pass
    except SystemExit as left:
        if left.code not in (None, 0):
            print(f"{path} ended with {left.code!r}", file=sys.stderr)
            return False
    except Exception:
        traceback.print_exc()
        return False
    return True
