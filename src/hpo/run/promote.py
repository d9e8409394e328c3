"""Open the sealed test part for a study's winner, once, write that down, and make it champion if it deserves it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from hpo.errors import ModelError
from hpo.home import Home
from hpo.records import ModelVersion, StudyResult
from hpo.run.data import study_data
from hpo.spec.load import parse_study
from hpo.spec.scores import SCORES
from hpo.track.ledger import openings, record_opening
from hpo.track.registry import set_alias, versions


@dataclass(frozen=True)
class Promotion:
    """What promote decided and why; scores are test scores (test_accuracy, ...); openings counts looks at the test."""

    promoted: bool
    reason: str
    challenger: ModelVersion
    champion: ModelVersion | None
    scores: Mapping[str, float]
    champion_scores: Mapping[str, float] = field(default_factory=dict)
    openings: int = 0


def promote(study: str, *, home: str | Path | None = None, trust: bool = False) -> Promotion:
    """Measure challenger and champion on the test part and move `champion` to the better one.

    Better is judged by the study's validation objective: the test part only measures what was chosen before. A version
    that was measured on this data before is not measured again, so nothing is gained by asking twice. trust allows a
    data function from outside the working directory. Raises ModelError where there is no challenger, DataError where
    the data is not the study's.
    """
    from hpo.search.storage import read_study

    place = Home.find(home)
    record = read_study(place, study)
    spec = parse_study(record.spec, trust=trust)
    by_alias = {alias: version for version in versions(place, spec.name) for alias in version.aliases}
    challenger, champion = by_alias.get("challenger"), by_alias.get("champion")
    if challenger is None:
        raise ModelError(f"{spec.name}: there is no challenger.", f"Run the study to its end: hpo run {spec.name}")
    if champion is not None and champion.version == challenger.version:
        count = len(openings(place, record))
        reason = "the challenger is the champion already"
        return Promotion(False, reason, challenger, champion, _test(challenger), _test(champion), count)
    objective = spec.search.objective
    promoted, reason = _gate(objective, challenger, champion)
    challenger = _measured(place, record, challenger)
    champion = _measured(place, record, champion) if champion is not None else None
    if promoted:
        tags = {"hpo.promoted_because": reason}
        challenger = set_alias(place, spec.name, "champion", challenger.version, tags=tags)
    return Promotion(
        promoted=promoted,
        reason=reason,
        challenger=challenger,
        champion=champion,
        scores=_test(challenger),
        champion_scores=_test(champion) if champion is not None else {},
        openings=len(openings(place, record)),
    )


def _gate(objective: str, challenger: ModelVersion, champion: ModelVersion | None) -> tuple[bool, str]:
    if champion is None:
        return True, "there was no champion before"
    new, old = challenger.scores.get(objective), champion.scores.get(objective)
    if new is None or old is None:
        return new is not None, f"only one of the two has a {objective}"
    better = new > old if SCORES[objective] == "maximize" else new < old
    relation = "better than" if better else "not better than"
    return better, f"{objective} {new:.4f} is {relation} the champion's {old:.4f}"


def _test(version: ModelVersion) -> dict[str, float]:
    return {name: value for name, value in version.scores.items() if name.startswith("test_")}


def _measured(home: Home, record: StudyResult, version: ModelVersion) -> ModelVersion:
    """The version with test scores: those it has, or new ones, for which the test part is opened."""
    if _test(version):
        return version
    from hpo.learn.sealed import evaluate_test
    from hpo.predict import load_model

    spec = parse_study(record.spec, trust=True)  # promote has asked
    card = study_data(record, spec)
    model = load_model(f"{version.name}/{version.version}", home=home)
    scores = evaluate_test(card, model.predict_proba)
    # Written down before anyone hears of it.
    record_opening(home, record, model=version, scores=scores)
    alias = "champion" if "champion" in version.aliases else "challenger"
    return replace(set_alias(home, version.name, alias, version.version, scores=scores), aliases=version.aliases)
