"""Which trials keep their model."""

import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from formula_study import CARD, RecordedTracker, formula_spec
from hpo.events import Notice
from hpo.execute.process import RunEnd
from hpo.execute.progress import Progress
from hpo.execute.subscribers.model_retention import ModelRetention
from hpo.execute.tracking_queue import TrackingQueue
from hpo.execute.workers.job_process import draw_trial
from hpo.records import Candidate, StudyResult, Trial, TrialResult, TrialState
from hpo.spec.outcome import KeepSpec


class _Exports:
    """A job process whose exports are done at once, or fail."""

    def __init__(self, fails=()):
        self.fails = fails
        self.exported = []
        self.drawn = []

    def submit(self, job, result, data, _given, _hurry=None):
        future = Future()
        (self.drawn if job is draw_trial else self.exported).append(result.number)
        if result.number in self.fails:
            future.set_exception(RuntimeError("cannot export"))
        else:
            future.set_result(Path(result.folder))
        return future


def _retention(models, work, *, figures="best:10", exports=None, events=None, end=None, **search):
    spec = formula_spec(**search).model_copy(update={"keep": KeepSpec(models=models, figures=figures)})
    tracker, queue = RecordedTracker(), TrackingQueue()
    retention = ModelRetention(
        tracker,
        queue,
        exports or _Exports(),
        spec,
        work=work,
        data=CARD,
        emit=[].append if events is None else events.append,
        end=end,
    )
    return retention, tracker, queue


def _complete(number, value, folder):
    folder.mkdir()
    return TrialResult(number, TrialState.COMPLETE, value, 1, folder=str(folder))


@pytest.mark.parametrize(
    ("models", "left"),
    [("best:2", {1, 3}), ("all", {0, 1, 2, 3}), ("none", set())],
)
def test_the_policy_decides_which_models_are_left(models, left, tmp_path):
    retention, tracker, queue = _retention(models, tmp_path)
    for number, value in enumerate([0.5, 0.6, 0.1, 0.9]):
        retention.add(_complete(number, value, tmp_path / str(number)))
        retention.collect()
    retention.collect(wait=True)
    retention.draw()
    queue.close()
    kept = [number for call, number in tracker.calls if call == "keep"]
    dropped = [number for call, number in tracker.calls if call == "drop"]
    assert len(kept) == len(set(kept))
    assert set(kept) - set(dropped) == left
    assert not list(tmp_path.iterdir()), "no trial leaves files behind"


def test_of_several_objectives_the_first_decides_in_its_direction(tmp_path):
    aims = ["parameters", "valid_accuracy"]  # fewer are better
    retention, tracker, queue = _retention("best:2", tmp_path, objectives=aims)
    for number, value in enumerate([500.0, 600.0, 100.0, 900.0]):
        retention.add(_complete(number, value, tmp_path / str(number)))
    retention.collect(wait=True)
    queue.close()
    kept, dropped = ({number for call, number in tracker.calls if call == what} for what in ("keep", "drop"))
    assert kept - dropped == {0, 2}
    spec = formula_spec(objectives=aims, until=200)
    progress = Progress(spec, StudyResult("formula", 1, "minimize", "parameters", ()))
    assert [(progress.note(value), progress.reached) for value in (500.0, 600.0, 100.0)] == [
        (True, False),
        (False, False),
        (True, True),
    ]


@pytest.mark.parametrize(("figures", "left"), [("best:1", {3}), ("all", {0, 1, 2, 3}), ("none", set())])
def test_pictures_are_drawn_once_of_the_best_and_after_the_search(figures, left, tmp_path):
    exports = _Exports()
    retention, tracker, queue = _retention("all", tmp_path, figures=figures, exports=exports)
    for number, value in enumerate([0.5, 0.6, 0.1, 0.9]):
        retention.add(_complete(number, value, tmp_path / str(number)))
        retention.collect(wait=True)
    assert not exports.drawn
    retention.draw()
    queue.close()
    assert (
        sorted(exports.drawn) == sorted(number for call, number in tracker.calls if call == "figures") == sorted(left)
    )
    assert not list(tmp_path.iterdir()), "no trial leaves files behind"


def test_the_files_of_a_model_that_could_not_be_logged_stay_for_the_next_run(tmp_path):
    retention, tracker, queue = _retention("all", tmp_path)
    tracker.lost = frozenset({0})
    for number in (0, 1):
        retention.add(_complete(number, 0.5, tmp_path / str(number)))
    retention.collect(wait=True)
    retention.draw()
    queue.close()
    assert [path.name for path in tmp_path.iterdir()] == ["0"]


def test_a_pruned_trial_leaves_nothing(tmp_path):
    retention, tracker, queue = _retention("all", tmp_path)
    retention.add(TrialResult(0, TrialState.PRUNED, 0.9, 1))
    retention.collect(wait=True)
    queue.close()
    assert tracker.calls == []


def test_a_model_that_cannot_be_exported_is_told_and_the_study_goes_on(tmp_path):
    events = []
    retention, tracker, queue = _retention("all", tmp_path, exports=_Exports(fails={0}), events=events)
    retention.add(_complete(0, 0.5, tmp_path / "0"))
    retention.collect(wait=True)
    queue.close()
    assert tracker.calls == []
    assert [event.text for event in events if isinstance(event, Notice)] == [
        "trial 0: its model could not be exported: cannot export"
    ]


def test_a_resumed_study_exports_what_still_waits_and_drops_what_falls_out(tmp_path):
    retention, tracker, queue = _retention("best:1", tmp_path)
    waiting = _complete(1, 0.9, tmp_path / "1")
    results = [TrialResult(0, TrialState.COMPLETE, 0.5, 1), waiting]
    study = StudyResult(
        "formula",
        1,
        "maximize",
        "valid_accuracy",
        tuple(
            Trial(Candidate(result.number, result.number, {"model.hidden": 3}, 0), result.state, result)
            for result in results
        ),
    )
    earlier = Future()
    earlier.set_result({0: "models:/m-0"})
    retention.resume(study, earlier)
    retention.collect(wait=True)
    queue.close()
    assert tracker.calls == [("keep", 1), ("drop", 0)]


class _Drawing(_Exports):
    """Figures that are never done."""

    def submit(self, job, result, data, given, *_):
        return Future() if job is draw_trial else super().submit(job, result, data, given)


def test_a_run_that_ends_while_figures_are_drawn_tells_of_no_models(tmp_path):
    events, end = [], RunEnd(time.monotonic() - 100)
    retention, _, queue = _retention("all", tmp_path, exports=_Drawing(), events=events, end=end)
    retention.add(_complete(0, 0.5, tmp_path / "0"))
    retention.collect(wait=True)
    retention.draw()
    queue.close()
    assert not events
    assert (tmp_path / "0").is_dir(), "the next run draws them"
