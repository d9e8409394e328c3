"""Train a finished trial again from what was recorded of it, and see whether the numbers agree."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import HpoError, StoreError
from hpo.events import TrialEnded
from hpo.execute.base_model import with_model
from hpo.execute.bases import study_data
from hpo.execute.finals import with_final
from hpo.execute.workers.task import Task, Training, train_task
from hpo.home import Home
from hpo.jobs.shared.model_reference import ModelReference, find_trial
from hpo.metrics import direction_of
from hpo.records import ENSEMBLE, Epoch, StudyResult, Trial, TrialResult, TrialState, unpack_classes
from hpo.spec.load import parse_study
from hpo.spec.study import Setup, StudySpec
from hpo.storage.reader import read_study

if TYPE_CHECKING:
    from hpo.training.stack import Stacks

TOLERANCE = 1e-3


class Agreement(StrEnum):
    """How two numbers compare, or the worst of several; in this order."""

    EQUAL = "equal"
    CLOSE = "close"
    DIFFERS = "differs"


@dataclass(frozen=True)
class EpochCheck:
    """One epoch, as it was recorded and again.

    objective and again are its scores of the study's objective (None: there was no such epoch, or it has no such
    score). difference is the largest of all its scores and its learning rate, and score where that is; equal: bit for
    bit.
    """

    fold: int
    number: int
    objective: float | None
    again: float | None
    agreement: Agreement
    difference: float
    score: str


@dataclass(frozen=True)
class Rerun:
    """A trial and its repetition. ended and ended_again are "complete", "pruned" or "failed: " with the reason.

    device, precision and threads are those of the repetition; same_machine is False where they are not those of the
    trial. images is the number of validation images and changed that of those with another answer, both 0 where no
    answers were recorded.
    """

    study: str
    trial: int
    ended: str
    ended_again: str
    epochs: tuple[EpochCheck, ...]
    agreement: Agreement
    difference: float
    tolerance: float
    device: str
    precision: str
    threads: int
    same_machine: bool
    images: int
    changed: int

    def __str__(self) -> str:
        name, count = f"trial {self.trial} of {self.study}", f"{len(self.epochs)} epochs"
        if self.ended != self.ended_again:
            return f"{name} was {self.ended}; again it is {self.ended_again}."
        words = {
            Agreement.EQUAL: f"all {count} agree bit for bit.",
            Agreement.CLOSE: f"{count} agree within {self.tolerance:g}; they differ by up to {self.difference:.2g}.",
            Agreement.DIFFERS: f"{count} differ by up to {self.difference:.2g}, more than {self.tolerance:g}.",
        }
        answers = f" {self.changed} of {self.images} validation images have another answer." if self.images else ""
        return f"{name}: {words[self.agreement]}{answers}"


def rerun(
    asked: str,
    *,
    tolerance: float = TOLERANCE,
    device: str | None = None,
    home: str | Path | None = None,
    trust: bool = False,
    watch: Callable[[EpochCheck], None] | None = None,
) -> Rerun:
    """Train the trial STUDY#NUMBER again, with its setup, seed, data, precision and number of threads.

    tolerance is the largest difference of a score that still counts as close; device is the trial's unless given. watch
    hears of each epoch. trust allows functions from outside the working directory. The training runs in this process;
    the trial stays as it is, and no store is written to. Raises HpoError where the trial is not finished, or its data
    or its device is not here.
    """
    from hpo.training.device import threads

    if not tolerance >= 0:
        raise HpoError(f"--tolerance {tolerance}: is negative.", "Give 0 or more, such as 0.001.")
    study, spec, trial, before = _trained(asked, Home.find(home), trust=trust)
    card = study_data(study, spec)
    setup = _as_it_was(ModelReference(asked, study, spec, trial, card, None).setup, before)
    name = _device(device or before.settings.get("device", "auto"))
    checks: list[EpochCheck] = []
    count = int(before.settings.get("threads", "1"))
    with tempfile.TemporaryDirectory() as folder, threads(count):
        ranks = int(before.settings.get("ranks", "1"))
        task = Task(trial.number, setup, trial.candidate.seed, card, folder, until=_until(setup, before), ranks=ranks)
        training = train_task(task, name, _stacks(before))
        result = _follow(training, before, study.objective, tolerance, checks, watch or _ignore)
    images, changed = _answers(before, result)
    worst = max((check.agreement for check in checks), key=list(Agreement).index, default=Agreement.EQUAL)
    precision = result.settings.get("precision", "")
    return Rerun(
        study=study.title,
        trial=trial.number,
        ended=_end(before),
        ended_again=_end(result),
        epochs=tuple(checks),
        agreement=worst if before.state is result.state else Agreement.DIFFERS,
        difference=max((check.difference for check in checks), default=0.0),
        tolerance=tolerance,
        device=name,
        precision=precision,
        threads=count,
        same_machine=(name, precision) == (before.settings.get("device"), before.settings.get("precision")),
        images=images,
        changed=changed,
    )


def _trained(asked: str, place: Home, *, trust: bool) -> tuple[StudyResult, StudySpec, Trial, TrialResult]:
    """The study of STUDY#NUMBER, its spec with the model that it starts from, the finished trial and its result."""
    match = re.fullmatch(r"(.+)#([0-9]+)", asked)
    if match is None:
        version = re.fullmatch(r"(.+)/([0-9]+)", asked)
        what = f"is version {version[2]} of a model" if version else "names no trial"
        raise HpoError(
            f"{asked}: {what}.", f"Write STUDY#NUMBER: {'#'.join(version.groups() if version else ('digits-mlp', '3'))}"
        )
    study = read_study(place, match[1])
    trial = find_trial(study, match[2], (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED))
    # A final training may have had another teacher than the spec has now, and its files are needed, too.
    spec = with_model(with_final(parse_study(study.spec, trust=trust), trial.candidate), place, trust=trust)
    before = trial.result or TrialResult(trial.number, trial.state)
    if trial.candidate.stage == ENSEMBLE:
        names = ", ".join(before.members)
        raise HpoError(f"{asked}: an ensemble, which was not trained.", f"Train its members again: {names}")
    if before.state is not TrialState.FAILED and not before.epochs:
        raise StoreError(f"{asked}: it was not trained: {before.reason}.", "Train that one again.")
    return study, spec, trial, before


