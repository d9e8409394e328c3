"""Trials that successive halving ends are paused, and continue where they stopped when others turn out worse."""

from __future__ import annotations

import json
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import optuna
import pytest

from formula_study import formula_spec
from hpo.errors import SpecError
from hpo.events import EpochEnded, TrialEnded, TrialPaused, TrialStarted
from hpo.execute.engines.in_process import InProcess
from hpo.execute.workers.task import Task
from hpo.records import Epoch, TrialResult, TrialState
from hpo.search.lifecycle import open_study, opened
from hpo.spec.load import parse_study
from no_pictures import draw_nothing

EPOCHS = 9
HALVING = {"name": "successive_halving", "min_epochs": 1, "reduction_factor": 3}
WORTH = [0.5, 0.4, 0.3, 0.2, 0.1, 0.15, 0.25, 0.35, 0.45]  # by dropout: the first is the best, the second comes next


class Trainer:
    """Accuracy (1 - dropout) * epoch / EPOCHS; a checkpoint is the number of epochs; trained counts them by ordinal."""

    def __init__(self, *, size: int = 0) -> None:
        self.trained: Counter[tuple[str, int]] = Counter()
        self._size = size

    def __call__(self, task: Task, device: str):
        file = Path(task.checkpoint)
        saved = json.loads(file.read_text())["epochs"] if file.is_file() else 0
        epochs = []
        for number in range(1, EPOCHS + 1):
            if number > saved:
                self.trained[file.name, number] += 1
            accuracy = (1 - task.setup.model.dropout) * number / EPOCHS
            scores = {"train_loss": 1.0, "valid_loss": 1 - accuracy, "valid_accuracy": accuracy}
            epochs.append(Epoch(number, scores, 0.1, seconds=0.5))
            go_on = (yield EpochEnded(task.number, epochs[-1])) or number == EPOCHS
            if not go_on:
                break
        if not go_on and task.pausable and number > saved:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(json.dumps({"epochs": number, "padding": "x" * self._size}))
        state = TrialState.COMPLETE if go_on else TrialState.PRUNED
        seconds = 0.5 * (number - min(saved, number))
        yield TrialEnded(TrialResult(task.number, state, None, number, tuple(epochs), epochs[-1].scores, seconds))


def thawing(order, *, thaw=True, trials=None, **search):
    """A study that tries these values of dropout in turn."""
    start = [{"model.dropout": dropout} for dropout in order]
    space = {"model.dropout": {"float": [0.0, 0.9]}}
    spec = formula_spec(start=start, space=space, trials=trials or len(order), pruner=HALVING, thaw=thaw, **search)
    training = spec.training.model_copy(update={"epochs": EPOCHS})
    return spec.model_copy(update={"training": training})


def ends(run):
    return {trial.number: (trial.state, len(trial.result.epochs)) for trial in run.trials}


def test_a_paused_trial_continues_once_it_is_in_the_best_third_of_its_rung(run_formula, tmp_path):
    trainer = Trainer()
    run = run_formula(thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8]), trainer=trainer)
    # The first trains to its end. The second, worse, is paused after its first epoch, and continues when six trials
    # have reached that rung: two of them may. At the next rung, of two, it is paused for good.
    assert ends(run) == {
        0: (TrialState.COMPLETE, 9),
        1: (TrialState.PRUNED, 3),
        **dict.fromkeys(range(2, 6), (TrialState.PRUNED, 1)),
    }
    second = run.trials[1].result
    assert [epoch.number for epoch in second.epochs] == [1, 2, 3]
    assert (second.pauses, second.seconds, second.value) == (2, 1.5, pytest.approx(0.7 * 3 / 9))
    assert set(trainer.trained.values()) == {1}, "no epoch is trained twice"
    assert len(run.trials) == 6
    story = [type(event).__name__ for event in run.events if getattr(event, "number", 0) == 1 or _is_of(event, 1)]
    assert story == [
        *("TrialStarted", "EpochEnded", "TrialPaused"),
        *("TrialStarted", "EpochEnded", "EpochEnded", "TrialPaused"),
        "TrialEnded",
    ]
    assert not list((tmp_path / "work").rglob("*.pt"))


def _is_of(event, number):
    match event:
        case TrialStarted(candidate):
            return candidate.number == number
        case TrialEnded(result) | TrialPaused(result):
            return result.number == number
    return False


def test_without_it_a_pruned_trial_has_ended(run_formula):
    trainer = Trainer()
    run = run_formula(thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8], thaw=None), trainer=trainer)
    assert ends(run)[1] == (TrialState.PRUNED, 1)
    assert not [event for event in run.events if isinstance(event, TrialPaused)]
    assert {trial.result.pauses for trial in run.trials} == {0}


