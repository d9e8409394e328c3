"""The supervisor's logic, on a formula in place of training and a real study storage."""

import dataclasses
import subprocess
import sys
import threading
import time

import pytest

from formula_study import CARD, formula, formula_spec
from hpo.errors import StoreError
from hpo.events import EpochEnded, TrialEnded, TrialStarted
from hpo.execute.engines.base import WorkerLost
from hpo.execute.subscribers import Subscriber
from hpo.home import Home
from hpo.records import FINAL, EndReason, Epoch, TrialResult, TrialState
from hpo.search.lifecycle import open_study
from hpo.search.study import Study
from hpo.spec.models import MlpSpec
from hpo.spec.study import FinalSpec, SplitSpec, StudySpec


@pytest.fixture
def spec():
    return formula_spec()


def test_the_budget_is_the_studys_total_across_runs(run_formula, spec):
    first = run_formula(spec, trials=4)
    assert first.reason == "budget"
    assert [trial.state for trial in first.trials] == [TrialState.COMPLETE] * 4
    second = run_formula(spec, trials=6)
    assert len(second.trials) == 6
    third = run_formula(spec, trials=6)
    assert len(third.trials) == 6
    assert not [event for event in third.events if isinstance(event, TrialStarted)]


def test_a_search_ends_once_its_best_trial_is_as_good_as_was_asked_for(run_formula, spec):
    values = [trial.value for trial in run_formula(spec).trials]
    until = sorted(values)[-2]
    place = next(index for index, value in enumerate(values) if value >= until)
    assert place < 5, "else the budget ends it"
    short = formula_spec(until=until).model_copy(update={"name": "short"})
    run = run_formula(short)
    assert run.reason is EndReason.REACHED
    assert run.reason.orderly
    assert [trial.value for trial in run.trials] == values[: place + 1]
    again = run_formula(short)
    assert (again.reason, len(again.trials)) == (EndReason.REACHED, place + 1)
    further = run_formula(formula_spec().model_copy(update={"name": "short"}))
    assert [trial.value for trial in further.trials] == values, "the study goes on without it"


@pytest.mark.parametrize("final", [None, FinalSpec()])
def test_failed_trials_are_tried_again_after_an_early_end(run_formula, final):
    def failing(task, device):
        if task.number < 2:
            yield TrialEnded(TrialResult(task.number, TrialState.FAILED, reason="it fails"))
        else:
            yield from formula(task, device)

    spec = formula_spec(until=-1.0).model_copy(update={"final": final})
    first = run_formula(spec, trainer=failing).trials
    failed, complete = [(None, TrialState.FAILED)] * 2, (None, TrialState.COMPLETE)
    after = [(FINAL, TrialState.COMPLETE)] * (final is not None)
    assert [(trial.candidate.stage, trial.state) for trial in first] == [*failed, complete, *after]
    assert len(run_formula(spec).trials) == len(first), "a resumed study stays ended"
    again = run_formula(spec, retry_failed=True)
    assert again.reason is EndReason.REACHED
    retried = [trial for trial in again.trials[len(first) :] if trial.candidate.stage is None]
    assert [trial.state for trial in retried] == [TrialState.COMPLETE] * 2
    assert [trial.candidate.parameters for trial in retried] == [trial.candidate.parameters for trial in first[:2]]
    assert len(run_formula(spec, retry_failed=True).trials) == len(again.trials)


@pytest.mark.parametrize(("better", "until"), [("maximize", -1.0), ("minimize", 2.0)])
def test_final_trainings_follow_a_search_that_has_reached_its_aim(run_formula, better, until):
    objective = {"maximize": "valid_accuracy", "minimize": "valid_loss"}[better]
    spec = formula_spec(until=until, objective=objective).model_copy(update={"final": FinalSpec(seeds=2)})
    run = run_formula(spec)
    assert run.reason is EndReason.REACHED
    assert [trial.candidate.stage for trial in run.trials] == [None, FINAL, FINAL]


