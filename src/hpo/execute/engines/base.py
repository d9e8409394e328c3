"""The protocol of engines, the messages that come from their workers, and the protocol of their factories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from hpo.errors import HpoError
from hpo.events import EpochEnded, TrialEnded
from hpo.execute.process import cause_of_death
from hpo.execute.workers.task import Task, Training
from hpo.options import RunOptions
from hpo.records import DataCard
from hpo.spec.study import StudySpec

Trainer = Callable[[Task, str], Training]


@dataclass(frozen=True)
class WorkerLost:
    """The worker of a slot died with its candidate, and a new one has replaced it.

    exitcode < 0 is a signal. traceback is where Python was when native code crashed, "" where that is not known. words
    describe the cause where there is no exit code.
    """

    exitcode: int | None
    traceback: str = ""
    words: str = ""

    @property
    def cause(self) -> str:
        """The cause in words, such as: signal 11, SIGSEGV: native code crashed."""
        return self.words or cause_of_death(self.exitcode)


Message = EpochEnded | TrialEnded | WorkerLost


class Engine(Protocol):
    """Slots that train one task each. A slot is busy from submit until its TrialEnded or WorkerLost."""

    slots: int

    def accepts(self, slot: int) -> bool:
        """Whether an idle slot takes a task now.

        A slot refuses while an exclusive task has its process, or while its worker is starting. Where no slot accepts a
        task, later polls change that.
        """

    def submit(self, slot: int, task: Task) -> None:
        """Start the task in an idle slot that accepts it."""

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """The messages that have arrived, by slot; waits at most timeout seconds for the first one."""

    def verdict(self, slot: int, *, go_on: bool) -> None:
        """Answer the last EpochEnded of a slot whose task waits for a verdict."""

    def close(self) -> None:
        """End all workers at once, whatever they do."""


@dataclass(frozen=True)
class WorkerPlan:
    """The workers: one device (cpu, cuda:0, ...) for each, and the number of threads of each.

    description is for users: the devices, or the cluster. ranks is the number of processes that train a trial together,
    each with that number of threads; a worker's device is that of the first.
    """

    devices: tuple[str, ...]
    threads: int
    description: str
    ranks: int = 1


def group_devices(devices: Sequence[str], options: RunOptions) -> list[str]:
    """The first device of each group that trains a trial; CPU processes, which are for trying it, need no own device.

    Raises HpoError where there are too few GPUs for one group, or for the workers that the options ask for.
    """
    ranks, workers = options.ranks, options.workers or 1
    if ranks == 1 or options.device == "cpu":
        return list(devices)
    gpus = [device for device in devices if device.startswith("cuda")]
    if len(gpus) < ranks * workers:
        wanted = f"--workers {workers} " * (workers > 1) + f"--gpus-per-trial {ranks}"
        hint = "Ask for fewer." if gpus else f"To try it without GPUs: --device cpu --gpus-per-trial {ranks}"
        raise HpoError(f"{wanted}: needs {ranks * workers} GPUs, and there are {len(gpus)} here.", hint)
    return gpus[: len(gpus) // ranks * ranks : ranks]


def described(devices: Sequence[str], ranks: int) -> str:
    """The devices of workers for users, such as: cuda:0, cuda:2, each trial in 2 processes."""
    return ", ".join([*dict.fromkeys(devices), *([f"each trial in {ranks} processes"] if ranks > 1 else [])])


@dataclass(frozen=True)
class StudyWork:
    """The study that an engine trains candidates of. notify takes lines for the user."""

    spec: StudySpec
    data: DataCard
    notify: Callable[[str], None]


class EngineFactory(Protocol):
    """Makes one kind of engine: constructed, connected, asked for a plan, started, closed.

    device is the one that data preparation resolves and checks. stacks: its workers can train several candidates at
    once.
    """

    device: str
    stacks: bool

    def __init__(self, options: RunOptions) -> None:
        """Check the options. Raises HpoError where the engine cannot serve them."""

    def connect(self) -> None:
        """Reach what the workers will live on. Raises HpoError."""

    def plan(self, devices: Sequence[str], *, most: int) -> WorkerPlan:
        """The workers to start, `most` at most, where preparation has found these devices."""

    def start(self, plan: WorkerPlan, work: StudyWork, *, stack: int) -> Engine:
        """Start the workers, each with `stack` slots."""

    def close(self) -> None:
        """Let go of what connect reached."""
