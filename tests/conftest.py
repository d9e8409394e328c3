"""What tests of several rooms share."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgres import Server, binaries, server
from shared import shared

# Of `uv run pytest`: hpo would name its commands as those of a terminal in which `uv run` started it.
os.environ.pop("UV_RUN_RECURSION_DEPTH", None)

# The files that take longest, in order: begun first, so that no worker is left with one at the end.
LONGEST = ("test_main_job.py", "test_promote.py", "test_report.py", "test_rerun.py", "test_compare.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(name) if (name := item.path.name) in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def postgres() -> Iterator[Server]:
    """A real PostgreSQL server; skipped where it is not installed, which CI does not allow."""
    if binaries() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    with server({"fsync": "off"}) as started:
        yield started


@pytest.fixture
def database(postgres: Server) -> str:
    """The address of a new database."""
    return postgres.make(f"d{uuid.uuid4().hex}")


def _prepare_digits(folder: Path) -> None:
    from hpo.data.prepare import prepare
    from hpo.spec.study import DataSpec, SplitSpec

    prepare(DataSpec(name="digits"), SplitSpec(kind="holdout"), cache=folder / "elsewhere")
    # A cache remembers its path: no copy is to lead back to the original, which all tests share.
    (folder / "elsewhere").rename(folder / "data")


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for HPO_DATA in which the digits lie prepared."""
    digits = shared(tmp_path_factory, "digits", _prepare_digits)
    cache = Path(shutil.copytree(digits / "data", tmp_path_factory.mktemp("digits") / "cache"))
    # To trace a network anew takes seconds.
    (cache / "programs").symlink_to(shared(tmp_path_factory, "programs", lambda folder: None), True)
    return cache


@pytest.fixture(scope="module")
def card(digits_cache: Path):
    """The prepared digits."""
    from hpo.data.prepare import prepare
    from hpo.spec.study import DataSpec, SplitSpec

    return prepare(DataSpec(name="digits"), SplitSpec(kind="holdout"), cache=digits_cache)


def _make_stores(folder: Path) -> None:
    from hpo.home import Home
    from hpo.storage.optuna_storage import open_storage
    from hpo.tracking.store import connect

    home = Home.at(folder).create()
    connect(home)
    open_storage(home).close()


@pytest.fixture(scope="session")
def empty_stores(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with empty stores: copying them takes a tenth of the time of making them."""
    return shared(tmp_path_factory, "stores", _make_stores)


FINISHED = {
    "training.epochs": 2,
    "training.precision": "float32",
    "search.pruner": "none",
    "search.sampler": "random",
    "model.hidden": 8,
    "keep.figures": "none",
    "search.space": {"model.dropout": {"float": [0.0, 0.5]}},
}


@pytest.fixture(scope="module")
def finished(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run of digits-mlp: two trials, their models, one of them registered, and `data`."""

    def make(folder: Path) -> None:
        from hpo.execute.run_study import run_study
        from hpo.spec.load import load_study

        shutil.copytree(digits_cache, folder / "elsewhere")
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HPO_DATA", str(folder / "elsewhere"))
            patch.setenv("OMP_NUM_THREADS", "1")
            patch.chdir(folder)
            run_study(load_study("digits-mlp", overrides=FINISHED), trials=2, workers=0, home=folder)
        # No test is to find the images by the path that the study remembers: they may be damaged in a copy.
        (folder / "elsewhere").rename(folder / "data")

    made = shared(tmp_path_factory, "finished", make)
    return Path(shutil.copytree(made, tmp_path_factory.mktemp("finished") / "project"))
