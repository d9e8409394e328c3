"""A study in one go and in pieces: the same candidates, the same values; and trials that go on from a checkpoint."""

import dataclasses
import os
import signal
import threading

import pytest

from formula_study import formula_spec
from hpo.events import EpochEnded, TrialEnded, TrialStarted
from hpo.execute.run_study import run_study
from hpo.records import Candidate, TrialResult, TrialState
from hpo.spec.load import load_study
from no_pictures import draw_nothing

EPOCHS = 3


@pytest.fixture
def study(tmp_path, monkeypatch, digits_cache):
    """run(folder, trials, watch) of a real study: one worker process with one thread, TPE, median pruner, digits."""
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    monkeypatch.setattr("hpo.execute.engines.local.cores", lambda: 1)
    monkeypatch.setattr("hpo.execute.subscribers.tracking.draw_study", draw_nothing)
    settings = {
        "training.epochs": EPOCHS,
        "training.checkpoint": 1,
        "training.precision": "float32",
        "keep.models": "none",
        "search.sampler": {"name": "tpe", "startup_trials": 3},
        "search.pruner": {"name": "median", "startup_trials": 2, "warmup_epochs": 1},
    }

    def run(folder, trials, *, watch=None, **more):
        spec = load_study("digits-mlp", overrides={**settings, **more})
        return run_study(spec, trials=trials, workers=1, home=tmp_path / folder, watch=watch)

    return run


def _told(result):
    """What a study found, by the places of its sequence: parameters, seeds, and every number of every epoch."""
    ended = [trial for trial in result.trials if trial.state.finished]
    return {
        trial.candidate.ordinal: (
            trial.candidate.parameters,
            trial.candidate.seed,
            trial.state,
            trial.value,
            [dataclasses.replace(epoch, seconds=0.0) for epoch in trial.result.epochs],
            trial.result.predicted,
        )
        for trial in ended
    }


class _Interrupt:
    """Ctrl-C at an epoch, once."""

    def __init__(self, after):
        self.left = after

    def __call__(self, event):
        if isinstance(event, EpochEnded):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)


# The budget of each run, and the epoch of its own at which Ctrl-C ends it: within a trial, or just after one.
PIECES = [(1, None), (3, 4), (3, None), (5, 2), (5, None), (6, None), (8, 5), (8, 4), (9, None), (10, None)]


@pytest.mark.slow
@pytest.mark.timeout(900)  # eleven runs with their processes take minutes on a busy machine
def test_a_study_in_ten_pieces_is_the_study_in_one_go(study, tmp_path):
    whole = study("whole", 10)
    for trials, cut in PIECES:
        pieces = study("pieces", trials, watch=cut and _Interrupt(cut))
    assert [trial.state for trial in pieces.trials].count(TrialState.STOPPED) >= 2
    assert len(_told(whole)) == 10
    assert _told(pieces) == _told(whole)
    assert not list((tmp_path / "pieces" / "mlruns" / "work").rglob("*.pt"))


@pytest.mark.slow
def test_an_interrupted_trial_goes_on_from_its_checkpoint(study, tmp_path):
    long = {"training.epochs": 6, "training.checkpoint": 2, "search.pruner": "none"}
    study("home", 1, watch=_Interrupt(5), **long)
    files = list((tmp_path / "home" / "mlruns" / "work").rglob("*.pt"))
    assert [file.name.split("-")[:2] for file in files] == [["search", "0"]]
    result = study("home", 1, **long)
    first, again = result.trials
    assert [trial.state for trial in result.trials] == [TrialState.STOPPED, TrialState.COMPLETE]
    assert [epoch.number for epoch in again.result.epochs] == [1, 2, 3, 4, 5, 6]
    # The very epochs of before: their seconds were not measured anew.
    assert again.result.epochs[:4] == first.result.epochs[:4]
    assert again.result.epochs[4].seconds != first.result.epochs[4].seconds
    assert not files[0].exists()

    from hpo.home import Home
    from hpo.tracking.store import connect

    client = connect(Home.find(tmp_path / "home"))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`hpo.trial` = '1'")
    assert [metric.step for metric in client.get_metric_history(runs[0].info.run_id, "valid/loss")] == [
        1,
        2,
        3,
        4,
        5,
        6,
    ]
    interrupted = client.search_runs(experiments, "tags.`hpo.failure` = 'interrupted'")
    assert [run.data.tags["hpo.trial"] for run in interrupted] == ["0"]


