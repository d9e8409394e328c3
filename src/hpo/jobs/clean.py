"""Free disk space: list what no run will use again, with its size, and delete it on request."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from hpo.errors import SpecError
from hpo.home import Home, remove
from hpo.jobs.shared.home_snapshot import HomeSnapshot, is_old, leftover_work, size_of, take_snapshot
from hpo.relocation import local_path, relocate
from hpo.spec.outcome import KeepSpec
from hpo.storage.reader import StudySnapshot
from hpo.tracking import runs
from hpo.tracking.reader import Experiment, Model, Run, TrackingSnapshot
from hpo.tracking.repair import purge
from hpo.tracking.store import is_server
from hpo.tracking.tracker import Tracker


@dataclass(frozen=True)
class Waste:
    """One thing that can be deleted: its kind, its study (or ""), its name or path, and its bytes on disk."""

    kind: str
    study: str
    what: str
    bytes: int


@dataclass(frozen=True)
class Cleaning:
    """What can be deleted, or was (done). notes name what was left alone, and why."""

    waste: tuple[Waste, ...]
    done: bool
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """The size of all of it."""
        return sum(each.bytes for each in self.waste)


Plan = Iterator[tuple[Waste, Callable[[], object]]]


def clean(
    study: str | None = None,
    *,
    home: str | Path | None = None,
    keep_models: str | None = None,
    keep_figures: str | None = None,
    data: bool = False,
    aside: bool = False,
    really: bool = False,
) -> Cleaning:
    """List what can be deleted; with really, delete it.

    Always: work of ended trials, what killed exports have left, and what was deleted in MLflow. keep_models and
    keep_figures (all, none or best:K): models and figures of the other trials, of one study or of all; never those of
    final trainings and of registered versions. data: prepared images, features and networks in HPO_DATA that no study
    of this home uses. aside: what hpo doctor has set aside. Running studies are left alone. Raises HpoError.
    """
    models, figures = _policy("models", keep_models), _policy("figures", keep_figures)
    place = Home.find(home)
    moved = relocate(place)
    snapshot = take_snapshot(place)
    for error in snapshot.faults.values():
        raise error  # any folder may belong to what cannot be read
    plan = [*_work(snapshot, study), *_archives(snapshot, study), *_deleted(snapshot, study)]
    for one in snapshot.studies.values():
        if study in (None, one.study.name, one.study.title) and not one.holders:
            plan += _not_kept(snapshot, one, models=models, figures=figures)
    if data:
        plan += _data(snapshot)
    if aside:
        plan += _aside(snapshot.home)
    if really:
        for _, delete in plan:
            delete()
    notes = [moved] if moved else []
    notes += [f"{title} is running: it was left alone." for title in sorted(snapshot.live)]
    return Cleaning(tuple(waste for waste, _ in plan), really, tuple(notes))


def _policy(what: str, policy: str | None) -> float | None:
    """The number of trials that keep theirs; None: the option was not given."""
    if policy is None:
        return None
    try:
        keep = KeepSpec.model_validate({what: policy})
    except ValidationError:
        raise SpecError(f"--keep-{what} {policy}: unknown policy.", "Give all, none or best:K.") from None
    return keep.count if what == "models" else keep.figure_count


def _path(kind: str, study: str, root: Path, path: Path) -> tuple[Waste, Callable[[], object]]:
    return Waste(kind, study, str(path), size_of(path)), partial(remove, root, path, ignore_errors=True)


def _work(snapshot: HomeSnapshot, study: str | None) -> Plan:
    for title, path in leftover_work(snapshot):
        if study in (None, title, title.partition("~")[0]):
            yield _path("work", title, snapshot.home.work, path)


def _archives(snapshot: HomeSnapshot, study: str | None) -> Plan:
    """What killed exports have left in the project's folder, under the name that hpo export gives."""
    project = snapshot.home.root.parent
    for title, one in snapshot.studies.items():
        path = project / f"{title}.zip.part"
        if study in (None, title, one.study.name) and path.is_file() and is_old(path):
            yield _path("killed export", title, project, path)


