"""Open a study: create it in the storage, or find it there and check that it is the same one."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from optuna.study import StudyDirection
from optuna.trial import FrozenTrial

from hpo.errors import SpecError, StoreError
from hpo.home import Home
from hpo.locks import ask_lock, ensemble_lock, lock
from hpo.search.comparable import check_same, check_space, check_stages_same
from hpo.search.constraints import aims, parse_constraint
from hpo.search.enough import enough_key
from hpo.search.growth import Growth
from hpo.search.pruners import build_pruner
from hpo.search.samplers import SAMPLERS, check_own, sampler_entry
from hpo.search.stages import check_stages
from hpo.search.study import Study
from hpo.spec.automatic import as_begun, chosen_pruner, chosen_sampler
from hpo.spec.load import parse_study
from hpo.spec.own_code import content_of, library_changes
from hpo.spec.search import PrunerSpec, SamplerSpec, WarmStart
from hpo.spec.study import StudySpec
from hpo.storage import outbox
from hpo.storage.foreign import foreign_trials
from hpo.storage.liveness import Lease, clean_leases
from hpo.storage.optuna_private import METRIC_NAMES
from hpo.storage.optuna_storage import Storage, generations, open_storage
from hpo.storage.reader import to_result
from hpo.storage.retry import store_errors
from hpo.storage.trial_attrs import STOP, STUDY, key_of


def new_lease(home: Home, title: str, *, thaws: bool = False) -> Lease:
    """A lease for a supervisor of this study; thaws: its search may continue paused trials."""
    return Lease(home.locks, shared=home.shared, title=title, thaws=thaws)


def open_study(
    home: Home,
    spec: StudySpec,
    *,
    data_digest: str,
    budget: int | None = None,
    fresh: bool = False,
    join: str = "",
    class_names: Sequence[str] = (),
    fitted: Mapping[str, Any] | None = None,
    extend: bool = False,
) -> Study:
    """Start a study, or resume its newest generation; fresh starts a new generation.

    budget is stored in its record. join is the title of an existing study to take part in, of any generation: its
    record is left as it is. data_digest is that of the images that trials see, class_names are the data set's. fitted
    is stored in the record: what was fitted to minutes (hpo.execute.budget); None: what it has there stays. Raises
    SpecError where the spec cannot be searched, or where spec, data, code or weights differ from those of the study's
    trials (sampler, pruner and budget may change, the space with extend, see hpo.search.growth, and ends of ranges
    without it if that loses no trial), and StoreError where the storage refuses.
    """
    storage = open_storage(home)
    try:
        outbox.keep_reserve(home)
        if extend and not fresh:
            _end_dead_trials(home, storage, spec.name)
        enter = partial(
            _enter_study,
            storage,
            spec,
            data_digest=data_digest,
            budget=budget,
            fresh=fresh,
            join=join,
            fitted=fitted,
            extend=extend,
            content={**content_of(spec), "class_names": list(class_names)},
        )
        with store_errors(home):
            title, notes, spec = storage.transact(enter, lock="studies")
            clean_leases(home.locks)
            lease = new_lease(home, title, thaws=spec.search.thaw is not None)
            return Study(home, spec, storage, title, lease, notes)
    except BaseException:
        storage.close()
        raise


def _enter_study(
    storage: Storage,
    spec: StudySpec,
    *,
    data_digest: str,
    budget: int | None = None,
    fresh: bool = False,
    join: str = "",
    fitted: Mapping[str, Any] | None = None,
    extend: bool = False,
    content: Mapping[str, Any],
) -> tuple[str, list[str], StudySpec]:
    """Write the study's record, new or updated, and return its title, notes on its start, and its spec; see open_study.

    The spec is the one given, except that a study keeps the monitor that it began with where the spec sets none.
    content has the fingerprints of hpo.spec.own_code and the class names of the data.
    """
    _check_search(spec)
    titles = generations(storage, spec.name)
    if join and join not in titles.values():
        raise StoreError(f"no study {join!r} has begun here.", f"Begin it: hpo run {spec.name}")
    generation = max(titles, default=0) + (fresh or not titles)
    generation = next((number for number, title in titles.items() if title == join), generation)
    title = spec.name if generation == 1 else f"{spec.name}~{generation}"
    write = partial(
        _write_record,
        storage,
        spec,
        title,
        titles.get(generation),
        generation=generation,
        data_digest=data_digest,
        budget=budget,
        join=join,
        fitted=fitted,
        extend=extend,
        content=content,
    )
    # While a space grows, nobody else hands out a candidate of the old one.
    notes, spec = storage.transact(write, lock=ask_lock(title)) if extend else write()
    return title, notes, spec


def _write_record(
    storage: Storage,
    spec: StudySpec,
    title: str,
    begun: str | None,
    *,
    generation: int,
    data_digest: str,
    budget: int | None,
    join: str,
    fitted: Mapping[str, Any] | None,
    extend: bool,
    content: Mapping[str, Any],
) -> tuple[list[str], StudySpec]:
    """Write the record of the study of this title, and return notes and spec; begun: the title where it has begun."""
    study_id, before = storage.studies()[begun] if begun is not None else (-1, None)
    spec = as_begun(spec.resumed_as(before["spec"]), before) if before else spec
    record = {**_record(spec, generation, data_digest, content), "budget": budget}
    if fitted := before.get("fitted") if before and fitted is None else fitted:
        record["fitted"] = fitted
    notes: list[str] = []
    if before is not None:
        trials = storage.every_trial(study_id)
        growth = _growth(spec, before, trials)
        check_same(before, record, apart=growth.apart if growth else frozenset())
        if libraries := library_changes(before.get("content", {}), content):
            notes.append(f"Earlier trials ran with other libraries and may differ in the last digits: {libraries}.")
        if growth is None:
            check_stages_same(spec, before, trials)
            check_space(spec, trials)
        elif growth.changes and not growth.harmless and not (extend and not join):
            way = "" if join else f"Go on with those: hpo run {spec.name} --extend. "
            raise SpecError(
                f"{spec.name}: the search space has changed: {growth}.",
                f"{way}Restore the space, or start a new generation with --fresh.",
            )
        if join:
            return notes, spec
        record |= {key: before[key] for key in ("grown", "outside") if key in before}
        if growth is not None and growth.changes:
            notes.append(f"The search space has changed: {growth}.")
            if extend:
                record |= growth.write(storage)
            elif "grown" in record:  # trials count again if the space comes back to them
                record["outside"] = sorted(growth.outside)
        notes += _late_starts(before["spec"]["search"], record["spec"]["search"])
        record |= {"created": before["created"], "start": before.get("start", [])}
        told = before.get("enough", {})
        if told.items() >= enough_key(spec).items():
            record["enough"] = told
    else:
        record["start"], notes = _warm_starts(spec, storage)
        # It may exist without our record: its creator was killed between the two writes.
        study_id = storage.study_ids().get(title, -1)
        if study_id == -1:
            directions = [StudyDirection[direction.upper()] for _, direction in aims(spec)]
            study_id = storage.database.create_new_study(directions, title)
    # As study.set_metric_names of Optuna does; a study of an earlier version gets its names when it is resumed.
    storage.database.set_study_system_attr(study_id, METRIC_NAMES, [score for score, _ in aims(spec)])
    storage.database.set_study_user_attr(study_id, STUDY, record)
    return notes, spec


def _late_starts(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """A note where the candidates to try first have changed; both are the search of a stored spec."""
    changed = [f"search.{key}" for key in ("start", "start_from") if before.get(key, now[key]) != now[key]]
    return [f"{path} has changed, and counts only when a study begins: --fresh begins one." for path in changed]


def _record(spec: StudySpec, generation: int, data_digest: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The record of a new study, without its budget."""
    objectives = aims(spec)
    identity = spec.identity()
    if spec.search.constraints:
        identity["constraints"] = spec.search.constraints
    return {
        "name": spec.name,
        "generation": generation,
        "direction": objectives[0][1],
        "objective": objectives[0][0],
        "objectives": objectives,
        "spec": spec.model_dump(mode="json"),
        "identity": identity,
        "data_digest": data_digest,
        "created": time.time(),
        "content": content,
        "chosen": {"sampler": _chosen(chosen_sampler(spec)), "pruner": _chosen(chosen_pruner(spec))},
    }


