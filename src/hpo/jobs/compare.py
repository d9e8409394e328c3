"""Compare studies, trials and registered models on the same images."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from hpo.errors import DataError, HpoError
from hpo.home import Home
from hpo.jobs.shared.image_history import image_history
from hpo.jobs.shared.model_reference import ModelReference, find_model
from hpo.jobs.shared.test_set_access import count_test_images, open_sealed
from hpo.records import unpack_classes
from hpo.report.comparison import Comparison, Predictions, compare_predictions
from hpo.report.statistics import Floats, Ints, binarise_probabilities, group_matrix
from hpo.report.text import listed, split_text

if TYPE_CHECKING:
    from hpo.data.overview import Part
    from hpo.predict import Classifier

_CHOSEN_ON = "The models were chosen on these validation images, so each score is slightly too high. See --test."


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

    A model is a study (its winner), STUDY#NUMBER (a trial), NAME@ALIAS, or NAME/NUMBER: the registered version of that
    number, else the trial. The images are those that all of them validate on, so that none was trained on one.
    test=True: those in the test part of all, which is opened and each opening recorded. binarise=True: models of single
    classes are mapped to the groups (data.groups) of another one. seed drives the bootstrap. trust allows data
    functions from outside the working directory. Raises HpoError if the models cannot be compared.
    """
    place = Home.find(home)
    if len(models) < 2:
        raise HpoError(f"{' '.join(models)}: that is one model.", "Name at least two: hpo compare A B")
    references = [find_model(place, name, trust=trust) for name in models]
    for reference in references:
        if reference.card.several_labels:
            raise HpoError(
                f"{reference.name}: its images have several labels, and models are compared by one class an image.",
                "Measure each on the test part: hpo evaluate MODEL",
            )
    _check_different(references)
    classes = _grouped_classes(references) if binarise else _common_classes(references)
    _check_shapes(references)
    compared = _on_test if test else _on_validation
    return compared(place, references, classes, seed)


def write_comparison(comparison: Comparison, folder: Path) -> list[Path]:
    """Write comparison.md and, if a model has probabilities, roc.png to a folder, which is created. Raises HpoError."""
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
    """The folder, created if needed and tested to be writable. Raises HpoError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise _unwritable(folder, error) from None
    return folder


def _unwritable(folder: Path, error: OSError) -> HpoError:
    return HpoError(f"{folder}: cannot be written: {error.strerror}.", "Choose another: --out FOLDER")


@dataclass(frozen=True)
class _Classes:
    """The classes of a comparison, to which each model's own are mapped.

    groups are those of --binarise: name -> class names; empty without.
    """

    names: tuple[str, ...]
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)

    def grouped(self, model: ModelReference) -> bool:
        """True for a model of single classes that are summed to groups."""
        return bool(self.groups) and not model.spec.data.groups

    def index(self, model: ModelReference) -> Ints:
        """(classes of the model,) index in names of each; -1 for a class in no group."""
        own = model.card.class_names
        if self.grouped(model):
            member = group_matrix(own, self.groups)
            return np.where(member.any(axis=1), member.argmax(axis=1), -1)
        return np.array([self.names.index(name) for name in own])

    def predictions(self, model: ModelReference, probabilities: Floats) -> Predictions:
        """Probabilities of the model's own classes (n, classes) as predictions of these classes."""
        own = model.card.class_names
        if self.grouped(model):
            summed, decided = binarise_probabilities(probabilities, own, self.groups)
            return Predictions(model.name, f"{model.description}, {len(own)} classes binarised", decided, summed)
        ordered = probabilities[:, [own.index(name) for name in self.names]].astype(np.float64)
        return Predictions(model.name, model.description, ordered.argmax(axis=1), ordered)

    def remembered(self, model: ModelReference, part: Part, rows: Ints) -> Predictions:
        """The validation predictions that were recorded: of a model that was not kept, and of an ensemble."""
        if model.judged and not self.groups:  # on these images its members were chosen
            judged = self.index(model)[model.judged[0][rows]]
            return Predictions(model.name, f"{model.description}, members chosen on other images", judged)
        recorded = unpack_classes(model.trial.result.predicted) if model.trial.result is not None else []
        if self.groups or len(recorded) != len(part.labels):
            model.kept("its probabilities are needed" if self.groups else "its predictions were not either")
        classes = self.index(model)[np.array(recorded)[rows]]
        return Predictions(model.name, f"{model.description}, model not kept", classes)


def _on_validation(home: Home, models: Sequence[ModelReference], classes: _Classes, seed: int) -> Comparison:
    parts = [_validation(model) for model in models]
    rows, notes = _shared(models, parts, "validation")
    labels = _labels(models, parts, rows, classes)
    predictions = [
        classes.remembered(model, part, own)
        if model.version is None or (model.judged and not classes.groups)
        else classes.predictions(model, _load(home, model).predict_levels(part.images[own]))
        for model, part, own in zip(models, parts, rows, strict=True)
    ]
    notes.append(_CHOSEN_ON)
    return compare_predictions(
        labels, predictions, class_names=classes.names, part="validation", seed=seed, notes=notes
    )


