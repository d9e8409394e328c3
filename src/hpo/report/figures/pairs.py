"""Figures of pairs of parameters: the objective as a heat map of a grid, and as a surface between trials."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import highest_of, label_of
from hpo.records import StudyResult
from hpo.report.figures import BLACK, RED, log_axes, mark_trials, new_figure, robust_limits, tidy
from hpo.report.figures.space import unit
from hpo.report.summary import Group, Parameter, groups
from hpo.report.text import short_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CELLS = 12  # rows or columns of a heat map


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
    # Colours end at the best score that is possible; one failed cell does not take the colours of all others.
    values = np.concatenate([grid[np.isfinite(grid)] for grid in grids])
    low, high = robust_limits(values)
    high = min(high, highest_of(study.objective))
    colours = "viridis" if study.direction == "maximize" else "viridis_r"
    for panel, grid, (group, (down, across)) in zip(panels, grids, found, strict=True):
        image = panel.imshow(grid, cmap=colours, vmin=low, vmax=high, aspect="auto")
        best = np.nanargmax(grid) if study.direction == "maximize" else np.nanargmin(grid)
        for row, column in zip(*np.nonzero(np.isfinite(grid)), strict=True):
            level = min(max((grid[row, column] - low) / ((high - low) or 1.0), 0.0), 1.0)
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
    figure.colorbar(image, ax=panels, label=label_of(study.objective), pad=0.02, extend=_extend(values, low, high))
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


def _rectangle(x: float, y: float, width: float, height: float, **options: Any) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((x, y), width, height, **options)


def _extend(values: NDArray[np.float64], low: float, high: float) -> str:
    """The ends of a colour bar that also stand for values beyond them, in matplotlib's words."""
    below, above = bool((values < low).any()), bool((values > high).any())
    return {(True, True): "both", (True, False): "min", (False, True): "max"}.get((below, above), "neither")


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
    scaled = np.stack([unit(parameter)[0] for parameter in (first, second)])
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
    low, high = robust_limits(scores)
    # Levels that matplotlib chooses end at round numbers, beyond what the score can be.
    levels = np.linspace(low, high if high > low else low + 1e-9, 14)
    options = {"levels": levels, "cmap": colours, "extend": _extend(scores, low, high)}
    filled = panel.tricontourf(Triangulation(x, y, triangles), scores, **options)
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
    bar = figure.colorbar(filled, ax=panel, label=label_of(study.objective), format="%.4g")
    bar.set_ticks(levels[::3].tolist())
    bar.ax.tick_params(labelsize=8)
    return figure
