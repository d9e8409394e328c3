"""Folders of a cache that are there whole or not at all, and are known to be as they were written."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any


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
