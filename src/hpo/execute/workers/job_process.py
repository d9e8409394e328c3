"""Processes for the jobs that must not delay training: preparing data, exporting models, drawing figures."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import HpoError
from hpo.events import Notice
from hpo.execute.process import begin, end_family, follow_supervisor
from hpo.execute.stack_size import StackSize, measure_stack_size
from hpo.records import DataCard, SplitCard, StudyResult, TrialResult
from hpo.spec.outcome import PredictSpec
from hpo.spec.study import StudySpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Drawing = Callable[[], Figure | None]

_MOST_TRIES = 3
_VALIDATION = "validation.npz"  # hpo.training.trial.VALIDATION, whose import would load torch
_ANSWERS = "answers.json"  # hpo.models.answers.ANSWERS, likewise
_progress: Connection | None = None  # from the job process to its supervisor


@dataclass(frozen=True)
class Prepared:
    """A study's data, its split, and the devices to train on."""

    data: DataCard
    split: SplitCard
    devices: tuple[str, ...]


class Job:
    """The future of a job. If the job's process dies, the next call of a method starts the job again.

    done, result and exception are those of a concurrent Future; a job whose process has died three times raises
    HpoError.
    """

    def __init__(self, begin: Callable[[], Future[Any]], name: str) -> None:
        self._begin, self._name = begin, name
        self._future, self._tries = begin(), 1

    def done(self) -> bool:
        """True once there is a result or an exception."""
        return self._future.done() and not self._restarted()

    def result(self, timeout: float | None = None) -> Any:
        """The result; raises what the job raised, or TimeoutError after timeout seconds."""
        if (error := self.exception(timeout)) is not None:
            raise error
        return self._future.result()

    def exception(self, timeout: float | None = None) -> BaseException | None:
        """What the job raised, or None; raises TimeoutError after timeout seconds."""
        error = self._future.exception(timeout)
        while self._restarted():
            error = self._future.exception(timeout)
        if isinstance(error, BrokenProcessPool):
            return HpoError(
                f"{self._name}: its process died {self._tries} times.",
                "Was it killed, or is there too little memory? Run the study again: it resumes.",
            )
        return error

    def _restarted(self) -> bool:
        died = self._future.done() and isinstance(self._future.exception(), BrokenProcessPool)
        if not died or self._tries >= _MOST_TRIES:
            return False
        self._future, self._tries = self._begin(), self._tries + 1
        return True


class JobProcess:
    """A process that runs its jobs in order and sends notices meanwhile. If it dies, another one is started."""

    def __init__(self, context: BaseContext) -> None:
        self._context = context
        self._open()

    def _open(self) -> None:
        self._notices, sender = self._context.Pipe()
        arguments = (sender, dict(os.environ))
        self._pool = ProcessPoolExecutor(1, mp_context=self._context, initializer=_start, initargs=arguments)

    def submit(self, job: Callable[..., Any], *arguments: Any, **options: Any) -> Job:
        """Queue a job: a function of a module, which may be started more than once."""
        return Job(lambda: self._begin(partial(job, *arguments, **options)), job.__name__)

    def _begin(self, job: Callable[[], Any]) -> Future[Any]:
        def submit() -> Future[Any]:
            try:
                return self._pool.submit(job)
            except (BrokenProcessPool, EOFError, ConnectionError) as error:
                self.restart()  # a pool whose process did not start has the job in its queue
                if not isinstance(error, BrokenProcessPool):
                    raise
                return self._pool.submit(job)

        return begin(submit)

    def notices(self) -> list[Notice]:
        """The notices since the last call; only the newest of each text."""
        newest: dict[str, Notice] = {}
        while self._notices.poll():
            notice: Notice = self._notices.recv()
            newest[notice.text] = notice
        return list(newest.values())

    def restart(self) -> None:
        """Drop all jobs, and have another process do the next one."""
        self.close()
        self._open()

    def close(self) -> None:
        """Drop all jobs and end the process, whatever it does, with all that it started."""
        processes = list((self._pool._processes or {}).values())  # Python 3.14 has kill_workers
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in processes:
            end_family(process)
        self._notices.close()


