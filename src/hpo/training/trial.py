"""One trial: build its network, choose its precision, train its folds, leave its best weights on disk."""

from __future__ import annotations

import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from statistics import fmean, median, pstdev
from typing import Any

import torch
from torch import Tensor, nn

from hpo.data.prepare import TrialData, check_task, open_trial
from hpo.home import cache_folder
from hpo.models import build_model, input_of, parameter_count, save_trained
from hpo.models.basic import OneLogit, whitening_of
from hpo.models.transfer import transfer_of
from hpo.records import DataCard, Epoch, TrialResult, TrialState, best_of
from hpo.spec.models import OwnModelSpec
from hpo.spec.study import Setup, SplitSpec
from hpo.training.checkpoint import Checkpoint, Saved
from hpo.training.data_parallel import ALONE, Ranks
from hpo.training.device import Graph, choose_graph, faster_precision, layout
from hpo.training.features import cached_views, features_of
from hpo.training.loop import predict_logits, train
from hpo.training.profiler import TrainingProfiler
from hpo.training.stack import Stacks, alongside
from hpo.training.stack_layers import convolves, unstackable_reason
from hpo.training.stack_speed import shared_precision, why_slower_stacked
from hpo.training.step_graph import why_not
from hpo.training.teacher import soft_labels
from hpo.training.validation import leave_predictions

_WHITENED = 2000  # training images whose patches decide a whitening layer: their covariance has settled by then


@dataclass(frozen=True)
class TrialPlan:
    """What one trial trains, and how; it does not change on the way.

    seed drives initial weights, data order and dropout. folder is where the best weights and validation probabilities
    are left. until is the value of the monitor with which a training ends. precisions holds what was measured before
    for a kind and size of network (TrialResult.settings["precision_key"]), so that similar trials use the same one. A
    network with more than most_parameters weights is pruned before its first epoch. latency asks for the score
    latency_ms. checkpoint is the file of training.checkpoint, which the caller deletes. not_stacked says why the trial
    must not share its computation, "" if it may. profile asks for TrialResult.profile. ranks are the processes that
    train it together, whose plans differ in rank and device only.
    """

    setup: Setup
    card: DataCard
    number: int
    seed: int
    folder: Path
    device_name: str
    until: float | None = None
    precisions: Mapping[str, str] = field(default_factory=dict)
    most_parameters: float = float("inf")
    latency: bool = False
    checkpoint: Path | None = None
    not_stacked: str = ""
    profile: bool = False
    ranks: Ranks = ALONE

    @property
    def folds(self) -> int:
        """The number of trainings, each from fresh weights."""
        return self.setup.split.folds if self.setup.split.kind == "kfold" else 1


@dataclass(frozen=True)
class Built:
    """A freshly built network on its device with its data.

    net learns from data. For the head of a frozen backbone, data holds features; full_net is then the whole network and
    pixels its images. not_stacked says why net can share its computation with no other training, "" if it can.
    """

    net: nn.Module
    data: TrialData
    full_net: nn.Module
    pixels: TrialData
    parameters: int
    precision: str
    key: str
    not_stacked: str


def train_trial(
    plan: TrialPlan, *, stacks: Stacks | None = None, decided: dict[str, str] | None = None
) -> Generator[Epoch | None, bool, TrialResult]:
    """Yield each epoch, to be answered with True to continue or False to prune; return the trial's result.

    With kfold, one training per fold follows another; scores are then means over folds, with <score>_std for their
    standard deviations. A complete trial of one fold leaves its best weights and validation probabilities in
    plan.folder. scores also holds `parameters` and, if asked for, `latency_ms`. The caller adds value, epochs and
    seconds to the result.

    With training.checkpoint the trial resumes from the file, if there is one: its epochs are yielded again first, and
    the result is that of an uninterrupted trial.

    With stacks the trial shares its computation with others where it can. It then yields None before each shared epoch:
    the caller advances all its trials once before it advances those that yielded None again. This is the only place
    where stacking shows outside of hpo.training.stack. decided receives the settings of the result as they are
    known, for a caller that wants them although an error ends the trial.
    """
    return (yield from _Trial(plan, stacks, {} if decided is None else decided).run())


