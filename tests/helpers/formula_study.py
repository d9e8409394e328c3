"""A study whose training is a formula, on a real study storage: the platform's logic in milliseconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from hpo.errors import StoreError
from hpo.events import EpochEnded, Event, TrialEnded
from hpo.execute.budget import Pace
from hpo.execute.workers.task import Task
from hpo.records import DataCard, Epoch, TrialResult, TrialState
from hpo.search.study import Study
from hpo.spec.study import StudySpec

CARD = DataCard(
    name="formula",
    folder="",
    test_folder="",
    digest="sha256:0",
    class_names=("a", "b"),
    image_shape=(1, 1, 1),
    development_count=2,
    test_count=1,
    valid_start=None,
    official=True,
    source="a formula",
)


def formula_spec(**search: Any) -> StudySpec:
    return StudySpec.model_validate(
        {
            "name": "formula",
            "data": {"name": "digits"},
            "model": {"kind": "mlp"},
            "training": {"epochs": 3},
            "keep": {"models": "none"},
            "search": {
                "sampler": "random",
                "trials": 6,
                "space": {"model.dropout": {"float": [0.0, 0.9]}, "model.hidden": {"int": [1, 1000]}},
                **search,
            },
        }
    )


def formula(task: Task, device: str):
    """Accuracy falls with dropout and rises with the epoch; every fold of the platform above is real."""
    epochs = []
    for number in range(1, task.setup.training.epochs + 1):
        accuracy = (1 - task.setup.model.dropout) * number / task.setup.training.epochs
        scores = {"train_loss": 1.0, "train_accuracy": accuracy, "valid_loss": 1 - accuracy, "valid_accuracy": accuracy}
        epochs.append(Epoch(number=number, scores=scores, learning_rate=0.1, seconds=0.001))
        go_on = yield EpochEnded(task.number, epochs[-1])
        if not go_on:
            break
    state = TrialState.COMPLETE if go_on else TrialState.PRUNED
    yield TrialEnded(TrialResult(task.number, state, None, len(epochs), tuple(epochs), epochs[-1].scores, 0.01))


def measure_slowly(*_candidates: Any) -> Pace:
    """The measurement of --minutes, pretended: an epoch takes 100 s."""
    return Pace((50.0, 150.0))


@dataclass
class RecordedTracker:
    """A tracker that records its calls, in order."""

    calls: list[tuple[str, Any]] = field(default_factory=list)
    lost: frozenset[int] = frozenset()  # trials whose model cannot be logged

    def start_trial(self, candidate, setup, *, worker, started):
        self.calls.append(("start", candidate.number))

    def log_epochs(self, number, epochs, *, ended):
        self.calls.append(("epochs", (number, len(epochs))))

    def log_missing(self, result):
        self.calls.append(("missing", (result.number, len(result.epochs))))

    def pause_trial(self, result):
        self.calls.append(("pause", (result.number, len(result.epochs))))

    def end_trial(self, result):
        self.calls.append(("end", (result.number, result.state)))

    def reconcile(self, study, spec, *, leave):
        self.calls += [("reconcile", trial.number) for trial in study.trials if trial.number not in leave]

    def keep_model(self, number, folder):
        if number in self.lost:
            raise StoreError("nothing can be logged.")
        self.calls.append(("keep", number))

    def log_figures(self, number, folder):
        self.calls.append(("figures", number))

    def drop_model(self, number):
        self.calls.append(("drop", number))

    def drop_figures(self, number):
        self.calls.append(("drop figures", number))


@dataclass
class Run:
    """One run of a study, ended."""

    reason: str
    study: Study
    events: list[Event]
    tracker: RecordedTracker

    @property
    def trials(self):
        return self.study.result().trials