def _start(connection: Connection, environment: Mapping[str, str]) -> None:
    global _progress
    _progress = connection
    follow_supervisor(environment, connection)


def _notify(text: str, done: int, total: int) -> None:
    if _progress is not None:
        _progress.send(Notice(text, done, total))


def prepare(spec: StudySpec, device: str) -> Prepared:
    """Fetch and check the data of a study and the scores that it asks for, and resolve devices. Raises HpoError."""
    from hpo.data.prepare import check_task
    from hpo.data.prepare import prepare as prepare_data
    from hpo.data.split import split_card
    from hpo.spec.own_code import requested
    from hpo.training.device import resolve_devices

    devices = resolve_devices(device)
    card = prepare_data(spec.data, spec.split, progress=_notify)
    training = spec.setup.training
    check_task(card, spec.task)
    requested([*training.scores, training.monitor], card.class_names, several=card.several_labels)
    _check_optimizers(spec)
    if card.several_labels and spec.split.kind in ("holdout", "kfold") and spec.split.by == "stratified":
        _notify("data: images have several labels, so parts are drawn at random by split.seed, not by class", 0, 0)
    for line in (*([f"files: {card.accounting}"] if card.accounting else ()), *(f"data: {w}" for w in card.warnings)):
        _notify(line, 0, 0)
    return Prepared(card, split_card(card, spec.split), tuple(devices))


def _check_optimizers(spec: StudySpec) -> None:
    """Raise SpecError where the study names an optimizer that timm does not have."""
    asked = spec.training.optimizer
    names = spec.search.whole_space.root.get("training.optimizer.name")
    named = [asked, *(asked.model_copy(update={"name": name}) for name in (names.ends() if names else ()))]
    if spec.final is not None:
        named.append(spec.with_values({}, fixed=spec.final.set).training.optimizer)
    if any(each.of_timm for each in named):
        from hpo.training.optimizers import check_optimizer

        for each in named:
            check_optimizer(each)


def measure_stack(spec: StudySpec, data: DataCard, device: str, threads: int, most: int) -> StackSize:
    """The number of trainings that each worker should do at once, `most` at most."""
    return measure_stack_size(spec, data, device, threads=threads, most=most)


def draw_study(study: StudyResult, folder: Path) -> list[Path]:
    """Draw a study's figures into folder, which is emptied first; returns their files. A figure that fails is reported.

    Without a complete trial there are none.
    """
    from hpo.report.figures import pairs as pair_figures
    from hpo.report.figures import space as space_figures
    from hpo.report.figures import study as study_figures
    from hpo.search.importance import importances

    shutil.rmtree(folder, ignore_errors=True)
    if study.best is None:
        return []
    shares = importances(study)
    last = list(shares.values())[-1] if shares else {}
    ranking = list(last.values())[-1] if last else {}
    figures: dict[str, Drawing] = {
        "optimisation_history": lambda: study_figures.optimisation_history(study),
        "learning_curves": lambda: study_figures.learning_curves(study),
        "pareto_front": lambda: study_figures.pareto_front(study),
        "hypervolume": lambda: study_figures.hypervolume_figure(study),
        "parameter_importance": lambda: study_figures.importance_figure(shares),
        "parallel_coordinates": lambda: space_figures.parallel_coordinates(study),
        "slices": lambda: space_figures.slices(study),
        "contour": lambda: pair_figures.contour(study, ranking),
        "heat_map": lambda: pair_figures.heat_map(study),
        "effects": lambda: space_figures.effects(study),
        "timeline": lambda: study_figures.timeline(study),
    }
    if not study.objective.endswith("_loss") and (study.spec.get("search") or {}).get("stages"):
        figures["effects_on_loss"] = lambda: space_figures.effects(study, score="valid_loss")
    return _draw(figures, folder, study.title)


