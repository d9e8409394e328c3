"""The private parts of Optuna that hpo depends on: they are as we know them, and only one file uses them."""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Iterator
from pathlib import Path

import optuna
from optuna.storages import RDBStorage

import hpo
from hpo.storage.optuna_private import PRIVATE_PARTS

ROOMS = ("search", "storage")


def test_every_private_part_of_optuna_is_there_and_takes_what_we_pass():
    lacking = []
    for owner, name, arguments in PRIVATE_PARTS:
        part = f"{owner.__name__}.{name}"
        if arguments is None:
            lacking += [] if hasattr(_instance(owner), name) else [part]
        elif not hasattr(owner, name):
            lacking.append(part)
        else:
            parameters = inspect.signature(getattr(owner, name)).parameters
            lacking += [f"{part}({argument})" for argument in arguments if argument not in parameters]
    assert not lacking, f"Optuna {optuna.__version__} has moved or renamed: {', '.join(lacking)}"


def _instance(owner: type) -> object:
    if owner is optuna.trial.FrozenTrial:
        return optuna.trial.create_trial(value=0.0)
    if owner is optuna.pruners.HyperbandPruner:
        return owner()
    assert owner is optuna.trial.Trial
    return optuna.create_study().ask()


def test_the_database_has_the_session_and_the_engine_that_transactions_need(tmp_path):
    storage = RDBStorage(f"sqlite:///{tmp_path / 'optuna.db'}")
    storage.scoped_session.registry.clear()
    assert storage.scoped_session() is storage.scoped_session()
    storage.scoped_session.remove()
    storage.engine.dispose()


def test_no_other_file_uses_private_parts_of_optuna():
    source = Path(hpo.__file__).parent
    files = [path for room in ROOMS for path in (source / room).glob("*.py") if path.name != "optuna_private.py"]
    assert [use for path in files for use in private_uses(path)] == []


def private_uses(path: Path) -> list[str]:
    """`file:line name` of each private attribute, method or module of Optuna that the file uses."""
    return [f"{path.name}:{line} {name}" for line, name in _private_names(ast.parse(path.read_text(encoding="utf-8")))]


def _private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    optuna_names = _names_in_optuna()
    own = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_self(node)
    }
    own |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    derived = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef) and node.bases]
    overridden = {part for node in derived for part in node.body if isinstance(part, ast.FunctionDef)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("optuna"):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            yield from ((node.lineno, name) for name in names if name.startswith("_"))
        name = getattr(node, "attr", None) or (node.name if node in overridden else "")
        if not name.startswith("_") or name.startswith("__") or name not in optuna_names:
            continue
        if node in overridden or not (_is_self(node) and name in own):
            yield node.lineno, name


def _is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self"


@functools.cache
def _names_in_optuna() -> set[str]:
    """The private names of attributes and methods in Optuna's source."""
    names = set()
    for path in Path(optuna.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = getattr(node, "attr", None) or (node.name if isinstance(node, ast.FunctionDef) else "")
            names |= {name} if name.startswith("_") else set()
    return names
