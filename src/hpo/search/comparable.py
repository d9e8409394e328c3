"""What a study that is resumed must have in common with its trials: else they could not be compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from optuna.distributions import check_distribution_compatibility
from optuna.trial import FrozenTrial

from hpo.errors import SpecError
from hpo.search.stages import distribution
from hpo.spec.own_code import content_changes, with_digests
from hpo.spec.space import Choice, Float, Int
from hpo.spec.study import StudySpec


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
                "Only the ends of a range may change when a study is resumed: start a new generation with --fresh.",
            ) from None


def _labelled(spec: StudySpec) -> Iterator[tuple[str, str, Float | Int | Choice]]:
    """(name in Optuna's storage, path in the study file, parameter) of each parameter."""
    for path, parameter in spec.search.space.items():
        yield path, f"search.space.{path}", parameter
    for stage in spec.search.stages:
        for path, parameter in stage.space.items():
            yield f"{stage.name}/{path}", f"search.stages.{stage.name}.{path}", parameter
