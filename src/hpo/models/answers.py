"""Decide on validation images how a trained network answers: which views it averages, and at which temperature."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from hpo.metrics import confusion_matrix, scores
from hpo.models import CONFIG, SETUP, load_trained, whole_program
from hpo.models.backbones import Backbone
from hpo.models.calibration import at_temperature, calibration_of
from hpo.models.safe_loader import read_config
from hpo.models.transfer import Transfer
from hpo.models.views import PLAIN, View, candidates, choose
from hpo.spec.load import small_text
from hpo.spec.outcome import PredictSpec
from hpo.spec.own_code import requested
from hpo.spec.study import Setup

ANSWERS = "answers.json"  # what was decided, and by which figures
_BATCH = 128
_MAPS = 8  # the same of a network with a backbone, whose maps then stay in the processor's cache
_MOST_BYTES = 1_000_000_000
_REPEATS = 15
_LEAST = 1e-30  # probability


class _TimeOverError(Exception):
    """Views are not chosen to the end."""


def decide_answers(
    folder: Path, validation: Path, images: Path, spec: PredictSpec, *, hurry: Callable[[], bool] = lambda: False
) -> dict[str, Any]:
    """Decide for the network that save_trained left in folder; returns the record that is written next to it.

    validation is the npz of its trial, with rows, labels and probabilities; there need be none. images is the npy of
    the development images that rows counts. Views and temperature go into config.json, from where export_program takes
    them, and into the npz the probabilities of the program so made, those of the network alone as `raw`, and the
    temperature. Where views are averaged, the record has scores and confusion of the program, and `judged` are the
    classes (n,), each image's by the views that the other half of the images has chosen. May be called again. Once
    hurry() is true, no views are chosen, which the record says. Raises ModelError for a damaged folder.
    """
    if not validation.is_file():
        return {}
    with np.load(validation, allow_pickle=False) as arrays:
        found = {name: array for name, array in arrays.items() if name != "judged"}
    raw, labels = torch.from_numpy(found.get("raw", found["probabilities"])), torch.from_numpy(found["labels"])
    record: dict[str, Any] = {}
    config = undecided(read_config(folder / CONFIG))
    probabilities = raw
    if spec.views == "auto" and labels.ndim == 1:
        augment = Setup.model_validate_json(small_text(folder / SETUP)).training.augment
        net, _ = load_trained(folder)
        pixels = np.load(images, mmap_mode="r", allow_pickle=False)
        with _remembering(net, images, found["rows"]) as memory:
            batch = _MAPS if any(isinstance(each, Transfer) for each in net.modules()) else _BATCH
            answer = _Answers(whole_program(net, config), pixels, found["rows"], memory, batch, hurry)
            try:
                chosen = choose(answer, labels, candidates(augment, config["image_shape"]))
            except _TimeOverError:
                chosen, record["views_not_chosen"] = None, "the time of the run was over"
        if chosen is not None:
            choice, averaged, judged = chosen
            found["judged"] = judged.argmax(1).numpy()
            record["views"] = choice.record() | {"latency_ms": latencies(net, config, choice.views)}
            if len(choice.views) > 1:
                probabilities = averaged
                config["views"] = [asdict(view) for view in choice.views]
    if spec.calibrate == "auto" and labels.ndim == 1 and (calibration := calibration_of(probabilities, labels)):
        record["calibration"] = calibration.record()
        if calibration.used:
            probabilities = at_temperature(probabilities, calibration.temperature)
            config["temperature"] = calibration.temperature
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    found |= {"raw": raw.numpy(), "probabilities": probabilities.numpy()}
    np.savez(validation, **found | {"temperature": np.array(config.get("temperature", 1.0))})
    if "views" in config:
        record["program"] = _measured(probabilities, labels, folder, config)
    if record:
        (folder / ANSWERS).write_text(json.dumps(record, indent=1), encoding="utf-8")
    return record


def _measured(probabilities: Tensor, labels: Tensor, folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The scores and the confusion matrix of a program, as a trial has those of its network; labels (n,)."""
    training = Setup.model_validate_json(small_text(folder / SETUP)).training
    further = requested([*training.scores, training.monitor], config["class_names"])
    found = scores(probabilities.double().clamp_min(_LEAST).log(), labels, further=further)
    counts = confusion_matrix(probabilities.argmax(1), labels, probabilities.shape[1])
    return {"scores": {f"valid_{name}": value for name, value in found.items()}, "confusion": counts.tolist()}


