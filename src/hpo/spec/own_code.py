"""Code of the user's own: found, trusted, imported, as metrics; and fingerprints of code and weights."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import io
import os
import re
import sys
import tokenize
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, cast

from hpo.errors import SpecError, TrainingError
from hpo.home import plain_file
from hpo.metrics import Metric, find_metric, name_of
from hpo.spec.study import StudySpec

_PROSE = ("name", "question", "references")  # parts of a study that are only read by people
_LIBRARY = ("optuna.samplers:", "optuna.pruners:")  # nobody's own code: making one of these does no harm
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
    """Every package.module:function in the parts of a study or a setup, but for prose and Optuna's own classes."""
    texts = {text for part in tree if part not in _PROSE for text in _texts(tree[part])}
    measured = {text for part in ("training", "search") for text in _texts(tree.get(part))}
    scores = {text: match[1] for text in measured if (match := _OWN_SCORE.fullmatch(text)) and is_function(match[1])}
    functions = {text for text in texts - scores.keys() if is_function(text)} | set(scores.values())
    return sorted(name for name in functions if not name.startswith(_LIBRARY))


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
            f"{what}: {dotted!r} is no name of a function.", "Write package.module:function, in letters, digits and _."
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


_PARTS = ("model", "training", "search", "final")  # data is compared by its pixels
_LIBRARIES = ("torch", "torchvision", "timm", "numpy")
_NO_FILES = ("imagenet", "none")
_LAYOUT = (tokenize.NL, tokenize.COMMENT, tokenize.ENCODING, tokenize.ENDMARKER)


def content_of(spec: StudySpec) -> dict[str, Any]:
    """Fingerprints of a study, as plain data: `functions`, `files` (name -> SHA-256) and `libraries` (name -> version).

    functions are those that the study names outside of its data, each with all modules of the same folder or package
    that it imports; files are weights and whatever else it names. What is not there has no fingerprint: its training
    says so.
    """
    tree = spec.model_dump(mode="json")
    parts = {part: tree.get(part) for part in _PARTS} | {"search": _without_samplers(tree["search"])}
    functions = {name: _source_digest(name) for name in named_functions(parts)}
    files = {text: _file_digest(Path(text)) for text in sorted(set(_texts(parts))) if _names_file(text)}
    return {
        "functions": {name: digest for name, digest in functions.items() if digest},
        "files": {name: digest for name, digest in files.items() if digest},
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


def _without_samplers(search: Mapping[str, Any]) -> dict[str, Any]:
    """A search without its samplers and its pruner, which may change while it goes on."""
    kept = {key: value for key, value in search.items() if key not in ("sampler", "pruner")}
    stages = [{key: value for key, value in stage.items() if key != "sampler"} for stage in search.get("stages", ())]
    return {**kept, "stages": stages}


def content_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two fingerprints of a study in words; what only one of them knows is not compared."""
    changes = []
    for kind, words in (("functions", "the code of {}"), ("files", "the content of {}")):
        old, new = before.get(kind, {}), now.get(kind, {})
        changes += [
            f"{words.format(name)}: {old[name][:12]} -> {new[name][:12]}"
            for name in old
            if name in new and old[name] != new[name]
        ]
    old, new = before.get("class_names") or [], now.get("class_names") or []
    if old and new and list(old) != list(new):
        changes.append(f"class names: {', '.join(old)} -> {', '.join(new)}")
    return changes


def library_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Libraries whose versions differ, in words; "" where none does."""
    old, new = before.get("libraries", {}), now.get("libraries", {})
    return ", ".join(f"{name} {old[name]} -> {new[name]}" for name in old if name in new and old[name] != new[name])


def with_digests(tree: Any, files: Mapping[str, str]) -> Any:
    """Plain data with the fingerprint of each file in place of its path, so that a file that has moved is the same."""
    if isinstance(tree, Mapping):
        return {key: with_digests(value, files) for key, value in tree.items()}
    if isinstance(tree, list):
        return [with_digests(value, files) for value in tree]
    return files.get(tree, tree) if isinstance(tree, str) else tree


def _source_digest(function: str) -> str:
    """SHA-256 over the code of a function's module and of the user's own modules that it imports; "" without one."""
    module, _ = split_function(function) or ("", "")
    file = module_file(function)
    if file is None or file.suffix != ".py":
        return _file_digest(file) if file is not None else ""
    root = file.parents[module.count(".") + (file.name == "__init__.py")]
    digest = hashlib.sha256()
    for name, source in sorted(_own_modules(module, root).items()):
        digest.update(f"{name} {len(source)}\n".encode() + source)
    return digest.hexdigest()


def _own_modules(first: str, root: Path) -> dict[str, bytes]:
    """Code by name of a module, its packages and all that they import from the folder root, without layout.

    Of an installed package only its own modules count: the versions of others are not the user's edits.
    """
    top = first.partition(".")[0]
    installed = "site-packages" in root.parts or "dist-packages" in root.parts
    found: dict[str, bytes] = {}
    waiting = [first]
    while waiting:
        name = waiting.pop()
        parents = [name.rpartition(".")[0]] if "." in name else []
        waiting += [parent for parent in parents if parent not in found]
        file = module_file(f"{name}:x")
        if name in found or file is None or file.suffix != ".py" or not _belongs(file, root):
            continue
        if installed and name.partition(".")[0] != top:
            continue
        try:
            text = file.read_bytes()
        except OSError:
            continue
        found[name] = _without_layout(text)
        package = name if file.name == "__init__.py" else name.rpartition(".")[0]
        waiting += [other for other in _imports(text, package) if other not in found]
    return found


def _belongs(file: Path, root: Path) -> bool:
    return file.is_relative_to(root) and not {"site-packages", "dist-packages"} & set(file.relative_to(root).parts)


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Names that may be modules, of every import in a source, wherever in it."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            stem = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                stem = ".".join([*above, *([stem] if stem else [])])
            if stem:
                yield stem
                yield from (f"{stem}.{alias.name}" for alias in node.names if alias.name != "*")


def _without_layout(source: bytes) -> bytes:
    """The words of a Python source: comments, empty lines and spaces within a line make no difference."""
    try:
        tokens = [token for token in tokenize.tokenize(io.BytesIO(source).readline) if token.type not in _LAYOUT]
    except (tokenize.TokenError, SyntaxError, ValueError):
        return source
    words = {tokenize.INDENT: "<indent>", tokenize.DEDENT: "<dedent>", tokenize.NEWLINE: "<line>"}
    return "\0".join(words.get(token.type, token.string) for token in tokens).encode(errors="surrogatepass")


def _names_file(text: str) -> bool:
    """True for what reads like the name of a file, rather than like a word that a file might be named by chance."""
    return text not in _NO_FILES and "://" not in text and (os.sep in text or bool(Path(text).suffix))


def _file_digest(file: Path) -> str:
    """SHA-256 of a file's content; "" for what is no file, or cannot be read."""
    try:
        with plain_file(file.expanduser()).open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
