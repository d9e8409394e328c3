"""A study in short: its varied parameters as axes, stage by stage, and a run as Markdown text."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.metrics import label_of
from hpo.records import AFTER_SEARCH, FINAL, StudyResult, Trial, TrialState
from hpo.report.hypervolume import hypervolume_history
from hpo.report.text import markdown_table, parameter_names, ranges_of, relative_text, value_text


@dataclass(frozen=True)
class Parameter:
    """One varied parameter over the trials of a group.

    values has one for each trial, None if its condition did not hold. options are the values as text in the order of
    the space, or ascending for ranges. numeric: values are numbers; listed: the space lists them; log: they belong on
    a logarithmic axis.
    """

    path: str
    label: str
    values: tuple[Any, ...]
    options: tuple[str, ...]
    numeric: bool
    listed: bool
    log: bool

    @property
    def used(self) -> NDArray[np.bool_]:
        """(trials,) True if the trial has a value."""
        return np.array([value is not None for value in self.values], dtype=bool)

    def numbers(self) -> NDArray[np.float64]:
        """(trials,) the value if it is a number, else the index of its option; nan without one."""
        if self.numeric:
            return np.array([np.nan if value is None else float(value) for value in self.values])
        return self.places()

    def places(self) -> NDArray[np.float64]:
        """(trials,) the index of the value's option; nan without one."""
        index = {option: float(position) for position, option in enumerate(self.options)}
        return np.array([np.nan if value is None else index[value_text(value)] for value in self.values])


@dataclass(frozen=True)
class Group:
    """The complete trials of one stage by number, and their parameters; name is "" in a search without stages."""

    name: str
    trials: tuple[Trial, ...]
    parameters: tuple[Parameter, ...]

    @property
    def values(self) -> NDArray[np.float64]:
        """(trials,) the objective of each."""
        return np.array([trial.value for trial in self.trials], dtype=np.float64)

    def scores(self, name: str) -> NDArray[np.float64]:
        """(trials,) another score of each; nan if a trial lacks it."""
        results = [trial.result.scores if trial.result else {} for trial in self.trials]
        return np.array([scores.get(name, np.nan) for scores in results], dtype=np.float64)

    def title(self, text: str = "") -> str:
        """A heading for a panel of this group."""
        return f"{self.name}: {text}" if self.name and text not in ("", self.name) else self.name or text


def groups(study: StudyResult) -> list[Group]:
    """The stages of the search in order, without final trainings and stages without a complete trial."""
    search = study.spec.get("search") or {}
    stages = [(stage["name"], stage.get("space") or {}) for stage in search.get("stages") or ()]
    steps: list[tuple[str | None, Mapping[str, Any]]] = [*stages] or [(None, search.get("space") or {})]
    ranges = {path: part for _, space in steps for path, part in space.items()}
    found = []
    for name, space in steps:
        trials = sorted(study.ranked(name), key=lambda trial: trial.number)
        if trials:
            found.append(Group(name or "", tuple(trials), _parameters(trials, {**ranges, **space})))
    return found


def stage_of(trial: Trial) -> str:
    """The stage of a trial of the search; "" without stages and for final trainings."""
    return "" if trial.candidate.stage in (None, *AFTER_SEARCH) else str(trial.candidate.stage)


def _parameters(trials: Sequence[Trial], ranges: Mapping[str, Any]) -> tuple[Parameter, ...]:
    """The parameters that differ between the trials, in the order of the space."""
    held = {path: None for trial in trials for path in trial.candidate.parameters}
    order = [*(path for path in ranges if path in held), *(path for path in held if path not in ranges)]
    columns = {path: tuple(trial.candidate.parameters.get(path) for trial in trials) for path in order}
    varied = {path: values for path, values in columns.items() if len(set(map(value_text, values))) > 1}
    labels = parameter_names(list(varied), ranges)
    return tuple(_parameter(path, labels[path], values, ranges.get(path) or {}) for path, values in varied.items())


def _parameter(path: str, label: str, values: tuple[Any, ...], part: Mapping[str, Any]) -> Parameter:
    present = [value for value in values if value is not None]
    numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value in present)
    listed = "choice" in part
    ordered = list(part.get("choice") or ()) or (sorted(present) if numeric else present)
    texts = dict.fromkeys(map(value_text, ordered))
    own = set(map(value_text, present))
    options = [text for text in texts if text in own] + sorted(own - set(texts))
    doubling = listed and numeric and len(own) > 2 and min(present) > 0 and max(present) >= 8 * min(present)
    return Parameter(path, label, values, tuple(options), numeric, listed, bool(part.get("log")) or doubling)


_FRONT = 12  # rows of the table of trade-offs
_NUMBER = re.compile(r"\d[\d.,e+-]*")


