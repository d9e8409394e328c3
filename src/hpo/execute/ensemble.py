"""Ensembles of trials that keep their model: candidates, choice, one exported program, its record and its version."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.data.split import rows_of
from hpo.errors import HpoError
from hpo.execute.base_model import check_setup
from hpo.execute.bases import Trained, check_bases, trained_in
from hpo.execute.finals import ensemble_setup, final_split
from hpo.execute.workdir import pictures_folder
from hpo.execute.workers.ensemble_jobs import finish_ensemble, measure_latency
from hpo.home import remove
from hpo.locks import ensemble_lock, lock
from hpo.records import ENSEMBLE, FINAL, DataCard, ModelVersion, StudyResult, Trial, TrialResult, TrialState
from hpo.report.ensembles import Gain, Limits, Pool, estimate_gain, select
from hpo.search.constraints import highest_allowed, parse_constraint, violations
from hpo.spec.outcome import EnsembleSpec
from hpo.spec.study import StudySpec
from hpo.tracking.models import NET, SETUP
from hpo.tracking.tracker import Tracker

if TYPE_CHECKING:
    from hpo.search.study import Study

_MOST_CANDIDATES = 50
_FEWEST_IMAGES = 20  # of a validation part that is divided into halves

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

    probabilities are the mean of the members', (n, classes) float32, on the validation images. latency_ms is the most
    that its program may take for an image.
    """

    members: tuple[KeptTrial, ...]
    counts: tuple[int, ...]
    gain: Gain
    images: ValidationImages
    probabilities: NDArray[np.float32]
    latency_ms: float = math.inf

    @property
    def named(self) -> dict[str, int]:
        """Name of each member -> how often it counts."""
        return dict(zip((member.name for member in self.members), self.counts, strict=True))


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
                # Of the network alone: an ensemble has views and a temperature of its own.
                own = left["raw" if "raw" in left else "probabilities"]
                found.append(KeptTrial(study, trial, uri, own.astype(np.float32)))
    return found


def limits_of(spec: StudySpec, asked: EnsembleSpec) -> Limits:
    """The limits of an ensemble: the tightest of its own, of the search's constraints and of promotion."""
    latency = min(
        asked.latency_ms or math.inf, spec.promote.latency_ms or math.inf, highest_allowed(spec, "latency_ms")
    )
    return Limits(asked.members, min(asked.parameters or math.inf, highest_allowed(spec, "parameters")), latency)


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
        limits.latency_ms,
    )


@dataclass(frozen=True)
class EnsembleContext:
    """What an ensemble is made with: data, MLflow, the study's folder of work in progress.

    compute runs a job that needs torch, in a process of its own or here; track calls a method of the tracker, in its
    thread or here. trust allows members whose network is a function from outside the working directory.
    """

    data: DataCard
    tracker: Tracker
    work: Path
    track: Call
    compute: Call
    trust: bool = False

    def model_folders(self, kept: Sequence[KeptTrial], folder: Path) -> list[Path]:
        """The folders of the trials' models, in which load_trained finds them; copies of a server's are in folder."""
        model_folders = [
            self.track(self.tracker.model_files, each.uri, folder / f"member-{index}")
            for index, each in enumerate(kept)
        ]
        for place in model_folders:
            check_setup(place / SETUP, trust=self.trust)
        return model_folders

    def latencies(self, kept: Sequence[KeptTrial], folder: Path) -> list[float]:
        """Milliseconds for one image of each trial's logged program, here, now."""
        measured: list[float] = self.compute(measure_latency, self.model_folders(kept, folder))
        return measured

    def check_bases(self, trained: Sequence[Trained]) -> str:
        """Members that could not be compared with their base; see hpo.execute.bases. Raises DataError."""
        unknown: str = self.track(check_bases, self.tracker.home, trained, self.data)
        return unknown


@dataclass(frozen=True)
class Made:
    """The version of an ensemble or soup. unknown names members that were not compared with their base, and why."""

    version: ModelVersion
    unknown: str = ""


def make_ensemble(proposal: Proposal, study: Study, context: EnsembleContext) -> Made:
    """Make the program of an ensemble, record it as a trial of the study, log and register it.

    One that the study has with the same members is registered again. If the process is killed once it is recorded, the
    next run of the study logs its model, and the next hpo ensemble registers it. Raises HpoError, also where a member
    builds on a model that has seen test images.
    """
    with lock(context.tracker.home, ensemble_lock(study.title)):
        if (known := _known(study, proposal.named, "probabilities", context, proposal.gain.judged)) is not None:
            return Made(known)
    scratch = pictures_folder(context.work, study) / "ensemble"
    parameters = sum(each.result.parameter_count for each in proposal.members)
    result = empty_result(proposal.members, scratch, parameters=parameters, average="probabilities")
    folders = context.model_folders(proposal.members, scratch.parent)
    trained = [
        replace(each, name=member.name)
        for member, folder in zip(proposal.members, folders, strict=True)
        for each in trained_in(folder)
    ]
    unknown = context.check_bases(trained)
    left = context.compute(
        finish_ensemble,
        replace(result, members=proposal.named, judged=proposal.gain.judged),
        list(zip((each.name for each in proposal.members), proposal.counts, folders, strict=True)),
        proposal.images.rows,
        proposal.images.labels,
        proposal.probabilities,
        ensemble_setup(study.spec, context.data),
        context.data,
        study.spec.predict,
        proposal.latency_ms,
    )
    return Made(record(left, study, context), unknown)


