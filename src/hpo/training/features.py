"""Features of a data set by frozen backbones: computed once, stored on disk, shared by all trials and workers."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hpo.data.cache import intact, write_folder
from hpo.data.prepare import TrialData, load_tensor
from hpo.models.backbones import Backbone, quick
from hpo.models.transfer import Transfer
from hpo.spec.models import Tuned
from hpo.spec.study import Setup
from hpo.spec.training import AugmentSpec
from hpo.training.batches import augmenter

_FORMAT = 1  # part of every key
_CHUNK = 256  # images that one worker claims at a time
_BATCH = 8  # maps that stay in the processor's cache: 1.6 times the images/s of batches of 32


def cached_views(setup: Setup) -> int | None:
    """The number of augmented views of each image in the cache; None if a training needs the images.

    Features serve only trainings of a head, on unchanged images or on views that are drawn once.
    """
    model, augment = setup.model, setup.training.augment
    if not isinstance(model, Tuned) or not model.frozen or augment.mixup or augment.cutmix:
        return None
    return 0 if augment == AugmentSpec() else model.views or None


def features_of(net: Transfer, setup: Setup, data: TrialData, *, digest: str, cache: Path) -> TrialData:
    """The data with features of net's bodies in place of images; missing ones are computed and cached first.

    cached_views(setup) is not None. digest is that of the data set. Several workers share the work, chunk by chunk, and
    each gets all of it.
    """
    views, augment = cached_views(setup) or 0, setup.training.augment
    bodies = [body for body in net.bodies if isinstance(body, Backbone)]
    files = tuple(_complete(body, data.images, augment, views, digest, cache) for body in bodies)
    parts = tuple(load_tensor(file, data.images.device) for file in files)
    return replace(data, images=parts[0] if len(parts) == 1 else _concatenated(parts))


@lru_cache(maxsize=1)
def _concatenated(parts: tuple[Tensor, ...]) -> Tensor:
    """Features of several bodies in one tensor; remembered, for the trials of a study nearly always share them."""
    return torch.cat(parts, dim=-1)


def _complete(body: Backbone, images: Tensor, augment: AugmentSpec, views: int, digest: str, cache: Path) -> Path:
    """The file with the features of all images by this body."""
    import filelock

    parts = "|".join([str(_FORMAT), digest, body.digest, str(views), augment.model_dump_json() if views else ""])
    key = hashlib.sha256(parts.encode()).hexdigest()[:32]
    folder = cache / "features" / key
    file = folder / "features.npy"
    if intact(folder):
        return file
    scratch = folder.with_suffix(".parts")
    scratch.mkdir(parents=True, exist_ok=True)
    starts = range(0, len(images), _CHUNK)
    # First the chunks that no other worker computes, then, waiting for their locks, all unfinished ones.
    for wait in (False, True):
        for start in starts:
            if intact(folder):
                return file
            part = scratch / f"{start:09}.npy"
            try:
                with filelock.FileLock(f"{part}.lock", timeout=-1 if wait else 0):
                    # Another worker may have merged and removed the chunks since the check above.
                    if _read(part, min(_CHUNK, len(images) - start), views) is None and not intact(folder):
                        _compute(body, images[start : start + _CHUNK], augment, views, seed=start, file=part)
            except (filelock.Timeout, FileNotFoundError):
                continue  # another worker computes it, or has merged and removed the chunks
    with filelock.FileLock(folder.parent / ".lock"):
        if not intact(folder):
            pieces = [_read(scratch / f"{start:09}.npy", min(_CHUNK, len(images) - start), views) for start in starts]
            if any(piece is None for piece in pieces):  # damaged since it was written: start again
                return _complete(body, images, augment, views, digest, cache)
            whole = [piece for piece in pieces if piece is not None]
            write_folder(folder, lambda made: np.save(made / "features.npy", np.concatenate(whole)))
            shutil.rmtree(scratch, ignore_errors=True)
    return file


def _read(file: Path, count: int, views: int) -> np.ndarray | None:
    """A chunk of `count` images, or None where it is missing or damaged."""
    try:
        chunk: np.ndarray = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    whole = len(chunk) == count and chunk.ndim == 2 + bool(views) and (not views or chunk.shape[1] == 1 + views)
    return chunk if whole else None


@lru_cache(maxsize=8)
def _quick_on(body: Backbone, device: torch.device) -> Backbone:  # noqa: ARG001 - it is part of the key
    """quick(body), once for each device that the body is moved to."""
    return quick(body)


def _compute(body: Backbone, images: Tensor, augment: AugmentSpec, views: int, *, seed: int, file: Path) -> None:
    """Write the features of a chunk atomically."""
    body = _quick_on(body, images.device)
    generator = torch.Generator().manual_seed(seed)
    change = augmenter(augment)
    seen = [forward(body, images)]
    if change is not None:
        seen += [forward(body, change(images, generator)) for _ in range(views)]
    features = torch.stack(seen, dim=1) if views else seen[0]
    part = file.with_suffix(f".{os.getpid()}.part")
    with part.open("wb") as stream:
        np.save(stream, features.numpy())
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)


def forward(body: Backbone, images: Tensor) -> Tensor:
    """Images (n, height, width, channels) uint8 -> features (n, count) float32, as an exported model computes them."""
    body.eval()
    with torch.inference_mode():
        return torch.cat([part.cpu() for part in _batches(body, images)])


def _batches(body: Backbone, images: Tensor) -> Iterator[Tensor]:
    for batch in torch.split(images, _BATCH):
        yield body(batch.permute(0, 3, 1, 2).float() / 255)
