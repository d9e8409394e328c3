"""The JSON Schema of a study file."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from typing import Any

from hpo.spec.space import Part
from hpo.spec.study import StudySpec


def study_schema() -> dict[str, Any]:
    """The JSON Schema of a study file, by which editors complete and check it; a field's docstring describes it.

    pydantic can read those docstrings, but at each import, which doubles the time that the import takes.
    """
    tree = StudySpec.model_json_schema()
    # The name of a file is the name of its study.
    tree["required"] = [key for key in tree["required"] if key != "name"]
    for part in _parts(Part):
        fields = (tree if part is StudySpec else tree["$defs"].get(part.__name__, {})).get("properties", {})
        for owner in part.__mro__:
            for name, words in _docstrings(owner.__module__).get(owner.__name__, {}).items():
                if name in fields:
                    fields[name].setdefault("description", words)
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **tree, "title": "hpo study"}


def _parts(kind: type[Part]) -> Iterator[type[Part]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _parts(below)


@cache
def _docstrings(module: str) -> dict[str, dict[str, str]]:
    """Class -> field -> the string below it, of one of our modules."""
    if not module.startswith("hpo."):
        return {}
    found: dict[str, dict[str, str]] = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            fields = found.setdefault(node.name, {})
            for field, below in pairwise(node.body):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(below, ast.Expr)
                    and isinstance(below.value, ast.Constant)
                    and isinstance(below.value.value, str)
                ):
                    fields[field.target.id] = inspect.cleandoc(below.value.value)
    return found
