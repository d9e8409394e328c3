"""Open a study to run it: a new one, or its newest generation, with a lease of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from hpo.home import Home
from hpo.search.lifecycle import enter_study
from hpo.search.study import Study
from hpo.spec.content import content_of
from hpo.spec.study import StudySpec
from hpo.storage import outbox
from hpo.storage.errors import store_errors
from hpo.storage.lease import Lease, clean_leases
from hpo.storage.optuna_storage import open_storage


def lease_of(home: Home, title: str) -> Lease:
    """A new lease of a supervisor of this study."""
    return Lease(home.locks, shared=home.shared, title=title)


def open_study(
    home: Home,
    spec: StudySpec,
    *,
    data_digest: str,
    budget: int | None = None,
    fresh: bool = False,
    join: str = "",
    class_names: Sequence[str] = (),
) -> Study:
    """Start a study, or go on with its newest generation; fresh starts a new generation.

    budget is written into its record. join is the title of a study that is there, to take part in it as it is: its
    record is left, whatever its generation. data_digest is that of the images the trials will see, class_names are the
    data set's. Raises SpecError where the spec, the data, code or weights differ from what the study's trials were run
    with (space, sampler, pruner and budget may change, options of a choice may not), or where it cannot be searched,
    and StoreError where the storage refuses.
    """
    storage = open_storage(home)
    try:
        outbox.keep_reserve(home)
        enter = partial(
            enter_study,
            storage,
            spec,
            data_digest=data_digest,
            budget=budget,
            fresh=fresh,
            join=join,
            content={**content_of(spec), "class_names": list(class_names)},
        )
        with store_errors(home):
            title, notes, spec = storage.at_once(enter, lock="studies")
            clean_leases(home.locks)
            return Study(home, spec, storage, title, lease_of(home, title), notes)
    except BaseException:
        storage.close()
        raise