def test_a_run_does_not_wait_for_a_trial_of_a_program_that_may_never_tell_it(run_formula, tmp_path):
    spec = formula_spec().model_copy(update={"final": FinalSpec(seeds=1)})
    study = open_study(Home.find(tmp_path).create(), spec, data_digest=CARD.digest)
    study.hand_over(study.ask(budget=6, worker="a program").number)
    study.close()
    run = run_formula(spec, trials=3)
    assert run.reason is EndReason.BUDGET
    states = [(trial.candidate.stage, trial.state) for trial in run.trials]
    assert states == [(None, TrialState.RUNNING), *[(None, TrialState.COMPLETE)] * 2, (FINAL, TrialState.COMPLETE)]


def test_a_result_that_the_storage_refuses_is_not_overwritten_at_the_end_of_the_run(run_formula, spec, monkeypatch):
    def refuse(*_, **__):
        raise StoreError("the server is away", "Wait.")

    monkeypatch.setattr(Study, "_tell", refuse)
    with pytest.raises(StoreError, match="away"):
        run_formula(spec, trials=1)
    monkeypatch.undo()
    run = run_formula(spec, trials=1)
    assert [trial.state for trial in run.trials] == [TrialState.COMPLETE]
    assert not [event for event in run.events if isinstance(event, TrialStarted)], "it is not trained again"


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, 0.4),
        ({"training": {"monitor": "valid_loss"}}, None),
        ({"search": {"constraints": ["parameters <= 1e9"]}}, None),
        ({"split": {"kind": "kfold"}}, None),
    ],
)
def test_a_worker_hears_what_is_good_enough_where_an_epoch_can_tell(run_formula, changes, told):
    tree = formula_spec(until=0.4).model_dump(exclude_unset=True)
    for part, values in changes.items():
        tree[part] = {**tree.get(part, {}), **values}
    tasks = []

    def trainer(task, device):
        tasks.append(task)
        return formula(task, device)

    run_formula(StudySpec.model_validate(tree), trials=1, trainer=trainer)
    assert [task.until for task in tasks] == [told]


def test_every_trial_is_told_to_the_tracker_in_order(run_formula, spec):
    calls = run_formula(spec, trials=2).tracker.calls
    complete = TrialState.COMPLETE
    assert calls == [
        ("start", 0),
        ("epochs", (0, 3)),
        ("end", (0, complete)),
        ("start", 1),
        ("epochs", (1, 3)),
        ("end", (1, complete)),
    ]


def test_a_resumed_study_tries_what_an_unbroken_one_would(run_formula, spec):
    def trials(run):
        done = [(trial.candidate, trial.value) for trial in run.trials]
        return [(candidate.ordinal, candidate.seed, candidate.parameters, value) for candidate, value in done]

    unbroken = trials(run_formula(spec.model_copy(update={"name": "unbroken"})))
    resumed = trials([run_formula(spec, trials=count) for count in (1, 3, 6)][-1])
    assert resumed == unbroken
    assert len({value for *_, value in resumed}) == 6


def test_an_interrupted_trial_is_stopped_and_tried_again_with_the_same_candidate(run_formula, spec):
    interrupted = threading.Event()

    def stop_in_third(event):
        if isinstance(event, EpochEnded) and event.number == 2:
            interrupted.set()

    first = run_formula(spec, watch=stop_in_third, interrupted=interrupted)
    assert first.reason == "interrupted"
    stopped = [trial for trial in first.trials if trial.state is TrialState.STOPPED]
    assert [trial.number for trial in stopped] == [2]
    assert ("end", (2, TrialState.STOPPED)) in first.tracker.calls
    second = run_formula(spec)
    assert second.reason == "budget"
    counted = [trial for trial in second.trials if trial.state is TrialState.COMPLETE]
    assert len(counted) == 6
    again = [trial for trial in counted if trial.candidate.ordinal == stopped[0].candidate.ordinal]
    assert [trial.candidate.parameters for trial in again] == [stopped[0].candidate.parameters]
    assert again[0].candidate.seed == stopped[0].candidate.seed


def test_a_deadline_stops_what_runs(run_formula, spec):
    def slow(task, device):
        for message in _unpruned(task):
            time.sleep(0.05)
            yield message

    run = run_formula(spec, trainer=slow, deadline=time.monotonic() + 0.3)
    assert run.reason == "timeout"
    assert not [trial for trial in run.trials if trial.state is TrialState.RUNNING]


