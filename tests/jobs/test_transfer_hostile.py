"""Files of others that are imported: what is wrong with one is an error before anything is written."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from hpo.errors import StoreError
from hpo.home import Home
from hpo.jobs.transfer import export_study, import_study
from hpo.tracking.ledger import announce_opening
from hpo.tracking.registry import resolve
from kept_study import stored


def _rewritten(file: Path, change: Callable[[dict[str, bytes]], None], *, honest: bool = True) -> None:
    """Have change alter the members, names to bytes; honest: the manifest is made to agree."""
    with zipfile.ZipFile(file) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members)
    if honest and "manifest.json" in members:
        manifest = json.loads(members["manifest.json"])
        manifest["members"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in members.items()
            if name != "manifest.json"
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def _replace(name: str, old: str, new: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        assert old.encode() in members[name]
        members[name] = members[name].replace(old.encode(), new.encode())

    return change


def _number(name: str, field: str, value: int) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        members[name], count = re.subn(rf'"{field}": [\d.]+'.encode(), f'"{field}": {value}'.encode(), members[name])
        assert count

    return change


def _rename(start: str, to: str) -> Callable[[dict[str, bytes]], None]:
    def change(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.startswith(start))
        members[to] = members.pop(name)

    return change


HOSTILE = {
    "a way out": (_rename("runs/", "runs/../../../x"), "is named"),
    "an absolute place": (_rename("runs/", "/x"), "is named"),
    "a Windows path": (_rename("runs/", "runs\\..\\x"), "is named"),
    "a drive": (_rename("runs/", "C:/x"), "is named"),
    "no trials": (lambda members: members.pop("trials.jsonl"), "it has no trials.jsonl"),
    "no manifest": (lambda members: members.pop("manifest.json"), "it has no manifest.json"),
    "half a line": (lambda members: members.update({"runs.jsonl": members["runs.jsonl"][:-20]}), "not JSON"),
    "a later format": (_replace("manifest.json", '"format": 1', '"format": 2'), "in format 2"),
    "no format": (_replace("manifest.json", '"format": 1', '"format": "x"'), "in format x"),
    "a title with a way out": (_replace("study.json", '"formula"', '"../formula"'), "cannot be named"),
    "a run with a way out": (_replace("runs.jsonl", '{"id": "', '{"id": "../'), "id: String should match"),
    "a model with a way out": (_replace("models.jsonl", '{"id": "', '{"id": "../'), "id: String should match"),
    "a tag of another type": (
        _replace("runs.jsonl", '"hpo.kind": "study"', '"hpo.kind": 1'),
        "kind: Input should be a valid string",
    ),
    "an unknown state": (_replace("trials.jsonl", '"state": "FAIL"', '"state": "LOST"'), "LOST"),
    "a model of another name": (_replace("registered.json", '"name": "formula"', '"name": "x"'), "not named formula"),
    "a result of another shape": (
        _replace("trials.jsonl", '"epochs": [{', '"epochs": [3, {'),
        "not a whole export",
    ),
    "a list for an object": (lambda members: members.update({"study.json": b"[]"}), "not a whole export"),
    "a time that no database stores": (_number("runs.jsonl", "started", 10**30), "which no study has"),
    "a time that no calendar has": (_number("runs.jsonl", "started", 10**17), "started"),
    "a version beyond all": (_number("registered.json", "number", 10**5), "number"),
    "a study of another age": (_number("study.json", "created", 10**15), "not a whole export"),
    "a step that a server cannot store": (
        _replace("trials.jsonl", '"steps": []', '"steps": [[9999999999, 0.5]]'),
        "whole",
    ),
    "an opening of others": (_replace("openings.jsonl", '"study": "formula"', '"study": "x"'), "of another study"),
}


@pytest.fixture(scope="module")
def exported(kept_template: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The kept study in a file, with an opening."""
    folder = tmp_path_factory.mktemp("exported")
    shutil.copytree(kept_template / "mlruns", folder / "mlruns")
    home = Home.at(folder)
    study = stored(home)
    announce_opening(home, study, model=resolve(home, "formula"), trial=0, purpose="promote")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("HPO_STORAGE", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        return export_study("formula", home=folder, file=folder / "study.zip").file


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_file_is_one_clear_error_and_writes_nothing(what: str, exported: Path, tmp_path: Path) -> None:
    change, words = HOSTILE[what]
    file = Path(shutil.copy(exported, tmp_path))
    _rewritten(file, change)
    with pytest.raises(StoreError, match=words) as error:
        import_study(file, home=tmp_path / "target")
    assert str(file) in error.value.message
    assert error.value.hint
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.zip"]


@pytest.mark.parametrize("member", ["trials.jsonl", "runs/"])
def test_member_that_is_not_what_was_written_is_refused(member: str, exported: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(exported, tmp_path))

    def change(members: dict[str, bytes]) -> None:
        name = next(name for name in members if name.startswith(member))
        members[name] = bytes([members[name][0] ^ 1]) + members[name][1:]

    _rewritten(file, change, honest=False)
    with pytest.raises(StoreError, match="is not what was written"):
        import_study(file, home=tmp_path / "target")
    assert not (tmp_path / "target").exists()


def test_number_of_a_version_beyond_a_hundred_deleted_ones_is_not_kept(
    exported: Path, tmp_path: Path, empty_stores: Path
) -> None:
    other = Path(shutil.copytree(empty_stores, tmp_path / "other"))
    file = Path(shutil.copy(exported, other))
    _rewritten(file, _number("registered.json", "number", 9999))
    _rewritten(file, _number("registered.json", "challenger", 9999))
    import_study(file, home=other)
    assert resolve(Home.find(other), "formula@challenger").version == 1
