"""A study told as events, without any training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hpo.events import EpochEnded, Event, Notice, StudyEnded, StudyOpened, TrialEnded, TrialStarted
from hpo.records import (
    Candidate,
    DataCard,
    EndReason,
    Epoch,
    ModelVersion,
    SplitCard,
    StudyResult,
    Trial,
    TrialResult,
    TrialState,
)

DATA = DataCard("digits", "", "", "sha256:1a2b3c4d5e6f", ("0", "1"), (8, 8, 1), 1437, 360, None, True, "scikit-learn")
SPLIT = SplitCard({"train": 1149, "valid": 288, "test": 360}, {"train": (0.5, 0.5), "valid": (0.5, 0.5)})
SPEC = {
    "question": "How wide?",
    "training": {"epochs": 3},
    "search": {"space": {"model.hidden": {}, "training.optimizer.name": {}, "training.optimizer.lr": {}}},
}
# Trial -> (state, objective of each epoch); trial 2 is the best.
STORY: dict[int, tuple[TrialState, list[float]]] = {
    0: (TrialState.COMPLETE, [0.5, 0.7, 0.8]),
    1: (TrialState.PRUNED, [0.2]),
    2: (TrialState.COMPLETE, [0.6, 0.9, 0.85]),
    3: (TrialState.FAILED, []),
}


def candidate(number: int) -> Candidate:
    values = {"model.hidden": 16 * (number + 1), "training.optimizer.name": "adam", "training.optimizer.lr": 0.00123456}
    return Candidate(number, number, values, seed=number)


def trial_result(number: int) -> TrialResult:
    state, values = STORY[number]
    epochs = tuple(Epoch(index + 1, {"valid_accuracy": value}, 0.001, 0.1) for index, value in enumerate(values))
    best = max(values, default=None)
    return TrialResult(
        number,
        state,
        value=best,
        best_epoch=values.index(best) + 1 if best is not None else 0,
        epochs=epochs,
        seconds=0.1 * len(values),
        reason="the loss is nan" if state is TrialState.FAILED else "",
        traceback="Traceback of the worker" if state is TrialState.FAILED else "",
    )


def study(*numbers: int, **changes: Any) -> StudyResult:
    trials = tuple(Trial(candidate(number), STORY[number][0], trial_result(number)) for number in numbers)
    options: dict[str, Any] = {"direction": "maximize", "objective": "valid_accuracy", "spec": SPEC} | changes
    return StudyResult("digits-mlp", 1, trials=trials, **options)


def opened(*before: int, budget: int = 4, **changes: Any) -> StudyOpened:
    return StudyOpened(study(*before, **changes), DATA, SPLIT, budget, len(before), 2, "cpu")


def trial_events(number: int, *, best: bool = False) -> Iterator[Event]:
    yield TrialStarted(candidate(number), "worker 0")
    result = trial_result(number)
    for epoch in result.epochs:
        yield EpochEnded(number, epoch)
    yield TrialEnded(result, best=best)


def ended(*numbers: int, reason: str = "budget") -> StudyEnded:
    result = study(*numbers)
    best = result.best
    return StudyEnded(result, EndReason(reason), version(best.number) if best else None)


def version(trial: int, number: int = 7, **changes: Any) -> ModelVersion:
    options: dict[str, Any] = {"aliases": ("challenger",), "scores": {"valid_accuracy": 0.9}} | changes
    return ModelVersion(
        name="digits-mlp",
        version=number,
        run_id="r",
        model_uri=f"models:/digits-mlp/{number}",
        study="digits-mlp",
        trial=trial,
        **options,
    )


def whole_story() -> Iterator[Event]:
    yield Notice("reading digits")
    yield opened()
    for number in STORY:
        yield from trial_events(number, best=number in (0, 2))
    yield ended(*STORY)
