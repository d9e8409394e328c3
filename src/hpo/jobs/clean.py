"""Free disk by policy: what nobody will use again, told with its size before anything goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pydantic import ValidationError

from hpo.errors import SpecError
from hpo.home import Home
from hpo.jobs.shared.home_snapshot import Scene, leftovers, see, size_of
from hpo.records import FINAL
from hpo.spec.study import KeepSpec
from hpo.storage.reader import StudySnapshot
from hpo.tracking import runs
from hpo.tracking.reader import Experiment, Model, Run, Tracking, place_of
from hpo.tracking.repair import purge
from hpo.tracking.tracker import Tracker


@dataclass(frozen=True)
class Waste:
    """One thing that can go: of what kind, of which study (or ""), where it is, and its bytes on disk."""

    kind: str
    study: str
    what: str
    bytes: int


@dataclass(frozen=True)
class Cleaning:
    """What can go, or went (done). notes tell what was left alone, and why."""

    waste: tuple[Waste, ...]
    done: bool
    notes: tuple[str, ...] = ()

    @property
    def bytes(self) -> int:
        """All of it together."""
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
    """See what can go, and with really have it go.

    Always: work of trials that are over, and what was deleted in MLflow. keep_models and keep_figures (all, none or
    best:K): models and pictures of other trials, of one study or of all; never those of final trainings and of
    registered versions, champions among them. data: prepared images, features and networks in HPO_DATA that no study
    of this home uses. aside: what hpo doctor has set aside. Studies that are running are left alone. Raises HpoError.
    """
    place = Home.find(home)
    models, figures = _policy("models", keep_models), _policy("figures", keep_figures)
    scene = see(place)
    for error in scene.faults.values():
        raise error  # what cannot be read may own anything
    chosen = [
        one for one in scene.studies.values() if study in (None, one.study.name, one.study.title) and not one.holders
    ]
    plan = [*_work(scene, study), *_deleted(scene, study)]
    for one in chosen:
        plan += _beyond(scene, one, models=models, figures=figures)
    if data:
        plan += _data(scene)
    if aside:
        plan += _aside(scene)
    if really:
        for _, remove in plan:
            remove()
    notes = tuple(f"{title} is running: it was left alone." for title in sorted(scene.live))
    return Cleaning(tuple(waste for waste, _ in plan), really, notes)


def _policy(what: str, policy: str | None) -> float | None:
    """How many trials keep theirs; None: nobody asked."""
    if policy is None:
        return None
    try:
        keep = KeepSpec.model_validate({what: policy})
    except ValidationError:
        raise SpecError(f"--keep-{what} {policy}: unknown policy.", "Give all, none or best:K.") from None
    return keep.count if what == "models" else keep.figure_count


def _work(scene: Scene, study: str | None) -> Plan:
    for title, path in leftovers(scene):
        if study is None or title.partition("~")[0] == study or title == study:
            yield Waste("work", title, str(path), size_of(path)), partial(_remove, path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _deleted(scene: Scene, study: str | None) -> Plan:
    """Runs, models and experiments that somebody has deleted in MLflow, which keeps them for a change of mind.

    Only in databases: a server has its own `mlflow gc`. What a registered version loads stays, deleted or not.
    """
    tracking = scene.tracking
    if tracking is None or scene.home.tracking_uri.startswith(("http://", "https://")):
        return
    names = {one.key: one.name for one in tracking.experiments}
    held = {model.experiment for model in tracking.models if tracking.registered(model)}
    gone = {one.key for one in tracking.experiments if one.deleted} - held
    dead: list[Run | Model | Experiment] = [
        one for one in tracking.models if (one.deleted or one.experiment in gone) and not tracking.registered(one)
    ]
    dead += [run for run in tracking.runs if run.deleted or run.experiment in gone]
    dead += [one for one in tracking.experiments if one.key in gone]
    for one in dead:
        name = one.name if isinstance(one, Experiment) else names.get(one.experiment, "")
        if name in scene.live_names or study not in (None, name):
            continue
        folder = place_of(one.place)
        there = folder is not None and not isinstance(one, Experiment) and folder.exists()
        if isinstance(one, Model) and folder is not None and not there:
            continue  # a row that holds nothing: hpo deletes the files of a model with it
        kind = {Run: "deleted run", Model: "deleted model", Experiment: "deleted experiment"}[type(one)]
        size = size_of(folder) if there and folder is not None else 0
        yield Waste(kind, name, one.key, size), partial(purge, scene.home, [one])


def _beyond(scene: Scene, one: StudySnapshot, *, models: float | None, figures: float | None) -> Plan:
    """Models and pictures of trials that are not among the best of a study."""
    tracking, study = scene.tracking or Tracking(), one.study
    parent = next((run for run in tracking.runs if runs.study_tags(study).items() <= run.tags.items()), None)
    if parent is None:
        return
    known = {model.key: model for model in tracking.models if not model.deleted}
    safe = {trial.number for trial in study.ranked(FINAL)}
    places = {trial.number: place for place, trial in enumerate(study.ranked())}
    tracker = Tracker(scene.home)
    for run in tracking.runs:
        if run.deleted or run.tags.get(runs.PARENT) != parent.key or runs.TRIAL not in run.tags:
            continue
        number = int(run.tags[runs.TRIAL])
        place = places.get(number, len(places))
        model = known.get(run.tags.get(runs.MODEL, "").removeprefix("models:/"))
        if number in safe or any(version.run == run.key for version in tracking.versions):
            continue
        if models is not None and place >= models and model is not None:
            folder, report = place_of(model.place), place_of(run.place)
            size = sum(size_of(path) for path in (folder, *_parts(report)) if path is not None)
            yield Waste("model", study.title, f"trial {number}", size), partial(tracker.drop_model, number, study)
        elif figures is not None and place >= figures:
            folder = place_of(run.place)
            if folder is not None and (folder / "figures").is_dir():
                size = size_of(folder / "figures")
                yield (
                    Waste("figures", study.title, f"trial {number}", size),
                    partial(tracker.drop_figures, number, study),
                )


def _parts(folder: Path | None) -> list[Path]:
    """What goes with a model: the tables and pictures of its run."""
    return [] if folder is None else [folder / part for part in ("report", "figures")]


def _data(scene: Scene) -> Plan:
    """What no study of this home uses in the cache, which other homes may share."""
    from hpo.data.cache_cleanup import unused

    digests = {one.study.data_digest for one in scene.studies.values()}
    specs = [one.study.spec for one in scene.studies.values()]
    for kind, path in unused(digests, specs):
        yield Waste(kind, "", str(path), size_of(path)), partial(_remove, path)


def _aside(scene: Scene) -> Plan:
    for path in sorted(folder for folder in (scene.home.root / "aside").glob("*") if folder.is_dir()):
        yield Waste("set aside", path.name, str(path), size_of(path)), partial(_remove, path)
