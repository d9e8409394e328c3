"""Pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from hpo.report.comparison import Comparison, Contestant
from hpo.report.figures.style import GREY, line_style, new_figure, tidy
from hpo.report.roc import Roc

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def roc_figure(comparison: Comparison) -> Figure:
    """ROC curves of all contestants that have one: whole, and the upper left corner where good models differ.

    With two classes a dot marks where each one's decisions lie.
    """
    from matplotlib.ticker import MaxNLocator

    binary = len(comparison.class_names) == 2
    drawn = [(contestant, contestant.curve) for contestant in comparison.contestants if contestant.curve is not None]
    figure = new_figure(9.6, 4.6 + 0.25 * len(drawn))
    whole, corner = figure.subplots(1, 2)
    for panel in (whole, corner):
        for index, (contestant, curve) in enumerate(drawn):
            style = line_style(index)
            label = f"{contestant.name} ({contestant.model}), area {curve.area:.4f}"
            panel.plot(curve.false_rate, curve.true_rate, label=label, linewidth=1.6, **style)
            if binary:
                _mark(panel, contestant, style["color"])
    whole.plot([0, 1], [0, 1], color=GREY, linewidth=1, linestyle=":", label="chance")
    kind = f"ROC, positive: {comparison.class_names[1]}" if binary else "ROC, mean of one class against the rest"
    tidy(whole, x="false positive rate", y="true positive rate", title=kind)
    tidy(corner, x="false positive rate", title="its upper left corner" + ("; dots: decisions" if binary else ""))
    edge = _edge([curve for _, curve in drawn])
    whole.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01))
    corner.set(xlim=(-0.01 * edge, edge), ylim=(1 - edge, 1 + 0.01 * edge))
    for axis in (corner.xaxis, corner.yaxis):
        axis.set_major_locator(MaxNLocator(5))
    handles, labels = whole.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", frameon=False, fontsize=9)
    figure.suptitle(f"{comparison.image_count:,} {comparison.part} images", fontsize=11)
    return figure


def _mark(panel: Axes, contestant: Contestant, colour: str) -> None:
    (true_negative, false_positive), (false_negative, true_positive) = contestant.confusion
    false_rate = false_positive / (false_positive + true_negative)
    true_rate = true_positive / (true_positive + false_negative)
    panel.plot(false_rate, true_rate, marker="o", color=colour, markersize=6, markeredgecolor="white")


def _edge(curves: Sequence[Roc]) -> float:
    """The side of the corner that shows where every curve turns."""
    for edge in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        if min(np.interp(edge / 3, curve.false_rate, curve.true_rate) for curve in curves) >= 1 - edge / 3:
            return edge
    return 1.0
