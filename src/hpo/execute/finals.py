"""Final trainings after the search: the candidates, their settings, and the comparison that chooses the winner."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from hpo.data.split import rows_of, split_card
from hpo.errors import DataError
from hpo.records import ENSEMBLE, FINAL, Candidate, DataCard, StudyResult, Trial, unpack_classes
from hpo.report.statistics import Interval, paired_bootstrap
from hpo.spec.study import FinalSpec, Setup, SplitSpec, StudySpec
from hpo.storage.trial_attrs import final_key, key_of

# Offsets of the seeds of finals: larger than those of any search trial, so that no seed repeats.
_FRESH = 1_000_000_000
_TAUGHT = 500_000_000  # further: those with a teacher follow, and do not replace, those without


def finalists(spec: StudySpec, study: StudyResult) -> list[tuple[Mapping[str, Any], int]]:
    """Parameters and seed of each final training: the best of the search, each with every seed."""
    if spec.final is None:
        return []
    ranked: list[Trial] = []
    for trial in study.ranked():
        if all(trial.candidate.parameters != other.candidate.parameters for other in ranked):
            ranked.append(trial)
    first = _FRESH + _TAUGHT * (spec.final.teacher is not None)
    seeds = [spec.seed_of(first + index) for index in range(spec.final.seeds)]
    return [(trial.candidate.parameters, seed) for trial in ranked[: spec.final.finalists] for seed in seeds]


def with_final(spec: StudySpec, candidate: Candidate) -> StudySpec:
    """The spec with the settings of `final` that a final training was begun with; its own where none were recorded."""
    if candidate.final is None:
        return spec
    return spec.model_copy(update={"final": FinalSpec.model_validate(candidate.final)})


def final_setup(spec: StudySpec, study: StudyResult, parameters: Mapping[str, Any], *, data: DataCard) -> Setup:
    """The setup of a final training: the candidate's, with what `final` changes; of a recorded one see with_final."""
    final = spec.final or FinalSpec()
    teacher = {"training.teacher": final.teacher} if final.teacher else {}
    setup = spec.with_values(parameters, fixed={**final.set, **teacher})
    if final.on == "all":
        best = next(trial.result for trial in study.ranked() if trial.candidate.parameters == parameters)
        epochs = setup.training.epochs
        if best is not None and best.best_epoch and "training.epochs" not in final.set:
            epochs = best.best_epoch
        training = setup.training.model_copy(update={"epochs": epochs, "patience": None})
        split = setup.split.model_copy(update={"kind": "none"})
        return setup.model_copy(update={"training": training, "split": split})
    return setup.model_copy(update={"split": final_split(spec, data)})


def ensemble_setup(spec: StudySpec, data: DataCard) -> Setup:
    """The setup that stands for an ensemble of a study: its split is that of the members."""
    return spec.setup.model_copy(update={"split": final_split(spec, data)})


def setup_of_trial(spec: StudySpec, study: StudyResult, trial: Trial, *, data: DataCard) -> Setup:
    """The setup of a trial of any stage, by the record of its study, which may have changed since it was trained."""
    parameters = trial.candidate.parameters
    if trial.candidate.stage == ENSEMBLE:
        kept = (trial.candidate.final or {}).get("split")
        setup = ensemble_setup(spec, data)
        return setup.model_copy(update={"split": SplitSpec.model_validate(kept)}) if kept else setup
    if trial.candidate.stage == FINAL:
        return final_setup(with_final(spec, trial.candidate), study, parameters, data=data)
    return spec.with_values(parameters)


def final_split(spec: StudySpec, data: DataCard) -> SplitSpec:
    """The split of a final training. After folds: the official validation part, or else a stratified holdout."""
    if spec.final is not None and spec.final.split is not None:
        return spec.final.split
    if spec.split.kind != "kfold":
        return spec.split
    return spec.split.model_copy(update={"kind": "official" if data.valid_start is not None else "holdout"})


def check_final(spec: StudySpec, data: DataCard) -> None:
    """Refuse a final training that could not be split as it is asked for. Raises DataError, before anything trains."""
    if spec.final is not None and spec.final.on == "train":
        try:
            split_card(data, final_split(spec, data))
        except DataError as error:
            hint = error.hint.replace("--set split.", "--set final.split.")
            raise DataError(f"final: {error.message}", hint) from None


