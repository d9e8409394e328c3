"""One process beside the workers for what must not hold up training: preparing data, exporting models, drawing."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import Any

from hpo.records import DataCard, Notice, SplitCard, StudyResult, TrialResult
from hpo.run.engines import follow_supervisor, hidden_main
from hpo.spec.study import DataSpec, Setup, SplitSpec

_progress: Connection | None = None  # the helper process's way to say how far a download is


@dataclass(frozen=True)
class Prepared:
    """What a study runs on: its data, how it is split, and the devices that were asked for."""

    data: DataCard
    split: SplitCard
    devices: tuple[str, ...]


class Helper:
    """The process, its jobs in order, and what it says meanwhile."""

    def __init__(self, context: BaseContext) -> None:
        self._notices, theirs = context.Pipe()
        self._pool = ProcessPoolExecutor(1, mp_context=context, initializer=_start, initargs=(theirs,))

    def submit(self, job: Callable[..., Any], *arguments: Any) -> Future[Any]:
        """Queue a job: a function of this module."""
        with hidden_main():
            return self._pool.submit(job, *arguments)

    def notices(self) -> list[Notice]:
        """What came in since the last call; only the newest of each text."""
        newest: dict[str, Notice] = {}
        while self._notices.poll():
            notice: Notice = self._notices.recv()
            newest[notice.text] = notice
        return list(newest.values())

    def close(self) -> None:
        """Drop what has not begun and end the process, which would take seconds to leave by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        self._notices.close()


def _start(connection: Connection) -> None:
    global _progress
    _progress = connection
    follow_supervisor(connection)
    if hasattr(os, "nice"):
        os.nice(5)  # training comes first


def _say(text: str, done: int, total: int) -> None:
    if _progress is not None:
        _progress.send(Notice(text, done, total))


def prepare(data: DataSpec, split: SplitSpec, device: str) -> Prepared:
    """Fetch and check the data, and see which devices there are. Raises HpoError."""
    from hpo.learn.data import prepare as prepare_data
    from hpo.learn.device import resolve_devices
    from hpo.learn.split import split_card

    devices = resolve_devices(device)
    card = prepare_data(data, split, progress=_say)
    return Prepared(card, split_card(card, split), tuple(devices))


def draw_study(study: StudyResult, folder: Path) -> dict[str, Path]:
    """Draw a study's pictures into folder; returns their files by name. A study without a complete trial has none."""
    from hpo.report.figures import optimisation_history, slices

    if study.best is None:
        return {}
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {"optimisation_history": optimisation_history, "slices": slices}
    for name, draw in drawn.items():
        draw(study).savefig(folder / f"{name}.png")
    return {name: folder / f"{name}.png" for name in drawn}


def finish_trial(setup: Setup, result: TrialResult, class_names: tuple[str, ...]) -> Path:
    """Turn what a complete trial left in its folder into what is kept: program, pictures, tables; return the folder."""
    from hpo.learn.device import use_threads
    from hpo.learn.export import export_program
    from hpo.report.figures import confusion_figure, training_curves
    from hpo.report.tables import classification_report, report_text

    use_threads(1)
    folder = Path(result.folder)
    export_program(setup, folder)
    title = f"trial {result.number}"
    training_curves(result.epochs, best_epoch=result.best_epoch, title=title).savefig(folder / "training_curves.png")
    confusion_figure(result.confusion, class_names, title=f"{title}: validation").savefig(folder / "confusion.png")
    report = classification_report(result.confusion, class_names)
    (folder / "classification_report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / "classification_report.txt").write_text(report_text(report), encoding="utf-8")
    return folder
