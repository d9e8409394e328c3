"""Results that the study storage refused: kept on disk, in the trial's work folder, until a run can store them."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import TrialResult

_FILE = "result.json"
_RESERVE_BYTES = 1 << 20  # results with hundreds of epochs take some 100 kB each


def keep_reserve(home: Home) -> None:
    """Reserve some disk space, so that results can be kept on a full disk. Raises StoreError where it is full."""
    path = _reserve(home)
    if path.is_file() and path.stat().st_size == _RESERVE_BYTES:
        return
    try:
        path.write_bytes(os.urandom(_RESERVE_BYTES))  # nothing that a file system could compress
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StoreError(
            f"{home.root}: cannot be written: {error.strerror}.",
            "Free some space on the disk, or choose another folder: --home DIR.",
        ) from None


def put(home: Home, title: str, result: TrialResult) -> bool:
    """Write a result to the trial's folder, atomically; False where even the reserved space does not suffice."""
    path = _folder(home, title) / str(result.number) / _FILE
    partial = path.with_suffix(".part")
    for _ in range(2):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("w", encoding="utf-8") as file:
                json.dump(result.to_json(), file)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                _reserve(home).unlink(missing_ok=True)
        else:
            return True
    return False


def pending(home: Home, title: str) -> dict[int, TrialResult]:
    """Trial number -> the result that waits for it."""
    results = {}
    for path in _folder(home, title).glob(f"[0-9]*/{_FILE}"):
        # A result that cannot be read is ignored: its trial is run again.
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            result = TrialResult.from_json(json.loads(path.read_text(encoding="utf-8")))
            results[result.number] = result
    return results


def remove(home: Home, title: str, numbers: Iterable[int]) -> None:
    """Remove the results of these trials, which are stored now."""
    for number in numbers:
        folder = _folder(home, title) / str(number)
        (folder / _FILE).unlink(missing_ok=True)
        with contextlib.suppress(OSError):
            folder.rmdir()  # unless the trial's weights are there


def _folder(home: Home, title: str) -> Path:
    return home.work / title


def _reserve(home: Home) -> Path:
    return home.root / "reserve"