def test_a_better_trial_of_a_higher_rung_goes_first(run_formula):
    order = [0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8]
    run = run_formula(thawing(order), trainer=Trainer())
    started = [event.candidate.number for event in run.events if isinstance(event, TrialStarted)]
    # Trial 1 at six trials of the first rung, trial 2 at nine; three are on the second rung then, of which one, trial
    # 0, may continue.
    assert started == [0, 1, 2, 3, 4, 5, 1, 6, 7, 8, 2]
    assert [len(trial.result.epochs) for trial in run.trials] == [9, 3, 3, 1, 1, 1, 1, 1, 1]


def test_optunas_storage_has_one_trial_with_one_curve(run_formula, tmp_path):
    run_formula(thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8]), trainer=Trainer())
    study = optuna.load_study(study_name="formula", storage=f"sqlite:///{tmp_path / 'mlruns' / 'optuna.db'}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", *["PRUNED"] * 5]
    assert list(study.trials[1].intermediate_values) == [1, 2, 3]
    assert study.trials[1].value == pytest.approx(0.7 * 3 / 9)


def test_a_stopped_study_goes_on_with_its_paused_trials(run_formula, tmp_path):
    spec = thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8])
    whole = run_formula(spec.model_copy(update={"name": "whole"}), trainer=Trainer())
    trainer = Trainer()
    seen = []
    first = run_formula(spec, trainer=trainer, watch=seen.append, interrupted=_after_trials(3, seen))
    assert first.reason == "interrupted"
    assert [trial.state for trial in first.trials][:3] == [TrialState.COMPLETE, TrialState.PAUSED, TrialState.PAUSED]
    assert len(list((tmp_path / "work" / "checkpoints").iterdir())) >= 2
    second = run_formula(spec, trainer=trainer)
    assert second.reason == "budget"
    told = [
        {t.candidate.ordinal: (t.state, t.value, t.result.epochs) for t in r.trials if t.state.finished}
        for r in (whole, second)
    ]
    assert told[0] == told[1]
    # The fourth trial was interrupted in its first epoch: nothing was saved of it yet.
    assert {file.split("-")[1] for (file, _), count in trainer.trained.items() if count > 1} <= {"3"}


def test_paused_trials_end_where_a_study_is_resumed_without_thaw(run_formula):
    spec, seen = thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8]), []
    run_formula(spec, trainer=Trainer(), watch=seen.append, interrupted=_after_trials(3, seen))
    without = spec.model_copy(update={"search": spec.search.model_copy(update={"thaw": None})})
    last = run_formula(without, trainer=Trainer())
    assert last.reason == "budget"
    assert TrialState.PAUSED not in {trial.state for trial in last.trials}
    assert last.study.claim_end(), "its storage knows that they have ended"


def _after_trials(count, seen):
    """Set once so many trials have started."""

    class Event(threading.Event):
        def is_set(self):
            return sum(isinstance(event, TrialStarted) for event in seen) > count

    return Event()


def test_a_trial_that_is_interrupted_while_it_continues_is_tried_again_from_its_checkpoint(run_formula):
    spec, trainer, seen = thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8]), Trainer(), []
    whole = run_formula(spec.model_copy(update={"name": "whole"}), trainer=Trainer())
    first = run_formula(spec, trainer=trainer, watch=seen.append, interrupted=_after_trials(6, seen))
    assert first.trials[1].state is TrialState.STOPPED, "it had just started again"
    second = run_formula(spec, trainer=trainer)
    told = [
        {t.candidate.ordinal: (t.state, t.value, t.result.epochs) for t in r.trials if t.state.finished}
        for r in (whole, second)
    ]
    assert told[0] == told[1]
    assert trainer.trained["search-1-" + str(whole.trials[1].candidate.seed) + ".pt", 1] == 1


def test_the_worst_paused_trials_end_where_the_disk_budget_is_spent(run_formula, tmp_path):
    order = [0.1, 0.3, 0.5, 0.4, 0.7, 0.35]
    seen = []

    def watch(event):
        if isinstance(event, TrialPaused | TrialEnded):
            seen.append((type(event).__name__, event.result.number))

    run = run_formula(thawing(order, thaw={"disk_gb": 2.2e-6}), trainer=Trainer(size=1000), watch=watch)
    # Each checkpoint has a little more than 1,000 bytes: two fit.
    assert seen[:8] == [
        ("TrialEnded", 0),
        ("TrialPaused", 1),
        ("TrialPaused", 2),
        ("TrialPaused", 3),
        ("TrialEnded", 2),
        ("TrialPaused", 4),
        ("TrialEnded", 4),
        ("TrialPaused", 5),
    ]
    assert ends(run)[1] == (TrialState.PRUNED, 3)
    assert not list((tmp_path / "work").rglob("*.pt"))


