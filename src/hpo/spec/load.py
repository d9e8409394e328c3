"""A study's name or path, and overrides of its places, to a validated StudySpec."""

from __future__ import annotations

import copy
import itertools
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml
from pydantic import ValidationError

from hpo.errors import SpecError
from hpo.home import plain_file
from hpo.spec.agreement import conflicts
from hpo.spec.files import SHIPPED, find_study, similar_key
from hpo.spec.models import FAMILIES
from hpo.spec.own_code import check_file, check_stored
from hpo.spec.study import StudySpec, means_null, set_place

_TAGS = (*FAMILIES, "own", "float", "int", "choice", "root")  # in pydantic's places, and not in a file
_DOTTED = (("search", "space"), ("final", "set"))  # places whose keys are places
_MOST_FAULTS = 10  # that one message tells
_MOST_BYTES, _MOST_VALUES = 1_000_000, 50_000  # of a study file: a hundred times what the longest has


class _Fault(NamedTuple):
    """What is wrong at a place: keys lead to it in the file, () is the whole study."""

    keys: tuple[str, ...]
    message: str
    hint: str


class StudyLoader(yaml.SafeLoader):
    """Safe YAML that refuses a key given twice, reads 1e-3 as a number, and on, off, yes and no as words."""


def _mapping(loader: StudyLoader, node: yaml.MappingNode) -> dict[Any, Any]:
    seen: set[Any] = set()
    for key_node, _ in node.value:
        key = loader.construct_object(key_node)
        if not isinstance(key, str):
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not text", key_node.start_mark)
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return loader.construct_mapping(node, deep=True)


def _number(loader: StudyLoader, node: yaml.ScalarNode) -> int:
    number: int = loader.construct_yaml_int(node)
    if abs(number) >= 2**63:
        raise yaml.constructor.ConstructorError(
            None, None, "a whole number beyond 2^63 cannot be stored", node.start_mark
        )
    return number


def _text(loader: StudyLoader, node: yaml.ScalarNode) -> str:
    text = str(loader.construct_scalar(node))
    if any(sign == "\0" or "\ud800" <= sign <= "\udfff" for sign in text):
        problem = f"{_short(text)} has a character that cannot be stored"
        raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
    return text


StudyLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)
StudyLoader.add_constructor("tag:yaml.org,2002:int", _number)
StudyLoader.add_constructor("tag:yaml.org,2002:str", _text)
# A spec is stored as JSON, which has none of these; a date is read as the text that it is.
for _tag in ("binary", "timestamp", "set", "omap", "pairs"):
    del StudyLoader.yaml_constructors[f"tag:yaml.org,2002:{_tag}"]
StudyLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag.rpartition(":")[2] not in ("bool", "timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
# As YAML 1.2 has it: `final: {on: all}` is a place of the study file, and a class may be called no.
StudyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
# YAML 1.1, which PyYAML follows, wants a dot in the mantissa and a sign in the exponent: 1e-3 would be text.
StudyLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _ShippedLoader(getattr(yaml, "CSafeLoader", StudyLoader)):  # type: ignore[misc]
    """The same, ten times as fast, for the files that ship: libyaml overflows the stack where others nest deeply."""

    yaml_constructors = StudyLoader.yaml_constructors
    yaml_implicit_resolvers = StudyLoader.yaml_implicit_resolvers


def load_study(
    study: str | Path | Mapping[str, Any], *, overrides: Mapping[str, Any] | Iterable[str] = (), trust: bool = False
) -> StudySpec:
    """Read, override and validate a study.

    study is a name (`digits-mlp`), the path of a YAML file, or the content of one as a mapping. overrides are dotted
    paths with values, as a mapping or as texts `training.epochs=5` whose values are read as YAML; they apply in order.
    Raises SpecError, whose message names the file, the line, the place, the value and the next step.
    """
    own = isinstance(study, Mapping)
    path = Path(str(study.get("name", "study"))) if isinstance(study, Mapping) else find_study(study)
    again = "then: hpo.load_spec(...)" if own else f"then: hpo check {shlex.quote(str(study))}"
    tree, node = (copy.deepcopy(dict(study)), None) if isinstance(study, Mapping) else read_yaml(path)
    _anchor_paths(tree, path.parent)
    pairs = overrides.items() if isinstance(overrides, Mapping) else map(_parse_override, overrides)
    set_places: list[str] = []
    for place, value in pairs:
        _override(tree, place, value)
        set_places.append(place)
    _anchor_paths(tree, Path())
    tree.setdefault("name", path.stem)
    try:
        spec = StudySpec.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, tree, path, node, set_places, again) from None
    if found := conflicts(spec):
        raise _refusal([_Fault(one.keys, one.message, f"Correct it, {again}") for one in found], path, node, set_places)
    if own:
        check_stored(tree, trust=trust, origin=spec.name)
    elif path.parent not in SHIPPED:
        check_file(tree, path, trust=trust)
    return spec


