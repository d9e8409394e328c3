"""Take part in a study that was begun elsewhere: one more supervisor on the shared storage, with devices of its own."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpo.execute.run_study import run_study
from hpo.execute.supervisor import Watch
from hpo.home import Home
from hpo.records import Notice, StudyResult
from hpo.spec.load import override_study
from hpo.storage.reader import list_trials


def join_study(
    study: str,
    *,
    overrides: Iterable[str] = (),
    trust: bool = False,
    home: str | Path | None = None,
    watch: Watch | None = None,
    **options: Any,
) -> StudyResult:
    """Train trials of a study until its budget is spent; Ctrl-C, SIGTERM and kills lose nothing.

    study is its name, for its newest generation, or a title such as name~2; what it is comes from the storage, and data
    must be the same images. overrides are texts such as `data.path=/scratch/images.npz`, for what differs from machine
    to machine; whatever changes the trials is refused. options are those of run_study that concern this machine:
    workers, stack, device, timeout. Raises HpoError.
    """
    place = Home.find(home)
    found = list_trials(place, study)
    spec = override_study(found.spec, overrides, trust=trust)
    if place.shared and place.embedded and watch is not None:
        watch(
            Notice("MLflow is not shared: runs and models of this worker stay in this folder. Set MLFLOW_TRACKING_URI.")
        )
    return run_study(spec, home=home, join=found.title, watch=watch, **options)
