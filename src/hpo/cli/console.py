"""Output through rich: the terminal's colours, tables that fit its width, and text of others that steers nothing."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hpo.cli.silence import break_silence
from hpo.errors import clean


class _Console(Console):
    """It shows what files of others hold, and obeys nothing of it."""

    def render(self, renderable: Any, options: Any = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(clean(segment.text), segment.style)


def make_console(*, stderr: bool = False) -> Console:
    """A rich console for stdout or stderr: no ANSI with NO_COLOR or without a terminal, no cut lines in a pipe."""
    break_silence()
    stream = sys.stderr if stderr else sys.stdout
    # Programs that read a pipe need whole rows; COLUMNS overrides this.
    width = None if stream.isatty() or "COLUMNS" in os.environ else 1000
    colors = None if os.environ.get("NO_COLOR") or not stream.isatty() else "auto"
    return _Console(
        stderr=stderr,
        highlight=False,
        markup=False,
        emoji=False,
        width=width,
        color_system=colors,  # type: ignore[arg-type]
    )


def print_table(rows: Iterable[Sequence[object]], columns: Sequence[str]) -> None:
    """The table of hpo.cli.output.print_table, in the width of the terminal."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    for column in columns:
        table.add_column(
            column.lstrip(">~"),
            justify="right" if column.startswith(">") else "left",
            no_wrap=not column.startswith("~"),
        )
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    make_console().print(table)


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Labels and values in two columns."""
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for label, words in facts:
        grid.add_row(Text(label, "dim"), Text(words))
    make_console().print(grid)
