"""Code of the user's own that a study names: where it lies, whether it may run, and its functions as metrics."""

from __future__ import annotations

import importlib
import importlib.machinery
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from hpo.errors import SpecError, TrainingError
from hpo.metrics import Metric, find_metric, name_of

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


_OF_LABELS = ("recall[", "precision[", "f1[")  # also where an image has several labels


def requested(scores: Iterable[str], class_names: Sequence[str], *, several: bool = False) -> tuple[Metric, ...]:
    """The metrics among scores (valid_mcc, ...) that are not computed anyway. several: of images with several labels.

    Raises SpecError where one does not fit the classes, or where the function of one is not found.
    """
    found: dict[str, Metric] = {}
    for score in scores:
        metric = find_metric(name_of(score), class_names)
        if metric is not None and metric.on_request:
            if several and ":" not in metric.name and not metric.name.startswith(_OF_LABELS):
                raise SpecError(
                    f"score {metric.name}: not defined for images with several labels.",
                    "Take recall[LABEL], precision[LABEL], f1[LABEL], a function of your own, or a usual score.",
                )
            own = metric.from_counts is None and metric.from_logits is None
            found[metric.name] = _with_function(metric) if own else metric
    return tuple(found.values())


def _with_function(metric: Metric) -> Metric:
    load_function(metric.name, what="score")
    return replace(metric, from_logits=partial(own_score, name=metric.name))


def own_score(logits: Any, labels: Any, *, name: str) -> Any:
    """The answer of package.module:function to (probabilities (n, classes), labels) as NumPy arrays; higher is better.

    Raises TrainingError where it fails or answers no number.
    """
    function = load_function(name, what="score")
    probabilities = logits.double().sigmoid() if labels.ndim == 2 else logits.double().softmax(1)
    try:
        value = float(function(probabilities.cpu().numpy(), labels.cpu().numpy()))
    except Exception as error:
        raise TrainingError(
            f"score {name}: the function fails: {type(error).__name__}: {error}.",
            f"Call it with probabilities of shape {tuple(probabilities.shape)} and labels {tuple(labels.shape)}.",
        ) from error
    return logits.double().new_tensor(value)