class _Trial:
    """The state of a trial while it runs."""

    def __init__(self, plan: TrialPlan, stacks: Stacks | None, decided: dict[str, str]) -> None:
        self._plan, self._stacks, self._decided = plan, stacks, decided
        self._spec, self._ranks = plan.setup.training, plan.ranks
        path = plan.checkpoint if self._spec.checkpoint else None
        self._checkpoint = Checkpoint(
            path, plan.setup, plan.card, seed=plan.seed, device_name=plan.device_name, ranks=plan.ranks
        )
        self._saved = self._checkpoint.load()
        self._precisions = {**plan.precisions, **self._saved.precisions}
        self._profiler = TrainingProfiler() if plan.profile else None
        self._graph: Graph | None = None
        self._epochs: list[Epoch] = []  # of all folds
        self._best: list[Epoch] = []  # of each fold

    def run(self) -> Generator[Epoch | None, bool, TrialResult]:
        """Train fold after fold, as train_trial says."""
        plan = self._plan
        self._decided |= {"device": plan.device_name, "threads": str(torch.get_num_threads())}
        self._decided |= {"ranks": str(plan.ranks.count)} if plan.ranks.count > 1 else {}
        self._ranks.join(plan.device_name)
        complete = True
        for fold in range(plan.folds):
            built = self._build(fold)
            if built.parameters > plan.most_parameters:
                return self._too_large(built)
            complete = yield from self._train_fold(built, fold)
            if not complete:
                break
        return self._result(built, complete=complete)

    def _build(self, fold: int) -> Built:
        """Build the network of a fold and note its precision, so that later ones use the same."""
        plan, stacks = self._plan, self._stacks
        built = build(
            replace(plan, precisions={**self._precisions, **(stacks.precisions if stacks else {})}),
            fold=fold,
            stacks=stacks,
        )
        built = replace(built, precision=self._ranks.same(built.precision))
        if built.parameters <= plan.most_parameters:
            self._decided["precision"] = built.precision
            if self._spec.precision == "auto":  # a requested precision was not compared with others
                self._decided["precision_key"] = built.key
                self._precisions[built.key] = built.precision
                if stacks is not None:
                    stacks.precisions[built.key] = built.precision
        return built

    def _too_large(self, built: Built) -> TrialResult:
        number, limit = built.parameters, self._plan.most_parameters
        return TrialResult(
            self._plan.number,
            TrialState.PRUNED,
            scores={"parameters": float(number)},
            parameter_count=number,
            reason=f"{number} parameters, and the search allows {limit:g}",
        )

    def _train_fold(self, built: Built, fold: int) -> Generator[Epoch | None, bool, bool]:
        """Yield the epochs of one fold, saved ones first; True unless the trial is pruned."""
        if not self._saved.fits(built.net):
            self._saved = Saved()
        earlier = self._saved.of(fold)
        ended = bool(earlier) and earlier[-1].last
        first, last_fold = len(self._epochs), fold == self._plan.folds - 1
        fit = self._fit(built, fold, resume=self._saved.state if earlier and not ended else None, ended=ended)
        complete = True
        for epoch in chain(earlier, () if ended else fit):
            if epoch is None:
                yield None
                continue
            self._epochs.append(replace(epoch, fold=fold))
            answer = yield self._epochs[-1]
            # To prune the very last epoch would save nothing.
            complete = answer or (epoch.last and last_fold)
            if not complete:
                fit.close()
                break
        self._best.append(best_of(tuple(self._epochs[first:]), self._spec.monitor))
        if complete and not last_fold and not ended:
            self._checkpoint.save(self._epochs, self._precisions)
        return complete

    def _fit(
        self, built: Built, fold: int, *, resume: Mapping[str, Any] | None, ended: bool
    ) -> Generator[Epoch | None, None, None]:
        """The epochs of one training: in a stack, alongside one, or alone; ended: none will be asked for."""
        plan, stacks, decided = self._plan, self._stacks, self._decided
        seed = (plan.seed if self._spec.seed is None else self._spec.seed) + fold
        if stacks is not None and not built.not_stacked:
            decided["stack"], decided["layout"] = "shared", "of its stack"
            return stacks.join(
                built.net, built.data, self._spec, seed=seed, precision=built.precision, until=plan.until
            )

        def save(epoch: Epoch, state: Mapping[str, Any]) -> None:
            self._checkpoint.save([*self._epochs, replace(epoch, fold=fold)], self._precisions, state)

        decided["layout"] = layout(torch.device(plan.device_name), built.precision)
        alone = self._ranks.count == 1 and not ended
        self._graph = _graph(built, plan.setup, profiled=self._profiler is not None) if alone else None
        fit = train(
            built.net,
            built.data,
            self._spec,
            seed=seed,
            precision=built.precision,
            resume=resume,
            save=save,
            graph=self._graph,
            ranks=self._ranks,
            until=plan.until,
        )
        if self._profiler is not None:
            fit = self._profiler.watch(fit)
        if stacks is None:
            return fit
        decided["stack"] = f"alone: {built.not_stacked}"
        return alongside(fit, built.data.images.device)

    def _result(self, built: Built, *, complete: bool) -> TrialResult:
        plan, best = self._plan, self._best
        self._decided |= {"graph": self._graph.how} if self._graph else {}
        scores = {**_means(best), "parameters": float(built.parameters)}
        if plan.latency and self._ranks.leads:
            scores["latency_ms"] = latency_ms(built.full_net, built.pixels)
        result = TrialResult(
            number=plan.number,
            state=TrialState.COMPLETE if complete else TrialState.PRUNED,
            best_epoch=round(fmean(epoch.number for epoch in best)),
            scores=scores,
            folds=tuple(epoch.scores for epoch in best) if plan.folds > 1 else (),
            parameter_count=built.parameters,
            settings=self._decided,
            profile=self._profiler.result() if self._profiler else None,
        )
        leaves = complete and plan.folds == 1 and self._ranks.leads
        return _leave(result, built, plan) if leaves else result


