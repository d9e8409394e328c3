"""Make a study's challenger the champion: first the gates, then the sealed test part, then the alias."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from hpo.errors import HpoError, ModelError
from hpo.home import Home
from hpo.jobs.shared.gates import Verdict, verdicts
from hpo.jobs.shared.model_reference import ModelReference, find_model
from hpo.jobs.shared.test_set_access import measure, test_scores
from hpo.records import ModelVersion
from hpo.spec.load import parse_study
from hpo.tracking.champions import record_champion
from hpo.tracking.ledger import openings
from hpo.tracking.registry import resolve, set_alias, versions


@dataclass(frozen=True)
class Promotion:
    """What promote decided and why.

    gates are the verdicts on the challenger, none where it is the champion already; forced says that the alias was
    moved although one of them refused. scores are test scores (test_accuracy, ...), empty where the test part was not
    opened; openings counts the looks at the study's test part so far.
    """

    promoted: bool
    reason: str
    challenger: ModelVersion
    champion: ModelVersion | None
    scores: Mapping[str, float]
    champion_scores: Mapping[str, float] = field(default_factory=dict)
    openings: int = 0
    gates: tuple[Verdict, ...] = ()
    forced: bool = False

    @property
    def refused(self) -> bool:
        """Whether a gate kept the challenger from becoming champion."""
        return not self.promoted and not all(gate.passed for gate in self.gates)


def promote(study: str, *, home: str | Path | None = None, force: bool = False, trust: bool = False) -> Promotion:
    """Let the challenger of a study pass the gates, measure it on the test part, and point `champion` at it.

    The gates (see run.gates) look at development images only: the test part measures what was chosen before, and is not
    opened for a challenger that is refused. force=True promotes it nevertheless, and the registry remembers that. Who
    was measured before is not measured again, so nothing is gained by asking twice. trust allows a data function from
    outside the working directory. Raises ModelError where there is no challenger, DataError where the data is not the
    study's.
    """
    from hpo.predict import load_model
    from hpo.storage.optuna_storage import read_study

    place = Home.find(home)
    record = read_study(place, study)
    name = parse_study(record.spec, trust=trust).name
    by_alias = {alias: version for version in versions(place, name) for alias in version.aliases}
    challenger, champion = by_alias.get("challenger"), by_alias.get("champion")
    if challenger is None:
        raise ModelError(f"{name}: there is no challenger.", f"Run the study to its end: hpo run {name}")
    if champion is not None and champion.version == challenger.version:
        known, count = test_scores(champion.scores), len(openings(place, record))
        return Promotion(False, "the challenger is the champion already", challenger, champion, known, known, count)
    new = find_model(place, f"{name}/{challenger.version}", trust=trust)
    old, why = _trained(place, champion, trust=trust)
    model = load_model(challenger.model_uri, home=place)
    gates = tuple(verdicts(place, new, model, champion, old, why))
    failed = [gate for gate in gates if not gate.passed]
    reason = "; ".join(map(str, failed)) or _why(champion, gates)
    before: Mapping[str, float] = test_scores(champion.scores) if champion is not None else {}
    if failed and not force:
        known = test_scores(challenger.scores)
        return Promotion(False, reason, challenger, champion, known, before, len(openings(place, new.study)), gates)
    scores = measure(place, new, purpose="promote").scores
    if old is not None and old.card.digest == new.card.digest:
        with contextlib.suppress(ModelError):  # its files may be gone, which is no reason to keep it
            before = measure(place, old, purpose="promote").scores
    reason = f"forced, although: {reason}" if failed else reason
    record_champion(place, name, challenger.version, why=reason, forced=bool(failed))
    tags = {"hpo.promoted_because": reason}
    challenger = set_alias(place, name, "champion", challenger.version, tags=tags)
    champion = resolve(place, f"{name}/{champion.version}") if champion is not None else None
    count = len(openings(place, new.study))
    return Promotion(True, reason, challenger, champion, scores, before, count, gates, forced=bool(failed))


def _trained(home: Home, champion: ModelVersion | None, *, trust: bool) -> tuple[ModelReference | None, str]:
    """The champion's training; None where there is no champion, or where it cannot be found: why not."""
    if champion is None:
        return None, ""
    try:
        return find_model(home, f"{champion.name}/{champion.version}", trust=trust), ""
    except HpoError as error:
        return None, f"the champion's training is not at hand: {error.message}"


def _why(champion: ModelVersion | None, gates: tuple[Verdict, ...]) -> str:
    return "there was no champion before" if champion is None else gates[0].measured
