"""The cache of prepared data: folders that are there whole or not at all, and what no study uses any more."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.home import cache_folder


def models_folder() -> Path:
    """The folder of registered models that other networks start from, each in a folder named by its id."""
    return cache_folder() / "models"


def intact(folder: Path) -> bool:
    """Whether every file has the size and the time of its writing: cheap, and no write leaves both alone."""
    try:
        written: Mapping[str, Any] = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        return written == _stamps(folder)
    except (OSError, ValueError):
        return False


def _stamps(folder: Path) -> dict[str, list[int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have write fill an empty folder, then put it in place at once: a reader finds all of it or nothing.

    The caller holds a lock on folder.parent; what is there already is damaged, and replaced.
    """
    for abandoned in folder.parent.glob(".making-*"):
        shutil.rmtree(abandoned)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    write(made)
    write_text(made / "files.json", json.dumps(_stamps(made)))
    made.chmod(0o755)  # mkdtemp makes folders that only their owner reads
    if folder.exists():
        shutil.rmtree(folder)
    made.replace(folder)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


# The kinds of networks that start from others, whose features of a data set are kept.
_PRETRAINED = ("torchvision", "timm", "fusion", "transfer")


def unused(digests: Collection[str], specs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """(kind, file or folder) of what studies on data with these digests, and with these specs, do not use.

    The key of features, a digest, does not show their network and data: they count as used
    while any of the studies starts from a pretrained network. Downloads stay: they may be hard to get again.
    """
    root = cache_folder()
    used = {digest.removeprefix("sha256:")[:32] for digest in digests}
    folders = (path for path in (root / "prepared").glob("*") if path.is_dir() and path.name != "index")
    yield from (("prepared data", path) for path in sorted(folders) if path.name not in used)
    for entry in sorted((root / "prepared" / "index").glob("*.json")):
        if _digest(entry).removeprefix("sha256:")[:32] not in used:
            yield "index", entry
    models = [spec.get("model") or {} for spec in specs]
    if not any(model.get("kind") in _PRETRAINED for model in models):
        yield from (("features", path) for path in sorted((root / "features").glob("*")) if path.is_dir())
    named = {str(model.get("from_model")).removeprefix("models:/") for model in models}
    yield from (("network", path) for path in sorted(models_folder().glob("*")) if path.name not in named)


def _digest(entry: Path) -> str:
    """Of the data that an entry of the index leads to; "" for a damaged one."""
    try:
        return str(json.loads(entry.read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError):
        return ""
