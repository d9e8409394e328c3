"""The facts about a study's earlier trials that decide how its next trials run, and whether more are of use."""

from __future__ import annotations

from hpo.records import FINAL, StudyResult, TrialResult, TrialState
from hpo.spec.study import StudySpec

# So many failures before the first success mean that the study itself is wrong, not its candidates.
_HOPELESS = 5


class Progress:
    """The best value, the failures and the precisions so far; `before` holds the trials of earlier runs.

    precisions maps the keys of settings that were tried to the precision that was chosen for them.
    """

    def __init__(self, spec: StudySpec, before: StudyResult) -> None:
        self._sign = 1 if spec.search.better == "maximize" else -1
        self._best: float | None = None
        self._failed = 0
        self._succeeded = False
        self.precisions: dict[str, str] = {}
        for trial in before.trials:
            if trial.result is not None:
                self.add(trial.result, final=trial.candidate.stage == FINAL)
        self._failed = 0  # the cause of earlier failures may be gone

    @property
    def hopeless(self) -> bool:
        """True where trials fail, and none has ever succeeded."""
        return self._failed >= _HOPELESS and not self._succeeded

    def add(self, result: TrialResult, *, final: bool) -> bool:
        """Take in the result of a trial; True if it is the best of the search so far."""
        # A trial that is pruned because memory was short is no success.
        self._failed += result.state is TrialState.FAILED or (result.state.finished and result.failure is not None)
        self._succeeded |= result.state in (TrialState.COMPLETE, TrialState.PRUNED) and result.failure is None
        if key := result.settings.get("precision_key"):
            self.precisions.setdefault(key, result.settings["precision"])
        if final or result.state is not TrialState.COMPLETE or result.value is None or not result.feasible:
            return False
        if self._best is None or self._sign * result.value > self._sign * self._best:
            self._best = result.value
            return True
        return False
