from __future__ import annotations

import time
from pathlib import Path

import pytest

import tiny_study as tiny
from hpo.errors import ModelError, StoreError
from hpo.home import Home
from hpo.records import TrialState
from hpo.tracking import runs
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker


def track(tracker: Tracker, number: int, state: TrialState = TrialState.COMPLETE, **changes: object) -> None:
    candidate = tiny.candidate(number)
    tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
    tracker.log_epochs(number, tiny.epochs(3))
    tracker.end_trial(tiny.result(number, state, **changes))


def parent(home: Home) -> object:
    return runs.find_parent(connect(home), tiny.study())


def run_of(home: Home, number: int) -> object:
    (run,) = runs.children(connect(home), parent(home), f"tags.`hpo.trial` = '{number}'")
    return run


def files(home: Home) -> set[str]:
    return {path.name for path in home.artifacts.rglob("*") if path.is_file()}


def test_a_tracker_touches_nothing_before_its_first_call(tmp_path: Path) -> None:
    Tracker(Home.find(tmp_path))
    assert not list(tmp_path.iterdir())


def test_a_trial_run_holds_every_effective_parameter_and_where_it_came_from(home: Home, tracker: Tracker) -> None:
    track(tracker, 0)
    run = run_of(home, 0)
    expected = {"model.hidden": "[16, 8]", "training.batch_size": "64", "seed": "100", "device": "cpu"}
    assert expected.items() <= run.data.params.items()
    assert run.data.params["training.optimizer.lr"] == "0.01"
    assert "data.path" not in run.data.params  # nothing was set there
    assert run.data.tags["mlflow.parentRunId"] == parent(home).info.run_id
    assert {"version.torch", "version.python", "mlflow.user"} <= run.data.tags.keys()
    assert run.data.tags["hpo.data_digest"] == tiny.data().digest
    (dataset,) = run.inputs.dataset_inputs
    assert dataset.dataset.name == "digits"
    assert tiny.data().digest in dataset.dataset.profile


def test_a_trial_run_holds_each_epoch_once_and_its_best_scores(home: Home, tracker: Tracker) -> None:
    track(tracker, 3)
    run = run_of(home, 3)
    history = connect(home).get_metric_history(run.info.run_id, "valid_accuracy")
    assert [(metric.step, metric.value) for metric in history] == [(1, 0.5), (2, 0.75), (3, pytest.approx(5 / 6))]
    assert history[1].timestamp - history[0].timestamp == pytest.approx(250, abs=1)
    assert run.data.metrics["objective"] == run.data.metrics["best_valid_accuracy"] == 0.903
    assert run.data.metrics["parameter_count"] == 579
    assert "confusion.json" in files(home)


def test_folds_after_the_first_have_metrics_of_their_own(home: Home, tracker: Tracker) -> None:
    track(tracker, 0)
    tracker.log_epochs(0, tiny.epochs(2, fold=1))
    run_id = run_of(home, 0).info.run_id
    assert len(connect(home).get_metric_history(run_id, "valid_accuracy")) == 3
    assert len(connect(home).get_metric_history(run_id, "fold1.valid_accuracy")) == 2


@pytest.mark.parametrize(
    ("state", "status"),
    [("complete", "FINISHED"), ("pruned", "FINISHED"), ("failed", "FAILED"), ("stopped", "KILLED")],
)
def test_a_run_ends_as_its_trial_did(home: Home, tracker: Tracker, state: str, status: str) -> None:
    track(tracker, 0, TrialState(state), reason="loss is NaN", traceback="line 1")
    run = run_of(home, 0)
    assert (run.info.status, run.data.tags["hpo.state"]) == (status, state)
    assert run.data.tags["hpo.reason"] == "loss is NaN"
    assert "traceback.txt" in files(home)


def test_a_resumed_study_continues_its_parent_run(home: Home, tracker: Tracker) -> None:
    first = parent(home).info.run_id
    tracker.close_study(tiny.study(), status="KILLED", summary="")
    assert parent(home).info.status == "KILLED"
    again = Tracker(home)
    again.open_study(tiny.study(), tiny.spec(), tiny.data(), tiny.split())
    assert (parent(home).info.run_id, parent(home).info.status) == (first, "RUNNING")


@pytest.mark.parametrize("changes", [{"generation": 2}, {"created": 1.8e9}])
def test_another_generation_or_a_study_made_anew_has_its_own_parent_run(
    home: Home, tracker: Tracker, changes: dict[str, float]
) -> None:
    study = tiny.study(**changes)
    Tracker(home).open_study(study, tiny.spec(), tiny.data(), tiny.split())
    other = runs.find_parent(connect(home), study)
    assert other.info.run_id != parent(home).info.run_id
    assert other.info.experiment_id == parent(home).info.experiment_id