def _unpruned(task):
    """The messages of a whole training, whatever the supervisor's verdicts are."""
    training = formula(task, "cpu")
    message = next(training)
    while not isinstance(message, TrialEnded):
        yield message
        message = training.send(True)
    yield message


def test_a_failed_trial_has_its_reason_and_the_study_goes_on(run_formula, spec):
    def sometimes(task, device):
        if task.number == 1:
            yield TrialEnded(TrialResult(task.number, TrialState.FAILED, reason="loss is nan", traceback="..."))
        else:
            yield from formula(task, device)

    run = run_formula(spec, trainer=sometimes)
    assert run.reason == "budget"
    states = [trial.state for trial in run.trials]
    assert states.count(TrialState.COMPLETE) == 5
    assert run.trials[1].result.reason == "loss is nan"


def test_a_study_in_which_everything_fails_stops_early(run_formula, spec):
    def never(task, device):
        yield TrialEnded(TrialResult(task.number, TrialState.FAILED, reason="no such luck"))

    run = run_formula(spec, trainer=never, trials=50)
    assert run.reason == "failing"
    assert len(run.trials) == 5
    mended = run_formula(spec, trials=8)
    assert mended.reason == "budget"
    assert [trial.state for trial in mended.trials][5:] == [TrialState.COMPLETE] * 3


def test_an_objective_that_is_not_a_number_fails_its_trial(run_formula, spec):
    def nan(task, device):
        scores = {"valid_accuracy": float("nan")}
        yield EpochEnded(task.number, Epoch(number=1, scores=scores, learning_rate=0.1, seconds=0.0))
        yield TrialEnded(TrialResult(task.number, TrialState.COMPLETE, best_epoch=1, scores=scores))

    run = run_formula(spec, trainer=nan, trials=1)
    assert run.trials[0].state is TrialState.FAILED
    assert "valid_accuracy is nan" in run.trials[0].result.reason


def _two_folds(task, device):
    """Each fold rises for three epochs, from where the first began."""
    epochs = []
    for fold in range(2):
        for number in range(1, 4):
            scores = {"train_loss": 1.0, "valid_loss": 1.0, "valid_accuracy": number / 10}
            epochs.append(Epoch(number, scores, 0.1, 0.001, fold=fold, last=number == 3))
            if not (yield EpochEnded(task.number, epochs[-1])):
                yield TrialEnded(TrialResult(task.number, TrialState.PRUNED, epochs=tuple(epochs)))
                return
    yield TrialEnded(TrialResult(task.number, TrialState.COMPLETE, 0.3, 3, tuple(epochs), epochs[-1].scores, 0.01))


def test_patience_is_not_tried_by_folds_that_begin_anew(run_formula):
    spec = formula_spec(pruner={"name": "patient", "patience": 2}, trials=2)
    spec = spec.model_copy(update={"split": SplitSpec(kind="kfold", folds=2)})
    run = run_formula(spec, trainer=_two_folds)
    assert [trial.state for trial in run.trials] == [TrialState.COMPLETE] * 2


def test_a_pruned_trial_ends_at_the_verdict(run_formula):
    spec = formula_spec(pruner={"name": "median", "startup_trials": 2}, trials=12)
    run = run_formula(spec)
    pruned = [trial for trial in run.trials if trial.state is TrialState.PRUNED]
    assert pruned
    assert all(len(trial.result.epochs) < 3 for trial in pruned)


class _Dying:
    """Two slots; the worker of the first dies with its first task."""

    slots = 2

    def __init__(self):
        self.tasks = {}
        self.died = False

    def accepts(self, slot):
        return True

    def submit(self, slot, task):
        self.tasks[slot] = task

    def poll(self, timeout):
        messages = []
        for slot, task in sorted(self.tasks.items()):
            if slot == 0 and not self.died:
                self.died = True
                messages.append((slot, WorkerLost(-9)))
            else:
                *_, end = _unpruned(task)
                messages.append((slot, end))
        self.tasks = {}
        return messages

    def verdict(self, slot, *, go_on):
        raise AssertionError("nobody asked")

    def close(self):
        self.tasks = {}


