"""Figures of a study: optimisation history, learning curves, timeline, parameter importance, Pareto front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate, combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.metrics import highest_of, label_of
from hpo.records import AFTER_SEARCH, ENSEMBLE, Epoch, StudyResult, Trial, TrialState
from hpo.report.figures import (
    BLACK,
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    PALE,
    PINK,
    RED,
    columns_of,
    fit_y,
    is_narrow,
    legend,
    line_style,
    log_axes,
    mark_outside,
    mark_trials,
    new_figure,
    panels_of,
    tidy,
)
from hpo.report.hypervolume import hypervolume_history
from hpo.report.summary import groups, stage_of
from hpo.report.text import short_name, short_paths, value_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# state -> colour and marker
_STATES = {
    TrialState.COMPLETE: (BLUE, "o"),
    TrialState.PRUNED: (GREY, "x"),
    TrialState.FAILED: (RED, "v"),
    TrialState.STOPPED: (ORANGE, "s"),
    TrialState.RUNNING: (PINK, "D"),
    TrialState.PAUSED: (PINK, "x"),
}
_ABOVE: Mapping[str, Any] = {"loc": "lower left", "bbox_to_anchor": (0, 1), "borderaxespad": 0.2}
_NAMED = 8  # curves with a colour and a name of their own


def optimisation_history(study: StudyResult) -> Figure | None:
    """Each objective of every trial by trial number, the best so far, and the first trial of each stage."""
    searched = [
        trial for trial in study.trials if trial.candidate.stage not in AFTER_SEARCH and trial.value is not None
    ]
    if not searched:
        return None
    aims = study.objectives or ((study.objective, study.direction),)
    figure = new_figure(8.4, 3.9 if len(aims) == 1 else 2.6 * len(aims))
    panels = panels_of(figure, len(aims), columns=1)
    for index, (panel, (score, direction)) in enumerate(zip(panels, aims, strict=True)):
        for state, (colour, marker) in _STATES.items():
            chosen = [trial for trial in searched if trial.state is state]
            if chosen:
                numbers, values = [trial.number for trial in chosen], [_aim(trial, index) for trial in chosen]
                points = panel.scatter(numbers, values, color=colour, marker=marker, s=22, label=state.value, zorder=3)
                mark_trials(points, numbers)
        complete = [t for t in searched if t.state is TrialState.COMPLETE and (t.result is None or t.result.feasible)]
        if complete:
            best = list(accumulate((_aim(trial, index) for trial in complete), _BETTER[direction]))
            numbers = [trial.number for trial in complete]
            # The line continues to the last trial, since none was better.
            panel.step([*numbers, searched[-1].number], [*best, best[-1]], where="post", color=RED, label="best so far")
        tidy(panel, x="trial", y=label_of(score), whole="x")
        numbers, values = [trial.number for trial in searched], [_aim(trial, index) for trial in searched]
        fit_y(panel, values, most=highest_of(score), margin=0.12)
        mark_outside(panel, numbers, values, numbers)
        panel.set_xlim(-0.7, max(searched[-1].number, 3) + 0.7)
        _mark_stages(panel, searched)
        legend(panel, ncols=3 if is_narrow() else 6, **_ABOVE)
    return figure


def learning_curves(study: StudyResult) -> Figure | None:
    """The objective over the epochs, a panel for each stage: the best trials with their parameters, others grey.

    If the epochs lack the objective (a cost), it is the validation accuracy. Folds are averaged.
    """
    steps = groups(study)
    if not steps:
        return None
    names = {group.name for group in steps}
    columns = columns_of(2)
    figure = new_figure(8.4 if len(steps) == 1 else 12.0, 4.0 * -(-len(steps) // columns))
    for panel, group in zip(panels_of(figure, len(steps), columns=columns), steps, strict=True):
        score = study.objective if study.objective in _epochs(group.trials[0])[0].scores else "valid_accuracy"
        label = _labels(group.trials, [parameter.path for parameter in group.parameters])
        ranked = [trial for trial in study.ranked(group.name or None) if _epochs(trial)]
        others = [t for t in study.trials if stage_of(t) == group.name and group.name in names and t not in ranked]
        others = [trial for trial in others if trial.candidate.stage not in AFTER_SEARCH and _epochs(trial)]
        for trial in [*others, *ranked[_NAMED:]]:
            (line,) = panel.plot(*_curve(trial, score), color=PALE, linewidth=0.8, zorder=1)
            mark_trials(line, [trial.number])
        for index, trial in enumerate(ranked[:_NAMED]):
            text = short_name(f"{trial.number}: {label[trial.number]}".removesuffix(": "), 44)
            style = {"linewidth": 1.4, "zorder": 3 - index / _NAMED, **line_style(index)}
            (line,) = panel.plot(*_curve(trial, score), label=text, **style)
            mark_trials(line, [trial.number])
        tidy(panel, x="epoch", y=label_of(score), title=group.name, whole="x")
        _fit_curves(panel, [*ranked, *others], score)
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.14)} if is_narrow() else {}
        legend(panel, title="trial, best first", title_fontsize=8, alignment="left", fontsize=7, **below)
    return figure


def timeline(study: StudyResult) -> Figure | None:
    """A row for each worker, a bar for each trial, coloured by its state; pauses between runs are cut out."""
    trained = (trial for trial in study.trials if trial.started and trial.candidate.stage != ENSEMBLE)
    begun = sorted(trained, key=lambda trial: trial.started)
    if not begun:
        return None
    workers = sorted({_worker(trial) for trial in begun}, key=lambda name: (len(name), name))
    moved, cuts, whole = _without_pauses(begun)
    unit, length = next((unit, length) for unit, length in _UNITS if whole >= 2 * length or length == 1)
    figure = new_figure(10, 1.5 + 0.36 * len(workers))
    panel = figure.subplots()
    for state, (colour, _) in _STATES.items():
        chosen = [trial for trial in begun if trial.state is state]
        if chosen:
            bars = panel.barh(
                [workers.index(_worker(trial)) for trial in chosen],
                [max(trial.run_seconds, whole / 500) / length for trial in chosen],
                left=[moved[trial.number] / length for trial in chosen],
                height=0.62,
                color=colour,
                edgecolor="white",
                linewidth=0.6,
                label=state.value,
            )
            for bar, trial in zip(bars, chosen, strict=True):
                mark_trials(bar, [trial.number])
    for index, cut in enumerate(cuts):
        panel.axvline(cut / length, color=BLACK, linewidth=1, linestyle=":", label=None if index else "pause, cut out")
    tidy(panel, x=f"time ({unit})")
    panel.set_yticks(range(len(workers)), [short_name(worker) for worker in workers], fontsize=8)
    panel.set_ylim(len(workers) - 0.4, -0.6)
    panel.set_xlim(0, 1.01 * whole / length)
    panel.grid(visible=False, axis="y")
    legend(panel, ncols=3 if is_narrow() else 6, **_ABOVE)
    return figure


def importance_figure(importances: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Figure | None:
    """stage -> method -> path -> share in [0, 1]: the methods side by side, since each overlooks something.

    stage is "" in a search without stages. None if there are no shares.
    """
    shown = {stage: methods for stage, methods in importances.items() if methods}
    if not shown:
        return None
    rows = [len(next(iter(methods.values()))) for methods in shown.values()]
    figure = new_figure(7.5, 1.1 + sum(0.75 + 0.42 * count for count in rows))
    panels = figure.subplots(len(shown), 1, squeeze=False, height_ratios=[0.6 + count for count in rows]).ravel()
    for panel, (stage, methods) in zip(panels, shown.items(), strict=True):
        last = list(methods)[-1]
        paths = sorted(methods[last], key=lambda path: methods[last][path])
        height = 0.8 / len(methods)
        for index, (method, values) in enumerate(methods.items()):
            offset = (len(methods) - 1) / 2 - index
            places = np.arange(len(paths)) + height * offset
            bars = panel.barh(
                places, [values[path] for path in paths], height, color=(BLUE, ORANGE)[index % 2], label=method
            )
            panel.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
        ends = short_paths(paths)
        tidy(panel, x="share of the importance", title=stage)
        panel.set_yticks(range(len(paths)), [ends[path] for path in paths], fontsize=8)
        panel.set_xlim(0, 1.08 * max(max(values.values()) for values in methods.values()))
        panel.grid(visible=False, axis="y")
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8, frameon=False
    )
    return figure


def pareto_front(study: StudyResult) -> Figure | None:
    """Each pair of objectives: all complete trials, and the Pareto front with its numbers; None with one objective."""
    complete, front = study.ranked(), study.pareto() if len(study.objectives) > 1 else []
    if not front:
        return None
    pairs = list(combinations(range(len(study.objectives)), 2))
    columns = columns_of(2)
    figure = new_figure(6.5 if len(pairs) == 1 else 12, 4.5 * -(-len(pairs) // columns))
    for panel, pair in zip(panels_of(figure, len(pairs), columns=columns), pairs, strict=True):
        # A cost is the horizontal axis, the score that it buys the vertical one.
        across, up = sorted(pair, key=lambda index: study.objectives[index][1] != "minimize")
        others = [trial for trial in complete if trial not in front]
        points = panel.scatter(
            [_aim(t, across) for t in others], [_aim(t, up) for t in others], color=PALE, s=22, label="dominated"
        )
        mark_trials(points, [trial.number for trial in others])
        ordered = sorted(front, key=lambda trial: _aim(trial, across))
        x, y = [_aim(trial, across) for trial in ordered], [_aim(trial, up) for trial in ordered]
        # Of three objectives the front is a surface: its trials are not joined.
        stairs = "steps-post" if study.objectives[across][1] == "minimize" else "steps-pre"
        if len(pairs) == 1:
            panel.plot(x, y, color=RED, linewidth=1, drawstyle=stairs)
        mark_trials(panel.scatter(x, y, color=RED, s=25, zorder=3, label="front (trial)"), [t.number for t in ordered])
        (first, _), (second, _) = study.objectives[across], study.objectives[up]
        tidy(panel, x=label_of(first), y=label_of(second))
        panel.margins(0.08)
        for name, score, values in (("x", first, x), ("y", second, y)):
            if score == "parameters" and max(values) > 10 * min(values):
                log_axes(panel, name)
        _number(panel, ordered, x, y)
        legend(panel)
    return figure


def hypervolume_figure(study: StudyResult) -> Figure | None:
    """The share of the box of objectives that trials dominate so far, by complete trials; None with one objective."""
    history = hypervolume_history(study)
    if len(history) < 2:
        return None
    figure = new_figure(8.4, 3.0)
    panel = figure.subplots()
    counts, volumes = range(1, len(history) + 1), [volume for _, volume in history]
    panel.step(counts, volumes, where="post", color=BLUE)
    mark_trials(panel.scatter(counts, volumes, color=BLUE, s=14, zorder=3), [number for number, _ in history])
    tidy(panel, x="complete trials", y="hypervolume", whole="x")
    panel.set_ylim(0, 1.02)
    return figure


_BETTER = {"maximize": max, "minimize": min}
_UNITS = (("hours", 3600), ("minutes", 60), ("seconds", 1))


def _aim(trial: Trial, index: int) -> float:
    """The objective of this index; a pruned trial has only one, which is taken."""
    values = trial.result.values if trial.result else ()
    value = values[index] if index < len(values) else trial.value
    return float("nan") if value is None else value


def _number(panel: Any, trials: Sequence[Trial], x: Sequence[float], y: Sequence[float]) -> None:
    """Trial numbers next to their points, unless they would cover one that is drawn already."""
    panel.autoscale_view()
    drawn: list[Any] = []
    for trial, *point in zip(trials, x, y, strict=True):
        pixel = panel.transData.transform(point)
        if all(abs(pixel[0] - other[0]) > 16 or abs(pixel[1] - other[1]) > 11 for other in drawn):
            panel.annotate(str(trial.number), point, (4, 4), textcoords="offset points", fontsize=7)
            drawn.append(pixel)


def _mark_stages(panel: Any, trials: Sequence[Trial]) -> None:
    starts = {stage_of(trial): trial.number for trial in reversed(trials)}
    for stage, number in starts.items():
        if stage:
            panel.axvline(number - 0.5, color=GREEN, linewidth=0.8, linestyle=":")
            panel.text(
                number - 0.4,
                0.99,
                short_name(stage, 16),
                transform=panel.get_xaxis_transform(),
                fontsize=7,
                rotation=90,
                va="top",
                color=GREEN,
            )


def _epochs(trial: Trial) -> tuple[Epoch, ...]:
    return trial.result.epochs if trial.result else ()


def _curve(trial: Trial, score: str) -> tuple[list[int], list[float]]:
    """Epoch numbers, and the mean score at each over the folds that reached it."""
    found: dict[int, list[float]] = {}
    for epoch in _epochs(trial):
        found.setdefault(epoch.number, []).append(epoch.scores.get(score, float("nan")))
    return list(found), [float(np.mean(values)) for values in found.values()]


def _fit_curves(panel: Any, trials: Sequence[Trial], score: str) -> None:
    """Let the axis fit the curves after their first quarter, in which all rise.

    One that is outside from its first to its last epoch has a mark at its end.
    """
    curves = [_curve(trial, score) for trial in trials]
    every = [value for _, values in curves for value in values[len(values) // 4 :]]
    low, high = fit_y(panel, every, most=highest_of(score), note=False)
    outside = [
        (numbers[-1], values[-1], trial.number)
        for trial, (numbers, values) in zip(trials, curves, strict=True)
        if max(values) < low or min(values) > high
    ]
    if outside:
        x, y, numbers = zip(*outside, strict=True)
        mark_outside(panel, x, y, numbers)


def _labels(trials: Sequence[Trial], paths: Sequence[str]) -> dict[int, str]:
    ends = short_paths(list(paths))
    return {
        trial.number: " ".join(
            f"{ends[path]}={value_text(trial.candidate.parameters[path])}"
            for path in paths
            if path in trial.candidate.parameters
        )
        for trial in trials
    }


def _worker(trial: Trial) -> str:
    return trial.worker or "worker"


def _without_pauses(begun: Sequence[Trial]) -> tuple[dict[int, float], list[float], float]:
    """Trial number -> start in seconds with the pauses cut out, where the cuts are, and the whole length.

    A pause is a time without any trial, longer than a twentieth of the time with some.
    """
    ends = list(accumulate((trial.started + trial.run_seconds for trial in begun), max))
    gaps = [max(0.0, trial.started - end) for trial, end in zip(begun[1:], ends, strict=False)]
    busy = ends[-1] - begun[0].started - sum(gaps)
    moved, cuts, shift = {begun[0].number: 0.0}, [], begun[0].started
    for trial, gap in zip(begun[1:], gaps, strict=True):
        if gap > busy / 20:
            shift += gap
            cuts.append(trial.started - shift)
        moved[trial.number] = trial.started - shift
    return moved, cuts, max(ends[-1] - shift, 1e-9)
