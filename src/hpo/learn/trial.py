"""One candidate, trained and left on disk for whoever keeps it: data, network, precision, training, best weights."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from hpo.learn.data import TrialData, open_trial
from hpo.learn.export import save_trained
from hpo.learn.metrics import confusion_matrix
from hpo.learn.models import build_model, parameter_count
from hpo.learn.precision import faster_precision
from hpo.learn.train import best_of, normalisation, predict_logits, to_input, train
from hpo.records import DataCard, Epoch, TrialResult, TrialState
from hpo.spec.study import Setup, SplitSpec

VALIDATION = "validation.npz"  # rows, labels, probabilities of the validation part at the best epoch


def train_trial(
    setup: Setup,
    card: DataCard,
    *,
    number: int,
    seed: int,
    objective: str,
    folder: Path,
    device_name: str,
    precisions: Mapping[str, str],
) -> Generator[Epoch, bool, TrialResult]:
    """Yield each epoch, to be answered with whether to go on, and return how the trial ended.

    A complete trial leaves its best weights and validation probabilities in folder. precisions holds what was measured
    before for a kind and size of network (TrialResult.settings["precision_key"]), so that like trials train alike.
    The result has neither epochs nor seconds: the caller saw them pass.
    """
    device = torch.device(device_name)
    data = trial_data(card, setup.split, device_name)
    spec = setup.training
    net = build_model(setup.model, image_shape=card.image_shape, classes=len(data.class_names), seed=seed).to(device)
    parameters = parameter_count(net)
    key = f"{device_name} {setup.model.kind} 2^{parameters.bit_length()} batch {spec.batch_size}"
    precision: str = spec.precision
    if precision == "auto":
        precision = precisions.get(key) or measured_precision(net, data, spec.batch_size)
    epochs: list[Epoch] = []
    state = TrialState.COMPLETE
    training = train(net, data, spec, seed=seed if spec.seed is None else spec.seed, precision=precision)
    for epoch in training:
        epochs.append(epoch)
        if not (yield epoch):
            state = TrialState.PRUNED
            training.close()
            break
    best = best_of(tuple(epochs), spec.monitor)
    complete = state is TrialState.COMPLETE
    return TrialResult(
        number=number,
        state=state,
        value=best.scores[objective],
        best_epoch=best.number,
        scores=best.scores,
        parameter_count=parameters,
        confusion=_leave(net, data, folder, precision) if complete else (),
        settings={
            "device": device_name,
            "precision": precision,
            "precision_key": key,
            "threads": str(torch.get_num_threads()),
        },
        folder=str(folder) if complete else "",
    )


@lru_cache(maxsize=1)
def trial_data(card: DataCard, split: SplitSpec, device_name: str) -> TrialData:
    """open_trial, remembered: the candidates of a study nearly always share their data, and it moves only once."""
    return open_trial(card, split, device=torch.device(device_name))


def measured_precision(net: nn.Module, data: TrialData, batch_size: int) -> str:
    """float32 or bfloat16, whichever trains a batch of this data faster."""
    rows = data.train[:batch_size]
    scale, shift = normalisation(data.mean, data.std, data.images.device)
    return faster_precision(net, to_input(data.images[rows], scale, shift), data.labels[rows])


def _leave(net: nn.Module, data: TrialData, folder: Path, precision: str) -> tuple[tuple[int, ...], ...]:
    """Save the best weights and the validation probabilities; return the validation confusion matrix."""
    save_trained(net, data, folder)
    logits = predict_logits(net, data, data.valid, precision=precision)
    labels = data.labels[data.valid]
    np.savez(
        folder / VALIDATION,
        rows=data.valid.cpu().numpy(),
        labels=labels.cpu().numpy(),
        probabilities=logits.softmax(1).cpu().numpy(),
    )
    counts = confusion_matrix(logits.argmax(1), labels, logits.shape[1])
    return tuple(tuple(row) for row in counts.tolist())
