"""A picture of what training will see: images of each class, each changed several times by the augmentation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from hpo.data.prepare import open_trial
from hpo.records import DataCard
from hpo.spec.study import Setup
from hpo.training.augment import preview


def save_preview(setup: Setup, card: DataCard, path: Path, *, images: int, copies: int, seed: int) -> Path:
    """Write a PNG: a row for each of `images` training images, the classes in turn, and `copies` changes of each."""
    from PIL import Image

    data = open_trial(card, setup.split, device=torch.device("cpu"))
    labels = data.labels[data.train]
    by_class = [data.train[labels == label] for label in range(len(data.class_names))]
    rows = torch.stack([by_class[row % len(by_class)][row // len(by_class)] for row in range(images)])
    generator = torch.Generator().manual_seed(seed)
    picture = preview(data.images[rows], setup.training.augment, generator=generator, copies=copies)
    # Small images are shown large, pixel by pixel.
    scale = max(1, 96 // data.images.shape[1])
    pixels = np.repeat(np.repeat(picture, scale, axis=0), scale, axis=1)
    Image.fromarray(pixels.squeeze(2) if pixels.shape[2] == 1 else pixels).save(path)
    return path
