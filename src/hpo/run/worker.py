"""One candidate in, epochs out: what a worker does, whatever engine it runs in."""

from __future__ import annotations

import time
import traceback
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpo.errors import HpoError
from hpo.records import DataCard, Epoch, EpochEnded, TrialEnded, TrialResult, TrialState
from hpo.spec.study import Setup

# A verdict is what an epoch is answered with: go on (True) or end as pruned (False).
Training = Generator[EpochEnded | TrialEnded, bool, None]


@dataclass(frozen=True)
class Task:
    """All that a worker needs to train one candidate.

    data never leads to the test part, whatever card is given. folder is where weights and validation probabilities are
    left. precisions, most_parameters and latency are those of hpo.learn.trial.train_trial. wait says whether every
    epoch waits for a verdict.
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

    def __post_init__(self) -> None:
        object.__setattr__(self, "data", self.data.sealed)  # here, so that no maker of tasks can forget it


def train_task(task: Task, device_name: str) -> Training:
    """Yield EpochEnded after each epoch, answered with a verdict, and TrialEnded at the end, whatever happens."""
    # Imported here: the supervisor knows tasks and engines without waiting for torch.
    from hpo.learn.trial import train_trial

    started = time.perf_counter()
    epochs: list[Epoch] = []
    try:
        training = train_trial(
            task.setup,
            task.data,
            number=task.number,
            seed=task.seed,
            folder=Path(task.folder),
            device_name=device_name,
            precisions=task.precisions,
            most_parameters=task.most_parameters,
            latency=task.latency,
        )
        go_on: bool | None = None
        try:
            while True:
                epoch = next(training) if go_on is None else training.send(go_on)
                epochs.append(epoch)
                go_on = yield EpochEnded(task.number, epoch)
        except StopIteration as end:
            result: TrialResult = end.value
    except HpoError as error:
        result = _failed(task, str(error))
    except Exception as error:  # noqa: BLE001 - whatever a candidate does, the study goes on
        result = _failed(task, f"{type(error).__name__}: {error}")
    yield TrialEnded(replace(result, epochs=tuple(epochs), seconds=time.perf_counter() - started))


def _failed(task: Task, reason: str) -> TrialResult:
    return TrialResult(task.number, TrialState.FAILED, reason=reason, traceback=traceback.format_exc())
