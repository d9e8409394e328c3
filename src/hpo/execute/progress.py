"""What a run has found so far."""

from __future__ import annotations

from hpo.records import AFTER_SEARCH, StudyResult, TrialResult, TrialState
from hpo.spec.study import StudySpec

# So many failures before the first success mean that the study itself is wrong, not its candidates.
_HOPELESS = 5


class Progress:
    """The best value, the failures and the precisions so far; `before` holds the trials of earlier runs.

    precisions maps the keys of settings that were tried to the precision that was chosen for them.
    """

    def __init__(self, spec: StudySpec, before: StudyResult) -> None:
        self._sign = 1 if spec.search.better == "maximize" else -1
        self._until = spec.search.until
        self._best: float | None = None
        self._failed = 0
        self._succeeded = False
        self.precisions: dict[str, str] = {}
        for trial in before.trials:
            if trial.result is not None and not trial.outside:
                self.add(trial.result, final=trial.candidate.stage in AFTER_SEARCH)
        self._failed = 0  # the cause of earlier failures may be gone

    @property
    def hopeless(self) -> bool:
        """True where trials fail, and none has ever succeeded."""
        return self._failed >= _HOPELESS and not self._succeeded

    @property
    def reached(self) -> bool:
        """True where the best trial is as good as search.until asks for."""
        return self._until is not None and self._best is not None and self._sign * (self._best - self._until) >= 0

    def add(self, result: TrialResult, *, final: bool) -> bool:
        """Take in the result of a trial; True if it is the best of the search so far."""
        # A trial that is pruned because memory was short is no success.
        self._failed += result.state is TrialState.FAILED or (result.state.finished and result.failure is not None)
        # Nor is one that was not trained: too large, or of values that do not fit together.
        pruned = result.state in (TrialState.PRUNED, TrialState.PAUSED) and result.failure is None and result.feasible
        self._succeeded |= result.state is TrialState.COMPLETE or pruned
        if key := result.settings.get("precision_key"):
            self.precisions.setdefault(key, result.settings["precision"])
        if final or result.state is not TrialState.COMPLETE or not result.feasible:
            return False
        return self.note(result.value)

    def note(self, value: float | None) -> bool:
        """Take in the objective of a complete trial; True if it is the best so far."""
        if value is None or (self._best is not None and self._sign * value <= self._sign * self._best):
            return False
        self._best = value
        return True