def _graph(built: Built, setup: Setup, *, profiled: bool) -> Graph | None:
    """A CUDA graph of the steps or of the network, or the reason why there is none; None on other devices.

    profiled: the phases of a step are to be seen, which a graph of the whole hides.
    """
    if built.data.images.device.type != "cuda":
        return None
    own, training = isinstance(setup.model, OwnModelSpec), setup.training
    reason = why_not(built.net, built.data, training, own=own)
    if not reason and not profiled:
        return Graph(None, torch.Size(), "whole steps", whole=True)
    return choose_graph(built.net, built.data, setup.training, precision=built.precision, own=own)


@lru_cache(maxsize=16)
def trial_data(card: DataCard, split: SplitSpec, device_name: str, fold: int = 0) -> TrialData:
    """open_trial, remembered: the trials of a study nearly always share their data, which then moves only once."""
    return open_trial(card, split, device=torch.device(device_name), fold=fold)


@lru_cache(maxsize=4)
def _taught(teacher: str, card: DataCard, split: SplitSpec, device_name: str, fold: int) -> Tensor:
    return soft_labels(teacher, trial_data(card, split, device_name, fold))


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


def build(plan: TrialPlan, *, fold: int = 0, stacks: Stacks | None = None) -> Built:
    """The network of a trial and what it learns from; missing features of frozen backbones are computed.

    stacks are those of its process. If they have room for several trainings, an automatic precision is the faster one
    of a stack, and networks with convolutions stay out of it where they train faster alone. Neither is measured for
    more than plan.most_parameters weights.
    """
    setup, card, device_name = plan.setup, plan.card, plan.device_name
    full_net, pixels = build_full(setup, card, seed=plan.seed + fold, device_name=device_name, fold=fold)
    net, data = full_net, pixels
    transfer = transfer_of(full_net)
    if transfer is not None and cached_views(setup) is not None:
        data = features_of(transfer, setup, pixels, digest=card.digest, cache=cache_folder())
        net = OneLogit(transfer.head) if setup.task == "binary" else transfer.head
    if setup.training.teacher is not None:
        data = replace(data, taught=_taught(setup.training.teacher, card, setup.split, device_name, fold))
    parameters, batch_size = parameter_count(full_net), setup.training.batch_size
    too_large = parameters > plan.most_parameters
    key = f"{torch.device(device_name).type} {setup.model.kind} 2^{parameters.bit_length()} batch {batch_size}"
    not_stacked = plan.not_stacked or _why_not_stacked(net, data, setup, stacks, "" if too_large else key)
    stacked = stacks is not None and stacks.places > 1 and not not_stacked
    key += " in a stack" * stacked
    precision: str = setup.training.precision
    if precision == "auto" and (key in plan.precisions or too_large):
        precision = plan.precisions.get(key, "float32")
    elif precision == "auto":
        precision = (
            shared_precision(net, data, setup.training) if stacked else measured_precision(net, data, batch_size)
        )
    return Built(net, data, full_net, pixels, parameters, precision, key, not_stacked)