def parse_study(tree: Mapping[str, Any], *, trust: bool = False) -> StudySpec:
    """A StudySpec from plain data that was stored with its study. Raises SpecError.

    One that names functions from outside the working directory is refused unless trust is True: because the user
    allows them, or because the caller imports nothing.
    """
    try:
        spec = StudySpec.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, tree, Path(str(tree.get("name", "study"))), None, [], "") from None
    check_stored(tree, trust=trust, origin=spec.name)
    return spec


def override_study(tree: Mapping[str, Any], overrides: Iterable[str], *, trust: bool = False) -> StudySpec:
    """As parse_study, with overrides such as `data.path=images.npz`, which are read as those of load_study."""
    changed = copy.deepcopy(dict(tree))
    for place, value in map(_parse_override, overrides):
        _override(changed, place, value)
    _anchor_paths(changed, Path())
    return parse_study(changed, trust=trust)


def dump_study(spec: StudySpec) -> str:
    """A spec as the text of a study file, every default written out."""
    tree = spec.model_dump(mode="json")
    tree["search"]["space"] = spec.search.space.model_dump(mode="json", exclude_defaults=True)
    return str(yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100, default_flow_style=None))


def small_text(path: Path) -> str:
    """The text of a file, which may be anybody's. Raises ValueError where it has more than 1 MB, OSError."""
    if plain_file(path).stat().st_size > _MOST_BYTES:
        raise ValueError(f"it has more than {_MOST_BYTES:,} bytes")
    return path.read_text(encoding="utf-8")


def read_yaml(path: Path) -> tuple[dict[str, Any], yaml.Node | None]:
    """A mapping and its nodes from a file, which may be anybody's: plain values, of bounded size. Raises SpecError."""
    try:
        loader = (_ShippedLoader if path.parent in SHIPPED else StudyLoader)(small_text(path))
        node = loader.get_single_node()
        _check_size(node)
        tree = loader.construct_document(node) if node is not None else None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpecError(f"{path}:{line}: {error.problem}.", "Mend the YAML there.") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise SpecError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}.", "Mend the file.") from None
    except OSError as error:
        raise SpecError(f"{path}: cannot be read: {error.strerror}.", "Check the file and its permissions.") from None
    if not isinstance(tree, dict):
        raise SpecError(
            f"{path}: a study is a mapping with data, model, search.", "See a whole one: hpo show digits-mlp"
        )
    return tree, node


def _check_size(node: yaml.Node | None) -> None:
    """Refuse what a few lines of YAML can repeat a billion times, or for ever. Raises ValueError."""
    sizes: dict[yaml.Node, int] = {}
    above: set[yaml.Node] = set()

    def size(place: yaml.Node) -> int:
        if place in above:
            raise ValueError("an alias refers to a node that contains it")
        if place not in sizes:
            above.add(place)
            below = place.value if isinstance(place, yaml.CollectionNode) else ()
            sizes[place] = 1 + sum(map(size, itertools.chain(*below) if isinstance(place, yaml.MappingNode) else below))
            above.remove(place)
        return sizes[place]

    if node is not None and size(node) > _MOST_VALUES:
        raise ValueError(f"it has more than {_MOST_VALUES:,} values, aliases counted")


