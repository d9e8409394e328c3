"""One zip file of plain members, whose manifest names them with size and sha256; all is checked before any is used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from hpo.errors import StoreError, disk_full
from hpo.home import plain_file

FORMAT = 1  # of what the members say; raised when an older hpo could not read them
MANIFEST = "manifest.json"
_BLOCK = 1 << 20
_LONGEST_MANIFEST = 1 << 28  # bytes
_MOST_DEFLATED = 1032  # bytes that one byte of deflate can stand for
_INTEGERS = range(-(1 << 63), 1 << 63)  # what the databases store
_OTHER_SHAPE = (KeyError, TypeError, AttributeError, OverflowError)
_CONTROL = re.compile(r"[\x00-\x1f\x7f\\]")
_AGAIN = "Export the study again, and copy the file whole."


class Writer:
    """What writes an archive; the manifest comes last, so a file that was cut short has none."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self._archive = archive
        self.members: dict[str, dict[str, Any]] = {}

    def add_json(self, name: str, value: object) -> None:
        """A member that holds value as JSON; NaN and infinities as Python writes them."""
        self._add(name, iter([json.dumps(value, ensure_ascii=False).encode()]))

    def add_lines(self, name: str, values: Iterator[object]) -> int:
        """A member with one line of JSON a value; returns the number of lines."""
        lines = [f"{json.dumps(value, ensure_ascii=False)}\n".encode() for value in values]
        self._add(name, iter(lines))
        return len(lines)

    def add_file(self, name: str, path: Path) -> None:
        """A member with the bytes of a file. Raises StoreError for a name that no archive may have."""
        if not is_safe(name):
            raise StoreError(f"{path}: {name!r} cannot be the name of a file in an archive.", "Rename it in MLflow.")
        with path.open("rb") as file:
            self._add(name, iter(lambda: file.read(_BLOCK), b""))

    def _add(self, name: str, blocks: Iterator[bytes]) -> None:
        digest, size = hashlib.sha256(), 0
        with self._archive.open(name, "w", force_zip64=True) as member:
            for block in blocks:
                digest.update(block)
                size += len(block)
                member.write(block)
        self.members[name] = {"size": size, "sha256": digest.hexdigest()}


@contextmanager
def writing(file: Path, head: Mapping[str, Any]) -> Iterator[Writer]:
    """Write an archive, whole or not at all: a file of that name is replaced at the end. Raises StoreError.

    head is what the manifest says besides: title, ...
    """
    part = file.with_name(f"{file.name}.part")
    try:
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
            writer = Writer(archive)
            yield writer
            manifest = {"format": FORMAT, **head, "members": writer.members}
            archive.writestr(MANIFEST, json.dumps(manifest, ensure_ascii=False, indent=1))
        with part.open("rb") as written:
            os.fsync(written.fileno())
        part.replace(file)
    except OSError as error:
        if not disk_full(error) and error.filename not in (str(part), part, str(file)):
            raise
        reason = error.strerror or str(error)
        raise StoreError(f"{file}: cannot be written: {reason}.", "Choose another file: --out FILE") from None
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


@dataclass(frozen=True)
class Archive:
    """An open archive of which every member has been checked."""

    file: Path
    manifest: Mapping[str, Any]
    _zip: zipfile.ZipFile

    def json(self, name: str) -> Any:
        """The value of a member. Raises StoreError where there is none, or it is not JSON."""
        return self._decoded(name, self._read(name))

    def lines(self, name: str) -> list[Any]:
        """The values of a member, one a line."""
        return [self._decoded(name, line) for line in self._read(name).splitlines()]

    def files(self, folder: str) -> list[str]:
        """The members below a folder."""
        return sorted(name for name in self.manifest["members"] if name.startswith(f"{folder}/"))

    def extract(self, folder: str, target: Path) -> list[str]:
        """Write the members below a folder into target; returns their paths in it."""
        found = [name.removeprefix(f"{folder}/") for name in self.files(folder)]
        for path in found:
            place = target / path
            place.parent.mkdir(parents=True, exist_ok=True)
            with self._zip.open(f"{folder}/{path}") as member, place.open("wb") as copy:
                shutil.copyfileobj(member, copy, _BLOCK)
        return found

    def _read(self, name: str) -> bytes:
        if name not in self.manifest["members"]:
            raise damaged(self.file, f"it has no {name}")
        return self._zip.read(name)

    def _decoded(self, name: str, text: bytes) -> Any:
        try:
            return json.loads(text, parse_int=_integer)
        except OverflowError as error:
            raise damaged(self.file, f"{name} has the number {error}, which no study has") from None
        except (ValueError, RecursionError):
            raise damaged(self.file, f"{name} is not JSON") from None


