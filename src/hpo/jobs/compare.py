"""Compare studies, trials and registered models on the same images."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpo.errors import DataError, HpoError, ModelError, StoreError
from hpo.execute.finals import final_setup, race
from hpo.home import Home
from hpo.jobs.shared.study_data import study_data
from hpo.jobs.shared.test_set_access import open_sealed
from hpo.records import FINAL, DataCard, ModelVersion, StudyResult, Trial, TrialState, unpack_classes
from hpo.report.comparison import Comparison, Predictions, compare_predictions
from hpo.report.statistics import Ints, binarise_probabilities, group_matrix
from hpo.report.text import split_text
from hpo.spec.load import parse_study
from hpo.spec.study import Setup, StudySpec

if TYPE_CHECKING:
    from hpo.data.evaluation_sets import Part
    from hpo.predict import Classifier

Groups = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Entrant:
    """A trial that takes part, as `asked` for. version is its kept model (0: not registered), None where none was."""

    asked: str
    study: StudyResult
    spec: StudySpec
    trial: Trial
    card: DataCard
    version: ModelVersion | None

    @property
    def model(self) -> str:
        """Which model it is, in words."""
        number = self.version.version if self.version is not None else 0
        words = ([f"version {number}"] if number else []) + [f"trial {self.trial.number} of {self.study.title}"]
        return ", ".join(words)

    @cached_property
    def setup(self) -> Setup:
        """What its training was given."""
        parameters = self.trial.candidate.parameters
        if self.trial.candidate.stage == FINAL:
            return final_setup(self.spec, self.study, parameters, data=self.card)
        return self.spec.with_values(parameters)

    def kept(self, why: str) -> ModelVersion:
        """Its model's version. Raises ModelError where the model was not kept, saying why it is needed."""
        if self.version is None:
            hint = "Compare a trial that has one, or keep more: --keep-models all"
            raise ModelError(f"{self.asked}: its model was not kept, and {why}.", hint)
        return self.version


def compare(
    models: Sequence[str],
    *,
    test: bool = False,
    binarise: bool = False,
    seed: int = 0,
    home: str | Path | None = None,
    trust: bool = False,
) -> Comparison:
    """Scores, differences to the first, McNemar's test and ROC curves of at least two models on the same images.

    A model is a study (the one that its run registers), STUDY#NUMBER (a trial), NAME@ALIAS, or NAME/NUMBER: the
    registered version of that number, else the trial. The images are those that all of them validate on; none of them
    trained on one. test=True: those that all have in their test part, which is opened and each opening written down.
    binarise=True: models of single classes answer for the groups (data.groups) that another one was trained on.
    seed drives the bootstrap. trust allows data functions from outside the working directory. Raises HpoError for what
    cannot be compared.
    """
    place = Home.find(home)
    if len(models) < 2:
        raise HpoError(f"{' '.join(models)}: that is one model.", "Name at least two: hpo compare A B")
    entrants = [find_entrant(place, asked, trust=trust) for asked in models]
    _check_different(entrants)
    groups = _groups(entrants) if binarise else {}
    class_names = tuple(groups) or _class_names(entrants)
    _check_shapes(entrants)
    if test:
        return _on_test(place, entrants, groups=groups, class_names=class_names, seed=seed)
    parts = [_validation(entrant) for entrant in entrants]
    rows, notes = _shared(entrants, parts, "validation")
    labels = _labels(entrants, parts, rows, class_names, groups)
    answers = [
        _validated(place, entrant, part, own, class_names=class_names, groups=groups)
        for entrant, part, own in zip(entrants, parts, rows, strict=True)
    ]
    notes.append(
        "Validation images: the models were chosen on them, so each score flatters; --test measures, and is counted."
    )
    return compare_predictions(labels, answers, class_names=class_names, part="validation", seed=seed, notes=notes)


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """comparison.md and, where a model has probabilities, roc.png, in a folder that is made. Raises HpoError."""
    written = [make_folder(folder) / "comparison.md"]
    try:
        written[0].write_text(comparison.markdown(), encoding="utf-8")
        if any(contestant.curve for contestant in comparison.contestants):
            from hpo.report.figures.classifier import compared_roc_figure

            written.append(folder / "roc.png")
            compared_roc_figure(comparison).savefig(written[1])
    except OSError as error:
        raise _unwritable(folder, error) from None
    return written


