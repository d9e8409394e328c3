"""What is fetched or prepared once: published files with their checksums, weights, and the cache of prepared data."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hpo.errors import DataError
from hpo.home import cache_folder


def models_folder() -> Path:
    """The folder of registered models that other networks start from, each in a folder named by its id."""
    return cache_folder() / "models"


def intact(folder: Path) -> bool:
    """Whether every file has the size and the time of its writing: cheap, and no write leaves both alone."""
    try:
        written: Mapping[str, Any] = json.loads((folder / "files.json").read_text(encoding="utf-8"))
        return written == _stamps(folder)
    except (OSError, ValueError):
        return False


def _stamps(folder: Path) -> dict[str, list[int]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name != "files.json")
    stats = {str(path.relative_to(folder)): path.stat() for path in files}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Have write fill an empty folder, then put it in place at once: a reader finds all of it or nothing.

    The caller holds a lock on folder.parent; what is there already is damaged, and replaced.
    """
    for abandoned in folder.parent.glob(".making-*"):
        shutil.rmtree(abandoned)
    made = Path(tempfile.mkdtemp(dir=folder.parent, prefix=".making-"))
    write(made)
    write_text(made / "files.json", json.dumps(_stamps(made)))
    made.chmod(0o755)  # mkdtemp makes folders that only their owner reads
    if folder.exists():
        shutil.rmtree(folder)
    made.replace(folder)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or nothing."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


# The kinds of networks that start from others, whose features of a data set are kept.
_PRETRAINED = ("torchvision", "timm", "fusion", "transfer")


def unused(digests: Collection[str], specs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Path]]:
    """(kind, file or folder) of what studies on data with these digests, and with these specs, do not use.

    The key of features, a digest, does not show their network and data: they count as used
    while any of the studies starts from a pretrained network. Downloads stay: they may be hard to get again.
    """
    root = cache_folder()
    used = {digest.removeprefix("sha256:")[:32] for digest in digests}
    folders = (path for path in (root / "prepared").glob("*") if path.is_dir() and path.name != "index")
    yield from (("prepared data", path) for path in sorted(folders) if path.name not in used)
    for entry in sorted((root / "prepared" / "index").glob("*.json")):
        if _entry_digest(entry).removeprefix("sha256:")[:32] not in used:
            yield "index", entry
    models = [spec.get("model") or {} for spec in specs]
    if not any(model.get("kind") in _PRETRAINED for model in models):
        yield from (("features", path) for path in sorted((root / "features").glob("*")) if path.is_dir())
    named = {str(model.get("from_model")).removeprefix("models:/") for model in models}
    yield from (("network", path) for path in sorted(models_folder().glob("*")) if path.name not in named)


def _entry_digest(entry: Path) -> str:
    """Of the data that an entry of the index leads to; "" for a damaged one."""
    try:
        return str(json.loads(entry.read_text(encoding="utf-8"))["digest"])
    except (OSError, ValueError, KeyError):
        return ""


Progress = Callable[[str, int, int], None]
"""progress(text, done_bytes, total_bytes); total 0: no measure of progress."""


def md5_of(path: Path) -> str:
    """The MD5 of a file, the checksum that these data sets are published with, as 32 hexadecimal digits."""
    return _digest(path, "md5")


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def fetch(
    url: str, *, path: Path, progress: Progress, md5: str = "", sha256: str = "", other: str = "", without: str = ""
) -> Path:
    """The file at `path`, downloaded from url unless it is there already.

    One of md5 and sha256 is its checksum, or how that begins. An interrupted download leaves only `path` + ".part",
    which the next one overwrites. Raises DataError when the server or the disk fails, and when the file, cached or
    fresh, has another checksum. The error tells two ways out: `other` for a file of one's own, `without` for no file.
    """
    check = _Check("md5", md5) if md5 else _Check("sha256", sha256)
    other = other or f"--set data.path={path}"
    without = without or "Needs no download: hpo run digits-mlp"
    import filelock

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(f"{path}.lock"):
            if path.exists():
                _refuse_other(path, check, other)
            else:
                _download(url, check, path, progress, without)
    except OSError as error:
        raise DataError(
            f"{error.filename or path}: cannot be read or written: {error.strerror or error}.",
            "Free the disk, or choose a cache folder of your own: the environment variable HPO_DATA.",
        ) from None
    return path