def _integer(digits: str) -> int:
    """The number of these digits. Raises OverflowError where no database stores it."""
    if len(digits) > 20 or int(digits) not in _INTEGERS:
        raise OverflowError(f"{digits[:12]}{'...' * (len(digits) > 12)}")
    return int(digits)


@contextmanager
def reading(file: Path, *, scratch: Path) -> Iterator[Archive]:
    """Open an archive and check all of it: its format, the names, sizes and digests of its members.

    scratch is a folder on the disk that its files will go to. Raises StoreError.
    """
    try:
        archive = zipfile.ZipFile(plain_file(file))
    except FileNotFoundError:
        raise StoreError(f"{file}: there is no such file.", "Write one: hpo export STUDY") from None
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise damaged(file, f"it cannot be opened: {error}") from None
    with archive:
        try:
            manifest = _manifest(file, archive)
            _check(file, archive, manifest["members"], scratch)
        # What zipfile and zlib raise for what is broken, encrypted, or compressed in ways unknown, and what Python
        # raises for JSON of another shape.
        except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, ValueError, *_OTHER_SHAPE) as error:
            raise damaged(file, f"{type(error).__name__}: {error}") from None
        except Exception as error:
            if type(error).__module__ != "zlib":
                raise
            raise damaged(file, str(error)) from None
        yield Archive(file, manifest, archive)


def damaged(file: Path, why: str) -> StoreError:
    """What to say of an archive that cannot be used."""
    return StoreError(f"{file}: not a whole export of a study: {why}.", _AGAIN)


def is_safe(name: str) -> bool:
    """Whether a member's name stays inside the folder that it is written to, on every system."""
    path = PurePosixPath(name)
    if not path.parts or str(path) != name or path.is_absolute() or len(name) > 4096:
        return False
    return ".." not in path.parts and ":" not in path.parts[0] and not _CONTROL.search(name)


def _manifest(file: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    if MANIFEST not in archive.namelist():
        raise damaged(file, f"it has no {MANIFEST}")
    if archive.getinfo(MANIFEST).file_size > _LONGEST_MANIFEST:
        raise damaged(file, f"its {MANIFEST} has no end")
    manifest: dict[str, Any] = json.loads(archive.read(MANIFEST), parse_int=_integer)
    number = manifest["format"]
    if not isinstance(number, int) or number > FORMAT:
        raise StoreError(
            f"{file}: written in format {number}, and this hpo reads up to {FORMAT}.", "Install a newer hpo here."
        )
    return manifest


def _check(file: Path, archive: zipfile.ZipFile, members: Mapping[str, Any], scratch: Path) -> None:
    there = [info.filename for info in archive.infolist()]
    if odd := [name for name in there if not is_safe(name)]:
        raise damaged(file, f"a member is named {odd[0]!r}")
    if len(set(there)) < len(there):
        raise damaged(file, "a member is there twice")
    if nested := {str(parent) for name in there for parent in PurePosixPath(name).parents} & {*there}:
        raise damaged(file, f"{min(nested)} is a file and a folder")
    if differing := {*members, MANIFEST} ^ {*there}:
        raise damaged(file, f"{min(differing)} is not in both the file and its {MANIFEST}")
    for name, entry in members.items():
        info = archive.getinfo(name)
        if entry["size"] != info.file_size:
            raise damaged(file, f"{name} is not what was written")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise damaged(file, f"{name} is compressed in another way than hpo export does")
    total, free = sum(entry["size"] for entry in members.values()), shutil.disk_usage(scratch).free
    if total > file.stat().st_size * _MOST_DEFLATED:
        raise damaged(file, f"it says that it holds {total / 1e6:,.0f} MB, which no file of its size does")
    if total > free:
        raise StoreError(
            f"{file}: {total / 1e6:,.0f} MB unpacked, and {free / 1e6:,.0f} MB are free at {scratch}.",
            "Free some space there, or choose another folder: --home DIR.",
        )
    for name, entry in members.items():
        digest, size = hashlib.sha256(), 0
        with archive.open(name) as member:
            while size <= entry["size"] and (block := member.read(_BLOCK)):
                digest.update(block)
                size += len(block)
        if (size, digest.hexdigest()) != (entry["size"], entry["sha256"]):
            raise damaged(file, f"{name} is not what was written")
