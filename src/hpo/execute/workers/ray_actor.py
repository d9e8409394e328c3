"""A worker in a Ray actor: it checks its node's data, trains candidates in turn, and sends back what they leave."""

from __future__ import annotations

import platform
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpo import __version__
from hpo.errors import HpoError
from hpo.execute.engines.local import Trainer
from hpo.execute.workers.task import Task, Training, train_task
from hpo.records import DataCard, EpochEnded, TrialEnded
from hpo.spec.study import DataSpec, SplitSpec

Files = Mapping[str, bytes]  # of one folder: names to contents
Told = tuple[EpochEnded | TrialEnded, Files]


@dataclass(frozen=True)
class Ground:
    """What all trainings of a study stand on, so that another node can tell whether it has the same.

    models holds the logged models that networks of the study stand on, by the names of their folders. version is that
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
    """What lives in the actor. Its calls come in the order in which they were made, one at a time."""

    def __init__(self, *, threads: int, gpu: bool, trainer: Trainer = train_task) -> None:
        self._threads = threads
        self._device = "cuda:0" if gpu else "cpu"  # Ray shows each actor its own GPUs only
        self._trainer = trainer
        self._card: DataCard | None = None
        self._task: Task | None = None
        self._training: Training | None = None

    def open(self, ground: Ground) -> str:
        """Make sure that this node has what the study stands on; returns the node's name. Raises HpoError."""
        node = platform.node()
        try:
            self._open(ground)
        except HpoError as error:
            raise type(error)(f"Ray node {node}: {error.message}", error.hint) from None
        return node

    def _open(self, ground: Ground) -> None:
        from hpo.data.prepare import at_hand, models_folder

        if ground.version != __version__:
            raise HpoError(
                f"hpo {__version__} is installed, and the run is of hpo {ground.version}.",
                "Install the same version on all nodes.",
            )
        self._card = at_hand(ground.card, ground.data, ground.split)
        for name, files in ground.models.items():
            if not (models_folder() / name).is_dir():
                making = models_folder() / f".making-{uuid.uuid4().hex}"
                write_files(files, making)
                try:
                    making.rename(models_folder() / name)
                except OSError:  # another worker of this node was faster
                    shutil.rmtree(making)
        # Imports torch, so after what may be refused; all that the first candidate would else wait for.
        import hpo.training.compute.preload  # noqa: F401
        from hpo.training.compute.device import resolve_devices, use_threads

        resolve_devices(self._device)
        use_threads(self._threads)

    def train(self, task: Task) -> Told:
        """Begin a task; its first message."""
        from hpo.data.prepare import cache_folder

        # Made by the training when it has something to leave; task.folder is a place on the supervisor's machine.
        folder = cache_folder() / "results" / uuid.uuid4().hex
        # It is there where this is the supervisor's machine, or shares its disk.
        checkpoint = task.checkpoint if Path(task.checkpoint).parent.is_dir() else ""
        self._task = replace(task, data=self._card or task.data, folder=str(folder), checkpoint=checkpoint)
        self._training = self._trainer(self._task, self._device)
        return self._tell(next(self._training))

    def step(self, go_on: bool) -> Told | None:
        """The next message of the task; None where it has ended already."""
        return self._tell(self._training.send(go_on)) if self._training is not None else None

    def _tell(self, message: EpochEnded | TrialEnded | None) -> Told:
        assert message is not None  # noqa: S101 - None comes from trainings that share their computation
        if self._task is None or not isinstance(message, TrialEnded):
            return message, {}
        folder, self._training = Path(self._task.folder), None
        files = read_files(folder)
        shutil.rmtree(folder, ignore_errors=True)
        settings = {**message.result.settings, "node": platform.node()}
        return replace(message, result=replace(message.result, settings=settings)), files


def read_files(folder: Path) -> Files:
    """The files of a folder and of those in it, {} where there is none."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def write_files(files: Files, folder: Path) -> None:
    """What read_files has read, in another place."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
