"""Code that a study names runs unasked only where the file, or a stored study's code, lies in the working directory."""

from __future__ import annotations

import contextlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.data.prepare import prepare
from hpo.errors import HpoError, SpecError
from hpo.spec.load import load_study, parse_study
from hpo.spec.own_code import check_stored, is_function, module_file, named_functions

runner = CliRunner()
STUDY = """
data: {name: %s}
split: {kind: holdout}
model: {kind: %s}
search: {objective: valid_accuracy, trials: 1, space: {training.optimizer.lr: {float: [1.0e-3, 1.0e-2]}}}
"""
TRAP = "from pathlib import Path\nPath({trap!r}).touch()\ndef build(**options):\n    raise ValueError\n"


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path, Path]:
    """Working directory, a folder elsewhere on the module path, and the file that importing code from it makes."""
    here, away, trap = tmp_path / "here", tmp_path / "away", tmp_path / "trap"
    for folder in (here, away):
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "__init__.py").write_text(TRAP.format(trap=str(trap)))
        (folder / "deep" / "nets.py").write_text(TRAP.format(trap=str(trap)))
    (here / "deep").rename(here / "mine")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(away)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    return here, away, trap


def study(folder: Path, *, data: str = "digits", model: str = "mlp") -> Path:
    file = folder / "own.yaml"
    file.write_text(STUDY % (data, model), encoding="utf-8")
    return file


@pytest.mark.parametrize("names", [{"data": "deep.nets:build"}, {"model": "deep.nets:build"}])
@pytest.mark.parametrize("words", [["run"], ["check"], ["preview"], ["data", "show"]], ids=" ".join)
def test_a_study_from_elsewhere_imports_nothing_unasked(
    folders: tuple[Path, Path, Path], words: list[str], names: dict[str, str]
) -> None:
    _, away, trap = folders
    result = runner.invoke(app, [*words, str(study(away, **names))])
    assert result.exit_code == 2
    assert f"deep.nets:build ({away / 'deep' / 'nets.py'})" in result.stderr
    assert "--trust" in result.stderr
    assert not trap.exists()
    assert "deep" not in sys.modules


@pytest.mark.parametrize("words", [["check"], ["preview"], ["data", "show"]], ids=" ".join)
def test_trust_lets_it_run(folders: tuple[Path, Path, Path], words: list[str]) -> None:
    _, away, trap = folders
    result = runner.invoke(app, [*words, str(study(away, data="deep.nets:build")), "--trust"])
    assert "the function fails: ValueError" in result.stderr
    assert trap.exists()
    for name in ("deep", "deep.nets"):
        sys.modules.pop(name)


def test_studies_of_the_working_directory_and_plain_ones_need_no_trust(folders: tuple[Path, Path, Path]) -> None:
    here, away, _ = folders
    assert load_study(study(here, model="deep.nets:build")).model.kind == "deep.nets:build"
    assert load_study(study(away)).model.kind == "mlp"
    assert load_study("digits-mlp").model.kind == "mlp"


def test_looking_at_a_study_from_elsewhere_needs_no_trust(folders: tuple[Path, Path, Path]) -> None:
    _, away, trap = folders
    result = runner.invoke(app, ["show", str(study(away, model="deep.nets:build"))])
    assert result.exit_code == 0
    assert "deep.nets:build" in result.stdout
    assert not trap.exists()


def test_a_link_into_the_working_directory_is_a_file_from_elsewhere(folders: tuple[Path, Path, Path]) -> None:
    here, away, _ = folders
    (here / "own.yaml").symlink_to(study(away, model="mine.nets:build"))
    with pytest.raises(SpecError, match="--trust"):
        load_study("own.yaml")


@pytest.mark.parametrize(
    "change",
    [
        {"search": {"space": {"model.kind": {"choice": ["a.b:c"]}}}},
        {"final": {"set": {"model.kind": "a.b:c"}}},
        {"search": {"start": [{"data.name": "a.b:c"}]}},
        {"data": {"name": "a.b:c"}},
    ],
)
def test_a_function_is_found_wherever_a_study_may_name_it(change: dict[str, Any]) -> None:
    assert named_functions(change) == ["a.b:c"]
    assert (
        named_functions({"question": "a:b", "keep": {"models": "best:3"}, "model": {"from_model": "models:/m/1"}}) == []
    )


