"""Whatever a study file holds, reading it ends soon: with a valid study, or with one error that names a place."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.errors import SpecError
from hpo.spec.files import study_files
from hpo.spec.load import dump_study, load_study
from hpo.spec.study import StudySpec

FILES = sorted(study_files().values())
TREES = [yaml.safe_load(file.read_text(encoding="utf-8")) for file in FILES]
QUICK = settings(
    max_examples=60, deadline=timedelta(seconds=10), suppress_health_check=list(HealthCheck), derandomize=True
)
LONG = settings(QUICK, max_examples=10_000, deadline=timedelta(seconds=30), derandomize=False)

WORDS = st.sampled_from(
    [
        *("mlp", "cnn", "convnet", "resnet", "timm", "fusion", "transfer", "official", "kfold", "none", "all", "float"),
        *("int", "choice", "log", "when", "stages", "groups", "valid_accuracy", "maximize", "models:/m-0", "best:3"),
        *("os:system", "a.b.c", "~", "\x00", "\u202e", "\ud7ff", "\udcff", "\U0001f600", "\u00e9"),
    ]
)
NUMBERS = st.one_of(
    st.integers(),
    st.floats(),
    st.sampled_from([0, -1, 1, 2**31, 2**63, 10**400, -(10**400), 1e308, 5e-324, float("inf"), float("nan"), True]),
)
LEAVES = st.one_of(st.none(), st.booleans(), NUMBERS, WORDS, st.text(max_size=20), st.dates(), st.binary(max_size=9))
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.one_of(WORDS, st.text()), inner)),
    max_leaves=8,
)


def places(tree: Any, stem: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value in a tree of mappings and lists."""
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield (*stem, key)
        yield from places(value, (*stem, key))


@st.composite
def mutated(draw: st.DrawFn) -> Any:
    """A study of the platform in which a few places are dropped, renamed, swapped or filled with something else."""
    tree = copy.deepcopy(draw(st.sampled_from(TREES)))
    for _ in range(draw(st.integers(1, 4))):
        known = list(places(tree))
        if not known:
            break
        *stem, last = draw(st.sampled_from(known))
        node = tree
        for key in stem:
            node = node[key]
        match draw(st.sampled_from(["drop", "fill", "rename", "copy", "wrap"])):
            case "drop":
                del node[last]
            case "rename" if isinstance(node, dict):
                node[draw(st.one_of(WORDS, st.text(max_size=9), st.integers()))] = node.pop(last)
            case "copy":
                node[last] = copy.deepcopy(draw(st.sampled_from(list(tree.values()) or [0])))
            case "wrap":
                node[last] = [node[last]]
            case _:
                node[last] = draw(VALUES)
    return tree


def ends_well(text: str | bytes, folder: Path) -> StudySpec | None:
    """The study in a file of that text; None where it is refused in one line that names the file and a next step."""
    file = folder / "fuzzed.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "surrogatepass"))
    return read(file, said="fuzzed")


def read(study: str | Path, *, said: str = "", overrides: tuple[str, ...] = ()) -> StudySpec | None:
    """The study; None where it is refused in one line that says so and gives a next step."""
    refused: SpecError | None = None
    try:
        return load_study(study, overrides=overrides, trust=True)
    except SpecError as error:
        refused = error
    assert said in refused.message
    assert "\n" not in refused.message
    assert len(refused.message) < 3000
    assert refused.hint
    return None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def check_mutated(tree: Any, folder: Path) -> None:
    spec = ends_well(yaml.dump(tree, allow_unicode=True, sort_keys=False), folder)
    if spec is not None:
        # What is valid can be written, read again, and counted.
        (folder / "again.yaml").write_text(dump_study(spec), encoding="utf-8")
        assert load_study(folder / "again.yaml", trust=True) == spec
        spec.search.space.size(spec.fixed())
        spec.identity()


def check_changed_bytes(data: st.DataObject, folder: Path) -> None:
    raw = bytearray(data.draw(st.sampled_from(FILES)).read_bytes())
    for _ in range(data.draw(st.integers(1, 6))):
        start = data.draw(st.integers(0, len(raw)))
        end = start + data.draw(st.integers(0, 40))
        raw[start:end] = data.draw(st.one_of(st.binary(max_size=30), st.sampled_from(ODD_PIECES)))
    ends_well(bytes(raw), folder)


