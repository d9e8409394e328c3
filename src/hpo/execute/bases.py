"""The models that a training starts from and learns from, and the test images that the studies of those have seen."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hpo.errors import DataError, HpoError, ModelError
from hpo.execute.finals import setup_of_trial
from hpo.home import Home
from hpo.records import DataCard, ModelVersion, StudyResult
from hpo.spec.load import parse_study, small_text
from hpo.spec.study import Setup, StudySpec
from hpo.storage.reader import read_study
from hpo.tracking.models import CONFIG, SETUP


@dataclass(frozen=True)
class Overlap:
    """How many images of a test part are also in something else, of which `name` tells."""

    name: str
    count: int


@dataclass(frozen=True)
class Trained:
    """The setup that a network was trained with, as plain data; name is its trial where it is part of another model."""

    name: str
    setup: Mapping[str, Any]

    @property
    def bases(self) -> list[str]:
        """The models that the training starts from and learns from."""
        model, training = (self.setup.get(part) or {} for part in ("model", "training"))
        found = model.get("from_model") if model.get("kind") == "transfer" else None
        return [str(uri) for uri in (found, training.get("teacher")) if uri]


def trained_in(folder: Path) -> list[Trained]:
    """The trainings of a model's files, as they were: of each member of an ensemble or a soup, else its own.

    The record of the study may have changed since. Empty where there is no setup.json. Raises ModelError where a file
    is damaged.
    """
    if not (folder / SETUP).is_file():
        return []
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        members = [*config.get("members", ()), *config.get("averaged", ())]
        found = [Trained(str(each["trial"]), dict(each["setup"])) for each in members]
        file = folder / SETUP
        return found or [Trained("", dict(json.loads(small_text(file))))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: damaged: {error}.", "Restore it from a copy.") from None


def trained_of(home: Home, version: ModelVersion | None, otherwise: Callable[[], Setup]) -> list[Trained]:
    """The trainings of a logged model, from its files; of otherwise(), the study's record, where no model is kept.

    Raises HpoError.
    """
    from hpo.tracking.registry import fetch

    found: list[Trained] = []
    if version is not None:
        with tempfile.TemporaryDirectory() as scratch:
            files = None
            with contextlib.suppress(ModelError):  # they are gone
                files = fetch(home, version, Path(scratch))
            found = trained_in(files / "artifacts") if files is not None else []
    return found or [Trained("", otherwise().model_dump(mode="json"))]


def overlaps(home: Home, trained: Sequence[Trained], card: DataCard) -> tuple[list[Overlap], str]:
    """Of each model that these trainings build on, directly or not, how many test images of card its study has seen.

    Bases that have seen none are left out. The text tells which base could not be compared, and why; "" where all were.
    Raises HpoError.
    """
    from hpo.data.overview import count_test_images, development_digests

    waiting = [uri for each in trained for uri in each.bases]
    seen: dict[str, frozenset[bytes]] = {}
    unknown: list[str] = []
    known: set[str] = set()
    while waiting:
        uri = waiting.pop()
        if uri in known:
            continue
        known.add(uri)
        try:
            for name, other, before in _base_trainings(home, uri):
                waiting += before.bases
                seen[name] = development_digests(other) if other.image_shape == card.image_shape else frozenset()
        except HpoError as error:
            unknown.append(f"the training of its base {uri} is not at hand: {error.message}")
    counts = count_test_images(card, seen) if seen else {}
    return [Overlap(name, count) for name, count in counts.items() if count], "; ".join(unknown)


def check_bases(home: Home, trained: Sequence[Trained], card: DataCard) -> str:
    """Refuse members of an ensemble that build on a model which has seen test images of card. Raises DataError.

    The text names members whose base could not be compared, and why; "" where all were.
    """
    unknown: list[str] = []
    compared: dict[tuple[str, ...], tuple[list[Overlap], str]] = {}  # members mostly have one base
    for each in trained:
        bases = tuple(each.bases)
        if bases not in compared:
            compared[bases] = overlaps(home, [each], card)
        found, missing = compared[bases]
        if found:
            shown = "; ".join(f"{overlap.count:,} in {overlap.name}" for overlap in found)
            raise DataError(
                f"{each.name}: its base has seen {shown} of the {card.test_count:,} test images.",
                "Make the ensemble of a study without that base.",
            )
        unknown += [f"{each.name} was not compared with its base: {missing}"] if missing else []
    return "; ".join(unknown)


def _base_trainings(home: Home, uri: str) -> Iterator[tuple[str, DataCard, Trained]]:
    """Name, data and training of a logged model; of an ensemble those of each member, which may be of other studies."""
    from hpo.tracking.registry import resolve

    version = resolve(home, uri)
    study = read_study(home, version.generation)
    spec = parse_study(study.spec, trust=True)  # nothing of it is imported
    trial = next((trial for trial in study.trials if trial.number == version.trial), None)
    if trial is None:
        raise ModelError(f"{study.title} has no trial {version.trial}.", "Import the study that the base is of.")
    card = _data_of(study, spec)
    for each in trained_of(home, version, partial(setup_of_trial, spec, study, trial, data=card)):
        title = each.name.partition("#")[0]
        if title in ("", study.exact):
            yield f"trial {trial.number} of {study.title}", card, each
        else:
            other = read_study(home, title)
            yield f"{title}, of whose trials it is made", _data_of(other, parse_study(other.spec, trust=True)), each


def _data_of(study: StudyResult, spec: StudySpec) -> DataCard:
    from hpo.data.prepare import prepared

    return prepared(study.data_digest) or study_data(study, spec)


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
