"""Figures of a search space: the objective over each parameter, and over all of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import direction_of, highest_of, label_of
from hpo.records import StudyResult, Trial
from hpo.report.figures import (
    BLUE,
    GREY,
    RED,
    columns_of,
    fit_y,
    is_narrow,
    log_axes,
    mark_outside,
    mark_trials,
    new_figure,
    panel_grid,
    robust_limits,
    tidy,
)
from hpo.report.summary import Group, Parameter, groups
from hpo.report.text import short_name, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OPTIONS = 8  # values that an effect plot shows one by one; more are put into bins
_BINS = 6
_FEW = 5  # values from which a mean and a deviation say more than the values
_AXES = 12  # parallel coordinates


def slices(study: StudyResult, *, columns: int = 3) -> Figure | None:
    """The objective over each varied parameter, a panel each; colour goes from early to late trials."""
    shown = [(group, parameter) for group in groups(study) for parameter in group.parameters]
    if not shown:
        return None
    columns = min(columns_of(columns), len(shown))
    bar = 0.75  # inches, with its labels
    below = _inches_below(parameter.options for _, parameter in shown if not _by_value(parameter))
    figure, panels = panel_grid(
        len(shown), columns=columns, width=3.1, height=1.9, gap=0.25, right=0.2 + bar, below=below
    )
    last = max(trial.number for trial in study.trials)
    every = np.concatenate([group.values for group in {id(group): group for group, _ in shown}.values()])
    for index, (panel, (group, parameter)) in enumerate(zip(panels, shown, strict=True)):
        x = _across(parameter)
        numbers = [trial.number for trial in group.trials]
        points = panel.scatter(x, group.values, c=numbers, cmap="viridis", vmin=0, vmax=last, s=18, linewidth=0)
        mark_trials(points, numbers)
        tidy(panel, y="" if index % columns else label_of(study.objective), title=group.title(parameter.label))
        _ticks(panel, parameter)
        panel.tick_params(labelleft=not index % columns)
        fit_y(panel, every, most=highest_of(study.objective), note=not index)
        mark_outside(panel, x, group.values, numbers)
    width, height = figure.get_size_inches()
    tall = min(0.8 * height, 5.0)
    beside = figure.add_axes((1 - bar / width, 0.5 - tall / height / 2, 0.16 / width, tall / height))
    figure.colorbar(points, cax=beside, label="trial")
    return figure


def effects(study: StudyResult, *, score: str = "", columns: int = 3) -> Figure | None:
    """Mean objective, or another score, at each value of each varied parameter, stage by stage; the best value marked.

    Bars are standard deviations over the trials that share the value (seeds included). Fewer than five values are
    dots, those of the folds for a single trial, and a line is their mean. Values of a range are put into bins of equal
    count. The number of trials is at the foot.
    """
    shown = [(group, parameter) for group in groups(study) for parameter in group.parameters]
    name = score or study.objective
    better = direction_of(name) if score else study.direction
    found = [_effect(name, group, group.scores(score) if score else group.values, part) for group, part in shown]
    if not any(found):
        return None
    columns = min(columns_of(columns), len(shown))
    below = _inches_below([row.text for row in rows] for rows in found)
    figure, panels = panel_grid(len(shown), columns=columns, width=3.2, height=2.0, head=0.45, below=below)
    for index, (panel, (group, parameter), rows) in enumerate(zip(panels, shown, found, strict=True)):
        tidy(panel, y="" if index % columns else label_of(name), title=group.title(parameter.label))
        if rows:
            _draw_effect(panel, rows, numeric=parameter.numeric, maximize=better == "maximize", most=highest_of(name))
    note = (
        "mean and standard deviation over the trials that share a value;\nbelow five values, the values and their mean"
    )
    figure.text(0.5, 1 - 0.08 / figure.get_size_inches()[1], note, fontsize=9, color=GREY, ha="center", va="top")
    return figure


def _draw_effect(panel: Axes, rows: Sequence[_Row], *, numeric: bool, maximize: bool, most: float) -> None:
    means = np.array([row.mean for row in rows])
    many = [place for place, row in enumerate(rows) if len(row.values) >= _FEW]
    bars = [float(rows[place].values.std(ddof=1)) for place in many]
    if many:
        panel.errorbar(many, means[many], bars, color=BLUE, fmt="o", markersize=5, linewidth=1, capsize=4)
    few = [(place, row) for place, row in enumerate(rows) if place not in many]
    x = np.array([place for place, row in few for _ in row.values], dtype=float)
    y = np.array([value for _, row in few for value in row.values])
    panel.scatter(x, y, s=16, color=BLUE, alpha=0.6, linewidth=0)
    for place, row in few:
        panel.hlines(row.mean, place - 0.18, place + 0.18, color=BLUE, linewidth=1.4)
    best = int(means.argmax() if maximize else means.argmin())
    panel.plot(best, means[best], "o", color=RED, markersize=7, zorder=4)
    foot = panel.get_xaxis_transform()
    for place, row in enumerate(rows):
        panel.text(place, 0.99, f"n={row.count}", transform=foot, fontsize=6.5, color=GREY, ha="center", va="top")
    _name_ticks(panel, [row.text for row in rows])
    panel.set_xlim(-0.5, len(rows) - 0.5)
    ends = [means[place] + sign * bar for place, bar in zip(many, bars, strict=True) for sign in (-1, 1)]
    low, high = fit_y(panel, np.concatenate([*(row.values for row in rows), ends]), most=most, margin=0.15)
    mark_outside(panel, x, y)
    if numeric:
        inside = np.where((means >= low) & (means <= high), means, np.nan)
        panel.plot(range(len(rows)), inside, color=BLUE, linewidth=1, alpha=0.6)


def parallel_coordinates(study: StudyResult) -> Figure | None:
    """Each complete trial as a line across its parameters to the objective; the best one thick.

    Drawn for the stage with most parameters (the last of several); None if only one is varied. A parameter that a
    trial lacks is at "not used".
    """
    from matplotlib.collections import LineCollection

    group = max(reversed(groups(study)), key=lambda group: len(group.parameters), default=None)
    if group is None or len(group.parameters) < 2 or len(group.trials) < 2:
        return None
    parameters = group.parameters[:_AXES]
    heights = [_heights(parameter) for parameter in parameters]
    scores = group.values
    low, high = robust_limits(scores)
    level = np.clip((scores - low) / ((high - low) or 1.0), -0.08, 1.08)  # what lies outside is beyond the marks
    lines = np.stack([*[height for height, _ in heights], level], axis=1)
    unused = np.isnan(lines)
    lines[unused] = -0.12
    maximize = study.direction == "maximize"
    order = np.argsort(scores if maximize else -scores)  # the best on top
    upright = is_narrow()  # axes below each other
    figure = new_figure(1.6 + 1.25 * len(parameters), 0.62 * len(lines[0]) + 0.8 if upright else 4.6)
    panel = figure.subplots()
    across = np.arange(lines.shape[1])
    drawn = [np.column_stack([line, across] if upright else [across, line]) for line in lines]
    collection = LineCollection(
        [drawn[index] for index in order],
        array=np.clip(scores[order], low, high),
        cmap="viridis" if maximize else "viridis_r",
        alpha=0.75,
        linewidth=1,
    )
    panel.add_collection(collection)
    mark_trials(collection, [group.trials[index].number for index in order])
    panel.plot(*drawn[order[-1]].T, color=RED, linewidth=2.4, label="best", zorder=3)
    below, above = ("≤ " if (scores < low).any() else "", "≥ " if (scores > high).any() else "")
    ticks = [*[ticks for _, ticks in heights], [(0.0, f"{below}{low:.4f}"), (1.0, f"{above}{high:.4f}")]]
    for place, marks in zip(across, ticks, strict=True):
        _axis(panel, place, marks, upright=upright)
    names = [*[parameter.label for parameter in parameters], label_of(study.objective)]
    _name_axes(panel, names, upright=upright, unused=bool(unused.any()))
    panel.set_title(group.name, fontsize=10)
    return figure


def _name_axes(panel: Any, names: Sequence[str], *, upright: bool, unused: bool) -> None:
    """The names of the axes of parallel coordinates, and the ends of the drawing."""
    low = -0.18 if unused else -0.1
    if upright:
        panel.set_yticks(range(len(names)), [_two_lines(name) for name in names], fontsize=8)
        panel.set_xticks([-0.12] if unused else [], ["not used"] if unused else [], fontsize=7)
        panel.set_xlim(low, 1.12)
        panel.set_ylim(len(names) - 0.5, -0.5)
    else:
        panel.set_xticks(range(len(names)), [_two_lines(name) for name in names], fontsize=8)
        panel.set_yticks([])
        panel.set_xlim(-0.15, len(names) - 0.45)
        panel.set_ylim(low, 1.1)
        if unused:
            panel.text(-0.08, -0.12, "not used", fontsize=7, ha="right", va="center", color=GREY)
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)


def _axis(panel: Any, place: float, marks: Sequence[tuple[float, str]], *, upright: bool) -> None:
    (panel.axhline if upright else panel.axvline)(place, color=GREY, linewidth=0.8, zorder=2)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for height, text in marks:
        at = {"x": height, "y": place + 0.2, "ha": "center"} if upright else {"x": place + 0.03, "y": height}
        panel.text(s=short_name(text, 14), fontsize=7, va="center", zorder=4, bbox=box, **at)


def _two_lines(name: str) -> str:
    words = name.replace("_", " ").split(" ")
    middle = (len(words) + 1) // 2
    text = "_" if "_" in name else " "
    return "\n".join(filter(None, (text.join(words[:middle]), text.join(words[middle:]))))


def _by_value(parameter: Parameter) -> bool:
    """True if its values belong on a number axis, false for a row of names."""
    return parameter.numeric and not (parameter.listed and len(parameter.options) <= _OPTIONS)


def _across(parameter: Parameter) -> NDArray[np.float64]:
    return parameter.numbers() if _by_value(parameter) else parameter.places()


def _ticks(panel: Axes, parameter: Parameter) -> None:
    if not _by_value(parameter):
        _name_ticks(panel, parameter.options)
        panel.set_xlim(-0.5, len(parameter.options) - 0.5)
    elif parameter.log:
        log_axes(panel, "x")


def _name_ticks(panel: Axes, names: Sequence[str]) -> None:
    """Names below the axis, slanted if they would overlap."""
    texts, slanted = _tick_texts(names)
    options: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    panel.set_xticks(range(len(texts)), texts, fontsize=7.5, **options)


def _tick_texts(names: Sequence[str]) -> tuple[list[str], bool]:
    texts = [short_name(name, 18) for name in names]
    return texts, sum(map(len, texts)) + 2 * len(texts) > 38


def _inches_below(ticks: Iterable[Sequence[str]]) -> float:
    """The room that the names below some panels need."""
    found = [_tick_texts(names) for names in ticks]
    slanted = [len(text) for texts, slanted in found if slanted for text in texts]
    return 0.36 + 0.036 * max(slanted, default=0)  # half of a letter's width for each letter


@dataclass(frozen=True)
class _Row:
    """One value or bin of an effect plot: its trials, and their scores or those of the folds of a single one."""

    text: str
    mean: float
    values: NDArray[np.float64]
    count: int


def _effect(name: str, group: Group, scores: NDArray[np.float64], parameter: Parameter) -> list[_Row]:
    if len(parameter.options) <= _OPTIONS or not parameter.numeric:
        places = parameter.places()
        parts = [(option, places == index) for index, option in enumerate(parameter.options)]
    else:
        parts = _bins(parameter)
    rows = []
    for text, mask in parts:
        held = np.flatnonzero(mask & np.isfinite(scores))
        if len(held):
            values = _over_folds(group.trials[int(held[0])], name) if len(held) == 1 else None
            chosen = scores[held]
            rows.append(_Row(text, float(chosen.mean()), chosen if values is None else values, len(held)))
    return rows


def _over_folds(trial: Trial, objective: str) -> NDArray[np.float64] | None:
    folds = trial.result.folds if trial.result else ()
    return np.array([fold[objective] for fold in folds]) if folds and objective in folds[0] else None


def _bins(parameter: Parameter) -> list[tuple[str, NDArray[np.bool_]]]:
    """Ranges of equal count, each with its ends as text and the trials in it."""
    numbers = parameter.numbers()
    order = np.argsort(numbers)[: int(parameter.used.sum())]
    parts = []
    for chosen in np.array_split(order, min(_BINS, max(2, len(order) // 2))):
        mask = np.zeros(len(numbers), dtype=bool)
        mask[chosen] = True
        low, high = (value_text(parameter.values[index]) for index in (chosen[0], chosen[-1]))
        parts.append((low if low == high else f"{low} to {high}", mask))
    return parts


def unit(parameter: Parameter) -> tuple[NDArray[np.float64], float, float]:
    """(trials,) values on [0, 1], logarithmic where the parameter is, and the ends of that scale."""
    numbers = np.log10(parameter.numbers()) if parameter.log else parameter.numbers()
    low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
    return (numbers - low) / ((high - low) or 1.0), low, high


def _heights(parameter: Parameter) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """(trials,) heights in [0, 1] on an axis of parallel coordinates, and its tick marks."""
    if not _by_value(parameter):
        last = max(len(parameter.options) - 1, 1)
        return parameter.places() / last, [(place / last, text) for place, text in enumerate(parameter.options)]
    heights, low, high = unit(parameter)
    values = [low + share * (high - low) for share in (0.0, 0.5, 1.0)]
    shown = [10**value if parameter.log else value for value in values]
    whole = all(isinstance(value, int) for value in parameter.values if value is not None)
    texts = [str(round(value)) if whole else f"{value:.3g}" for value in shown]
    return heights, list(zip((0.0, 0.5, 1.0), texts, strict=True))