ODD_PIECES = [b"&a ", b"*a", b"!!python/object/apply:os.abort []", b"<<: ", b"? ", b"- ", b"\t", b"[" * 40, b"{" * 40]
ODD_PIECES += [
    b"---\n",
    b"...\n",
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x85",
    "\u2028".encode(),
    b"1_0:0:0",
    b"0o777",
    b"!!set ",
]


@QUICK
@given(tree=mutated())
def test_a_changed_study_is_valid_or_refused_at_a_place(tree: Any, folder: Path) -> None:
    check_mutated(tree, folder)


@QUICK
@given(data=st.data())
def test_a_study_with_changed_bytes_is_valid_or_refused_at_a_place(data: st.DataObject, folder: Path) -> None:
    check_changed_bytes(data, folder)


@QUICK
@given(text=st.one_of(st.binary(max_size=200), st.text(max_size=200)))
def test_any_bytes_are_refused_at_a_place(text: str | bytes, folder: Path) -> None:
    assert ends_well(text, folder) is None


@QUICK
@given(place=st.text(st.sampled_from("abz.0_[]"), max_size=12), value=st.text(max_size=30))
def test_any_override_is_taken_or_refused_at_a_place(place: str, value: str) -> None:
    for text in (f"{place}={value}", f"model.{place}={value}", f"search.space.{place}={value}"):
        read("digits-mlp", overrides=(text,))


LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 10)}]\n" for level in range(1, 12)
)
SEARCH = "data: {name: digits}\nsplit: {kind: holdout}\nmodel: {kind: 'a:b', options: {w: 1}}\nsearch:"
THOUSANDS = ", ".join(f"model.options.{number}: {{int: [1, 2]}}" for number in range(2000))
ODD = {
    "deep list": "data: " + "[" * 5000,
    "deep mapping": "data: " + "{a: " * 5000,
    "deep blocks": "\n".join(f"{' ' * depth}a:" for depth in range(3000)),
    "closed deep list": f"model: {'[' * 400}{']' * 400}",
    "a billion laughs": LAUGHS,
    "laughs where a place is": LAUGHS + "model: *a11\ndata: *a11\n",
    "a loop": "data: &a {name: digits, groups: *a}\nmodel: &b [*b]\n",
    "a huge number": f"seed: {'9' * 100_000}",
    "a huge base sixty": f"seed: {':'.join(['59'] * 20_000)}",
    "a huge exponent": "training: {epochs: 1e999999999}",
    "a long key": f"{'k' * 100_000}: 1",
    "a long text": f"question: {'q' * 1_000_000}",
    "many keys": "\n".join(f"k{number}: 1" for number in range(20_000)),
    "merges": "a: &a {x: 1}\n<<: [*a, *a]\n",
    "python tags": "name: !!python/object/apply:os.system ['exit 1']",
    "a date as a key": "2020-01-01: 1",
    "a list as a key": "[1, 2]: 1",
    "nothing": "",
    "zeros": "\x00" * 1000,
    "utf-16": "name: x".encode("utf-16"),
    "a range without end": f"{SEARCH} {{space: {{model.options.w: {{int: [1, 1{'0' * 400}]}}}}}}",
    "a range beyond all floats": f"{SEARCH} {{space: {{model.options.w: {{float: [-1.7e308, 1.7e308]}}}}}}",
    "a step of nearly nothing": f"{SEARCH} {{space: {{training.optimizer.lr: {{float: [0, 1], step: 5.0e-324}}}}}}",
    "trials without end": f"{SEARCH} {{trials: 1{'0' * 400}, space: {{model.options.w: {{int: [1, 5]}}}}}}",
    "more trials than are counted": f"{SEARCH} {{trials: 1000000001, space: {{model.options.w: {{int: [1, 5]}}}}}}",
    "half a character": f'question: "\\uD800"\n{SEARCH} {{space: {{model.options.w: {{int: [1, 5]}}}}}}',
    "thousands of parameters": f"{SEARCH} {{space: {{{THOUSANDS}}}}}",
    "two documents": "name: a\n---\nname: b\n",
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_odd_files_are_refused_soon(text: str | bytes, folder: Path) -> None:
    assert ends_well(text, folder) is None


@pytest.mark.long
@LONG
@given(tree=mutated())
def test_ten_thousand_changed_studies(tree: Any, folder: Path) -> None:
    check_mutated(tree, folder)


@pytest.mark.long
@LONG
@given(data=st.data())
def test_ten_thousand_studies_with_changed_bytes(data: st.DataObject, folder: Path) -> None:
    check_changed_bytes(data, folder)
