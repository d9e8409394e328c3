"""The data that a study was made with, found again."""

from __future__ import annotations

from hpo.errors import DataError
from hpo.records import DataCard, StudyResult
from hpo.spec.study import StudySpec


def study_data(study: StudyResult, spec: StudySpec) -> DataCard:
    """The prepared data of a study. Raises DataError where it is gone or is not what the study was made with."""
    from hpo.data.prepare import prepare

    card = prepare(spec.data, spec.split)
    if card.digest != study.data_digest:
        raise DataError(
            f"{card.source}: its digest {card.digest} is not {study.data_digest}, which {study.title} was made with.",
            "Bring back the file that the study was run on.",
        )
    return card
