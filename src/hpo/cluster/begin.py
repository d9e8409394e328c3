"""Begin a study on a shared storage, for workers to join: its data checked, its record written, nothing trained."""

from __future__ import annotations

import contextlib
from pathlib import Path

from hpo.errors import StoreError
from hpo.execute.base_model import with_model
from hpo.execute.finals import check_final
from hpo.execute.process import process_context
from hpo.execute.run_study import await_job, interruptible, refuse_new, with_options
from hpo.execute.supervisor import Watch
from hpo.execute.workers.job_process import Helper, Prepared, prepare
from hpo.home import Home
from hpo.records import Notice, StudyOpened
from hpo.search.stages import budget_of
from hpo.spec.study import StudySpec
from hpo.tracking.store import knock
from hpo.tracking.tracker import Tracker


def shared_home(home: str | Path | None = None) -> Home:
    """The home, whose studies are on a server. Raises StoreError where they are in a file of this machine."""
    place = Home.find(home)
    if not place.shared:
        raise StoreError(
            f"{place.root}: its studies are in a file, which workers on other machines cannot share.",
            "Name a PostgreSQL server, in the environment variable HPO_STORAGE or in hpo.toml.",
        )
    return place


def begin_study(
    spec: StudySpec,
    *,
    trials: int | None = None,
    home: str | Path | None = None,
    fresh: bool = False,
    retry_failed: bool = False,
    keep_models: str | None = None,
    precision: str | None = None,
    watch: Watch | None = None,
) -> StudyOpened:
    """Write the study into the shared storage, or find it there, so that `hpo worker` can join it; train nothing.

    The images are prepared and checked here, and their digest is written down. The options are those of run_study. The
    answer says how the study stands, with no workers; it is not told to watch, which gets notices only. Raises
    HpoError.
    """
    place = shared_home(home).create()
    knock(place)
    spec = with_model(with_options(spec, trials=trials, keep_models=keep_models, precision=precision), place)
    say: Watch = watch or (lambda _: None)
    with contextlib.ExitStack() as cleanup:
        interrupted = cleanup.enter_context(interruptible())
        helper = Helper(process_context())
        cleanup.callback(helper.close)
        job = helper.submit(prepare, spec.data, spec.split, "cpu")  # the machine that begins it may have no GPU
        from hpo.search.open import open_study  # optuna's import goes on beside the preparation

        prepared: Prepared = await_job(job, helper, say, interrupted)
        refuse_new(place, spec, prepared.data, fresh=fresh)
        check_final(spec, prepared.data)
        budget = budget_of(spec, trials)
        study = open_study(
            place,
            spec,
            data_digest=prepared.data.digest,
            class_names=prepared.data.class_names,
            budget=budget,
            fresh=fresh,
        )
        spec = study.spec
        cleanup.callback(study.close)
        for note in study.notes:
            say(Notice(note))
        if retry_failed:
            study.retry_failed()
        before = study.result()
        # Many workers that start at once shall find what each of them would have to make.
        Tracker(place).open_study(before, spec, prepared.data, prepared.split)
    finished = sum(trial.state.finished for trial in before.counted)
    return StudyOpened(before, prepared.data, prepared.split, budget, finished, workers=0, device="")
