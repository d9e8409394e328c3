"""The contract of tracking stores: MLflow on its embedded file, on PostgreSQL and behind a server serve alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tiny_study as tiny
from hpo.database import server_address
from hpo.errors import ModelError
from hpo.home import Home
from hpo.predict import load_model
from hpo.records import ModelVersion, StudyResult, Trial, TrialState
from hpo.tracking import runs
from hpo.tracking.ledger import Opening, announce_opening, complete_opening, openings
from hpo.tracking.reader import read_tracking
from hpo.tracking.registry import champions, fetch, record_champion, resolve, set_alias, versions
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from tracking_fixtures import exported, folder, template, tracking_server  # noqa: F401 - fixtures

_NUMBERS = count()


@dataclass(frozen=True)
class Store:
    """A tracking store, and the folder that has its artifacts."""

    home: Home
    artifacts: Path

    def files(self) -> set[Path]:
        return {path for path in self.artifacts.rglob("*") if path.is_file()}


SERVERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("postgresql", "server")]


@pytest.fixture(scope="module", params=["embedded", *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Store]:  # noqa: F811
    place = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(place)  # MLflow keeps the artifacts of a database in the working directory
        home = Home.at(place).create()
        if request.param == "embedded":
            shutil.copyfile(template, home.root / "mlflow.db")
            yield Store(home, home.artifacts)
        elif request.param == "postgresql":
            database = request.getfixturevalue("postgres").make(f"mlflow{next(_NUMBERS)}")
            yield Store(replace(home, tracking_uri=server_address(database)), home.root)
        else:
            uri = stack.enter_context(tracking_server(template, place / "server"))
            yield Store(replace(home, tracking_uri=uri), place / "server")


@dataclass(frozen=True)
class Tracked:
    """A study of its own in the store, open."""

    store: Store
    name: str
    tracker: Tracker

    @property
    def home(self) -> Home:
        return self.store.home

    def study(self, *trials: Trial) -> StudyResult:
        return tiny.study(*trials, name=self.name)

    def open(self) -> Tracker:
        tracker = Tracker(self.home)
        tracker.open_study(self.study(), tiny.spec(self.name), tiny.data(), tiny.split())
        return tracker

    def start(self, number: int, epochs: int) -> None:
        candidate = tiny.candidate(number)
        setup = tiny.spec(self.name).with_values(candidate.parameters)
        self.tracker.start_trial(candidate, setup, worker="w0")
        self.tracker.log_epochs(number, tiny.epochs(epochs))

    def track(self, number: int, state: TrialState = TrialState.COMPLETE, **changes: Any) -> None:
        self.start(number, 3)
        self.tracker.end_trial(tiny.result(number, state, **changes))

    def parent(self) -> Any:
        return runs.find_parent(connect(self.home), self.study())

    def runs(self) -> dict[str, Any]:
        """Number of a trial -> its run."""
        return {run.data.tags["hpo.trial"]: run for run in runs.children(connect(self.home), self.parent())}

    def run(self, number: int) -> Any:
        return self.runs()[str(number)]

    def history(self, number: int, metric: str) -> list[Any]:
        found = connect(self.home).get_metric_history(self.run(number).info.run_id, metric)
        return sorted(found, key=lambda one: one.step)


@pytest.fixture
def tracked(store: Store) -> Tracked:
    name = f"tiny{next(_NUMBERS)}"
    tracked = Tracked(store, name, Tracker(store.home))
    tracked.tracker.open_study(tracked.study(), tiny.spec(name), tiny.data(), tiny.split())
    return tracked


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


def test_a_kept_model_is_linked_to_its_run_with_scores(tracked: Tracked, folder: Path) -> None:  # noqa: F811
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


def test_a_dropped_model_leaves_no_file_behind(tracked: Tracked, folder: Path) -> None:  # noqa: F811
    tracked.track(0)
    before = tracked.store.files()
    tracked.tracker.keep_model(0, folder)
    Tracker(tracked.home).reconcile(tracked.study(tiny.trial(0)), tiny.spec(tracked.name))
    for _ in range(2):  # once more is no error
        tracked.tracker.drop_model(0)
        assert tracked.store.files() == before
        assert tracked.tracker.kept_models(tracked.study()) == {}


def test_figures_of_a_trial_can_be_dropped_before_its_model_and_are_with_it(tracked: Tracked, folder: Path) -> None:  # noqa: F811
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


@pytest.fixture
def register(tracked: Tracked, folder: Path) -> Callable[[int], ModelVersion]:  # noqa: F811
    def register(number: int) -> ModelVersion:
        tracked.track(number)
        tracked.tracker.keep_model(number, folder)
        return tracked.tracker.register(tracked.study(), number)

    return register


Register = Callable[[int], ModelVersion]


def test_the_same_trial_registers_once_and_its_model_is_never_dropped(tracked: Tracked, register: Register) -> None:
    first = register(4)
    assert tracked.tracker.register(tracked.study(), 4) == first
    assert (first.version, first.trial, first.study, first.aliases) == (1, 4, tracked.name, ("challenger",))
    assert first.scores == {"valid_accuracy": 0.904, "valid_loss": 0.4}
    kept = tracked.tracker.kept_models(tracked.study())
    tracked.tracker.drop_model(4)
    assert tracked.tracker.kept_models(tracked.study()) == kept
    assert fetch(tracked.home, first, tracked.home.work).is_dir()


def test_a_registered_model_predicts(tracked: Tracked, register: Register) -> None:
    register(0)
    model = load_model(tracked.name, home=tracked.home)
    assert model.predict_proba(np.zeros((2, *tiny.SHAPE), np.uint8)).shape == (2, 3)


def test_the_challenger_moves_to_what_was_registered_last(tracked: Tracked, register: Register) -> None:
    register(0)
    register(1)
    home, name = tracked.home, tracked.name
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ("challenger",)), (1, ())]
    tracked.tracker.register(tracked.study(), 0)
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ()), (1, ("challenger",))]


def test_a_trial_whose_model_was_not_kept_is_not_registered(tracked: Tracked) -> None:
    tracked.start(0, 1)
    with pytest.raises(ModelError, match="model of trial 0 was not kept"):
        tracked.tracker.register(tracked.study(), 0)


def test_a_bare_name_is_the_champion_and_else_the_challenger(tracked: Tracked, register: Register) -> None:
    first, second = register(0), register(1)
    home, name = tracked.home, tracked.name
    assert resolve(home, name).version == second.version
    promoted = set_alias(home, name, "champion", 1, scores={"test_accuracy": 0.875}, tags={"why": "gate"})
    assert promoted.scores["test_accuracy"] == 0.875
    assert resolve(home, name).version == first.version


def test_names_aliases_versions_and_uris_resolve_to_the_same_version(tracked: Tracked, register: Register) -> None:
    version, home, name = register(0), tracked.home, tracked.name
    for model in (f"{name}@challenger", f"{name}/1", f"models:/{name}/1", f"models:/{name}@challenger"):
        assert resolve(home, model) == version
    logged = resolve(home, tracked.tracker.kept_models(tracked.study())[0])
    assert (logged.version, logged.study, logged.trial, logged.run_id) == (0, name, 0, version.run_id)
    assert fetch(home, logged, home.work).is_dir()


def test_a_challenger_that_became_champion_is_no_challenger_any_more(tracked: Tracked, register: Register) -> None:
    register(0)
    home, name = tracked.home, tracked.name
    assert set_alias(home, name, "champion", 1).aliases == ("champion",)
    assert tracked.tracker.register(tracked.study(), 0).aliases == ("champion",)
    register(1)
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ("challenger",)), (1, ("champion",))]
    # The best of the next run is the champion again.
    assert tracked.tracker.register(tracked.study(), 0).aliases == ("champion",)
    assert [(v.version, v.aliases) for v in versions(home, name)] == [(2, ()), (1, ("champion",))]


def test_a_version_is_described_and_linked_to_its_run(tracked: Tracked, register: Register) -> None:
    register(0)
    client = connect(tracked.home)
    version = client.get_model_version(tracked.name, "1")
    assert version.run_id == tracked.run(0).info.run_id
    assert version.description.startswith(f"Trial 0 of {tracked.name}: validation accuracy 0.9000")
    assert "| training.optimizer.lr | 0.01 |" in version.description
    assert client.get_registered_model(tracked.name).description == "Which rate is best?"


def test_champions_are_recorded_with_their_time_their_reason_and_who_chose_them(
    tracked: Tracked, register: Register
) -> None:
    register(0)
    home, name = tracked.home, tracked.name
    assert champions(home, name) == champions(home, "unknown") == []
    record_champion(home, name, 1, why="there was no champion before")
    record_champion(home, name, 4, why="slower, but needed", forced=True)
    record_champion(home, name, 4, why="again after a kill")
    first, second = champions(home, name)
    assert (first.version, first.why, first.forced) == (1, "there was no champion before", False)
    assert first.until == second.since > first.since
    assert (second.version, second.why, second.forced, second.until) == (4, "slower, but needed", True, None)
    assert first.who
    texts = [text for tag, text in connect(home).get_registered_model(name).tags.items() if "champion" in tag]
    assert sum(text.startswith("version 4 since ") and ", forced: slower, but" in text for text in texts) == 1


def test_champions_of_earlier_versions_are_read(tracked: Tracked, register: Register) -> None:
    register(0)
    home, name = tracked.home, tracked.name
    old = {"version": 1, "since": "2026-01-02T03:04:05.000000+00:00", "why": "a: b", "who": "ann", "forced": True}
    connect(home).set_registered_model_tag(
        name, "hpo.champion.20260102030405000000", json.dumps({**old, "until": None})
    )
    record_champion(home, name, 2, why="over: two\nlines")
    first, second = champions(home, name)
    assert (first.version, first.since, first.why, first.who, first.forced) == tuple(old.values())
    assert (second.version, second.why, second.forced) == (2, "over: two\nlines", False)


def test_no_tag_that_mlflow_shows_is_json(tracked: Tracked, register: Register) -> None:
    version = register(0)
    complete_opening(tracked.home, tracked.study(), announce(tracked), {"test_accuracy": 0.9})
    record_champion(tracked.home, tracked.name, 1, why="first")
    tracked.tracker.close_study(tracked.study(tiny.trial(0)), status="FINISHED", summary="")
    client = connect(tracked.home)
    tagged = [tracked.parent().data.tags, tracked.run(0).data.tags, client.get_registered_model(tracked.name).tags]
    tagged += [client.get_model_version(tracked.name, str(version.version)).tags]
    tagged += [client.get_experiment(tracked.parent().info.experiment_id).tags]
    shown = {name: text for tags in tagged for name, text in tags.items() if not name.startswith("mlflow.")}
    assert shown
    assert not [name for name, text in shown.items() if text.startswith(("{", "["))]


def announce(tracked: Tracked) -> Opening:
    model = ModelVersion(tracked.name, 2, ("challenger",), "run", f"models:/{tracked.name}/2", tracked.name, 5)
    return announce_opening(tracked.home, tracked.study(), model=model, trial=5, purpose="promote")


def test_every_opening_is_in_the_ledger_in_order_before_and_after(tracked: Tracked) -> None:
    home, study = tracked.home, tracked.study()
    assert openings(home, study) == []
    first, second = (complete_opening(home, study, announce(tracked), {"test_accuracy": 0.9}) for _ in range(2))
    killed = announce(tracked)  # before its result
    assert openings(home, study) == [first, second, killed]
    entries = map(json.loads, (home.root / "openings.jsonl").read_text().splitlines())
    scores = [entry["scores"] for entry in entries if entry["study"] == tracked.name]
    assert scores == [{}, {"test_accuracy": 0.9}, {}, {"test_accuracy": 0.9}, {}]
    assert (first.who != "", first.purpose) == (True, "promote")
    assert first.when < second.when


@pytest.mark.parametrize("lost", ["the file", "the run"])
def test_an_opening_is_not_forgotten_when_one_record_of_it_is_lost(tracked: Tracked, lost: str) -> None:
    home, study = tracked.home, tracked.study()
    opening = complete_opening(home, study, announce(tracked), {"test_accuracy": 0.9})
    if lost == "the file":
        (home.root / "openings.jsonl").unlink()
    else:
        connect(home).delete_run(tracked.parent().info.run_id)
    assert openings(home, study) == [opening]


@pytest.mark.slow
def test_a_server_keeps_the_artifacts_and_is_read_like_its_database(
    template: Path,  # noqa: F811
    folder: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    with tracking_server(template, tmp_path / "server") as uri:
        home = replace(Home.at(tmp_path).create(), tracking_uri=uri)
        tracker = Tracker(home)
        tracked = Tracked(Store(home, tmp_path / "server"), "tiny", tracker)
        tracker.open_study(tracked.study(), tiny.spec("tiny"), tiny.data(), tiny.split())
        for number in range(2):
            tracked.track(number)
            tracker.keep_model(number, folder)
        tracker.drop_model(0)
        tracker.register(tracked.study(), 1)
        assert not [path for path in home.root.rglob("*") if path.is_file() and path.suffix != ".lock"]
        assert len([path for path in tracked.store.files() if path.name == "net.pt2"]) == 1
        database = read_tracking(replace(home, tracking_uri=f"sqlite:///{tmp_path / 'server' / 'mlflow.db'}"))
        asked = read_tracking(home)
    assert database is not None
    assert asked is not None
    assert sorted(database.runs, key=lambda run: run.id) == sorted(asked.runs, key=lambda run: run.id)
    assert database.versions == asked.versions
    assert [model for model in database.models if not model.deleted] == list(asked.models)