def empty_result(members: Sequence[KeptTrial], folder: Path, *, parameters: int, average: str) -> TrialResult:
    """The result of an ensemble before it is made in folder: its size, and the arithmetic of its members."""
    settings = {"precision": "float32", "device": "cpu", "average": average}
    for part in (each.result.settings for each in members):
        # The coarsest arithmetic of a member limits how well the exported program can agree.
        settings |= {"precision": "bfloat16"} if part.get("precision") == "bfloat16" else {}
        settings |= {"device": part["device"]} if part.get("device", "cpu") != "cpu" else {}
    return TrialResult(
        0,
        TrialState.COMPLETE,
        scores={"parameters": float(parameters)},
        parameter_count=parameters,
        settings=settings,
        folder=str(folder),
    )


def record(result: TrialResult, study: Study, context: EnsembleContext) -> ModelVersion:
    """Record a finished ensemble, whose files are in result.folder, as a trial; log and register its model.

    One supervisor at a time: of two that have made the same ensemble, the second finds that of the first. Raises
    HpoError where it breaks a limit of the study.
    """
    # Its latency, which was within the limit when members were chosen, is measured again, here and by the gates.
    over = [text for text, amount in violations(study.spec, result.scores).items() if amount > 0]
    if broken := [text for text in over if parse_constraint(text).name != "latency_ms"]:
        words = ", ".join(
            f"{text} (it has {result.scores.get(parse_constraint(text).name, math.nan):.4g})" for text in broken
        )
        raise HpoError(
            f"{study.title}: an ensemble of {len(result.members)} is beyond a limit of the study: {words}.",
            f"Take fewer members, or relax the constraint: hpo ensemble {study.title} --members 2",
        )
    with lock(context.tracker.home, ensemble_lock(study.title)):
        if (known := _known(study, result.members, result.settings["average"], context, result.judged)) is not None:
            return known
        lost = next(iter(_same(study.result(), result.members, result.settings["average"], result.judged)), None)
        # The record names a folder: until the model is logged, the files are there, for the next run if need be.
        split = {"split": final_split(study.spec, context.data).model_dump(mode="json")}
        number = lost.number if lost else study.add(ENSEMBLE, replace(result, folder="ensemble"), final=split).number
        remove(context.work, context.work / str(number), ignore_errors=True)
        Path(result.folder).rename(context.work / str(number))
        return _log(number, study, context)


def _log(number: int, study: Study, context: EnsembleContext) -> ModelVersion:
    """Log the model of a recorded ensemble, whose files are in the folder of its number, and register it."""
    after, tracker, track = study.result(), context.tracker, context.track
    track(tracker.reconcile, after, study.spec, leave={trial.number for trial in after.trials} - {number})
    track(tracker.keep_model, number, context.work / str(number))
    version: ModelVersion = track(tracker.register, after, number)
    remove(context.work, context.work / str(number), ignore_errors=True)
    return version


def _same(study: StudyResult, members: Mapping[str, int], average: str, judged: tuple[str, ...]) -> list[Trial]:
    """The ensembles of a study with these members, but for those without the judgement that the gates ask for."""
    wanted = dict(members), average, bool(judged)
    return [
        trial
        for trial in study.trials
        if trial.candidate.stage == ENSEMBLE
        if (made := trial.result) is not None
        and (dict(made.members), made.settings.get("average"), bool(made.judged)) == wanted
    ]


def _known(
    study: Study, members: Mapping[str, int], average: str, context: EnsembleContext, judged: tuple[str, ...]
) -> ModelVersion | None:
    """The version of an ensemble of these members that the study has already, registered again as challenger.

    The model of one whose process was killed before that is logged first, if its files are here.
    """
    result = study.result()
    kept = context.track(context.tracker.kept_models, result)
    others = study.trials_of_others()
    for trial in _same(result, members, average, judged):
        if trial.number in kept:
            version: ModelVersion = context.track(context.tracker.register, result, trial.number)
            if trial.number not in others:  # of a process that was killed before this
                remove(context.work, context.work / str(trial.number), ignore_errors=True)
            return version
        if trial.number not in others and (context.work / str(trial.number) / NET).is_file():
            return _log(trial.number, study, context)
    return None
