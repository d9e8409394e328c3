"""Pictures of one trial; each function returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from hpo.records import Epoch

_TRAIN, _VALID, _MARK = "#7a8aa0", "#1f6feb", "#d1495b"


def training_curves(epochs: Sequence[Epoch], *, best_epoch: int, title: str = "") -> Figure:
    """Loss and accuracy of train and validation over the epochs, the kept epoch marked."""
    figure = Figure(figsize=(9, 3.6), dpi=80, layout="constrained")
    panels = figure.subplots(1, 2)
    numbers = [epoch.number for epoch in epochs]
    for panel, score, label in zip(panels, ("loss", "accuracy"), ("loss (nats per image)", "accuracy"), strict=True):
        marker = "o" if len(numbers) < 3 else None
        for part, colour in (("train", _TRAIN), ("valid", _VALID)):
            values = [epoch.scores[f"{part}_{score}"] for epoch in epochs]
            panel.plot(numbers, values, color=colour, marker=marker, label=part)
        if best_epoch:
            panel.axvline(best_epoch, color=_MARK, linewidth=1, linestyle="--", label=f"best epoch {best_epoch}")
        panel.set_xlabel("epoch")
        panel.set_ylabel(label)
        panel.grid(alpha=0.25)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panels[0].legend(frameon=False)
    figure.suptitle(title)
    return figure


def confusion_figure(confusion: Sequence[Sequence[int]], class_names: Sequence[str], *, title: str = "") -> Figure:
    """Counts of (true, predicted) class, coloured by the share of the true class."""
    count = len(class_names)
    side = max(4.0, 0.62 * count + 2.2)
    figure = Figure(figsize=(side + 0.8, side), dpi=80, layout="constrained")
    panel = figure.subplots()
    shares = [[value / (sum(row) or 1) for value in row] for row in confusion]
    image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for true, row in enumerate(confusion):
        for predicted, value in enumerate(row):
            if value:
                colour = "white" if shares[true][predicted] > 0.55 else "black"
                size = 9 if count <= 12 else 7
                panel.text(predicted, true, str(value), ha="center", va="center", color=colour, fontsize=size)
    panel.set_xticks(range(count), class_names, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(count), class_names)
    panel.set_xlabel("predicted class")
    panel.set_ylabel("true class")
    panel.set_title(title)
    figure.colorbar(image, ax=panel, label="share of the true class", shrink=0.8)
    return figure
