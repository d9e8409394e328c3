"""What tests of several rooms share."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from postgres import Server, binaries, server


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
