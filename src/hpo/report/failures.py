"""Why trials of a study did not come to their end: how many of each kind, and the reason that is met most."""

from __future__ import annotations

import re
from collections import Counter

from hpo.records import StudyResult, TrialState

_NUMBER = re.compile(r"\d[\d.,e+-]*")


def failure_lines(study: StudyResult) -> list[str]:
    """`3 not_finite, 2 setup`, then the commonest reason; empty where nothing failed.

    Trials that were interrupted and are tried again do not count. Reasons that differ in numbers only are one; the
    newest of them is shown.
    """
    ended = [trial for trial in study.trials if trial.state.finished and trial.result is not None]
    failed = [
        trial.result
        for trial in ended
        if trial.result is not None and (trial.result.failure is not None or trial.state is TrialState.FAILED)
    ]
    if not failed:
        return []
    # Records of earlier versions have no kind.
    kinds = Counter(result.failure.value if result.failure else "unclassified" for result in failed)
    lines = [", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
    reasons = Counter(_NUMBER.sub("#", result.reason) for result in failed if result.reason)
    if reasons:
        (commonest, count), *_ = reasons.most_common(1)
        newest = next(result for result in reversed(failed) if _NUMBER.sub("#", result.reason) == commonest)
        lines.append(f"{newest.reason} (trial {newest.number}{f', and {count - 1} more so' if count > 1 else ''})")
    return lines