def test_an_experiment_deleted_in_the_ui_comes_back_when_its_study_runs(home: Home, tracker: Tracker) -> None:
    connect(home).delete_experiment(parent(home).info.experiment_id)
    tracker.open_study(tiny.study(), tiny.spec(), tiny.data(), tiny.split())
    track(tracker, 0)
    assert run_of(home, 0).info.status == "FINISHED"


def test_the_logged_study_file_can_be_run_again(home: Home, tracker: Tracker) -> None:
    from hpo.spec.load import load_study

    (path,) = home.artifacts.rglob("study.yaml")
    assert load_study(path) == tiny.spec()


def test_closing_writes_the_best_trial_a_summary_and_the_figures(home: Home, tracker: Tracker, tmp_path: Path) -> None:
    track(tracker, 0)
    track(tracker, 1)
    picture = tmp_path / "p.png"
    picture.write_bytes(b"png")
    study = tiny.study(tiny.trial(0), tiny.trial(1), tiny.trial(2, TrialState.PRUNED))
    tracker.close_study(study, status="FINISHED", summary="# s", figures=[picture])
    run = parent(home)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["objective"] == 0.901
    assert (run.data.tags["hpo.best_trial"], run.data.tags["best.training.optimizer.lr"]) == ("1", "0.005")
    assert run.data.metrics["trials_pruned"] == 1
    assert {"summary.md", "p.png"} <= files(home)


def test_closing_again_replaces_the_figures_and_leaves_no_old_one(home: Home, tracker: Tracker, tmp_path: Path) -> None:
    old, same = tmp_path / "old.png", tmp_path / "same.png"
    for path in (old, same):
        path.write_bytes(b"first")
    study = tiny.study(tiny.trial(0))
    tracker.close_study(study, status="KILLED", summary="", figures=[old, same])
    same.write_bytes(b"second")
    tracker.close_study(study, status="FINISHED", summary="", figures=[same])
    (picture,) = (path for path in home.artifacts.rglob("*.png"))
    assert (picture.name, picture.parent.name, picture.read_bytes()) == ("same.png", "figures", b"second")


def test_pictures_of_a_trial_can_go_before_its_model_and_go_with_it(home: Home, tracker: Tracker, folder: Path) -> None:
    (folder / "figures").mkdir()
    (folder / "figures" / "roc.png").write_bytes(b"png")
    for number in (0, 1):
        track(tracker, number)
        tracker.keep_model(number, folder)
    assert len(list(home.artifacts.rglob("figures/roc.png"))) == 2
    tracker.drop_figures(0)
    tracker.drop_figures(0)
    assert len(list(home.artifacts.rglob("figures/roc.png"))) == 1
    assert set(tracker.kept_models(tiny.study())) == {0, 1}
    tracker.drop_model(1)
    assert not list(home.artifacts.rglob("roc.png"))


def test_a_study_without_a_complete_trial_closes_too(home: Home, tracker: Tracker) -> None:
    tracker.close_study(tiny.study(tiny.trial(0, TrialState.FAILED)), status="KILLED", summary="")
    assert "objective" not in parent(home).data.metrics


def test_reconciling_makes_the_runs_that_are_missing(home: Home, tracker: Tracker) -> None:
    study = tiny.study(tiny.trial(0), tiny.trial(1, TrialState.PRUNED), tiny.trial(2, TrialState.RUNNING))
    tracker.reconcile(study, tiny.spec())
    assert not list(runs.children(connect(home), parent(home), "tags.`hpo.trial` = '2'"))
    run = run_of(home, 0)
    assert (run.info.status, run.data.metrics["objective"]) == ("FINISHED", 0.9)
    assert run.info.start_time == 1_700_000_000_000
    assert run.info.end_time == 1_700_000_005_000
    assert len(connect(home).get_metric_history(run.info.run_id, "valid_loss")) == 3
    assert run_of(home, 1).data.tags["hpo.state"] == "pruned"


def test_reconciling_ends_runs_whose_trials_have_ended_and_repeats_no_epoch(home: Home, tracker: Tracker) -> None:
    for number in (0, 1, 2, 3):
        candidate = tiny.candidate(number)
        tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
        tracker.log_epochs(number, tiny.epochs(2))
    study = tiny.study(tiny.trial(0), tiny.trial(1, TrialState.STOPPED), tiny.trial(2, TrialState.RUNNING))
    Tracker(home).reconcile(study, tiny.spec())
    finished = run_of(home, 0)
    assert finished.info.status == "FINISHED"
    history = connect(home).get_metric_history(finished.info.run_id, "valid_loss")
    assert sorted(metric.step for metric in history) == [1, 2, 3]
    assert run_of(home, 1).info.status == "KILLED"
    assert run_of(home, 2).info.status == "RUNNING"
    assert run_of(home, 3).info.status == "RUNNING"  # newer than the record: another supervisor's


