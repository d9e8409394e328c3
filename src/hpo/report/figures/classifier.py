"""Figures of trained classifiers: curves, confusion, ROC; of one, or of several on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import direction_of, label_of
from hpo.records import Epoch
from hpo.report.figures import (
    BLACK,
    BLUE,
    GREY,
    PALE,
    RED,
    is_narrow,
    legend,
    line_style,
    name_inches,
    new_figure,
    placed_figure,
    tidy,
)
from hpo.report.statistics import Roc, roc, roc_per_class
from hpo.report.text import short_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from hpo.report.comparison import Comparison, Contestant

_SIDE_BY_SIDE = 12  # with more classes one matrix is above the other


def training_curves(epochs: Sequence[Epoch], *, best_epoch: int = 0, title: str = "") -> Figure:
    """Loss and accuracy of train and validation over the epochs, further validation scores, the kept epoch marked.

    Each fold has a line of its own. Without a validation part its lines are missing; best_epoch 0 marks none.
    """
    plotted = ("valid_loss", "valid_accuracy")
    further = [
        score
        for score in epochs[0].scores
        if score.startswith("valid_") and score not in plotted and direction_of(score) == "maximize"
    ]
    count = 3 if further else 2
    if is_narrow():
        boxes = [(0.7, 0.55 + 3.2 * index, 3.5, 2.5) for index in reversed(range(count))]
        figure, panels = placed_figure(4.4, 3.2 * count + 0.3, boxes)
    else:
        boxes = [(0.7 + 3.95 * index, 0.55, 3.1, 2.5) for index in range(count)]
        figure, panels = placed_figure(3.95 * count, 3.5, boxes)
    folds = sorted({epoch.fold for epoch in epochs})
    shown = [("train_loss", "valid_loss"), ("train_accuracy", "valid_accuracy"), further]
    for panel, scores in zip(panels, shown, strict=False):
        for index, score in enumerate(score for score in scores if score in epochs[0].scores):
            for fold in folds:
                chosen = [epoch for epoch in epochs if epoch.fold == fold]
                panel.plot(
                    [epoch.number for epoch in chosen],
                    [epoch.scores[score] for epoch in chosen],
                    color=GREY if score.startswith("train") else line_style(index if scores is further else 0)["color"],
                    linestyle="--" if score.startswith("train") else "-",
                    marker="o" if len(chosen) < 3 else None,
                    alpha=1.0 if len(folds) == 1 else 0.6,
                    label=(
                        ("train" if score.startswith("train") else "validation")
                        if scores is not further
                        else label_of(score[6:])
                    )
                    if fold == folds[0]
                    else None,
                )
        if best_epoch:
            panel.axvline(best_epoch, color=RED, linewidth=1, linestyle="-.", label=f"best epoch {best_epoch}")
        heads = ("loss (nats per image)", "accuracy", "validation score")
        tidy(panel, x="epoch", y=heads[panels.index(panel)], whole="x")
        legend(panel)
    figure.suptitle(title, fontsize=11)
    return figure


def confusion_figure(confusion: Sequence[Sequence[int]], class_names: Sequence[str], *, title: str = "") -> Figure:
    """(true, predicted) counts, and next to or below them the same as percent of the true class."""
    counts = np.asarray(confusion)
    count = len(class_names)
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = short_names(class_names)
    wide = count <= _SIDE_BY_SIDE and not is_narrow()
    side = max(2.4, (0.48 if wide else 0.34 if is_narrow() else 0.4) * count)
    left = 0.45 + name_inches(names)
    below, above, gap = 0.45 + 0.72 * name_inches(names), 0.7, 0.35
    width = left + (2 * side + gap if wide else side) + 0.95
    height = below + (side if wide else 2 * side + gap) + above
    places = [(left, below), (left + side + gap, below)] if wide else [(left, below + side + gap), (left, below)]
    boxes = [*((x, y, side, side) for x, y in places), (width - 0.75, below, 0.15, side)]
    figure, (*panels, bar) = placed_figure(width, height, boxes)
    for panel, (x, y), values in zip(panels, places, (counts, shares), strict=True):
        image = panel.pcolormesh(shares, cmap="Blues", vmin=0, vmax=1, edgecolors="#E5E8EC", linewidth=0.5)
        panel.invert_yaxis()
        form = _count_text if values is counts else _percent_text
        size = 9 if count <= 4 else 8 if wide else 7
        for true, predicted in zip(*np.nonzero(counts), strict=True):
            colour = "white" if shares[true, predicted] > 0.55 else BLACK
            text = form(values[true, predicted])
            panel.text(predicted + 0.5, true + 0.5, text, ha="center", va="center", color=colour, fontsize=size)
        panel.set_title("images" if values is counts else "percent of the true class", fontsize=10)
        middles, lowest, leftmost = np.arange(count) + 0.5, y == below, x == left
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        panel.set_xticks(middles, names if lowest else [""] * count, fontsize=8, **slanted)
        panel.set_yticks(middles, names if leftmost else [""] * count, fontsize=8)
        panel.tick_params(length=0)
        panel.spines[:].set_visible(False)
        if lowest:
            figure.text((x + side / 2) / width, 0.08 / height, "predicted class", fontsize=9, ha="center", va="bottom")
        if leftmost:
            figure.text(0.08 / width, (y + side / 2) / height, "true class", fontsize=9, va="center", rotation=90)
    figure.colorbar(image, cax=bar).set_label("share of the true class", fontsize=9)
    bar.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=11, y=1 - 0.1 / height, va="top")
    return figure


def roc_figure(
    labels: NDArray[np.integer], probabilities: NDArray[np.floating], class_names: Sequence[str], *, title: str = ""
) -> Figure:
    """labels (n,), probabilities (n, classes) -> each class against the others, smallest area first.

    Two classes have one curve, of the second.
    """
    binary = len(class_names) == 2 and labels.ndim == 1
    names = short_names(class_names)
    legend_width = 0.0 if binary or is_narrow() else 1.1 + name_inches(names)
    below = 0.18 * len(names) + 0.6 if is_narrow() and not binary else 0.0  # the height of the legend there
    figure, (panel,) = placed_figure(4.7 + legend_width, 4.7 + below, [(0.65, 0.55 + below, 3.8, 3.8)])
    if binary:
        curves = [(names[1], roc(labels == 1, probabilities[:, 1]))]
    else:
        curves = list(zip(names, roc_per_class(labels, probabilities), strict=True))
    found = sorted(((name, curve) for name, curve in curves if curve), key=lambda pair: pair[1].area)
    for index, (name, curve) in enumerate(found):
        label = f"{curve.area:.4f}  {name}"
        panel.plot(curve.false_rate, curve.true_rate, linewidth=1.4, label=label, **line_style(index))
    panel.plot([0, 1], [0, 1], color=PALE, linewidth=1, zorder=0)
    if found:
        mean = float(np.mean([curve.area for _, curve in found]))
        heading = "area under the curve" if binary else f"area under the curve\n{mean:.4f}  mean (macro)"
        beside = {"loc": "upper left", "bbox_to_anchor": (0, -0.12)} if below else {"loc": "center left"}
        place = {"loc": "lower right"} if binary else {"bbox_to_anchor": (1.0, 0.5), **beside}
        legend(panel, title=heading, title_fontsize=8, alignment="left", **place)
    tidy(panel, x="false positive rate", y="true positive rate", title=title)
    panel.set_xlim(-0.01, 1.01)
    panel.set_ylim(-0.01, 1.01)
    return figure


def compared_roc_figure(comparison: Comparison) -> Figure:
    """ROC curves of all contestants that have one: whole, and the upper left corner, where good models differ.

    With two classes, a dot marks the rates of each one's decisions.
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
    """The side of the corner that contains the bend of every curve."""
    for edge in (0.01, 0.02, 0.05, 0.1, 0.2, 0.5):
        if min(np.interp(edge / 3, curve.false_rate, curve.true_rate) for curve in curves) >= 1 - edge / 3:
            return edge
    return 1.0