def test_a_checkpoint_that_a_killed_process_left_of_a_finished_trial_is_deleted(run_formula, tmp_path):
    run_formula(formula_spec(), trials=2)
    folder = tmp_path / "work" / "checkpoints"
    folder.mkdir(parents=True)
    study = run_formula(formula_spec(), trials=2).study.result()
    from hpo.execute.workdir import checkpoint_file

    done = checkpoint_file(tmp_path / "work", study.trials[0].candidate)
    other = folder / "search-77-1.pt"
    for file in (done, other, done.with_name(f"{done.name}.123.part")):
        file.write_bytes(b"")
    run_formula(formula_spec(), trials=2)
    assert list(folder.iterdir()) == [other]


def test_the_checkpoint_of_a_candidate_that_is_not_tried_again_is_deleted(run_formula, tmp_path):
    from hpo.execute.workdir import checkpoint_file, drop_finished

    study = run_formula(formula_spec(), trials=2).study.result()
    first, second = (dataclasses.replace(trial, state=TrialState.STOPPED) for trial in study.trials)
    retry = dataclasses.replace(
        second, state=TrialState.WAITING, candidate=dataclasses.replace(second.candidate, number=2, attempt=2)
    )
    files = [checkpoint_file(tmp_path, trial.candidate) for trial in (first, second)]
    files[0].parent.mkdir()
    for file in files:
        file.touch()
    drop_finished(tmp_path, dataclasses.replace(study, trials=(first, second, retry)))
    assert [*files[0].parent.iterdir()] == [files[1]]


def test_the_part_of_a_checkpoint_that_a_killed_attempt_left_goes_when_the_next_attempt_ends(tmp_path):
    from hpo.execute.workdir import WorkdirCleanup, checkpoint_file

    candidate = Candidate(3, ordinal=2, parameters={}, seed=5, attempt=2)
    file = checkpoint_file(tmp_path, candidate)
    file.parent.mkdir()
    for left in (file, file.with_name(f"{file.name}.123.part")):
        left.touch()
    cleanup = WorkdirCleanup(tmp_path, study=None)
    cleanup(TrialStarted(candidate, "worker 0", formula_spec().setup, 0.0))
    cleanup(TrialEnded(TrialResult(3, TrialState.COMPLETE, 0.5)))
    assert not [*file.parent.iterdir()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "pruner"),
    [
        ("random", "successive_halving"),
        ("tpe", "hyperband"),
        ("qmc", "median"),
        ("cmaes", "median"),
        ("grid", "median"),
    ],
)
def test_no_sampler_or_pruner_notices_an_interruption(run_formula, tmp_path, monkeypatch, sampler, pruner):
    space = {"model.dropout": {"float": [0.0, 0.9], "step": 0.1}, "model.hidden": {"int": [1, 40]}}
    spec = formula_spec(sampler=sampler, pruner={"name": pruner}, trials=10, space=space)
    whole = _told(run_formula(spec).study.result())
    monkeypatch.setenv("HPO_STORAGE", f"sqlite:///{tmp_path / 'pieces.db'}")
    for cut in (2, 5, 4):
        interrupted = threading.Event()
        seen = []

        def stop(event, cut=cut, seen=seen, interrupted=interrupted):
            seen.append(isinstance(event, EpochEnded))
            if sum(seen) == cut:
                interrupted.set()

        assert run_formula(spec, watch=stop, interrupted=interrupted).reason == "interrupted"
    assert _told(run_formula(spec).study.result()) == whole
    assert len(whole) == 10
