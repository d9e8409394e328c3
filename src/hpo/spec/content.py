"""Fingerprints of what decides a trial's result and is not written in its study file: code, weights, libraries.

The pixels and labels have a digest of their own (DataCard.digest). Everything here is a fingerprint of content: where a
file lies and when it was written make no difference.
"""

from __future__ import annotations

import ast
import hashlib
import io
import os
import tokenize
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from hpo.spec.own_code import module_file, named_functions, split_function
from hpo.spec.study import StudySpec

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
    parts = {part: tree.get(part) for part in _PARTS}
    functions = {name: _source_digest(name) for name in named_functions(parts)}
    files = {text: _file_digest(Path(text)) for text in sorted(set(_texts(parts))) if _names_file(text)}
    return {
        "functions": {name: digest for name, digest in functions.items() if digest},
        "files": {name: digest for name, digest in files.items() if digest},
        "libraries": {name: found for name in _LIBRARIES if (found := _version(name))},
    }


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
    inside = file.relative_to(root).parts if file.is_relative_to(root) else None
    if inside is None:
        return False
    return not {"site-packages", "dist-packages"} & set(inside)


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


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, Mapping | list):
        for value in tree.values() if isinstance(tree, Mapping) else tree:
            yield from _texts(value)


def _names_file(text: str) -> bool:
    """True for what reads like the name of a file, rather than like a word that a file might be named by chance."""
    return text not in _NO_FILES and "://" not in text and (os.sep in text or bool(Path(text).suffix))


def _file_digest(file: Path) -> str:
    """SHA-256 of a file's content; "" for what is no file, or cannot be read."""
    try:
        with file.expanduser().open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except (OSError, ValueError):
        return ""


def _version(library: str) -> str:
    try:
        return version(library)
    except PackageNotFoundError:
        return ""
