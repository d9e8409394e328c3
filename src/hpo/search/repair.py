"""A study as it was left, in hand for repairs: by its own record, not by a file that may have changed since."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpo.errors import StoreError
from hpo.home import Home
from hpo.locks import lock
from hpo.search.open import lease_of
from hpo.search.study import Study
from hpo.spec.load import parse_study
from hpo.storage.errors import store_errors
from hpo.storage.lease import clean_leases
from hpo.storage.optuna_storage import open_storage
from hpo.storage.reader import STOP


@contextmanager
def attended(home: Home, title: str) -> Iterator[Study]:
    """The handle on one generation of a study, newest or not. Raises StoreError, or SpecError for another version's."""
    storage = open_storage(home)
    try:
        with store_errors(home):
            record = storage.studies()[title][1]
        study = Study(home, parse_study(record["spec"], trust=True), storage, title, lease_of(home, title))
    except BaseException:
        storage.close()
        raise
    try:
        yield study
    finally:
        study.close()


def reap(home: Home, title: str) -> list[int]:
    """Settle the trials of dead supervisors of a study; see Study.reap. Takes half a minute on a shared storage."""
    with attended(home, title) as study:
        study.listen()
        return study.reap()


def ask_to_stop(home: Home, title: str, token: str) -> None:
    """Have every supervisor that now has the study open stop; token is any text that was not used before."""
    storage = open_storage(home)
    try:
        with store_errors(home):
            known = storage.studies()
            if title not in known:
                raise StoreError(f"no study {title!r} has run here.", "List them: hpo status")
            storage.set_study_user_attr(known[title][0], STOP, token)
    finally:
        storage.close()


def drop_locks(home: Home, titles: set[str]) -> None:
    """Remove leases that nobody holds, and the locks of studies with these titles, which are no more."""
    with lock(home, "studies"):
        clean_leases(home.locks)
        for title in titles:
            (home.locks / f"{title}.ask.lock").unlink(missing_ok=True)
