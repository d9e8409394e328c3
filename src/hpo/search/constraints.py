"""Objectives and constraints: the scores that a search is judged by, and whether a result is within its limits."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from hpo.errors import SpecError
from hpo.records import TrialResult
from hpo.spec.study import StudySpec

_FORM = re.compile(r"\s*(\w[^<>]*?)\s*(<=|>=)\s*(\S+)\s*")


class Constraint(NamedTuple):
    """A limit on a score: op is <= or >=."""

    name: str
    op: str
    limit: float


def parse_constraint(text: str) -> Constraint:
    """`parameters <= 200000` -> its parts. Raises SpecError."""
    match = _FORM.fullmatch(text)
    try:
        if match:
            return Constraint(match[1], match[2], float(match[3]))
    except ValueError:
        pass
    raise SpecError(
        f"search.constraints: {text!r} is no limit.", "Write a score, <= or >=, and a number: parameters <= 200000."
    )


def violation(constraint: Constraint, scores: Mapping[str, float]) -> float:
    """The amount beyond the limit, as a share of it; 0 or less: within the limit. inf without the score."""
    score = scores.get(constraint.name, math.nan)
    if math.isnan(score):
        return math.inf
    over = score - constraint.limit if constraint.op == "<=" else constraint.limit - score
    # As a share: samplers add up the violations of limits in different units.
    return over / abs(constraint.limit) if constraint.limit else over


def violations(spec: StudySpec, scores: Mapping[str, float]) -> dict[str, float]:
    """The text of each constraint -> its violation.

    Limits on validation scores are left out where there are none: a network trained on all images, or not at all.
    """
    constraints = {text: parse_constraint(text) for text in spec.search.constraints}
    return {
        text: violation(constraint, scores)
        for text, constraint in constraints.items()
        if constraint.name in scores or not constraint.name.startswith("valid_")
    }


def aims(spec: StudySpec) -> tuple[tuple[str, str], ...]:
    """(score, maximize or minimize) of every objective; the first is the trial's value."""
    several = tuple((aim.score, aim.better) for aim in spec.search.objectives)
    return several or ((spec.search.objective, spec.search.better),)


def judge(spec: StudySpec, result: TrialResult) -> TrialResult:
    """The result with `values` and `feasible` set from its scores; an infeasible result stays so.

    With several objectives the first is the value. An objective without a score is NaN, unless a value was given.
    """
    feasible = result.feasible and all(amount <= 0 for amount in violations(spec, result.scores).values())
    if not spec.search.objectives:
        return replace(result, feasible=feasible)
    (first, _), *rest = aims(spec)
    value = result.scores.get(first, result.value)
    values = (math.nan if value is None else value, *(result.scores.get(score, math.nan) for score, _ in rest))
    return replace(result, value=value, values=values, feasible=feasible)


def most_parameters(spec: StudySpec) -> float:
    """The tightest upper limit on parameters; inf without one."""
    return highest_allowed(spec, "parameters")


def highest_allowed(spec: StudySpec, score: str) -> float:
    """The tightest upper limit on a score; inf without one."""
    limits = map(parse_constraint, spec.search.constraints)
    return min((limit for name, op, limit in limits if (name, op) == (score, "<=")), default=math.inf)


def needs_latency(spec: StudySpec) -> bool:
    """Whether an objective or a limit asks for latency_ms."""
    asked = {score for score, _ in aims(spec)} | {parse_constraint(text).name for text in spec.search.constraints}
    return "latency_ms" in asked