def make_folder(folder: Path) -> Path:
    """The folder, made if need be and seen to take files. Raises HpoError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError) -> HpoError:
    return HpoError(f"{folder}: cannot be written: {error.strerror}.", "Choose another: --out FOLDER")


def find_entrant(home: Home, asked: str, *, trust: bool = False) -> Entrant:
    """The trial that a name means; see compare. Raises HpoError where there is none or its data is not at hand."""
    from hpo.storage.optuna_storage import read_study
    from hpo.tracking.registry import resolve, versions

    name, mark, number = asked.partition("#")
    match = re.fullmatch(r"([^/@:#]+)/([0-9]+)", asked)
    version = None
    if match and all(version.version != int(match[2]) for version in versions(home, match[1])):
        name, mark, number = match[1], "#", match[2]
    elif "@" in asked or "/" in asked:
        version = resolve(home, asked)
        if version.origin:
            hint = "Ask for it there: --home DIR, or the environment variable MLFLOW_TRACKING_URI."
            raise ModelError(f"{asked}: it was copied from {version.origin}, where its study is.", hint)
        name, mark, number = version.generation, "#", str(version.trial)
    study = read_study(home, name)
    spec = parse_study(study.spec, trust=trust)
    card = study_data(study, spec)
    trial = find_trial(study, number, (TrialState.COMPLETE,)) if mark else _winner(spec, study, card)
    return Entrant(asked, study, spec, trial, card, version or _version(home, study, trial))


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
    """The trial whose model a run of the study registers: of the finals where there are some, else the best."""
    outcome = race(spec, study, data=card)
    winner = outcome.winner if outcome is not None else study.best
    if winner is None:
        raise StoreError(f"{study.title}: no trial is complete yet.", f"Run it on: hpo run {study.name}")
    return winner


def _version(home: Home, study: StudyResult, trial: Trial) -> ModelVersion | None:
    """The registered version of a trial, else its logged model; None where its model was not kept."""
    from hpo.tracking.registry import resolve, versions
    from hpo.tracking.store import exists
    from hpo.tracking.tracker import Tracker

    for version in versions(home, study.name):
        if (version.study, version.trial, version.origin) == (study.title, trial.number, ""):
            return version
    uri = Tracker(home).kept_models(study).get(trial.number) if exists(home) else None
    return resolve(home, uri) if uri else None


def _check_different(entrants: Sequence[Entrant]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for entrant in entrants:
        key = entrant.study.title, entrant.trial.number
        if key in seen:
            raise HpoError(f"{seen[key]} and {entrant.asked} are one model: {entrant.model}.", "Name another one.")
        seen[key] = entrant.asked


def _groups(entrants: Sequence[Entrant]) -> Groups:
    """The groups that a model was trained on. Raises HpoError where there are none, several, or others lack classes."""
    grouped = [entrant for entrant in entrants if entrant.spec.data.groups]
    if not grouped:
        names = ", ".join(entrant.asked for entrant in entrants)
        raise HpoError(f"--binarise: none of {names} has data.groups.", "Name a study that groups classes.")
    groups = grouped[0].spec.data.groups
    for entrant in entrants:
        if entrant.spec.data.groups and entrant.spec.data.groups != groups:
            hint = "Compare one of them at a time."
            raise HpoError(f"--binarise: {grouped[0].asked} and {entrant.asked} group classes differently.", hint)
        lacking = {name for members in groups.values() for name in members} - set(entrant.card.class_names)
        if not entrant.spec.data.groups and lacking:
            raise HpoError(
                f"--binarise: {entrant.asked} knows no class {', '.join(sorted(map(repr, lacking)))}, which "
                f"{grouped[0].asked} groups.",
                "Compare models of the same classes.",
            )
    return groups


def _class_names(entrants: Sequence[Entrant]) -> tuple[str, ...]:
    first = entrants[0]
    for other in entrants[1:]:
        if set(other.card.class_names) != set(first.card.class_names):
            grouped = any(bool(entrant.spec.data.groups) for entrant in entrants)
            raise HpoError(
                f"{first.asked} tells {len(first.card.class_names)} classes apart, {other.asked} "
                f"{len(other.card.class_names)} others: {', '.join(other.card.class_names[:5])}.",
                "Sum the classes of each group: --binarise" if grouped else "Compare models of the same classes.",
            )
    return first.card.class_names


def _check_shapes(entrants: Sequence[Entrant]) -> None:
    first = entrants[0]
    for other in entrants[1:]:
        if other.card.image_shape != first.card.image_shape:
            here, there = (" x ".join(map(str, entrant.card.image_shape)) for entrant in (first, other))
            raise DataError(
                f"{first.asked} sees images of {here}, {other.asked} of {there}: they are not the same images.",
                "Compare models of one image size.",
            )


def _validation(entrant: Entrant) -> Part:
    from hpo.data.evaluation_sets import validation_part

    split = entrant.setup.split
    if split.kind == "kfold":
        raise DataError(
            f"{entrant.asked}: {entrant.model} was cross-validated, so no one model answers for its images.",
            "Compare the study's final model: give the study a `final`, then hpo run it.",
        )
    if split.kind == "none":
        raise DataError(
            f"{entrant.asked}: {entrant.model} was trained on every image but the test part's.",
            "Only the test part can judge it: --test",
        )
    return validation_part(entrant.card, split)


def _shared(entrants: Sequence[Entrant], parts: Sequence[Part], name: str) -> tuple[list[np.ndarray], list[str]]:
    """Rows, in each part, of the images that all parts hold, and what to say of the others. Raises DataError."""
    from hpo.data.evaluation_sets import shared_rows

    rows = shared_rows([part.images for part in parts])
    sizes = "; ".join(
        f"{entrant.asked} has {len(part.labels):,} ({entrant.card.name}, {split_text(entrant.setup.split)})"
        for entrant, part in zip(entrants, parts, strict=True)
    )
    if not len(rows[0]):
        raise DataError(
            f"no image is in the {name} part of all: {sizes}.",
            "An image that one of them was trained on would favour it. Compare studies of one data set and split"
            + (", or on the test part: --test" if name == "validation" else "."),
        )
    if all(len(part.labels) == len(rows[0]) for part in parts):
        return rows, []
    return rows, [f"Only the {len(rows[0]):,} images that are in the {name} part of all count: {sizes}."]


def _labels(
    entrants: Sequence[Entrant],
    parts: Sequence[Part],
    rows: Sequence[np.ndarray],
    class_names: tuple[str, ...],
    groups: Groups,
) -> Ints:
    """The class of each shared image as a place in class_names. Raises DataError where the parts disagree."""
    told: list[Ints] = []
    for entrant, part, own in zip(entrants, parts, rows, strict=True):
        known = entrant.card.class_names
        if groups and not entrant.spec.data.groups:
            member = group_matrix(known, groups)
            place = np.where(member.any(axis=1), member.argmax(axis=1), -1)
        else:
            place = np.array([class_names.index(name) for name in known])
        told.append(place[part.labels[own]])
    for entrant, other in zip(entrants, told, strict=True):
        differing = int(np.sum(other != told[0]))
        if differing:
            raise DataError(
                f"{differing:,} of the {len(other):,} shared images have another class in the data of {entrant.asked} "
                f"than in that of {entrants[0].asked}.",
                "Compare models that were trained on the same labels.",
            )
    return told[0]


def _validated(
    home: Home, entrant: Entrant, part: Part, rows: np.ndarray, *, class_names: tuple[str, ...], groups: Groups
) -> Predictions:
    """What a model says of validation images; without a model, what its training remembers it to have said."""
    if entrant.version is not None:
        return _answers(
            entrant, _load(home, entrant).predict_proba(part.images[rows]), class_names=class_names, groups=groups
        )
    remembered = unpack_classes(entrant.trial.result.predicted) if entrant.trial.result is not None else []
    if groups or len(remembered) != len(part.labels):
        entrant.kept("its probabilities are needed" if groups else "its predictions were not either")
    place = np.array([class_names.index(name) for name in entrant.card.class_names])
    return Predictions(entrant.asked, f"{entrant.model}, model not kept", place[np.array(remembered)[rows]])


def _load(home: Home, entrant: Entrant) -> Classifier:
    from hpo.predict import load_model

    version = entrant.kept("its answers are needed")
    return load_model(version.model_uri, home=home)


def _answers(
    entrant: Entrant, probabilities: np.ndarray, *, class_names: tuple[str, ...], groups: Groups
) -> Predictions:
    """Probabilities of the model's own classes (n, classes) as answers about class_names."""
    known = entrant.card.class_names
    if groups and not entrant.spec.data.groups:
        summed, decided = binarise_probabilities(probabilities, known, groups)
        return Predictions(entrant.asked, f"{entrant.model}, {len(known)} classes binarised", decided, summed)
    ordered = probabilities[:, [known.index(name) for name in class_names]].astype(np.float64)
    return Predictions(entrant.asked, entrant.model, ordered.argmax(axis=1), ordered)


def _on_test(
    home: Home, entrants: Sequence[Entrant], *, groups: Groups, class_names: tuple[str, ...], seed: int
) -> Comparison:
    """The comparison on the sealed test part. All that can fail is tried before it is opened."""
    from hpo.data.evaluation_sets import Part
    from hpo.tracking.ledger import openings

    loaded = [_load(home, entrant) for entrant in entrants]
    # Also where a model was measured before: seeing how it does on each image is another look.
    seen = [
        open_sealed(home, entrant, model, purpose="compare")[0] for entrant, model in zip(entrants, loaded, strict=True)
    ]
    parts = [Part(each.images, each.labels) for each in seen]
    rows, notes = _shared(entrants, parts, "test")
    labels = _labels(entrants, parts, rows, class_names, groups)
    answers = [
        _answers(entrant, each.probabilities[own], class_names=class_names, groups=groups)
        for entrant, each, own in zip(entrants, seen, rows, strict=True)
    ]
    counted = {entrant.study.title: len(openings(home, entrant.study)) for entrant in entrants}
    return compare_predictions(
        labels, answers, class_names=class_names, part="test", seed=seed, notes=notes, openings=counted
    )