@dataclass(frozen=True)
class _Check:
    """How a published file's checksum begins."""

    algorithm: str
    start: str

    def miss(self, path: Path) -> str:
        """The message on a file with another checksum; empty for the right one."""
        found = _digest(path, self.algorithm)
        right = found.startswith(self.start)
        return "" if right else f"its {self.algorithm} is {found}, the official one is {self.start}"


def _refuse_other(path: Path, check: _Check, other: str) -> None:
    if miss := check.miss(path):
        raise DataError(
            f"{path}: not the official file: {miss}.",
            f"Delete it to have it downloaded again, or say that you mean this file: {other}",
        )


def _download(url: str, check: _Check, path: Path, progress: Progress, without: str) -> None:
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
            f"Put the file at {path} ({check.algorithm} {check.start}) and run again. {without}",
        ) from None
    if miss := check.miss(part):
        part.unlink()
        raise DataError(
            f"{url}: the server sent another file: {miss}.",
            f"Try again later, or put the official file at {path}. {without}",
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


_FRESH = "Or name your own: --set model.weights=FILE; without freeze also fresh ones: --set model.weights=none"


def _silent(text: str, done: int, total: int) -> None:
    """Workers have nobody to tell."""


def torchvision_file(url: str, *, progress: Progress = _silent) -> Path:
    """The file of published torchvision weights in TORCH_HOME, downloaded if it is not there.

    Its name ends with the beginning of its SHA-256, which is verified. Raises DataError.
    """
    import torch

    name = url.rpartition("/")[2]
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    checksum = re.search(r"-([0-9a-f]{8,})\.", name)
    other = f"--set model.weights={path}"
    return fetch(url, path=path, progress=progress, sha256=checksum[1] if checksum else "", other=other, without=_FRESH)


def hub_file(repository: str, filename: str | None) -> Path:
    """The file of published timm weights in HF_HOME, downloaded if it is not there; safetensors where there are any.

    Raises DataError.
    """
    from huggingface_hub import constants, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError
    from requests import RequestException, head

    names = (filename,) if filename else ("model.safetensors", "pytorch_model.bin")
    for name in names:
        cached = try_to_load_from_cache(repository, name)
        if isinstance(cached, str):
            return Path(cached)
    place = (
        f"Put {names[0]} of {repository} anywhere and name it: --set model.weights=FILE, or fill "
        f"{constants.HF_HUB_CACHE} with: hf download {repository} {names[0]}. {_FRESH}"
    )
    try:
        # The hub's own client tries for half a minute before it says that there is no network.
        head(constants.ENDPOINT, timeout=10)
        for name in names:
            try:
                return Path(hf_hub_download(repository, name))
            except EntryNotFoundError:
                continue
    except (RequestException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{hf_hub_url(repository, names[0])}: the download failed: {reason}.", place) from None
    raise DataError(f"{repository}: the hub has none of {', '.join(names)} there.", place)


def weights_at_hand() -> list[tuple[str, str]]:
    """The networks whose published weights are in the caches of this machine: (torchvision or timm, name)."""
    import timm
    import torch
    from huggingface_hub import constants, try_to_load_from_cache
    from torchvision import models

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    there = {file.name for file in folder.glob("*")}
    found = [
        ("torchvision", name)
        for name in models.list_models(module=models)
        if models.get_model_weights(name).DEFAULT.url.rpartition("/")[2] in there
    ]
    for place in sorted(Path(constants.HF_HUB_CACHE).glob("models--timm--*")):
        name = place.name.removeprefix("models--timm--")
        files = [try_to_load_from_cache(f"timm/{name}", file) for file in ("model.safetensors", "pytorch_model.bin")]
        if timm.is_model(name.partition(".")[0]) and any(isinstance(file, str) for file in files):
            found.append(("timm", name))
    return found


def read_weights(file: Path) -> dict[str, Any]:
    """The state dict in a .safetensors or .pth file; nothing in it is executed. Raises DataError."""
    import torch
    from timm.models import load_state_dict

    if not file.is_file():
        raise DataError(f"model.weights: {file}: no such file.", "Name a .safetensors or .pth file, imagenet or none.")
    try:
        state: dict[str, Any] = load_state_dict(str(file), weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file fails in many ways
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"model.weights: {file}: not a file of plain weights: {reason}.",
            "Give a state dict in a .safetensors file, or one saved by torch.save.",
        ) from None
    return {name: tensor for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}
