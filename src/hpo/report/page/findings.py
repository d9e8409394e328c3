"""What a study's page is made of, and what each part is when it is missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from numpy.typing import NDArray

from hpo.records import FINAL, DataCard, ModelVersion, SplitCard, StudyResult, Trial
from hpo.report.mistakes import Mistake
from hpo.spec.study import StudySpec


@dataclass(frozen=True)
class Samples:
    """A look at the training images.

    strips holds a PNG of each class, some of its images side by side; mean and std have one
    value a channel, in [0, 1], over `counted` training images.
    """

    strips: tuple[bytes, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counted: int


@dataclass(frozen=True)
class Answers:
    """What the shown model answered on its validation images.

    labels (n,) int64, probabilities (n, classes) float32; images maps the positions of the mistakes, and of what they
    are shown beside, to (height, width, channels) uint8. Without images there are no mistakes to show.
    """

    labels: NDArray[Any]
    probabilities: NDArray[Any]
    mistakes: tuple[Mistake, ...] = ()
    images: Mapping[int, NDArray[Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """One look at the sealed test part: when, for which model, its test scores (test_accuracy, ...), and what for."""

    when: datetime
    version: int
    trial: int
    scores: Mapping[str, float]
    purpose: str = ""


@dataclass(frozen=True)
class Findings:
    """Everything that the page tells; what is None or empty is left out of it, and `missing` says why, in sentences.

    made is when the page was made; versions maps what the study ran on (python, torch, commit, ...) to its version;
    importances maps stage -> method -> path to a share of the score's variance. saliency holds a PNG for each mistake,
    where they were asked for.
    """

    study: StudyResult
    spec: StudySpec
    made: datetime
    data: DataCard | None = None
    split: SplitCard | None = None
    samples: Samples | None = None
    answers: Answers | None = None
    model: ModelVersion | None = None
    openings: tuple[Opening, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    importances: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    saliency: tuple[bytes, ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def ranking(self) -> Mapping[str, float]:
        """The importances of the last stage by the last of the methods, or nothing."""
        methods = list(self.importances.values())[-1] if self.importances else {}
        return list(methods.values())[-1] if methods else {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes; their numbers where the data set's card is gone."""
        if self.data is not None:
            return self.data.class_names
        shown = self.shown
        return tuple(map(str, range(len(shown.result.confusion)))) if shown and shown.result else ()

    @property
    def shown(self) -> Trial | None:
        """The trial that the page tells of: the registered model's, else the best final training, else the best."""
        return shown_trial(self.study, self.model)


def shown_trial(study: StudyResult, model: ModelVersion | None) -> Trial | None:
    """The trial behind the model; without one the best final training, else the best of the search, else None."""
    if model is not None:
        return next((trial for trial in study.trials if trial.number == model.trial), study.best)
    finals = study.ranked(FINAL)
    return finals[0] if finals else study.best
