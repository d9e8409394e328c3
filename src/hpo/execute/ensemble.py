"""Ensembles of trials that keep their model: candidates, choice, one exported program, its record and its version."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.split import rows_of
from hpo.execute.base_model import check_setup
from hpo.execute.finals import final_split
from hpo.execute.process import RunEnd
from hpo.execute.tracking_queue import TrackingQueue
from hpo.execute.workdir import pictures_folder
from hpo.execute.workers.job_process import JobProcess, finish_ensemble, measure_latency
from hpo.home import remove
from hpo.records import ENSEMBLE, FINAL, DataCard, ModelVersion, StudyResult, Trial, TrialResult, TrialState
from hpo.report.ensembles import Gain, Limits, Pool, estimate_gain, select
from hpo.search.constraints import highest_allowed
from hpo.search.study import Study
from hpo.spec.keep import EnsembleSpec
from hpo.spec.study import Setup, StudySpec
from hpo.tracking.models import SETUP
from hpo.tracking.tracker import Tracker

_MOST_CANDIDATES = 50
_MOST_BYTES = 100_000_000  # of probabilities, for a line that nobody asked for
_FEWEST_IMAGES = 20  # of a validation part that is divided into halves

# Runs a job of torch in its own process or here; calls a method of the tracker in its thread or here.
Call = Callable[..., Any]


@dataclass(frozen=True)
class KeptTrial:
    """A trial whose model is kept. probabilities are (n, classes) float32, of the ensemble's validation images."""

    study: StudyResult
    trial: Trial
    uri: str
    probabilities: NDArray[np.float32]

    @property
    def name(self) -> str:
        """The trial, of whichever study: digits-mlp~1#3."""
        return f"{self.study.exact}#{self.trial.number}"

    @property
    def result(self) -> TrialResult:
        """Its result."""
        return self.trial.result or TrialResult(self.trial.number, self.trial.state)


@dataclass(frozen=True)
class ValidationImages:
    """The validation part of an ensemble: rows (n,) of the development images, and their labels."""

    rows: NDArray[np.int64]
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Proposal:
    """An ensemble that can be made: its members, best first, how often each counts, and what it gains.

    probabilities are the mean of the members', (n, classes) float32, on the validation images.
    """

    members: tuple[KeptTrial, ...]
    counts: tuple[int, ...]
    gain: Gain
    images: ValidationImages
    probabilities: NDArray[np.float32]

    @property
    def named(self) -> dict[str, int]:
        """Name of each member -> how often it counts."""
        return dict(zip((member.name for member in self.members), self.counts, strict=True))


def ensemble_setup(spec: StudySpec, data: DataCard) -> Setup:
    """The setup that stands for an ensemble of a study: its split is that of the members."""
    return spec.setup.model_copy(update={"split": final_split(spec, data)})


def validation_images(spec: StudySpec, data: DataCard) -> ValidationImages:
    """The images on which members are compared: the validation part of final trainings. Raises DataError."""
    labels = np.load(Path(data.folder) / "development_labels.npy")
    _, rows = rows_of(data, final_split(spec, data), labels)
    return ValidationImages(rows, labels[rows])


def candidates(study: StudyResult) -> list[Trial]:
    """The best 50 trials of search and final training, best first."""
    sign = -1.0 if study.direction == "maximize" else 1.0
    ranked = [*study.ranked(), *study.ranked(FINAL)]
    return sorted(ranked, key=lambda trial: (sign * (trial.value or 0.0), trial.number))[:_MOST_CANDIDATES]


def kept_trials(study: StudyResult, files: Mapping[int, tuple[str, Path]], images: ValidationImages) -> list[KeptTrial]:
    """The candidates of a study that were validated on exactly these images; files are those of kept_predictions."""
    found = []
    for trial in candidates(study):
        if trial.number not in files:
            continue
        uri, file = files[trial.number]
        with np.load(file, allow_pickle=False) as left:
            if np.array_equal(left["rows"], images.rows):
                found.append(KeptTrial(study, trial, uri, left["probabilities"].astype(np.float32)))
    return found


def limits_of(spec: StudySpec, asked: EnsembleSpec) -> Limits:
    """The limits of an ensemble; where it sets none, those of the search and of promotion."""
    latency = asked.latency_ms or min(spec.promote.latency_ms or math.inf, highest_allowed(spec, "latency_ms"))
    return Limits(asked.members, asked.parameters or highest_allowed(spec, "parameters"), latency)


def propose(
    kept: Sequence[KeptTrial],
    images: ValidationImages,
    limits: Limits,
    *,
    spec: StudySpec,
    data: DataCard,
    latency_ms: Sequence[float] = (),
) -> Proposal | None:
    """The ensemble of these trials, best first; None where there are fewer than two, or too few images to judge it."""
    if len(kept) < 2 or len(images.rows) < _FEWEST_IMAGES:
        return None
    probabilities = np.stack([each.probabilities for each in kept])
    pool = Pool(probabilities, images.labels, [each.result.parameter_count for each in kept], latency_ms)
    counts = select(pool, limits)
    if not counts.any():
        return None
    objective = spec.search.judged_by
    gain = estimate_gain(pool, limits, objective=objective, class_names=data.class_names, seed=spec.seed)
    chosen = np.flatnonzero(counts).tolist()
    return Proposal(
        tuple(kept[index] for index in chosen),
        tuple(int(counts[index]) for index in chosen),
        gain,
        images,
        pool.mean(counts),
    )


