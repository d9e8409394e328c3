"""Enter a study in the storage, or find it there and make sure that it is the same one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import optuna
from optuna.distributions import check_distribution_compatibility
from optuna.trial import FrozenTrial

from hpo.errors import SpecError, StoreError
from hpo.search.constraints import aims, parse_constraint
from hpo.search.stages import check_stages
from hpo.search.strategy import distribution
from hpo.search.warm_start import warm_starts
from hpo.spec.content import content_changes, library_changes, with_digests
from hpo.spec.space import Choice, Float, Int
from hpo.spec.study import StudySpec
from hpo.storage.optuna_storage import STUDY, Storage, generations


def enter_study(
    storage: Storage,
    spec: StudySpec,
    *,
    data_digest: str,
    budget: int | None = None,
    fresh: bool = False,
    join: str = "",
    content: Mapping[str, Any] | None = None,
) -> tuple[str, list[str], StudySpec]:
    """Write the study's record, old or new; its title, what there is to note about its start, and its spec.

    The spec is the one given, but for a monitor that it does not give: a study keeps the one that it began with.
    content are the fingerprints that hpo.spec.content makes, with the data set's `class_names`.

    budget is the total of trials that it is run for; join is the title of a study that is there: its record is compared
    with, and left.

    Raises SpecError where the spec cannot be searched, or is not that of the study's trials.
    """
    _check_search(spec)
    known = generations(storage, spec.name)
    if join and join not in known.values():
        raise StoreError(f"no study {join!r} has begun here.", f"Begin it: hpo run {spec.name}")
    generation = max(known, default=0) + (fresh or not known)
    generation = next((number for number, title in known.items() if title == join), generation)
    title = spec.name if generation == 1 else f"{spec.name}~{generation}"
    before = storage.studies()[known[generation]][1] if generation in known else None
    spec = spec.resumed_as(before["spec"]) if before else spec
    objectives = aims(spec)
    identity = spec.identity()
    if spec.search.constraints:
        identity["constraints"] = spec.search.constraints
    record = {
        "name": spec.name,
        "generation": generation,
        "direction": objectives[0][1],
        "objective": objectives[0][0],
        "objectives": objectives,
        "spec": spec.model_dump(mode="json"),
        "identity": identity,
        "data_digest": data_digest,
        "created": time.time(),
        "budget": budget,
        "content": content or {},
    }
    notes: list[str] = []
    if before is not None:
        number = storage.studies()[title][0]
        _check_same(before, record)
        if libraries := library_changes(before.get("content", {}), content or {}):
            notes.append(
                f"its earlier trials ran with other libraries, and may differ in the last digits: {libraries}."
            )
        _check_space(spec, storage.every_trial(number))
        if join:
            return title, notes, spec
        record |= {"created": before["created"], "start": before.get("start", [])}
    else:
        record["start"], notes = warm_starts(spec, storage)
        # It may exist without our record: its maker was killed between the two writes.
        there = {study.study_name: study._study_id for study in storage.get_all_studies()}
        directions = [direction for _, direction in objectives]
        if title not in there:
            there[title] = optuna.create_study(storage=storage, study_name=title, directions=directions)._study_id
        number = there[title]
    storage.set_study_user_attr(number, STUDY, record)
    return title, notes, spec


def _check_search(spec: StudySpec) -> None:
    check_stages(spec)
    for text in spec.search.constraints:
        parse_constraint(text)
    if spec.search.objectives and spec.search.sampler.name == "cmaes":
        raise SpecError(
            f"{spec.name}: sampler cmaes searches for one objective only.", "Write sampler: tpe, gp, qmc or random."
        )


def _check_same(before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = before.get("content", {}), now["content"]
    # A study of before knows no content: its paths are compared as they were.
    by_content = "files" in old and "files" in new
    flat = [
        dict(
            _flat(
                {
                    **with_digests(record["identity"], content.get("files", {}) if by_content else {}),
                    "data digest": record["data_digest"],
                }
            )
        )
        for record, content in ((before, old), (now, new))
    ]
    absent = object()
    places = [place for place in {**flat[0], **flat[1]} if flat[0].get(place, absent) != flat[1].get(place, absent)]
    changes = [f"{place}: {flat[0].get(place, 'absent')} -> {flat[1].get(place, 'absent')}" for place in places]
    changes += content_changes(old, new)
    if changes:
        raise SpecError(
            f"{now['name']}: its trials were run otherwise, and would not be comparable: {', '.join(changes)}.",
            "Restore what has changed and run it as it was, or start it anew with --fresh.",
        )


def _flat(tree: Mapping[str, Any], stem: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{stem}{key}.")
        else:
            yield f"{stem}{key}", value


def _check_space(spec: StudySpec, trials: list[FrozenTrial]) -> None:
    """Optuna cannot go on where a parameter has changed its kind or a choice its options."""
    tried: dict[str, Any] = {path: found for trial in trials for path, found in trial.distributions.items()}
    for label, place, parameter in _labelled(spec):
        try:
            check_distribution_compatibility(tried.get(label, distribution(parameter)), distribution(parameter))
        except ValueError:
            raise SpecError(
                f"{spec.name}: {place}: was {tried[label]}, is now {distribution(parameter)}.",
                "Ends of a range may move while a study goes on, options and kind may not: start it anew with --fresh.",
            ) from None


def _labelled(spec: StudySpec) -> Iterator[tuple[str, str, Float | Int | Choice]]:
    """(name in Optuna's storage, place in the spec, parameter) of all that is varied."""
    for path, parameter in spec.search.space.items():
        yield path, f"search.space.{path}", parameter
    for stage in spec.search.stages:
        for path, parameter in stage.space.items():
            yield f"{stage.name}/{path}", f"search.stages.{stage.name}.{path}", parameter