def _on_test(home: Home, models: Sequence[ModelReference], classes: _Classes, seed: int) -> Comparison:
    """The comparison on the sealed test part. Everything that can fail is done before it is opened."""
    from hpo.data.overview import Part
    from hpo.tracking.ledger import openings

    sizes, common = count_test_images(models)
    _check_shared(common, models, sizes, "test")
    loaded = [_load(home, model) for model in models]
    # Also for a model that was measured before: its result on each image is new information.
    measured = [
        open_sealed(home, model, program, purpose="compare")[0] for model, program in zip(models, loaded, strict=True)
    ]
    parts = [Part(each.images, each.labels) for each in measured]
    rows, notes = _shared(models, parts, "test")
    labels = _labels(models, parts, rows, classes)
    predictions = [
        classes.predictions(model, each.probabilities[own])
        for model, each, own in zip(models, measured, rows, strict=True)
    ]
    histories = {model.study.title: image_history(home, model).sentences for model in models}
    notes += dict.fromkeys(sentence for sentences in histories.values() for sentence in sentences)
    counted = {model.study.title: len(openings(home, model.study)) for model in models}
    return compare_predictions(
        labels, predictions, class_names=classes.names, part="test", seed=seed, notes=notes, openings=counted
    )


def _check_different(models: Sequence[ModelReference]) -> None:
    seen: dict[tuple[str, int], str] = {}
    for model in models:
        key = model.study.title, model.trial.number
        if key in seen:
            raise HpoError(f"{seen[key]} and {model.name} are one model: {model.description}.", "Name another one.")
        seen[key] = model.name


def _grouped_classes(models: Sequence[ModelReference]) -> _Classes:
    """The groups that a model was trained on. Raises HpoError if there are none, several, or others lack classes."""
    grouped = [model for model in models if model.spec.data.groups]
    if not grouped:
        names = listed(model.name for model in models)
        raise HpoError(f"--binarise: none of {names} has data.groups.", "Name a study that groups classes.")
    groups = grouped[0].spec.data.groups
    for model in models:
        if model.spec.data.groups and model.spec.data.groups != groups:
            hint = "Compare one of them at a time."
            raise HpoError(f"--binarise: {grouped[0].name} and {model.name} group classes differently.", hint)
        lacking = {name for members in groups.values() for name in members} - set(model.card.class_names)
        if not model.spec.data.groups and lacking:
            raise HpoError(
                f"--binarise: {model.name} has no class {listed(sorted(map(repr, lacking)))}, which "
                f"{grouped[0].name} groups.",
                "Compare models of the same classes.",
            )
    return _Classes(tuple(groups), groups)


def _common_classes(models: Sequence[ModelReference]) -> _Classes:
    """The classes of all models. Raises HpoError if they differ."""
    first = models[0]
    for other in models[1:]:
        if set(other.card.class_names) != set(first.card.class_names):
            grouped = any(bool(model.spec.data.groups) for model in models)
            raise HpoError(
                f"{first.name} has {len(first.card.class_names)} classes, {other.name} "
                f"{len(other.card.class_names)} others: {listed(other.card.class_names[:5])}.",
                "Sum the classes of each group: --binarise" if grouped else "Compare models of the same classes.",
            )
    return _Classes(first.card.class_names)


def _check_shapes(models: Sequence[ModelReference]) -> None:
    first = models[0]
    for other in models[1:]:
        if other.card.image_shape != first.card.image_shape:
            here, there = (" x ".join(map(str, model.card.image_shape)) for model in (first, other))
            raise DataError(
                f"{first.name} sees images of {here}, {other.name} of {there}: they are not the same images.",
                "Compare models of one image size.",
            )


def _validation(model: ModelReference) -> Part:
    from hpo.data.overview import validation_part

    split = model.setup.split
    if split.kind == "kfold":
        raise DataError(
            f"{model.name}: {model.description} was cross-validated, so no one model answers for its images.",
            "Compare the study's final model: give the study a `final`, then hpo run it.",
        )
    if split.kind == "none":
        raise DataError(
            f"{model.name}: {model.description} was trained on every image but the test part's.",
            "Only the test part can judge it: --test",
        )
    return validation_part(model.card, split)


def _shared(models: Sequence[ModelReference], parts: Sequence[Part], name: str) -> tuple[list[np.ndarray], list[str]]:
    """Rows, in each part, of the images that all parts hold, and what to say of the others. Raises DataError."""
    from hpo.data.overview import shared_rows

    rows = shared_rows([part.images for part in parts])
    sizes = _check_shared(len(rows[0]), models, [len(part.labels) for part in parts], name)
    if all(len(part.labels) == len(rows[0]) for part in parts):
        return rows, []
    return rows, [f"Only the {len(rows[0]):,} images that are in the {name} part of all count: {sizes}."]


def _check_shared(count: int, models: Sequence[ModelReference], sizes: Sequence[int], name: str) -> str:
    """The sizes of the models' parts in words. Raises DataError where they have no image in common."""
    told = "; ".join(
        f"{model.name} has {size:,} ({model.card.name}, {split_text(model.setup.split)})"
        for model, size in zip(models, sizes, strict=True)
    )
    if not count:
        raise DataError(
            f"no image is in the {name} part of all: {told}.",
            "An image that one of them was trained on would favour it. Compare studies of one data set and split"
            + (", or on the test part: --test" if name == "validation" else "."),
        )
    return told


def _labels(
    models: Sequence[ModelReference], parts: Sequence[Part], rows: Sequence[np.ndarray], classes: _Classes
) -> Ints:
    """The class of each shared image, as an index of classes.names. Raises DataError if the parts disagree."""
    labels: list[Ints] = [
        classes.index(model)[part.labels[own]] for model, part, own in zip(models, parts, rows, strict=True)
    ]
    for model, other in zip(models, labels, strict=True):
        differing = int(np.sum(other != labels[0]))
        if differing:
            raise DataError(
                f"{differing:,} of the {len(other):,} shared images have another class in the data of {model.name} "
                f"than in that of {models[0].name}.",
                "Compare models that were trained on the same labels.",
            )
    return labels[0]


def _load(home: Home, model: ModelReference) -> Classifier:
    from hpo.predict import load_model

    version = model.kept("its predictions are needed")
    return load_model(version.model_uri, home=home)
