"""A worker in a Ray actor: it checks its node's data, trains candidates one after another, and returns their files."""

from __future__ import annotations

import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpo import __version__
from hpo.errors import HpoError
from hpo.events import EpochEnded, TrialEnded
from hpo.execute.engines.base import Trainer
from hpo.execute.workers.task import Task, Training, train_task
from hpo.records import DataCard
from hpo.spec.study import DataSpec, SplitSpec

Files = Mapping[str, bytes]  # of one folder: names to contents
Answer = tuple[EpochEnded | TrialEnded, Files]


@dataclass(frozen=True)
class WorkerSetup:
    """All that the trainings of a study need on a node.

    models holds the logged models that networks of the study start from, by the names of their folders. version is that
    of the supervisor's hpo.
    """

    data: DataSpec
    split: SplitSpec
    card: DataCard
    models: Mapping[str, Files] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self) -> None:
        object.__setattr__(self, "card", self.card.sealed)


class RayWorker:
    """The actor. Its calls run one at a time, in the order in which they were made."""

    def __init__(self, *, threads: int, gpu: bool, trainer: Trainer = train_task) -> None:
        self._threads = threads
        self._device = "cuda:0" if gpu else "cpu"  # Ray shows each actor its own GPUs only
        self._trainer = trainer
        self._card: DataCard | None = None
        self._task: Task | None = None
        self._training: Training | None = None

    def open(self, needs: WorkerSetup) -> str:
        """Make sure that this node has the study's data and models; returns the node's name. Raises HpoError."""
        node = platform.node()
        try:
            self._open(needs)
        except HpoError as error:
            raise type(error)(f"Ray node {node}: {error.message}", error.hint) from None
        return node

    def _open(self, needs: WorkerSetup) -> None:
        from hpo.data.cache import models_folder
        from hpo.data.prepare import at_hand

        if needs.version != __version__:
            raise HpoError(
                f"hpo {__version__} is installed, and the run is of hpo {needs.version}.",
                "Install the same version on all nodes.",
            )
        self._card = at_hand(needs.card, needs.data, needs.split)
        for name, files in needs.models.items():
            if not (models_folder() / name).is_dir():
                making = models_folder() / f".making-{uuid.uuid4().hex}"
                write_files(files, making)
                try:
                    making.rename(models_folder() / name)
                except OSError:  # another worker of this node was faster
                    shutil.rmtree(making)
        # Imports torch, so after the checks; the first candidate would wait for it.
        import hpo.training.preload  # noqa: F401
        from hpo.training.device import resolve_devices, use_threads

        resolve_devices(self._device)
        use_threads(self._threads)

    def train(self, task: Task) -> Answer:
        """Begin a task; returns its first message."""
        from hpo.home import cache_folder

        # The training makes it when it has something to write; task.folder is a path of the supervisor's machine.
        folder = cache_folder() / "results" / uuid.uuid4().hex
        # The folder exists where this is the supervisor's machine, or shares its disk.
        checkpoint = task.checkpoint if Path(task.checkpoint).parent.is_dir() else ""
        self._task = replace(task, data=self._card or task.data, folder=str(folder), checkpoint=checkpoint)
        self._training = self._trainer(self._task, self._device)
        return self._answer(next(self._training))

    def step(self, go_on: bool) -> Answer | None:
        """The next message of the task; None where it has ended."""
        return self._answer(self._training.send(go_on)) if self._training is not None else None

    def _answer(self, message: EpochEnded | TrialEnded | None) -> Answer:
        assert message is not None  # noqa: S101 - None comes from trainings that share their computation
        if self._task is None or not isinstance(message, TrialEnded):
            return message, {}
        folder, self._training = Path(self._task.folder), None
        files = read_files(folder)
        shutil.rmtree(folder, ignore_errors=True)
        settings = {**message.result.settings, "node": platform.node()}
        return replace(message, result=replace(message.result, settings=settings)), files


def read_files(folder: Path) -> Files:
    """The files of a folder and of its subfolders; {} where there is no folder."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_files(files: Files, folder: Path) -> None:
    """Write files that read_files has read into another folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