@dataclass(frozen=True)
class Race:
    """The outcome of the finals. ranking holds each finalist's trials, best mean first.

    lead is the difference in validation accuracy, first minus second, with its 95 % interval; None without a second, or
    where one of both has no recorded answers to exactly the validation images. tie: the interval holds 0.
    """

    winner: Trial
    ranking: tuple[tuple[Trial, ...], ...]
    lead: Interval | None

    @property
    def tie(self) -> bool:
        """True if chance explains the lead."""
        return self.lead is not None and self.lead.low <= 0 <= self.lead.high

    def __str__(self) -> str:
        first = self.ranking[0]
        if self.lead is None:
            others = f", the best of {len(first)} seeds" if len(first) > 1 else ""
            others += f" and {len(self.ranking)} finalists by their mean objective" if len(self.ranking) > 1 else ""
            return f"final: trial {self.winner.number}, the search's best trained again{others}, is the model."
        verdict = "a tie" if self.tie else "a win" if self.lead.value > 0 else "a better objective, yet a loss"
        return (
            f"final: {verdict} by {100 * self.lead.value:.2f} points of validation accuracy "
            f"(95 % interval {100 * self.lead.low:.2f} to {100 * self.lead.high:.2f}) between the first two of "
            f"{len(self.ranking)} finalists, {len(first)} seeds each; trial {self.winner.number} is the model."
        )


def race(spec: StudySpec, study: StudyResult, *, data: DataCard) -> Race | None:
    """Rank the finalists by their mean objective over seeds; None where no final training is complete.

    A candidate that was trained with several settings of `final` is several finalists; those that other images judge
    than the spec's take part only where there are no others. The winner is the best training of the best finalist.
    Images and seeds are paired: a finalist's correctness on an image is its mean over seeds, and images are drawn again
    10,000 times.
    """
    done = [trial for trial in study.trials if trial.candidate.stage == FINAL and trial.state == "complete"]
    if not done:
        return None
    done = [trial for trial in done if _judges(spec, trial, data) == _judges(spec, None, data)] or done
    groups: dict[tuple[str, str], list[Trial]] = {}
    for trial in done:
        groups.setdefault(finalist_key(spec, trial.candidate), []).append(trial)
    sign = 1.0 if study.direction == "maximize" else -1.0

    def worth(trials: Sequence[Trial]) -> float:
        return fmean(sign * (trial.value or 0.0) for trial in trials)

    def rank(key: tuple[str, str]) -> tuple[float, bool]:
        return worth(groups[key]), key[1] == final_key((spec.final or FinalSpec()).settings)

    ranking = tuple(
        tuple(sorted(groups[key], key=lambda trial: -worth([trial]))) for key in sorted(groups, key=rank)[::-1]
    )
    lead = _lead(spec, ranking, data=data) if len(ranking) > 1 else None
    return Race(ranking[0][0], ranking, lead)


def finalist_key(spec: StudySpec, candidate: Candidate) -> tuple[str, str]:
    """What the final trainings of one finalist have in common: parameters, and settings of `final`."""
    settings = (spec.final or FinalSpec()).settings if candidate.final is None else candidate.final
    return key_of(candidate.parameters), final_key(settings)


def _judges(spec: StudySpec, trial: Trial | None, data: DataCard) -> Any:
    """What the value of a final training, or of one as the spec has them, comes from: a split, or the search."""
    spec = with_final(spec, trial.candidate) if trial is not None else spec
    return "search" if spec.final is not None and spec.final.on == "all" else final_split(spec, data).model_dump()


def _lead(spec: StudySpec, ranking: Sequence[Sequence[Trial]], *, data: DataCard) -> Interval | None:
    """See Race."""
    if data.several_labels:  # several labels an image: means decide, without an interval
        return None
    groups = [
        [unpack_classes(trial.result.predicted if trial.result else "") for trial in each] for each in ranking[:2]
    ]
    if not all(classes for group in groups for classes in group):  # trained on all images a trial has no answers
        return None
    one, other = (_judges(spec, trials[0], data) for trials in ranking[:2])
    if one != other:
        return None
    labels = np.load(Path(data.folder) / "development_labels.npy")
    _, rows = rows_of(data, final_split(with_final(spec, ranking[0][0].candidate), data), labels)
    if any(len(classes) != len(rows) for group in groups for classes in group):  # to the images of another split
        return None
    first, second = (np.mean([np.array(classes) == labels[rows] for classes in group], axis=0) for group in groups)
    return paired_bootstrap(first, second, seed=spec.seed)
