"""References to trained models: a study, a trial or a registered version, by the names of commands."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from hpo.errors import DataError, ModelError, StoreError
from hpo.execute.ensemble import ensemble_setup
from hpo.execute.finals import final_setup, race, with_final
from hpo.home import Home
from hpo.records import ENSEMBLE, FINAL, DataCard, ModelVersion, StudyResult, Trial, TrialState, unpack_classes
from hpo.report.statistics import Ints
from hpo.spec.load import parse_study
from hpo.spec.study import Setup, StudySpec
from hpo.storage.reader import read_study


@dataclass(frozen=True)
class ModelReference:
    """A trained model, by the name that a user gave.

    version is its kept model (number 0: logged and not registered), None if the model was not kept.
    """

    name: str
    study: StudyResult
    spec: StudySpec
    trial: Trial
    card: DataCard
    version: ModelVersion | None

    @property
    def description(self) -> str:
        """Version, trial and study, for messages."""
        number = self.version.version if self.version is not None else 0
        words = ([f"version {number}"] if number else []) + [f"trial {self.trial.number} of {self.study.title}"]
        return ", ".join(words)

    @cached_property
    def setup(self) -> Setup:
        """The settings of its training."""
        candidate = self.trial.candidate
        if candidate.stage == ENSEMBLE:
            return ensemble_setup(self.spec, self.card)
        if candidate.stage == FINAL:
            spec = with_final(self.spec, candidate)
            return final_setup(spec, self.study, candidate.parameters, data=self.card)
        return self.spec.with_values(candidate.parameters)

    @property
    def judged(self) -> list[Ints]:
        """Of an ensemble, the classes (n,) of its validation images, each by members that other images chose.

        One array for each division of the images into halves; none of a training, or where none was recorded.
        """
        texts = self.trial.result.judged if self.trial.result is not None else ()
        return [np.array(unpack_classes(text)) for text in texts]

    def kept(self, why: str) -> ModelVersion:
        """Its model's version. Raises ModelError if the model was not kept; why states what needs it."""
        if self.version is None:
            hint = "Compare a trial that has one, or keep more: --keep-models all"
            raise ModelError(f"{self.name}: its model was not kept, and {why}.", hint)
        return self.version


def find_model(home: Home, asked: str, *, trust: bool = False) -> ModelReference:
    """The model of STUDY, STUDY#NUMBER, NAME@ALIAS or NAME/NUMBER; see compare.

    Raises HpoError if there is none or its data is unavailable.
    """
    from hpo.tracking.registry import resolve

    name, mark, number = asked.partition("#")
    version = None
    if "@" in asked or "/" in asked:
        version = resolve(home, asked)
        if version.origin:
            hint = "Use it there: --home DIR, or the environment variable MLFLOW_TRACKING_URI."
            raise ModelError(f"{asked}: it was copied from {version.origin}, which has its study.", hint)
        name, mark, number = version.generation, "#", str(version.trial)
    study = read_study(home, name)
    spec = parse_study(study.spec, trust=trust)
    card = study_data(study, spec)
    trial = find_trial(study, number, (TrialState.COMPLETE,)) if mark else _winner(spec, study, card)
    return ModelReference(asked, study, spec, trial, card, version or _version(home, study, trial))


def find_trial(study: StudyResult, number: str, states: Collection[TrialState]) -> Trial:
    """The trial of that number, in one of these states. Raises StoreError."""
    found = [trial for trial in study.trials if str(trial.number) == number]
    if not found:
        count = f"its trials are 0 to {study.trials[-1].number}" if study.trials else "it has none"
        raise StoreError(f"{study.title}: there is no trial {number!r}: {count}.", f"See: hpo trials {study.title}")
    if found[0].state not in states:
        raise StoreError(
            f"{study.title}: trial {number} is {found[0].state}, not {' or '.join(states)}.",
            f"See: hpo trials {study.title}",
        )
    return found[0]


def _winner(spec: StudySpec, study: StudyResult, card: DataCard) -> Trial:
    """The trial whose model a run of the study registers: the best of its finals if there are any, else the best."""
    outcome = race(spec, study, data=card)
    winner = outcome.winner if outcome is not None else study.best
    if winner is None:
        raise StoreError(f"{study.title}: no trial is complete yet.", f"Resume it: hpo run {study.name}")
    return winner


def _version(home: Home, study: StudyResult, trial: Trial) -> ModelVersion | None:
    """The registered version of a trial, else its logged model; None if its model was not kept."""
    from hpo.tracking.registry import resolve, versions
    from hpo.tracking.store import exists
    from hpo.tracking.tracker import Tracker

    for version in versions(home, study.name):
        if (version.study, version.trial, version.origin) == (study.title, trial.number, ""):
            return version
    uri = Tracker(home).kept_models(study).get(trial.number) if exists(home) else None
    return resolve(home, uri) if uri else None


def study_data(study: StudyResult, spec: StudySpec) -> DataCard:
    """The prepared data of a study. Raises DataError where it is gone or is not what the study was made with."""
    from hpo.data.prepare import prepare

    card = prepare(spec.data, spec.split)
    if card.digest != study.data_digest:
        raise DataError(
            f"{card.source}: its digest {card.digest} is not {study.data_digest}, which {study.title} was made with.",
            "Bring back the file that the study was run on.",
        )
    return card
