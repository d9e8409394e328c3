"""Write docs/reference.md and src/hpo/spec/places.txt, every key of a study file: python docs/make_reference.py."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hpo.spec.files import PLACES
from hpo.spec.schema import study_schema
from hpo.spec.space import MOST

PAGE = Path(__file__).with_name("reference.md")
_INTRO = """\
# Reference of the study file

Every key, made from the schema that `hpo schema` prints: `python docs/make_reference.py` writes this page. What the
parts are for is told in [the study file](study-file.md). Headings are the places that `--set` and the search space
name. Keys that are not listed are refused, and so are counts beyond 10^9.
"""
Node = dict[str, Any]


def reference() -> str:
    """The whole page as Markdown."""
    schema = study_schema()
    parts: Node = schema["$defs"]
    headings = dict(_headings(schema, "", parts, {}))
    sections = [_section("A study", schema, schema, headings)]
    sections += [_section(heading, parts[name], schema, headings) for name, heading in headings.items()]
    return "\n".join([_INTRO, *sections])


def _headings(node: Node, place: str, parts: Node, seen: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Name in the schema -> heading of each part, in the order of the file; a part is described where it first is."""
    for name in _references(node):
        if name in seen:
            continue
        part = parts[name]
        if "properties" in part:
            seen[name] = heading = _heading(part, place)
            yield name, heading
        yield from _headings(part, place, parts, seen)
    for key, value in node.get("properties", {}).items():
        yield from _headings(value, f"{place}.{key}".removeprefix("."), parts, seen)


def places() -> str:
    """Every place of a study file, one a line: what --set takes, and what a misspelt key is compared with."""
    schema = study_schema()
    return "".join(f"{place}\n" for place in sorted(set(_places(schema, "", schema["$defs"], ()))))


def _places(node: Node, above: str, parts: Node, around: tuple[str, ...]) -> Iterator[str]:
    for name in _references(node):
        if name not in around:  # a fusion is made of models
            yield from _places(parts[name], above, parts, (*around, name))
    for key, value in node.get("properties", {}).items():
        yield (place := f"{above}.{key}".removeprefix("."))
        yield from _places(value, place, parts, around)


def _references(node: Node) -> list[str]:
    """The parts that a value may be, itself, as an item of a list or as a value of a mapping."""
    found = [node["$ref"].rpartition("/")[2]] if "$ref" in node else []
    for option in [*node.get("anyOf", ()), *node.get("oneOf", ()), node.get("items"), node.get("additionalProperties")]:
        found += _references(option) if isinstance(option, dict) else []
    return found


def _heading(part: Node, place: str) -> str:
    kind = part["properties"].get("kind", {})
    if "const" in kind or "pattern" in kind:
        return f"{place}, kind: {kind.get('const', 'package.module:function')}"
    # The parameters of a space are told apart by their first key.
    form = next((key for key in ("float", "int", "choice") if key in part["properties"]), "")
    return f"{place}, {form}" if form else place


def _section(heading: str, part: Node, schema: Node, headings: dict[str, str]) -> str:
    lines = [f"## {heading}", ""]
    if heading != "A study" and "description" in part:
        lines += [part["description"], ""]
    for key, value in sorted(part["properties"].items(), key=lambda pair: pair[0] != "kind"):
        default = "**required**" if key in part.get("required", ()) else _default(value)
        meaning = " ".join(value.get("description", "").split())
        lines.append(f"- `{key}`: {_type(value, schema, headings)}; {default}." + (f" {meaning}" if meaning else ""))
    return "\n".join([*lines, ""])


def _default(value: Node) -> str:
    if "default" not in value and value.get("type") == "string":
        return "may be left out"
    default = value.get("default", [] if value.get("type") == "array" else {})
    if isinstance(default, dict) and default:
        return "default as there"
    return f"default `{default if isinstance(default, str) and default else json.dumps(default)}`"


def _type(value: Node, schema: Node, headings: dict[str, str]) -> str:
    """What a value may be, in words."""
    options = value.get("anyOf") or value.get("oneOf")
    if options:
        return _listed([_type(option, schema, headings) for option in options])
    if "$ref" in value:
        name = value["$ref"].rpartition("/")[2]
        return _link(headings[name]) if name in headings else _type(schema["$defs"][name], schema, headings)
    if "const" in value or "enum" in value:
        return _listed([f"`{option}`" for option in value.get("enum", [value.get("const")])])
    kind = value.get("type")
    if kind == "array" and "prefixItems" in value:
        return "[" + ", ".join(_type(item, schema, headings) for item in value["prefixItems"]) + "]"
    if kind == "array":
        return f"list of ({_type(value.get('items', {}), schema, headings)})"
    if kind == "object":
        inner = value.get("additionalProperties")
        return f"mapping to ({_type(inner, schema, headings)})" if isinstance(inner, dict) else "mapping"
    words = {"integer": "whole number", "boolean": "true or false", "string": "text", None: "anything"}
    return words.get(kind, str(kind)) + _range(value)


def _listed(words: list[str]) -> str:
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _range(value: Node) -> str:
    """Bounds as an interval, or as one comparison: in [0, 1); ≥ 1."""
    low, high = value.get("minimum", value.get("exclusiveMinimum")), value.get("maximum", value.get("exclusiveMaximum"))
    if low is not None and high not in (None, MOST):
        return f" in {'[' if 'minimum' in value else '('}{low}, {high}{']' if 'maximum' in value else ')'}"
    return f" {'≥' if 'minimum' in value else '>'} {low}" if low is not None else ""


def _link(heading: str) -> str:
    anchor = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
    return f"[{heading}](#{anchor})"


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
    PLACES.write_text(places(), encoding="utf-8")
