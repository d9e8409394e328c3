"""What a study that is resumed must have in common with its trials: else they could not be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optuna.distributions import check_distribution_compatibility
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import SpecError
from hpo.search.stages import distribution
from hpo.spec.own_code import content_changes, with_digests
from hpo.spec.space import Choice, Float, Int, Space
from hpo.spec.study import StudySpec
from hpo.storage.trial_attrs import stage_of

_ONLY_ENDS = "Only the ends of a range may change when a study is resumed: start a new generation with --fresh."


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], *, apart: frozenset[str]) -> None:
    """Raise SpecError where settings differ; those of the paths apart may."""
    contents = before.get("content", {}), now["content"]
    # Records of earlier versions have no fingerprints of files: their paths are compared.
    files = [content["files"] for content in contents] if all("files" in content for content in contents) else [{}, {}]
    old, new = (
        dict(_flat({**with_digests(record["identity"], known), "data digest": record["data_digest"]}))
        for record, known in zip((before, now), files, strict=True)
    )
    absent = object()
    paths = [path for path in {**old, **new} if old.get(path, absent) != new.get(path, absent)]
    paths = [path for path in paths if not any(f"{path}.".startswith(f"{free}.") for free in apart)]
    changes = [f"{path}: {old.get(path, 'absent')} -> {new.get(path, 'absent')}" for path in paths]
    changes += content_changes(*contents)
    if changes:
        raise SpecError(
            f"{now['name']}: its trials used other settings and would not be comparable: {', '.join(changes)}.",
            "Restore these settings, or start a new generation with --fresh.",
        )


def _flat(tree: Mapping[str, Any], stem: str = "") -> Any:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{stem}{key}.")
        else:
            yield f"{stem}{key}", value


def check_space(spec: StudySpec, trials: list[FrozenTrial]) -> None:
    """Raise SpecError where a parameter has changed its kind, or a choice its options: Optuna cannot resume then."""
    tried: dict[str, Any] = {label: way for trial in trials for label, way in trial.distributions.items()}
    for label, path, parameter in _labelled(spec):
        try:
            check_distribution_compatibility(tried.get(label, distribution(parameter)), distribution(parameter))
        except ValueError:
            raise SpecError(
                f"{spec.name}: {path}: was {tried[label]}, is now {distribution(parameter)}.",
                _ONLY_ENDS,
            ) from None


def check_stages_same(spec: StudySpec, before: Mapping[str, Any], trials: list[FrozenTrial]) -> None:
    """Raise SpecError where a stage that has trials has other parameters or conditions: its trials lack those."""
    search = before["spec"]["search"]
    old: dict[str | None, Any] = {None: search.get("space", {})}
    old |= {stage["name"]: stage["space"] for stage in search.get("stages", [])}
    new: dict[str | None, Space] = {None: spec.search.space}
    new |= {stage.name: stage.space for stage in spec.search.stages}
    begun = {stage_of(trial) for trial in trials if trial.state is not TrialState.FAIL} & old.keys()
    if begun and bool(search.get("stages")) != bool(spec.search.stages):
        place, other = ("search.space", "search.stages") if spec.search.stages else ("search.stages", "search.space")
        raise SpecError(
            f"{spec.name}: {place} has become {other}, and trials exist. A stage counts, compares and passes on only "
            "trials that varied its own parameters from its own start, so these would count in neither.",
            f"Restore {place}, or start a new generation that tries the best of these trials first: write "
            f"search.start_from: {{study: {spec.name}, best: 5}}, then hpo run {spec.name} --fresh",
        )
    for stage in [stage for stage in old if stage in begun]:
        place = "search.space" if stage is None else f"search.stages.{stage}"
        ways = [_conditions(Space.model_validate(old[stage])), _conditions(new.get(stage, Space()))]
        for path in [path for path in {**ways[0], **ways[1]} if ways[0].get(path) != ways[1].get(path)]:
            raise SpecError(
                f"{spec.name}: {place}.{path}: {_told(ways[0], path, 'was')}, {_told(ways[1], path, 'is')} now, and "
                f"trials of {'this space' if stage is None else 'this stage'} exist.",
                _ONLY_ENDS,
            )


def _conditions(space: Space) -> dict[str, Any]:
    return {path: part.when for path, part in space.items()}


def _told(conditions: Mapping[str, Any], path: str, verb: str) -> str:
    if path not in conditions:
        return f"{verb} not searched"
    return f"{verb} searched {f'when {conditions[path]}' if conditions[path] else 'always'}"


def _labelled(spec: StudySpec) -> Iterator[tuple[str, str, Float | Int | Choice]]:
    """(name in Optuna's storage, path in the study file, parameter) of each parameter."""
    for path, parameter in spec.search.space.items():
        yield path, f"search.space.{path}", parameter
    for stage in spec.search.stages:
        for path, parameter in stage.space.items():
            yield f"{stage.name}/{path}", f"search.stages.{stage.name}.{path}", parameter
