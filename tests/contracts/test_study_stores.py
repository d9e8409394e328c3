"""The contract of study stores: a file of SQLite and a database of PostgreSQL serve every supervisor alike."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import optuna
import pytest

from formula import FINITE, FINITE_CELLS, MIXED, NUMERIC, objective, run_all, run_in_pieces, run_whole, sequence, train
from hpo.database import server_address
from hpo.home import Home
from hpo.records import Epoch, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec
from hpo.storage import transfer
from hpo.storage.optuna_private import trial_id_of
from hpo.storage.reader import read_snapshots, read_study
from hpo.storage.trial_attrs import RESULT

FORK = multiprocessing.get_context("fork")


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request, home) -> Home:
    """A home whose studies are in a file, or on a server."""
    if request.param == "sqlite":
        return home
    return replace(home, storage_url=server_address(request.getfixturevalue("database")))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Callable[..., list[tuple[Any, ...]]]:
    """The sequence of a study that ran without interruption on SQLite; one run for all stores."""
    done: dict[str, list[tuple[Any, ...]]] = {}

    def run(spec: StudySpec, budget: int, epochs: int = 1) -> list[tuple[Any, ...]]:
        key = f"{budget} {epochs} {spec.model_dump_json()}"
        if key not in done:
            done[key] = sequence(run_whole(Home.at(tmp_path_factory.mktemp("unbroken")), spec, budget, epochs=epochs))
        return done[key]

    return run


def test_everything_reported_is_read_back(store, make_spec):
    study = open_study(store, make_spec(), data_digest="sha256:1")
    candidate = study.ask(budget=2, worker="cpu-0")
    epoch = Epoch(1, {"valid_accuracy": 0.5, "valid_loss": float("inf")}, 0.01, 0.2)
    reported = TrialResult(
        candidate.number, TrialState.COMPLETE, 0.5, 1, (epoch,), {"valid_accuracy": 0.5}, 0.2, 7, ((1, 0), (0, 1)),
        {"device": "cpu"}, folder="work/0",
    )  # fmt: skip
    study.tell(reported)
    study.close()
    result = read_study(store, "study")
    (trial,) = result.trials
    # Of the folder its name is stored: a project can move.
    assert (trial.result, trial.candidate, trial.worker) == (replace(reported, folder="0"), candidate, "cpu-0")
    assert trial.run_seconds > 0
    assert abs(trial.started - result.created) < 60
    assert (result.title, result.direction, result.objective) == ("study", "maximize", "valid_accuracy")
    assert result.data_digest == "sha256:1"
    assert parse_study(result.spec) == make_spec()


def _search(home, spec, budget) -> None:
    run_all(open_study(home, spec, data_digest="d"), budget=budget)
    os._exit(0)


def test_supervisors_started_at_once_on_nothing_spend_the_budget_exactly_and_no_grid_cell_twice(store, make_spec):
    (store.root / "optuna.db").unlink()
    spec, budget = make_spec("grid", space=FINITE), FINITE_CELLS - 3
    folders = [replace(store, root=store.root / str(number)) if store.shared else store for number in range(6)]
    crowd = [FORK.Process(target=_search, args=(home, spec, budget)) for home in folders]
    for process in crowd:
        process.start()
    for process in crowd:
        process.join(120)
    assert [process.exitcode for process in crowd] == [0] * 6
    assert [found.study.title for found in read_snapshots(store)] == ["study"]
    trials = read_study(store, "study").trials
    assert sorted(trial.candidate.ordinal for trial in trials) == list(range(budget))
    assert {trial.state for trial in trials} == {TrialState.COMPLETE}
    assert set(Counter(str(trial.candidate.parameters) for trial in trials).values()) == {1}


def test_budget_counts_running_and_waiting_trials_over_all_supervisors(store, make_spec):
    one = open_study(store, make_spec(), data_digest="d")
    two = open_study(store, make_spec(), data_digest="d")
    first = one.ask(budget=3, worker="a")
    second = two.ask(budget=3, worker="b")
    third = one.ask(budget=3, worker="c")
    assert two.ask(budget=3, worker="b") is None
    one.tell(TrialResult(third.number, TrialState.STOPPED))
    assert (one.counted(), two.counted()) == (3, 3)
    again = two.ask(budget=3, worker="b")
    assert (again.ordinal, again.parameters, again.seed) == (third.ordinal, third.parameters, third.seed)
    assert again.attempt == 2
    assert one.ask(budget=3, worker="a") is None
    assert not one.exhausted
    assert len({first.ordinal, second.ordinal, again.ordinal}) == 3
    assert one.ask(budget=4, worker="a").ordinal == 3
    one.close()
    two.close()


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "cmaes", "grid"])
def test_an_interrupted_study_asks_for_what_an_unbroken_one_on_sqlite_does(sampler, store, make_spec, unbroken):
    spec = make_spec(sampler, space={"grid": FINITE, "cmaes": NUMERIC}.get(sampler, MIXED))
    assert sequence(run_in_pieces(store, spec, 11)) == unbroken(spec, 11)
    assert len(unbroken(spec, 11)) == 11


def test_running_trial_is_reaped_once_its_supervisor_is_gone_and_never_before(store, make_spec):
    one = open_study(store, make_spec(), data_digest="d")
    two = open_study(store, make_spec(), data_digest="d")
    candidate = one.ask(budget=5, worker="a")
    assert two.reap() == []
    assert one.reap() == []
    assert two.result().trials[0].state is TrialState.RUNNING
    one.close()
    assert two.reap() == [candidate.number]
    assert two.reap() == []
    assert [trial.state for trial in two.result().trials] == [TrialState.STOPPED, TrialState.WAITING]
    two.close()
    assert not list(store.locks.glob("lease-*"))


def test_kill_between_stop_and_retry_makes_one_retry(store, make_spec, monkeypatch):
    one = open_study(store, make_spec(), data_digest="d")
    candidate = one.ask(budget=5, worker="a")

    def killed(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(one._storage, "end_trial", killed)
    with pytest.raises(KeyboardInterrupt):
        one.tell(TrialResult(candidate.number, TrialState.STOPPED))
    one.close()
    two = open_study(store, make_spec(), data_digest="d")
    two.reap()
    states = [trial.state for trial in two.result().trials]
    two.close()
    assert states == [TrialState.STOPPED, TrialState.WAITING]


@pytest.mark.parametrize("kept", ["in the storage", "in the outbox"])
def test_result_of_a_killed_supervisor_is_used_and_its_trial_not_retried(store, make_spec, kept):
    one = open_study(store, make_spec(), data_digest="d")
    candidate = one.ask(budget=5, worker="a")
    done = TrialResult(candidate.number, TrialState.COMPLETE, 0.5, 2)
    if kept == "in the outbox":
        one.leave(done)
    else:
        trial_id = trial_id_of(one._running[candidate.number])
        one._storage.database.set_trial_user_attr(trial_id, RESULT, done.to_json())
    one.close()
    two = open_study(store, make_spec(), data_digest="d")
    assert two.reap() == [candidate.number]
    assert two.reap() == []
    result = two.result()
    two.close()
    assert [(trial.state, trial.value) for trial in result.trials] == [(TrialState.COMPLETE, 0.5)]


def move(home: Home, target: Home) -> int:
    """Export and import the study by way of JSON; returns the number of imported trials."""
    study = json.loads(json.dumps(transfer.export_study(home, "study")))
    transfer.check(study)
    return transfer.import_study(target, study)


def optuna_trials(home: Home) -> str:
    """Every trial as Optuna itself reads it, without its id."""
    storage = optuna.storages.RDBStorage(home.storage_url)
    trials = optuna.load_study(study_name="study", storage=storage).get_trials()
    storage.scoped_session.remove()
    storage.engine.dispose()
    # A server returns parameters, reports and attributes in any order.
    facts = [
        {key: sorted(it.items()) if isinstance(it, dict) else it for key, it in vars(one).items()} for one in trials
    ]
    return "\n".join(str({**each, "_trial_id": 0}) for each in facts)


def run_trials_of_every_state(home: Home, spec) -> None:
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


@pytest.mark.slow
def test_trials_of_all_states_are_the_same_after_export_import_and_back(store, make_spec, tmp_path):
    first, last = Home.at(tmp_path / "first"), Home.at(tmp_path / "last")
    run_trials_of_every_state(first, make_spec("tpe", "median"))
    (before,) = read_snapshots(first)
    states = {trial.state for trial in before.study.trials}
    assert states >= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED, TrialState.STOPPED, TrialState.WAITING}
    assert move(first, store) == len(before.study.trials)
    assert move(store, last) == len(before.study.trials)
    assert "nan" in optuna_trials(first)
    assert optuna_trials(first) == optuna_trials(store) == optuna_trials(last)
    assert read_study(last, "study") == read_study(first, "study")
    assert move(first, store) == move(store, first) == 0


@pytest.mark.slow
@pytest.mark.parametrize("sampler", ["tpe", "grid"])
def test_imported_study_asks_for_what_an_unbroken_one_does(sampler, store, make_spec, unbroken, tmp_path):
    spec = make_spec(sampler, "median", space=FINITE if sampler == "grid" else MIXED)
    source = Home.at(tmp_path / "source")
    run_whole(source, spec, 7, epochs=5)
    move(source, store)
    assert sequence(run_whole(store, spec, 12, epochs=5)) == unbroken(spec, 12, 5)
    assert len(unbroken(spec, 12, 5)) == 12
