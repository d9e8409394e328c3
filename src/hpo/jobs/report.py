"""Gather the findings of a study and write its page; nothing is trained, downloaded or opened."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.errors import HpoError, ModelError
from hpo.home import Home
from hpo.jobs.explain import Explained, explain
from hpo.jobs.shared.image_history import study_history
from hpo.records import FINAL, DataCard, ModelVersion, SplitCard, StudyResult, TrialState
from hpo.report.figures.images import confident_mistakes
from hpo.report.study_page import Answers, Findings, Opening, Samples, shown_trial, study_page
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec
from hpo.storage.reader import read_study
from hpo.tracking.ledger import openings
from hpo.tracking.reader import run_file, study_run, trial_runs
from hpo.tracking.registry import resolve, versions
from hpo.tracking.store import translate_errors

_SAMPLES = 6  # images of each class
_PIXELS = 50_000_000  # at most, for mean and deviation: half a second


def write_report(
    study: str,
    *,
    home: str | Path | None = None,
    out: str | Path | None = None,
    saliency: bool = False,
    fanova: bool = False,
) -> Path:
    """Write the page of a study, by default to mlruns/reports/STUDY.html; returns its absolute path.

    In a home that cannot be written, the default is STUDY.html in the working directory.

    study is a name, or a title such as name~2. saliency adds maps of the most confident mistakes, fanova a
    second measure of importance; each takes seconds. The test part is never opened. Raises StoreError if there is no
    such study and HpoError if the file cannot be written; other missing parts are listed on the page.
    """
    place = Home.find(home)
    record = read_study(place, study)
    path = Path(out or place.reports / f"{record.title}.html").expanduser().absolute()
    findings = gather(place, record, fanova=fanova)
    html = study_page(_with_saliency(findings, place) if saliency else findings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise HpoError(f"{path}: cannot be written: {error.strerror}.", "Choose another file: --out FILE") from None
    return path


def _with_saliency(findings: Findings, home: Home) -> Findings:
    missing = list(findings.missing)
    pictures: tuple[bytes, ...] = ()
    with _noting(missing, "the mistakes could not be explained"), tempfile.TemporaryDirectory() as scratch:
        if findings.model is None:
            raise ModelError("no model of this study is registered.", f"hpo run {findings.study.name}")
        model = f"{findings.model.name}/{findings.model.version}"
        rows = explain_mistakes(model, folder=Path(scratch), home=home)
        pictures = tuple(Path(row.picture).read_bytes() for row in rows)
    return replace(findings, saliency=pictures, missing=tuple(missing))


def explain_mistakes(
    model: str,
    *,
    folder: str | Path,
    methods: Sequence[str] = (),
    home: str | Path | Home | None = None,
    trust: bool = False,
) -> list[Explained]:
    """Explain the most confident mistakes of the model on validation images, five at most.

    Pictures are named by their order and true class; the wrong class is explained. Raises ModelError if the model's
    validation predictions or the images are gone.
    """
    from hpo.data.overview import to_png

    place = home if isinstance(home, Home) else Home.find(home)
    version = resolve(place, model)
    answers = (findings := gather(place, read_study(place, version.generation), model=version)).answers
    if answers is None or not answers.images:
        raise ModelError(
            f"{model}: its validation predictions, or the images, are not available.",
            f"Use the study's newest model, on a machine with its data: {version.name}",
        )
    with tempfile.TemporaryDirectory() as scratch:
        files = []
        for number, mistake in enumerate(answers.mistakes, start=1):
            name = "".join(letter if letter.isalnum() else "-" for letter in findings.class_names[mistake.true])
            files.append(Path(scratch) / f"mistake-{number}-{name}.png")
            files[-1].write_bytes(to_png(answers.images[mistake.position]))
        rows = (
            explain(model, files, folder=folder, methods=methods, home=place, trust=trust, scaled=True) if files else []
        )
    return [replace(row, file=Path(row.file).stem) for row in rows]


def gather(home: Home, study: StudyResult, *, model: ModelVersion | None = None, fanova: bool = False) -> Findings:
    """The findings of a study from storage, tracking, ledger and prepared data.

    They are of the given model, a version or a kept trial of this generation, by default of its newest version.
    """
    from hpo.search.importance import importances

    spec = parse_study(study.spec, trust=True)  # nothing of it is imported
    missing: list[str] = list(_unfinished(study, spec))
    tracked = _Tracked()
    with _noting(missing, "the tracking store could not be read"):
        tracked = _tracked(home, study, model)
    data = _prepared(tracked.data, study.data_digest)
    findings = Findings(
        study=study,
        spec=spec,
        made=datetime.now(UTC),
        data=data or tracked.data,
        split=tracked.split,
        model=tracked.model,
        openings=tracked.openings,
        versions=tracked.versions,
        importances=importances(study, fanova=fanova),
    )
    if data is None:
        missing.append(f"The images ({study.data_digest[:19]}) are not on this machine: none are shown.")
    else:
        with _noting(missing, "the images could not be read"):
            findings = replace(findings, samples=_samples(data, spec), split=findings.split or _split(data, spec))
            findings = replace(findings, near_duplicates=_near_duplicates(data, spec))
        with _noting(missing, "the history of the test images could not be read"):
            findings = replace(findings, test_history=study_history(home, study, data).sentences)
    shown = findings.shown
    if shown is not None:
        if tracked.answers is not None:
            findings = replace(findings, answers=_answers(tracked.answers, data, tracked.decided))
        else:
            missing.append(
                f"The validation probabilities of trial {shown.number} were not kept: "
                "there are no ROC curves and no mistakes."
            )
        if findings.model is None:
            missing.append("No model of this study is registered.")
    return replace(findings, missing=tuple(missing))


@dataclass(frozen=True)
class _Tracked:
    """The part of the findings that MLflow and the ledger have."""

    data: DataCard | None = None
    split: SplitCard | None = None
    model: ModelVersion | None = None
    openings: tuple[Opening, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    answers: Mapping[str, NDArray[Any]] | None = None
    decided: Mapping[str, Any] = field(default_factory=dict)


def _unfinished(study: StudyResult, spec: StudySpec) -> Iterator[str]:
    running = study.count(TrialState.RUNNING, TrialState.WAITING)
    if running:
        yield f"The study is running: {running} trials have not ended."
    if study.best is None:
        yield "No trial is complete yet."
    elif spec.final is not None and not study.ranked(FINAL):
        yield "There is no final training yet: the page shows the best trial of the search."


@contextlib.contextmanager
def _noting(missing: list[str], what: str) -> Iterator[None]:
    """Turn an error into a sentence of the page, which shows the rest."""
    try:
        yield
    except (HpoError, OSError, ValueError, KeyError) as error:
        missing.append(f"{what[0].upper()}{what[1:]}: {getattr(error, 'message', error)}")


@translate_errors
def _tracked(home: Home, study: StudyResult, model: ModelVersion | None) -> _Tracked:
    looks = tuple(
        Opening(datetime.fromisoformat(look.when), look.version, look.trial, look.scores, look.purpose)
        for look in openings(home, study)
    )
    found = _Tracked(openings=looks)
    own = (each for each in versions(home, study.name) if each.study == study.title and not each.origin)
    model = model or next(own, None)
    parent = study_run(home, study)
    if parent is None:
        return replace(found, model=model)
    shown = shown_trial(study, model)
    with tempfile.TemporaryDirectory() as folder:
        file = run_file(home, parent, "data.json", folder)
        data, split = _cards(json.loads(file.read_text(encoding="utf-8"))) if file else (None, None)
        answers, decided = None, {}
        for run in trial_runs(home, parent, number=shown.number) if shown else ():
            if file := run_file(home, run, "report/validation.npz", folder):
                with np.load(file, allow_pickle=False) as arrays:
                    answers = dict(arrays)
            if file := run_file(home, run, "report/answers.json", folder):
                decided = json.loads(file.read_text(encoding="utf-8"))
    found = replace(found, answers=answers, decided=decided)
    return replace(found, model=model, data=data, split=split, versions=_versions(parent.tags))


def _cards(stored: Mapping[str, Any]) -> tuple[DataCard, SplitCard]:
    data, split = stored["data"], stored["split"]
    shares = {part: tuple(each) for part, each in split["shares"].items()}
    lists = {name: tuple(data[name]) for name in ("class_names", "image_shape")}
    return DataCard(**{**data, **lists}), SplitCard(split["counts"], shares)


def _versions(tags: Mapping[str, str]) -> dict[str, str]:
    """Package versions of the study's last run, and the commit of the working directory."""
    found = {name.removeprefix("version."): tags[name] for name in sorted(tags) if name.startswith("version.")}
    commit = tags.get("mlflow.source.git.commit")
    changed = ", with uncommitted changes" if tags.get("hpo.git_dirty") == "true" else ""
    return found | ({"commit": f"{commit}{changed}"} if commit else {})


