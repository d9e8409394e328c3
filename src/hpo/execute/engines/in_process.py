"""Training in the supervisor's own process: for tests, for debugging, and where no process can be started."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence

from hpo.events import TrialEnded
from hpo.execute.engines.base import Message, StudyWork, Trainer, WorkerPlan, described, group_devices
from hpo.execute.process import cores
from hpo.execute.workers.task import Task, Training, train_task
from hpo.options import RunOptions


class InProcess:
    """One slot in the calling process; each poll trains one epoch."""

    slots = 1

    def __init__(self, device: str = "cpu", *, trainer: Trainer = train_task) -> None:
        self._device = device
        self._trainer = trainer
        self._training: Training | None = None
        self._go_on: bool | None = None  # None: the generator has not started

    def accepts(self, slot: int) -> bool:  # noqa: ARG002 - there is one slot
        """Always."""
        return True

    def submit(self, slot: int, task: Task) -> None:  # noqa: ARG002 - there is one slot
        """Start the task."""
        self._training, self._go_on = self._trainer(task, self._device), None

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """Train one more epoch, unless the timeout is 0. What the network prints goes to standard error."""
        if self._training is None or not timeout:
            return []
        with contextlib.redirect_stdout(sys.stderr):  # standard output belongs to the command
            message = next(self._training) if self._go_on is None else self._training.send(self._go_on)
        self._go_on = True
        if message is None:
            return []
        if isinstance(message, TrialEnded):
            self._training.close()
            self._training = None
        return [(0, message)]

    def verdict(self, slot: int, *, go_on: bool) -> None:  # noqa: ARG002 - there is one slot
        """Answer the last epoch."""
        self._go_on = go_on

    def close(self) -> None:
        """End the training where it is."""
        if self._training is not None:
            self._training.close()
            self._training = None


class InProcessFactory:
    """The engine of --workers 0."""

    stacks = False

    def __init__(self, options: RunOptions) -> None:
        self.device = options.device
        self._options = options

    def connect(self) -> None:
        """There is nothing to reach."""

    def plan(self, devices: Sequence[str], *, most: int) -> WorkerPlan:  # noqa: ARG002 - it is one worker
        """One worker, on the first device."""
        first, ranks = group_devices(devices, self._options)[0], self._options.ranks
        return WorkerPlan((first,), max(1, cores() // ranks), described([first], ranks), ranks)

    def start(self, plan: WorkerPlan, work: StudyWork, *, stack: int) -> InProcess:  # noqa: ARG002 - it needs neither
        """The engine."""
        return InProcess(plan.devices[0])

    def close(self) -> None:
        """There is nothing to let go of."""
