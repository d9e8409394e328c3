"""Names of metrics in MLflow, and scores read back from them."""

from __future__ import annotations

import tiny_study as tiny
from hpo.tracking.run_metrics import epoch_metrics, metric_name, result_metrics, scores_of

SCORES = {"valid_accuracy": 0.9, "valid_recall[cat]": 0.5, "valid_recall[cat]_std": 0.1, "train_loss": 0.2}


def test_metrics_are_in_the_section_of_their_part() -> None:
    names = [metric_name(score) for score in SCORES]
    assert names == ["valid/accuracy", "valid/recall/cat", "valid/recall/cat/_std", "train/loss"]
    first, second = ({one.key for one in epoch_metrics(tiny.epochs(1, fold=fold), 1.0)} for fold in (0, 1))
    assert first >= {"valid/loss", "train/learning_rate", "system/epoch_seconds"}
    assert second >= {"fold1/valid_loss", "fold1/train_learning_rate", "system/fold1_epoch_seconds"}
    assert not first & second


def test_scores_are_read_back_under_their_names() -> None:
    written = {one.key: one.value for one in result_metrics(tiny.result(0, scores=SCORES), 1.0)}
    assert scores_of(written) == {score: value for score, value in SCORES.items() if score.startswith("valid_")}


def test_scores_of_runs_of_earlier_versions_are_read() -> None:
    old = {"best_valid_accuracy": 0.9, "best_valid_recall/cat": 0.5, "best_epoch": 3.0, "objective": 0.9}
    assert scores_of({**old, "valid_accuracy": 0.8, "best_valid_loss": float("nan")}) == {
        "valid_accuracy": 0.9,
        "valid_recall[cat]": 0.5,
    }


def test_a_trial_has_few_metrics_beside_its_curves() -> None:
    written = {one.key for one in result_metrics(tiny.result(0), 1.0)}
    assert written == {
        "objective",
        "parameter_count",
        "system/training_seconds",
        "valid/best/accuracy",
        "valid/best/epoch",
        "valid/best/loss",
    }