def _anchor_paths(tree: dict[str, Any], folder: Path) -> None:
    """Make the files that a study names independent of the working directory."""
    model = tree.get("model")
    backbones = model.get("backbones") if isinstance(model, dict) else None
    places = [(tree.get("data"), "path"), (model, "weights")]
    places += [(each, "weights") for each in (backbones if isinstance(backbones, list) else [])]
    search = tree.get("search")
    warm = search.get("start_from") if isinstance(search, dict) else None
    if isinstance(warm, dict) and "://" not in str(warm.get("storage")):
        places.append((warm, "storage"))
    for part, key in places:
        if isinstance(part, dict) and isinstance(part.get(key), (str, Path)) and part[key] not in ("imagenet", "none"):
            part[key] = str((folder / Path(part[key]).expanduser()).absolute())


def split_override(text: str) -> tuple[str, str]:
    """The place and the value in a text such as training.epochs=5. Raises SpecError."""
    place, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z_]\w*(\.\w+)*", place.strip()):
        raise SpecError(f"--set {text}: not of the form place=value.", "Write for example: --set training.epochs=5")
    return place.strip(), value


def _parse_override(text: str) -> tuple[str, Any]:
    place, value = split_override(text)
    try:
        loader = StudyLoader(value)
        node = loader.get_single_node()
        _check_size(node)
        return place, loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, RecursionError, ValueError):
        raise SpecError(f"--set {text}: the value is not readable as YAML.", "Quote it.") from None


def _mapping_at(tree: dict[str, Any], key: str) -> dict[str, Any]:
    """The mapping under a key, which is put there where something else is."""
    if not isinstance(tree.get(key), dict):
        tree[key] = {}
    found: dict[str, Any] = tree[key]
    return found


def _override(tree: dict[str, Any], place: str, value: Any) -> None:
    """Like set_place, but the keys of a search space, and of the settings of final trainings, are dotted themselves."""
    above, key = next((each for each in _DOTTED if place.startswith(".".join((*each, "")))), (place, ""))
    if not key:
        set_place(tree, place, value)
        return
    outer = _mapping_at(tree, above)
    entries = _mapping_at(outer, key)
    rest = place.removeprefix(f"{above}.{key}.")
    inside = [entry for entry in entries if rest.startswith(f"{entry}.")]
    if inside and isinstance(entries[inside[0]], dict):
        set_place(entries[inside[0]], rest.removeprefix(f"{inside[0]}."), value)
    else:
        entries[rest] = value


def _explain(
    error: ValidationError, tree: Any, path: Path, node: yaml.Node | None, set_places: list[str], again: str
) -> SpecError:
    """Pydantic's complaints as faults, the first for each place: a union complains once for each of its types."""
    faults: dict[tuple[str, ...], _Fault] = {}
    details = error.errors(include_url=False)
    more = len(details)
    for detail in details:
        if len(faults) >= _MOST_FAULTS:
            break
        more -= 1
        for fault in _faults(detail, tree, node, again):
            faults.setdefault(fault.keys, fault)
    return _refusal(list(faults.values()), path, node, set_places, more=more)