def _why_not_stacked(net: nn.Module, data: TrialData, setup: Setup, stacks: Stacks | None, key: str) -> str:
    """The reason why a training shares its computation with no other; "" if it can.

    Stacks of convolutions on small images are faster, on larger ones slower: that is measured once for each key; ""
    measures nothing.
    """
    if isinstance(setup.model, OwnModelSpec):
        return "it is a network of your own"
    if reason := unstackable_reason(net, data, setup.training):
        return reason
    if stacks is None or stacks.places <= 1 or not key or not convolves(net):
        return ""
    if key not in stacks.slower:
        stacks.slower[key] = why_slower_stacked(net, data, setup.training)
    return stacks.slower[key]


def build_full(
    setup: Setup, card: DataCard, *, seed: int, device_name: str, fold: int = 0
) -> tuple[nn.Module, TrialData]:
    """The whole network of a trial on its device, and its images with the normalisation that it expects."""
    check_task(card, setup.task)
    data = trial_data(card, setup.split, device_name, fold)
    classes, binary = len(data.class_names), setup.task == "binary"
    net = build_model(setup.model, image_shape=card.image_shape, classes=classes, seed=seed, binary=binary)
    if transfer_of(net) is not None:
        # Backbones normalise themselves, each as its weights require.
        channels = card.image_shape[2]
        data = replace(data, mean=(0.0,) * channels, std=(1.0,) * channels)
    if (whitening := whitening_of(net)) is not None:
        rows = data.train[torch.linspace(0, len(data.train) - 1, min(len(data.train), _WHITENED)).long()]
        whitening.fit(_input(data, rows))
    return net.to(torch.device(device_name)), data


def _input(data: TrialData, rows: Tensor) -> Tensor:
    return input_of(data)(data.images[rows])


def _means(best: list[Epoch]) -> dict[str, float]:
    """Each score at the best epoch: mean over folds, and as <score>_std the standard deviation (divisor n)."""
    if len(best) == 1:
        return dict(best[0].scores)
    columns = {name: [epoch.scores[name] for epoch in best] for name in best[0].scores}
    means = {name: fmean(values) for name, values in columns.items()}
    return means | {f"{name}_std": pstdev(values) for name, values in columns.items()}


def _leave(result: TrialResult, built: Built, plan: TrialPlan) -> TrialResult:
    """Save the best weights and the validation probabilities; the result with the validation confusion matrix."""
    data, folder = built.data, plan.folder
    save_trained(built.full_net, plan.setup, built.pixels, folder)
    if not len(data.valid):
        return replace(result, folder=str(folder))
    micro_batch = plan.setup.training.micro_batch
    logits = predict_logits(built.net, data, data.valid, precision=built.precision, micro_batch=micro_batch)
    return leave_predictions(result, logits, data.labels[data.valid], rows=data.valid, folder=folder)
