"""Numbers and study parts as the page says them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from hpo.report.figures.style import value_text
from hpo.report.statistics import Interval
from hpo.spec.space import Choice, Float, Int
from hpo.spec.study import SplitSpec


def duration(seconds: float) -> str:
    """42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def between(interval: Interval) -> str:
    """The ends of an interval."""
    return f"{interval.low:.4f} to {interval.high:.4f}"


def counted(count: int, noun: str) -> str:
    """1 trial, 1,200 trials."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def times(count: int) -> str:
    """once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def listed(items: Iterable[object]) -> str:
    """Items with commas between them."""
    return ", ".join(map(str, items))


def spread(parameter: Float | Int | Choice) -> str:
    """What a parameter may be: its options, or its range and scale."""
    if isinstance(parameter, Choice):
        return listed(map(value_text, parameter.choice))
    low, high = parameter.ends()
    scale = " on a logarithmic scale" if parameter.log else f" in steps of {parameter.step}" if parameter.step else ""
    return f"{value_text(low)} to {value_text(high)}{scale}"


def condition(when: Mapping[str, Any]) -> str:
    """When a conditional parameter is tried."""
    return " and ".join(f"{path} is {listed(want) if isinstance(want, list) else want}" for path, want in when.items())


_BY = {"stratified": "with equal class shares, at random", "random": "at random", "order": "the last rows of the file"}


def split_words(split: SplitSpec) -> str:
    """How train and validation were divided."""
    if split.kind == "official":
        return "the validation part that the data set comes with"
    if split.kind == "holdout":
        return f"{split.share:.0%} of the development images held out, {_BY[split.by]} (split seed {split.seed})"
    if split.kind == "none":
        return "no validation part: every development image trains"
    share = "" if split.fraction == 1 else f" on {split.fraction:.0%} of the development images"
    return f"{split.folds}-fold cross-validation{share}, {split.by} (split seed {split.seed})"
