"""Pictures of a trial and of a study; each function returns a matplotlib Figure and touches no global state."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hpo.records import FINAL, Epoch, StudyResult, TrialState

_LABEL = 24  # letters of a class name
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
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
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
    names = [_short(name) for name in class_names]
    panel.set_xticks(range(count), names, rotation=45, ha="right", rotation_mode="anchor")
    panel.set_yticks(range(count), names)
    panel.set_xlabel("predicted class")
    panel.set_ylabel("true class")
    panel.set_title(title)
    figure.colorbar(image, ax=panel, label="share of the true class", shrink=0.8)
    return figure


def _short(name: str) -> str:
    """A class name that leaves room for the matrix."""
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 1].rstrip(' (,')}…"


def optimisation_history(study: StudyResult) -> Figure:
    """The objective of every trial in the order of their numbers, and the best so far."""
    figure = Figure(figsize=(7, 3.8), dpi=80, layout="constrained")
    panel = figure.subplots()
    searched = [trial for trial in study.trials if trial.candidate.stage != FINAL and trial.value is not None]
    for state, colour, marker in ((TrialState.COMPLETE, _VALID, "o"), (TrialState.PRUNED, _TRAIN, "x")):
        chosen = [trial for trial in searched if trial.state is state]
        if chosen:
            numbers, values = [trial.number for trial in chosen], [trial.value or 0.0 for trial in chosen]
            panel.scatter(numbers, values, color=colour, marker=marker, s=24, label=state.value, zorder=3)
    complete = [trial for trial in searched if trial.state is TrialState.COMPLETE]
    better = max if study.direction == "maximize" else min
    best = list(accumulate((trial.value or 0.0 for trial in complete), better))
    panel.step([trial.number for trial in complete], best, where="post", color=_MARK, label="best so far")
    panel.set_xlabel("trial")
    panel.set_ylabel(study.objective)
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.grid(alpha=0.25)
    panel.legend(frameon=False)
    return figure


def slices(study: StudyResult, *, columns: int = 3) -> Figure:
    """The objective over each parameter, one panel each; colour goes from early to late trials."""
    trials = [trial for trial in study.ranked() if trial.candidate.parameters]
    paths = sorted({path for trial in trials for path in trial.candidate.parameters})
    search = study.spec.get("search") or {}
    spaces = [search.get("space") or {}, *(stage["space"] for stage in search.get("stages") or ())]
    logarithmic = {path for space in spaces for path, parameter in space.items() if parameter.get("log")}
    rows = max(1, -(-len(paths) // columns))
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), dpi=80, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for panel, path in zip(panels, paths, strict=False):
        chosen = [trial for trial in trials if path in trial.candidate.parameters]
        values = [trial.candidate.parameters[path] for trial in chosen]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
        names = values if numeric else [str(value) for value in values]
        panel.scatter(names, [trial.value for trial in chosen], c=[t.number for t in chosen], cmap="viridis", s=20)
        if path in logarithmic:
            panel.set_xscale("log")
        panel.set_xlabel(path, fontsize=8)
        panel.tick_params(axis="x", labelsize=7, rotation=0 if numeric else 20)
        panel.grid(alpha=0.25)
    for panel in panels[len(paths) :]:
        panel.set_visible(False)
    for row in panels[::columns]:
        row.set_ylabel(study.objective, fontsize=8)
    return figure
