"""Studies that other programs ran with Optuna, read from where Optuna keeps them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna

from hpo.errors import SpecError, shown_address

_JOURNALS = (".log", ".journal")


def foreign_trials(study: str, storage: str) -> list[Mapping[str, Any]]:
    """The parameters of a study's complete trials, best first; of several objectives, those that none beats.

    storage is the path of an SQLite file or of an Optuna journal, or an address. It is not changed. Raises SpecError.
    """
    is_file = "://" not in storage
    if is_file and not Path(storage).is_file():
        raise SpecError(f"search.start_from.storage: {storage}: no such file.", "Correct the path.")
    try:
        found = optuna.load_study(study_name=study, storage=_storage(storage))
        if len(found.directions) > 1:
            return [trial.params for trial in found.best_trials]
        trials = found.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
        sign = 1.0 if found.direction == optuna.study.StudyDirection.MINIMIZE else -1.0
        return [trial.params for trial in sorted(trials, key=lambda trial: (sign * trial.value, trial.number))]
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        place = storage if is_file else shown_address(storage)
        raise SpecError(
            f"search.start_from: study {study!r} of {place} cannot be read: {reason}.",
            "Correct study and storage. Its names: optuna studies --storage ADDRESS",
        ) from error


def _storage(storage: str) -> Any:
    if "://" in storage:
        return storage
    if Path(storage).suffix in _JOURNALS:
        return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(storage))
    address = f"sqlite:///file:{quote(str(Path(storage).absolute()))}?mode=ro&uri=true"
    return optuna.storages.RDBStorage(address, skip_table_creation=True)