def warm_up() -> None:
    """Import what pictures need, while others train; the jobs that follow give way to the training.

    The imports do not: they take seconds once, and in a short study all that follows would wait for them.
    """
    import matplotlib.figure

    from hpo.report.figures import classifier, images, pairs, space, study  # noqa: F401

    matplotlib.figure.Figure().add_subplot()
    if hasattr(os, "nice"):
        os.nice(5)


def finish_trial(result: TrialResult, data: DataCard, spec: PredictSpec, hurry: Path | None = None) -> Path:
    """Turn what a complete trial left in its folder into a program, with tables next to it, and return the folder.

    The program answers as spec says; once the file `hurry` is there, no views are chosen for it.
    """
    from hpo.models import export_program
    from hpo.models.answers import decide_answers
    from hpo.report.confidence import of_program
    from hpo.report.statistics import classification_report
    from hpo.training.device import use_threads

    use_threads(1)
    folder = Path(result.folder)
    images = Path(data.folder) / "development_images.npy"
    hurries = hurry.is_file if hurry else lambda: False
    decided = decide_answers(folder, folder / _VALIDATION, images, spec, hurry=hurries)
    if "views_not_chosen" in decided:
        _notify(f"trial {result.number}: views of its images were not chosen: {decided['views_not_chosen']}", 0, 0)
    export_program(folder)
    if (result := of_program(result, decided)).confusion:
        report, table = classification_report(result.confusion, data.class_names)
        (folder / "classification_report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
        (folder / "classification_report.txt").write_text(table, encoding="utf-8")
    return folder


def draw_trial(result: TrialResult, data: DataCard, folder: Path) -> list[Path]:
    """Draw a complete trial's figures from the files in result.folder; returns their files.

    A training without a validation part has only its curves.
    """
    import numpy as np

    from hpo.report.confidence import of_program
    from hpo.report.figures import classifier, images

    if (decided := Path(result.folder) / _ANSWERS).is_file():  # pictures show what the program answers
        result = of_program(result, json.loads(decided.read_text(encoding="utf-8")))
    title, names = f"trial {result.number}", data.class_names
    figures: dict[str, Drawing] = {
        "training_curves": lambda: classifier.training_curves(result.epochs, best_epoch=result.best_epoch, title=title)
    }
    title += ", validation"
    left = Path(result.folder) / _VALIDATION
    if result.confusion:
        figures["confusion"] = lambda: classifier.confusion_figure(result.confusion, names, title=title)
        figures["class_accuracy"] = lambda: classifier.class_accuracy_figure(result.confusion, names, title=title)
    if left.is_file():
        with np.load(left) as arrays:
            rows, labels, probabilities = (arrays[name] for name in ("rows", "labels", "probabilities"))
        figures["roc"] = lambda: classifier.roc_figure(labels, probabilities, names, title=title)
    if result.confusion and left.is_file():
        figures["rank_of_truth"] = lambda: images.rank_figure(labels, probabilities, title=title)

        def gallery() -> Figure | None:
            found = images.confident_mistakes(labels, probabilities)
            pixels = np.load(Path(data.folder) / "development_images.npy", mmap_mode="r")
            shown = {row: np.asarray(pixels[rows[row]]) for mistake in found for row in mistake.positions}
            return images.mistakes_figure(found, shown, names, title=f"{title}: the surest mistakes")

        figures["surest_mistakes"] = gallery
    return _draw(figures, folder, f"trial {result.number}")


def _draw(figures: Mapping[str, Drawing], folder: Path, owner: str) -> list[Path]:
    """Write each figure that is not None to folder. An error costs one figure, never a model or the end of a study."""
    from hpo.report.figures import save_png

    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, draw in figures.items():
        try:
            figure = draw()
            if figure is not None:
                save_png(figure, folder / f"{name}.png")
                drawn.append(folder / f"{name}.png")
        except Exception as error:  # noqa: BLE001 - no error of drawing is worth the study
            _notify(f"{owner}: the figure {name} could not be drawn: {error}", 0, 0)
    return drawn
