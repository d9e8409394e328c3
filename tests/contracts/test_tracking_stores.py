"""The contract of tracking stores: MLflow on its embedded file, on PostgreSQL and behind a server serve alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import tiny_study as tiny
from hpo.records import TrialState
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from tracked_store import Tracked


def test_a_trial_run_holds_its_searched_values_and_where_it_came_from(tracked: Tracked) -> None:
    tracked.track(0)
    run = tracked.run(0)
    assert run.data.params == {"training.optimizer.lr": "0.01", "seed": "100"}
    assert (run.data.tags["machine.device"], run.data.tags["machine.precision"]) == ("cpu", "float32")
    assert run.data.tags["mlflow.source.name"] == f"hpo run {tracked.name}"
    assert "| training.optimizer.lr | 0.01 |" in run.data.tags["mlflow.note.content"]
    assert run.data.tags["mlflow.parentRunId"] == tracked.parent().info.run_id
    assert {"version.torch", "version.python", "mlflow.user"} <= run.data.tags.keys()
    assert run.data.tags["hpo.data_digest"] == tiny.data().digest
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"
    assert tiny.data().digest in dataset.dataset.profile


def test_a_trial_run_holds_each_epoch_once_and_its_best_scores(tracked: Tracked) -> None:
    tracked.track(3)
    run, history = tracked.run(3), tracked.history(3, "valid/accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.75), (3, pytest.approx(5 / 6))]
    assert history[1].timestamp - history[0].timestamp == pytest.approx(250, abs=1)
    assert run.data.metrics["objective"] == run.data.metrics["valid/best/accuracy"] == 0.903
    assert run.data.metrics["parameter_count"] == 579
    assert "confusion.json" in {file.path for file in connect(tracked.home).list_artifacts(run.info.run_id)}


def test_a_run_ends_as_its_trial_did(tracked: Tracked) -> None:
    statuses = {"complete": "FINISHED", "pruned": "FINISHED", "failed": "FAILED", "stopped": "KILLED"}
    names = ["0 · 0.9000", "1 · pruned", "2 · failed", "3 · stopped"]
    for number, (state, status) in enumerate(statuses.items()):
        tracked.track(number, TrialState(state), reason="loss is NaN", traceback="line 1")
        run = tracked.run(number)
        assert (run.info.status, run.data.tags["hpo.state"], run.info.run_name) == (status, state, names[number])
        assert run.data.tags["hpo.reason"] == "loss is NaN"
        assert "traceback.txt" in {file.path for file in connect(tracked.home).list_artifacts(run.info.run_id)}


def test_a_resumed_study_continues_its_parent_run(tracked: Tracked) -> None:
    first = tracked.parent().info.run_id
    tracked.tracker.close_study(tracked.study(), status="KILLED", summary="")
    assert tracked.parent().info.status == "KILLED"
    tracked.open()
    assert (tracked.parent().info.run_id, tracked.parent().info.status) == (first, "RUNNING")


def test_closing_writes_the_best_trial_a_summary_and_the_figures(tracked: Tracked, tmp_path: Path) -> None:
    tracked.track(0)
    tracked.track(1)
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    study = tracked.study(tiny.trial(0), tiny.trial(1), tiny.trial(2, TrialState.PRUNED))
    before = tracked.store.files()
    tracked.tracker.close_study(study, status="FINISHED", summary="# s", figures=[picture])
    run = tracked.parent()
    assert run.info.status == "FINISHED"
    assert run.data.metrics.items() >= {"study/best_value": 0.901, "study/best_trial": 1, "study/pruned": 1}.items()
    assert not run.data.metrics.keys() & tracked.run(0).data.metrics.keys()
    assert (run.data.tags["hpo.best_trial"], run.data.tags["best.training.optimizer.lr"]) == ("1", "0.005")
    assert {"summary.md", "p.png"} <= {path.name for path in tracked.store.files() - before}


def test_a_study_that_ran_again_lasted_as_long_as_before(tracked: Tracked) -> None:
    study = tracked.study(tiny.trial(0), tiny.trial(1))
    for _ in range(2):
        tracked.open()
        tracked.tracker.close_study(study, status="FINISHED", summary="# s")
        info = tracked.parent().info
        assert (info.start_time, info.end_time, info.status) == (1_700_000_000_000, 1_700_000_015_000, "FINISHED")
        assert tracked.parent().data.tags["mlflow.note.content"] == "# s"


def test_an_experiment_is_described_by_the_question_until_a_user_writes_there(tracked: Tracked) -> None:
    client, experiment = connect(tracked.home), tracked.parent().info.experiment_id

    def shown() -> tuple[str, str]:
        tags = client.get_experiment(experiment).tags
        return tags["mlflow.note.content"], tags["mlflow.experimentKind"]

    assert shown() == ("Which rate is best?", "custom_model_development")
    client.set_experiment_tag(experiment, "mlflow.note.content", "mine")
    client.set_experiment_tag(experiment, "mlflow.experimentKind", "regression")
    tracked.open()
    assert shown() == ("mine", "regression")


def test_closing_again_replaces_the_figures_and_leaves_no_old_one(tracked: Tracked, tmp_path: Path) -> None:
    before = tracked.store.files()
    old, same = tmp_path / "old.png", tmp_path / "same.png"
    for path in (old, same):
        path.write_bytes(b"first")
    study = tracked.study(tiny.trial(0))
    tracked.tracker.close_study(study, status="KILLED", summary="", figures=[old, same])
    same.write_bytes(b"second")
    tracked.tracker.close_study(study, status="FINISHED", summary="", figures=[same])
    (picture,) = (path for path in tracked.store.files() - before if path.suffix == ".png")
    assert (picture.name, picture.parent.name, picture.read_bytes()) == ("same.png", "figures", b"second")


def test_reconciling_makes_the_runs_that_are_missing(tracked: Tracked) -> None:
    study = tracked.study(tiny.trial(0), tiny.trial(1, TrialState.PRUNED), tiny.trial(2, TrialState.RUNNING))
    tracked.tracker.reconcile(study, tiny.spec(tracked.name))
    assert tracked.runs().keys() == {"0", "1"}
    run = tracked.run(0)
    assert (run.info.status, run.data.metrics["objective"]) == ("FINISHED", 0.9)
    assert run.info.start_time == 1_700_000_000_000
    assert run.info.end_time == 1_700_000_005_000
    assert len(tracked.history(0, "valid/loss")) == 3
    assert tracked.run(1).data.tags["hpo.state"] == "pruned"


def test_reconciling_ends_runs_whose_trials_have_ended_and_repeats_no_epoch(tracked: Tracked) -> None:
    for number in (0, 1, 2, 3):
        tracked.start(number, 2)
    study = tracked.study(tiny.trial(0), tiny.trial(1, TrialState.STOPPED), tiny.trial(2, TrialState.RUNNING))
    Tracker(tracked.home).reconcile(study, tiny.spec(tracked.name))
    assert [metric.step for metric in tracked.history(0, "valid/loss")] == [1, 2, 3]
    # The last is newer than the record: another supervisor's.
    statuses = {number: run.info.status for number, run in tracked.runs().items()}
    assert statuses == {"0": "FINISHED", "1": "KILLED", "2": "RUNNING", "3": "RUNNING"}


def test_reconciling_twice_changes_nothing(tracked: Tracked) -> None:
    def everything() -> dict[str, Any]:
        return {number: (dict(run.info), run.data.to_dictionary()) for number, run in tracked.runs().items()}

    study = tracked.study(*(tiny.trial(number) for number in range(3)), tiny.trial(3, TrialState.FAILED))
    tracked.tracker.reconcile(study, tiny.spec(tracked.name))
    before = everything()
    Tracker(tracked.home).reconcile(study, tiny.spec(tracked.name))
    assert len(before) == 4
    assert everything() == before


def test_a_kept_model_is_linked_to_its_run_with_scores(tracked: Tracked, folder: Path) -> None:
    tracked.track(0)
    before, client = tracked.store.files(), connect(tracked.home)
    uri = tracked.tracker.keep_model(0, folder)
    model = client.get_logged_model(uri.removeprefix("models:/"))
    assert model.source_run_id == tracked.run(0).info.run_id
    assert (model.status.value, model.tags["hpo.trial"], model.params["seed"]) == ("READY", "0", "100")
    assert {metric.key: metric.value for metric in model.metrics}["valid/best/accuracy"] == 0.9
    assert len(tracked.history(0, "valid/best/accuracy")) == 1
    names = {path.name for path in tracked.store.files() - before}
    assert {"curves.png", "report.txt", "MLmodel", "net.pt2"} <= names
    assert tracked.tracker.kept_models(tracked.study()) == {0: uri}
    assert tracked.tracker.keep_model(0, folder) == uri


def test_a_dropped_model_leaves_no_file_behind(tracked: Tracked, folder: Path) -> None:
    tracked.track(0)
    before = tracked.store.files()
    tracked.tracker.keep_model(0, folder)
    Tracker(tracked.home).reconcile(tracked.study(tiny.trial(0)), tiny.spec(tracked.name))
    for _ in range(2):  # once more is no error
        tracked.tracker.drop_model(0)
        assert tracked.store.files() == before
        assert tracked.tracker.kept_models(tracked.study()) == {}


def test_figures_of_a_trial_can_be_dropped_before_its_model_and_are_with_it(tracked: Tracked, folder: Path) -> None:
    def pictures() -> int:
        return sum(path.name == "roc.png" for path in tracked.store.files())

    (drawn := folder / "figures").mkdir()
    (drawn / "roc.png").write_bytes(b"png")
    for number in (0, 1):
        tracked.track(number)
        tracked.tracker.keep_model(number, folder)
        tracked.tracker.log_figures(number, drawn)
    assert pictures() == 2
    for _ in range(2):  # once more is no error
        tracked.tracker.drop_figures(0)
    assert pictures() == 1
    assert set(tracked.tracker.kept_models(tracked.study())) == {0, 1}
    tracked.tracker.drop_model(1)
    assert pictures() == 0
