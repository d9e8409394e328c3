"""What the doctor checks between trials and MLflow: a run for each trial, as it ended, with its files and models."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hpo.home import Home
from hpo.jobs.shared.home_snapshot import Case, Finding, Scene
from hpo.records import StudyResult, Trial
from hpo.spec.load import parse_study
from hpo.storage.reader import read_snapshots
from hpo.tracking import runs
from hpo.tracking.reader import Run, Tracking
from hpo.tracking.repair import ORPHAN, end_runs, forget_model, restore_files
from hpo.tracking.tracker import Tracker


@dataclass(frozen=True)
class _Projection:
    """What MLflow has of one study: its parent run, and the run of each trial that the storage knows."""

    parent: Run | None
    trials: dict[int, Run]


def run_cases(scene: Scene) -> Iterator[Case]:
    """What is wrong between the study storage and MLflow; studies at work are left out."""
    tracking = scene.tracking
    if not scene.storage_read or scene.home.tracking_uri in scene.faults:
        return
    owned: set[str] = set()
    for title, one in scene.studies.items():
        found = _projection(one.study, tracking or Tracking())
        owned |= {run.key for run in found.trials.values()} | ({found.parent.key} if found.parent else set())
        if title not in scene.live:
            yield from _study_cases(scene, one.study, found)
    if tracking is not None:
        yield from _orphans(scene, tracking, owned)
        yield from _models(scene, tracking)


def _projection(study: StudyResult, tracking: Tracking) -> _Projection:
    mine = runs.study_tags(study)
    active = [run for run in tracking.runs if not run.deleted]
    parents = [run for run in active if mine.items() <= run.tags.items()]
    if not parents:
        return _Projection(None, {})
    known = {trial.number for trial in study.trials}
    trials: dict[int, Run] = {}
    for run in active:
        if run.tags.get(runs.PARENT) == parents[0].key:
            number = int(run.tags.get(runs.TRIAL, -1))
            if number in known:
                trials.setdefault(number, run)
    return _Projection(parents[0], trials)


def _study_cases(scene: Scene, study: StudyResult, found: _Projection) -> Iterator[Case]:
    home, title = scene.home, study.title
    ended = [trial for trial in study.trials if trial.state in runs.STATUS]
    again = partial(_project, home, title)
    if found.parent is None:
        if ended:
            yield Case(
                Finding(
                    what=f"MLflow has no run of the study, whose {len(ended)} trials have ended",
                    where=title,
                    why="Its results are not seen in MLflow, and its model cannot be registered.",
                    repair="writes its runs from the study storage",
                    study=title,
                ),
                again,
            )
        return
    missing = [trial for trial in ended if trial.number not in found.trials]
    deleted = _deleted(scene, found.parent)
    missing = [trial for trial in missing if trial.number not in deleted]
    if missing:
        yield Case(
            Finding(
                what=f"{len(missing)} trials have ended, but have no run in MLflow",
                where=f"{title}: trial {_numbers(missing)}",
                why="Their results are not seen in MLflow.",
                repair="writes the runs from the study storage",
                study=title,
            ),
            again,
        )
    wrong = [
        trial
        for trial in ended
        if (run := found.trials.get(trial.number)) is not None
        and (run.status == "RUNNING" or run.tags.get(runs.STATE) != trial.state)
    ]
    if wrong:
        yield Case(
            Finding(
                what=f"{len(wrong)} runs in MLflow say otherwise than their trials how they ended",
                where=f"{title}: trial {_numbers(wrong)}",
                why="A run that is RUNNING for ever, or a wrong state, misleads whoever reads MLflow.",
                repair="ends the runs as the trials did",
                study=title,
            ),
            again,
        )
    if found.parent.status == "RUNNING":
        yield Case(
            Finding(
                what="the study's run in MLflow is RUNNING, but nobody runs the study",
                where=title,
                why="It looks as if it were at work.",
                repair="ends it as KILLED; the next hpo run takes it up again",
                study=title,
            ),
            partial(end_runs, home, [found.parent.key]),
        )
    yield from _files(scene, study, found)


def _project(home: Home, title: str) -> None:
    """Bring MLflow in line with the storage as it is now, as every hpo run does at its start."""
    study = next(one.study for one in read_snapshots(home) if one.study.title == title)
    spec, tracker = parse_study(study.spec, trust=True), Tracker(home)
    if not _has_parent(home, study):
        from hpo.data.split import split_card
        from hpo.jobs.shared.study_data import study_data

        data = study_data(study, spec)
        tracker.open_study(study, spec, data, split_card(data, spec.split))
    tracker.reconcile(study, spec)


def _has_parent(home: Home, study: StudyResult) -> bool:
    from hpo.tracking.store import connect

    return runs.find_parent(connect(home), study) is not None


def _deleted(scene: Scene, parent: Run) -> set[int]:
    """Trials whose run somebody has deleted in MLflow: a wish, not a fault."""
    every = scene.tracking.runs if scene.tracking else ()
    return {
        int(run.tags[runs.TRIAL])
        for run in every
        if run.deleted and run.tags.get(runs.PARENT) == parent.key and runs.TRIAL in run.tags
    }


def _files(scene: Scene, study: StudyResult, found: _Projection) -> Iterator[Case]:
    """Artifacts that the study storage knows the content of."""
    wanted: list[tuple[Run, dict[str, Any]]] = []
    if found.parent is not None:
        wanted.append((found.parent, {"study.yaml": dict(study.spec)}))
    ended = [trial for trial in study.trials if trial.state in runs.STATUS]
    wanted += [(found.trials[trial.number], _content(trial)) for trial in ended if trial.number in found.trials]
    lost: list[tuple[Run, dict[str, Any]]] = []
    for run, files in wanted:
        folder = scene.inside(run.place)
        gone = {name: content for name, content in files.items() if folder and not (folder / name).is_file()}
        lost += [(run, gone)] if gone else []
    if lost:
        yield Case(
            Finding(
                what=f"{sum(len(files) for _, files in lost)} artifacts are missing",
                where=f"{study.title}: "
                + ", ".join(f"{name} of run {run.key}" for run, files in lost[:3] for name in files),
                why="MLflow shows the runs without them.",
                repair="writes them again from the study storage",
                study=study.title,
            ),
            partial(_restore, scene.home, lost),
        )


def _content(trial: Trial) -> dict[str, Any]:
    """What Tracker.end_trial writes as files."""
    result = trial.result
    if result is None:
        return {}
    files: dict[str, Any] = {}
    if result.confusion:
        files["confusion.json"] = {"true_by_predicted": result.confusion}
    if result.traceback:
        files["traceback.txt"] = result.traceback
    return files


def _restore(home: Home, lost: Sequence[tuple[Run, dict[str, Any]]]) -> None:
    for run, files in lost:
        restore_files(home, run.key, files)


def _orphans(scene: Scene, tracking: Tracking, owned: set[str]) -> Iterator[Case]:
    """Runs of ours that no study or trial in the storage answers for; one finding for each study that they name."""
    lost: dict[str, list[Run]] = {}
    for run in tracking.runs:
        title = run.tags.get(runs.STUDY, "")
        if title and runs.KIND in run.tags and not run.deleted and run.key not in owned and ORPHAN not in run.tags:
            lost.setdefault(title, []).append(run)
    for title, found in sorted(lost.items()):
        if title in scene.live:
            continue
        known = (
            "trials that the storage has not, or has a run of"
            if title in scene.studies
            else "a study that is not there"
        )
        running = sum(run.status == "RUNNING" for run in found)
        yield Case(
            Finding(
                what=f"{len(found)} runs in MLflow are of {known}" + (f"; {running} RUNNING" if running else ""),
                where=f"{title}: run {', '.join(run.key for run in found[:3])}" + (", ..." if len(found) > 3 else ""),
                why="They are of an earlier storage, or HPO_STORAGE points elsewhere today; hpo does not see them.",
                repair=f"ends those that are RUNNING and marks all with the tag {ORPHAN}; none is deleted",
                study=title,
            ),
            partial(end_runs, scene.home, [run.key for run in found], tags={ORPHAN: "true"}),
        )


def _models(scene: Scene, tracking: Tracking) -> Iterator[Case]:
    """Runs tagged with a model, and registered versions, whose files are gone."""
    models = {model.key: model for model in tracking.models}
    for run in tracking.runs:
        uri, title = run.tags.get(runs.MODEL, ""), run.tags.get(runs.STUDY, "")
        if run.deleted or not uri or title in scene.live:
            continue
        model = models.get(uri.removeprefix("models:/"))
        if model is not None and scene.tracking and tracking.registered(model):
            continue  # told below
        if model is not None and not model.deleted and not _gone(scene, model.place):
            continue
        yield Case(
            Finding(
                what="a run names a model whose files are gone",
                where=f"{title}: trial {run.tags.get(runs.TRIAL, '?')}, {uri}",
                why="Loading or registering it fails.",
                repair="takes the model's name off the run, whose results stay",
                study=title,
            ),
            partial(forget_model, scene.home, run),
        )
    for version in tracking.versions:
        if _gone(scene, version.place):
            yield Case(
                Finding(
                    what="a registered model's files are gone",
                    where=f"{version.name} version {version.version}"
                    + "".join(f" @{alias}" for alias in version.aliases)
                    + f", {version.place}",
                    why="Whoever loads it gets an error.",
                    hint=f"Restore the folder from a copy, or train and promote another: hpo run {version.name}",
                )
            )


def _gone(scene: Scene, place: str) -> bool:
    folder = scene.inside(place)
    return folder is not None and not (folder / "MLmodel").is_file()


def _numbers(trials: Sequence[Trial]) -> str:
    shown = ", ".join(str(trial.number) for trial in trials[:8])
    return f"{shown}, ..." if len(trials) > 8 else shown