def _deleted(snapshot: HomeSnapshot, study: str | None) -> Plan:
    """Runs, models and experiments that a user has deleted in MLflow, which only hides them.

    Only in databases: a server has its own `mlflow gc`. What a registered version loads stays, deleted or not.
    """
    tracking = snapshot.tracking
    if tracking is None or is_server(snapshot.home.tracking_uri):
        return
    names = {experiment.id: experiment.name for experiment in tracking.experiments}
    used = {model.experiment for model in tracking.models if tracking.registered(model)}
    gone = {experiment.id for experiment in tracking.experiments if experiment.deleted} - used
    dead: list[Run | Model | Experiment] = [
        one for one in tracking.models if (one.deleted or one.experiment in gone) and not tracking.registered(one)
    ]
    dead += [run for run in tracking.runs if run.deleted or run.experiment in gone]
    dead += [one for one in tracking.experiments if one.id in gone]
    elsewhere: set[str] = set()
    for one in dead:
        name = names.get(one.id if isinstance(one, Experiment) else one.experiment, "")
        if name in snapshot.live_names or study not in (None, name):
            continue
        folder = None if isinstance(one, Experiment) else local_path(one.location)
        if isinstance(one, Experiment):
            if one.id in elsewhere:
                continue
        elif snapshot.home.embedded and folder is not None and snapshot.inside(one.location) is None:
            elsewhere.add(one.experiment)  # another program's, in a folder of its own
            continue
        there = folder is not None and folder.exists()
        if isinstance(one, Model) and folder is not None and not there:
            continue  # a row without files: hpo deletes the files of a model together with it
        kind = {Run: "deleted run", Model: "deleted model", Experiment: "deleted experiment"}[type(one)]
        size = size_of(folder) if folder is not None and there else 0
        yield Waste(kind, name, one.id, size), partial(purge, snapshot.home, [one])


def _not_kept(snapshot: HomeSnapshot, one: StudySnapshot, *, models: float | None, figures: float | None) -> Plan:
    """Models and figures of trials that are not among the best of a study."""
    tracking, study = snapshot.tracking or TrackingSnapshot(), one.study
    parent = next((run for run in tracking.runs if runs.study_tags(study).items() <= run.tags.items()), None)
    if parent is None:
        return
    known = {model.id: model for model in tracking.models if not model.deleted}
    registered = {version.run for version in tracking.versions}
    finals = {trial.number for trial in study.after_search()}
    ranks = {trial.number: rank for rank, trial in enumerate(study.ranked())}
    tracker = Tracker(snapshot.home)
    for run in tracking.runs:
        if run.deleted or run.tags.get(runs.PARENT) != parent.id or runs.TRIAL not in run.tags:
            continue
        number = int(run.tags[runs.TRIAL])
        rank = ranks.get(number, len(ranks))
        model = known.get(run.tags.get(runs.MODEL, "").removeprefix("models:/"))
        if number in finals or run.id in registered:
            continue
        folder = local_path(run.location)
        if models is not None and rank >= models and model is not None:
            # The tables and figures of its run are deleted together with a model.
            parts = [local_path(model.location), *(folder / part for part in (runs.REPORT, runs.FIGURES) if folder)]
            size = sum(size_of(path) for path in parts if path is not None)
            yield Waste("model", study.title, f"trial {number}", size), partial(tracker.drop_model, number, study)
        elif figures is not None and rank >= figures and folder is not None and (folder / runs.FIGURES).is_dir():
            size = size_of(folder / runs.FIGURES)
            yield Waste("figures", study.title, f"trial {number}", size), partial(tracker.drop_figures, number, study)


def _data(snapshot: HomeSnapshot) -> Plan:
    """What no study of this home uses in the cache, which other homes may share."""
    from hpo.data.cache import unused

    digests = {one.study.data_digest for one in snapshot.studies.values()}
    specs = [one.study.spec for one in snapshot.studies.values()]
    for kind, path in unused(digests, specs):
        yield _path(kind, "", path.parent, path)


def _aside(home: Home) -> Plan:
    for path in sorted(folder for folder in (home.root / "aside").glob("*") if folder.is_dir()):
        yield _path("set aside", path.name, home.root / "aside", path)
