"""A network of the caller's own, given as an object, as the `model` of a study file."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hpo.errors import SpecError

_HEAD = "# Written by hpo.run_study from the code that defines {name} in a notebook or script; do not edit.\n"
_GIVEN = ("image_shape", "classes")  # by hpo itself
_PLAIN = (int, float, str, bool, bytes, tuple, list, dict, type(None))


def model_place(model: Callable[..., Any], place: Mapping[str, Any], *, name: str) -> dict[str, Any]:
    """The `model` of a study file that names the object; place is what the study says of it, such as its options.

    model is a function or class, called as model(image_shape=..., classes=..., **options) to build an nn.Module, or a
    functools.partial of one, whose keywords are options. Defaults of its signature are options, too, so that they can
    be searched. An object of a module is named by it. One of a notebook or a script is written to a module in the
    working directory, with what it uses, because workers and later runs import it. Raises SpecError.
    """
    given = dict(model.keywords) if isinstance(model, functools.partial) else {}
    target = model.func if isinstance(model, functools.partial) else model
    title = getattr(target, "__name__", "")
    if not callable(target) or not title.isidentifier() or "." in getattr(target, "__qualname__", "."):
        raise SpecError(
            f"model: {target!r} is no function or class of a module.",
            "Give a function or class with a name, defined at the top level, that builds the network.",
        )
    module = target.__module__ if target.__module__ != "__main__" else _module_of(target, name)
    defaults = {
        key: each.default
        for key, each in inspect.signature(target).parameters.items()
        if key not in _GIVEN and each.default is not inspect.Parameter.empty and isinstance(each.default, _PLAIN)
    }
    return {"kind": f"{module}:{title}", "options": {**defaults, **place.get("options", {}), **given}}


def _module_of(target: Any, name: str) -> str:
    """The name of a module in the working directory with the code of an object of __main__, written if necessary."""
    module = re.sub(r"\W", "_", f"{name}_model")
    file, head = Path.cwd() / f"{module}.py", _HEAD.format(name=target.__name__)
    parts: dict[str, str] = {}
    _collect(target, parts)
    text = head + "\n".join([*sorted(line for line in parts.values() if "\n" not in line), ""])
    text += "".join(f"\n\n{part}" for part in parts.values() if "\n" in part)
    before = file.read_text(encoding="utf-8") if file.is_file() else head
    if not before.startswith(head.partition(" from ")[0]):
        raise SpecError(f"{file}: is there already, and not of hpo.run_study.", "Rename the study or that file.")
    if before != text:
        file.write_text(text, encoding="utf-8")
        sys.modules.pop(module, None)  # in this process, an earlier version may be imported
        importlib.invalidate_caches()
    return module


def _collect(target: Any, parts: dict[str, str]) -> None:
    """Add the source of a function or class of __main__, and of all that it uses, by name; what it uses first."""
    title = target.__name__
    if title in parts:
        return
    try:
        source = inspect.getsource(target)
    except (OSError, TypeError):
        raise SpecError(
            f"model: the code of {title} is not found.",
            "Write it to a file, such as my_networks.py, and import it.",
        ) from None
    parts[title] = ""  # it may use itself
    space = vars(sys.modules["__main__"])
    for word in dict.fromkeys(re.findall(r"[A-Za-z_]\w*", source)):
        if word != title and word in space and word not in parts:
            _add_used(word, space[word], parts)
    parts.pop(title)
    parts[title] = source.rstrip() + "\n"


def _add_used(word: str, value: Any, parts: dict[str, str]) -> None:
    if isinstance(value, types.ModuleType):
        parts[word] = f"import {value.__name__} as {word}"
    elif getattr(value, "__module__", None) == "__main__" and isinstance(value, type | types.FunctionType):
        _collect(value, parts)
    elif isinstance(value, type | types.FunctionType | types.BuiltinFunctionType) and value.__module__:
        parts[word] = f"from {value.__module__} import {value.__name__} as {word}"
    elif isinstance(value, _PLAIN) and not word.startswith("_"):
        parts[word] = f"{word} = {value!r}"
