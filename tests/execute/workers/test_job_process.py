"""What the helper process draws of a trial and of a study, on real files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from formula_study import CARD, formula_spec
from hpo.execute.workers import job_process
from hpo.execute.workers.job_process import draw_study, draw_trial
from hpo.records import Candidate, Epoch, StudyResult, Trial, TrialResult, TrialState
from hpo.report.figures import classifier

CURVES = {"train_loss": 1.0, "train_accuracy": 0.5, "valid_loss": 1.0, "valid_accuracy": 0.5}


@pytest.fixture
def left(tmp_path: Path):
    """A trial's result with the files that its training left, and the data that it was trained on."""
    rng = np.random.default_rng(0)
    labels, probabilities = rng.integers(0, 2, 40), rng.dirichlet((1, 1), 40)
    np.save(tmp_path / "development_images.npy", rng.integers(0, 255, (60, 8, 8, 1), dtype=np.uint8))
    np.savez(tmp_path / "validation.npz", rows=np.arange(20, 60), labels=labels, probabilities=probabilities)
    confusion = np.bincount(labels * 2 + probabilities.argmax(1), minlength=4).reshape(2, 2).tolist()
    epochs = tuple(Epoch(number, CURVES, 0.1, 1.0) for number in (1, 2))
    result = TrialResult(3, TrialState.COMPLETE, 0.5, 2, epochs, confusion=confusion, folder=str(tmp_path))
    return result, replace(CARD, folder=str(tmp_path), image_shape=(8, 8, 1))


def test_a_trial_has_its_pictures(left, tmp_path):
    drawn = draw_trial(*left, tmp_path / "figures")
    # Two classes: the truth of a mistake is always second, so there is no histogram of ranks.
    names = {"training_curves", "confusion", "class_accuracy", "roc", "surest_mistakes"}
    assert {path.stem for path in drawn} == names
    assert all(path.stat().st_size > 1000 for path in drawn)


def test_a_trial_without_validation_images_has_its_curves(left, tmp_path):
    result, data = left
    bare = replace(result, confusion=(), folder=str(tmp_path / "elsewhere"))
    assert [path.stem for path in draw_trial(bare, data, tmp_path / "figures")] == ["training_curves"]


def test_a_picture_that_fails_is_told_and_costs_no_other(left, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise ValueError("no ink")

    told = []
    monkeypatch.setattr(classifier, "roc_figure", fail)
    monkeypatch.setattr(job_process, "_notify", lambda text, done, total: told.append(text))
    drawn = {path.stem for path in draw_trial(*left, tmp_path / "figures")}
    assert "roc" not in drawn
    assert "confusion" in drawn
    assert told == ["trial 3: the figure roc could not be drawn: no ink"]


def test_a_study_is_drawn_into_an_empty_folder_and_without_a_complete_trial_not_at_all(left, tmp_path):
    spec = formula_spec().model_dump(mode="json")
    trials = tuple(
        Trial(
            Candidate(number, number, {"model.dropout": number / 20, "model.hidden": 40 * (5 * number % 12) + 1}, 0),
            TrialState.COMPLETE,
            replace(left[0], number=number, value=0.5 + number % 7 / 20, scores=CURVES),
            started=1.7e9 + number,
            run_seconds=1.0,
        )
        for number in range(12)
    )
    study = StudyResult("formula", 1, "maximize", "valid_accuracy", trials, spec)
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "stale.png").touch()
    drawn = draw_study(study, folder)
    assert {path.stem for path in drawn} >= {"optimisation_history", "parameter_importance", "contour", "timeline"}
    assert set(folder.iterdir()) == set(drawn)
    assert draw_study(replace(study, trials=()), folder) == []
    assert not folder.exists()
