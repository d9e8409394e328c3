"""Whatever a run waits for, it hears its deadline, Ctrl-C and hpo stop, and what has ended is not lost."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from formula_study import CARD, RecordedTracker, formula_spec
from hpo.errors import HpoError
from hpo.events import Notice, StudyEnded, TrialEnded
from hpo.execute import process
from hpo.execute.process import RunEnd, interruptible
from hpo.execute.run_study import await_job, run_study
from hpo.execute.subscribers.model_retention import ModelRetention
from hpo.execute.tracking_queue import TrackingQueue
from hpo.records import Candidate, EndReason, StudyResult, Trial, TrialResult, TrialState
from hpo.spec.load import parse_study
from hpo.spec.outcome import KeepSpec


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """Little time to save results in."""
    monkeypatch.setattr(process, "_GRACE", 0.3)
    monkeypatch.setattr(process, "_PATIENCE", 0.3)
    monkeypatch.setattr(process, "_FOR_TRACKING", 0.1)


def interrupted() -> RunEnd:
    end = RunEnd()
    end.interrupted.set()
    return end


def stopped() -> RunEnd:
    end = RunEnd()
    end.watch_stop(lambda: True, every=0.0)
    return end


ENDS = {
    EndReason.INTERRUPTED: interrupted,
    EndReason.STOPPED: stopped,
    EndReason.TIMEOUT: lambda: RunEnd(time.monotonic()),
}


@pytest.mark.parametrize("reason", ENDS)
def test_what_waits_for_a_job_that_hangs_hears_the_end(reason):
    assert RunEnd().left() == float("inf")
    end = ENDS[reason]()
    assert not end.await_done(Future())
    assert end.reason() is reason
    done: Future[None] = Future()
    done.set_result(None)
    assert end.await_done(done)


def test_a_second_ctrl_c_ends_the_process_but_not_while_a_result_is_told():
    told: list[str] = []

    def tell(end: RunEnd) -> None:
        with end.shielded():
            os.kill(os.getpid(), signal.SIGINT)
            told.append("whole")
        told.append("never")

    with interruptible() as end:
        os.kill(os.getpid(), signal.SIGINT)
        assert end.reason() is EndReason.INTERRUPTED
        os.kill(os.getpid(), signal.SIGTERM)  # schedulers repeat it
        with pytest.raises(KeyboardInterrupt):
            tell(end)
    assert told == ["whole"]
    assert not end.left()


class _Jobs:
    def notices(self):
        return []


def test_data_that_are_never_prepared_hear_ctrl_c_and_the_deadline():
    with pytest.raises(KeyboardInterrupt):
        await_job(Future(), _Jobs(), print, interrupted())
    with pytest.raises(HpoError, match="--timeout: its time was over before the images were prepared"):
        await_job(Future(), _Jobs(), print, ENDS[EndReason.TIMEOUT]())


def test_an_own_data_function_that_hangs_ends_with_the_timeout(tmp_path):
    spec = parse_study(
        {
            "name": "hanging",
            "data": {"name": "deadly_jobs:hang"},
            "model": {"kind": "mlp"},
            "search": {"space": {"model.hidden": {"int": [1, 9]}}},
        },
        trust=True,
    )
    with pytest.raises(HpoError, match="--timeout"):
        run_study(spec, timeout=0.5, workers=1, home=tmp_path)


@pytest.mark.parametrize("reason", ENDS)
def test_a_tracking_store_that_never_answers_does_not_hold_the_end(reason):
    hangs = threading.Event()
    queue = TrackingQueue(end=ENDS[reason]())
    queue.submit(hangs.wait)
    heard: list[str] = []
    queue.close(timeout=600, notify=heard.append)
    hangs.set()
    (text,) = heard
    assert text.startswith("tracking: 1 record still to be delivered. The run had to end.")


def test_after_ctrl_c_a_store_that_is_slow_gets_all_and_a_second_ctrl_c_or_a_deadline_ends_it(monkeypatch):
    monkeypatch.setattr(process, "_GRACE", 1.0)
    monkeypatch.setattr(process, "_PATIENCE", 1.0)

    def delivered(end: RunEnd) -> bool:
        queue = TrackingQueue(end=end)
        for _ in range(15):
            queue.submit(time.sleep, 0.1)
        done = queue.wait()
        queue.close()
        return done

    assert delivered(interrupted())
    assert not delivered(ENDS[EndReason.TIMEOUT]())
    end = interrupted()
    with pytest.raises(KeyboardInterrupt):
        end.note_signal(signal.SIGINT)
    assert not delivered(end)


class _Exports:
    """A job process whose exports never end, or end at once; how(job) is called where one waits for a job."""

    def __init__(self, *, hang: bool = False, how=None) -> None:
        self._hang, self._how, self.exported = hang, how, []

    def submit(self, job, result, data, spec, hurry):
        self.exported.append(result.number)
        future: Future[Path] = Future()
        if not self._hang:
            future.set_result(Path(result.folder))
        if self._how:
            future.exception = self._how
        return future


def _retention(exports, work, end=None):
    spec = formula_spec().model_copy(update={"keep": KeepSpec(models="all")})
    told: list[Notice] = []
    tracker, queue = RecordedTracker(), TrackingQueue()
    retention = ModelRetention(tracker, queue, exports, spec, work=work, data=CARD, emit=told.append, end=end)
    return retention, tracker, queue, [told]


def _add(retention, work):
    results = [TrialResult(number, TrialState.COMPLETE, number / 4, 1, folder=str(number)) for number in (0, 1, 2)]
    for result in results:
        (work / str(result.number)).mkdir()
        retention.add(result)
    trials = tuple(Trial(Candidate(one.number, one.number, {}, 0), one.state, one) for one in results)
    return StudyResult("formula", 1, "maximize", "valid_accuracy", trials)


def _save_all(study, work) -> list:
    """The next run of the study: what it exports and keeps."""
    retention, tracker, queue, _ = _retention(_Exports(), work)
    none: Future[dict[int, str]] = Future()
    none.set_result({})
    retention.resume(study, none)
    retention.collect(wait=True)
    queue.close()
    return sorted(tracker.calls)


@pytest.mark.parametrize("reason", ENDS)
def test_an_export_that_hangs_is_left_to_the_next_run_when_the_run_has_to_end(reason, tmp_path):
    exports = _Exports(hang=True)
    retention, tracker, queue, (told,) = _retention(exports, tmp_path, ENDS[reason]())
    study = _add(retention, tmp_path)
    retention.collect(wait=True)
    queue.close()
    assert exports.exported == [2, 1, 0], "the best first"
    assert [notice.text for notice in told] == [
        "stopping: saving the models of 3 trials; Ctrl-C again ends now",
        "the models of 3 trials not saved yet: the next hpo run of this study does it",
    ]
    assert tracker.calls == []
    assert _save_all(study, tmp_path) == [("keep", number) for number in (0, 1, 2)]


def test_a_second_ctrl_c_while_models_are_saved_loses_none(tmp_path):
    def again(timeout=None):
        raise KeyboardInterrupt

    retention, tracker, queue, _ = _retention(_Exports(hang=True, how=again), tmp_path, interrupted())
    study = _add(retention, tmp_path)
    with pytest.raises(KeyboardInterrupt):
        retention.collect(wait=True)
    queue.close()
    assert tracker.calls == []
    assert _save_all(study, tmp_path) == [("keep", number) for number in (0, 1, 2)]


class _Finishing:
    """Two workers; one has finished its trial when Ctrl-C is pressed, and nobody has read that yet."""

    slots = 2

    def __init__(self, end: threading.Event) -> None:
        self._end, self.tasks = end, {}

    def accepts(self, slot):
        return True

    def submit(self, slot, task):
        self.tasks[slot] = task

    def poll(self, timeout):
        self._end.set()
        if timeout or 0 not in self.tasks:
            return []
        scores = {"train_loss": 1.0, "valid_loss": 1.0, "valid_accuracy": 0.5}
        result = TrialResult(self.tasks.pop(0).number, TrialState.COMPLETE, 0.5, 1, scores=scores)
        return [(0, TrialEnded(result))]

    def close(self):
        self.tasks = {}


def test_a_trial_that_has_finished_when_ctrl_c_is_pressed_is_complete_and_the_user_hears_at_once(run_formula):
    end = threading.Event()
    run = run_formula(engine=_Finishing(end), interrupted=end)
    assert run.reason == "interrupted"
    assert [trial.state for trial in run.trials][:2] == [TrialState.COMPLETE, TrialState.STOPPED]
    (notice,) = [event.text for event in run.events if isinstance(event, Notice)]
    assert notice == "stopping: saving 2 trials; Ctrl-C again ends now"


@pytest.mark.slow
def test_own_models_that_hang_in_training_or_export_end_with_the_timeout_and_resume(tmp_path, monkeypatch):
    monkeypatch.setattr(process, "_GRACE", 8.0)
    mark = tmp_path / "hang"
    mark.with_suffix(".now").touch()
    spec = parse_study(
        {
            "name": "hanging",
            "data": {"name": "digits"},
            "split": {"kind": "holdout"},
            "model": {"kind": "troubled_nets:hanging", "options": {"mark": str(mark), "train": False}},
            "training": {"epochs": 1, "precision": "float32"},
            "search": {"trials": 2, "sampler": "grid", "space": {"model.options.train": {"choice": [False, True]}}},
        },
        trust=True,
    )
    events: list = []
    first = run_study(spec, timeout=30.0, workers=2, home=tmp_path, watch=events.append)
    assert {trial.state for trial in first.trials} == {TrialState.COMPLETE, TrialState.STOPPED, TrialState.WAITING}
    assert "the model of 1 trial not saved yet: the next hpo run of this study does it" in [
        event.text for event in events if isinstance(event, Notice)
    ]
    mark.with_suffix(".now").unlink()
    run_study(spec, workers=2, home=tmp_path, watch=events.append)
    (ended,) = [event for event in events if isinstance(event, StudyEnded)][1:]
    assert ended.reason is EndReason.BUDGET
    assert ended.model is not None


@pytest.mark.slow
def test_a_timeout_while_views_are_chosen_keeps_the_model_without_them(tmp_path, monkeypatch):
    # 16 views of three batches, a second each, are begun before the deadline.
    monkeypatch.setattr(process, "_GRACE", 60.0)
    spec = parse_study(
        {
            "name": "slow",
            "data": {"name": "digits"},
            "split": {"kind": "holdout"},
            "model": {"kind": "troubled_nets:slow_answers", "options": {"train": False}},
            "training": {
                "epochs": 1,
                "precision": "float32",
                "augment": {"flip_horizontal": True, "flip_vertical": True, "rotate90": True, "crop": 1},
            },
            "search": {"trials": 2, "sampler": "grid", "space": {"model.options.train": {"choice": [False, True]}}},
            "predict": {"views": "auto"},
        },
        trust=True,
    )
    events: list = []
    run_study(spec, timeout=30.0, workers=2, home=tmp_path, watch=events.append)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert "trial 0: views of its images were not chosen: the time of the run was over" in notices
    assert not [text for text in notices if "not saved yet" in text]
    assert [file.name for file in (tmp_path / "mlruns" / "artifacts").rglob("*.pt2")]