def _until(setup: Setup, before: TrialResult) -> float | None:
    """A value of its monitor that ends the training where search.until ended it; None where that did not.

    Patience ends none at its best epoch, so one that ended early there had reached the limit of then, which may be
    another one now.
    """
    monitor = setup.training.monitor
    scores = [epoch.scores.get(monitor, math.nan) for epoch in before.epochs]
    if before.state is not TrialState.COMPLETE or setup.split.kind == "kfold" or len(scores) >= setup.training.epochs:
        return None
    sign = 1.0 if direction_of(monitor) == "maximize" else -1.0
    *earlier, last = (sign * score for score in scores)
    best = max(earlier, default=-math.inf)
    # Halfway: on a GPU the same training may end a little below.
    return sign * (best + last) / 2 if last > best else None


def _ignore(check: EpochCheck) -> None:
    """Nobody watches."""


def _as_it_was(setup: Setup, before: TrialResult) -> Setup:
    """The setup with the precision that was chosen, and the pieces where memory was short; without a checkpoint."""
    changes: dict[str, Any] = {"checkpoint": None}
    if precision := before.settings.get("precision"):
        changes["precision"] = precision
    if pieces := before.settings.get("micro_batch"):
        changes["micro_batch"] = int(pieces)
    return setup.model_copy(update={"training": setup.training.model_copy(update=changes)})


def _stacks(before: TrialResult) -> Stacks | None:
    """A stack for a trial that was trained in one: the same arithmetic, whatever other trials are in it."""
    if before.settings.get("stack") != "shared":
        return None
    from hpo.training.stack import Stacks

    return Stacks(1)


def _device(asked: str) -> str:
    from hpo.training.device import resolve_devices

    return resolve_devices(asked)[0]


def _follow(
    training: Training,
    before: TrialResult,
    objective: str,
    tolerance: float,
    checks: list[EpochCheck],
    watch: Callable[[EpochCheck], None],
) -> TrialResult:
    """Train to the end, or to where the trial was pruned; each epoch is compared as it comes."""
    recorded = {(epoch.fold, epoch.number): epoch for epoch in before.epochs}

    def note(place: tuple[int, int], again: Epoch | None) -> None:
        checks.append(compare_epochs(place, recorded.pop(place, None), again, objective, tolerance))
        watch(checks[-1])

    message = next(training)
    while not isinstance(message, TrialEnded):
        if message is not None:  # a shared epoch is about to begin
            note((message.epoch.fold, message.epoch.number), message.epoch)
        message = training.send(bool(recorded) or before.state is not TrialState.PRUNED)
    for place in list(recorded):
        note(place, None)
    return message.result


def compare_epochs(
    place: tuple[int, int], before: Epoch | None, again: Epoch | None, objective: str, tolerance: float
) -> EpochCheck:
    """How the epoch at this place (fold, number) agrees with its repetition; None: one training has no such epoch."""
    first, second = (_numbers(epoch) for epoch in (before, again))
    differences = {name: _difference(first.get(name), second.get(name)) for name in {**first, **second}}
    score = max(differences, key=differences.__getitem__)
    worst = differences[score]
    agreement = Agreement.EQUAL if worst == 0 else Agreement.CLOSE if worst <= tolerance else Agreement.DIFFERS
    return EpochCheck(
        *place,
        before.scores.get(objective) if before else None,
        again.scores.get(objective) if again else None,
        agreement,
        worst,
        score if worst else "",
    )


def _numbers(epoch: Epoch | None) -> dict[str, float]:
    return {**epoch.scores, "learning_rate": epoch.learning_rate} if epoch else {}


def _difference(one: float | None, other: float | None) -> float:
    """Of two scores; two that are both no number are equal, and what is missing is infinitely far."""
    if one is None or other is None:
        return math.inf
    if one == other or (math.isnan(one) and math.isnan(other)):
        return 0.0
    difference = abs(one - other)
    return math.inf if math.isnan(difference) else difference


def _end(result: TrialResult) -> str:
    return f"{result.state}: {result.reason}" if result.state is TrialState.FAILED else str(result.state)


def _answers(before: TrialResult, again: TrialResult) -> tuple[int, int]:
    """Validation images whose answers are known of both, and how many of them have another one."""
    if not before.predicted or not again.predicted:
        return 0, 0
    pairs = list(zip(unpack_classes(before.predicted), unpack_classes(again.predicted), strict=True))
    return len(pairs), sum(one != other for one, other in pairs)
