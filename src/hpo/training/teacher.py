"""Soft labels: the probabilities of a logged model for training images, for another network to learn."""

from __future__ import annotations

import torch
from torch import Tensor

from hpo.data.cache import models_folder
from hpo.data.prepare import TrialData
from hpo.errors import ModelError
from hpo.models import CONFIG, PROGRAM
from hpo.models.safe_loader import Program, read_config


def soft_labels(uri: str, data: TrialData) -> Tensor:
    """The probabilities (n, classes) float32 of the model models:/m-<id> on the device of data; 0 but in training rows.

    The images are those of the data set, without augmentation: the teacher computes each once, however many epochs
    learn from it. The model's files are in models_folder(). Raises ModelError where it is not there, or takes other
    images or answers with other classes.
    """
    folder = models_folder() / uri.removeprefix("models:/")
    if not (folder / CONFIG).is_file():
        raise ModelError(
            f"training.teacher: {uri}: its files are not in {folder}.", "Run the study where its store is."
        )
    config = read_config(folder / CONFIG)
    shape, names = tuple(config["image_shape"]), tuple(config["class_names"])
    if (shape, names) != (tuple(data.images.shape[1:]), data.class_names):
        raise ModelError(
            f"training.teacher: {uri} takes images of {shape} and answers with {len(names)} classes, {names[:3]}, ...",
            "Take a model that was trained on images of this study's size and on its classes.",
        )
    found = Program(folder / PROGRAM).predict(data.images[data.train].cpu().numpy())
    table = torch.zeros(len(data.images), len(names), device=data.images.device)
    table[data.train] = torch.from_numpy(found).to(table.device)
    return table
