"""Functions of the user's own, named in a study file as package.module:function."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from hpo.errors import SpecError
from hpo.spec.trust import split_function


def load_function(dotted: str, *, what: str) -> Callable[..., Any]:
    """The function that package.module:function names; what is "model" or "data". Raises SpecError without one."""
    parts = split_function(dotted)
    if parts is None:
        raise SpecError(
            f"{what}: {dotted!r} is no name of a function.",
            "Write package.module:function, in letters, digits and _.",
        )
    module_name, name = parts
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        # The hpo command, unlike python -m, does not look for modules in the working directory.
        sys.path.append(str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise SpecError(
            f"{what} {dotted}: there is no module {error.name!r}.",
            f"Put it in the working directory ({Path.cwd()}) or install it, and check its name.",
        ) from error
    except Exception as error:
        raise SpecError(
            f"{what} {dotted}: importing {module_name} fails: {type(error).__name__}: {error}.",
            f"Mend it until this works: python -c 'import {module_name}'",
        ) from error
    function = getattr(module, name, None)
    if not callable(function):
        known = ", ".join(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise SpecError(
            f"{what} {dotted}: {module_name} has no function {name!r}.", f"It has: {known or 'none'}. Correct the name."
        )
    return cast("Callable[..., Any]", function)
