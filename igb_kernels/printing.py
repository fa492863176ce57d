"""Tables in a terminal: drawn by rich where it is installed, else in plain text."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

WIDTH = 120


@dataclass(frozen=True)
class Section:
    """A title, a table, and sentences below it."""

    title: str
    columns: Sequence[str] = ()
    """Empty: the table has no header. Those whose names start with ">" are aligned to the right."""
    rows: Sequence[Sequence[str]] = ()
    notes: Sequence[str] = ()


def plain(sections: Sequence[Section]) -> str:
    """As plain text."""
    return "\n\n".join(_plain(section) for section in sections)


def show(sections: Sequence[Section]) -> None:
    """Prints them, by rich in a terminal."""
    if find_spec("rich") is None or not sys.stdout.isatty():
        print(plain(sections))
        return
    from rich.console import Console
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for i, section in enumerate(sections):
        if i:
            console.print()
        console.print(Text(section.title, style="bold"))
        if section.rows:
            table = Table(show_header=bool(section.columns), box=None, header_style="dim", pad_edge=False)
            for name in section.columns or [""] * len(section.rows[0]):
                justify = "right" if name.startswith(">") else "left"
                table.add_column(name.removeprefix(">"), justify=justify)  # type: ignore[arg-type]
            for row in section.rows:
                table.add_row(*map(Text, row))
            console.print(Padding(table, (0, 0, 0, 2)))
        for note in section.notes:
            console.print(Padding(Text(note), (0, 0, 0, 2)))


def _plain(section: Section) -> str:
    lines = [section.title]
    right = [name.startswith(">") for name in section.columns]
    header = [[name.removeprefix(">") for name in section.columns]] if section.columns else []
    rows = [*header, *section.rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            cell.rjust(width) if i < len(right) and right[i] else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        start = len("  ".join(cells[:-1])) + 4 if len(cells) > 1 else 4
        line = "  " + "  ".join(cells).rstrip()
        narrow = start > WIDTH // 2  # nothing can be read that is wrapped into what is left
        lines += [line] if narrow else textwrap.wrap(line, WIDTH, subsequent_indent=" " * start) or [""]
    for note in section.notes:
        lines += textwrap.wrap(note, WIDTH, initial_indent="  ", subsequent_indent="  ")
    return "\n".join(lines)
