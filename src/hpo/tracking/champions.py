"""Who was champion of a model, from when to when, why and by whose hand: tags on the registered model, one a change."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import Any

from hpo.home import Home
from hpo.tracking.runs import user
from hpo.tracking.store import connect, exists, told

_TAG = "hpo.champion."


@dataclass(frozen=True)
class Reign:
    """A version's time as champion: since and until in ISO 8601, UTC (until None: it still is), why, by whom.

    forced says that it was made champion though a gate refused it.
    """

    version: int
    since: str
    why: str
    who: str
    forced: bool = False
    until: str | None = None


@told
def record_champion(home: Home, name: str, version: int, *, why: str, forced: bool = False) -> Reign:
    """Write down that a version becomes champion now. It comes before the alias moves: a change is never untold."""
    since = datetime.now(UTC).isoformat(timespec="microseconds")
    reign = Reign(version, since, why[:2000], user(), forced)
    tag = _TAG + "".join(filter(str.isdigit, since[:26]))
    connect(home).set_registered_model_tag(name, tag, json.dumps(asdict(reign)))
    return reign


@told
def champions(home: Home, name: str) -> list[Reign]:
    """The champions of a model, the first one first; a version recorded twice in a row is one reign."""
    from mlflow.exceptions import MlflowException

    if not exists(home):
        return []
    try:
        tags: dict[str, Any] = connect(home).get_registered_model(name).tags
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return []
    changes = [Reign(**json.loads(tags[tag])) for tag in sorted(tags) if tag.startswith(_TAG)]
    return _joined(changes)


def rewritten(tags: Mapping[str, str], numbers: Mapping[int, int]) -> dict[str, str]:
    """A registered model's tags with the versions of its champions renumbered; 0: one that is no more."""
    kept = all(before == now for before, now in numbers.items())

    def renumbered(text: str) -> str:
        reign = json.loads(text)
        number = reign["version"]
        return json.dumps({**reign, "version": numbers.get(number, number if kept else 0)})

    return {name: renumbered(text) if name.startswith(_TAG) else text for name, text in tags.items()}


def _joined(changes: Sequence[Reign]) -> list[Reign]:
    reigns: list[Reign] = []
    for change in changes:
        if reigns and reigns[-1].version == change.version:
            continue
        if reigns:
            reigns[-1] = replace(reigns[-1], until=change.since)
        reigns.append(change)
    return reigns
