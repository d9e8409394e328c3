"""The text of a study file that is written for the user, with the reason of each part above it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml


@dataclass(frozen=True)
class Decision:
    """One choice of a new study, and the reason."""

    subject: str
    choice: str
    reason: str


_ABOUT = {
    "data": ("size",),
    "split": ("validation", "groups", "near-duplicates"),
    "model": ("network",),
    "training": ("augmentation",),
    "search": ("objective", "search"),
    "final": ("final",),
}
_FLAT = ("data", "split", "final")


def study_text(tree: dict[str, Any], decisions: Sequence[Decision], title: str) -> str:
    """The text of a study file, with the reason of each part above it."""
    lines = [f"# Written by hpo new ({title}); change what you know better.", "question: Which class is an image of?"]
    for part in ("data", "split", "task", "model", "training", "search", "final"):
        if part not in tree:
            continue
        told = [each for each in decisions if each.subject in _ABOUT.get(part, ())]
        lines += [f"# {each.subject}: {each.choice}: {each.reason}" for each in told]
        value = tree[part]
        if part in _FLAT or not isinstance(value, dict):
            lines.append(f"{part}: {_flow(value)}")
            continue
        lines.append(f"{part}:")
        for key, item in value.items():
            deep = part == "search" and key in ("space", "start")
            lines += [f"  {key}:", *_below(item)] if deep else [f"  {key}: {_flow(item)}"]
    return "\n".join([*lines, ""])


def _below(item: Any) -> list[str]:
    if isinstance(item, dict):
        return [f"    {key}: {_flow(value)}" for key, value in item.items()]
    return [f"    - {_flow(value)}" for value in item]


def _flow(value: Any) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip().replace("{'on':", "{on:")  # YAML 1.1 would take it for true
