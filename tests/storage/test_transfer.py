"""A study in Optuna's hands, moved from storage to storage."""

from __future__ import annotations

import json

import optuna
import pytest

from formula import objective, run_all
from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage import transfer as moving
from hpo.storage.reader import read_snapshots, read_study
from hpo.storage.transfer import Relation


@pytest.fixture
def other(tmp_path) -> Home:
    return Home.at(tmp_path / "other")


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
