"""Figures of how sure a classifier is of its answers: reliability, and accuracy against coverage."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.report.figures import BLUE, GREY, PALE, RED, is_narrow, legend, placed_figure, tidy
from hpo.report.statistics import accuracy_at_coverage, reliability

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Probabilities = NDArray[np.floating]


def reliability_figure(
    labels: NDArray[np.integer], probabilities: Probabilities, before: Probabilities | None = None, *, title: str = ""
) -> Figure:
    """Accuracy over confidence in 15 bins (Niculescu-Mizil & Caruana 2005), and how many images each bin has.

    labels (n,), probabilities (n, classes); before are those without a temperature, where there is one.
    """
    drawn: list[tuple[str, Probabilities, dict[str, Any]]] = [
        ("with the temperature" if before is not None else "", probabilities, {"color": BLUE, "marker": "o"})
    ]
    if before is not None:
        drawn.insert(0, ("without", before, {"color": RED, "marker": "s", "linestyle": "--"}))
    wide = 3.55 if is_narrow() else 4.0
    figure, (panel, below) = placed_figure(wide + 0.85, 5.1, [(0.7, 1.75, wide, 2.85), (0.7, 0.5, wide, 1.0)])
    panel.plot([0, 1], [0, 1], color=PALE, linewidth=1, zorder=0)
    for label, found, style in drawn:
        bins = reliability(labels, found)
        text = f"{label}: error {bins.error:.4f}" if label else f"calibration error {bins.error:.4f}"
        seen = bins.counts > 0
        panel.plot(bins.confidence[seen], bins.accuracy[seen], markersize=4, linewidth=1.3, label=text, **style)
        places = (np.arange(len(bins.counts)) + 0.5) / len(bins.counts)
        below.step(places, bins.counts, where="mid", color=style["color"], linestyle=style.get("linestyle", "-"))
    legend(panel, loc="upper left")
    tidy(panel, y="accuracy", title=title)
    tidy(below, x="confidence: the highest probability", y="images")
    below.set_yscale("symlog", linthresh=1)
    below.set_ylim(bottom=0)
    for each in (panel, below):
        each.set_xlim(-0.01, 1.01)
    panel.set_ylim(-0.01, 1.01)
    return figure


def coverage_figure(labels: NDArray[np.integer], probabilities: Probabilities, *, title: str = "") -> Figure:
    """Accuracy among the images that are answered, over their share, the surest first (El-Yaniv & Wiener 2010).

    labels (n,), probabilities (n, classes).
    """
    curve = accuracy_at_coverage(labels, probabilities)
    wide = 3.55 if is_narrow() else 4.6
    figure, (panel,) = placed_figure(wide + 0.95, 3.7, [(0.8, 0.55, wide, 2.7)])
    panel.plot(curve.coverage, curve.accuracy, color=BLUE, linewidth=1.5)
    panel.axhline(curve.accuracy[-1], color=GREY, linewidth=1, linestyle=":", label="all answered")
    tidy(panel, x="coverage: share of the images that are answered", y="accuracy of those", title=title)
    legend(panel, loc="lower left")
    panel.set_xlim(-0.01, 1.01)
    low = float(curve.accuracy[len(curve.accuracy) // 20 :].min())
    panel.set_ylim(low - 0.06 * (1 - low) - 1e-3, 1 + 0.06 * (1 - low) + 1e-3)
    return figure
