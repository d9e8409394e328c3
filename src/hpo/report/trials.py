"""The table of all trials, which a page lets its reader sort."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.metrics import label_of
from hpo.records import StudyResult, Trial
from hpo.report.page import Html, table
from hpo.report.text import parameter_names, ranges_of, short_name, value_text

_MOST = 1000  # rows


def trials_table(study: StudyResult, *, most: int = _MOST) -> str:
    """A row for each trial, best first: state, objectives, parameters, epochs, seconds. Of `most` trials."""
    ranked = {trial.number: place for place, trial in enumerate([*study.after_search(), *study.ranked()])}
    trials = sorted(study.trials, key=lambda trial: (ranked.get(trial.number, len(ranked)), trial.number))
    shown = trials[:most]
    aims = [score for score, _ in study.objectives] or [study.objective]
    paths = list(dict.fromkeys(path for trial in shown for path in trial.candidate.parameters))
    names = parameter_names(paths, ranges_of(study))
    staged = any(trial.candidate.stage for trial in shown)
    head = [">trial", *(["stage"] if staged else []), "state", *(f">{label_of(aim)}" for aim in aims)]
    head += [*(names[path] for path in paths), ">epochs", ">seconds"]
    rows = [_row(trial, paths, aims=len(aims), staged=staged) for trial in shown]
    more = f"<p>The best {most:,} of {len(trials):,} trials are shown.</p>" if len(trials) > most else ""
    return f"{table(head, rows, sortable=True)}{more}"


def _row(trial: Trial, paths: Sequence[str], *, aims: int, staged: bool) -> list[object]:
    result, parameters = trial.result, trial.candidate.parameters
    values = (result.values if result else ()) or ((trial.value,) if trial.value is not None else ())
    scores = ["" if math.isnan(value) else f"{value:.4f}" if abs(value) < 1000 else f"{value:.0f}" for value in values]
    return [
        Html(f'<span data-trial="{trial.number}">{trial.number}</span>'),
        *([trial.candidate.stage or ""] if staged else []),
        trial.state.value,
        *[*scores, *[""] * aims][:aims],
        *(_shown(parameters, path) for path in paths),
        len(result.epochs) if result else "",
        f"{result.seconds:.1f}" if result else "",
    ]


def _shown(parameters: Mapping[str, Any], path: str) -> str:
    return short_name(value_text(parameters[path]), 30) if path in parameters else ""
