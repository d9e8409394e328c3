"""Write docs/python.md, the Python API, from signatures and docstrings: python docs/make_python.py."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hpo
from hpo.api.optuna_callback import OptunaCallback
from hpo.api.study import Plots, Study
from hpo.predict import Classifier

PAGE = Path(__file__).with_name("python.md")
_INTRO = """\
# Python API

`import hpo` has the functions below; `python docs/make_python.py` writes this page from their docstrings. The [recipes
in Python](recipes.md) show them in use, and the [notebooks](notebooks.md) with their outputs.

All user errors are `hpo.HpoError`, with `message` and `hint`.
"""
_EARLIER = "load_study"  # the earlier name of load_spec
# Title -> the class that its functions return, whose public members are described.
_CLASSES = {"Study": Study, "Study.plot": Plots, "Classifier": Classifier, "OptunaCallback": OptunaCallback}


def python_page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRO, "## Functions\n"]
    for name in hpo.__all__:
        function = getattr(hpo, name)
        if inspect.isfunction(function) and name != _EARLIER:
            parts += _described(f"hpo.{name}", function)
    for title, described in _CLASSES.items():
        parts += [f"## {title}\n", f"{inspect.getdoc(described)}\n"]
        for name, member in vars(described).items():
            second_name = inspect.isfunction(member) and member.__name__ != name
            shown = inspect.isfunction(member) or isinstance(member, property)
            if shown and not name.startswith("_") and not second_name:
                parts += _described(f"{title}.{name}", member)
    return "\n".join(parts)


def _described(title: str, member: Any) -> Iterator[str]:
    """The heading, the signature of a function, and the docstring."""
    yield f"### {title}\n"
    if inspect.isfunction(member):
        parameters = [part for part in inspect.signature(member).parameters.values() if part.name != "self"]
        shown = str(inspect.Signature(parameters, return_annotation=inspect.signature(member).return_annotation))
        yield re.sub(r"(?<!')'([^']+)'(?!')", r"\1", f"```python\n{title}{shown}\n```\n")
    yield f"{inspect.getdoc(member)}\n"


if __name__ == "__main__":
    PAGE.write_text(python_page(), encoding="utf-8")
