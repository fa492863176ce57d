"""What the doctor finds, and whether all is right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from igb_kernels.backends import FASTEST_FIRST, backends, resolve
from igb_kernels.doctor.installation import installation
from igb_kernels.doctor.selftest import Check, places, timed
from igb_kernels.printing import Section


@dataclass(frozen=True)
class Choice:
    """The backend that a kind of device gets."""

    device: str
    backend: str
    why: str
    """Why not a better one; empty where there is none."""


@dataclass(frozen=True)
class Tested:
    """The checks of one backend on one device."""

    backend: str
    device: str
    checks: Sequence[Check]
    seconds: float

    @property
    def failed(self) -> list[Check]:
        """Those that found something wrong."""
        return [check for check in self.checks if not check.right]

    @property
    def worst(self) -> float:
        """The largest error, as a share of what it may be."""
        return max(check.error / check.limit if check.limit else check.error for check in self.checks)


@dataclass(frozen=True)
class Diagnosis:
    """What was found."""

    installation: dict[str, str]
    backends: dict[str, str]
    choices: Sequence[Choice]
    tested: Sequence[Tested]

    @property
    def problems(self) -> list[str]:
        """What is wrong, in words: a device without kernels, or a check that failed."""
        slow = [
            f"{c.device} gets the slow reference backend: {c.why}" for c in self.choices if c.backend == "reference"
        ]
        return slow + [str(check) for tested in self.tested for check in tested.failed]

    @property
    def verdict(self) -> str:
        """The last line."""
        count = sum(len(tested.checks) for tested in self.tested)
        if not self.problems:
            return f"All right: {count} checks agree."
        return f"Not all right: {len(self.problems)} problem{'s' if len(self.problems) > 1 else ''} above."

    def sections(self) -> list[Section]:
        """For the terminal."""
        choices = [(c.device, c.backend, c.why) for c in self.choices]
        tested = [
            (t.backend, t.device, str(len(t.checks)), str(len(t.failed)), f"{t.worst:.2g}", f"{t.seconds:.2f} s")
            for t in self.tested
        ]
        parts = [
            Section("Installed", rows=list(self.installation.items())),
            Section("Backends", rows=list(self.backends.items())),
            Section("Devices", ("device", "gets", "why not a better one"), choices),
            Section(
                "Self-test: operations, solvers, loss rules and steps, against float64",
                ("backend", "device", ">checks", ">failed", ">worst error / limit", ">time"),
                tested,
            ),
        ]
        if self.problems:
            parts.append(Section("Problems", notes=self.problems))
        return [*parts, Section(self.verdict)]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "right": not self.problems,
            "verdict": self.verdict,
            "problems": self.problems,
            "installation": self.installation,
            "backends": self.backends,
            "devices": [asdict(choice) for choice in self.choices],
            "self_test": [
                {
                    "backend": t.backend,
                    "device": t.device,
                    "seconds": t.seconds,
                    "checks": [{**asdict(check), "right": check.right} for check in t.checks],
                }
                for t in self.tested
            ],
        }


def diagnose() -> Diagnosis:
    """Looks at everything; takes about two seconds, and more where Triton compiles or is interpreted."""
    tested = [Tested(name, str(device), *timed(name, device)) for name, device in places()]
    return Diagnosis(installation(), {name: str(there) for name, there in backends().items()}, list(_choices()), tested)


def _choices() -> list[Choice]:
    kinds = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    choices = []
    for kind in kinds:
        chosen = resolve("auto", kind).__name__.rpartition(".")[2]  # type: ignore[attr-defined]  # it is a module
        faster = [name for name in FASTEST_FIRST[kind] if not backends()[name]]
        if chosen in FASTEST_FIRST[kind]:
            before = FASTEST_FIRST[kind][: FASTEST_FIRST[kind].index(chosen)]
            faster = [name for name in faster if name in before]
        why = "; ".join(f"{name}: {backends()[name].detail}" for name in faster)
        choices.append(Choice(kind, chosen, why or "it is the fastest that there is"))
    return choices
