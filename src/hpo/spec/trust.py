"""Which code of others a study would import, where it lies, and whether it may run without being asked for."""

from __future__ import annotations

import importlib.machinery
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpo.errors import SpecError

_PARTS = ("data", "model", "training", "search", "final")
_FUNCTION = re.compile(r"[^\s:/\\]+:[^\s:/\\]+")
_OWN_SCORE = re.compile(r"valid_([^\s:/\\]+:[^\s:/\\<>]+)(?: *[<>]=.*)?")  # as an objective, a monitor or a constraint


def named_functions(tree: Mapping[str, Any]) -> list[str]:
    """Whatever reads like package.module:function in the parts of a study or a setup that name code of others."""
    texts = {text for part in _PARTS for text in _texts(tree.get(part))}
    scores = {match[1] for text in texts if (match := _OWN_SCORE.fullmatch(text.strip()))}
    return sorted({text for text in texts if _FUNCTION.fullmatch(text) and not _OWN_SCORE.fullmatch(text)} | scores)


def module_file(function: str) -> Path | None:
    """The file of the module that package.module:function names; nothing is imported to find it.

    None for what is compiled into Python, and for what is not there.
    """
    name = function.partition(":")[0]
    loaded = getattr(sys.modules.get(name), "__file__", None)
    if loaded:
        return Path(loaded).absolute()
    here = str(Path.cwd())
    places: list[str] | None = sys.path if {here, ""} & set(sys.path) else [*sys.path, here]
    stem, spec = "", None
    for key in name.split("."):
        # Level by level: importlib.util.find_spec would import the packages above.
        stem = f"{stem}.{key}" if stem else key
        try:
            spec = importlib.machinery.PathFinder.find_spec(stem, places)
        except (ImportError, ValueError, OSError):
            return None
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or ())
    return Path(spec.origin).absolute() if spec is not None and spec.origin else None


def is_inside(file: Path) -> bool:
    """Whether a file lies in the working directory; what is installed there does not count."""
    whole = file.resolve()
    return whole.is_relative_to(Path.cwd().resolve()) and "site-packages" not in whole.parts


def check_stored(tree: Mapping[str, Any], *, trust: bool, origin: str) -> None:
    """Refuse a stored study or setup that names code from outside the working directory. Raises SpecError.

    tree is a spec or a setup as plain data; origin says where it was stored. trust=True allows everything.
    """
    foreign = [name for name in named_functions(tree) if (file := module_file(name)) is None or not is_inside(file)]
    if foreign and not trust:
        raise _refusal(origin, foreign, "code from outside the working directory")


def check_file(tree: Mapping[str, Any], file: Path, *, trust: bool) -> None:
    """Refuse a study file from outside the working directory that names code, wherever that lies. Raises SpecError."""
    functions = named_functions(tree)
    if functions and not trust and not is_inside(file):
        raise _refusal(str(file), functions, "code, and the file lies outside the working directory")


def _refusal(origin: str, functions: list[str], what: str) -> SpecError:
    listed = ", ".join(f"{name} ({module_file(name) or 'its file is not found'})" for name in functions)
    return SpecError(
        f"{origin}: names {what}: {listed}.",
        "Read that code, then allow it: --trust (in Python: trust=True). Or work in the folder that it lies in.",
    )


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _texts(value)
            yield from _texts(key)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _texts(value)
