"""Workers as Ray actors, on the nodes of a cluster that have room for them."""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpo.distribution import install_command
from hpo.errors import HpoError, StoreError, disk_full
from hpo.events import TrialEnded
from hpo.execute.engines.base import Message, Trainer, WorkerLost
from hpo.execute.workers.ray_actor import Files, RayWorker, WorkerSetup, write_files
from hpo.execute.workers.task import Task, disk_full_result, train_task

_MOST_STARTS = 5  # actors of one slot in a row that die before one is ready; a lost node costs each of its slots one
_NOTIFY_AFTER = 30.0  # seconds without any worker after which the user is notified
_BECAUSE = re.compile(r"because ([^.\n]*)")
_CAUSES = {
    "ActorUnavailableError": "it does not answer: its node is gone, or cannot be reached",
    "OutOfMemoryError": "Ray ended it, its node being short of memory",
}


@dataclass
class _Slot:
    """An actor and its pending answers: first that of `open`, then those of its task."""

    actor: Any
    answers: deque[Any] = field(default_factory=deque)
    node: str = ""  # "": not ready
    task: Task | None = None
    starts: int = 1  # of this slot, since its last actor that was ready


class RayActors:
    """`slots` actors with `cpus` cores and `gpus` of a GPU each; a slot accepts tasks once Ray has placed its actor.

    A training that waits for no verdict is asked for its next epoch before it has ended the last, and so never pauses.
    Actors that die, with or without their node, are replaced. All end with this process, however it ends. needs is what
    each node must have before it trains; notify takes a line where no actor finds room. Ray must be connected.
    """

    def __init__(
        self,
        needs: WorkerSetup,
        *,
        slots: int,
        cpus: float,
        gpus: float = 0.0,
        notify: Callable[[str], None] = lambda _: None,
        trainer: Trainer = train_task,
    ) -> None:
        import ray

        self._ray = ray
        self.slots = slots
        self._wants = f"{cpus:g} CPU" + f" and {gpus:g} GPU" * bool(gpus)
        # SPREAD: actors that share a node slow each other down. max_restarts=0: the supervisor must see deaths.
        self._make: Callable[..., Any] = (
            ray.remote(RayWorker)
            .options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")
            .remote
        )
        self._options = {"threads": max(1, int(cpus)), "gpu": gpus > 0, "trainer": trainer}
        self._needs = ray.put(needs)
        self._notify = notify
        self._ready_at = time.monotonic()  # when there last was a worker; inf: the user was notified
        self._slots = [self._start() for _ in range(slots)]

    def _start(self) -> _Slot:
        actor = self._make(**self._options)
        return _Slot(actor, deque([actor.open.remote(self._needs)]))

    def accepts(self, slot: int) -> bool:
        """Whether its actor is placed on a node, and has the data."""
        return bool(self._slots[slot].node)

    def submit(self, slot: int, task: Task) -> None:
        """Send the task."""
        entry = self._slots[slot]
        if task.checkpoint and (task.setup.training.checkpoint or task.pausable):
            Path(task.checkpoint).parent.mkdir(
                parents=True, exist_ok=True
            )  # actors that see this folder share the disk
        entry.task = task
        entry.answers.append(entry.actor.train.remote(task))
        if not task.wait:
            entry.answers.append(entry.actor.step.remote(True))

    def verdict(self, slot: int, *, go_on: bool) -> None:
        """Send the verdict."""
        entry = self._slots[slot]
        entry.answers.append(entry.actor.step.remote(go_on))

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """The messages that have arrived, by slot. Raises HpoError where a node cannot train this study."""
        self._notify_if_idle()
        slots = {entry.answers[0]: slot for slot, entry in enumerate(self._slots) if entry.answers}
        if not slots or not self._ray.wait(list(slots), timeout=timeout)[0]:
            return []
        ready, _ = self._ray.wait(list(slots), num_returns=len(slots), timeout=0)
        received = [(slot, self._receive(slot)) for slot in sorted(slots[answer] for answer in ready)]
        return [(slot, message) for slot, message in received if message is not None]

    def _receive(self, slot: int) -> Message | None:
        entry = self._slots[slot]
        try:
            answer = self._ray.get(entry.answers.popleft())
        except self._ray.exceptions.RayTaskError as error:
            # A candidate's own faults are in its result: this one is the node's, and would hit every candidate.
            cause = getattr(error, "cause", error)
            self.close()
            raise cause if isinstance(cause, HpoError) else _unusable(str(cause)) from None
        except self._ray.exceptions.RayError as error:
            return self._replace(slot, error)
        if entry.task is None:
            entry.node = answer
            return None
        message, files = answer
        if isinstance(message, TrialEnded):
            task, entry.task = entry.task, None
            entry.answers.clear()
            return _with_files(task, message, files)
        if not entry.task.wait:
            entry.answers.append(entry.actor.step.remote(True))
        return message  # type: ignore[no-any-return]

    def _replace(self, slot: int, error: Exception) -> WorkerLost | None:
        """Start another actor for the slot of a lost one; returns WorkerLost where it had a candidate."""
        lost = self._slots[slot]
        self._kill(lost)
        if getattr(error, "actor_init_failed", False) or (not lost.node and lost.starts >= _MOST_STARTS):
            self.close()
            raise _unusable(str(error))
        self._slots[slot] = replace(self._start(), starts=1 if lost.node else lost.starts + 1)
        return WorkerLost(None, words=f"Ray node {lost.node}: {_cause(error)}") if lost.task else None

    def _notify_if_idle(self) -> None:
        """Notify the user, once, where there has been no worker for long."""
        now = time.monotonic()
        if any(entry.node for entry in self._slots):
            self._ready_at = now
        elif now - self._ready_at > _NOTIFY_AFTER:
            self._ready_at = float("inf")
            self._notify(f"no worker is ready: Ray has no room for one ({self._wants}) yet, or nodes prepare the data.")

    def close(self) -> None:
        """Kill the actors: all that they hold is recorded already."""
        for entry in self._slots:
            self._kill(entry)
            entry.answers.clear()

    def _kill(self, entry: _Slot) -> None:
        with contextlib.suppress(Exception):  # it is dead already, or its cluster is
            self._ray.kill(entry.actor)


def _with_files(task: Task, ended: TrialEnded, files: Files) -> TrialEnded:
    """The end of a trial, its files written to the folder where the supervisor looks for them."""
    if not files:
        return ended
    try:
        write_files(files, Path(task.folder))
    except OSError as error:
        if disk_full(error):
            return replace(ended, result=disk_full_result(task, ended.result.epochs))
        raise StoreError(f"{task.folder}: cannot be written: {error.strerror}.", "Mend that, then run again.") from None
    return replace(ended, result=replace(ended.result, folder=task.folder))


def _cause(error: Exception) -> str:
    """The short cause in a long message of Ray, such as: its worker process has died."""
    name = type(error).__name__
    found = _BECAUSE.search(str(error))
    return _CAUSES.get(name) or (found[1].strip() if found else name)


def _unusable(words: str) -> HpoError:
    last = [line for line in words.splitlines() if line.strip()][-1:]
    return HpoError(
        f"no worker can start on the Ray cluster: {''.join(last).strip() or 'Ray does not say why'}",
        f"Install the same hpo with the same Python on all nodes: {install_command('ray')}",
    )
