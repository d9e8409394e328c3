"""Trials of studies that other programs run with Optuna, as runs in MLflow."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpo.home import Home
from hpo.locks import locked
from hpo.records import TrialState
from hpo.tracking.run_metrics import OBJECTIVE, metrics_at
from hpo.tracking.runs import NAME, PARENT, STATUS, environment_tags, experiment, log
from hpo.tracking.store import connect, pages, translate_errors

# Not the tags of hpo's own runs, whose record is the study storage of the home.
OWN_STUDY, OWN_TRIAL, WHOLE = "hpo.optuna.study", "hpo.optuna.trial", "hpo.optuna.whole"
_EPOCH = "epoch"  # the metric of the values that a trial reported, by their step
_ODD = re.compile(r"[^\w\-. /]")  # what names of MLflow do not hold


@dataclass(frozen=True)
class ForeignTrial:
    """A finished trial: complete, pruned or failed, its objectives and parameters, and the values that it reported.

    epochs maps steps to values. started and ended are in seconds since 1970. notes are its user attributes, as text.
    """

    number: int
    state: TrialState
    values: tuple[float, ...]
    parameters: Mapping[str, Any]
    epochs: Mapping[int, float]
    started: float
    ended: float
    notes: Mapping[str, str] = field(default_factory=dict)


@translate_errors
def record_trials(home: Home, study: str, trials: Sequence[ForeignTrial], *, directions: Sequence[str]) -> int:
    """Write the trials that have no whole run yet, each as a run below that of its study; returns their number.

    The lock is held meanwhile, so a run that is not whole is of a process that died over it: it is written again.
    Raises StoreError.
    """
    key = hashlib.sha256(study.encode()).hexdigest()[:16]
    with locked(home.create().locks / f"optuna-{key}.lock"):
        client = connect(home)
        experiment_id = experiment(client, home, _plain(study))
        parent = _parent(client, experiment_id, study, directions)
        known = _known(client, experiment_id, study, [trial.number for trial in trials])
        missing = [trial for trial in trials if (trial.number, _milliseconds(trial.started)) not in known]
        for trial in missing:
            _write(client, experiment_id, parent, study, trial)
    return len(missing)


def _parent(client: Any, experiment_id: str, study: str, directions: Sequence[str]) -> str:
    wanted = f"tags.`{OWN_STUDY}` = '{_quoted(study)}' and tags.`{WHOLE}` = 'study'"
    found = client.search_runs([experiment_id], wanted, order_by=["start_time ASC"], max_results=1)
    if found:
        return str(found[0].info.run_id)
    tags = {**environment_tags(study), OWN_STUDY: _quoted(study), NAME: study, "directions": ", ".join(directions)}
    run = client.create_run(experiment_id, tags={**tags, "mlflow.source.name": "hpo.optuna_callback", WHOLE: "study"})
    client.set_terminated(run.info.run_id)
    return str(run.info.run_id)


def _known(client: Any, experiment_id: str, study: str, numbers: Sequence[int]) -> set[tuple[int, int]]:
    """Numbers and starts, in milliseconds, of the trials that have whole runs; what is half of a run is deleted.

    Both, because a study may be of the name of an earlier one, which was in memory only or whose storage is gone.
    """
    wanted = f"tags.`{OWN_STUDY}` = '{_quoted(study)}' and tags.`{OWN_TRIAL}` "
    wanted += f"= '{numbers[0]}'" if len(numbers) == 1 else "!= ''"
    found = set()
    for run in pages(client.search_runs, experiment_ids=[experiment_id], filter_string=wanted, max_results=1000):
        if run.data.tags.get(WHOLE):
            found.add((int(run.data.tags[OWN_TRIAL]), int(run.info.start_time)))
        else:
            client.delete_run(run.info.run_id)
    return found


def _write(client: Any, experiment_id: str, parent: str, study: str, trial: ForeignTrial) -> None:
    value = f"{trial.values[0]:.4g}" if trial.values and trial.state is TrialState.COMPLETE else trial.state.value
    run = client.create_run(
        experiment_id,
        start_time=_milliseconds(trial.started),
        tags={
            PARENT: parent,
            OWN_STUDY: _quoted(study),
            OWN_TRIAL: str(trial.number),
            "state": trial.state.value,
            NAME: f"{trial.number} · {value}",
        },
    )
    params = {_plain(name): value for name, value in trial.parameters.items()}
    notes = {_plain(name): text[:5000] for name, text in trial.notes.items() if not name.startswith("mlflow.")}
    log(client, run.info.run_id, metrics=list(_metrics(trial)), params=params, tags=notes)
    client.set_terminated(run.info.run_id, STATUS[trial.state], end_time=int(1000 * trial.ended))
    client.set_tag(run.info.run_id, WHOLE, "trial")


def _metrics(trial: ForeignTrial) -> Iterator[Any]:
    for step, value in sorted(trial.epochs.items()):
        if math.isfinite(value):
            yield from metrics_at({_EPOCH: value}, trial.ended, step=step)
    named = {f"{OBJECTIVE}_{index}" if index else OBJECTIVE: value for index, value in enumerate(trial.values)}
    finite = {name: value for name, value in named.items() if math.isfinite(value)}
    yield from metrics_at(finite, trial.ended)


def _milliseconds(seconds: float) -> int:
    return max(1, int(1000 * seconds))  # MLflow takes 0 for now


def _plain(name: str) -> str:
    return _ODD.sub("_", name)[:200] or "_"


def _quoted(text: str) -> str:
    """A name as a tag that MLflow's filter language can ask for."""
    return text.replace("'", "_")
