"""Repair a study from outside a run: by its stored record, not by a study file that may have changed since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpo.errors import StoreError
from hpo.home import Home
from hpo.locks import lock
from hpo.search.lifecycle import new_lease
from hpo.search.study import Study
from hpo.spec.load import parse_study
from hpo.storage.liveness import clean_leases
from hpo.storage.optuna_storage import open_storage
from hpo.storage.retry import store_errors
from hpo.storage.trial_attrs import STOP


@contextmanager
def opened(home: Home, title: str) -> Iterator[Study]:
    """The handle of one generation of a study, in the block. Raises StoreError, or SpecError for another version's."""
    storage = open_storage(home)
    try:
        with store_errors(home):
            record = storage.studies()[title][1]
        study = Study(home, parse_study(record["spec"], trust=True), storage, title, new_lease(home, title))
    except BaseException:
        storage.close()
        raise
    try:
        yield study
    finally:
        study.close()


def reap(home: Home, title: str) -> list[int]:
    """Finish the trials of dead supervisors of a study, see Study.reap. Takes half a minute on a shared storage."""
    with opened(home, title) as study:
        study.listen()
        return study.reap()


def ask_to_stop(home: Home, title: str, token: str) -> None:
    """Ask every supervisor that has the study open now to stop; token is any text that was not used before."""
    storage = open_storage(home)
    try:
        with store_errors(home):
            studies = storage.studies()
            if title not in studies:
                raise StoreError(f"no study {title!r} has run here.", "List them: hpo status")
            storage.database.set_study_user_attr(studies[title][0], STOP, token)
    finally:
        storage.close()


def drop_locks(home: Home, titles: set[str]) -> None:
    """Remove leases that no process holds, and the locks of the studies with these titles, which were deleted."""
    with lock(home, "studies"):
        clean_leases(home.locks)
        for title in titles:
            (home.locks / f"{title}.ask.lock").unlink(missing_ok=True)
