"""Figures of a search space: the objective over each parameter, and over pairs of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import direction_of, label_of
from hpo.records import StudyResult, Trial
from hpo.report.figures import BLACK, BLUE, GREY, RED, log_axes, mark_trials, new_figure, panels_of, tidy
from hpo.report.summary import Group, Parameter, groups
from hpo.report.text import short_name, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_OPTIONS = 8  # values that an effect plot shows one by one; more are put into bins
_BINS = 6
_CELLS = 12  # rows or columns of a heat map
_AXES = 12  # parallel coordinates


def slices(study: StudyResult, *, columns: int = 3) -> Figure | None:
    """The objective over each varied parameter, a panel each; colour goes from early to late trials."""
    shown = [(group, parameter) for group in groups(study) for parameter in group.parameters]
    if not shown:
        return None
    figure = new_figure(min(columns, len(shown)) * 3.6 + 0.8, 2.7 * -(-len(shown) // columns))
    panels = panels_of(figure, len(shown), columns=columns, share_y=True)
    last = max(trial.number for trial in study.trials)
    for index, (panel, (group, parameter)) in enumerate(zip(panels, shown, strict=True)):
        x = _across(parameter)
        numbers = [trial.number for trial in group.trials]
        points = panel.scatter(x, group.values, c=numbers, cmap="viridis", vmin=0, vmax=last, s=18, linewidth=0)
        mark_trials(points, numbers)
        tidy(panel, y="" if index % columns else label_of(study.objective), title=group.title(parameter.label))
        _ticks(panel, parameter)
    figure.colorbar(points, ax=panels, label="trial", shrink=0.8, pad=0.01)
    return figure


def effects(study: StudyResult, *, score: str = "", columns: int = 3) -> Figure | None:
    """Mean objective, or another score, at each value of each varied parameter, stage by stage; the best value marked.

    Bars are standard deviations over the trials that share the value (seeds included), or over the folds of a single
    trial. Values of a range are put into bins of equal count. The number of trials is at the foot.
    """
    shown = [(group, parameter) for group in groups(study) for parameter in group.parameters]
    name = score or study.objective
    better = direction_of(name) if score else study.direction
    found = [_effect(name, group, group.scores(score) if score else group.values, part) for group, part in shown]
    if not any(found):
        return None
    figure = new_figure(min(columns, len(shown)) * 3.8 + 0.3, 2.9 * -(-len(shown) // columns) + 0.3)
    panels = panels_of(figure, len(shown), columns=columns)
    for index, (panel, (group, parameter), rows) in enumerate(zip(panels, shown, found, strict=True)):
        tidy(panel, y="" if index % columns else label_of(name), title=group.title(parameter.label))
        if not rows:
            continue
        means = np.array([row.mean for row in rows])
        places = np.arange(len(rows))
        best = int(means.argmax() if better == "maximize" else means.argmin())
        line = "o-" if parameter.numeric else "o"
        bars = [row.deviation for row in rows]
        panel.errorbar(places, means, bars, color=BLUE, fmt=line, markersize=5, linewidth=1, capsize=4)
        panel.plot(best, means[best], "o", color=RED, markersize=7, zorder=4)
        foot = panel.get_xaxis_transform()
        for place, row in enumerate(rows):
            panel.text(place, 0.01, f"n={row.count}", transform=foot, fontsize=6.5, color=GREY, ha="center")
        _name_ticks(panel, [row.text for row in rows])
        panel.set_xlim(-0.5, len(rows) - 0.5)
        panel.margins(y=0.15)
    note = "mean and standard deviation over the trials that share a value, or over folds"
    figure.suptitle(note, fontsize=9, color=GREY)
    return figure


def heat_map(study: StudyResult) -> Figure | None:
    """Mean objective in each cell of a grid of two parameters, a panel for each stage that is one; the best framed.

    Of more than two parameters, the pair with most cells filled; None if no stage fills two thirds of a grid.
    """
    found = [(group, pair) for group in groups(study) if (pair := _grid_pair(group))]
    if not found:
        return None
    sizes = [(len(across.options), len(down.options)) for _, (down, across) in found]
    width = sum(0.72 * columns + 1.6 for columns, _ in sizes) + 1.0
    figure = new_figure(max(width, 4.5), 0.42 * max(rows for _, rows in sizes) + 1.7)
    ratios = [0.72 * columns + 1.6 for columns, _ in sizes]
    panels = figure.subplots(1, len(found), squeeze=False, width_ratios=ratios).ravel()
    grids = [_cells(group, *pair) for group, pair in found]
    low = min(float(np.nanmin(grid)) for grid in grids)
    high = max(float(np.nanmax(grid)) for grid in grids)
    colours = "viridis" if study.direction == "maximize" else "viridis_r"
    for panel, grid, (group, (down, across)) in zip(panels, grids, found, strict=True):
        image = panel.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
        best = np.nanargmax(grid) if study.direction == "maximize" else np.nanargmin(grid)
        for row, column in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            level = (grid[row, column] - low) / ((high - low) or 1.0)
            dark = (level if study.direction == "maximize" else 1 - level) < 0.6
            here = row * grid.shape[1] + column == best
            panel.text(
                column,
                row,
                f"{grid[row, column]:.4f}",
                ha="center",
                va="center",
                fontsize=8,
                color="white" if dark else BLACK,
                fontweight="bold" if here else "normal",
            )
            if here:
                frame = {"fill": False, "edgecolor": RED, "linewidth": 2.2}
                panel.add_patch(_rectangle(column - 0.48, row - 0.47, 0.96, 0.94, **frame))
        panel.set_xticks(range(len(across.options)), [short_name(text, 12) for text in across.options], fontsize=8)
        panel.set_yticks(range(len(down.options)), [short_name(text, 16) for text in down.options], fontsize=8)
        panel.set_xlabel(across.label, fontsize=9)
        panel.set_ylabel(down.label, fontsize=9)
        panel.set_title(group.name, fontsize=10)
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    figure.colorbar(image, ax=panels, label=label_of(study.objective), pad=0.02)
    return figure


def contour(study: StudyResult, importances: Mapping[str, float]) -> Figure | None:
    """The objective over the two most important numeric parameters, interpolated between the trials.

    importances maps paths to shares; if it is empty, the first two are taken. It is drawn for the last stage that has
    two such parameters with four values each; None without one.
    """
    for group in reversed(groups(study)):
        numeric = [p for p in group.parameters if p.numeric and len(p.options) > 3 and p.used.all()]
        pair = sorted(numeric, key=lambda parameter: -importances.get(parameter.path, 0.0))[:2]
        if len(pair) == 2 and len(group.trials) >= 6:
            return _contour(study, group, *pair)
    return None


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
    low, high = float(scores.min()), float(scores.max())
    level = (scores - low) / ((high - low) or 1.0)
    lines = np.stack([*[height for height, _ in heights], level], axis=1)
    unused = np.isnan(lines)
    lines[unused] = -0.12
    maximize = study.direction == "maximize"
    order = np.argsort(scores if maximize else -scores)  # the best on top
    figure = new_figure(1.6 + 1.25 * len(parameters), 4.6)
    panel = figure.subplots()
    across = np.arange(lines.shape[1])
    collection = LineCollection(
        [np.column_stack([across, line]) for line in lines[order]],
        array=scores[order],
        cmap="viridis" if maximize else "viridis_r",
        alpha=0.75,
        linewidth=1,
    )
    panel.add_collection(collection)
    mark_trials(collection, [group.trials[index].number for index in order])
    panel.plot(across, lines[order[-1]], color=RED, linewidth=2.4, label="best", zorder=3)
    ticks = [*[ticks for _, ticks in heights], [(0.0, f"{low:.4f}"), (1.0, f"{high:.4f}")]]
    for x, marks in zip(across, ticks, strict=True):
        _axis(panel, x, marks)
    if unused.any():
        panel.text(-0.08, -0.12, "not used", fontsize=7, ha="right", va="center", color=GREY)
    names = [*[parameter.label for parameter in parameters], label_of(study.objective)]
    panel.set_xticks(across, [_two_lines(name) for name in names], fontsize=8)
    panel.set_yticks([])
    panel.spines[:].set_visible(False)
    panel.tick_params(length=0)
    panel.set_xlim(-0.15, across[-1] + 0.55)
    panel.set_ylim(-0.18 if unused.any() else -0.06, 1.06)
    panel.set_title(group.name, fontsize=10)
    return figure


def _axis(panel: Any, x: float, marks: Sequence[tuple[float, str]]) -> None:
    panel.axvline(x, color=GREY, linewidth=0.8, zorder=2)
    box = {"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.6}
    for height, text in marks:
        panel.text(x + 0.03, height, short_name(text, 14), fontsize=7, va="center", zorder=4, bbox=box)


def _two_lines(name: str) -> str:
    words = name.replace("_", " ").split(" ")
    middle = (len(words) + 1) // 2
    text = "_" if "_" in name else " "
    return "\n".join(filter(None, (text.join(words[:middle]), text.join(words[middle:]))))


def _rectangle(x: float, y: float, width: float, height: float, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **options)


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
    texts = [short_name(name, 18) for name in names]
    slanted = sum(map(len, texts)) + 2 * len(texts) > 38
    options: dict[str, Any] = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"} if slanted else {}
    panel.set_xticks(range(len(texts)), texts, fontsize=7.5, **options)


@dataclass(frozen=True)
class _Row:
    """One value or bin of an effect plot."""

    text: str
    mean: float
    deviation: float
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
            chosen = scores[held]
            single = len(held) == 1
            deviation = _over_folds(group.trials[int(held[0])], name) if single else float(chosen.std(ddof=1))
            rows.append(_Row(text, float(chosen.mean()), deviation, len(held)))
    return rows


def _over_folds(trial: Trial, objective: str) -> float:
    return float(trial.result.scores.get(f"{objective}_std", 0.0)) if trial.result else 0.0


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


def _grid_pair(group: Group) -> tuple[Parameter, Parameter] | None:
    """The two parameters, longer one first (its options become rows), whose grid has most of its cells filled.

    None if a parameter has too many values, or hardly one twice: then a sampler drew them from a range.
    """
    for parameter in group.parameters:
        drawn = not parameter.listed and 2 * len(parameter.options) > len(group.trials)
        if drawn or len(parameter.options) > _CELLS:
            return None
    best, filled = None, 2 / 3
    for pair in combinations(group.parameters, 2):
        first, second = pair
        cells = np.unique(np.stack([first.places(), second.places()])[:, first.used & second.used], axis=1).shape[1]
        share = cells / (len(first.options) * len(second.options))
        if share >= filled and (best is None or share > filled):
            best, filled = pair, share
    if best is None:
        return None
    rows, columns = best
    return (rows, columns) if len(columns.options) <= len(rows.options) else (columns, rows)


def _cells(group: Group, down: Parameter, across: Parameter) -> NDArray[np.float64]:
    """(rows, columns) mean objective; nan without a trial."""
    total = np.zeros((len(down.options), len(across.options)))
    count = np.zeros_like(total)
    for row, column, score in zip(down.places(), across.places(), group.values, strict=True):
        if np.isfinite(row) and np.isfinite(column):
            total[int(row), int(column)] += score
            count[int(row), int(column)] += 1
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _contour(study: StudyResult, group: Group, first: Parameter, second: Parameter) -> Figure | None:
    from matplotlib.tri import Triangulation

    raw = np.stack([first.numbers(), second.numbers()])
    scaled = np.stack([_unit(parameter)[0] for parameter in (first, second)])
    # Triangulation needs distinct points, so trials with equal parameters are averaged.
    distinct, point_of = np.unique(scaled, axis=1, return_inverse=True)
    point_of = point_of.ravel()
    if distinct.shape[1] < 6 or np.linalg.matrix_rank(distinct - distinct[:, :1]) < 2:
        return None
    scores = np.bincount(point_of, group.values) / np.bincount(point_of)
    x, y = (np.bincount(point_of, values) / np.bincount(point_of) for values in raw)
    figure = new_figure(6.4, 4.6)
    panel = figure.subplots()
    triangles = Triangulation(*distinct).triangles
    colours = "viridis" if study.direction == "maximize" else "viridis_r"
    filled = panel.tricontourf(Triangulation(x, y, triangles), scores, levels=14, cmap=colours)
    points = panel.scatter(raw[0], raw[1], s=16, color="white", edgecolor=BLACK, linewidth=0.8, zorder=3)
    mark_trials(points, [trial.number for trial in group.trials])
    best = int(group.values.argmax() if study.direction == "maximize" else group.values.argmin())
    panel.plot(
        *raw[:, best], "o", markersize=9, markerfacecolor="none", markeredgecolor=RED, markeredgewidth=2, zorder=4
    )
    tidy(panel, x=first.label, y=second.label, title=group.name)
    panel.use_sticky_edges = False
    panel.margins(0.04)
    log_axes(panel, "x" * first.log + "y" * second.log)
    figure.colorbar(filled, ax=panel, label=label_of(study.objective)).ax.tick_params(labelsize=8)
    return figure


def _unit(parameter: Parameter) -> tuple[NDArray[np.float64], float, float]:
    """(trials,) values on [0, 1], logarithmic where the parameter is, and the ends of that scale."""
    numbers = np.log10(parameter.numbers()) if parameter.log else parameter.numbers()
    low, high = float(np.nanmin(numbers)), float(np.nanmax(numbers))
    return (numbers - low) / ((high - low) or 1.0), low, high


def _heights(parameter: Parameter) -> tuple[NDArray[np.float64], list[tuple[float, str]]]:
    """(trials,) heights in [0, 1] on an axis of parallel coordinates, and its tick marks."""
    if not _by_value(parameter):
        last = max(len(parameter.options) - 1, 1)
        return parameter.places() / last, [(place / last, text) for place, text in enumerate(parameter.options)]
    heights, low, high = _unit(parameter)
    values = [low + share * (high - low) for share in (0.0, 0.5, 1.0)]
    shown = [10**value if parameter.log else value for value in values]
    whole = all(isinstance(value, int) for value in parameter.values if value is not None)
    texts = [str(round(value)) if whole else f"{value:.3g}" for value in shown]
    return heights, list(zip((0.0, 0.5, 1.0), texts, strict=True))
