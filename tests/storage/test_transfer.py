"""A study in Optuna's hands, moved from storage to storage."""

from __future__ import annotations

import json
from dataclasses import replace

import optuna
import pytest

from formula import FINITE, MIXED, objective, run_all, sequence, train
from hpo.database import server_address
from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage import transfer as moving
from hpo.storage.optuna_storage import read_study
from hpo.storage.reader import read_snapshots
from hpo.storage.transfer import Relation


@pytest.fixture
def other(tmp_path) -> Home:
    return Home.at(tmp_path / "other")


@pytest.fixture
def server(tmp_path, database) -> Home:
    return replace(Home.at(tmp_path / "server"), storage_url=server_address(database))


def _move(home: Home, target: Home, name: str = "study") -> int:
    """Through a file's bytes, as far as they go."""
    study = json.loads(json.dumps(moving.export_study(home, name)))
    moving.check(study)
    return moving.import_study(target, study)


def _trials(home: Home, title: str = "study") -> str:
    """Every trial as Optuna itself tells it, but for its id."""
    storage = optuna.storages.RDBStorage(home.storage_url)
    trials = optuna.load_study(study_name=title, storage=storage).get_trials()
    storage.scoped_session.remove()
    storage.engine.dispose()
    # A server gives parameters, reports and attributes in any order.
    facts = [
        {key: sorted(it.items()) if isinstance(it, dict) else it for key, it in vars(one).items()} for one in trials
    ]
    return "\n".join(str({**each, "_trial_id": 0}) for each in facts)


def _every_kind(home: Home, spec) -> None:
    """Trials of all states, NaN and infinity in their reports."""
    study = open_study(home, spec, data_digest="d")
    for number in range(8):
        candidate = study.ask(budget=20, worker="w")
        if number == 3:
            study.report(candidate.number, 1, float("nan"))
            study.report(candidate.number, 2, float("-inf"))
            study.tell(TrialResult(candidate.number, TrialState.FAILED, reason="the loss is nan"))
        elif number == 7:
            study.tell(TrialResult(candidate.number, TrialState.STOPPED))  # and a retry that waits
        else:
            train(study, candidate, worth=lambda values: objective(values) / 3)
    study.close()


def test_trials_of_all_kinds_are_the_same_on_postgresql_and_back(home, server, other, make_spec):
    _every_kind(home, make_spec("tpe", "median"))
    (before,) = read_snapshots(home)
    states = {trial.state for trial in before.study.trials}
    assert states >= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.STOPPED, TrialState.WAITING}
    assert _move(home, server) == len(before.study.trials)
    assert _move(server, other) == len(before.study.trials)
    assert "nan" in _trials(home)
    assert _trials(home) == _trials(server) == _trials(other)
    assert read_study(other, "study") == read_study(home, "study")
    assert _move(home, server) == _move(server, home) == 0


def test_constraints_and_several_objectives_move(home, other, make_spec):
    objectives = ["valid_accuracy", "valid_loss"]
    study = open_study(
        home, make_spec("tpe", objectives=objectives, constraints=["valid_loss <= 0.5"]), data_digest="d"
    )
    for _ in range(4):
        candidate = study.ask(budget=9, worker="w")
        value = objective(candidate.parameters)
        scores = {"valid_accuracy": value, "valid_loss": 1 - value}
        study.tell(
            TrialResult(candidate.number, TrialState.COMPLETE, value, 1, scores=scores, values=(value, 1 - value))
        )
    study.close()
    _move(home, other)
    assert "constraints" in _trials(home)
    assert _trials(home) == _trials(other)


@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_moved_study_goes_on_as_the_unbroken_one(sampler, tmp_path, server, make_spec):
    spec = make_spec(sampler, "median", space=FINITE if sampler == "grid" else MIXED)
    found = []
    for first, second in [("unbroken", "unbroken"), ("here", None)]:
        study = open_study(Home.at(tmp_path / first), spec, data_digest="d")
        run_all(study, budget=7, epochs=5)
        study.close()
        target = Home.at(tmp_path / second) if second else server
        if second is None:
            _move(Home.at(tmp_path / first), target)
        study = open_study(target, spec, data_digest="d")
        run_all(study, budget=12, epochs=5)
        found.append(sequence(study.result()))
        study.close()
    assert found[0] == found[1]
    assert len(found[0]) == 12


def test_generations_move_one_by_one(home, other, make_spec):
    for fresh in (False, True):
        study = open_study(home, make_spec(), data_digest="d", fresh=fresh)
        run_all(study, budget=2 + fresh)
        study.close()
    _move(home, other)
    _move(home, other, "study~1")
    assert [(one.study.title, len(one.study.trials)) for one in read_snapshots(other)] == [("study", 2), ("study~2", 3)]


def test_study_moves_back_with_what_it_did_meanwhile(home, other, make_spec):
    run_all(study := open_study(home, make_spec(), data_digest="d"), budget=3)
    study.close()
    early = moving.export_study(home, "study")
    _move(home, other)
    run_all(study := open_study(other, make_spec(), data_digest="d"), budget=5)
    study.close()
    assert moving.relation(other, early) is Relation.AHEAD
    assert moving.import_study(other, early) == 0
    assert _move(other, home) == 2
    assert _trials(home) == _trials(other)


def test_study_that_went_on_in_both_stores_is_not_mixed(home, other, make_spec):
    run_all(study := open_study(home, make_spec(), data_digest="d"), budget=3)
    study.close()
    _move(home, other)
    for place, worth in ((home, objective), (other, lambda values: 0.5)):
        run_all(study := open_study(place, make_spec(), data_digest="d"), budget=5, worth=worth)
        study.close()
    before = _trials(home)
    with pytest.raises(StoreError, match="was continued both here and in its source"):
        _move(other, home)
    assert _trials(home) == before


def test_another_study_of_the_title_is_left_alone(home, other, make_spec):
    for place in (home, other):
        run_all(study := open_study(place, make_spec(), data_digest="d"), budget=2)
        study.close()
    with pytest.raises(StoreError, match="another study that is named study") as error:
        _move(home, other)
    assert "--home" in error.value.hint


def test_what_a_killed_import_left_is_cleared_away_and_seen_by_nobody(home, other, make_spec):
    run_all(study := open_study(home, make_spec(), data_digest="d"), budget=2)
    study.close()
    study = moving.export_study(home, "study")
    storage = moving.open_storage(other)
    moving._write(storage, {**study, "trials": study["trials"][:1]})
    storage.close()
    assert read_snapshots(other) == []
    _move(home, other)
    storage = moving.open_storage(other)
    assert list(storage.study_ids()) == ["study"]
    storage.close()
    assert _trials(home) == _trials(other)


def test_a_file_cannot_name_a_folder_to_be_deleted(home, other, make_spec, tmp_path):
    study = open_study(home, make_spec(), data_digest="d")
    candidate = study.ask(budget=1, worker="w")
    study.tell(TrialResult(candidate.number, TrialState.COMPLETE, 0.5, folder=str(tmp_path)))
    study.close()
    taken = moving.export_study(home, "study")
    assert str(tmp_path) not in json.dumps(taken)
    taken["trials"][0]["user_attrs"]["hpo.result"]["folder"] = str(tmp_path)
    moving.import_study(other, taken)
    assert read_study(other, "study").trials[0].result.folder == ""
