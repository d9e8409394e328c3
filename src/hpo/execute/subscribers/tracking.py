"""Write a run to the tracker: its study, its trials as they start and end, its summary and its best model."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from hpo.events import (
    EpochEnded,
    Notice,
    RunEvent,
    SearchEnded,
    StudyOpened,
    StudyProfiled,
    TrialEnded,
    TrialPaused,
    TrialsReaped,
    TrialStarted,
    WinnerChosen,
)
from hpo.execute.process import RunEnd
from hpo.execute.subscribers import Emit, Subscriber
from hpo.execute.tracking_queue import TIMEOUT, TrackingQueue
from hpo.execute.workers.job_process import Job, JobProcess, draw_study, warm_up
from hpo.records import ENSEMBLE, EndReason, ModelVersion, StudyResult, Trial
from hpo.report.summary import study_summary
from hpo.spec.study import StudySpec
from hpo.tracking.tracker import Tracker

QUICK_TIMEOUT = 5.0  # seconds, where the user waits for the end of the run


def store_timeout(reason: EndReason) -> float:
    """Seconds that the end of a run waits for a store that is unavailable."""
    return QUICK_TIMEOUT if reason.by_user else TIMEOUT


class Tracking(Subscriber):
    """Queues a call of the tracker for each event.

    drawing is the process that draws the study's figures, into the folder figures. joined: the run takes part in a
    study that another command has begun and tracks. keeps tells whether a trial's model is kept.
    """

    def __init__(
        self,
        tracker: Tracker,
        queue: TrackingQueue,
        spec: StudySpec,
        *,
        emit: Emit,
        end: RunEnd | None = None,
        drawing: JobProcess | None = None,
        figures: Path = Path("figures"),
        joined: bool = False,
        keeps: Callable[[Trial], bool] = lambda _: False,
    ) -> None:
        self._tracker = tracker
        self._queue = queue
        self._spec = spec
        self._emit = emit
        self._end = end or RunEnd()
        self._drawing = drawing
        self._warm = False
        self._drawn: Job | None = None
        self._figures = figures
        self._joined = joined
        self._keeps = keeps
        self._study: StudyResult | None = None
        self._registered: Future[ModelVersion] | None = None

    def __call__(self, event: RunEvent) -> None:
        """Queue what the event is to change in the store."""
        submit, tracker = self._queue.submit, self._tracker
        match event:
            case StudyOpened(study):
                self._study = study
                submit(tracker.open_study, study, self._spec, event.data, event.split)
                if not self._joined:
                    submit(tracker.reconcile, study, self._spec, leave=event.trials_of_others)
            case TrialStarted(candidate, worker, setup, started):
                submit(tracker.start_trial, candidate, setup, worker=worker, started=started)
            case TrialPaused(result):
                submit(tracker.pause_trial, result)
            case TrialEnded(result):
                if result.pauses:  # some of its epochs are there
                    submit(tracker.log_missing, result)
                else:
                    submit(tracker.log_epochs, result.number, result.epochs, ended=result.ended)
                submit(tracker.end_trial, result)
            case TrialsReaped(study, trials_of_others):
                submit(tracker.reconcile, study, self._spec, leave=trials_of_others)
            case EpochEnded() if self._drawing is not None and not self._warm:
                self._warm = True
                self._drawing.submit(warm_up)
            case SearchEnded(study, _, trials_of_others, True):
                if self._drawing is not None and study.best is not None:
                    self._drawn = self._drawing.submit(draw_study, study, self._figures)
                # Other runs of the study may have ended without writing everything since this one began.
                submit(tracker.reconcile, study, self._spec, leave=trials_of_others)
            case StudyProfiled() if self._study is not None:
                submit(tracker.log_profile, self._study, event)
            case WinnerChosen():
                self._close_study(event)
            case _:
                pass

    def poll(self) -> None:
        """Pass on the notices of the queue."""
        for text in self._queue.notices():
            self._notify(text)

    def _notify(self, text: str) -> None:
        self._emit(Notice(text))

    def _close_study(self, event: WinnerChosen) -> None:
        """Register the winner's model, and write the summary."""
        study, winner, reason = event.study, event.winner, event.reason
        self._study = study
        if winner is not None and event.register and self._keeps(winner):
            self._registered = self._queue.submit(self._tracker.register, study, winner.number)
        elif winner is not None and event.register and event.summarize and self._elsewhere():
            self._notify(
                f"the model of trial {winner.number}, the best, is not in MLflow yet: the machine that trained it "
                f"logs and registers it at its end, or with its next hpo run {study.name}. If it is lost, have "
                f"the best trial trained again: hpo run {study.name} --set final.seeds=1"
            )
        elif winner is not None and event.register and self._spec.keep.models != "none":
            # Says so where somebody has deleted the run, and how it comes back.
            self._queue.submit(self._tracker.require_run, study, winner.number)
        if event.summarize:
            name = study.name if self._registered else ""
            text = study_summary(study, winner=winner, model=name, remarks=list(event.remarks))
            status = "FINISHED" if reason.orderly else "KILLED"
            self._queue.submit(self._tracker.close_study, study, status=status, summary=text, figures=self._files())

    def _elsewhere(self) -> bool:
        """True where another machine may have a model that is to be kept."""
        return self._tracker.home.shared and self._spec.keep.models != "none"

    def _files(self) -> list[Path]:
        """The study's figures; where they could not be drawn that is a notice, and the study ends without them."""
        self._say_registered()
        if (drawing := self._drawn) is None:
            return []
        waits = partial(self._notify, "drawing the figures of the study")
        error: object = "the run had to end." if not self._end.await_done(drawing, slow=waits) else drawing.exception()
        if error is not None:
            self._notify(f"the study's pictures could not be drawn: {error}")
            return []
        files: list[Path] = drawing.result()
        return files

    def _say_registered(self) -> None:
        waits = partial(self._notify, "registering the best model")
        registered = self._registered
        if registered is not None and self._end.await_done(registered, slow=waits) and registered.exception() is None:
            model = registered.result()
            self._notify(f"registered {model.name} version {model.version}, the best model{self._beside(model)}")

    def _beside(self, model: ModelVersion) -> str:
        """What is to be said of an ensemble of the study beside its best trial."""
        study = self._study
        ensemble = next(iter(study.ranked(ENSEMBLE)), None) if study is not None else None
        if study is None or ensemble is None:
            return ""
        if "challenger" not in model.aliases and "champion" not in model.aliases:
            return f" of one trial; the ensemble of trial {ensemble.number} stays the model of the study"
        if model.trial < ensemble.number:
            return ""
        sign = 1.0 if study.direction == "maximize" else -1.0
        value = next((trial.value for trial in study.trials if trial.number == model.trial), None)
        better = value is not None and sign * value > sign * (ensemble.value or 0.0)
        return f", in place of the ensemble of trial {ensemble.number}{'' if better else ', whose score is better'}"

    def finish(self, reason: EndReason) -> ModelVersion | None:
        """Wait for the store and close the queue; returns the registered model, if this run has registered one."""
        self._queue.close(timeout=store_timeout(reason), notify=self._notify)
        registered = self._registered
        if registered is None or not registered.done() or registered.exception() is not None:
            return None
        return registered.result()

    def close(self) -> None:
        """Close the queue, after an error too."""
        self._queue.close(timeout=QUICK_TIMEOUT)
