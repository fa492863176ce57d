"""Checkouts of other libraries, of those that are no packages, or of newer versions than the packages."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

from igb_kernels.bench import peers


def libmtl(part: str) -> ModuleType:
    """A part of LibMTL, of its checkout in the folder IGB_PEERS or else of the installed one."""
    if "LibMTL" not in sys.modules and (folder := checkout("median-research-group/LibMTL")) is not None:
        sys.path.insert(0, str(folder))
    return peers.libmtl(part)


def checkout(repository: str) -> Path | None:
    """The checkout of "owner/name" in the folder that IGB_PEERS names, or None."""
    folder = Path(os.environ.get("IGB_PEERS", "")) / repository.replace("/", "+")
    return folder if "IGB_PEERS" in os.environ and folder.is_dir() else None


@contextmanager
def importing_from(folder: Path, substitutes: Mapping[str, ModuleType | None] | None = None) -> Iterator[None]:
    """Imports find the checkout's `methods` and `experiments` first, and these modules instead of the named ones (None:
    there is none); afterwards all is as before."""
    substitutes = substitutes or {}

    def set_aside() -> dict[str, ModuleType]:
        names = [
            name for name in sys.modules if name.split(".")[0] in ("methods", "experiments") or name in substitutes
        ]
        return {name: sys.modules.pop(name) for name in names}

    before, writes = set_aside(), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.modules.update(substitutes)
    sys.dont_write_bytecode = True  # nothing is left in the checkout
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        sys.dont_write_bytecode = writes
        set_aside()
        sys.modules.update(before)
