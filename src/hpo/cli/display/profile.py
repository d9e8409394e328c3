"""Where a run's time went, as a table."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpo.records import StudyProfiled
from hpo.report.text import duration


def profile_report(profiled: StudyProfiled) -> RenderableType:
    """Seconds and shares by phase in the workers, CPU seconds of the other processes, and the slowest operators."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("where the time went", no_wrap=True)
    for column in ("time", "share", "per trial"):
        table.add_column(column, justify="right", no_wrap=True)
    trials, total = max(1, profiled.trials), sum(profiled.phases.values())
    for phase, seconds in profiled.phases.items():
        table.add_row(phase, duration(seconds), f"{seconds / total:.1%}" if total else "", duration(seconds / trials))
    for process, seconds in profiled.outside.items():
        table.add_row(f"{process}, CPU", duration(seconds), "", duration(seconds / trials), style="dim")
    operators = ", ".join(f"{name.removeprefix('aten::')} {share:.0%}" for name, share in profiled.operators.items())
    return Group("", table, *([Text(f"slowest operators: {operators}", "dim")] if operators else []), "")
