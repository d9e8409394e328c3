"""Archives: whole, or refused before anything of them is used."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hpo.errors import StoreError
from hpo.jobs.shared.archive import is_safe, reading, writing

VALUES = [{"a": 1.5, "name": "ünïcode"}, float("inf"), None]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "picture.png").write_bytes(bytes(range(256)) * 3)
    with writing(tmp_path / "x.zip", {"title": "x"}) as archive:
        archive.add_json("one.json", VALUES)
        assert archive.add_lines("many.jsonl", iter(VALUES)) == 3
        archive.add_file("runs/a/pictures/picture.png", tmp_path / "picture.png")
    return tmp_path / "x.zip"


def _content(file: Path, scratch: Path) -> Any:
    with reading(file, scratch=scratch.parent) as archive:
        paths = archive.extract("runs/a", scratch)
        files = {path: (scratch / path).read_bytes() for path in paths}
        return archive.manifest["title"], archive.json("one.json"), archive.lines("many.jsonl"), files


def test_what_was_written_is_read(file: Path, tmp_path: Path) -> None:
    title, one, many, files = _content(file, tmp_path / "out")
    assert (title, one, many) == ("x", VALUES, VALUES)
    assert files == {"pictures/picture.png": (tmp_path / "picture.png").read_bytes()}
    assert not (tmp_path / "x.zip.part").exists()


@pytest.mark.parametrize("bits", [0x01, 0x40, 0xFF])
def test_changed_byte_anywhere_is_refused_or_means_nothing(bits: int, file: Path, tmp_path: Path) -> None:
    whole, wanted = file.read_bytes(), _content(file, tmp_path / "out")
    refused = 0
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ bits]) + whole[place + 1 :])
        try:
            found = _content(file, tmp_path / "out")
        except StoreError:
            refused += 1
        else:
            assert found == wanted  # the time of a member, for one
    assert refused > len(whole) / 6


def test_file_that_was_cut_short_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in range(0, len(whole), 11):
        file.write_bytes(whole[:length])
        with pytest.raises(StoreError, match="not a whole export"):
            _content(file, tmp_path / "out")


def test_writing_that_fails_leaves_what_was_there(file: Path) -> None:
    before = file.read_bytes()
    with pytest.raises(FileNotFoundError), writing(file, {}) as archive:
        archive.add_file("runs/a/x", file.parent / "no such file")
    assert file.read_bytes() == before
    assert list(file.parent.glob("*.part")) == []


def test_member_that_unpacks_to_more_than_it_says_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "bomb.zip"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("one.json", b"0" * 50_000_000)
        members = {"one.json": {"size": 10, "sha256": ""}}
        archive.writestr("manifest.json", json.dumps({"format": 1, "members": members}))
    with pytest.raises(StoreError, match=r"one\.json is not what was written"), reading(file, scratch=tmp_path):
        pass


def test_file_larger_than_the_disk_is_refused(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    with pytest.raises(StoreError, match="MB are free"), reading(file, scratch=tmp_path):
        pass


ODD: dict[str, Any] = {
    "a size of its own": {"one.json": {"size": 1 << 60, "sha256": ""}},
    "a size that no number type holds": {"one.json": {"size": 10**30, "sha256": ""}},
    "no size": {"one.json": {"sha256": ""}},
    "a list for an entry": {"one.json": []},
    "a list of members": [],
    "nothing": None,
}


@pytest.mark.parametrize("what", ODD)
def test_manifest_of_another_shape_is_a_damaged_file_and_no_full_disk(what: str, tmp_path: Path) -> None:
    file = tmp_path / "odd.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("one.json", b"0")
        archive.writestr("manifest.json", json.dumps({"format": 1, "members": ODD[what]}))
    with pytest.raises(StoreError, match="not a whole export"), reading(file, scratch=tmp_path):
        pass


def test_size_that_no_file_of_this_length_unpacks_to_is_no_full_disk(tmp_path: Path) -> None:
    file, size = tmp_path / "odd.zip", (1 << 32) - 2
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("one.json", b"0")
        members = {"one.json": {"size": size, "sha256": ""}}
        archive.writestr("manifest.json", json.dumps({"format": 1, "members": members}))
    content = bytearray(file.read_bytes())
    place = content.index(b"PK\x01\x02") + 24  # what the directory of the zip file says of the first member
    content[place : place + 4] = size.to_bytes(4, "little")
    file.write_bytes(content)
    with pytest.raises(StoreError, match="which no file of its size does"), reading(file, scratch=tmp_path):
        pass


@pytest.mark.parametrize("digits", ["1" + "0" * 30, str(1 << 63), "9" * 5000])
def test_number_that_no_database_stores_is_refused(digits: str, tmp_path: Path) -> None:
    with writing(tmp_path / "x.zip", {}) as archive:
        archive.add_json("one.json", 7777777)
    with reading(tmp_path / "x.zip", scratch=tmp_path) as archive, pytest.raises(StoreError, match="has the number"):
        archive._decoded("one.json", digits.encode())


@pytest.mark.parametrize("name", ["../x", "a/../x", "/x", "a//b", "./a", "a/", "C:/x", "a\\b", "a\0b", "", ".", "a\nb"])
def test_name_that_leads_elsewhere_is_not_safe(name: str) -> None:
    assert not is_safe(name)


@pytest.mark.parametrize("name", ["a", "runs/a/..b", "models/m/näme with blanks.txt", "a/b:c"])
def test_ordinary_name_is_safe(name: str) -> None:
    assert is_safe(name)