def test_a_trial_without_a_checkpoint_is_pruned_for_good(run_formula):
    def forgets(task, device):
        yield from Trainer()(replace(task, pausable=False), device)

    run = run_formula(thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8]), trainer=forgets)
    assert not [event for event in run.events if isinstance(event, TrialPaused)]
    assert ends(run)[1] == (TrialState.PRUNED, 1)


def test_a_killed_supervisor_loses_no_paused_trial(run_formula, tmp_path):
    """Its lease is free, and nothing was closed: paused trials are not taken for dead ones, running ones are."""
    spec, trainer = thawing([0.1, 0.3, 0.5, 0.6, 0.7, 0.8]), Trainer()

    class Killed(BaseException):
        pass

    class Dies(InProcess):
        def submit(self, slot, task):
            super().submit(slot, task)
            if task.number == 4:
                raise Killed

    with pytest.raises(Killed):
        run_formula(spec, engine=Dies(trainer=trainer))
    from hpo.home import Home
    from hpo.storage.reader import read_snapshots

    home = Home.find(tmp_path)
    (snapshot,) = read_snapshots(home, results=False)
    states = [trial.state.value for trial in snapshot.study.trials]
    assert states == ["complete", "paused", "paused", "paused", "running"]
    assert list(snapshot.leases) == [4], "a paused trial belongs to nobody"
    second = run_formula(spec, trainer=trainer)
    assert second.reason == "budget"
    by_place = {trial.candidate.ordinal: trial for trial in second.trials if trial.state.finished}
    assert len(by_place[1].result.epochs) == 3
    assert by_place[1].number == 1
    assert set(trainer.trained.values()) == {1}


def test_another_supervisor_leaves_paused_trials_alone_until_nothing_runs(home, make_thawing):
    spec = make_thawing()
    one, other = (open_study(home, spec, data_digest="d") for _ in range(2))
    paused, running = (one.ask(budget=9, worker="w") for _ in range(2))
    one.report(paused.number, 1, 0.5)
    epoch = Epoch(1, {"valid_accuracy": 0.5}, 0.1, 0.1)
    one.tell(TrialResult(paused.number, TrialState.PAUSED, 0.5, 1, (epoch,), epoch.scores, pauses=1))
    assert other.reap() == []
    assert other.counted() == 2
    assert other.end_search() == [], "a trial of another supervisor runs"
    again = other.ask(budget=9, worker="w", resumable=lambda _: True)
    assert again.number == paused.number, "the best of its rung: a free worker of any supervisor continues it"
    assert other.before_pause(paused.number).epochs == (epoch,)
    third = one.ask(budget=9, worker="w", resumable=lambda _: True)
    assert third.number not in (paused.number, running.number)
    other.close()
    assert one.reap() == [paused.number], "now it runs, and its supervisor has died"
    assert one.result().trials[paused.number].state is TrialState.STOPPED
    one.close()


def paused_by(study):
    """The number of a trial that this supervisor has paused after its first epoch."""
    number = study.ask(budget=9, worker="w").number
    study.report(number, 1, 0.5)
    study.tell(TrialResult(number, TrialState.PAUSED, 0.5, 1, pauses=1))
    return number


@pytest.mark.parametrize("other_ends_first", [True, False])
def test_paused_trials_end_with_the_last_run_that_can_continue_them(home, make_thawing, other_ends_first):
    one, other = (open_study(home, make_thawing(), data_digest="d") for _ in range(2))
    number = paused_by(one)
    first, last = (other, one) if other_ends_first else (one, other)
    assert first.end_search() == [], "another living run may have a larger budget"
    assert last.result().trials[number].state is TrialState.PAUSED
    assert [(result.number, result.state) for result in last.end_search()] == [(number, TrialState.PRUNED)]
    assert first.end_search() == []
    for study in (one, other):
        study.close()


def test_paused_trials_of_a_run_that_is_gone_end_and_a_job_that_has_the_study_open_keeps_none(home, make_thawing):
    one, last = (open_study(home, make_thawing(), data_digest="d") for _ in range(2))
    number = paused_by(one)
    one.close()
    with opened(home, "study"):  # such as hpo ensemble: it searches nothing
        assert [result.number for result in last.end_search()] == [number]
    last.close()


def test_a_pause_that_is_told_twice_does_not_stop_who_continues_the_trial(home, make_thawing):
    one, other = (open_study(home, make_thawing(), data_digest="d") for _ in range(2))
    number = one.ask(budget=9, worker="w").number
    one.report(number, 1, 0.5)
    pause = TrialResult(number, TrialState.PAUSED, 0.5, 1, pauses=1)
    held = one._running[number]
    for _ in range(2):  # the storage's answer was lost, and the call is repeated
        one._running[number] = held
        assert one.tell(pause).state is TrialState.PAUSED
    assert other.ask(budget=9, worker="w", resumable=lambda _: True).number == number
    one._running[number] = held
    one.tell(pause)
    assert other.result().trials[number].state is TrialState.RUNNING
    assert one.ask(budget=9, worker="w", resumable=lambda _: True).number != number
    for study in (one, other):
        study.close()


