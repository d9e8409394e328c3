"""The varied parameters of a study as axes, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.records import FINAL, StudyResult, Trial
from hpo.report.text import parameter_names, value_text


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
    return "" if trial.candidate.stage in (None, FINAL) else str(trial.candidate.stage)


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
