"""One candidate, trained and left on disk for whoever keeps it: data, network, precision, folds, best weights."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from statistics import fmean, median, pstdev
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hpo.data.prepare import TrialData, cache_folder, open_trial
from hpo.metrics import confusion_matrix
from hpo.models import build_model, parameter_count
from hpo.models.binary import OneLogit
from hpo.models.inputs import input_of
from hpo.models.saved import save_trained
from hpo.models.transfer import standing_of
from hpo.records import DataCard, Epoch, TrialResult, TrialState, best_of, pack_classes
from hpo.spec.models import OwnModelSpec
from hpo.spec.study import Setup, SplitSpec
from hpo.training.checkpoint import Checkpoint, Saved
from hpo.training.compute.cuda_graphs import Graph, choose_graph
from hpo.training.compute.precision import faster_precision, layout
from hpo.training.features import cached_views, features_of
from hpo.training.loop import predict_logits, train
from hpo.training.profiler import TrainingProfiler
from hpo.training.stacking.compatibility import convolves
from hpo.training.stacking.speed import shared_precision, why_apart
from hpo.training.stacking.stack import Stacks, beside, why_alone

VALIDATION = "validation.npz"  # rows, labels, probabilities of the validation part at the best epoch


@dataclass(frozen=True)
class Built:
    """A freshly built network on its device with its data, and how it will be computed.

    net learns from data. Where a frozen backbone has seen the images already, that is the head of `whole`, and data has
    features in place of `pixels`. alone says why it can share its computation with no other training, "" where it can.
    """

    net: nn.Module
    data: TrialData
    whole: nn.Module
    pixels: TrialData
    parameters: int
    precision: str
    key: str
    alone: str


def train_trial(
    setup: Setup,
    card: DataCard,
    *,
    number: int,
    seed: int,
    folder: Path,
    device_name: str,
    precisions: Mapping[str, str],
    most_parameters: float = float("inf"),
    latency: bool = False,
    checkpoint: Path | None = None,
    stacks: Stacks | None = None,
    apart: str = "",
    how: dict[str, str] | None = None,
    profile: bool = False,
) -> Generator[Epoch | None, bool, TrialResult]:
    """Yield each epoch, to be answered with whether to go on, and return how the trial ended.

    With kfold, fold after fold is trained from fresh weights; scores are then means over folds, with <score>_std beside
    them. A complete trial of one fold leaves its best weights and validation probabilities in folder. precisions holds
    what was measured before for a kind and size of network (TrialResult.settings["precision_key"]), so that like trials
    train alike. A network of more than most_parameters weights is pruned before its first epoch. scores holds
    `parameters`, and with latency=True `latency_ms` too. The result has neither value, epochs nor seconds: those are
    the caller's.

    With training.checkpoint the state is saved in the file checkpoint, which is the caller's to delete. Where one is
    found the training goes on from it: its epochs are yielded again first, and the end is that of a training in one go.

    With stacks it shares its computation with others of them where it can, and yields None before each shared epoch;
    apart says why it is not to. how is filled with what the machine decides, the settings of the result: where this
    raises, that is known, too.
    With profile=True the result says where the time went; stacks are to be None then.
    """
    spec = setup.training
    profiler = TrainingProfiler() if profile else None
    keep = Checkpoint(checkpoint if spec.checkpoint else None, setup, card, seed=seed, device_name=device_name)
    saved = keep.load()
    precisions = {**precisions, **saved.precisions}
    folds = setup.split.folds if setup.split.kind == "kfold" else 1
    best: list[Epoch] = []
    before: tuple[Epoch, ...] = ()  # of earlier folds
    complete = True
    how = {} if how is None else how
    how |= {"device": device_name, "threads": str(torch.get_num_threads())}
    for fold in range(folds):
        made = build(
            setup,
            card,
            seed=seed + fold,
            fold=fold,
            device_name=device_name,
            precisions={**precisions, **(stacks.precisions if stacks else {})},
            most_parameters=most_parameters,
            stacks=stacks,
            apart=apart,
        )
        if made.parameters > most_parameters:
            reason = f"{made.parameters} parameters, and the search allows {most_parameters:g}"
            costs = {"parameters": float(made.parameters)}
            return TrialResult(number, TrialState.PRUNED, scores=costs, parameter_count=made.parameters, reason=reason)
        how["precision"] = made.precision
        if spec.precision == "auto":  # a precision that was asked for says nothing of which is faster
            how["precision_key"] = made.key
            precisions = {**precisions, made.key: made.precision}
            if stacks is not None:
                stacks.precisions[made.key] = made.precision
        saved = saved if saved.fits(made.net) else Saved()
        earlier = saved.of(fold)
        ended = bool(earlier) and earlier[-1].last
        epochs: list[Epoch] = []

        def save(epoch: Epoch, state: Mapping[str, Any]) -> None:
            keep.save([*before, *epochs, replace(epoch, fold=fold)], precisions, state)  # noqa: B023 - called at once

        fit_seed = (seed if spec.seed is None else spec.seed) + fold
        resume = saved.state if earlier and not ended else None
        fit: Generator[Epoch | None, None, None]
        if stacks is not None and not made.alone:
            how["stack"], how["layout"] = "shared", "of its stack"
            fit = stacks.join(made.net, made.data, spec, seed=fit_seed, precision=made.precision)
        else:
            how["layout"] = layout(torch.device(device_name), made.precision)
            graph = _graph(made, setup) if not ended else None
            how |= {"graph": graph.how} if graph else {}
            alone = train(
                made.net,
                made.data,
                spec,
                seed=fit_seed,
                precision=made.precision,
                resume=resume,
                save=save,
                graph=graph,
            )
            fit = profiler.watch(alone) if profiler else alone
            if stacks is not None:
                how["stack"], fit = f"alone: {made.alone}", beside(fit, made.data.images.device)
        for epoch in chain(earlier, () if ended else fit):
            if epoch is None:
                yield None
                continue
            epochs.append(replace(epoch, fold=fold))
            go_on = yield epochs[-1]
            # A verdict on the very last epoch comes too late to save anything.
            complete = go_on or (epoch.last and fold == folds - 1)
            if not complete:
                fit.close()
                break
        best.append(best_of(tuple(epochs), spec.monitor))
        if not complete:
            break
        before += tuple(epochs)
        if fold < folds - 1 and not ended:
            keep.save(before, precisions)
    scores = {**_means(best), "parameters": float(made.parameters)}
    if latency:
        scores["latency_ms"] = latency_ms(made.whole, made.pixels)
    result = TrialResult(
        number=number,
        state=TrialState.COMPLETE if complete else TrialState.PRUNED,
        best_epoch=round(fmean(epoch.number for epoch in best)),
        scores=scores,
        folds=tuple(epoch.scores for epoch in best) if folds > 1 else (),
        parameter_count=made.parameters,
        settings=how,
    )
    if complete and folds == 1:
        result = _left(result, made, setup, folder)
    return replace(result, profile=profiler.result() if profiler else None)


def _graph(made: Built, setup: Setup) -> Graph | None:
    """A CUDA graph of the network, or why there is none; None where there is no such thing."""
    if made.data.images.device.type != "cuda":
        return None
    own = isinstance(setup.model, OwnModelSpec)
    return choose_graph(made.net, made.data, setup.training, precision=made.precision, own=own)


@lru_cache(maxsize=16)
def trial_data(card: DataCard, split: SplitSpec, device_name: str, fold: int = 0) -> TrialData:
    """open_trial, remembered: the candidates of a study nearly always share their data, and it moves only once."""
    return open_trial(card, split, device=torch.device(device_name), fold=fold)


def measured_precision(net: nn.Module, data: TrialData, batch_size: int) -> str:
    """float32 or bfloat16, whichever trains a batch of this data faster."""
    rows = data.train[:batch_size]
    return faster_precision(net, _input(data, rows), data.labels[rows])


def latency_ms(net: nn.Module, data: TrialData, *, repeats: int = 30) -> float:
    """Milliseconds for one image through the network on its device, float32: the median of `repeats` runs."""
    net.eval()
    image = _input(data, data.train[:1])
    seconds = []
    with torch.inference_mode():
        for _ in range(3 + repeats):  # the first three warm up
            started = time.perf_counter()
            net(image).sum().item()
            seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[3:])


def build(
    setup: Setup,
    card: DataCard,
    *,
    seed: int,
    device_name: str,
    fold: int = 0,
    precisions: Mapping[str, str] = MappingProxyType({}),
    most_parameters: float = float("inf"),
    stacks: Stacks | None = None,
    apart: str = "",
) -> Built:
    """The network of a candidate and what it learns from; features of frozen backbones are computed if need be.

    stacks are those of its process: where several trainings have a place there, an automatic precision is the faster
    one of such a stack, and convolutions stay alone where they are faster so. Neither is measured for more than
    most_parameters weights. apart says why it is to share with none all the same.
    """
    whole, pixels = build_whole(setup, card, seed=seed, device_name=device_name, fold=fold)
    net, data = whole, pixels
    standing = standing_of(whole)
    if standing is not None and cached_views(setup) is not None:
        data = features_of(standing, setup, pixels, digest=card.digest, cache=cache_folder())
        net = OneLogit(standing.head) if setup.task == "binary" else standing.head
    parameters, batch_size = parameter_count(whole), setup.training.batch_size
    key = f"{torch.device(device_name).type} {setup.model.kind} 2^{parameters.bit_length()} batch {batch_size}"
    own = isinstance(setup.model, OwnModelSpec)
    alone = apart or ("it is a network of your own" if own else why_alone(net, data, setup.training))
    stacked = stacks is not None and stacks.places > 1 and not alone
    if stacks is not None and stacked and convolves(net) and parameters <= most_parameters:
        # Those of small images gain from company, those of larger ones lose; no smallest and largest speak for all.
        alone = stacks.apart[key] if key in stacks.apart else why_apart(net, data, setup.training)
        stacks.apart[key], stacked = alone, not alone
    key += " in a stack" * stacked
    precision: str = setup.training.precision
    if precision == "auto" and (key in precisions or parameters > most_parameters):
        precision = precisions.get(key, "float32")
    elif precision == "auto" and stacked:
        precision = shared_precision(net, data, setup.training)
    elif precision == "auto":
        precision = measured_precision(net, data, batch_size)
    return Built(net, data, whole, pixels, parameters, precision, key, alone)


def build_whole(
    setup: Setup, card: DataCard, *, seed: int, device_name: str, fold: int = 0
) -> tuple[nn.Module, TrialData]:
    """The network of a candidate, and the images as it wants them."""
    data = trial_data(card, setup.split, device_name, fold)
    classes, binary = len(data.class_names), setup.task == "binary"
    net = build_model(setup.model, image_shape=card.image_shape, classes=classes, seed=seed, binary=binary)
    if standing_of(net) is not None:
        # Its bodies normalise, each as its weights want it.
        channels = card.image_shape[2]
        data = replace(data, mean=(0.0,) * channels, std=(1.0,) * channels)
    return net.to(torch.device(device_name)), data


def _input(data: TrialData, rows: Tensor) -> Tensor:
    return input_of(data)(data.images[rows])


def _means(best: list[Epoch]) -> dict[str, float]:
    """Each score at the best epoch, as the mean over folds, and beside it the standard deviation (n in the divisor)."""
    if len(best) == 1:
        return dict(best[0].scores)
    columns = {name: [epoch.scores[name] for epoch in best] for name in best[0].scores}
    means = {name: fmean(values) for name, values in columns.items()}
    return means | {f"{name}_std": pstdev(values) for name, values in columns.items()}


def _left(result: TrialResult, made: Built, setup: Setup, folder: Path) -> TrialResult:
    """Save the best weights and the validation probabilities; the result with the validation confusion matrix."""
    data = made.data
    save_trained(made.whole, setup, made.pixels, folder)
    if not len(data.valid):
        return replace(result, folder=str(folder))
    logits = predict_logits(
        made.net, data, data.valid, precision=made.precision, micro_batch=setup.training.micro_batch
    )
    labels = data.labels[data.valid]
    np.savez(
        folder / VALIDATION,
        rows=data.valid.cpu().numpy(),
        labels=labels.cpu().numpy(),
        probabilities=logits.softmax(1).cpu().numpy(),
    )
    predicted = logits.argmax(1)
    counts = confusion_matrix(predicted, labels, logits.shape[1])
    return replace(
        result,
        folder=str(folder),
        confusion=tuple(tuple(row) for row in counts.tolist()),
        predicted=pack_classes(predicted.tolist()),
    )
