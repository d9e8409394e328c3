"""Figures of a page's first look: the score next to published ones, and the share of each class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hpo.metrics import highest_of, label_of
from hpo.report.figures import BLUE, GREEN, GREY, RED, is_narrow, legend, name_inches, placed_figure, tidy
from hpo.report.text import short_names

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Score:
    """A score with the ends of its interval, if it has one. own: of this study, not a published one."""

    name: str
    value: float
    ends: tuple[float, float] | None = None
    own: bool = False


def scores_figure(scores: Sequence[Score], *, score: str) -> Figure:
    """Scores of one kind as points with their intervals, one below the other: own ones in colour."""
    names = short_names([each.name for each in scores], 26 if is_narrow() else 48)
    left, high, wide = 0.2 + name_inches(names), 0.32 * len(scores), 2.0 if is_narrow() else 4.6
    figure, (panel,) = placed_figure(left + wide + 0.7, 0.65 + high, [(left, 0.5, wide, high)])
    for row, each in enumerate(scores):
        colour = RED if each.own else GREY
        if each.ends is not None:
            panel.plot(each.ends, [row, row], color=colour, linewidth=2, solid_capstyle="round")
        panel.plot(each.value, row, "o" if each.own else "D", color=colour, markersize=7 if each.own else 5)
        panel.text(1.02, row, f"{each.value:.4f}", transform=panel.get_yaxis_transform(), va="center", fontsize=8)
    tidy(panel, x=label_of(score))
    panel.set_yticks(range(len(scores)), names, fontsize=8)
    panel.set_ylim(len(scores) - 0.5, -0.5)
    low, high_end = panel.get_xlim()
    panel.set_xlim(low, max(min(high_end, highest_of(score)), max(each.value for each in scores)))
    panel.grid(visible=False, axis="y")
    return figure


def class_shares_figure(shares: Mapping[str, Sequence[float]], class_names: Sequence[str]) -> Figure:
    """The share of each class in each part (train, valid, test), as bars next to each other."""
    names = short_names(class_names, 24 if is_narrow() else 40)
    step = 0.11 * len(shares) + 0.1
    left, high, wide = 0.2 + name_inches(names), step * len(names), 2.4 if is_narrow() else 4.6
    figure, (panel,) = placed_figure(left + wide + 0.8, 0.9 + high, [(left, 0.5, wide, high)])
    thick = 0.86 / len(shares)
    for index, (part, values) in enumerate(shares.items()):
        places = [row + (index - (len(shares) - 1) / 2) * thick for row in range(len(names))]
        panel.barh(places, [100 * value for value in values], thick, color=(BLUE, RED, GREEN)[index % 3], label=part)
    # One number a class: bars that agree need no three.
    first = next(iter(shares.values()))
    for row in range(len(names)):
        longest = max(values[row] for values in shares.values())
        panel.text(100 * longest, row, f"  {first[row]:.1%}", va="center", fontsize=7, color=GREY)
    tidy(panel, x="percent of the part")
    panel.set_yticks(range(len(names)), names, fontsize=8)
    panel.set_ylim(len(names) - 0.4, -0.6)
    panel.set_xlim(0, 115 * max(max(values) for values in shares.values()))
    panel.grid(visible=False, axis="y")
    legend(panel, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0.2)
    return figure