def test_a_stored_study_is_judged_by_where_its_code_lies(folders: tuple[Path, Path, Path]) -> None:
    here, _, trap = folders
    plain = load_study(study(here)).model_dump(mode="json")
    for name, right in {"mine.nets:build": True, "deep.nets:build": False, "os:system": False, "gone:x": False}.items():
        stored = {**plain, "data": {**plain["data"], "name": name}}
        assert parse_study(stored, trust=True).data.name == name
        if right:
            parse_study(stored)
        else:
            with pytest.raises(SpecError, match=f"outside the working directory: {name} .*--trust"):
                parse_study(stored)
    assert not trap.exists()


def test_the_file_of_a_module_is_found_without_importing_it(folders: tuple[Path, Path, Path]) -> None:
    here, away, trap = folders
    assert module_file("deep.nets:build") == away / "deep" / "nets.py"
    assert module_file("mine:build") == here / "mine" / "__init__.py"
    assert module_file("sys:exit") is None
    assert module_file("..:x") is None
    assert not trap.exists()


PIECES = ["evilmod", "f", ":", ":", ".", " ", "/", "\\", "\u00e9", "\u2024", "\uff1a", "x1"]
ODD = ["evilmod:f:x", "evilmod:f ", "evilmod:f/g", "evilmod: f", " evilmod:f", "evilmod:", "evilmod::f", "evilmod:f\n"]


@pytest.fixture
def evil(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder elsewhere with a module that makes itself known when it is imported; importing starts from scratch."""
    here, away = tmp_path / "here", tmp_path / "away"
    for folder in (here, away):
        folder.mkdir()
    (away / "evilmod.py").write_text("def f(**options):\n    raise ValueError\n")
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(away)
    monkeypatch.setenv("HPO_DATA", str(tmp_path / "data"))
    monkeypatch.delitem(sys.modules, "evilmod", raising=False)
    return away


@pytest.mark.parametrize("place", ["data", "model"])
@pytest.mark.parametrize("name", ODD)
def test_a_name_that_is_nearly_a_function_imports_nothing(evil: Path, name: str, place: str) -> None:
    file = study(evil, **{place: json.dumps(name)})
    result = runner.invoke(app, ["check", str(file)])
    assert result.exit_code == 2
    assert "evilmod" not in sys.modules
    assert "own.yaml:" in result.stderr  # told when the file is loaded


def check_name(evil: Path, name: str) -> None:
    """What is not seen by the question of trust is not loaded either, from a file, a stored study or a setup."""
    from hpo.spec.own_code import load_function

    tree = load_study("digits-mlp").model_dump(mode="json")
    for part, key in (("data", "name"), ("model", "kind"), ("training", "loss"), ("search", "score")):
        stored = {**tree, part: {**tree[part], key: name}}
        if named_functions(stored):
            with pytest.raises(SpecError, match="--trust"):
                check_stored(stored, trust=False, origin="a store")
            assert is_function(name)
        else:
            with pytest.raises(SpecError, match="is no name of a function"):
                load_function(name, what="data")
    file = study(evil, data=json.dumps(name))
    with contextlib.suppress(HpoError):
        spec = load_study(file)
        prepare(spec.data, spec.split)
    assert "evilmod" not in sys.modules


NAMES = st.lists(st.sampled_from(PIECES)).map("".join)
FEW = settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FEW
@given(name=NAMES)
def test_nothing_is_imported_without_trust_whatever_its_name_looks_like(evil: Path, name: str) -> None:
    check_name(evil, name)


@pytest.mark.slow
@settings(FEW, max_examples=1000)
@given(name=NAMES)
def test_nothing_is_imported_without_trust_of_a_thousand_names(evil: Path, name: str) -> None:
    check_name(evil, name)
