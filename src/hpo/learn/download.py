"""Fetch one published file: checksum verified, moved into place whole, safe for two processes at once."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

from hpo.errors import DataError

Progress = Callable[[str, int, int], None]
"""progress(text, done_bytes, total_bytes); total 0: no measure of progress."""


def md5_of(path: Path) -> str:
    """The MD5 of a file, the checksum that these data sets are published with, as 32 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def fetch(url: str, *, md5: str, path: Path, progress: Progress) -> Path:
    """The file at `path`, downloaded from url unless it is there already.

    An interrupted download leaves only `path` + ".part", which the next one overwrites. Raises DataError when the
    server or the disk fails, and when the file, cached or fresh, has another checksum than md5.
    """
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            if path.exists():
                _refuse_other(path, md5)
            else:
                _download(url, md5, path, progress)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read or written: {error.strerror or error}.",
            "Free the disk, or choose a cache folder of your own: the environment variable HPO_DATA.",
        ) from None
    return path


def _refuse_other(path: Path, md5: str) -> None:
    found = md5_of(path)
    if found != md5:
        raise DataError(
            f"{path}: not the official file: its md5 is {found}, the official one is {md5}.",
            f"Delete it to have it downloaded again, or say that you mean this file: --set data.path={path}",
        )


def _download(url: str, md5: str, path: Path, progress: Progress) -> None:
    import pooch
    from requests import RequestException

    part = path.with_name(f"{path.name}.part")
    get = pooch.HTTPDownloader(progressbar=_Bar(path.name, progress), chunk_size=1 << 18, timeout=30)
    try:
        get(url, str(part), None)
    except RequestException as error:
        part.unlink(missing_ok=True)
        raise DataError(
            f"{url}: the download failed: {_reason(error)}.",
            f"Put the file at {path} (md5 {md5}) and run again. Needs no download: hpo run digits-mlp",
        ) from None
    found = md5_of(part)
    if found != md5:
        part.unlink()
        raise DataError(
            f"{url}: the server sent another file: its md5 is {found}, the official one is {md5}.",
            f"Try again later, or put the official file at {path}. Needs no download: hpo run digits-mlp",
        )
    part.replace(path)


def _reason(error: Exception) -> str:
    """The innermost cause: requests wraps `Connection refused` in four layers of its own."""
    while inner := error.__cause__ or error.__context__:
        if not isinstance(inner, Exception):
            break
        error = inner
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).strip().rstrip(".")


class _Bar:
    """What pooch asks of a progress bar: total, update, reset, close."""

    def __init__(self, name: str, progress: Progress) -> None:
        self.total = 0
        self.done = 0
        self.name = name
        self.progress = progress

    def update(self, count: int) -> None:
        # pooch counts whole chunks, so the last one would overshoot.
        self.done = min(self.done + count, self.total or self.done + count)
        self.progress(f"downloading {self.name}", self.done, self.total)

    def reset(self) -> None:
        self.done = 0

    def close(self) -> None:
        """Nothing is held open."""
