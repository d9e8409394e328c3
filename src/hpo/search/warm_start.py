"""Candidates to try first: those that the spec lists, and the best of another study."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hpo.errors import SpecError
from hpo.search.narrow import fits
from hpo.spec.study import StudySpec
from hpo.storage.optuna_storage import Storage, generations, to_result
from hpo.storage.trial_attrs import key_of


def warm_starts(spec: StudySpec, storage: Storage) -> tuple[list[dict[str, Any]], list[str]]:
    """Partial candidates to try first, and a note for each value of the other study that this space cannot take.

    Raises SpecError where a listed value does not fit the space, or there is no study of that name.
    """
    space = spec.search.whole_space
    for index, values in enumerate(spec.search.start):
        for path, value in values.items():
            if not fits(space[path], value):
                raise SpecError(
                    f"{spec.name}: search.start[{index}].{path}: {value!r} is not in the space.",
                    "Correct the value, or widen the space.",
                )
    found, notes = _best_elsewhere(spec, storage)
    return [*spec.search.start, *found], notes


def _best_elsewhere(spec: StudySpec, storage: Storage) -> tuple[list[dict[str, Any]], list[str]]:
    wanted, space = spec.search.start_from, spec.search.whole_space
    if wanted is None:
        return [], []
    studies, known = storage.studies(), generations(storage, wanted.study)
    title = known[max(known)] if known else wanted.study
    if title not in studies:
        raise SpecError(
            f"{spec.name}: search.start_from: no study {wanted.study!r} has run here "
            f"(known: {', '.join(studies) or 'none'}).",
            "Run it first, correct the name, or leave start_from out.",
        )
    number, record = studies[title]
    different: dict[str, Mapping[str, Any]] = {}
    for trial in to_result(record, storage.records(number)).ranked():
        different.setdefault(key_of(trial.candidate.parameters), trial.candidate.parameters)
    best, notes = [], []
    for parameters in list(different.values())[: wanted.best]:
        shared = {path: value for path, value in parameters.items() if path in space}
        best.append({path: value for path, value in shared.items() if fits(space[path], value)})
        notes += [
            f"start_from {title}: {path}={value!r} is not in this space and is left to the sampler."
            for path, value in shared.items()
            if path not in best[-1]
        ]
    if not any(best):
        notes.append(f"start_from {title}: it has no complete trial with a place that this space varies.")
    return [values for values in best if values], notes