def undecided(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as save_trained wrote it, without what decide_answers has added."""
    return {name: value for name, value in config.items() if name not in ("views", "temperature")}


class _Memory:
    """Features of images by frozen bodies, for all networks that this process decides for.

    batch names the images that are computed now; features are kept while their data, and no more than _MOST_BYTES.
    """

    def __init__(self) -> None:
        self.batch: tuple[View, int] = (PLAIN, 0)
        self._data: object = None
        self._features: dict[tuple[str, View, int], Tensor] = {}

    def begin(self, data: object) -> None:
        """Forget the features of other data."""
        if data != self._data:
            self._data = data
            self._features.clear()

    def features(self, digest: str, body: nn.Module, images: Tensor) -> Tensor:
        """The features of the batch by the body with this digest."""
        key = digest, *self.batch
        if (known := self._features.get(key)) is not None:
            return known
        found: Tensor = body(images)
        if sum(each.nbytes for each in self._features.values()) + found.nbytes < _MOST_BYTES:
            self._features[key] = found
        return found


_MEMORY = _Memory()


class _Remembered(nn.Module):
    """A frozen body that computes each batch once."""

    def __init__(self, body: Backbone, memory: _Memory) -> None:
        super().__init__()
        self.body, self._digest, self._memory = body, body.digest, memory

    def forward(self, images: Tensor) -> Tensor:
        """As the body does."""
        return self._memory.features(self._digest, self.body, images)


@contextmanager
def _remembering(net: nn.Module, images: Path, rows: NDArray[np.int64]) -> Iterator[_Memory]:
    """Within it, frozen bodies of the network remember their features of these images."""
    _MEMORY.begin((images, rows.tobytes()))
    places = [(each, place) for each in net.modules() if isinstance(each, Transfer) for place in each.frozen_bodies]
    bodies = [part.bodies[place] for part, place in places]
    for (part, place), body in zip(places, bodies, strict=True):
        if isinstance(body, Backbone):
            part.bodies[place] = _Remembered(body, _MEMORY).eval()
    try:
        yield _MEMORY
    finally:
        for (part, place), body in zip(places, bodies, strict=True):
            part.bodies[place] = body


class _Answers:
    """The probabilities of a program for some images under a view."""

    def __init__(
        self,
        program: nn.Module,
        images: NDArray[np.uint8],
        rows: NDArray[np.int64],
        memory: _Memory,
        batch: int,
        hurry: Callable[[], bool],
    ) -> None:
        self._program, self._images, self._rows, self._memory, self._batch = program, images, rows, memory, batch
        self._hurry = hurry

    def __call__(self, view: View) -> Tensor:
        parts = []
        with torch.inference_mode():
            for start in range(0, len(self._rows), self._batch):
                if self._hurry():
                    raise _TimeOverError
                self._memory.batch = view, start
                pixels = torch.from_numpy(self._images[self._rows[start : start + self._batch]])
                parts.append(self._program(view(pixels)))
        return torch.cat(parts)


def latencies(net: nn.Module, config: Mapping[str, Any], views: tuple[View, ...]) -> dict[str, float]:
    """Milliseconds for one image on the CPU, the median of 15: of the plain program, and with these views."""
    found = {}
    for name, each in (("plain", (PLAIN,)), ("views", views)):
        program: Callable[[Tensor], Tensor] = whole_program(net, {**config, "views": [asdict(view) for view in each]})
        image, seconds = torch.zeros((1, *config["image_shape"]), dtype=torch.uint8), []
        with torch.inference_mode():
            for _ in range(3 + _REPEATS):  # the first three warm up
                started = time.perf_counter()
                program(image)
                seconds.append(time.perf_counter() - started)
        found[name] = 1000 * median(seconds[3:])
    return found
