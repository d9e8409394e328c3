"""Measure models on the sealed test part, each once: who was measured before is remembered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo.home import Home
from hpo.jobs.shared.image_history import image_history
from hpo.jobs.shared.model_reference import find_model
from hpo.jobs.shared.test_set_access import measure
from hpo.tracking.ledger import openings


@dataclass(frozen=True)
class Evaluation:
    """Test scores of one model, as `asked` for. opened: the test part was opened for it just now.

    when (ISO 8601, UTC) and purpose are those of its measurement, "" if only the registry has it. openings
    counts the looks at the test part of `study` (a title) so far, those for other models of it included. history has
    sentences on its images: the models of any study that they have measured, and the trainings that have seen them.
    """

    asked: str
    model: str
    study: str
    scores: Mapping[str, float]
    opened: bool
    when: str
    purpose: str
    openings: int
    history: tuple[str, ...] = ()


def evaluate(models: Sequence[str], *, home: str | Path | None = None, trust: bool = False) -> list[Evaluation]:
    """Test scores of models that are named as for run.compare: STUDY, STUDY#22, NAME/1, NAME@ALIAS.

    The test part is opened for those that nobody has measured, once all of them are known to have a model, and each
    opening is written down. trust allows data functions from outside the working directory. Raises HpoError for a model
    that was not kept or is unknown; then none is opened.
    """
    place = Home.find(home)
    references = [find_model(place, asked, trust=trust) for asked in models]
    for reference in references:
        reference.kept("the test part asks for it")
    measured = [measure(place, reference, purpose="evaluate") for reference in references]
    return [
        Evaluation(
            asked=reference.name,
            model=reference.description,
            study=reference.study.title,
            scores=each.scores,
            opened=each.opened,
            when=each.opening.when if each.opening else "",
            purpose=each.opening.purpose if each.opening else "",
            openings=len(openings(place, reference.study)),
            history=image_history(place, reference).sentences,
        )
        for reference, each in zip(references, measured, strict=True)
    ]
