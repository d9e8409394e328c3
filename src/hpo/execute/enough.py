"""Whether a search has found enough: what is left to gain is below a limit, or the noise of its validation."""

from __future__ import annotations

import math
import statistics
from typing import Any

from hpo.metrics import name_of
from hpo.records import TrialResult
from hpo.report.statistics import confusion_intervals
from hpo.spec.search import EnoughSpec
from hpo.spec.study import StudySpec

_WIDTH = 2 * 1.959964  # standard errors in a 95 % interval


def standard_error(spec: StudySpec, result: TrialResult) -> float:
    """Of a trial's objective, in its units; inf where it is not known.

    With folds sqrt(1 / k + 1 / (k - 1)) times their standard deviation (Nadeau & Bengio 2003, as Makarova et al. 2022);
    else from the bootstrap interval of the validation images, and one image at least.
    """
    folds = [fold[spec.search.objective] for fold in result.folds]
    if len(folds) > 1:
        return math.sqrt(1 / len(folds) + 1 / (len(folds) - 1)) * statistics.stdev(folds)
    interval = confusion_intervals(result.confusion, seed=spec.seed).get(name_of(spec.search.objective))
    if interval is None:
        return math.inf
    images = sum(map(sum, result.confusion))
    return max((interval.high - interval.low) / _WIDTH, 1 / images)


class Enough:
    """search.enough of a study that runs; study is its handle, hpo.search.study.Study."""

    def __init__(self, spec: StudySpec, study: Any) -> None:
        self._spec = spec
        self._verdict = study.verdict
        self._stale, self._found = spec.search.enough != "off", False

    def note(self) -> None:
        """A trial has ended, perhaps of another supervisor: the next question needs a new answer."""
        self._stale = self._spec.search.enough != "off" and not self._found

    def reached(self) -> bool:
        """Whether the search may end. What is found once stays so, also when the study is resumed."""
        if self._stale:
            self._stale, self._found = False, bool(self._verdict.told) or self._judge()
        return self._found

    def _judge(self) -> bool:
        found = self._verdict.gain_left()
        if found is None:
            return False
        gain, best, trials = found
        limit, words = self._limit(best)
        if gain >= limit:
            return False
        better = "raised" if self._spec.search.better == "maximize" else "lowered"
        self._verdict.conclude(
            f"after {trials} trials {self._spec.search.objective} can probably be {better} by no more than {gain:.2g} "
            f"(bound of Makarova et al. 2022), less than {words}"
        )
        return True

    def _limit(self, best: TrialResult) -> tuple[float, str]:
        wanted = self._spec.search.enough
        if isinstance(wanted, EnoughSpec):
            return wanted.gain, f"search.enough.gain {wanted.gain:g}"
        error = standard_error(self._spec, best)
        if math.isinf(error):
            return -math.inf, ""
        return error, f"the standard error {error:.2g} of the best trial's validation"
