"""Studies that other programs ran with Optuna, read from where Optuna keeps them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna

from hpo.database import sqlite_file
from hpo.errors import SpecError, shown_address

_JOURNALS = (".log", ".journal")


def foreign_trials(study: str, storage: str) -> list[Mapping[str, Any]]:
    """The parameters of a study's complete trials, best first; of several objectives, those that none beats.

    Trials that violate a constraint are left out. storage is the path of an SQLite file or of an Optuna journal, or an
    address. It is not changed. Raises SpecError.
    """
    is_journal = "://" not in storage and Path(storage).suffix in _JOURNALS
    storage = str(sqlite_file(re.sub(r"^sqlite\+\w+:", "sqlite:", storage)) or storage)  # SQLite would create it
    is_file = "://" not in storage
    if is_file and not Path(storage).is_file():
        raise SpecError(f"search.start_from.storage: {storage}: no such file.", "Correct the path.")
    try:
        found = optuna.load_study(study_name=study, storage=_storage(storage, is_journal=is_journal))
        if len(found.directions) > 1:
            return [trial.params for trial in found.best_trials]
        trials = found.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        sign = 1.0 if found.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        trials = [trial for trial in trials if not any(amount > 0 for amount in trial.constraints.values())]
        return [trial.params for trial in sorted(trials, key=lambda trial: (sign * trial.value, trial.number))]
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        place = storage if is_file else shown_address(storage)
        raise SpecError(
            f"search.start_from: study {study!r} of {place} cannot be read: {reason}.",
            "Correct study and storage. Its names: optuna studies --storage ADDRESS",
        ) from error


def _storage(storage: str, *, is_journal: bool) -> Any:
    if "://" in storage:
        return optuna.storages.RDBStorage(storage, skip_table_creation=True)
    if is_journal:
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    address = f"sqlite:///file:{quote(str(Path(storage).absolute()))}?mode=ro&uri=true"
    return optuna.storages.RDBStorage(address, skip_table_creation=True)
