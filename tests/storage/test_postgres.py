"""Studies on a real PostgreSQL server: shared by supervisors that cannot see each other's locks."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import replace

import optuna
import psycopg
import pytest

from formula import run_all, train
from hpo.database import server_address
from hpo.errors import StoreError
from hpo.home import Home
from hpo.jobs.stop import stop_study
from hpo.locks import lock
from hpo.records import TrialResult, TrialState
from hpo.search.lifecycle import open_study, reap
from hpo.storage import liveness, retry
from hpo.storage.optuna_storage import open_storage
from hpo.storage.reader import read_snapshots, read_study

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def make_home(tmp_path, database):
    """The home of a machine of that name: folders of its own, the storage shared."""

    def make(name: str) -> Home:
        return replace(Home.at(tmp_path / name), storage_url=server_address(database))

    return make


@pytest.fixture
def impatient(monkeypatch):
    """Signs of life every two seconds, death after five without, and short pauses between tries, as of 15, 60 and 8."""
    for room, name, seconds in (
        (liveness, "HEARTBEAT_SECONDS", 2),
        (liveness, "GRACE_SECONDS", 5),
        (retry, "_LONGEST_PAUSE", 0.5),
    ):
        monkeypatch.setattr(room, name, seconds)


def _wait(condition, seconds=60.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.1)
    return False


def _ask_and_die(home, spec) -> None:
    study = open_study(home, spec, data_digest="d")
    study.ask(budget=10, worker="w")
    os._exit(0)


@pytest.mark.slow
def test_trial_of_a_machine_that_is_gone_is_tried_again_after_its_grace(make_home, make_spec, impatient):
    dead = FORK.Process(target=_ask_and_die, args=(make_home("dead"), make_spec()))
    dead.start()
    dead.join(60)
    study = open_study(make_home("alive"), make_spec(), data_digest="d")
    assert study.reap() == []  # nobody knows yet
    assert study.trials_of_others() == {0}
    assert _wait(lambda: study.reap() == [0])
    again = study.ask(budget=10, worker="w")
    assert (again.number, again.ordinal, again.attempt) == (1, 0, 2)
    train(study, again)
    study.close()


@pytest.mark.slow
def test_trial_of_a_living_machine_is_left_alone_however_long_it_takes(make_home, make_spec, impatient):
    first = open_study(make_home("a"), make_spec(), data_digest="d")
    second = open_study(make_home("b"), make_spec(), data_digest="d")
    candidate = first.ask(budget=10, worker="w")
    time.sleep(7)
    assert second.reap() == []
    assert second.trials_of_others() == {candidate.number}
    (seen,) = read_snapshots(make_home("b"))
    assert seen.abandoned == ()
    train(first, candidate)
    assert second.trials_of_others() == set()  # told without a time
    first.close()
    second.close()


@pytest.mark.slow
def test_supervisor_that_stood_still_finds_its_trial_taken_and_goes_on(make_home, make_spec, impatient):
    slow = open_study(make_home("slow"), make_spec(), data_digest="d")
    slow._liveness.close()  # it stands still
    taken = slow.ask(budget=10, worker="w")
    other = open_study(make_home("other"), make_spec(), data_digest="d")
    assert _wait(lambda: other.reap() == [taken.number])
    assert slow.report(taken.number, 1, 0.5)  # stop that
    told = slow.tell(TrialResult(taken.number, TrialState.COMPLETE, 0.9))
    assert (told.state, told.reason) == (TrialState.STOPPED, "its process was gone")
    assert slow.ask(budget=10, worker="w").attempt == 2
    slow.close()
    other.close()


def _hold_trial(home, spec, pipe) -> None:
    study = open_study(home, spec, data_digest="d")
    pipe.send(study.ask(budget=10, worker="w").number)
    pipe.recv()
    study.tell(TrialResult(0, TrialState.COMPLETE, 0.5))
    os._exit(0)


@pytest.mark.slow
def test_after_an_outage_nobody_is_taken_for_dead_by_those_who_lived_through_it_or_came_later(
    make_home, make_spec, impatient, postgres
):
    ours, theirs = FORK.Pipe()
    owner = FORK.Process(target=_hold_trial, args=(make_home("owner"), make_spec(), theirs))
    owner.start()
    assert ours.recv() == 0
    witness = open_study(make_home("witness"), make_spec(), data_digest="d")
    assert _wait(lambda: witness._liveness._heartbeat.reliable)  # it knows by now who lives
    postgres.control("stop", "-m", "fast")
    time.sleep(7)  # longer than the grace
    postgres.control("start")
    newcomer = open_study(make_home("newcomer"), make_spec(), data_digest="d")
    until = time.monotonic() + 10  # longer than two beats and a grace
    while time.monotonic() < until:
        assert newcomer.reap() == witness.reap() == []
        time.sleep(0.05)
    ours.send(1)
    owner.join(60)
    assert [trial.state for trial in witness.result().trials] == [TrialState.COMPLETE]
    witness.close()
    newcomer.close()


@pytest.mark.slow
def test_repairs_wait_until_silence_means_something(make_home, make_spec, impatient):
    ours, theirs = FORK.Pipe()
    owner = FORK.Process(target=_hold_trial, args=(make_home("owner"), make_spec(), theirs))
    owner.start()
    assert ours.recv() == 0
    place = make_home("repair")
    assert reap(place, "study") == []
    owner.kill()
    time.sleep(6)  # longer than the grace
    assert reap(place, "study") == [0]
    assert [trial.state for trial in read_study(place, "study").trials] == [TrialState.STOPPED, TrialState.WAITING]


def test_lock_of_a_killed_process_is_free_at_once(make_home, make_spec):
    home = make_home("a")
    open_study(home, make_spec(), data_digest="d").close()

    def hold(pipe) -> None:
        with open_storage(home).locked("x"):
            pipe.send(1)
            time.sleep(60)

    ours, theirs = FORK.Pipe()
    holder = FORK.Process(target=hold, args=(theirs,))
    holder.start()
    ours.recv()
    holder.kill()
    began = time.monotonic()
    opened = open_storage(home)
    with opened.locked("x"):
        assert time.monotonic() - began < 10
    opened.close()


def test_wrong_password_is_told_without_it(make_home, database):
    wrong = replace(make_home("a"), storage_url=server_address(database.replace("a-word-of-tests", "guessed")))
    with pytest.raises(StoreError) as error:
        open_storage(wrong)
    assert "guessed" not in f"{error.value} {error.value.hint}"
    assert "PGPASSWORD" in error.value.hint


def test_database_without_server_is_told_with_the_next_step(make_home, monkeypatch):
    monkeypatch.setattr("hpo.storage.retry.RETRY_SECONDS", 0.0)
    nobody = replace(make_home("a"), storage_url="postgresql+psycopg://hpo@127.0.0.1:1/hpo")
    with pytest.raises(StoreError) as error:
        open_storage(nobody)
    assert "Start the server" in error.value.hint


def test_other_databases_are_refused(make_home):
    with pytest.raises(StoreError, match="PostgreSQL or SQLite"):
        open_storage(replace(make_home("a"), storage_url="mysql://hpo@db/hpo"))


def test_connections_of_a_handle_are_few_and_end_with_it(make_home, make_spec, database):
    study = open_study(make_home("a"), make_spec(), data_digest="d")
    run_all(study, budget=5)
    query = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    with psycopg.connect(database, autocommit=True) as connection:
        (count,) = connection.execute(query).fetchone()
        assert count <= 3
        study.close()
        assert _wait(lambda: connection.execute(query).fetchone() == (0,))


def test_server_that_restarts_is_waited_for(make_home, make_spec, postgres):
    study = open_study(make_home("a"), make_spec(), data_digest="d")
    first = study.ask(budget=10, worker="w")
    postgres.control("restart", "-m", "immediate")
    train(study, first)
    run_all(study, budget=3)
    assert [trial.state for trial in study.result().trials] == [TrialState.COMPLETE] * 3
    study.close()


def test_candidate_whose_question_broke_off_half_way_is_asked_for_once(make_home, make_spec, database, monkeypatch):
    study = open_study(make_home("a"), make_spec(), data_digest="d")
    suggest, broken = study._starter._suggest, []

    def break_off(trial, stage, proposer):
        values = suggest(trial, stage, proposer)
        if not broken:
            broken.append(trial.number)
            _break_off(database)
        return values

    monkeypatch.setattr(study._starter, "_suggest", break_off)
    candidate = study.ask(budget=10, worker="w")
    assert broken == [0]
    assert candidate.number == 0
    assert len(study.result().trials) == 1
    train(study, candidate)
    assert study.result().trials[0].state is TrialState.COMPLETE
    study.close()


def _break_off(database) -> None:
    """End every connection that there is."""
    with psycopg.connect(database, autocommit=True) as connection:
        others = "datname = current_database() AND pid <> pg_backend_pid()"
        connection.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE {others}")  # noqa: S608


def test_stopped_trial_whose_end_broke_off_half_way_is_tried_again(make_home, make_spec, database, monkeypatch):
    study = open_study(make_home("a"), make_spec(), data_digest="d")
    candidate = study.ask(budget=10, worker="w")
    retry, broken = study._finisher.retry, []

    def break_off(trial, *, deaths):
        retry(trial, deaths=deaths)
        if not broken:
            study._storage.index(study._id)  # as samplers and others do
            broken.append(trial.number)
            _break_off(database)

    monkeypatch.setattr(study._finisher, "retry", break_off)
    study.tell(TrialResult(candidate.number, TrialState.STOPPED, reason="Ctrl-C"))
    assert broken == [0]
    states = [trial.state for trial in study.result().trials]
    assert states == [TrialState.STOPPED, TrialState.WAITING]
    again = study.ask(budget=10, worker="w")
    assert (again.number, again.ordinal, again.attempt) == (1, 0, 2)
    train(study, again)
    study.close()


def test_trials_of_the_dead_are_all_tried_again_though_one_was_told_meanwhile(make_home, make_spec, monkeypatch):
    study = open_study(make_home("a"), make_spec(), data_digest="d")
    first, second = (study.ask(budget=10, worker="w") for _ in range(2))
    study._running.clear()  # as if another process had died with them
    settle, told = study._finisher.finish, []

    def told_meanwhile(trial, result, *, died=False):
        if trial.number == second.number and not told:
            told.append(trial.number)
            raise optuna.exceptions.UpdateFinishedTrialError
        return settle(trial, result, died=died)

    monkeypatch.setattr(study._finisher, "finish", told_meanwhile)
    assert study.reap() == []
    assert study.reap() == [first.number, second.number]
    assert sorted(trial.candidate.ordinal for trial in study.result().trials) == [0, 0, 1, 1]
    assert [study.ask(budget=10, worker="w").ordinal for _ in range(2)] == [0, 1]
    study.close()


def test_supervisor_elsewhere_that_only_waits_is_asked_to_stop(make_home, make_spec, database, monkeypatch, tmp_path):
    waits = open_study(make_home("waits"), make_spec(), data_digest="d")
    monkeypatch.setenv("HPO_STORAGE", database)
    stop = stop_study("study", home=tmp_path / "here")
    assert (stop.supervisors, stop.asked) == (0, True)
    assert waits.stop_asked()
    waits.close()


def test_long_steps_keep_their_lock(make_home, database):
    shorter = "ALTER DATABASE \"{}\" SET idle_in_transaction_session_timeout = '1s'"
    with psycopg.connect(database, autocommit=True) as connection:
        connection.execute(shorter.format(database.rpartition("/")[2]).encode())
    home = make_home("a")
    ours, theirs = FORK.Pipe()

    def hold() -> None:
        with lock(home, "x"):
            theirs.send(1)
            time.sleep(4)
            theirs.send(2)

    holder = FORK.Process(target=hold)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hpo.database.SERVER_ARGUMENTS", {"prepare_threshold": None})  # the database's word counts
        holder.start()
        ours.recv()
        with lock(home, "x"):
            assert ours.poll()  # it has ended
    holder.join(60)


def test_left_result_is_told_though_the_first_try_broke_off(make_home, make_spec, database, monkeypatch):
    study = open_study(make_home("a"), make_spec(), data_digest="d")
    candidate = study.ask(budget=10, worker="w")
    study.leave(TrialResult(candidate.number, TrialState.COMPLETE, 0.75))
    study._running.clear()  # as if another process had died with it
    reap_once, broken = study._reap, []

    def break_off():
        done = reap_once()
        if not broken:
            broken.append(1)
            _break_off(database)
        return done

    monkeypatch.setattr(study, "_reap", break_off)
    assert study.reap() == [candidate.number]
    (trial,) = study.result().trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.75)
    assert study.reap() == []
    study.close()


def test_a_paused_trial_is_promoted_by_what_trials_elsewhere_have_reported_until_now(make_home, make_spec):
    spec = make_spec(pruner="successive_halving", thaw=True)
    pruner = spec.search.pruner.model_copy(update={"name": "successive_halving", "min_epochs": 1})
    spec = spec.model_copy(update={"search": spec.search.model_copy(update={"pruner": pruner})})
    one, other = (open_study(make_home(name), spec, data_digest="d") for name in ("one", "other"))
    best, paused, *others = (one.ask(budget=6, worker="w").number for _ in range(6))
    assert not one.report(best, 1, 0.9)
    assert one.report(paused, 1, 0.5)
    one.tell(TrialResult(paused, TrialState.PAUSED, 0.5, 1, pauses=1))
    assert other.ask(budget=6, worker="w", resumable=lambda _: True) is None, "one of two continues"
    for number in others:
        one.report(number, 1, 0.1)
    again = other.ask(budget=6, worker="w", resumable=lambda _: True)
    assert again is not None, "two of six continue"
    assert again.number == paused
    for study in (one, other):
        study.close()


@pytest.mark.slow
def test_paused_trials_end_once_no_machine_that_has_their_checkpoint_lives(make_home, make_spec, impatient):
    """A run that has nothing to train is known by the heartbeats of what was paused on its machine."""
    spec = make_spec(pruner="successive_halving", thaw=True)
    one, other = (open_study(make_home(name), spec, data_digest="d") for name in ("one", "other"))
    number = one.ask(budget=6, worker="w").number
    one.tell(TrialResult(number, TrialState.PAUSED, 0.5, 1, pauses=1))
    time.sleep(7)  # longer than the grace
    assert other.end_search() == []
    one.close()
    successor = open_study(make_home("one"), spec, data_digest="d")  # begun again on that machine
    time.sleep(7)
    assert other.end_search() == []
    successor.close()
    assert _wait(lambda: [result.number for result in other.end_search()] == [number])
    other.close()
