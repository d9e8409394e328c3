"""A picture of training images of each class, each changed several times by the augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from hpo.data.prepare import open_trial
from hpo.records import DataCard
from hpo.spec.study import Setup
from hpo.spec.training import AugmentSpec
from hpo.training.augment import mix_batch
from hpo.training.batches import augmenter


def save_preview(setup: Setup, card: DataCard, path: Path, *, images: int, copies: int, seed: int) -> Path:
    """Write a PNG with one row for each of `images` training images, class by class, and `copies` changes of each."""
    from PIL import Image

    data = open_trial(card, setup.split, device=torch.device("cpu"))
    labels = data.labels[data.train]
    by_class = [
        data.train[labels == label if labels.ndim == 1 else labels[:, label] > 0]
        for label in range(len(data.class_names))
    ]
    rows = torch.stack([by_class[row % len(by_class)][row // len(by_class)] for row in range(images)])
    generator = torch.Generator().manual_seed(seed)
    picture = preview(data.images[rows], setup.training.augment, generator=generator, copies=copies)
    # Small images are shown large, pixel by pixel.
    scale = max(1, 96 // data.images.shape[1])
    pixels = np.repeat(np.repeat(picture, scale, axis=0), scale, axis=1)
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)
    return path


def preview(images: Tensor, spec: AugmentSpec, *, generator: torch.Generator, copies: int) -> npt.NDArray[np.uint8]:
    """One picture, uint8, of images (n, height, width, channels) uint8 as training sees them.

    Each image is a row: first as it is, then `copies` random changes of it; white lines of 2 pixels separate them.
    """
    change = augmenter(spec)
    labels = torch.zeros(len(images), dtype=torch.long)
    columns = [images]
    for _ in range(copies):
        changed = images if change is None else change(images, generator)
        mixed, *_ = mix_batch(changed.permute(0, 3, 1, 2).float(), labels, spec, generator)
        columns.append(mixed.round().to(torch.uint8).permute(0, 2, 3, 1))
    framed = functional.pad(torch.stack(columns, dim=1), (0, 0, 2, 0, 2, 0), value=255)
    rows, columns_count, height, width, channels = framed.shape
    picture = framed.transpose(1, 2).reshape(rows * height, columns_count * width, channels)
    array: npt.NDArray[np.uint8] = picture[2:, 2:].cpu().numpy()
    return array
