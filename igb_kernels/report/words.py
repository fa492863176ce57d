"""Numbers as people read them."""

from __future__ import annotations

import math

SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def digits(value: float, of: int = 3) -> str:
    """So many significant digits, without an exponent where it would be short."""
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if not -5 <= exponent < 7:
        return f"{value:.{of - 1}e}"
    rounded = round(value, of - 1 - exponent)
    return f"{rounded:.{max(0, of - 1 - math.floor(math.log10(abs(rounded))))}f}"


TIMES = ((1e3, "s"), (1.0, "ms"), (0.0, "µs"))
SIZES = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (0.0, "B"))
COUNTS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (0.0, ""))


def _unit(value: float, units: tuple[tuple[float, str], ...], smallest: float) -> tuple[float, str]:
    scale, unit = next((u for u in units if abs(value) >= u[0]), units[-1])
    return value / (scale or smallest), unit


def time(ms: float, of: int = 3) -> str:
    """With its unit."""
    value, unit = _unit(ms, TIMES, 1e-3)
    return f"{digits(value, of)} {unit}"


def time_at_tick(ms: float) -> str:
    """A round time."""
    value, unit = _unit(ms, TIMES, 1e-3)
    return f"{value:.3g} {unit}"


def count(value: float) -> str:
    """Of elements: 23.5 M."""
    scaled, unit = _unit(value, COUNTS, 1.0)
    return f"{scaled:.3g} {unit}".rstrip()


def size(value: float) -> str:
    """Of bytes: 282 MB, by thousands."""
    scaled, unit = _unit(value, SIZES, 1.0)
    return f"{scaled:.3g} {unit}"


def power(value: float) -> str:
    """Of ten, where it is one."""
    return "10" + str(round(math.log10(value))).translate(SUPERSCRIPT)


def several(values: list[str]) -> str:
    """a, b and c."""
    return " and ".join([", ".join(values[:-1]), values[-1]]) if len(values) > 1 else "".join(values)


def number(of: int, what: str) -> str:
    """1 file, 2 files."""
    return f"{of} {what}" + ("" if of == 1 else "s")
