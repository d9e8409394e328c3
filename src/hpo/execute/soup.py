"""Greedy soups: the weights of trials with one architecture, averaged where validation says that it helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hpo.errors import HpoError
from hpo.execute.bases import trained_in
from hpo.execute.ensemble import EnsembleContext, KeptTrial, Made, ValidationImages, empty_result, record
from hpo.execute.finals import ensemble_setup
from hpo.execute.workdir import pictures_folder
from hpo.execute.workers.ensemble_jobs import build_soup
from hpo.records import TrialResult
from hpo.report.ensembles import Gain, Limits, Pool
from hpo.search.study import Study


@dataclass(frozen=True)
class Soup:
    """A soup of a study. result has its members and files; one without members says that no average is better.

    gain is None where fewer than two trials have the architecture of the best one.
    """

    result: TrialResult
    gain: Gain | None


def choose_soup(
    kept: Sequence[KeptTrial], images: ValidationImages, limits: Limits, study: Study, context: EnsembleContext
) -> Soup:
    """Choose and make the greedy soup of these trials, best first, in the study's folder of work. Raises HpoError."""
    if images.labels.ndim == 2:
        raise HpoError(
            f"{study.title}: its images have several labels, and a soup is chosen by the class of an image.",
            "Average probabilities instead.",
        )
    scratch = pictures_folder(context.work, study) / "ensemble"
    result = empty_result(kept, scratch, parameters=kept[0].result.parameter_count, average="weights")
    probabilities = np.stack([each.probabilities for each in kept])
    pool = Pool(probabilities, images.labels, [each.result.parameter_count for each in kept])
    members = [
        (each.name, 1, place) for each, place in zip(kept, context.model_folders(kept, scratch.parent), strict=True)
    ]
    setup = ensemble_setup(study.spec, context.data)
    objective = study.spec.search.judged_by
    return Soup(
        *context.compute(
            build_soup, result, members, pool, limits, images.rows, setup, context.data, objective, study.spec.predict
        )
    )


def make_soup(soup: Soup, study: Study, context: EnsembleContext) -> Made:
    """Record a soup as a trial of the study, log and register it; as make_ensemble does."""
    unknown = context.check_bases(trained_in(Path(soup.result.folder)))
    return Made(record(soup.result, study, context), unknown)
