"""A program of one's own asks for candidates and tells what came of them, in one process or in many."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from typer.testing import CliRunner

import hpo
from hpo.cli.app import app
from hpo.data.prepare import prepare
from hpo.errors import DataError, SpecError, StoreError
from hpo.execute.budget import as_fitted
from hpo.home import Home
from hpo.records import TrialState
from hpo.search.lifecycle import open_study, reap
from hpo.search.study import Study
from hpo.spec.load import parse_study
from hpo.storage.reader import read_snapshots, read_study

STUDY = {
    "name": "own",
    "data": {"name": "digits"},
    "split": {"kind": "holdout"},
    "model": {"kind": "mlp"},
    "training": {"epochs": 9},
    "keep": {"models": "none"},
    "search": {
        "trials": 4,
        "sampler": "random",
        "pruner": {"name": "successive_halving", "min_epochs": 1, "reduction_factor": 3},
        "space": {
            "training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True, "prior": 1e-2},
            "model.hidden": {"int": [4, 64]},
        },
    },
}


@pytest.fixture
def place(tmp_path, monkeypatch, digits_cache):
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_more_trials_than_the_file_has_are_those_of_the_next_process_too(place):
    with hpo.ask_tell(STUDY, home=place, trials=7) as study:
        for _ in range(2):
            study.tell(study.ask().number, 0.5)
    with hpo.ask_tell("own", home=place) as study:
        while (candidate := study.ask()) is not None:
            study.tell(candidate.number, 0.5)
    assert len(read_study(Home.find(place), "own").trials) == 7


def test_a_search_by_a_program_of_ones_own(place):
    asked, verdicts = [], []
    with hpo.ask_tell(STUDY, home=place) as study:
        while (candidate := study.ask()) is not None:
            asked.append(candidate)
            value = 0.9 - 0.1 * candidate.number
            prune = any(study.report(candidate.number, epoch, value * epoch / 9) for epoch in (1, 2, 3))
            verdicts.append(prune)
            study.tell(candidate.number, None if prune else value, state="pruned" if prune else "complete")
    assert verdicts == [False, True, True, True]
    assert asked[0].parameters["training.optimizer.lr"] == 1e-2, "the first candidate has the values of the priors"
    assert asked[1].settings["model.hidden"] == asked[1].parameters["model.hidden"]
    found = read_study(Home.find(place), "own")
    assert [trial.state.value for trial in found.trials] == ["complete", "pruned", "pruned", "pruned"]
    assert found.best.value == pytest.approx(0.9)
    assert [epoch.scores["valid_accuracy"] for epoch in found.best.result.epochs] == pytest.approx([0.1, 0.2, 0.3])

    from hpo.tracking.store import connect

    client = connect(Home.find(place))
    experiments = [each.experiment_id for each in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`hpo.kind` = 'trial'")
    assert sorted((run.data.tags["hpo.trial"], run.data.tags["hpo.state"]) for run in runs) == [
        ("0", "complete"),
        ("1", "pruned"),
        ("2", "pruned"),
        ("3", "pruned"),
    ]
    (parent,) = client.search_runs(experiments, "tags.`hpo.kind` = 'study'")
    assert (parent.info.status, parent.data.tags["hpo.best_trial"]) == ("FINISHED", "0")
    assert "0.9" in parent.data.tags["mlflow.note.content"]


def test_a_trial_that_was_not_told_is_tried_again(place):
    with hpo.ask_tell(STUDY, home=place) as study:
        first = study.ask()
    with hpo.ask_tell("own", home=place) as study:
        again = study.ask()
        study.tell(again.number, state="failed", reason="out of paper")
    assert (again.parameters, again.seed) == (first.parameters, first.seed)
    trials = read_study(Home.find(place), "own").trials
    assert [trial.state for trial in trials] == [TrialState.STOPPED, TrialState.FAILED]
    assert trials[1].result.reason == "out of paper"


def test_commands_ask_report_and_tell_from_one_process_each(place):
    def command(*words):
        outcome = CliRunner().invoke(app, [*words, "--home", str(place)], catch_exceptions=False)
        return outcome.exit_code, outcome.stdout

    hpo.ask_tell(STUDY, home=place).close()
    code, printed = command("ask", "own")
    asked = json.loads(printed)
    assert code == 0
    assert (asked["trial"], asked["number"], asked["parameters"]["training.optimizer.lr"]) == ("own~1#0", 0, 1e-2)
    # Between two commands no process has it: it is not taken for abandoned.
    assert reap(Home.find(place), "own") == []
    (snapshot,) = read_snapshots(Home.find(place), results=False)
    assert (snapshot.abandoned, snapshot.holders) == ((), ())
    assert json.loads(command("tell", "own#0", "--epoch", "1", "--report", "0.5")[1])["prune"] is False
    assert json.loads(command("tell", "own#0", "--value", "0.8")[1]) == {
        "trial": "own#0",
        "state": "complete",
        "value": 0.8,
        "reason": "",
    }
    number = json.loads(command("ask", "own")[1])["number"]
    assert json.loads(command("tell", f"own#{number}", "--epoch", "1", "--report", "0.1")[1])["prune"] is True
    assert json.loads(command("tell", f"own#{number}", "--pruned")[1])["value"] == 0.1
    assert command("ask", "own", "--trials", "2")[0] == 1, "the budget is spent"


def test_a_trial_that_was_not_handed_out_is_refused(place):
    with hpo.ask_tell(STUDY, home=place) as study:
        with pytest.raises(StoreError, match="own#7: hpo ask has handed out no such trial"):
            study.tell(7, 0.5)
        asked = study.ask()
        study.tell(asked.number, 0.5)
        with pytest.raises(StoreError, match="own#0"):
            study.tell(asked.number, 0.6)


def test_several_objectives_are_told_as_scores(place):
    search = {**STUDY["search"], "objectives": ["valid_accuracy", "parameters"]}
    with hpo.ask_tell({**STUDY, "search": search}, home=place) as study:
        asked = study.ask()
        assert study.report(asked.number, 1, [0.5, 100.0]) is False
        result = study.tell(asked.number, scores={"valid_accuracy": 0.9, "parameters": 100.0})
    assert (result.state, result.values) == (TrialState.COMPLETE, (0.9, 100.0))


def test_an_error_leaves_a_trial_that_was_handed_out_to_its_program(place):
    with hpo.ask_tell(STUDY, home=place) as study:
        study.hand_over(study.ask().number)
    with pytest.raises(SpecError, match="one number"), hpo.ask_tell("own", home=place) as study:
        study.report(0, 1, [0.5, 0.6])
    with hpo.ask_tell("own", home=place) as study:
        study.report(0, 1, 0.5)
    with hpo.ask_tell("own", home=place) as study:
        assert study.tell(0).value == 0.5
    assert [trial.state for trial in read_study(Home.find(place), "own").trials] == [TrialState.COMPLETE]


def test_a_result_that_the_storage_refuses_is_kept(place, monkeypatch):
    def refuse(*_, **__):
        raise StoreError("the disk is full", "Free it.")

    with hpo.ask_tell(STUDY, home=place) as study:
        number = study.ask().number
        monkeypatch.setattr(Study, "_tell", refuse)
        with pytest.raises(StoreError, match="full"):
            study.tell(number, 0.75)
        monkeypatch.undo()
    reap(Home.find(place), "own")
    (trial,) = read_study(Home.find(place), "own").trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 0.75)


def test_a_printed_trial_is_one_of_its_generation(place):
    def command(*words):
        return CliRunner().invoke(app, [*words, "--home", str(place)])

    hpo.ask_tell(STUDY, home=place).close()
    printed = json.loads(command("ask", "own").stdout)["trial"]
    home = Home.find(place)
    record = read_study(home, "own")
    open_study(home, parse_study(STUDY), data_digest=record.data_digest, fresh=True).close()
    assert json.loads(command("tell", printed, "--value", "0.8").stdout)["state"] == "complete"
    assert [trial.value for trial in read_study(home, "own~1").trials] == [0.8]
    assert read_study(home, "own").trials == ()


def test_a_study_of_stages_is_asked_to_its_end(place):
    stages = [
        {"name": name, "trials": 11, "space": {path: part}}
        for name, (path, part) in zip("ab", STUDY["search"]["space"].items(), strict=True)
    ]
    search = {"sampler": "random", "pruner": "none", "stages": stages}
    with hpo.ask_tell({**STUDY, "search": search}, home=place) as study:
        told = 0
        while (candidate := study.ask()) is not None:
            study.tell(candidate.number, 0.5)
            told += 1
    assert told == 22


def test_candidates_whose_values_do_not_fit_together_are_infeasible_and_the_next_follows(place):
    space = {
        "training.loss": {"choice": ["cross_entropy", "focal"]},
        "training.label_smoothing": {"choice": [0.0, 0.1]},
    }
    search = {**STUDY["search"], "sampler": "grid", "pruner": "none", "space": space}
    asked = []
    for _ in range(2):  # closed in between: what is not told is tried again, and an infeasible one is not
        with hpo.ask_tell({**STUDY, "search": search}, home=place) as study:
            while len(asked) < 2 and (candidate := study.ask()) is not None:
                asked.append(candidate.parameters)
                study.tell(candidate.number, 0.5)
    with hpo.ask_tell("own", home=place) as study:
        while (candidate := study.ask()) is not None:
            asked.append(candidate.parameters)
            study.tell(candidate.number, 0.5)
    assert len(asked) == 3
    assert {"training.loss": "focal", "training.label_smoothing": 0.1} not in asked
    trials = read_study(Home.find(place), "own").trials
    (odd,) = [trial for trial in trials if trial.state is TrialState.PRUNED]
    assert (len(trials), odd.result.feasible) == (4, False)
    assert "label_smoothing=0.1 does not fit" in odd.result.reason


def test_a_program_and_runs_take_turns_on_a_study_that_was_fitted_and_starts_from_a_model(place, monkeypatch):
    home, seen = Home.find(place).create(), []
    record = {"settings": {"training.epochs": [9, 4], "search.trials": [4, 2]}, "text": ""}
    digest = prepare(parse_study(STUDY).data, parse_study(STUDY).split).digest

    def fetched(spec, home, *, trust):
        seen.append(trust)
        return spec.model_copy(update={"training": spec.training.model_copy(update={"teacher": "models:/m-1"})})

    monkeypatch.setattr("hpo.execute.base_model.with_model", fetched)
    begun = as_fitted(fetched(parse_study(STUDY), home, trust=False), record, trials=True)
    open_study(
        home, begun, data_digest=digest, class_names=[str(digit) for digit in range(10)], budget=2, fitted=record
    ).close()
    given = {**STUDY, "training": {"epochs": 9, "teacher": "own@challenger"}}
    with hpo.ask_tell(given, home=place, trust=True) as study:
        asked = study.ask()
        study.tell(asked.number, 0.5)
        study.tell(study.ask().number, 0.5)
        assert study.ask() is None, "the fitted number of trials"
    assert (asked.settings["training.epochs"], asked.settings["training.teacher"]) == (4, "models:/m-1")
    assert seen == [False, True]
    assert read_study(home, "own").fitted == record


def test_a_program_begins_no_study_on_parts_that_share_images(place, monkeypatch):
    spec = parse_study(STUDY)
    card = replace(prepare(spec.data, spec.split), shared=("train", "test"))
    monkeypatch.setattr("hpo.data.prepare.prepare", lambda *_: card)
    with pytest.raises(DataError):
        hpo.ask_tell(STUDY, home=place)
    assert read_snapshots(Home.find(place)) == []
