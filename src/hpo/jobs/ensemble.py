"""Make an ensemble of trials of a finished study, or of several studies on the same images."""

from __future__ import annotations

import contextlib
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hpo.errors import DataError, HpoError, SpecError
from hpo.execute.bases import study_data
from hpo.execute.ensemble import (
    EnsembleContext,
    KeptTrial,
    Proposal,
    ValidationImages,
    candidates,
    kept_trials,
    limits_of,
    make_ensemble,
    propose,
    validation_images,
)
from hpo.execute.soup import choose_soup, make_soup
from hpo.execute.workdir import pictures_folder, sweep
from hpo.home import Home, remove
from hpo.jobs.shared.image_history import count_seen
from hpo.records import DataCard, ModelVersion, StudyResult
from hpo.relocation import relocate
from hpo.report.ensembles import Gain, Limits
from hpo.search.lifecycle import opened
from hpo.search.study import Study
from hpo.spec.load import parse_study
from hpo.spec.outcome import EnsembleSpec
from hpo.spec.study import StudySpec
from hpo.storage.reader import read_study
from hpo.tracking.tracker import Tracker


@dataclass(frozen=True)
class EnsembleMade:
    """An ensemble of a study (its title): its members with how often each counts, best first, and what it gains.

    candidates is the number of trials that it was chosen from; parameters is the sum over members. version is None
    where it was not made: dry, or a single trial is better than any ensemble. unknown names members that were not
    compared with the model that they build on, and why.
    """

    study: str
    members: Mapping[str, int]
    candidates: int
    parameters: int
    gain: Gain
    version: ModelVersion | None
    unknown: str = ""


def ensemble(
    study: str,
    others: Sequence[str] = (),
    *,
    members: int | None = None,
    parameters: int | None = None,
    latency_ms: float | None = None,
    soup: bool = False,
    dry_run: bool = False,
    home: str | Path | None = None,
    trust: bool = False,
) -> EnsembleMade:
    """Choose an ensemble among the trials of a study that keep their model, make it one model, and register it.

    others are further studies, on the same images, whose trials may be members too. members, parameters and latency_ms
    limit it, by default as the study's `ensemble` does. soup averages the weights of trials with one architecture in
    place of probabilities. The version is of the study's registered model, as challenger. dry_run only tells what it
    would gain. Nothing is trained, and the test part stays closed. Raises HpoError.
    """
    place = Home.find(home)
    relocate(place)  # before the handle of the study: while somebody has one, a moved home keeps its old addresses
    record = read_study(place, study)
    spec = parse_study(record.spec, trust=trust)
    given = {"members": members, "parameters": parameters, "latency_ms": latency_ms}
    asked = _asked(spec, given if not soup else {**given, "average": "weights"})
    card, limits = study_data(record, spec), limits_of(spec, asked)
    images = validation_images(spec, card)
    with tempfile.TemporaryDirectory() as folder, _context(place, record.title, card, trust=trust) as (handle, context):
        scratch = Path(folder)
        kept = _kept(context.tracker, record, images, scratch / "own")
        for index, other in enumerate(others):
            own = record, card, images
            kept += _of_other(place, other, own, context.tracker, scratch / f"other-{index}", trust=trust)
        if others:
            kept = list({each.name: each for each in kept}.values())  # a study may be named twice
            kept.sort(key=lambda each: _loss(each, images))
        if asked.average == "weights":
            return _soup(kept, images, limits, handle, context, dry_run=dry_run)
        measured = context.latencies(kept, scratch) if math.isfinite(limits.latency_ms) else ()
        proposal = propose(kept, images, limits, spec=spec, data=card, latency_ms=measured)
        if proposal is None:
            raise _too_few(record.title, len(kept), len(images.rows))
        size = sum(each.result.parameter_count for each in proposal.members)
        made = EnsembleMade(record.title, proposal.named, len(kept), size, proposal.gain, None)
        if dry_run or len(proposal.members) < 2:
            return made
        done = make_ensemble(proposal, handle, context)
        return replace(made, version=done.version, unknown=done.unknown)


def _too_few(title: str, kept: int, images: int) -> HpoError:
    return HpoError(
        f"{title}: {kept} of its trials keep a model that was validated on its {images:,} validation images and is "
        "within the limits: an ensemble needs two.",
        "Keep more models in the next run: --keep-models best:20",
    )


