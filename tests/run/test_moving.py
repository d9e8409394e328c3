"""Studies moved between stores: all of them, once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from kept_study import go_on, stored
from whole_study import whole

from hpo.home import Home
from hpo.run.moving import export_study, import_study


def test_whole(kept: Home, tmp_path: Path) -> None:
    file = tmp_path / "formula.zip"
    print(export_study("formula", home=kept.root.parent, file=file))
    other = Home.find(tmp_path / "other")
    print(import_study(file, home=other.root.parent))
    a, b = whole(kept, stored(kept)), whole(other, stored(other))
    for key in a:
        assert a[key] == b[key]
    print(import_study(file, home=other.root.parent))
    assert whole(other, stored(other)) == a