def test_reconciling_twice_changes_nothing(home: Home, tracker: Tracker) -> None:
    study = tiny.study(*(tiny.trial(number) for number in range(3)), tiny.trial(3, TrialState.FAILED))
    tracker.reconcile(study, tiny.spec())
    before = {run.info.run_id: (run.info, run.data) for run in runs.children(connect(home), parent(home))}
    Tracker(home).reconcile(study, tiny.spec())
    after = {run.info.run_id: (run.info, run.data) for run in runs.children(connect(home), parent(home))}
    assert len(before) == 4
    assert {key: (dict(i), d.to_dictionary()) for key, (i, d) in before.items()} == {
        key: (dict(i), d.to_dictionary()) for key, (i, d) in after.items()
    }


def test_a_kept_model_is_linked_to_its_run_with_scores(home: Home, tracker: Tracker, folder: Path) -> None:
    track(tracker, 0)
    uri = tracker.keep_model(0, folder)
    model = connect(home).get_logged_model(uri.removeprefix("models:/"))
    assert model.source_run_id == run_of(home, 0).info.run_id
    assert (model.status.value, model.tags["hpo.trial"], model.params["seed"]) == ("READY", "0", "100")
    assert {metric.key: metric.value for metric in model.metrics}["best_valid_accuracy"] == 0.9
    assert len(connect(home).get_metric_history(model.source_run_id, "best_valid_accuracy")) == 1
    assert {"curves.png", "report.txt", "MLmodel", "net.pt2"} <= files(home)
    assert tracker.kept_models(tiny.study()) == {0: uri}
    assert tracker.keep_model(0, folder) == uri


def test_a_model_pins_what_it_needs_and_nothing_of_this_package(home: Home, tracker: Tracker, folder: Path) -> None:
    from importlib.metadata import version

    track(tracker, 0)
    tracker.keep_model(0, folder)
    (path,) = home.artifacts.rglob("requirements.txt")
    lines = path.read_text().split()
    assert [line.partition("==")[0] for line in lines] == ["mlflow", "numpy", "pandas", "torch"]
    assert lines[1] == f"numpy=={version('numpy')}"


def test_a_dropped_model_leaves_no_file_behind(home: Home, tracker: Tracker, folder: Path) -> None:
    track(tracker, 0)
    before = files(home)
    tracker.keep_model(0, folder)
    Tracker(home).reconcile(tiny.study(tiny.trial(0)), tiny.spec())
    tracker.drop_model(0)
    assert files(home) == before
    assert not list((home.artifacts / "tiny" / "models").iterdir())
    assert tracker.kept_models(tiny.study()) == {}
    tracker.drop_model(0)  # once more is no error


def test_a_registered_model_is_never_dropped(home: Home, tracker: Tracker, folder: Path) -> None:
    track(tracker, 0)
    uri = tracker.keep_model(0, folder)
    tracker.register(tiny.study(), 0)
    tracker.drop_model(0)
    assert tracker.kept_models(tiny.study()) == {0: uri}
    assert "net.pt2" in files(home)


def test_a_model_that_cannot_be_saved_leaves_nothing(home: Home, tracker: Tracker, folder: Path) -> None:
    track(tracker, 0)
    (folder / "config.json").write_text("{}")
    (folder / "setup.json").write_text("{}")
    with pytest.raises(KeyError):
        tracker.keep_model(0, folder)
    assert tracker.kept_models(tiny.study()) == {}
    assert not connect(home).search_logged_models([parent(home).info.experiment_id])
    (folder / "net.pt2").unlink()
    with pytest.raises(ModelError, match=r"net\.pt2: no such file"):
        tracker.keep_model(0, folder)


def test_faults_of_the_store_are_told_as_store_errors(home: Home, tracker: Tracker) -> None:
    track(tracker, 0)
    with pytest.raises(StoreError, match="no run of trial 7"):
        tracker.end_trial(tiny.result(7))
    connect(home).delete_run(run_of(home, 0).info.run_id)
    with pytest.raises(StoreError, match=r"MLflow at sqlite:.*active"):
        tracker.log_epochs(0, tiny.epochs(1))