def _soup(
    kept: Sequence[KeptTrial],
    images: ValidationImages,
    limits: Limits,
    study: Study,
    context: EnsembleContext,
    *,
    dry_run: bool,
) -> EnsembleMade:
    """Average weights instead of probabilities. Raises HpoError where no two trials have one architecture."""
    if len(kept) < 2:
        raise _too_few(study.title, len(kept), len(images.rows))
    soup = choose_soup(kept, images, limits, study, context)
    if soup.gain is None:
        raise HpoError(
            f"{study.title}: no two of {len(kept)} kept models have the architecture of the best one, {kept[0].name}.",
            "Average probabilities instead: leave --soup out.",
        )
    size = soup.result.parameter_count
    made = EnsembleMade(study.title, soup.result.members, len(kept), size, soup.gain, None)
    if dry_run or not soup.result.members or soup.gain.lead.value <= 0:
        return made
    done = make_soup(soup, study, context)
    return replace(made, version=done.version, unknown=done.unknown)


@contextlib.contextmanager
def _context(home: Home, title: str, card: DataCard, *, trust: bool) -> Iterator[tuple[Study, EnsembleContext]]:
    """The handle of the study with this title, and a context that does everything in this process."""
    work = home.work / title
    with opened(home, title) as handle:
        sweep(work, handle)
        try:
            yield handle, EnsembleContext(card, Tracker(home), work, _call, _call, trust)
        finally:
            remove(home.work, pictures_folder(work, handle), ignore_errors=True)
            with contextlib.suppress(OSError):  # it is not empty, or was never made
                work.rmdir()


def register_ensemble(home: Home, proposal: Proposal, title: str, card: DataCard) -> ModelVersion:
    """Make an ensemble a version of the study with this title; see make_ensemble."""
    with _context(home, title, card, trust=False) as (handle, context):
        return make_ensemble(proposal, handle, context).version


def _call(function: Any, *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)


def _asked(spec: StudySpec, given: Mapping[str, Any]) -> EnsembleSpec:
    """The study's `ensemble`, changed where an option says otherwise. Raises SpecError."""
    asked = (spec.ensemble or EnsembleSpec()).model_dump()
    try:
        return EnsembleSpec.model_validate(asked | {name: value for name, value in given.items() if value is not None})
    except ValueError as error:
        shown = ", ".join(f"{name} {value}" for name, value in given.items() if value is not None)
        raise SpecError(f"{shown}: {str(error).splitlines()[-2].strip()}.", "See: hpo ensemble --help") from None


def _kept(tracker: Tracker, study: StudyResult, images: ValidationImages, folder: Path) -> list[KeptTrial]:
    files = tracker.kept_predictions(study, {trial.number for trial in candidates(study)}, folder)
    return kept_trials(study, files, images)


def _loss(kept: KeptTrial, images: ValidationImages) -> float:
    """Cross-entropy on the images, by which trials of several studies are ranked: their objectives may differ."""
    found = kept.probabilities.clip(1e-7, 1 - 1e-7)
    if images.labels.ndim == 2:
        return -float(np.log(np.where(images.labels > 0, found, 1 - found)).mean())
    return -float(np.log(found[np.arange(len(found)), images.labels]).mean())


def _of_other(
    home: Home,
    name: str,
    own: tuple[StudyResult, DataCard, ValidationImages],
    tracker: Tracker,
    folder: Path,
    *,
    trust: bool,
) -> list[KeptTrial]:
    """The kept trials of another study, with their probabilities in the order of this one's images.

    Raises DataError where its images or classes differ, and where its trials may have been trained on images of this
    study's validation or test part.
    """
    from hpo.data.overview import shared_rows

    study, card, images = own
    other = read_study(home, name)
    spec = parse_study(other.spec, trust=trust)
    data = study_data(other, spec)
    for what in ("class_names", "image_shape", "ranges", "several_labels"):
        if getattr(data, what) != getattr(card, what):
            raise DataError(
                f"{name}: its {what.replace('_', ' ')} are not those of {study.name}.",
                "Members of an ensemble take the same images and answer with the same classes, in one order.",
            )
    theirs = validation_images(spec, data)
    parts = [
        np.load(Path(each.folder) / "development_images.npy", mmap_mode="r")[part.rows]
        for each, part in ((card, images), (data, theirs))
    ]
    here, there = shared_rows(parts)
    if len(here) < len(images.rows):
        raise DataError(
            f"{name}: {len(images.rows) - len(here):,} of the {len(images.rows):,} validation images of {study.name} "
            "are not among its own, so it may have been trained on them.",
            "Take studies with the same split.",
        )
    if seen := count_seen(card, data):
        raise DataError(
            f"{name}: {seen:,} of {card.test_count:,} test images of {study.name} are among its development images.",
            "Take studies with the same test part.",
        )
    order = there[np.argsort(here)]
    if not np.array_equal(theirs.labels[order], images.labels):
        raise DataError(f"{name}: its labels differ from those of {study.name}.", "Take studies on the same labels.")
    return [replace(each, probabilities=each.probabilities[order]) for each in _kept(tracker, other, theirs, folder)]