def failure_lines(study: StudyResult) -> list[str]:
    """`3 not_finite, 2 setup`, then the most frequent reason; empty if no trial failed.

    Interrupted trials do not count. Reasons that differ only in numbers are counted together; the newest is shown.
    """
    ended = [trial for trial in study.trials if trial.state.finished and trial.result is not None]
    failed = [
        trial.result
        for trial in ended
        if trial.result is not None and (trial.result.failure is not None or trial.state is TrialState.FAILED)
    ]
    if not failed:
        return []
    # Records of earlier versions have no kind.
    kinds = Counter(result.failure.value if result.failure else "unclassified" for result in failed)
    lines = [", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
    reasons = Counter(_NUMBER.sub("#", result.reason) for result in failed if result.reason)
    if reasons:
        (commonest, count), *_ = reasons.most_common(1)
        newest = next(result for result in reversed(failed) if _NUMBER.sub("#", result.reason) == commonest)
        lines.append(f"{newest.reason} (trial {newest.number}{f', and {count - 1} more so' if count > 1 else ''})")
    return lines


def study_summary(study: StudyResult, *, winner: Trial | None, model: str = "", remarks: Sequence[str] = ()) -> str:
    """Markdown: question, winner with parameters and scores, stages, trade-offs, cost, next commands.

    winner is the trial of the study's model; None shows the best of the search. model is the name of the registered
    winner, "" without one. remarks are lines about the choice. All scores are on validation images.
    """
    lines = [f"# {study.title}", ""]
    if question := study.spec.get("question"):
        lines += [str(question), ""]
    shown = winner or study.best
    if shown is None:
        lines += ["No trial is complete: there is no winner.", ""]
    else:
        lines += _winner(study, shown, chosen=winner is not None)
    lines += [line for remark in remarks for line in (remark, "")]
    lines += _stages(study)
    if len(study.objectives) > 1:
        lines += _front(study)
    if failures := failure_lines(study):
        lines += ["## Failures", "", *(part for line in failures for part in (line, ""))]
    lines += _cost(study)
    lines += ["## Next", "", "```", *_commands(study, shown is not None, model), "```", ""]
    return "\n".join(lines)


def _winner(study: StudyResult, trial: Trial, *, chosen: bool) -> list[str]:
    final = ", trained again after the search" if trial.candidate.stage == FINAL else ""
    heading = "Winner" if chosen else "Best of the search so far"
    better = "higher" if study.direction == "maximize" else "lower"
    value = f"{label_of(study.objective)} **{trial.value or 0.0:.4f}** ({better} is better)"
    ranges = ranges_of(study)
    lines = [f"**{heading}: trial {trial.number}**{final}, {value}.", ""]
    lines += markdown_table(
        ("parameter", "value"),
        ((path + relative_text(path, ranges), value_text(v)) for path, v in trial.candidate.parameters.items()),
    )
    if trial.result is not None:
        scores = trial.result.scores
        rows = [
            (label_of(name), f"{value:.4f}" + (f" ± {scores[f'{name}_std']:.4f}" if f"{name}_std" in scores else ""))
            for name, value in scores.items()
            if name.startswith("valid_") and not name.endswith("_std")
        ]
        rows += [("trainable parameters", f"{trial.result.parameter_count:,}")] if trial.result.parameter_count else []
        rows += [("best epoch", str(trial.result.best_epoch))] if trial.result.best_epoch else []
        lines += markdown_table(("score", "value"), rows)
    return lines


def _stages(study: StudyResult) -> list[str]:
    rows = []
    for group in groups(study):
        if group.name:
            best = study.ranked(group.name)[0]
            held = best.candidate.parameters
            chosen = [f"{p.label} = {value_text(held[p.path])}" for p in group.parameters if p.path in held]
            rows.append((group.name, str(len(group.trials)), ", ".join(chosen), f"{best.value:.4f}", str(best.number)))
    heads = ("stage", "complete trials", "best", label_of(study.objective), "trial")
    return ["## Stages", "", *markdown_table(heads, rows)] if rows else []


def _front(study: StudyResult) -> list[str]:
    names = [score for score, _ in study.objectives]
    front = study.pareto()
    rows = [
        (str(trial.number), *(f"{value:.6g}" for value in trial.result.values))
        for trial in front[:_FRONT]
        if trial.result
    ]
    more = [f"And {len(front) - _FRONT} more.", ""] if len(front) > _FRONT else []
    return ["## Pareto front", "", *markdown_table(("trial", *map(label_of, names)), rows), *more, *_hypervolume(study)]


def _hypervolume(study: StudyResult) -> list[str]:
    history = hypervolume_history(study)
    if not history:
        return []
    half, end = history[(len(history) - 1) // 2][1], history[-1][1]
    box = "of the box between the best and the worst value of each objective, costs on a logarithmic scale"
    return [f"Hypervolume: {end:.3f} {box}; after half of the complete trials it was {half:.3f}.", ""]


def _cost(study: StudyResult) -> list[str]:
    ends = ", ".join(f"{study.count(state)} {state.value}" for state in TrialState if study.count(state))
    epochs = sum(len(trial.result.epochs) for trial in study.trials if trial.result)
    hours = sum(trial.run_seconds for trial in study.trials) / 3600
    spent = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    return ["## Cost", "", f"Trials: {ends or 'none'}. {epochs} epochs, {spent} of one worker.", ""]


def _commands(study: StudyResult, complete: bool, model: str) -> list[str]:
    ended = study.count(*(state for state in TrialState if state.finished))
    rows = [(f"hpo report {study.title}", "the study as one page")] if complete else []
    rows += [("hpo ui", "all trials, their curves and pictures in MLflow")]
    if not study.spec.get("search", {}).get("stages"):
        rows += [(f"hpo run {study.name} --trials {ended + max(10, ended // 2)}", "continue the search")]
    if model:
        rows += [
            (f"hpo promote {study.name}", "open the sealed test part, once, and make it champion"),
            (f"hpo predict {model} IMAGE...", "use the model"),
        ]
    width = max(len(command) for command, _ in rows)
    return [f"{command:{width}}  # {text}" for command, text in rows]
