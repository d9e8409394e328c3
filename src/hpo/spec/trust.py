"""Which code of others a study would import, where it lies, and whether it may run without being asked for."""

from __future__ import annotations

import importlib.machinery
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hpo.errors import SpecError

_PROSE = ("name", "question", "references")  # parts of a study that are only read by people
_OWN_SCORE = re.compile(r" *valid_([^<>\s]+)(?: *[<>]=.*)?")  # as an objective, a monitor or in a constraint


def split_function(text: str) -> tuple[str, str] | None:
    """package.module:function as (module, function); None for any other text, which is never imported.

    This is the only reading of such a name: what loads a function and what asks for trust must agree on it.
    """
    module, colon, function = text.partition(":")
    if not colon or not all(map(str.isidentifier, [*module.split("."), function])):
        return None
    return module, function


def is_function(text: str) -> bool:
    """True for package.module:function."""
    return split_function(text) is not None


def named_functions(tree: Mapping[str, Any]) -> list[str]:
    """Every package.module:function in the parts of a study or a setup, but for those that are prose."""
    texts = {text for part in tree if part not in _PROSE for text in _texts(tree[part])}
    measured = {text for part in ("training", "search") for text in _texts(tree.get(part))}
    scores = {text: match[1] for text in measured if (match := _OWN_SCORE.fullmatch(text)) and is_function(match[1])}
    return sorted({text for text in texts - scores.keys() if is_function(text)} | set(scores.values()))


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
