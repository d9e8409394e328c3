"""Interactive charts of a study's trials, as figures of plotly.js."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_html
from itertools import accumulate
from typing import Any

from hpo.records import FINAL, StudyResult, Trial, TrialState
from hpo.report.figures.style import score_text, short_name, short_paths, value_text
from hpo.report.page.embed import chart
from hpo.report.page.html import Html
from hpo.spec.space import Choice, Float, Int
from hpo.spec.study import StudySpec

# Middle tones: they stand out on white and on black.
_BLUE, _RED, _GREY = "#3d84e0", "#dd5468", "#8a97a8"
_COLOURS = (_BLUE, "#2a9d8f", "#c77d1e", "#9b6bd3", "#4f9d3a", "#c2559b", "#7a8a2e", "#b0664a")
_LINES = 150  # more lines than that hide each other, and slow a phone down
_HOVER = "%{text}<extra></extra>"


def hover_text(study: StudyResult, trial: Trial) -> str:
    """Number, score, epochs, time and parameters of a trial, in lines."""
    result, stage = trial.result, trial.candidate.stage
    lines = [f"<b>trial {trial.number}</b> {trial.state.value}" + (f", {escape_html(stage)}" if stage else "")]
    if result is not None and result.value is not None:
        lines.append(f"{score_text(study.objective)} {result.value:.4f}")
    if result is not None and result.epochs:
        best = f", best {result.best_epoch}" if result.best_epoch else ""
        lines.append(f"{len(result.epochs)} epochs{best}, {result.seconds:.3g} s")
    names = short_paths(list(trial.candidate.parameters))
    lines += [f"{names[path]} = {_shown(value)}" for path, value in trial.candidate.parameters.items()]
    return "<br>".join(lines)


@dataclass(frozen=True)
class Axis:
    """How one parameter is laid out: options in their order, or a range, perhaps logarithmic."""

    path: str
    label: str
    log: bool = False
    options: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 1.0

    def place(self, value: Any) -> float:
        """Where a value lies, in [0, 1] from the low to the high end."""
        if self.options:
            return self.options.index(_shown(value)) / max(1, len(self.options) - 1)
        low, high, at = (math.log(end) if self.log else end for end in (self.low, self.high, value))
        return (at - low) / (high - low) if high > low else 0.5

    def ticks(self) -> list[tuple[float, str]]:
        """(place, label) of the options, or of the ends of the range."""
        if self.options:
            return [(place / max(1, len(self.options) - 1), option) for place, option in enumerate(self.options)]
        return [(0.0, _shown(self.low)), (1.0, _shown(self.high))]


def axes(spec: StudySpec, trials: Sequence[Trial]) -> list[Axis]:
    """The axis of each parameter that the search varies and at least one of these trials has."""
    spaces = [spec.search.space, *(stage.space for stage in spec.search.stages)]
    paths = list(dict.fromkeys(path for space in spaces for path, _ in space.items()))
    labels = short_paths(paths)
    found = []
    for path in paths:
        given = [space[path] for space in spaces if path in space]
        values = [trial.candidate.parameters[path] for trial in trials if path in trial.candidate.parameters]
        if values:
            found.append(_axis(path, labels[path], given, values))
    return found


def _axis(path: str, label: str, given: Sequence[Float | Int | Choice], values: Sequence[Any]) -> Axis:
    if all(isinstance(parameter, Float | Int) for parameter in given):
        every = [*values, *(end for parameter in given for end in parameter.ends())]
        log = any(parameter.log for parameter in given if isinstance(parameter, Float | Int))
        return Axis(path, label, log=log, low=min(every), high=max(every))
    options = [option for parameter in given for option in parameter.ends()]
    seen = dict.fromkeys(map(_shown, [*options, *values]))
    return Axis(path, label, options=tuple(seen))


def history(study: StudyResult) -> Html:
    """The objective of every trial in the order of their numbers, by stage, and the best so far."""
    done = [trial for trial in study.trials if trial.value is not None]
    complete = [trial for trial in done if trial.state is TrialState.COMPLETE]
    pruned = [trial for trial in done if trial.state is TrialState.PRUNED]
    searched = [trial for trial in complete if trial.candidate.stage != FINAL]
    better = max if study.direction == "maximize" else min
    traces = [
        _points([t.number for t in trials], trials, stage or "complete", colour=colour)
        for (stage, trials), colour in zip(_by_stage(complete), _cycle(), strict=False)
    ]
    if pruned:
        mark = {"symbol": "x-thin", "size": 8, "line": {"width": 1.6, "color": _GREY}}
        traces.append({**_points([t.number for t in pruned], pruned, "pruned", colour=_GREY), "marker": mark})
    if searched:
        best = list(accumulate((trial.value or 0.0 for trial in searched), better))
        line = {"color": _RED, "width": 1.5, "shape": "hv"}
        traces.append(
            {"x": [t.number for t in searched], "y": best, "mode": "lines", "name": "best so far", "line": line}
            | {"hoverinfo": "skip"}
        )
    return chart(
        traces,
        {"xaxis": {"title": {"text": "trial"}}, "yaxis": {"title": {"text": score_text(study.objective)}}},
        label="Optimisation history: the objective of each trial, and the best so far",
    )


def curves(study: StudyResult) -> Html | None:
    """The objective over the epochs, a line for each trial (its first fold); None where no epoch has it."""
    ranked = [*study.ranked(FINAL), *study.ranked()]
    others = [trial for trial in study.trials if trial not in ranked]
    best = ranked[0].number if ranked else None
    traces, longest = [], 0
    for trial in [*ranked, *others][:_LINES][::-1]:
        epochs = [
            e for e in (trial.result.epochs if trial.result else ()) if not e.fold and study.objective in e.scores
        ]
        if not epochs:
            continue
        longest = max(longest, len(epochs))
        colour = _RED if trial.number == best else _BLUE if trial.state is TrialState.COMPLETE else _GREY
        traces.append(
            {
                "x": [epoch.number for epoch in epochs],
                "y": [epoch.scores[study.objective] for epoch in epochs],
                "trials": [trial.number] * len(epochs),
                "mode": "lines+markers" if len(epochs) == 1 else "lines",
                "line": {"color": colour, "width": 2.5 if trial.number == best else 1},
                "opacity": 1.0 if trial.number == best else 0.45,
                "hovertemplate": f"%{{text}}<br>epoch %{{x}}: %{{y:.4f}}{_HOVER.removeprefix('%{text}')}",
                "showlegend": False,
            }
        )
    if not traces:
        return None
    few = {"dtick": 1} if longest <= 12 else {}
    layout = {"xaxis": {"title": {"text": "epoch"}, **few}, "yaxis": {"title": {"text": score_text(study.objective)}}}
    caption = "Each line is a trial: red the best, blue complete, grey the others."
    return chart(traces, layout, label="The objective over the epochs of each trial", caption=caption)


def parallel(study: StudyResult, spec: StudySpec) -> Html | None:
    """A line for each complete trial through its parameters to its objective; None with fewer than two of anything."""
    trials = study.ranked()[:_LINES]
    columns = axes(spec, trials)
    if len(columns) < 2 or len(trials) < 2:
        return None
    values = [trial.value or 0.0 for trial in trials]
    score = Axis("", score_text(study.objective), low=min(values), high=max(values))
    traces = []
    for rank, (trial, value) in reversed(list(enumerate(zip(trials, values, strict=True)))):
        given = trial.candidate.parameters
        heights = [axis.place(given[axis.path]) if axis.path in given else None for axis in columns]
        top = rank < max(3, len(trials) // 10)
        traces.append(
            {
                "x": list(range(len(columns) + 1)),
                "y": [*heights, score.place(value)],
                "trials": [trial.number] * (len(columns) + 1),
                "mode": "lines+markers",
                "line": {"color": _RED if not rank else _BLUE if top else _GREY, "width": 2.5 if top else 1},
                "marker": {"size": 4},
                "opacity": 1.0 if not rank else 0.9 if top else 0.6,
                "hovertemplate": _HOVER,
                "showlegend": False,
            }
        )
    every = [*columns, score]
    shapes = [{"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "layer": "below"} for x in range(len(every))]
    notes = [
        {"x": x, "y": y, "text": short_name(text, 14), "showarrow": False, "xanchor": "left", "xshift": 5}
        | {"font": {"size": 10}, "opacity": 0.85}
        for x, axis in enumerate(every)
        for y, text in axis.ticks()
    ]
    # In two lines, so that neighbours keep apart on paper.
    names = [escape_html(axis.label).replace("_", "_<br>", 1).replace(" ", "<br>", 1) for axis in every]
    ticks = {"tickvals": list(range(len(every))), "ticktext": names, "range": [-0.1, len(every) - 0.45]}
    return chart(
        traces,
        {
            "xaxis": {**ticks, "showgrid": False, "zeroline": False, "side": "top", "tickangle": 0, "fixedrange": True},
            "yaxis": {"visible": False, "range": [-0.06, 1.06], "fixedrange": True},
            "annotations": notes,
            "shapes": shapes,
            "margin": {"l": 12, "r": 12, "t": 48, "b": 12},
        },
        label="Parallel coordinates: a line for each trial through its parameters to its objective",
        caption="Red is the best trial, blue the next best. A line that breaks has no value for that parameter.",
        least=110 * len(every),
        height=420,
    )


def slices(study: StudyResult, spec: StudySpec) -> list[Html]:
    """The objective over each parameter, one chart each: of the trials whose stage varied it."""
    ranked = study.ranked()
    found = []
    for axis in axes(spec, ranked):
        trials = [trial for trial in ranked if axis.path in trial.candidate.parameters and _varies(spec, trial, axis)]
        if not trials:
            continue
        values: list[Any] = [trial.candidate.parameters[axis.path] for trial in trials]
        kind: dict[str, Any]
        if axis.options:
            kind = {"type": "category", "categoryorder": "array", "categoryarray": list(axis.options)}
            kind |= {"range": [-0.5, len(axis.options) - 0.5]}
            values = list(map(_shown, values))
        else:
            kind = _log_axis(values) if axis.log else {"nticks": 6}
        trace = _points(values, trials, "", colour=_BLUE)
        order = {"color": [trial.number for trial in trials], "colorscale": [[0, _GREY], [1, _BLUE]]}
        best = [12 if trial is ranked[0] else 7 for trial in trials]
        trace["marker"] = {
            **order,
            "size": best,
            "line": {"width": 0},
            "symbol": [_symbol(t, ranked[0]) for t in trials],
        }
        layout = {"xaxis": {**kind, "title": {"text": escape_html(axis.label)}}, "yaxis": {"nticks": 6}}
        found.append(chart([trace], layout, label=f"{study.objective} over {axis.label}", height=250))
    return found


def fronts(study: StudyResult) -> Html | None:
    """Two objectives against each other, the trials that none beats in all marked; None with one objective."""
    if len(study.objectives) < 2:
        return None
    done = [trial for trial in study.ranked() if trial.result is not None and len(trial.result.values) > 1]
    front = sorted((trial for trial in study.pareto() if trial in done), key=lambda trial: _pair(trial)[0])
    others = [trial for trial in done if trial not in front]
    if not done:
        return None
    traces = [_points([_pair(trial)[0] for trial in others], others, "other trials", colour=_GREY)] if others else []
    traces.append(_points([_pair(trial)[0] for trial in front], front, "Pareto front", colour=_RED))
    for trace, trials in zip(traces[::-1], (front, others), strict=False):
        trace["y"] = [_pair(trial)[1] for trial in trials]
    traces[-1] |= {"mode": "lines+markers", "line": {"color": _RED, "width": 1, "shape": "hv"}}
    (first, _), (second, _) = study.objectives[:2]
    layout = {"xaxis": {"title": {"text": first}}, "yaxis": {"title": {"text": second}}}
    return chart(traces, layout, label=f"Pareto front of {first} and {second}")


def _pair(trial: Trial) -> tuple[float, float]:
    values = trial.result.values if trial.result else ()
    return values[0], values[1]


def _symbol(trial: Trial, best: Trial) -> str:
    return "star" if trial is best else "circle"


def _log_axis(values: Sequence[float]) -> dict[str, Any]:
    """A logarithmic axis whose ticks are written out: powers of ten, and in a narrow range values between them."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    decades = math.log10(max(values) / min(values))
    steps = (1, 1.5, 2, 3, 4, 5, 7) if decades < 0.8 else (1, 2, 5) if decades < 2 else (1,)
    ticks = [step * 10.0**power for power in range(low, high + 1) for step in steps]
    return {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:g}" for tick in ticks]}


def _varies(spec: StudySpec, trial: Trial, axis: Axis) -> bool:
    """Whether the trial's stage chose this parameter itself; a refining stage chooses all."""
    stages = {stage.name: stage for stage in spec.search.stages}
    stage = stages.get(trial.candidate.stage or "")
    return stage is None or stage.refine is not None or axis.path in stage.space


def _by_stage(trials: Sequence[Trial]) -> list[tuple[str | None, list[Trial]]]:
    groups: dict[str | None, list[Trial]] = {}
    for trial in trials:
        groups.setdefault(trial.candidate.stage, []).append(trial)
    return list(groups.items())


def _cycle() -> list[str]:
    return list(_COLOURS) * 10


def _points(x: Sequence[Any], trials: Sequence[Trial], name: str, *, colour: str) -> dict[str, Any]:
    return {
        "x": list(x),
        "y": [trial.value for trial in trials],
        "trials": [trial.number for trial in trials],
        "mode": "markers",
        "name": escape_html(name),
        "marker": {"color": colour, "size": 7},
        "hovertemplate": _HOVER,
    }


def _shown(value: Any) -> str:
    """A parameter's value as plotly.js may show it: it reads some tags of HTML."""
    return escape_html(short_name(value_text(value), 60))
