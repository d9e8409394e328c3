"""A home has databases of its own, whatever its folder is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from hpo.database import sqlite_address, sqlite_file
from hpo.errors import StoreError
from hpo.home import Home

NAMES = ["plain", "p q", "p%20q", "what?", "a?b=c", "h#sh", "100%", "%3F", "b{x}", "semi;colon", "ü", "at@colon:x"]


@pytest.mark.parametrize("name", NAMES)
def test_an_address_leads_to_the_file_that_it_was_made_of(tmp_path, name):
    home = Home.at(tmp_path / name).create()
    assert sqlite_file(home.storage_url) == home.root / "optuna.db"
    assert home.embedded
    assert not home.shared
    engine = create_engine(home.storage_url)
    with engine.begin() as connection:
        connection.execute(text("CREATE TABLE t (x INTEGER)"))
    engine.dispose()
    assert (home.root / "optuna.db").is_file()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert not (home.root / "mlflow.db").exists()


@pytest.mark.parametrize("name", [b"h\xff", b"a\nb", b"\x1b]0;x\x07"])
def test_a_folder_whose_name_is_no_text_is_refused_before_anything_is_written(tmp_path, name):
    folder = tmp_path / os.fsdecode(name)
    with pytest.raises(StoreError, match="is no text that can be printed"):
        Home.at(folder).create()
    assert not folder.exists()


def test_no_two_homes_share_an_address(tmp_path):
    homes = [Home.at(tmp_path / name) for name in NAMES]
    assert len({home.storage_url for home in homes} | {home.tracking_uri for home in homes}) == 2 * len(NAMES)


def test_the_address_of_a_plain_path_is_what_stores_have_written():
    assert sqlite_address(Path("/a/p q/optuna.db")) == "sqlite:////a/p q/optuna.db"
