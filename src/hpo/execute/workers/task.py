"""One candidate in, epochs out: what a worker does, whatever engine it runs in."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import DataError, HpoError, NotFiniteError, disk_full, redact
from hpo.records import DataCard, Epoch, EpochEnded, FailureKind, TrialEnded, TrialResult, TrialState
from hpo.spec.models import OwnModelSpec
from hpo.spec.study import Setup

if TYPE_CHECKING:
    from hpo.training.stacking.stack import Stacks

# A verdict is what an epoch is answered with: go on (True) or end as pruned (False). None comes from trainings that
# share their computation: all of them are to be asked once before the first of them trains.
Training = Generator[EpochEnded | TrialEnded | None, bool, None]

_HALVINGS = 2  # how often a training that runs out of memory begins again with less


@dataclass(frozen=True)
class Task:
    """All that a worker needs to train one candidate.

    data never leads to the test part, whatever card is given. folder is where weights and validation probabilities are
    left; checkpoint is the file that the training is saved in and goes on from ("": none). precisions, most_parameters,
    latency and profile are those of hpo.training.trial.TrialPlan. wait says whether every epoch waits for a verdict;
    alone, that it shares neither process nor
    computation with another.
    """

    number: int
    setup: Setup
    seed: int
    data: DataCard
    folder: str
    precisions: Mapping[str, str] = field(default_factory=dict)
    most_parameters: float = float("inf")
    latency: bool = False
    wait: bool = False
    checkpoint: str = ""
    profile: bool = False
    alone: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.data.sealed)  # here, so that no maker of tasks can forget it


def train_task(task: Task, device_name: str, stacks: Stacks | None = None) -> Training:
    """Yield EpochEnded after each epoch, answered with a verdict, and TrialEnded at the end, whatever happens.

    stacks are those of the process: with them it also yields None before each epoch that it shares with others.

    Where a computation that it shares fails it begins again alone, be the fault its own or another's. Where memory does
    not suffice the training begins again, twice at most, with half as many images at once in the
    network and the same effective batch (its epochs are yielded again then). After that the candidate is infeasible:
    pruned, so that samplers learn from it.
    """
    # Imported here: the supervisor knows tasks and engines without waiting for torch.
    from hpo.training.compute.device import free_memory, halved
    from hpo.training.stacking.compatibility import BrokenStackError

    started, asked, apart = time.perf_counter(), task.setup, ""
    try:
        result = yield from _attempt(task, device_name, stacks)
    except BrokenStackError as error:
        apart = f"the computation that it shared failed: {error}"
    if apart:  # here, where the error holds nothing any more
        free_memory()
        result = yield from _attempt(task, device_name, stacks, apart=apart)
    for _ in range(_HALVINGS):
        smaller = halved(task.setup)
        if result.failure is not FailureKind.OUT_OF_MEMORY or smaller is None:
            break
        free_memory()
        task = replace(task, setup=smaller)
        result = yield from _attempt(task, device_name, stacks, apart=apart)
    if task.setup is not asked:
        result = replace(result, settings={**result.settings, "micro_batch": str(task.setup.training.micro_batch)})
    if result.failure is FailureKind.OUT_OF_MEMORY:
        at_once = task.setup.training.micro_batch or task.setup.training.batch_size
        reason = f"out of memory, with {at_once} images at once: {result.reason}"
        result = replace(result, state=TrialState.PRUNED, feasible=False, reason=reason)
    yield TrialEnded(replace(result, seconds=time.perf_counter() - started))


def _attempt(
    task: Task, device_name: str, stacks: Stacks | None, *, apart: str = ""
) -> Generator[EpochEnded | None, bool, TrialResult]:
    """Train once; the result has its epochs. Raises BrokenStackError."""
    from hpo.training.stacking.compatibility import BrokenStackError
    from hpo.training.trial import TrialPlan, train_trial

    epochs: list[Epoch] = []
    how: dict[str, str] = {}
    try:
        plan = TrialPlan(
            task.setup,
            task.data,
            number=task.number,
            seed=task.seed,
            folder=Path(task.folder),
            device_name=device_name,
            precisions=task.precisions,
            most_parameters=task.most_parameters,
            latency=task.latency,
            checkpoint=Path(task.checkpoint) if task.checkpoint else None,
            profile=task.profile,
            not_stacked=apart,
        )
        training = train_trial(plan, stacks=None if task.alone else stacks, decided=how)
        go_on: bool | None = None
        try:
            while True:
                epoch = next(training) if go_on is None else training.send(go_on)
                if epoch is None:
                    go_on = yield None
                    continue
                epochs.append(epoch)
                go_on = yield EpochEnded(task.number, epoch)
        except StopIteration as end:
            result: TrialResult = end.value
    except BrokenStackError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a candidate does, the study goes on
        if disk_full(error):
            return replace(without_room(task), epochs=tuple(epochs))
        reason = str(error) if isinstance(error, HpoError) else f"{type(error).__name__}: {error}"
        # Both are stored: what a model of the user's own raises may name the environment.
        told = redact(traceback.format_exc())
        kind = _kind(error, own=isinstance(task.setup.model, OwnModelSpec))
        result = TrialResult(
            task.number, TrialState.FAILED, reason=redact(reason), traceback=told, failure=kind, settings=how
        )
    return replace(result, epochs=tuple(epochs))


def _kind(error: Exception, *, own: bool) -> FailureKind:
    """own: the network is the user's."""
    from hpo.training.compute.device import is_out_of_memory

    if is_out_of_memory(error):
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, NotFiniteError):
        return FailureKind.NOT_FINITE
    if isinstance(error, DataError):
        return FailureKind.DATA
    # What a network of the user's raises while it is built comes wrapped in an error that says which network it is.
    raised = not isinstance(error, HpoError) or (own and error.__cause__ is not None)
    return FailureKind.EXCEPTION if raised else FailureKind.SETUP


def without_room(task: Task) -> TrialResult:
    """A full disk is no fault of the candidate, which is tried again; what it has written is of no use."""
    shutil.rmtree(task.folder, ignore_errors=True)
    return TrialResult(task.number, TrialState.STOPPED, reason=f"{task.folder}: no space left on the disk.")
