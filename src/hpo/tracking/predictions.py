"""What a trial said of its validation images, as its run keeps it."""

from __future__ import annotations

import tempfile
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hpo.home import Home
from hpo.tracking.runs import artifact
from hpo.tracking.store import connect, told


@told
def validation_answers(home: Home, run_id: str) -> dict[str, NDArray[Any]] | None:
    """rows (n,) of the development images, labels (n,), probabilities (n, classes); None where the run has none."""
    from mlflow.exceptions import MlflowException

    with tempfile.TemporaryDirectory() as folder:
        try:
            file = artifact(connect(home), run_id, "report/validation.npz", folder) if run_id else None
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None
        if file is None:
            return None
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
