"""What tests of several rooms share."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from postgres import Server, binaries, server
from shared import shared


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

    prepare(DataSpec(name="digits"), SplitSpec(kind="holdout"), cache=folder / "data")


@pytest.fixture(scope="module")
def digits_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for HPO_DATA in which the digits lie prepared."""
    digits = shared(tmp_path_factory, "digits", _prepare_digits)
    return Path(shutil.copytree(digits / "data", tmp_path_factory.mktemp("digits") / "cache"))


@pytest.fixture(scope="module")
def card(digits_cache: Path):
    """The prepared digits."""
    from hpo.data.prepare import prepare
    from hpo.spec.study import DataSpec, SplitSpec

    return prepare(DataSpec(name="digits"), SplitSpec(kind="holdout"), cache=digits_cache)
