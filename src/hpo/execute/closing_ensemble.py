"""The end of a run: what an ensemble of its study gains, and the ensemble that the study asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpo.execute.ensemble import (
    Call,
    EnsembleContext,
    KeptTrial,
    Made,
    ValidationImages,
    candidates,
    kept_trials,
    limits_of,
    make_ensemble,
    propose,
    validation_images,
)
from hpo.execute.process import RunEnd
from hpo.execute.soup import choose_soup, make_soup
from hpo.execute.tracking_queue import TrackingQueue
from hpo.execute.workdir import pictures_folder
from hpo.execute.workers.job_process import JobProcess
from hpo.records import DataCard, ModelVersion
from hpo.report.ensembles import Limits
from hpo.search.study import Study
from hpo.spec.outcome import EnsembleSpec
from hpo.tracking.tracker import Tracker

_MOST_BYTES = 100_000_000  # of probabilities, for a line that nobody asked for


@dataclass(frozen=True)
class EnsembleOfRun:
    """What the end of a run says of an ensemble in one line, and its version where one was made."""

    line: str = ""
    version: ModelVersion | None = None


def context_of_run(
    study: Study, data: DataCard, tracker: Tracker, queue: TrackingQueue, jobs: JobProcess, end: RunEnd, *, trust: bool
) -> EnsembleContext:
    """A context whose jobs run in the run's own processes. They raise TimeoutError where the run has to end."""

    def track(call: Call, *arguments: Any, **options: Any) -> Any:
        return _await(queue.submit(call, *arguments, **options), end)

    def compute(job: Call, *arguments: Any) -> Any:
        return _await(jobs.submit(job, *arguments), end)

    return EnsembleContext(data, tracker, tracker.home.work / study.title, track, compute, trust)


def _await(job: Any, end: RunEnd) -> Any:
    if not end.await_done(job):
        raise TimeoutError
    return job.result()


def close_with_ensemble(study: Study, context: EnsembleContext) -> EnsembleOfRun:
    """Estimate what an ensemble of a study gains, and make it where the study asks for one and it gains anything.

    Without `ensemble` in the study only probabilities that lie on this machine are read. Raises HpoError, TimeoutError.
    """
    spec, result, asked, tracker = study.spec, study.result(), study.spec.ensemble, context.tracker
    numbers = {trial.number for trial in candidates(result)}
    if len(numbers) < 2 or (asked is None and not tracker.home.embedded) or spec.keep.models == "none":
        return EnsembleOfRun()
    scratch = pictures_folder(context.work, study)
    files = context.track(tracker.kept_predictions, result, numbers, scratch / "predictions")
    if asked is None and sum(file.stat().st_size for _, file in files.values()) > _MOST_BYTES:
        return EnsembleOfRun()
    images = validation_images(spec, context.data)
    kept, limits = kept_trials(result, files, images), limits_of(spec, asked or EnsembleSpec())
    if asked is not None and asked.average == "weights":
        return _soup(kept, images, limits, study, context)
    measured: Sequence[float] = context.latencies(kept, scratch) if math.isfinite(limits.latency_ms) and kept else ()
    proposal = propose(kept, images, limits, spec=spec, data=context.data, latency_ms=measured)
    if proposal is None:
        return EnsembleOfRun()
    line = f"{len(proposal.members)} of {len(kept)} kept models together: {proposal.gain}"
    if asked is None:  # one model alone is no ensemble
        return EnsembleOfRun(line if len(proposal.members) > 1 else "")
    if len(proposal.members) < 2 or proposal.gain.lead.value <= 0:
        return EnsembleOfRun(f"{line}; not made")
    return _made(line, make_ensemble(proposal, study, context))


def _soup(
    kept: Sequence[KeptTrial], images: ValidationImages, limits: Limits, study: Study, context: EnsembleContext
) -> EnsembleOfRun:
    if len(kept) < 2:
        return EnsembleOfRun()
    soup = choose_soup(kept, images, limits, study, context)
    if soup.gain is None:
        return EnsembleOfRun("no two kept models have the architecture of the best one, so no weights were averaged")
    count = max(1, len(soup.result.members))
    line = f"weights of {count} of {len(kept)} kept models averaged: {soup.gain}"
    if count < 2 or soup.gain.lead.value <= 0:
        return EnsembleOfRun(f"{line}; not made")
    return _made(line, make_soup(soup, study, context))


def _made(line: str, made: Made) -> EnsembleOfRun:
    return EnsembleOfRun(f"{line}; {made.unknown}" if made.unknown else line, made.version)
