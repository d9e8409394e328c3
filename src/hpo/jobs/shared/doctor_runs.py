"""Checks of hpo doctor between trials and MLflow: each trial has a run with its state, its files and its model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hpo.home import Home
from hpo.jobs.shared.home_snapshot import Case, HomeSnapshot
from hpo.records import StudyResult
from hpo.spec.load import parse_study
from hpo.storage.reader import read_snapshots
from hpo.tracking import runs
from hpo.tracking.models import WEIGHTS
from hpo.tracking.reader import Run, TrackingSnapshot
from hpo.tracking.repair import ORPHAN, end_runs, forget_model, restore_files
from hpo.tracking.tracker import Tracker


@dataclass(frozen=True)
class _StudyRuns:
    """The parent run of a study, the run of each trial by number, and the trials whose run a user has deleted."""

    parent: Run | None
    trials: dict[int, Run]
    deleted: set[int]


def run_cases(snapshot: HomeSnapshot) -> Iterator[Case]:
    """Problems between the study storage and MLflow; live studies are left out."""
    if not snapshot.storage_read or snapshot.home.tracking_uri in snapshot.faults:
        return
    tracking = snapshot.tracking or TrackingSnapshot()
    owned: set[str] = set()
    for title, one in snapshot.studies.items():
        found = _study_runs(one.study, tracking)
        owned |= {run.id for run in found.trials.values()} | ({found.parent.id} if found.parent else set())
        if title not in snapshot.live:
            yield from _study_cases(snapshot, one.study, found)
    yield from _orphans(snapshot, tracking, owned)
    yield from _lost_models(snapshot, tracking)


def _study_runs(study: StudyResult, tracking: TrackingSnapshot) -> _StudyRuns:
    own_tags = runs.study_tags(study)
    parent = next((run for run in tracking.runs if not run.deleted and own_tags.items() <= run.tags.items()), None)
    trials: dict[int, Run] = {}
    deleted: set[int] = set()
    known = {trial.number for trial in study.trials}
    for run in tracking.runs:
        number = int(run.tags.get(runs.TRIAL, -1))
        if parent is not None and run.tags.get(runs.PARENT) == parent.id and number in known:
            if run.deleted:
                deleted.add(number)
            else:
                trials.setdefault(number, run)
    return _StudyRuns(parent, trials, deleted)


def _study_cases(snapshot: HomeSnapshot, study: StudyResult, found: _StudyRuns) -> Iterator[Case]:
    title = study.title
    ended = [trial for trial in study.trials if trial.state in runs.STATUS]
    again = partial(_project, snapshot.home, title)
    if found.parent is None:
        if ended:
            yield Case.of(
                again,
                what=f"MLflow has no run of the study, whose {len(ended)} trials have ended",
                where=title,
                why="Its results are missing in MLflow, and its model cannot be registered.",
                repair="writes its runs from the study storage",
                study=title,
            )
        return
    # A run that a user has deleted in MLflow is a decision, not a fault.
    missing = [each.number for each in ended if each.number not in found.trials and each.number not in found.deleted]
    if missing:
        yield Case.of(
            again,
            what=f"{len(missing)} trials have ended, but have no run in MLflow",
            where=f"{title}: trial {numbers(missing)}",
            why="Their results are missing in MLflow.",
            repair="writes the runs from the study storage",
            study=title,
        )
    if wrong := [
        trial.number
        for trial in ended
        if (run := found.trials.get(trial.number)) is not None
        and (run.status == "RUNNING" or run.tags.get(runs.STATE) != trial.state)
    ]:
        yield Case.of(
            again,
            what=f"{len(wrong)} runs in MLflow have another state than their trials",
            where=f"{title}: trial {numbers(wrong)}",
            why="A run that stays RUNNING, or has a wrong state, misleads readers of MLflow.",
            repair="gives the runs the state of their trials",
            study=title,
        )
    if found.parent.status == "RUNNING":
        yield Case.of(
            partial(end_runs, snapshot.home, [found.parent.id]),
            what="the study's run in MLflow is RUNNING, but nobody runs the study",
            where=title,
            why="The study looks as if it were running.",
            repair="ends it as KILLED; the next hpo run resumes it",
            study=title,
        )
    yield from _lost_files(snapshot, study, found)
    yield from _unlogged(snapshot.home, study, found)


def _unlogged(home: Home, study: StudyResult, found: _StudyRuns) -> Iterator[Case]:
    """Trials whose weights a killed run has left in the work folder, and that have no model."""
    ranked = sorted({trial.number for trial in [*study.ranked(), *study.after_search()]})
    left = [
        number
        for number in ranked
        if (run := found.trials.get(number)) is not None
        and runs.MODEL not in run.tags
        and (home.work / study.title / str(number) / WEIGHTS).is_file()
    ]
    if left:
        yield Case.of(
            what=f"{len(left)} trials have weights on the disk, but no model in MLflow",
            where=f"{study.title}: trial {numbers(left)}",
            why="Their run ended before it logged them: they cannot be registered or loaded.",
            study=study.title,
            hint=f"Log them and register the best: hpo run {study.name}",
        )


def _project(home: Home, title: str) -> None:
    """Bring MLflow in line with the storage as it is now, as every hpo run does when it starts."""
    from hpo.tracking.store import connect

    study = next(one.study for one in read_snapshots(home) if one.study.title == title)
    spec, tracker = parse_study(study.spec, trust=True), Tracker(home)
    if runs.find_parent(connect(home), study) is None:
        from hpo.data.split import split_card
        from hpo.execute.bases import study_data

        data = study_data(study, spec)
        tracker.open_study(study, spec, data, split_card(data, spec.split))
    tracker.reconcile(study, spec)


def _lost_files(snapshot: HomeSnapshot, study: StudyResult, found: _StudyRuns) -> Iterator[Case]:
    """Artifacts that are gone and whose content the study storage has."""
    expected: list[tuple[Run, dict[str, Any]]] = []
    if found.parent is not None:
        expected.append((found.parent, runs.study_files(study.spec)))
    expected += [
        (found.trials[trial.number], runs.trial_files(trial.result))
        for trial in study.trials
        if trial.state in runs.STATUS and trial.number in found.trials and trial.result is not None
    ]
    lost: list[tuple[Run, dict[str, Any]]] = []
    for run, files in expected:
        folder = snapshot.inside(run.location)
        gone = {name: content for name, content in files.items() if folder and not (folder / name).is_file()}
        lost += [(run, gone)] if gone else []
    if lost:
        yield Case.of(
            partial(_restore, snapshot.home, lost),
            what=f"{sum(len(files) for _, files in lost)} artifacts are missing",
            where=f"{study.title}: "
            + ", ".join(f"{name} of run {run.id}" for run, files in lost[:3] for name in files),
            why="MLflow shows the runs without them.",
            repair="writes them again from the study storage",
            study=study.title,
        )


def _restore(home: Home, lost: Sequence[tuple[Run, dict[str, Any]]]) -> None:
    for run, files in lost:
        restore_files(home, run.id, files)


def _orphans(snapshot: HomeSnapshot, tracking: TrackingSnapshot, owned: set[str]) -> Iterator[Case]:
    """Runs of hpo without a study or a trial in the storage; one finding for each study that they name."""
    orphans: dict[str, list[Run]] = {}
    for run in tracking.runs:
        title = run.tags.get(runs.STUDY, "")
        if title and runs.KIND in run.tags and not run.deleted and run.id not in owned and ORPHAN not in run.tags:
            orphans.setdefault(title, []).append(run)
    for title, found in sorted(orphans.items()):
        if title in snapshot.live:
            continue
        belongs = (
            "trials that the storage does not have, or has a run of"
            if title in snapshot.studies
            else "a study that does not exist"
        )
        running = sum(run.status == "RUNNING" for run in found)
        yield Case.of(
            partial(end_runs, snapshot.home, [run.id for run in found], tags={ORPHAN: "true"}),
            what=f"{len(found)} runs in MLflow belong to {belongs}" + (f"; {running} RUNNING" if running else ""),
            where=f"{title}: run {', '.join(run.id for run in found[:3])}" + (", ..." if len(found) > 3 else ""),
            why="They are of an earlier storage, or HPO_STORAGE names another one today; hpo ignores them.",
            repair=f"ends those that are RUNNING and marks all with the tag {ORPHAN}; none is deleted",
            study=title,
        )


def _lost_models(snapshot: HomeSnapshot, tracking: TrackingSnapshot) -> Iterator[Case]:
    """Runs tagged with a model, and registered versions, whose files are gone."""
    models = {model.id: model for model in tracking.models}
    for run in tracking.runs:
        uri, title = run.tags.get(runs.MODEL, ""), run.tags.get(runs.STUDY, "")
        if run.deleted or not uri or title in snapshot.live:
            continue
        model = models.get(uri.removeprefix("models:/"))
        if model is not None and tracking.registered(model):
            continue  # reported below
        if model is not None and not model.deleted and not _is_gone(snapshot, model.location):
            continue
        yield Case.of(
            partial(forget_model, snapshot.home, run),
            what="a run names a model whose files are gone",
            where=f"{title}: trial {run.tags.get(runs.TRIAL, '?')}, {uri}",
            why="Loading or registering it fails.",
            repair="removes the model's name from the run, whose results stay",
            study=title,
        )
    for version in tracking.versions:
        if _is_gone(snapshot, version.location):
            yield Case.of(
                what="a registered model's files are gone",
                where=f"{version.name} version {version.version}"
                + "".join(f" @{alias}" for alias in version.aliases)
                + f", {version.location}",
                why="Loading it fails.",
                hint=f"Restore the folder from a copy, or train and promote another: hpo run {version.name}",
            )


def _is_gone(snapshot: HomeSnapshot, location: str) -> bool:
    folder = snapshot.inside(location)
    return folder is not None and not (folder / "MLmodel").is_file()


def numbers(trials: Sequence[int]) -> str:
    """Trial numbers as a list for a message, cut after eight."""
    listed = ", ".join(map(str, trials[:8]))
    return f"{listed}, ... ({len(trials)} in all)" if len(trials) > 8 else listed