def _chosen(choice: tuple[SamplerSpec | PrunerSpec, str]) -> dict[str, Any]:
    part, reason = choice
    rung = {"min_epochs": part.min_epochs or 1} if isinstance(part, PrunerSpec) else {}
    return {"name": part.name, "reason": reason, **rung}


def _check_search(spec: StudySpec) -> None:
    check_stages(spec)
    for text in spec.search.constraints:
        parse_constraint(text)
    for part in (spec.search.sampler, *(stage.sampler for stage in spec.search.stages if stage.sampler)):
        check_own(part)
    build_pruner(spec)
    name = spec.search.sampler.name
    if spec.search.objectives and not sampler_entry(spec.search.sampler).several_objectives:
        *others, last = [other for other, sampler in SAMPLERS.items() if sampler.several_objectives]
        raise SpecError(
            f"{spec.name}: sampler {name} searches for one objective only.",
            f"Write sampler: {', '.join(others)} or {last}.",
        )


def _growth(spec: StudySpec, before: Mapping[str, Any], trials: list[FrozenTrial]) -> Growth | None:
    """How the space has changed; None for searches in stages, whose later ones build upon the earlier."""
    if spec.search.stages or before["spec"]["search"].get("stages"):
        return None
    return Growth(spec, before, tuple(trials))


def _end_dead_trials(home: Home, storage: Storage, name: str) -> None:
    """Finish trials that a killed run has left: a space cannot change under a running trial."""
    with store_errors(home):
        titles = generations(storage, name)
    if titles:
        reap(home, titles[max(titles)])


