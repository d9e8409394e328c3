"""Supervisors that open a study, or join one that others have begun."""

from __future__ import annotations

import sqlite3
from contextlib import closing

import optuna
import pytest

from formula import run_all
from hpo.errors import SpecError, StoreError
from hpo.records import FailureKind, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.storage.reader import read_study


def test_what_has_not_begun_cannot_be_joined(home, make_spec):
    with pytest.raises(StoreError, match="no study 'study' has begun") as error:
        open_study(home, make_spec(), data_digest="d", join="study")
    assert "hpo run study" in error.value.hint


def test_other_images_are_refused(home, make_spec):
    open_study(home, make_spec(), data_digest="sha256:a", budget=5).close()
    with pytest.raises(SpecError, match="data digest: sha256:a -> sha256:b"):
        open_study(home, make_spec(), data_digest="sha256:b", join="study")


def test_who_joins_leaves_the_record_as_it_is_and_has_its_budget(home, make_spec):
    spec = make_spec(trials=50)
    open_study(home, spec, data_digest="d", budget=7).close()
    before = read_study(home, "study")
    elsewhere = spec.model_copy(update={"data": spec.data.model_copy(update={"path": "/scratch/x.npz"})})
    study = open_study(home, elsewhere, data_digest="d", join="study")
    assert study.budget == 7
    study.close()
    assert read_study(home, "study").spec == before.spec


def test_budget_of_a_record_without_one_is_that_of_the_spec(home, make_spec):
    study = open_study(home, make_spec(trials=50), data_digest="d")
    assert study.budget == 50
    study.close()


def test_a_search_that_ended_early_is_summed_up_although_stopped_trials_wait(home, make_spec):
    one = open_study(home, make_spec(), data_digest="d", budget=3)
    number = one.ask(budget=3, worker="w").number
    assert not one.claim_end(early=True), "it runs"
    one.tell(TrialResult(number, TrialState.STOPPED, failure=FailureKind.INTERRUPTED))
    assert not one.claim_end()
    assert one.claim_end(early=True)
    one.close()


def test_one_of_many_sums_up_once_all_trials_have_ended(home, make_spec):
    one = open_study(home, make_spec(), data_digest="d", budget=3)
    other = open_study(home, make_spec(), data_digest="d", join="study")
    assert one.ask(budget=3, worker="w")
    assert not other.claim_end()
    one.close()
    other.reap()
    run_all(other, budget=3)
    assert other.claim_end()
    last = open_study(home, make_spec(), data_digest="d", join="study")
    assert not last.claim_end()
    run_all(last, budget=4)
    assert last.claim_end()
    last.close()
    other.close()


def test_who_joins_takes_part_in_the_generation_that_is_named(home, make_spec):
    open_study(home, make_spec(), data_digest="d").close()
    open_study(home, make_spec(), data_digest="d", fresh=True).close()
    for title in ("study", "study~2"):
        study = open_study(home, make_spec(), data_digest="d", join=title)
        assert study.title == title
        study.close()
    with pytest.raises(StoreError, match="no study 'study~3'"):
        open_study(home, make_spec(), data_digest="d", join="study~3")


def test_optuna_shows_the_name_of_the_objective_and_plain_facts_of_trials(home, make_spec):
    study = open_study(home, make_spec(), data_digest="d")
    run_all(study, budget=2)
    study.close()
    shown = optuna.load_study(study_name="study", storage=home.storage_url)
    assert shown.metric_names == ["valid_accuracy"]
    for trial in shown.trials:
        plain = {name: value for name, value in trial.user_attrs.items() if not name.startswith("hpo.")}
        assert plain
        assert all(isinstance(value, int | float | str) for value in plain.values())


def test_a_study_of_an_earlier_version_gets_the_names_when_it_is_resumed(home, make_spec):
    open_study(home, make_spec(trials=1), data_digest="d").close()
    with closing(sqlite3.connect(home.storage_url.removeprefix("sqlite:///"))) as database:
        database.execute("DELETE FROM study_system_attributes WHERE key = 'study:metric_names'")
        database.commit()
    open_study(home, make_spec(trials=1), data_digest="d").close()
    assert optuna.load_study(study_name="study", storage=home.storage_url).metric_names == ["valid_accuracy"]
