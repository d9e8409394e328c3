"""A finished trial trained again: the same numbers, told epoch by epoch, and no store touched."""

import dataclasses
import hashlib
import json
import math

import pytest
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.errors import HpoError, StoreError
from hpo.events import EpochEnded
from hpo.execute.run_study import run_study
from hpo.execute.workers.task import train_task
from hpo.home import Home
from hpo.jobs.rerun import Agreement, compare_epochs, rerun
from hpo.records import Epoch, TrialState
from hpo.spec.load import load_study
from hpo.storage.reader import read_study
from no_pictures import draw_nothing


@pytest.fixture(scope="module")
def home(tmp_path_factory, digits_cache):
    """A store with a study of three trials: one complete, one pruned after its first epochs, one failed."""
    folder = tmp_path_factory.mktemp("project")
    settings = {
        "training.epochs": 3,
        "training.patience": None,
        "model.dropout": 0.2,
        "model.hidden": [48, 48, 48],
        "training.optimizer": {"name": "sgd", "lr": 0.1, "momentum": 0.9},
        "keep.models": "none",
        "search.sampler": "grid",
        "search.pruner": {"name": "median", "startup_trials": 1, "warmup_epochs": 0},
        "search.space": {"training.optimizer.lr": {"choice": [0.05, 1.0e-5, 100.0]}},
        "search.start": [{"training.optimizer.lr": lr} for lr in (0.05, 1.0e-5, 100.0)],
    }
    patch = pytest.MonkeyPatch()
    patch.setenv("HPO_DATA", str(digits_cache))
    patch.setattr("hpo.execute.engines.local.cores", lambda: 1)
    patch.setattr("hpo.execute.subscribers.tracking.draw_study", draw_nothing)
    run_study(load_study("digits-mlp", overrides=settings), trials=3, workers=0, home=folder)
    yield folder
    patch.undo()


def _stores(home):
    # SQLite makes an empty log and its index, -wal and -shm, for whoever reads.
    files = [
        path
        for path in (home / "mlruns").rglob("*")
        if path.is_file()
        and not path.name.endswith(("-shm", ".lock"))
        and (path.stat().st_size or not path.name.endswith("-wal"))
    ]
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _number(home, state):
    trials = read_study(Home.find(home), "digits-mlp").trials
    return next(trial.number for trial in trials if trial.state is state)


@pytest.mark.parametrize("state", [TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED])
def test_every_end_of_a_trial_repeats_bit_for_bit(home, state):
    before = _stores(home)
    seen = []
    found = rerun(f"digits-mlp#{_number(home, state)}", home=home, watch=seen.append)
    assert found.agreement is Agreement.EQUAL
    assert found.difference == 0.0
    assert found.ended == found.ended_again
    assert found.ended.startswith(state)
    assert tuple(seen) == found.epochs
    assert _stores(home) == before
    if state is TrialState.COMPLETE:
        assert (found.changed, found.images) == (0, 288)
        assert len(found.epochs) == 3
        assert found.same_machine
    if state is TrialState.PRUNED:
        assert 0 < len(found.epochs) < 3


def test_the_command_shows_each_epoch_and_ends_with_0_where_they_agree(home):
    number = _number(home, TrialState.COMPLETE)
    told = CliRunner().invoke(app, ["rerun", f"digits-mlp#{number}", "--home", str(home)])
    assert told.exit_code == 0, told.output
    assert told.output.count("\n=") == 3
    assert "all 3 epochs agree bit for bit. 0 of 288 validation images have another answer." in told.output


@pytest.mark.slow
def test_a_trial_that_shared_its_computation_repeats_closely(tmp_path, monkeypatch):
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "cache"))
    settings = {"training.epochs": 3, "model.dropout": 0.2, "keep.models": "none", "search.sampler": "random"}
    study = run_study(load_study("digits-mlp", overrides=settings), trials=3, workers=1, stack=3, home=tmp_path)
    assert {trial.result.settings["stack"] for trial in study.trials} == {"shared"}
    again = rerun(f"digits-mlp#{study.best.number}", home=tmp_path)
    assert again.agreement in (Agreement.EQUAL, Agreement.CLOSE), str(again)


def test_the_command_ends_with_1_where_they_differ(home, monkeypatch):
    def otherwise(task, device, stacks):
        training = train_task(task, device, stacks)
        message = next(training)
        while isinstance(message, EpochEnded):
            scores = {
                **message.epoch.scores,
                "valid_loss": message.epoch.scores["valid_loss"] + 0.01 * message.epoch.number,
            }
            go_on = yield EpochEnded(message.number, dataclasses.replace(message.epoch, scores=scores))
            message = training.send(go_on)
        yield message

    monkeypatch.setattr("hpo.jobs.rerun.train_task", otherwise)
    asked = ["rerun", f"digits-mlp#{_number(home, TrialState.COMPLETE)}", "--home", str(home)]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 1, told.output
    assert told.output.count("\nx") == 3
    assert "differ by up to 0.03, more than 0.001" in told.output
    close = CliRunner().invoke(app, [*asked, "--tolerance", "0.025", "--json"])
    assert close.exit_code == 1
    found = json.loads(close.stdout)
    assert [check["agreement"] for check in found["epochs"]] == ["close", "close", "differs"]
    assert found["epochs"][2]["score"] == "valid_loss"
    assert CliRunner().invoke(app, [*asked, "--tolerance", "0.1"]).exit_code == 0


@pytest.mark.parametrize("until", [0.2, 0.9])
def test_a_trial_that_search_until_ended_repeats(home, tmp_path, until):
    settings = {"training.epochs": 30, "keep.models": "none", "search.pruner": "none", "search.until": until}
    study = run_study(load_study("digits-mlp", overrides=settings), trials=1, workers=0, home=tmp_path)
    (trial,) = study.trials
    assert len(trial.result.epochs) < 30
    found = rerun("digits-mlp#0", home=tmp_path)
    assert (found.agreement, len(found.epochs)) == (Agreement.EQUAL, len(trial.result.epochs))


def test_an_epoch_that_one_training_lacks_differs():
    scores = {"valid_accuracy": 0.5, "train_loss": math.nan}
    epoch = Epoch(1, scores, 0.1, 1.0)
    alike = compare_epochs((0, 1), epoch, dataclasses.replace(epoch, seconds=2.0), "valid_accuracy", 0.0)
    assert alike.agreement is Agreement.EQUAL
    missing = compare_epochs((0, 1), epoch, None, "valid_accuracy", 10.0)
    assert (missing.agreement, missing.objective, missing.again) == (Agreement.DIFFERS, 0.5, None)
    worse = dataclasses.replace(epoch, scores={**scores, "train_loss": 1.0})
    assert compare_epochs((0, 1), epoch, worse, "valid_accuracy", 10.0).score == "train_loss"


@pytest.mark.parametrize("asked", ["digits-mlp", "digits-mlp#", "digits-mlp/0", "digits-mlp#99", "nothing#0"])
def test_what_is_no_finished_trial_is_one_message(home, asked):
    with pytest.raises((HpoError, StoreError)) as caught:
        rerun(asked, home=home)
    assert caught.value.hint
