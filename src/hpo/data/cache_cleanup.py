"""What lies in the cache and is of use to none of some studies."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.data.prepare import cache_folder, models_folder

# The kinds of networks that stand on others, whose features of a data set are kept.
_STANDING = ("torchvision", "timm", "fusion", "transfer")


def unused(digests: Collection[str], specs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """(kind, file or folder) of what studies on data with these digests, and with these specs, do not use.

    Features are told apart by what networks and data they are of, in a key that does not show which: they count as used
    while any of the studies stands on a pretrained network. Downloads stay: they may be hard to get again.
    """
    root = cache_folder()
    used = {digest.removeprefix("sha256:")[:32] for digest in digests}
    folders = (path for path in (root / "prepared").glob("*") if path.is_dir() and path.name != "index")
    yield from (("prepared data", path) for path in sorted(folders) if path.name not in used)
    for entry in sorted((root / "prepared" / "index").glob("*.json")):
        if _digest(entry).removeprefix("sha256:")[:32] not in used:
            yield "index", entry
    models = [spec.get("model") or {} for spec in specs]
    if not any(model.get("kind") in _STANDING for model in models):
        yield from (("features", path) for path in sorted((root / "features").glob("*")) if path.is_dir())
    named = {str(model.get("from_model")).removeprefix("models:/") for model in models}
    yield from (("network", path) for path in sorted(models_folder().glob("*")) if path.name not in named)


def _digest(entry: Path) -> str:
    """Of the data that an entry of the index leads to; "" for a damaged one."""
    try:
        return str(json.loads(entry.read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError):
        return ""
