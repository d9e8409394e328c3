"""run_formula: one run of a study whose training is a formula."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from formula_study import CARD, RecordedTracker, Run, formula, formula_spec
from hpo.events import Event, StudyOpened
from hpo.execute.engines.in_process import InProcess
from hpo.execute.engines.ray_cluster import Cluster, RayOptions
from hpo.execute.process import RunEnd
from hpo.execute.subscribers import Events, Watcher
from hpo.execute.subscribers.model_retention import ModelRetention
from hpo.execute.subscribers.tracking import Tracking
from hpo.execute.supervisor import Supervisor
from hpo.execute.tracking_queue import TrackingQueue
from hpo.execute.workdir import WorkdirCleanup
from hpo.home import Home
from hpo.records import SplitCard
from hpo.relocation import relocate
from hpo.search.lifecycle import open_study
from hpo.search.study import Study
from kept_study import make_kept_study
from shared import shared


@pytest.fixture
def run_formula(tmp_path: Path):
    """run(spec, trainer=..., ...) -> Run, on one storage for the length of the test."""
    studies: list[Study] = []

    def run(
        spec=None,
        *,
        trainer=formula,
        trials=None,
        deadline=float("inf"),
        engine=None,
        watch=None,
        interrupted=None,
        profile=False,
        subscribers=None,
        retry_failed=False,
    ):
        spec = spec or formula_spec()
        for earlier in studies:
            earlier.close()
        study = open_study(Home.find(tmp_path).create(), spec, data_digest=CARD.digest)
        studies.append(study)
        study.reap()
        retried = retry_failed and study.retry_failed() > 0
        seen: list[Event] = []
        end = RunEnd(deadline)
        end.interrupted = interrupted or end.interrupted
        events, queue, tracker = Events(), TrackingQueue(), RecordedTracker()
        if subscribers is None:
            tracking = Tracking(tracker, queue, spec, emit=events.emit)
            retention = ModelRetention(tracker, queue, None, spec, work=tmp_path / "work", data=CARD, emit=events.emit)
            cleanup = WorkdirCleanup(tmp_path / "work", study)
            cleanup(StudyOpened(study.result(), CARD, SplitCard({}, {}), 0, 0, workers=1, device="cpu"))
            watchers = [Watcher(seen.append), *([Watcher(watch)] if watch else [])]
            subscribers = [tracking, retention, cleanup, *watchers]
        events.subscribe_first(*subscribers)
        supervisor = Supervisor(
            spec,
            study,
            engine or InProcess(trainer=trainer),
            data=CARD,
            work=tmp_path / "work",
            events=events,
            budget=trials or spec.search.trials,
            end=end,
            profile=profile,
            retried=retried,
        )
        try:
            reason = supervisor.run()
        finally:
            queue.close()
        return Run(reason, study, seen, tracker)

    yield run
    for study in studies:
        study.close()


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A real Ray of four cores; its node's data lie in a folder that the supervisor's process does not use."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("HPO_DATA", str(tmp_path_factory.mktemp("node")))
        patch.setattr("hpo.execute.engines.ray_cluster.cores", lambda: 4)
        started = Cluster(RayOptions(cpus_per_trial=0.5))
    yield started
    started.close()


@pytest.fixture(scope="session")
def kept_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a study that has run: four trials, their runs, two models, one of them registered."""
    made = shared(tmp_path_factory, "kept", lambda folder: make_kept_study(Home.find(folder).create()))
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("kept") / "project"))


@pytest.fixture
def kept(kept_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Home:
    """A copy of it, in order."""
    for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HPO_DATA", str(kept_template / "data"))
    shutil.copytree(kept_template / "mlruns", tmp_path / "kept" / "mlruns")
    home = Home.find(tmp_path / "kept")
    relocate(home)
    for copy in home.root.glob("mlflow.db.before-*"):
        copy.unlink()
    return home
