"""Fingerprints of what decides a result: every change of content changes them, a change of place or time does not."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hpo.spec.load import parse_study
from hpo.spec.own_code import content_changes, content_of, library_changes
from hpo.spec.study import StudySpec

NETS = '''"""A network."""
import math
from helpers.blocks import block
def build(image_shape, classes, width=8):
    return block(width)
'''
BLOCKS = "from . import sizes\ndef block(width):\n    return width * sizes.FACTOR\n"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a network of one's own, made of three modules."""
    folder = tmp_path / "here"
    (folder / "helpers").mkdir(parents=True)
    (folder / "mynets.py").write_text(NETS)
    (folder / "helpers" / "__init__.py").write_text("")
    (folder / "helpers" / "blocks.py").write_text(BLOCKS)
    (folder / "helpers" / "sizes.py").write_text("FACTOR = 3\n")
    (folder / "other.py").write_text("X = 1\n")
    monkeypatch.chdir(folder)
    return folder


def own(**more: Any) -> StudySpec:
    tree: dict[str, Any] = {
        "name": "own",
        "data": {"name": "digits"},
        "split": {"kind": "holdout"},
        "model": {"kind": "mynets:build"},
        "search": {"space": {"training.optimizer.lr": {"float": [0.1, 1.0]}}},
    }
    return parse_study({**tree, **more}, trust=True)


@pytest.mark.parametrize(
    ("file", "before", "after", "changes"),
    [
        ("mynets.py", "width=8", "width=9", True),
        ("mynets.py", "return block(width)", "return block(width + 1)", True),
        ("mynets.py", "    return", "    width += 1\n    return", True),
        ("helpers/blocks.py", "width * sizes", "width + sizes", True),
        ("helpers/sizes.py", "3", "4", True),
        ("helpers/__init__.py", "", "X = 2\n", True),
        ("mynets.py", "import math", "# a remark\n\nimport math  # why", False),
        ("other.py", "1", "2", False),
    ],
)
def test_code_that_a_network_is_made_of_counts_and_other_code_and_remarks_do_not(here, file, before, after, changes):
    old = content_of(own())
    path = here / file
    text = path.read_text()
    path.write_text(text.replace(before, after, 1) if before else after)
    found = content_changes(old, content_of(own()))
    assert bool(found) == changes
    if changes:
        assert found[0].startswith("the code of mynets:build: ")


def test_a_function_that_only_the_space_or_the_final_training_names_counts(here):
    space = {"model.kind": {"choice": ["mynets:build", "helpers.blocks:block"]}}
    spec = own(search={"space": space}, final={"set": {"model.kind": "other:x"}})
    assert set(content_of(spec)["functions"]) == {"mynets:build", "helpers.blocks:block", "other:x"}


def test_code_that_has_moved_or_was_written_again_is_the_same(here, tmp_path, monkeypatch):
    old = content_of(own())
    moved = tmp_path / "moved"
    shutil.copytree(here, moved)
    for file in moved.rglob("*.py"):
        os.utime(file, (1, 1))
    monkeypatch.chdir(moved)
    assert content_of(own()) == old


def weighted(file: Path | str) -> StudySpec:
    return own(model={"kind": "timm", "name": "resnet18", "weights": str(file)})


def fused(file: Path | str) -> StudySpec:
    backbone = {"kind": "timm", "name": "resnet18", "weights": str(file)}
    return own(model={"kind": "fusion", "backbones": [backbone]})


def searched(file: Path | str) -> StudySpec:
    space = {"model.weights": {"choice": ["imagenet", str(file)]}}
    return own(model={"kind": "timm", "name": "resnet18"}, search={"space": space})


def optional(file: Path | str) -> StudySpec:
    return own(model={"kind": "mynets:build", "options": {"start": str(file)}})


@pytest.mark.parametrize("make", [weighted, fused, searched, optional])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_byte_of_a_file_counts_and_its_time_does_not(here, make, data):
    file = here / "weights.pth"
    content = data.draw(st.binary(min_size=1, max_size=64))
    file.write_bytes(content)
    old = content_of(make(file))
    os.utime(file, (1, 1))
    assert content_of(make(file)) == old
    index = data.draw(st.integers(0, len(content) - 1))
    file.write_bytes(content[:index] + bytes([content[index] ^ data.draw(st.integers(1, 255))]) + content[index + 1 :])
    (change,) = content_changes(old, content_of(make(file)))
    assert change.startswith(f"the content of {file}: ")


def test_words_are_no_files(here):
    (here / "imagenet").write_text("")
    assert content_of(own(model={"kind": "timm", "name": "resnet18"}))["files"] == {}


def test_what_only_one_side_knows_is_not_compared(here):
    now = {**content_of(own()), "class_names": ["a", "b"]}
    assert content_changes({}, now) == []
    assert content_changes(now, {**now, "class_names": ["b", "a"]}) == ["class names: a, b -> b, a"]
    assert library_changes({"libraries": {"torch": "1.0"}}, {"libraries": {"torch": "2.0"}}) == "torch 1.0 -> 2.0"
    assert library_changes({}, now) == ""


def test_a_circle_of_imports_and_code_that_is_none_are_read(here):
    (here / "helpers" / "sizes.py").write_text("import mynets\nFACTOR = 3\n")
    assert content_of(own())["functions"]["mynets:build"]
    (here / "helpers" / "sizes.py").write_text("def (:\n")
    assert content_of(own())["functions"]["mynets:build"]