def test_tracking_a_trial_of_fifty_epochs_takes_under_150_ms(tracker: Tracker) -> None:
    setup = tiny.spec().with_values({})
    seconds = []
    for number in range(8):
        start = time.process_time()  # other work on the machine is not ours
        tracker.start_trial(tiny.candidate(number), setup, worker="w0")
        tracker.log_epochs(number, tiny.epochs(50))
        tracker.end_trial(tiny.result(number, count=50))
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.15


def test_reconciling_leaves_the_trials_of_living_runs_alone(home: Home, tracker: Tracker) -> None:
    candidate = tiny.candidate(0)
    tracker.start_trial(candidate, tiny.spec().with_values(candidate.parameters), worker="w0")
    study = tiny.study(tiny.trial(0), tiny.trial(1))
    tracker.reconcile(study, tiny.spec(), leave={0, 1})
    assert run_of(home, 0).info.status == "RUNNING"
    assert len(list(runs.children(connect(home), parent(home)))) == 1


def test_a_run_mended_after_any_call_has_everything_once(home: Home, tracker: Tracker) -> None:
    """Killed after none, the first, the first two, ... of the calls that a trial takes."""
    study = tiny.study(*(tiny.trial(number) for number in range(4)))
    for number in range(4):
        candidate, result = tiny.candidate(number), tiny.result(number)
        run = connect(home).create_run(
            parent(home).info.experiment_id, tags=runs.trial_tags(candidate, parent(home), "w0")
        )
        tracker._runs[number] = run.info.run_id
        if number > 0:
            tracker._describe(candidate, tiny.spec().with_values(candidate.parameters))
        if number > 1:
            tracker.log_epochs(number, result.epochs)
        if number > 2:
            runs.log(connect(home), run.info.run_id, metrics=runs.result_metrics(result, 1.7e9))
    tracker.reconcile(study, tiny.spec())
    for number in range(4):
        run = run_of(home, number)
        assert (run.info.status, run.data.tags[runs.STATE]) == ("FINISHED", "complete")
        assert run.data.params["seed"] == str(100 + number)
        assert run.inputs.dataset_inputs
        for name, count in (("valid_accuracy", 3), ("epoch_seconds", 3), ("objective", 1), ("duration_seconds", 1)):
            assert len(connect(home).get_metric_history(run.info.run_id, name)) == count


def test_a_model_that_a_killed_process_had_begun_to_log_goes(home: Home, tracker: Tracker, folder: Path) -> None:
    track(tracker, 0)
    kept = tracker.keep_model(0, folder)
    track(tracker, 1)
    client, experiment = connect(home), parent(home).info.experiment_id
    tags = {"hpo.trial": "1"}
    begun = client.create_logged_model(experiment, "half", run_of(home, 1).info.run_id, tags=tags)
    place = home.artifacts / "tiny" / "models" / begun.model_id
    place.mkdir(parents=True)
    tracker.reconcile(tiny.study(tiny.trial(0), tiny.trial(1)), tiny.spec())
    assert [f"models:/{model.model_id}" for model in client.search_logged_models([experiment])] == [kept]
    assert not place.exists()


def test_a_run_that_was_deleted_in_mlflow_is_not_made_a_second_time(home: Home, tracker: Tracker) -> None:
    two = tiny.study(tiny.trial(0), tiny.trial(1))
    for number in (0, 1):
        track(tracker, number)
    trashed, client = run_of(home, 0).info.run_id, connect(home)
    client.delete_run(trashed)
    again = Tracker(home)
    again.open_study(two, tiny.spec(), tiny.data(), tiny.split())
    again.reconcile(two, tiny.spec())
    (left,) = runs.children(client, parent(home))
    assert left.data.tags[runs.TRIAL] == "1"
    assert again.deleted_runs(two) == {0: trashed}
    with pytest.raises(StoreError, match="was deleted in MLflow") as error:
        again.register(two, 0)
    assert f"mlflow runs restore --run-id {trashed}" in error.value.hint
    client.restore_run(trashed)
    assert again.deleted_runs(two) == {}
    assert run_of(home, 0).info.run_id == trashed


def test_the_run_of_a_study_that_was_deleted_comes_back_when_it_runs(home: Home, tracker: Tracker) -> None:
    one = tiny.study(tiny.trial(0))
    track(tracker, 0)
    before = parent(home).info.run_id
    connect(home).delete_run(before)
    again = Tracker(home)
    again.open_study(one, tiny.spec(), tiny.data(), tiny.split())
    again.reconcile(one, tiny.spec())
    assert parent(home).info.run_id == before
    run_of(home, 0)