def class_accuracy_figure(confusion: Sequence[Sequence[int]], class_names: Sequence[str], *, title: str = "") -> Figure:
    """The recall of each class, worst first, with the accuracy over all images."""
    counts = np.asarray(confusion)
    hits, supports = counts.diagonal(), counts.sum(axis=1)
    order = sorted(
        range(len(class_names)), key=lambda label: (-hits[label] / max(supports[label], 1), class_names[label])
    )
    names = short_names([class_names[label] for label in order], 24 if is_narrow() else 40)
    recalls = hits[order] / np.maximum(supports[order], 1)
    accuracy = float(hits.sum() / max(supports.sum(), 1))
    left, high, wide = 0.2 + name_inches(names), 0.27 * len(order), 2.0 if is_narrow() else 4.0
    figure, (panel,) = placed_figure(left + wide + 1.3, 0.95 + high, [(left, 0.55, wide, high)])
    panel.barh(range(len(order)), recalls, color=BLUE, height=0.7)
    for row, label in enumerate(order):
        panel.text(1.02, row, f"{hits[label]} of {supports[label]}", va="center", fontsize=8)
    heading = f"overall {accuracy:.4f} (line)" if is_narrow() else f"overall accuracy {accuracy:.4f} (line)"
    panel.axvline(accuracy, color=RED, linewidth=1.2)
    tidy(panel, x="accuracy within the class", title=f"{title}: {heading}" if title else heading)
    panel.set_yticks(range(len(order)), names, fontsize=8)
    panel.set_xlim(0, 1)
    panel.set_ylim(-0.6, len(order) - 0.4)
    panel.grid(visible=False, axis="y")
    return figure


def _count_text(value: float) -> str:
    return f"{value:.0f}" if value < 10_000 else f"{value / 1000:.0f}k"


def _percent_text(value: float) -> str:
    percent = 100 * value
    return "<1" if percent < 1 else f"{percent:.0f}" if percent > 99.95 or percent < 9.95 else f"{percent:.1f}"
