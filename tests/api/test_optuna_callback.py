"""Studies of people's own objectives: every finished trial is one run in MLflow, whatever was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest

import hpo
from hpo.home import Home
from hpo.locks import locked
from hpo.tracking import foreign_trials
from hpo.tracking.foreign_trials import OWN_STUDY, OWN_TRIAL, WHOLE
from hpo.tracking.store import connect

# As a user writes it: real digits, epochs, pruning.
OBJECTIVE = """
import sys, time
import optuna
from sklearn.datasets import load_digits
from sklearn.linear_model import SGDClassifier
from sklearn.model_selection import train_test_split
import hpo

images, labels = load_digits(return_X_y=True)
train, valid, train_labels, valid_labels = train_test_split(images / 16, labels, random_state=0)

def objective(trial):
    model = SGDClassifier(alpha=trial.suggest_float("alpha", 1e-6, 10, log=True), random_state=0)
    for epoch in range(4):
        model.partial_fit(train, train_labels, classes=range(10))
        trial.report(model.score(valid, valid_labels), epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
        time.sleep(float(sys.argv[2]))
    return model.score(valid, valid_labels)

study = optuna.create_study(
    study_name="mine", storage="sqlite:///mine.db", direction="maximize", load_if_exists=True,
    pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
)
study.optimize(objective, n_trials=int(sys.argv[1]), callbacks=[hpo.optuna_callback()])
"""


@pytest.fixture
def place(tmp_path: Path, empty_stores: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    import shutil

    shutil.copytree(empty_stores / "mlruns", tmp_path / "mlruns")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("HPO_HOME", raising=False)
    (tmp_path / "mine.py").write_text(OBJECTIVE)
    return tmp_path


def begin(place: Path, trials: int, pause: float = 0.0) -> subprocess.Popen[str]:
    words = [sys.executable, "mine.py", str(trials), str(pause)]
    return subprocess.Popen(words, cwd=place, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> None:
    _, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors


def runs(place: Path, name: str = "mine") -> dict[int, Any]:
    """The runs of the trials, of which none is there twice."""
    client = connect(Home.at(place))
    experiment = client.get_experiment_by_name(name)
    found = client.search_runs([experiment.experiment_id], f"tags.`{OWN_TRIAL}` != ''", max_results=1000)
    numbers = [int(run.data.tags[OWN_TRIAL]) for run in found]
    assert len(numbers) == len(set(numbers))
    return dict(zip(numbers, found, strict=True))


def assert_as_in_optuna(place: Path) -> None:
    study = optuna.load_study(study_name="mine", storage=f"sqlite:///{place / 'mine.db'}")
    done = [trial for trial in study.trials if trial.state.is_finished()]
    found, client = runs(place), connect(Home.at(place))
    assert set(found) == {trial.number for trial in done}
    for trial in done:
        run = found[trial.number]
        assert run.info.status == ("FAILED" if trial.state.name == "FAIL" else "FINISHED")
        assert (
            run.data.tags["state"] == {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}[trial.state.name]
        )
        assert float(run.data.params["alpha"]) == pytest.approx(trial.params["alpha"])
        if trial.value is not None:
            assert run.data.metrics["objective"] == pytest.approx(trial.value)
        epochs = {each.step: each.value for each in client.get_metric_history(run.info.run_id, "epoch")}
        assert epochs == pytest.approx(trial.intermediate_values)
        assert run.data.tags["mlflow.parentRunId"]


@pytest.mark.slow
def test_two_processes_and_a_killed_one_leave_one_run_for_each_finished_trial(place: Path) -> None:
    finish(begin(place, 3))
    killed, other = begin(place, 20, pause=0.1), begin(place, 4)
    storage = f"sqlite:///{place / 'mine.db'}"
    end = time.monotonic() + 120
    while time.monotonic() < end:
        states = [trial.state.name for trial in optuna.load_study(study_name="mine", storage=storage).trials]
        if len(states) > 6 and "RUNNING" in states:
            break
        time.sleep(0.2)
    os.kill(killed.pid, signal.SIGKILL)
    killed.communicate()
    finish(other)
    finish(begin(place, 2))
    assert_as_in_optuna(place)
    states = {trial.state.name for trial in optuna.load_study(study_name="mine", storage=storage).trials}
    assert {"COMPLETE", "PRUNED"} <= states


@pytest.fixture
def study(place: Path) -> optuna.Study:
    return optuna.create_study(study_name="mine", storage=f"sqlite:///{place / 'mine.db'}", direction="maximize")


def objective(trial: optuna.Trial) -> float:
    alpha = trial.suggest_float("alpha", 0.0, 1.0)
    for step in range(3):
        trial.report(alpha * step, step)
    if trial.number == 1:
        raise optuna.TrialPruned
    if trial.number == 2:
        raise ValueError("it fails")
    trial.set_user_attr("note", [1, 2])
    return alpha


def test_each_trial_is_a_run_with_its_epochs_state_and_attributes(place: Path, study: optuna.Study) -> None:
    study.optimize(objective, n_trials=4, callbacks=[hpo.optuna_callback(home=place)], catch=(ValueError,))
    assert_as_in_optuna(place)
    assert runs(place)[0].data.tags["note"] == "[1, 2]"


def test_what_a_death_left_is_recorded_once_half_of_a_run_too(
    place: Path, study: optuna.Study, monkeypatch: pytest.MonkeyPatch
) -> None:
    study.optimize(objective, n_trials=2)  # of a process that died before its callback
    record, log = hpo.optuna_callback(home=place), foreign_trials.log

    def dies(*arguments: Any, **named: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(foreign_trials, "log", dies)
    with pytest.raises(KeyboardInterrupt):
        record.reconcile(study)
    monkeypatch.setattr(foreign_trials, "log", log)
    assert record.reconcile(study) == 2
    assert record.reconcile(study) == 0
    assert_as_in_optuna(place)
    for run in runs(place).values():
        assert run.data.tags[WHOLE] == "trial"
        assert run.data.tags[OWN_STUDY] == "mine"


def test_a_second_study_of_the_same_name_is_recorded_too(place: Path) -> None:
    for _ in range(2):  # in memory, as a script that is run again
        study = optuna.create_study(study_name="mine")
        record = hpo.optuna_callback(home=place)
        study.optimize(lambda trial: trial.suggest_float("alpha", 0.0, 1.0), n_trials=2, callbacks=[record])
        assert record.reconcile(study) == 0
    client = connect(Home.at(place))
    experiment = client.get_experiment_by_name("mine").experiment_id
    found = client.search_runs([experiment], f"tags.`{WHOLE}` = 'trial'")
    assert sorted(int(run.data.tags[OWN_TRIAL]) for run in found) == [0, 0, 1, 1]


def test_a_store_that_refuses_does_not_end_the_study(
    place: Path, study: optuna.Study, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("hpo.locks._PATIENCE_SECONDS", 0.1)
    record = hpo.optuna_callback(home=place)
    (name,) = {f"optuna-{part}.lock" for part in [_key("mine")]}
    with locked(Home.at(place).locks / name):
        study.optimize(objective, n_trials=1, callbacks=[record])
    assert "trial 0 is not recorded yet" in caplog.text
    study.optimize(objective, n_trials=1, callbacks=[record])
    assert_as_in_optuna(place)


def _key(name: str) -> str:
    import hashlib

    return hashlib.sha256(name.encode()).hexdigest()[:16]