@pytest.fixture
def make_thawing():
    def make(**search):
        search = {"space": {"model.dropout": {"float": [0.0, 0.9]}}, "sampler": "random", "pruner": HALVING} | search
        plain = {"name": "study", "data": {"name": "digits"}, "model": {"kind": "mlp"}, "training": {"epochs": 9}}
        return parse_study({**plain, "search": {"thaw": True, **search}})

    return make


@pytest.fixture
def home(tmp_path):
    from hpo.home import Home

    return Home.at(tmp_path).create()


def test_thaw_needs_successive_halving(make_thawing):
    with pytest.raises(SpecError, match="thaw continues trials by the rungs"):
        make_thawing(pruner="median")
    assert make_thawing(pruner="auto").search.thaw.disk_gb == 10
    assert make_thawing(thaw=False).search.thaw is None


# The second is nearly as good as the first; the others hardly learn.
RATES = [0.003, 0.002, 1e-6, 1e-6, 2e-6, 2e-6]
REAL = {
    "training.epochs": 4,
    "training.precision": "float32",
    "training.patience": None,
    "model.dropout": 0.2,
    "keep.models": "none",
    "search.sampler": "random",
    "search.space": {"training.optimizer.lr": {"float": [1e-7, 1e-1], "log": True}},
    "search.start": [{"training.optimizer.lr": rate} for rate in RATES],
}


@pytest.mark.slow
@pytest.mark.timeout(900)  # two runs with their processes take minutes on a busy machine
def test_a_real_study_has_one_run_for_each_trial_and_the_numbers_of_one_in_one_go(tmp_path, monkeypatch, digits_cache):
    from hpo.execute.run_study import run_study
    from hpo.home import Home
    from hpo.spec.load import load_study
    from hpo.tracking.store import connect

    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    monkeypatch.setattr("hpo.execute.engines.local.cores", lambda: 1)
    monkeypatch.setattr("hpo.execute.subscribers.tracking.draw_study", draw_nothing)

    def run(folder, **more):
        spec = load_study("digits-mlp", overrides={**REAL, **more})
        return run_study(spec, trials=len(RATES), workers=1, home=tmp_path / folder)

    whole = run("whole", **{"search.pruner": "none"})
    thawed = run("thawed", **{"search.pruner": HALVING, "search.thaw": True})
    assert [trial.candidate.seed for trial in thawed.trials] == [trial.candidate.seed for trial in whole.trials]
    assert max(trial.result.pauses for trial in thawed.trials) >= 1
    lengths = [len(trial.result.epochs) for trial in thawed.trials]
    assert lengths[0] == 4
    assert lengths[1] >= 3, "it was paused after its first epoch, and continued"
    for one, other in zip(thawed.trials, whole.trials, strict=True):
        pairs = zip(one.result.epochs, other.result.epochs, strict=False)
        assert all(
            replace(mine, seconds=0.0, last=False) == replace(theirs, seconds=0.0, last=False) for mine, theirs in pairs
        )
    client = connect(Home.find(tmp_path / "thawed"))
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, "tags.`hpo.kind` = 'trial'")
    assert sorted(int(run.data.tags["hpo.trial"]) for run in runs) == list(range(len(RATES)))
    for run in runs:
        number = int(run.data.tags["hpo.trial"])
        assert (run.info.status, run.data.tags["hpo.state"]) == ("FINISHED", thawed.trials[number].state.value)
        steps = [metric.step for metric in client.get_metric_history(run.info.run_id, "valid/loss")]
        assert sorted(steps) == list(range(1, lengths[number] + 1))
    assert not list((tmp_path / "thawed" / "mlruns" / "work").rglob("*.pt"))


def test_several_objectives_are_compared_with_the_costs_that_workers_send(run_formula):
    """The fewer parameters, the less accurate: all are on the front, and at six trials its other end continues too."""

    def trainer(task, device):
        training, costs = Trainer()(task, device), {"parameters": 1000 * (1 - task.setup.model.dropout)}
        message = next(training)
        while isinstance(message, EpochEnded):
            message = training.send((yield replace(message, costs=costs)))
        yield TrialEnded(replace(message.result, scores={**message.result.scores, **costs}))

    order = [0.1, 0.3, 0.5, 0.6, 0.7, 0.8]
    run = run_formula(thawing(order, thaw=None, objectives=["valid_accuracy", "parameters"]), trainer=trainer)
    assert [len(trial.result.epochs) for trial in run.trials] == [9, 1, 1, 1, 1, 3]
    assert [trial.number for trial in run.study.result().pareto()] == [0]