def _prepared(logged: DataCard | None, digest: str) -> DataCard | None:
    """The data set's card if its prepared files are on this machine: as logged by the study, or in the cache."""
    from hpo.data.prepare import prepared

    if logged is not None and logged.digest == digest and (Path(logged.folder) / "development_images.npy").is_file():
        return logged
    return prepared(digest)


def _samples(data: DataCard, spec: StudySpec) -> Samples:
    from hpo.data.overview import channel_statistics, open_development, sample_rows, to_png

    images, labels, parts = open_development(data, spec.split)
    train = parts["train"]
    rows = sample_rows(labels, train, classes=len(data.class_names), count=_SAMPLES, seed=spec.seed)
    strips = tuple(to_png(np.concatenate([_padded(images[row]) for row in of], axis=1)) if of else b"" for of in rows)
    most = _PIXELS // (data.image_shape[0] * data.image_shape[1])
    counted = train if len(train) <= most else train[np.linspace(0, len(train) - 1, most).astype(np.int64)]
    mean, std = channel_statistics(images, counted)
    return Samples(strips, mean, std, len(counted))


def _padded(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """An image with a white column at its right, which separates neighbours."""
    return np.pad(image, ((0, 0), (0, 1), (0, 0)), constant_values=255)


def _split(data: DataCard, spec: StudySpec) -> SplitCard:
    from hpo.data.split import split_card

    return split_card(data, spec.split)


def _near_duplicates(data: DataCard, spec: StudySpec) -> str:
    from hpo.data.overview import near_words

    return near_words(data, spec.split)


def _answers(arrays: Mapping[str, NDArray[Any]], data: DataCard | None, decided: Mapping[str, Any]) -> Answers:
    labels, probabilities = arrays["labels"], arrays["probabilities"]
    plain = Answers(labels, probabilities, raw=arrays.get("raw"), record=decided)
    if data is None:
        return plain
    mistakes = tuple(confident_mistakes(labels, probabilities)) if labels.ndim == 1 else ()
    images = np.load(Path(data.folder) / "development_images.npy", mmap_mode="r", allow_pickle=False)
    places = {place for mistake in mistakes for place in mistake.positions}
    return replace(plain, mistakes=mistakes, images={place: images[arrays["rows"][place]] for place in places})