def _faults(detail: Any, tree: Any, node: yaml.Node | None, again: str) -> Iterator[_Fault]:
    message = detail["msg"].removeprefix("Value error, ")
    # pydantic names the types of a union in the path: constrained-int, list[constrained-int].
    keys = [key for key in map(str, detail["loc"]) if "[" not in key and not key.startswith("constrained-")]
    correct = f"Correct it, {again}" if again else ""
    if not keys:
        # A check across the whole study names the places itself, one a line.
        for line in message.splitlines():
            named, _, rest = line.partition(": ")
            inside = named.startswith("search.space.")
            found = _space_keys(named.removeprefix("search.space."), node) if inside else ()
            yield _Fault(found, rest if inside else line, correct)
        return
    # Tags of unions ("mlp", "float") are in pydantic's path but not in the file.
    place = tuple(_locate(keys, node)[0])
    if detail["type"] == "extra_forbidden":
        close = similar_key(place)
        hint = f"Did you mean {close}?" if close else "Remove it, or correct its name."
        yield _Fault(place, f"unknown key {keys[-1]!r}", f"{hint} All keys: hpo schema")
    elif detail["type"] == "missing":
        yield _Fault(place, "is missing", "Add it; a whole study: hpo show digits-mlp")
    elif detail["type"] in ("value_error", "parameter_kind"):
        yield _Fault(place, message, correct)
    else:
        said = f"{message[0].lower()}{message[1:]}, got {_short(detail['input'])}"
        if means_null(detail["input"]) and _takes_null(tree, place):
            said += ". For no value write null"
        yield _Fault(place, said, correct)


def _short(value: Any) -> str:
    try:
        shown = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        return "a number of thousands of digits"
    return shown if len(shown) <= 80 else f"{shown[:77]}..."


def _takes_null(tree: Any, keys: tuple[str, ...]) -> bool:
    """True where null at this place is no fault."""
    changed = copy.deepcopy(tree)
    try:
        set_place(changed, ".".join(keys), None)
        StudySpec.model_validate(changed)
    except ValidationError as error:
        return not any(tuple(map(str, detail["loc"]))[: len(keys)] == keys for detail in error.errors())
    except (SpecError, AttributeError, TypeError):
        return False
    return True


def _refusal(
    faults: list[_Fault], path: Path, node: yaml.Node | None, set_places: list[str], *, more: int = 0
) -> SpecError:
    """One error that names the file, the line and the place of every fault; of many the first ten, and a count."""
    told = [f"{_source(fault, path, node, set_places)}: {fault.message}." for fault in faults[:_MOST_FAULTS]]
    more += len(faults) - len(told)
    if more:
        told.append(f"And {more} more faults.")
    return SpecError(" ".join(told), faults[0].hint)


def _source(fault: _Fault, path: Path, node: yaml.Node | None, set_places: list[str]) -> str:
    keys, line = _locate(list(fault.keys), node)
    place = ".".join(keys) or "study"
    # What is in no file, on the way to a place that was set or below it, --set has brought.
    deeper = any(given.startswith(f"{place}.") for given in set_places) and line is None
    if deeper or any(place == given or place.startswith(f"{given}.") for given in set_places):
        return f"--set: {place}"
    return f"{_shown(path)}:{line}: {place}" if line else f"{_shown(path)}: {place}"


def _space_keys(path: str, node: yaml.Node | None) -> tuple[str, ...]:
    """The place of a searched path in the file: in the search's space, or in that of a stage."""
    search = _child(node, "search")
    stages = _child(search, "stages")
    for index, stage in enumerate(stages.value if isinstance(stages, yaml.SequenceNode) else ()):
        if _child(_child(stage, "space"), path) is not None:
            return "search", "stages", str(index), "space", path
    return "search", "space", path


def _shown(path: Path) -> str:
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)


def _locate(keys: list[str], node: yaml.Node | None) -> tuple[list[str], int | None]:
    """keys without what is not in the file, and the line of the deepest place that is; a missing last key stays."""
    kept: list[str] = []
    line: int | None = None
    for index, key in enumerate(keys):
        below = _child(node, key)
        if below is not None:
            node, line = below, below.start_mark.line + 1
            kept.append(key)
        elif index == len(keys) - 1 or (node is None and key not in _TAGS):
            kept.append(key)
    if len(kept) > 1 and kept[-1] in _TAGS and node is not None:
        kept.pop()
    return kept, line


def _child(node: yaml.Node | None, key: str) -> yaml.Node | None:
    if isinstance(node, yaml.MappingNode):
        pairs = {key_node.value: value_node for key_node, value_node in node.value}
        return pairs.get(key)
    if isinstance(node, yaml.SequenceNode) and key.isdigit() and int(key) < len(node.value):
        return cast(yaml.Node, node.value[int(key)])
    return None
