"""The training of one candidate by a worker, the same in every engine."""

from __future__ import annotations

import shutil
import time
import traceback
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import DataError, HpoError, NotFiniteError, disk_full, redact
from hpo.events import EpochEnded, TrialEnded
from hpo.records import DataCard, Epoch, FailureKind, TrialResult, TrialState
from hpo.spec.models import OwnModelSpec
from hpo.spec.study import Setup

if TYPE_CHECKING:
    from hpo.training.data_parallel import Ranks
    from hpo.training.stack import Stacks

# Each epoch is answered with a verdict: continue (True) or end as pruned (False). Trainings that share a computation
# yield None first: all of them are asked once before the first of them trains.
Training = Generator[EpochEnded | TrialEnded | None, bool, None]

_HALVINGS = 2  # times that a training that runs out of memory begins again with less


@dataclass(frozen=True)
class Task:
    """All that a worker needs to train one candidate.

    data never leads to the test part, whatever card is given. The worker writes weights and validation probabilities to
    folder, and saves the training in the file checkpoint, from which it resumes ("": none). until, precisions,
    most_parameters, latency and profile are those of hpo.training.trial.TrialPlan. wait: every epoch waits for a
    verdict. exclusive: it shares neither process nor computation with another task. ranks is the number of processes
    that train it together, on devices that follow that of the worker.
    """

    number: int
    setup: Setup
    seed: int
    data: DataCard
    folder: str
    until: float | None = None
    precisions: Mapping[str, str] = field(default_factory=dict)
    most_parameters: float = float("inf")
    latency: bool = False
    wait: bool = False
    checkpoint: str = ""
    profile: bool = False
    exclusive: bool = False
    ranks: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.data.sealed)  # here, so that no maker of tasks can forget it


def train_task(task: Task, device_name: str, stacks: Stacks | None = None) -> Training:
    """Yield EpochEnded after each epoch, answered with a verdict, and TrialEnded at the end, whatever happens.

    stacks are those of the process: with them it also yields None before each epoch that is computed with others.

    A training whose shared computation fails, by its own fault or another's, begins again unstacked. One that runs out
    of memory begins again, twice at most, with half as many images at once in the network and the same effective
    batch; its epochs are yielded again then. After that the candidate is infeasible: pruned, so that samplers learn.
    """
    # Imported here: the supervisor knows tasks and engines without waiting for torch.
    from hpo.training.system_metrics import SystemMetrics, gpus_of

    with SystemMetrics(gpus_of(device_name, task.ranks), worker=task.ranks == 1) as system:
        result = yield from _train(task, device_name, stacks)
    yield TrialEnded(replace(result, system=system.columns()))


def _train(task: Task, device_name: str, stacks: Stacks | None) -> Generator[EpochEnded | None, bool, TrialResult]:
    """Train until an attempt succeeds or nothing more can be changed; the result of the last one."""
    from hpo.training.device import at_once, free_memory, halved
    from hpo.training.stack_layers import BrokenStackError

    started, requested, not_stacked = time.perf_counter(), task.setup, ""
    try:
        result = yield from _attempt(task, device_name, stacks)
    except BrokenStackError as error:
        not_stacked = f"the computation that it shared failed: {error}"
    if not_stacked:  # outside of the handler, where the error keeps no tensors alive
        free_memory()
        result = yield from _attempt(task, device_name, stacks, not_stacked=not_stacked)
    for _ in range(_HALVINGS):
        smaller = halved(task.setup, ranks=task.ranks)
        if result.failure is not FailureKind.OUT_OF_MEMORY or smaller is None:
            break
        free_memory()
        task = replace(task, setup=smaller)
        result = yield from _attempt(task, device_name, stacks, not_stacked=not_stacked)
    changes: dict[str, Any] = {"seconds": time.perf_counter() - started}
    if task.setup is not requested:
        changes["settings"] = {**result.settings, "micro_batch": str(task.setup.training.micro_batch)}
    if result.failure is FailureKind.OUT_OF_MEMORY:
        reason = f"out of memory, with {at_once(task.setup, ranks=task.ranks)} images at once: {result.reason}"
        changes |= {"state": TrialState.PRUNED, "feasible": False, "reason": reason}
    return replace(result, **changes)


def _attempt(
    task: Task, device_name: str, stacks: Stacks | None, *, not_stacked: str = ""
) -> Generator[EpochEnded | None, bool, TrialResult]:
    """Train once; the result has its epochs. Raises BrokenStackError."""
    if task.ranks > 1:
        from hpo.execute.workers.ranks import train_in_ranks

        return (yield from train_in_ranks(train_once, task, device_name))
    return (yield from train_once(task, device_name, stacks, not_stacked=not_stacked))


def train_once(
    task: Task, device_name: str, stacks: Stacks | None = None, *, not_stacked: str = "", ranks: Ranks | None = None
) -> Generator[EpochEnded | None, bool, TrialResult]:
    """Train in this process, which is one of these ranks. Raises BrokenStackError."""
    from hpo.training.data_parallel import ALONE
    from hpo.training.stack_layers import BrokenStackError
    from hpo.training.trial import TrialPlan, train_trial

    epochs: list[Epoch] = []
    settings: dict[str, str] = {}
    try:
        plan = TrialPlan(
            task.setup,
            task.data,
            number=task.number,
            seed=task.seed,
            folder=Path(task.folder),
            device_name=device_name,
            until=task.until,
            precisions=task.precisions,
            most_parameters=task.most_parameters,
            latency=task.latency,
            checkpoint=Path(task.checkpoint) if task.checkpoint else None,
            profile=task.profile,
            not_stacked=not_stacked,
            ranks=ranks or ALONE,
        )
        training = train_trial(plan, stacks=None if task.exclusive else stacks, decided=settings)
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
            return replace(result, epochs=tuple(epochs))
    except BrokenStackError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever a candidate does, the study continues
        return _failed(task, error, epochs, settings)


def _failed(task: Task, error: Exception, epochs: Sequence[Epoch], settings: Mapping[str, str]) -> TrialResult:
    """The result of a training that raised an error."""
    if disk_full(error):
        return disk_full_result(task, epochs)
    reason = str(error) if isinstance(error, HpoError) else f"{type(error).__name__}: {error}"
    return TrialResult(
        task.number,
        TrialState.FAILED,
        epochs=tuple(epochs),
        # Both texts are stored: what a user's own network raises may name the environment.
        reason=redact(reason),
        traceback=redact(traceback.format_exc()),
        failure=_kind(error, own=isinstance(task.setup.model, OwnModelSpec)),
        settings=settings,
    )


def _kind(error: Exception, *, own: bool) -> FailureKind:
    """The kind of a failure; own: the network is the user's."""
    from hpo.training.device import is_out_of_memory

    if is_out_of_memory(error):
        return FailureKind.OUT_OF_MEMORY
    if isinstance(error, NotFiniteError):
        return FailureKind.NOT_FINITE
    if isinstance(error, DataError):
        return FailureKind.DATA
    # An exception from building a user's network is wrapped in an error that names the network.
    raised = not isinstance(error, HpoError) or (own and error.__cause__ is not None)
    return FailureKind.EXCEPTION if raised else FailureKind.SETUP


def disk_full_result(task: Task, epochs: Sequence[Epoch]) -> TrialResult:
    """A full disk is no fault of the candidate, which is tried again; its files are of no use and are removed."""
    shutil.rmtree(task.folder, ignore_errors=True)
    reason = f"{task.folder}: no space left on the disk."
    return TrialResult(task.number, TrialState.STOPPED, epochs=tuple(epochs), reason=reason)
