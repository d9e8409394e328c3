"""A study as a finished run leaves it, in real stores and without any training."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from formula_study import formula_spec
from hpo.data.prepare import prepare
from hpo.data.split import split_card
from hpo.home import Home
from hpo.records import Epoch, StudyResult, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.search.study import Study
from hpo.spec.study import SplitSpec, StudySpec
from hpo.storage.reader import read_snapshots
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker

# By number: how the trials ended, and what they were worth.
ENDS = [
    (TrialState.COMPLETE, 0.9),
    (TrialState.COMPLETE, 0.8),
    (TrialState.PRUNED, None),
    (TrialState.FAILED, None),
]


def make_kept_study(home: Home) -> None:
    """Four trials and their runs; trials 0 and 1 keep model and pictures, trial 0 is registered as challenger."""
    spec = kept_spec(len(ENDS))
    card = prepare(spec.data, spec.split)
    study = open_study(home, spec, data_digest=card.digest)
    tracker = Tracker(home)
    tracker.open_study(study.result(), spec, card, split_card(card, spec.split))
    for state, value in ENDS:
        candidate = study.ask(budget=len(ENDS), worker="worker 0")
        assert candidate is not None
        tracker.start_trial(candidate, spec.with_values(candidate.parameters), worker="worker 0")
        result = result_of(candidate.number, state, value)
        result = study.tell(result)
        tracker.log_epochs(result.number, result.epochs)
        tracker.end_trial(result)
    for number in (0, 1):
        tracker.keep_model(number, left(home.work / "left"))
        tracker.log_figures(number, home.work / "left" / "figures")
    after = study.result()
    tracker.register(after, 0)
    tracker.close_study(after, status="FINISHED", summary="Four trials.")
    study.close()
    for file in sorted((home.work / "left").rglob("*"), reverse=True):
        file.rmdir() if file.is_dir() else file.unlink()
    (home.work / "left").rmdir()


def kept_spec(trials: int) -> StudySpec:
    """The formula's study, on data that is really there."""
    return formula_spec(trials=trials).model_copy(update={"split": SplitSpec(kind="holdout")})


def result_of(number: int, state: TrialState, value: float | None) -> TrialResult:
    scores = {"valid_accuracy": value or 0.5, "valid_loss": 0.4}
    epochs = tuple(Epoch(epoch, scores, 0.1, 0.01) for epoch in (1, 2))
    result = TrialResult(number, state, value, 2, epochs, scores, 0.1)
    if state is TrialState.FAILED:
        return replace(result, reason="the loss is nan", traceback="Traceback of the worker")
    return replace(result, confusion=((3, 1), (0, 4)))


def go_on(home: Home, *, trials: int = 6) -> Study:
    """A supervisor takes the study up again."""
    return open_study(home, kept_spec(trials), data_digest=stored(home).data_digest)


def left(folder: Path) -> Path:
    """What the tracker takes for a trial's model; nobody runs it here."""
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    (folder / "figures" / "curves.png").write_bytes(b"p" * 1000)
    (folder / "net.pt2").write_bytes(b"n" * 5000)
    (folder / "config.json").write_text(json.dumps({"class_names": ["a", "b"], "image_shape": [1, 1, 1]}))
    (folder / "setup.json").write_text("{}")
    return folder


def stored(home: Home) -> StudyResult:
    """The study as its storage has it."""
    (one,) = read_snapshots(home)
    return one.study


def tracked(home: Home) -> dict[str, tuple[str, str, dict[str, float]]]:
    """`trial N`, or the name of another run -> state as tagged, status and metrics, as MLflow itself tells them."""
    client = connect(home)
    experiment = client.get_experiment_by_name("formula")
    found = client.search_runs([experiment.experiment_id], max_results=1000)
    return {
        f"trial {run.data.tags['hpo.trial']}" if "hpo.trial" in run.data.tags else run.info.run_name: (
            run.data.tags.get("hpo.state", ""),
            run.info.status,
            dict(run.data.metrics),
        )
        for run in found
    }


def run_of(home: Home, number: int) -> Any:
    """MLflow's run of a trial."""
    client = connect(home)
    experiment = client.get_experiment_by_name("formula")
    (run,) = client.search_runs([experiment.experiment_id], f"tags.`hpo.trial` = '{number}'")
    return run
