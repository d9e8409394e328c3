"""The ledger of the sealed test set: every opening is written down, on disk first, then on the study's run."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from hpo.home import Home
from hpo.records import ModelVersion, StudyResult
from hpo.track.runs import find_parent, user
from hpo.track.store import connect, exists, lock, told

_TAG = "hpo.test_opening."


@dataclass(frozen=True)
class Opening:
    """One look at the test set: when (ISO 8601, UTC), who, for which version of which study's model, what it showed."""

    when: str
    who: str
    study: str
    created: float
    model: str
    version: int
    trial: int
    scores: Mapping[str, float]


@told
def record_opening(
    home: Home, study: StudyResult, *, model: ModelVersion, scores: Mapping[str, float] | None = None
) -> Opening:
    """Add an opening to `mlruns/openings.jsonl` and, as a tag, to the study's run. Raises StoreError."""
    opening = Opening(
        when=datetime.now(UTC).isoformat(timespec="microseconds"),
        who=user(),
        study=study.title,
        created=study.created,
        model=model.name,
        version=model.version,
        trial=model.trial,
        scores=dict(scores or {}),
    )
    line = json.dumps(asdict(opening))
    with lock(home, "openings"), (home.root / "openings.jsonl").open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())
    client = connect(home)
    parent = find_parent(client, study)
    if parent is not None:
        # One tag an opening, so that two supervisors cannot overwrite each other's.
        client.set_tag(parent.info.run_id, _TAG + "".join(filter(str.isdigit, opening.when[:26])), line)
    return opening


@told
def openings(home: Home, study: StudyResult) -> list[Opening]:
    """The openings of a study's generation, oldest first, from this folder and, with a server, from elsewhere."""
    path = home.root / "openings.jsonl"
    lines = set(path.read_text(encoding="utf-8").splitlines()) if path.is_file() else set()
    if exists(home):
        parent = find_parent(connect(home), study)
        lines |= {value for name, value in parent.data.tags.items() if name.startswith(_TAG)} if parent else set()
    found = [Opening(**json.loads(line)) for line in lines if line]
    mine = [opening for opening in found if (opening.study, opening.created) == (study.title, study.created)]
    return sorted(mine, key=lambda opening: opening.when)
