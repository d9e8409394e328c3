"""A tracking store of each kind, a study tracked on it, and models registered from it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest

import tiny_study as tiny
from hpo.database import server_address
from hpo.home import Home
from hpo.records import ModelVersion, StudyResult, Trial, TrialState
from hpo.tracking import runs
from hpo.tracking.store import connect
from hpo.tracking.tracker import Tracker
from tracking_fixtures import tracking_server

_NUMBERS = count()


@dataclass(frozen=True)
class Store:
    """A tracking store, and the folder that has its artifacts."""

    home: Home
    artifacts: Path

    def files(self) -> set[Path]:
        return {path for path in self.artifacts.rglob("*") if path.is_file()}


SERVERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("postgresql", "server")]


@pytest.fixture(scope="module", params=["embedded", *SERVERS])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, template: Path) -> Iterator[Store]:
    place = tmp_path_factory.mktemp(request.param)
    with ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        patch.chdir(place)  # MLflow keeps the artifacts of a database in the working directory
        home = Home.at(place).create()
        if request.param == "embedded":
            shutil.copyfile(template, home.root / "mlflow.db")
            yield Store(home, home.artifacts)
        elif request.param == "postgresql":
            database = request.getfixturevalue("postgres").make(f"mlflow{next(_NUMBERS)}")
            yield Store(replace(home, tracking_uri=server_address(database)), home.root)
        else:
            uri = stack.enter_context(tracking_server(template, place / "server"))
            yield Store(replace(home, tracking_uri=uri), place / "server")


@dataclass(frozen=True)
class Tracked:
    """A study of its own in the store, open."""

    store: Store
    name: str
    tracker: Tracker

    @property
    def home(self) -> Home:
        return self.store.home

    def study(self, *trials: Trial) -> StudyResult:
        return tiny.study(*trials, name=self.name)

    def open(self) -> Tracker:
        tracker = Tracker(self.home)
        tracker.open_study(self.study(), tiny.spec(self.name), tiny.data(), tiny.split())
        return tracker

    def start(self, number: int, epochs: int) -> None:
        candidate = tiny.candidate(number)
        setup = tiny.spec(self.name).with_values(candidate.parameters)
        self.tracker.start_trial(candidate, setup, worker="w0")
        self.tracker.log_epochs(number, tiny.epochs(epochs))

    def track(self, number: int, state: TrialState = TrialState.COMPLETE, **changes: Any) -> None:
        self.start(number, 3)
        self.tracker.end_trial(tiny.result(number, state, **changes))

    def parent(self) -> Any:
        return runs.find_parent(connect(self.home), self.study())

    def runs(self) -> dict[str, Any]:
        """Number of a trial -> its run."""
        return {run.data.tags["hpo.trial"]: run for run in runs.children(connect(self.home), self.parent())}

    def run(self, number: int) -> Any:
        return self.runs()[str(number)]

    def history(self, number: int, metric: str) -> list[Any]:
        found = connect(self.home).get_metric_history(self.run(number).info.run_id, metric)
        return sorted(found, key=lambda one: one.step)


@pytest.fixture
def tracked(store: Store) -> Tracked:
    name = f"tiny{next(_NUMBERS)}"
    tracked = Tracked(store, name, Tracker(store.home))
    tracked.tracker.open_study(tracked.study(), tiny.spec(name), tiny.data(), tiny.split())
    return tracked


@pytest.fixture
def register(tracked: Tracked, folder: Path) -> Callable[[int], ModelVersion]:
    def register(number: int) -> ModelVersion:
        tracked.track(number)
        tracked.tracker.keep_model(number, folder)
        return tracked.tracker.register(tracked.study(), number)

    return register


Register = Callable[[int], ModelVersion]
