"""Where a run's time went, as a table and a line for each limit."""

from __future__ import annotations

import math

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from hpo.profile import Limit, StudyProfiled
from hpo.report.text import duration


def profile_report(profiled: StudyProfiled) -> RenderableType:
    """Seconds, shares and CPU seconds by phase, in the workers and beside them; then what the device could do."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim", pad_edge=False)
    table.add_column("where the time went", no_wrap=True)
    for column in ("time", "share", "CPU", "a trial"):
        table.add_column(column, justify="right", no_wrap=True)
    trials = max(1, profiled.trials)
    whole = sum(seconds for seconds, _ in profiled.phases.values())
    for phase, (seconds, cpu_seconds) in profiled.phases.items():
        table.add_row(*_cells(phase, seconds, f"{seconds / whole:.1%}" if whole else "", cpu_seconds, trials))
    for phase, (seconds, cpu_seconds) in profiled.beside.items():
        table.add_row(*_cells(f"beside: {phase}", seconds, "", cpu_seconds, trials), style="dim")
    lines = [Text(limit_line(limit), overflow="fold") for limit in profiled.limits]
    title = Text("forward and backward, of what plain products and plain copies reach here", "dim")
    return Group("", table, "", *([title] if lines else []), *lines, "")


def _cells(phase: str, seconds: float, share: str, cpu_seconds: float, trials: int) -> list[str]:
    return [phase, duration(seconds), share, duration(cpu_seconds), duration(seconds / trials)]


def limit_line(limit: Limit) -> str:
    """float32, cpu, 1 thread: 72.3 of 95 GFLOP/s (76%), 3.1 of 27 GB/s (11%), 23 FLOP a byte: arithmetic limits it."""
    threads = f"{limit.threads} thread{'s' if limit.threads != '1' else ''}"
    place = f"{limit.device}, {threads}" if limit.device == "cpu" else limit.device
    flops, traffic = _share(limit.flops, limit.peak_flops, "FLOP/s"), _share(limit.traffic, limit.peak_traffic, "B/s")
    return f"{limit.precision}, {place}: {flops}, {traffic}, {limit.intensity:.1f} FLOP a byte: {_BOUNDS[limit.bound]}"


_BOUNDS = {
    "arithmetic": "arithmetic limits it",
    "memory": "memory limits it",
    "neither": "far below either limit",
}


def _share(reached: float, peak: float, unit: str) -> str:
    power = min(max(0, int(math.log10(peak)) // 3), 4)
    scale = 1000.0**power
    return (
        f"{reached / scale:.3g} of {peak / scale:.3g} {'kMGT'[power - 1] if power else ''}{unit} ({reached / peak:.0%})"
    )
