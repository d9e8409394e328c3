"""A study that has run, opened from Python: frames, the best trial, its model, figures; and what plain Optuna reads."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest

import hpo
from hpo.api.study import Study
from hpo.errors import HpoError, ModelError, StoreError
from hpo.home import Home
from hpo.storage.reader import read_study
from made_studies import random_study, staged_study, two_objectives


def test_an_opened_study_is_the_whole_record_of_its_run(project: Path) -> None:
    study = hpo.open_study("digits-mlp")
    told = read_study(Home.find(project), "digits-mlp")
    assert study.trials == told.trials
    assert study.best is not None
    assert study.best_value == study.best.value == max(trial.value for trial in study.trials)
    assert study.best_params == dict(study.best.candidate.parameters)
    assert list(study.best_params) == ["model.dropout"]
    assert study.best_trial.number == study.best.number


def test_a_study_is_opened_without_its_libraries_of_tracking_and_search(project: Path) -> None:
    code = (
        "import hpo, sys; hpo.open_study('digits-mlp').best_value;"
        "print({'optuna', 'mlflow', 'torch', 'pandas', 'matplotlib'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_study_that_has_not_run_is_an_error_with_the_next_step(project: Path) -> None:
    with pytest.raises(StoreError, match="no study 'digits-mpl' has run here") as caught:
        hpo.open_study("digits-mpl")
    assert "Did you mean digits-mlp?" in str(caught.value.hint)
    nothing = Study.of(replace(random_study(), trials=()), Home.find(project))
    with pytest.raises(StoreError, match="no trial is complete"):
        nothing.best_params  # noqa: B018 - the property raises
    with pytest.raises(ModelError, match="none of its models is registered"):
        nothing.best_model()


def test_trials_are_a_frame_with_the_columns_of_optuna(project: Path) -> None:
    frame = hpo.open_study("digits-mlp").trials_dataframe()
    own = optuna.load_study(study_name="digits-mlp", storage="sqlite:///mlruns/optuna.db").trials_dataframe()
    own = own.rename(columns={"value_valid_accuracy": "value"})  # named so because the study says what it measures
    assert {column for column in own if "_attrs_" not in column} <= set(frame)
    for column in ("number", "value", "params_model.dropout", "state"):
        assert frame[column].tolist() == own[column].tolist()
    assert (frame["duration"].dt.total_seconds() - own["duration"].dt.total_seconds()).abs().max() < 0.01
    assert (frame["epochs"] == 2).all()
    assert {"valid_accuracy", "valid_loss", "seconds"} <= set(frame)
    study = hpo.open_study("digits-mlp")
    assert study.to_dataframe().equals(study.trials_dataframe())


def test_frames_hold_every_kind_of_study() -> None:
    home = Home.at("nowhere")
    two = Study.of(two_objectives(), home).trials_dataframe()
    assert {"values_0", "values_1"} <= set(two)
    staged = Study.of(staged_study(), home)
    assert set(staged.trials_dataframe()["stage"]) == {"augmentation", "size", "activation"}
    epochs = staged.epochs_dataframe()
    assert len(epochs) == sum(len(trial.result.epochs) for trial in staged.trials if trial.result)
    assert set(epochs["fold"]) == {0, 1, 2}
    assert Study.of(replace(random_study(), trials=()), home).trials_dataframe().empty


def test_the_best_model_predicts(project: Path) -> None:
    model = hpo.open_study("digits-mlp").best_model()
    assert model.predict_proba(np.zeros((3, 8, 8, 1), np.uint8)).shape == (3, 10)


PLOTS = ["optimization_history", "learning_curves", "parallel_coordinate", "slice", "effects", "timeline", "contour"]


@pytest.mark.parametrize("name", PLOTS)
def test_a_plot_is_a_figure_that_a_notebook_shows(name: str) -> None:
    figure = getattr(Study.of(random_study(), Home.at("nowhere")).plot, name)()
    assert figure.axes
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_plots_of_a_real_study_and_one_that_has_nothing_to_draw(project: Path) -> None:
    study = hpo.open_study("digits-mlp")
    assert len(study.plot.confusion_matrix().axes) == 3
    assert study.report("page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    with pytest.raises(HpoError, match="nothing to draw"):
        study.plot.pareto_front()
    with pytest.raises(HpoError, match="nothing to draw"):
        study.plot.param_importances()


def test_a_notebook_shows_a_study_as_its_best_trials() -> None:
    study = Study.of(random_study(), Home.at("nowhere"))
    html = study._repr_html_()
    assert "Study random: " in html
    assert "Why?" in html
    assert html.count("<tr>") == 6
    assert repr(study).startswith("<Study random: ")
    assert f"trial {study.best_trial.number}" in repr(study)
    evil = replace(random_study(), spec={**random_study().spec, "question": "<script>"})
    assert "<script>" not in Study.of(evil, Home.at("nowhere"))._repr_html_()


def test_plain_optuna_reads_values_reports_and_names(project: Path) -> None:
    own = optuna.load_study(study_name="digits-mlp", storage="sqlite:///mlruns/optuna.db")
    study = hpo.open_study("digits-mlp")
    assert own.best_value == study.best_value
    assert own.best_params == study.best_params
    assert own.direction.name == "MAXIMIZE"
    for theirs, ours in zip(own.trials, study.trials, strict=True):
        assert ours.result is not None
        reported = {epoch.number: epoch.scores["valid_accuracy"] for epoch in ours.result.epochs}
        assert theirs.intermediate_values == pytest.approx(reported)
        assert theirs.user_attrs["best_epoch"] == ours.result.best_epoch
