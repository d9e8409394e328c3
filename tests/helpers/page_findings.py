"""Studies told as findings, with as many classes, trials and parameters as a page must bear."""

from __future__ import annotations

import io
from datetime import UTC, datetime
from typing import Any

import numpy as np
from PIL import Image

from hpo.records import Candidate, DataCard, Epoch, ModelVersion, SplitCard, StudyResult, Trial, TrialResult, TrialState
from hpo.report.figures.images import confident_mistakes
from hpo.report.study_page import Answers, Findings, Opening, Samples
from hpo.spec.load import parse_study

SPACE = {
    "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True},
    "model.activation": {"choice": ["relu", "tanh"]},
    "model.dropout": {"float": [0.0, 0.5]},
}


def spec(**changes: Any) -> Any:
    plain: dict[str, Any] = {
        "name": "tiny",
        "question": "Which rate is best?",
        "data": {"name": "digits"},
        "model": {"kind": "mlp"},
        "search": {"space": SPACE},
    }
    return parse_study({**plain, **changes})


def trial(number: int, state: TrialState = TrialState.COMPLETE, *, stage: str | None = None, **changes: Any) -> Trial:
    parameters = {
        "training.optimizer.lr": 1e-4 * 1.2 ** (number % 30),
        "model.activation": ["relu", "tanh"][number % 2],
    }
    parameters["model.dropout"] = (number % 7) / 14
    candidate = Candidate(number, number, changes.pop("parameters", parameters), number, stage=stage)
    epochs = tuple(
        Epoch(n, {"train_loss": 2 / n, "train_accuracy": 0.5, "valid_loss": 1 / n, "valid_accuracy": 1 - 1 / n}, 0.1, 1)
        for n in range(1, 6)
    )
    value = 0.8 + 0.01 * (number % 13) if state in (TrialState.COMPLETE, TrialState.PRUNED) else None
    outcome: dict[str, Any] = {"value": value, "best_epoch": 5, "epochs": epochs, "seconds": 12.0}
    if state is TrialState.COMPLETE:
        outcome |= {
            "scores": {"valid_accuracy": value, "valid_loss": 0.3},
            "confusion": ((90, 10), (20, 80)),
            "parameter_count": 1234,
            "settings": {"device": "cpu", "precision": "float32"},
        }
    elif state is TrialState.FAILED:
        outcome = {"reason": "the loss is nan"}
    started = 1.7e9 + 60 * number
    return Trial(candidate, state, TrialResult(number, state, **{**outcome, **changes}), started, 50.0, "worker 0")


def study(*trials: Trial, **changes: Any) -> StudyResult:
    options = {"direction": "maximize", "objective": "valid_accuracy", "data_digest": "sha256:" + "ab" * 32}
    return StudyResult("tiny", 1, trials=trials, created=1.7e9, **{**options, **changes})


def findings(*trials: Trial, about: Any = None, **changes: Any) -> Findings:
    return Findings(study(*trials), about or spec(), datetime(2026, 1, 2, tzinfo=UTC), **changes)


def data(classes: int = 2, *, side: int = 8) -> DataCard:
    names = tuple(f"class {label} with quite a long name (and a remark)" for label in range(classes))
    digest = "sha256:" + "ab" * 32
    return DataCard("digits", "", "", digest, names, (side, side, 3), 1000, 300, None, True, "scikit-learn")


def look(version: int = 1, number: int = 0, **scores: float) -> Opening:
    return Opening(datetime(2026, 1, 1, tzinfo=UTC), version, number, scores or {"test_accuracy": 0.81})


def model(number: int = 0, version: int = 1) -> ModelVersion:
    return ModelVersion("tiny", version, ("challenger",), "r", f"models:/tiny/{version}", "tiny", number)


def crowded(classes: int = 20, trials: int = 60) -> Findings:
    """A study with everything there is: many classes, trials of all ends, answers, mistakes, samples, a test score."""
    rng = np.random.default_rng(0)
    card = data(classes)
    labels = rng.integers(0, classes, 600)
    scores = rng.normal(size=(600, classes)) + 3 * np.eye(classes)[labels]
    probabilities = (np.exp(scores) / np.exp(scores).sum(1, keepdims=True)).astype(np.float32)
    confusion = np.zeros((classes, classes), int)
    np.add.at(confusion, (labels, probabilities.argmax(1)), 1)
    ends = (TrialState.COMPLETE, TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)
    matrix = tuple(tuple(row) for row in confusion.tolist())
    told = [trial(n, ends[n % 4], **({"confusion": matrix} if n % 4 < 2 else {})) for n in range(trials)]
    mistakes = tuple(confident_mistakes(labels, probabilities))
    images = {place: rng.integers(0, 256, (8, 8, 3), np.uint8) for each in mistakes for place in each.positions}
    shares = tuple([1 / classes] * classes)
    best = study(*told).best
    assert best is not None
    reference = {
        "label": "by hand",
        "score": "test_accuracy",
        "value": 0.79,
        "source": "a report",
        "note": "500 epochs",
    }
    return findings(
        *told,
        about=spec(references=[reference]),
        data=card,
        split=SplitCard({"train": 700, "valid": 300, "test": 300}, dict.fromkeys(("train", "valid", "test"), shares)),
        samples=Samples(tuple(strip(rng) for _ in range(classes)), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2), 700),
        answers=Answers(labels, probabilities, mistakes, images),
        model=model(best.number),
        openings=(look(1, best.number),),
        versions={"python": "3.11"},
    )


def strip(rng: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (8, 48, 3), np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()