def _warm_starts(spec: StudySpec, storage: Storage) -> tuple[list[dict[str, Any]], list[str]]:
    """The candidates to try first, perhaps partial, and a note for each value of another study that does not fit.

    Raises SpecError where a listed value does not fit the space, or there is no study of that name.
    """
    space = spec.search.whole_space
    for index, values in enumerate(spec.search.start):
        for path, value in values.items():
            if not space[path].takes(value):
                raise SpecError(
                    f"{spec.name}: search.start[{index}].{path}: {value!r} is not in the space.",
                    "Correct the value, or widen the space.",
                )
    others, notes = _best_of_other_study(spec, storage)
    return [*spec.search.start, *others], notes


def _best_of_other_study(spec: StudySpec, storage: Storage) -> tuple[list[dict[str, Any]], list[str]]:
    wanted, space = spec.search.start_from, spec.search.whole_space
    if wanted is None:
        return [], []
    apart: dict[str, Any] = {}
    if wanted.storage is not None:
        ranked = _best_of_foreign(wanted)
    else:
        ranked, theirs = _best_of_own(spec, wanted.study, storage)
        ours = spec.identity().get("per", {})
        apart = {path: theirs.get(path) for path in {**ours, **theirs} if ours.get(path) != theirs.get(path)}
    title = wanted.study
    different: dict[str, Mapping[str, Any]] = {}
    for parameters in ranked:
        different.setdefault(key_of(parameters), parameters)
    best, notes = [], []
    for parameters in list(different.values())[: wanted.best]:
        shared = {path: value for path, value in parameters.items() if path in space}
        same = {path: value for path, value in shared.items() if path not in apart}
        best.append({path: value for path, value in same.items() if space[path].takes(value)})
        notes += [
            f"start_from {title}: {path}={value!r} is not in this space and is left to the sampler."
            for path, value in same.items()
            if path not in best[-1]
        ]
    notes += [
        f"start_from {title}: {path} is drawn {'per {}, reference {}'.format(*per) if per else 'as it is'} there, "
        "not here, and is left to the sampler."
        for path, per in apart.items()
        if any(path in parameters for parameters in different.values())
    ]
    if not any(best):
        notes.append(f"start_from {title}: it has no complete trial with a path that this space varies.")
    return [values for values in best if values], notes


def _best_of_own(
    spec: StudySpec, name: str, storage: Storage
) -> tuple[list[Mapping[str, Any]], Mapping[str, list[Any]]]:
    """The parameters of the complete trials of a study of this storage, best first, and what they are drawn `per`."""
    studies, titles = storage.studies(), generations(storage, name)
    title = titles[max(titles)] if titles else name
    if title not in studies:
        raise SpecError(
            f"{spec.name}: search.start_from: no study {name!r} has run here (known: {', '.join(studies) or 'none'}).",
            "Run it first, correct the name, or leave start_from out.",
        )
    study_id, record = studies[title]
    ranked = to_result(record, storage.records(study_id)).ranked()
    return [trial.candidate.parameters for trial in ranked], record["identity"].get("per", {})


def _best_of_foreign(wanted: WarmStart) -> list[Mapping[str, Any]]:
    found = foreign_trials(wanted.study, str(wanted.storage))
    return [{wanted.names.get(name, name): value for name, value in each.items()} for each in found]


@contextmanager
def opened(home: Home, title: str) -> Iterator[Study]:
    """The handle of one generation of a study, in the block. Raises StoreError, or SpecError for another version's."""
    storage = open_storage(home)
    try:
        with store_errors(home):
            record = storage.studies()[title][1]
        spec = as_begun(parse_study(record["spec"], trust=True), record)
        study = Study(home, spec, storage, title, new_lease(home, title))
    except BaseException:
        storage.close()
        raise
    try:
        yield study
    finally:
        study.close()


def reap(home: Home, title: str) -> list[int]:
    """Finish the trials of dead supervisors of a study, see Study.reap. Takes half a minute on a shared storage."""
    with opened(home, title) as study:
        study.listen()
        return study.reap()


def ask_to_stop(home: Home, title: str, token: str) -> None:
    """Ask every supervisor that has the study open now to stop; token is any text that was not used before."""
    storage = open_storage(home)
    try:
        with store_errors(home):
            studies = storage.studies()
            if title not in studies:
                raise StoreError(f"no study {title!r} has run here.", "List them: hpo status")
            storage.database.set_study_user_attr(studies[title][0], STOP, token)
    finally:
        storage.close()


def drop_locks(home: Home, titles: set[str]) -> None:
    """Remove leases that no process holds, and the locks of the studies with these titles, which were deleted."""
    with lock(home, "studies"):
        clean_leases(home.locks)
        for title in titles:
            for name in (ask_lock(title), ensemble_lock(title)):
                (home.locks / f"{name}.lock").unlink(missing_ok=True)
