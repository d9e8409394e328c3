"""The champions of a model over time, and what becomes its challenger."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from hpo.database import reading
from hpo.home import Home
from hpo.records import ENSEMBLE, FINAL, StudyResult, Trial
from hpo.tracking.registry import versions
from hpo.tracking.runs import user
from hpo.tracking.store import connect, is_server, pages, translate_errors

CHAMPION = "hpo.champion."  # tags of a registered model, one for each change of its champion
_TERM = re.compile(
    r"version (?P<version>[0-9]+) since (?P<since>\S+) by (?P<who>.*?)(?P<forced>, forced)?: (?P<why>.*)", re.DOTALL
)


@dataclass(frozen=True)
class ChampionTerm:
    """The time of a version as champion. since and until are ISO 8601 in UTC; until is None for the champion of today.

    why is the reason of its promotion and who the user that promoted it. forced: it was promoted against a gate.
    """

    version: int
    since: str
    why: str
    who: str
    forced: bool = False
    until: str | None = None


@translate_errors
def record_champion(home: Home, name: str, version: int, *, why: str, forced: bool = False) -> ChampionTerm:
    """Record that a version becomes champion now. Call it before the alias moves, so that no change goes unrecorded."""
    since = datetime.now(UTC).isoformat(timespec="microseconds")
    term = ChampionTerm(version, since, why[:2000], user(), forced)
    tag = CHAMPION + "".join(filter(str.isdigit, since[:26]))
    connect(home).set_registered_model_tag(name, tag, _term_text(term))
    return term


@translate_errors
def champions(home: Home, name: str) -> list[ChampionTerm]:
    """The champions of a model, oldest first. A version recorded twice in a row is one term."""
    tags = _model_tags(home, name)
    return _merge_repeats([_read_term(tags[tag]) for tag in sorted(tags) if tag.startswith(CHAMPION)])


def _term_text(term: ChampionTerm) -> str:
    """The beginning of a term as the text of a tag, which people read in the registry."""
    forced = ", forced" if term.forced else ""
    return f"version {term.version} since {term.since} by {term.who}{forced}: {term.why}"


def _read_term(text: str) -> ChampionTerm:
    """The term of a tag; earlier versions wrote it as JSON. Raises ValueError."""
    if text.startswith("{"):
        return ChampionTerm(**json.loads(text))
    match = _TERM.fullmatch(text)
    if match is None:
        raise ValueError(f"not the record of a champion: {text!r}")
    return ChampionTerm(int(match["version"]), match["since"], match["why"], match["who"], bool(match["forced"]))


def _model_tags(home: Home, name: str) -> dict[str, str]:
    """The tags of a registered model; none where there is no such model."""
    if is_server(home.tracking_uri):
        found = pages(connect(home).search_registered_models, filter_string=f"name = '{name}'")
        return {tag: text for model in found for tag, text in model.tags.items()}
    with reading(home.tracking_uri) as reader:
        if reader is None or "registered_model_tags" not in reader.tables():
            return {}
        return dict(reader.rows("SELECT key, value FROM registered_model_tags WHERE name = :name", name=name))


def renumber_champions(tags: Mapping[str, str], numbers: Mapping[int, int]) -> dict[str, str]:
    """The tags of a registered model with the versions of its champions renumbered; 0: a version that is gone."""
    kept = all(before == now for before, now in numbers.items())

    def renumbered(text: str) -> str:
        term = _read_term(text)
        number = numbers.get(term.version, term.version if kept else 0)
        return text if number == term.version else _term_text(replace(term, version=number))

    return {name: renumbered(text) if name.startswith(CHAMPION) else text for name, text in tags.items()}


def _merge_repeats(changes: Sequence[ChampionTerm]) -> list[ChampionTerm]:
    terms: list[ChampionTerm] = []
    for change in changes:
        if terms and terms[-1].version == change.version:
            continue
        if terms:
            terms[-1] = replace(terms[-1], until=change.since)
        terms.append(change)
    return terms


def ensemble_stays(home: Home, study: StudyResult, number: int) -> bool:
    """Whether the challenger, else the champion, is an ensemble of this study that a trial does not replace."""
    trials = {trial.number: trial for trial in study.trials}
    by_alias = {alias: each for each in versions(home, study.name) for alias in each.aliases}
    now = by_alias.get("challenger", by_alias.get("champion"))
    if now is None or (now.study, now.origin) != (study.title, "") or not {number, now.trial} <= trials.keys():
        return False
    return outlasts(study, trials[now.trial], trials[number])


def outlasts(study: StudyResult, ensemble: Trial, trial: Trial) -> bool:
    """Whether an ensemble stays the model of its study beside this trial.

    It was made knowing all trials before it. A newer one of the search must be better; a newer final training was asked
    for, perhaps to learn from the ensemble, and is the model.
    """
    if ensemble.candidate.stage != ENSEMBLE or trial.candidate.stage == ENSEMBLE:
        return False
    newer, values = trial.number > ensemble.number, (trial.value, ensemble.value)
    if None in values or not newer or trial.candidate.stage == FINAL:
        return not newer
    sign = 1.0 if study.direction == "maximize" else -1.0
    return sign * (trial.value or 0.0) <= sign * (ensemble.value or 0.0)
