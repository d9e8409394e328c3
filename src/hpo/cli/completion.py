"""What the shell completes: studies, models, places of a study file and devices. It imports nothing slow."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any


def complete_study(incomplete: str) -> list[str]:
    """Names of studies that begin with the text."""
    from hpo.spec.files import study_files

    return [name for name in study_files() if name.startswith(incomplete)]


def complete_model(ctx: Any, incomplete: str) -> list[str]:
    """Names of registered models, and NAME@ALIAS and NAME/VERSION once the name is there."""
    home = ctx.params.get("home") or os.environ.get("HPO_HOME") or "."
    file = Path(home).expanduser() / "mlruns" / "mlflow.db"
    try:
        # With plain SQL: MLflow takes seconds to import. A server is not asked: it may take long to answer.
        with closing(sqlite3.connect(f"{file.absolute().as_uri()}?mode=ro", uri=True)) as database:
            names = [name for (name,) in database.execute("SELECT name FROM registered_models ORDER BY name")]
            ends = database.execute(
                "SELECT name || '@' || alias FROM registered_model_aliases"
                " UNION ALL SELECT name || '/' || version FROM model_versions"
            )
            found = names if not {"@", "/"} & set(incomplete) else [end for (end,) in ends]
    except sqlite3.Error:
        return []
    return [name for name in found if name.startswith(incomplete)]


def complete_models(ctx: Any, incomplete: str) -> list[str]:
    """Registered models, and studies, whose winner is meant."""
    return list(dict.fromkeys([*complete_model(ctx, incomplete), *complete_study(incomplete)]))


def complete_setting(incomplete: str) -> list[str]:
    """Places of a study file that begin with the text, each with its = sign; below a list there is none."""
    from hpo.spec.files import places

    lists = ("references.", "search.objectives.", "search.space.", "search.stages.", "model.backbones.")
    found = [place for place in places() if place.startswith(incomplete) and not place.startswith(lists)]
    inner = {place.rpartition(".")[0] for place in found}
    return [f"{place}=" for place in found if place not in inner]


def complete_device(incomplete: str) -> list[str]:
    """The devices that --device takes; the GPUs by their files, as asking CUDA takes seconds."""
    gpus = [f"cuda:{index}" for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]
    return [name for name in ("auto", "cpu", "cuda", *gpus, "mps") if name.startswith(incomplete)]