def test_a_candidate_whose_worker_dies_is_tried_again(run_formula, spec):
    run = run_formula(spec, engine=_Dying())
    lost = [trial for trial in run.trials if trial.state is TrialState.STOPPED]
    assert len(lost) == 1
    assert "signal 9" in lost[0].result.reason
    complete = [trial for trial in run.trials if trial.state is TrialState.COMPLETE]
    assert len(complete) == 6
    assert lost[0].candidate.ordinal in [trial.candidate.ordinal for trial in complete]


def test_a_candidate_that_kills_its_worker_each_time_fails_in_the_end(run_formula, spec):
    class Deadly(_Dying):
        slots = 1

        def poll(self, timeout):
            tasks, self.tasks = self.tasks, {}
            return [(slot, WorkerLost(-11)) for slot in tasks]

    run = run_formula(spec, engine=Deadly(), trials=1)
    states = [trial.state for trial in run.trials]
    assert states == [TrialState.STOPPED, TrialState.STOPPED, TrialState.FAILED]


def test_stages_follow_each_other_and_finals_come_last(run_formula):
    stages = [
        {"name": "width", "space": {"model.hidden": {"choice": [8, 16]}}},
        {"name": "rate", "space": {"model.dropout": {"choice": [0.5, 0.1, 0.3]}}},
    ]
    model = MlpSpec(kind="mlp", dropout=0.9)
    spec = formula_spec(stages=stages, space={}).model_copy(update={"final": FinalSpec(seeds=2), "model": model})
    run = run_formula(spec)
    assert run.reason in ("budget", "exhausted")
    assert [trial.candidate.stage for trial in run.trials] == ["width"] * 2 + ["rate"] * 3 + [FINAL] * 2
    finals = [trial for trial in run.trials if trial.candidate.stage == FINAL]
    assert {trial.candidate.parameters["model.dropout"] for trial in finals} == {0.1}
    again = run_formula(spec)
    assert len(again.trials) == 7


def test_a_broken_constraint_keeps_a_trial_from_being_best(run_formula):
    spec = formula_spec(constraints=["parameters <= 500"], trials=8)

    def sized(task, device):
        for message in _unpruned(task):
            if isinstance(message, TrialEnded):
                scores = {**message.result.scores, "parameters": float(task.setup.model.hidden)}
                message = TrialEnded(dataclasses.replace(message.result, scores=scores))
            yield message

    run = run_formula(spec, trainer=sized)
    sizes = [trial.candidate.parameters["model.hidden"] for trial in run.trials]
    assert min(sizes) <= 500 < max(sizes)
    assert run.study.result().best.candidate.parameters["model.hidden"] <= 500


def test_a_study_runs_with_no_subscriber_at_all(run_formula, spec):
    run = run_formula(spec, subscribers=[])
    assert run.reason is EndReason.BUDGET
    assert [trial.state for trial in run.trials] == [TrialState.COMPLETE] * 6
    assert run.tracker.calls == []
    assert run.events == []
    assert run.study.result().best is not None


def test_subscribers_hear_every_event_in_their_order_and_of_results_that_optuna_has(run_formula, spec):
    heard = []

    class Hearing(Subscriber):
        def __init__(self, name):
            self.name = name

        def __call__(self, event):
            heard.append((self.name, type(event)))

    run = run_formula(spec, trials=1, subscribers=[Hearing("first"), Hearing("second")])
    kinds = [TrialStarted, *[EpochEnded] * 3, TrialEnded]
    assert heard == [(name, kind) for kind in kinds for name in ("first", "second")]
    assert run.trials[0].state is TrialState.COMPLETE


def test_the_supervisor_imports_neither_tracking_nor_model_retention():
    code = "import sys, hpo.execute.supervisor; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    unwanted = ("hpo.tracking", "hpo.execute.subscribers.", "hpo.execute.tracking_queue")
    assert not [name for name in done.stdout.split() if name.startswith(unwanted)]
