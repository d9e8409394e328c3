"""Workers as Ray actors, on whichever nodes of a cluster have room for them."""

from __future__ import annotations

import contextlib
import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, StoreError, disk_full
from hpo.execute.engines.local import Message, Trainer, WorkerLost
from hpo.execute.workers.ray_actor import Files, Ground, RayWorker, write_files
from hpo.execute.workers.task import Task, train_task, without_room
from hpo.records import TrialEnded

_MOST_STARTS = 5  # actors of one slot in a row that die before one is ready; a lost node costs each of its slots one
_PATIENCE = 30.0  # seconds without any worker after which that is told
_BECAUSE = re.compile(r"because ([^.\n]*)")
_CAUSES = {
    "ActorUnavailableError": "it does not answer: its node is gone, or cannot be reached",
    "OutOfMemoryError": "Ray ended it, its node being short of memory",
}


@dataclass
class _Place:
    """An actor; the first of its answers to come is of `open` until it is ready, then of its task."""

    actor: Any
    answers: deque[Any] = field(default_factory=deque)
    node: str = ""  # "": not ready
    task: Task | None = None
    starts: int = 1  # of this slot, since its last actor that was ready


class RayActors:
    """`slots` actors with `cpus` cores and `gpus` of a GPU each; a slot accepts tasks once Ray has placed its actor.

    A training that waits for no verdict is asked for its next epoch before it has ended the last, and so never pauses.
    Actors that die, with their node or alone, are replaced. All end with this process, whatever ends it. ground is what
    each node has to have before it trains; say hears when no actor finds room. Ray is connected to already.
    """

    def __init__(
        self,
        ground: Ground,
        *,
        slots: int,
        cpus: float,
        gpus: float = 0.0,
        say: Callable[[str], None] = lambda _: None,
        trainer: Trainer = train_task,
    ) -> None:
        import ray

        self._ray = ray
        self.slots = slots
        self._wants = f"{cpus:g} CPU" + f" and {gpus:g} GPU" * bool(gpus)
        # Spread: a node that has others beside it trains slower. max_restarts=0: the supervisor is to hear of deaths.
        self._make: Callable[..., Any] = (
            ray.remote(RayWorker)
            .options(num_cpus=cpus, num_gpus=gpus, max_restarts=0, scheduling_strategy="SPREAD")
            .remote
        )
        self._options = {"threads": max(1, int(cpus)), "gpu": gpus > 0, "trainer": trainer}
        self._ground = ray.put(ground)
        self._say = say
        self._ready_at = time.monotonic()  # when there was a worker last; inf: that there is none was told
        self._places = [self._start() for _ in range(slots)]

    def _start(self) -> _Place:
        actor = self._make(**self._options)
        return _Place(actor, deque([actor.open.remote(self._ground)]))

    def accepts(self, slot: int) -> bool:
        """Whether its actor has found a place, and has the data."""
        return bool(self._places[slot].node)

    def submit(self, slot: int, task: Task) -> None:
        """Send the task."""
        place = self._places[slot]
        if task.checkpoint and task.setup.training.checkpoint:
            Path(task.checkpoint).parent.mkdir(parents=True, exist_ok=True)  # by this, actors see that they share it
        place.task = task
        place.answers.append(place.actor.train.remote(task))
        if not task.wait:
            place.answers.append(place.actor.step.remote(True))

    def verdict(self, slot: int, *, go_on: bool) -> None:
        """Send the verdict."""
        place = self._places[slot]
        place.answers.append(place.actor.step.remote(go_on))

    def poll(self, timeout: float) -> list[tuple[int, Message]]:
        """What has come in, in the order of slots. Raises HpoError, once, where a node cannot train this study."""
        self._complain()
        slots = {place.answers[0]: slot for slot, place in enumerate(self._places) if place.answers}
        if not slots or not self._ray.wait(list(slots), timeout=timeout)[0]:
            return []
        ready, _ = self._ray.wait(list(slots), num_returns=len(slots), timeout=0)
        told = [(slot, self._receive(slot)) for slot in sorted(slots[answer] for answer in ready)]
        return [(slot, message) for slot, message in told if message is not None]

    def _receive(self, slot: int) -> Message | None:
        place = self._places[slot]
        try:
            answer = self._ray.get(place.answers.popleft())
        except self._ray.exceptions.RayTaskError as error:
            # Whatever a candidate does wrong is in its result: this is of the node, and no candidate can do better.
            cause = getattr(error, "cause", error)
            self.close()
            raise cause if isinstance(cause, HpoError) else _unusable(str(cause)) from None
        except self._ray.exceptions.RayError as error:
            return self._replace(slot, error)
        if place.task is None:
            place.node = answer
            return None
        message, files = answer
        if isinstance(message, TrialEnded):
            task, place.task = place.task, None
            place.answers.clear()
            return _left(task, message, files)
        if not place.task.wait:
            place.answers.append(place.actor.step.remote(True))
        return message  # type: ignore[no-any-return]

    def _replace(self, slot: int, error: Exception) -> WorkerLost | None:
        """Put another actor in the place of a lost one; what its candidate's death was, if it had one."""
        lost = self._places[slot]
        self._kill(lost)
        if getattr(error, "actor_init_failed", False) or (not lost.node and lost.starts >= _MOST_STARTS):
            self.close()
            raise _unusable(str(error))
        self._places[slot] = replace(self._start(), starts=1 if lost.node else lost.starts + 1)
        return WorkerLost(None, words=f"Ray node {lost.node}: {_cause(error)}") if lost.task else None

    def _complain(self) -> None:
        """Say once that there is no worker, if there has been none for long."""
        now = time.monotonic()
        if any(place.node for place in self._places):
            self._ready_at = now
        elif now - self._ready_at > _PATIENCE:
            self._ready_at = float("inf")
            self._say(f"no worker is ready: Ray has no room for one ({self._wants}) yet, or nodes prepare the data.")

    def close(self) -> None:
        """Kill the actors: they hold nothing that is not recorded already."""
        for place in self._places:
            self._kill(place)
            place.answers.clear()

    def _kill(self, place: _Place) -> None:
        with contextlib.suppress(Exception):  # it is dead already, or its cluster is
            self._ray.kill(place.actor)


def _left(task: Task, ended: TrialEnded, files: Files) -> TrialEnded:
    """The end of a trial, what it left being where the supervisor looks for it."""
    if not files:
        return ended
    try:
        write_files(files, Path(task.folder))
    except OSError as error:
        if disk_full(error):
            return replace(ended, result=replace(without_room(task), epochs=ended.result.epochs))
        raise StoreError(f"{task.folder}: cannot be written: {error.strerror}.", "Mend that, then run again.") from None
    return replace(ended, result=replace(ended.result, folder=task.folder))


def _cause(error: Exception) -> str:
    """A few of Ray's many words: its worker process has died."""
    name = type(error).__name__
    found = _BECAUSE.search(str(error))
    return _CAUSES.get(name) or (found[1].strip() if found else name)


def _unusable(words: str) -> HpoError:
    last = [line for line in words.splitlines() if line.strip()][-1:]
    return HpoError(
        f"no worker can start on the Ray cluster: {''.join(last).strip() or 'Ray does not say why'}",
        'Install the same hpo with the same Python on all nodes: pip install "hpo[ray]"',
    )