def latencies(kept: Sequence[KeptTrial], tracker: Tracker, folder: Path, *, track: Call, compute: Call) -> list[float]:
    """Milliseconds for one image of each trial's logged program, here, now."""
    places = [track(tracker.model_files, each.uri, folder / f"{index}") for index, each in enumerate(kept)]
    measured: list[float] = compute(measure_latency, places)
    return measured


def make_ensemble(
    proposal: Proposal,
    study: Study,
    *,
    data: DataCard,
    tracker: Tracker,
    work: Path,
    track: Call,
    compute: Call,
    trust: bool = False,
) -> ModelVersion:
    """Make the program of an ensemble, record it as a trial of the study, log and register it; returns the version.

    One that the study has with the same members is registered again. work is the study's folder of work in progress.
    trust allows members whose network is a function from outside the working directory. If the process is killed on the
    way, the next run of the study logs what was recorded. Raises HpoError.
    """
    before = study.result()
    kept = track(tracker.kept_models, before)
    for trial in before.ranked(ENSEMBLE):
        if trial.result and dict(trial.result.members) == proposal.named and trial.number in kept:
            version: ModelVersion = track(tracker.register, before, trial.number)
            return version
    scratch = pictures_folder(work, study) / "ensemble"
    job = _job(proposal, study.spec, data, tracker, scratch, track=track)
    for _, _, place in job[1]:
        check_setup(place / SETUP, trust=trust)
    result = compute(finish_ensemble, *job)
    result = study.add(ENSEMBLE, replace(result, folder=""))
    folder = scratch.rename(work / str(result.number))
    after = study.result()
    track(tracker.reconcile, after, study.spec, leave=_others(after, result.number))
    track(tracker.keep_model, result.number, folder)
    version = track(tracker.register, after, result.number)
    remove(work, folder, ignore_errors=True)
    return version


def _others(study: StudyResult, number: int) -> Collection[int]:
    return {trial.number for trial in study.trials} - {number}


def _job(
    proposal: Proposal, spec: StudySpec, data: DataCard, tracker: Tracker, folder: Path, *, track: Call
) -> tuple[Any, ...]:
    """The arguments of finish_ensemble."""
    members = []
    for place, (each, count) in enumerate(zip(proposal.members, proposal.counts, strict=True)):
        members.append((each.name, count, track(tracker.model_files, each.uri, folder.parent / f"member-{place}")))
    results = [each.result for each in proposal.members]
    parameters = sum(each.parameter_count for each in results)
    settings = {"precision": "float32", "device": "cpu"}
    for part in (each.settings for each in results):
        # The coarsest arithmetic of a member limits how well the exported program can agree.
        settings |= {"precision": "bfloat16"} if part.get("precision") == "bfloat16" else {}
        settings |= {"device": part["device"]} if part.get("device", "cpu") != "cpu" else {}
    result = TrialResult(
        0,
        TrialState.COMPLETE,
        scores={"parameters": float(parameters)},
        parameter_count=parameters,
        settings=settings,
        folder=str(folder),
        members=proposal.named,
    )
    return (
        result,
        members,
        proposal.images.rows,
        proposal.images.labels,
        proposal.probabilities,
        ensemble_setup(spec, data),
        data,
    )


@dataclass(frozen=True)
class EnsembleOfRun:
    """What the end of a run says of an ensemble in one line, and its version where one was made."""

    line: str = ""
    version: ModelVersion | None = None


def close_with_ensemble(
    study: Study,
    *,
    data: DataCard,
    tracker: Tracker,
    queue: TrackingQueue,
    jobs: JobProcess,
    end: RunEnd,
    work: Path,
    trust: bool,
) -> EnsembleOfRun:
    """At the end of a run: estimate what an ensemble of its study gains, and make it where the study asks for one.

    It is made if it gains anything on images that did not choose it. Without `ensemble` in the study, only
    probabilities that lie on this machine are read. Raises HpoError, and TimeoutError where the run has to end.
    """

    def track(call: Call, *arguments: Any, **options: Any) -> Any:
        return _await(queue.submit(call, *arguments, **options), end)

    def compute(job: Call, *arguments: Any) -> Any:
        return _await(jobs.submit(job, *arguments), end)

    spec, result, asked = study.spec, study.result(), study.spec.ensemble
    numbers = {trial.number for trial in candidates(result)}
    embedded = tracker.home.embedded
    if len(numbers) < 2 or (asked is None and not embedded) or spec.keep.models == "none":
        return EnsembleOfRun()
    scratch = pictures_folder(work, study)
    files = track(tracker.kept_predictions, result, numbers, scratch / "predictions")
    if asked is None and sum(file.stat().st_size for _, file in files.values()) > _MOST_BYTES:
        return EnsembleOfRun()
    images = validation_images(spec, data)
    kept, limits = kept_trials(result, files, images), limits_of(spec, asked or EnsembleSpec())
    measured: Sequence[float] = ()
    if math.isfinite(limits.latency_ms) and kept:
        measured = latencies(kept, tracker, scratch, track=track, compute=compute)
    proposal = propose(kept, images, limits, spec=spec, data=data, latency_ms=measured)
    if proposal is None:
        return EnsembleOfRun()
    line = f"{len(proposal.members)} of {len(kept)} kept models together: {proposal.gain}"
    if asked is None or len(proposal.members) < 2 or proposal.gain.lead.value <= 0:
        return EnsembleOfRun(line if asked is None else f"{line}; not made")
    version = make_ensemble(
        proposal, study, data=data, tracker=tracker, work=work, track=track, compute=compute, trust=trust
    )
    return EnsembleOfRun(line, version)


def _await(job: Any, end: RunEnd) -> Any:
    if not end.await_done(job):
        raise TimeoutError
    return job.result()
