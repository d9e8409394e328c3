"""Fetch logged models that networks of a study start from, to a folder where workers find them."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from functools import partial
from pathlib import Path

from hpo.data.cache import models_folder
from hpo.errors import ModelError
from hpo.home import Home
from hpo.spec.load import read_yaml, small_text
from hpo.spec.models import TransferSpec
from hpo.spec.own_code import check_stored
from hpo.spec.study import StudySpec


def check_setup(file: Path, *, trust: bool = False) -> None:
    """Refuse a logged model whose network is a function from outside the working directory. Raises SpecError.

    An ensemble has the setups of its members in the config.json next to it. A model without a setup names no function;
    a damaged setup is reported when it is read.
    """
    with contextlib.suppress(OSError, ValueError, RecursionError):
        setups = [json.loads(small_text(file))]
        config = json.loads((file.with_name("config.json")).read_text(encoding="utf-8"))
        setups += [member["setup"] for member in config.get("members", ())]
        for setup in filter(lambda setup: isinstance(setup, dict), setups):
            check_stored(setup, trust=trust, origin=str(file))


def with_model(spec: StudySpec, home: Home, *, trust: bool = False) -> StudySpec:
    """The spec with each model that it starts or learns from replaced by its id of now; their files are fetched.

    A study records the id, so that an alias that has moved makes another study. trust as in check_setup. Raises
    ModelError, and SpecError as check_setup does.
    """
    fetched = partial(_fetched, home, trust=trust)
    if isinstance(spec.model, TransferSpec):
        uri = fetched(spec.model.from_model, "model.from_model")
        spec = spec.model_copy(update={"model": spec.model.model_copy(update={"from_model": uri})})
    if spec.training.teacher is not None:
        uri = fetched(spec.training.teacher, "training.teacher")
        spec = spec.model_copy(update={"training": spec.training.model_copy(update={"teacher": uri})})
    if spec.final is not None and spec.final.teacher is not None:
        uri = fetched(spec.final.teacher, "final.teacher")
        spec = spec.model_copy(update={"final": spec.final.model_copy(update={"teacher": uri})})
    return spec


def _fetched(home: Home, name: str, place: str, *, trust: bool) -> str:
    """models:/m-<id> of a model that the study names at this place; its files are in models_folder() then."""
    from hpo.tracking.registry import fetch, resolve

    version = resolve(home, name)
    models_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models_folder(), prefix=".making-") as scratch:
        fetched = fetch(home, version, Path(scratch))
        model_id = str(read_yaml(fetched / "MLmodel")[0].get("model_id"))
        if not re.fullmatch(r"m-[0-9a-f]+", model_id):  # it becomes the name of a folder
            raise ModelError(f"{fetched / 'MLmodel'}: model_id {model_id!r} is not one of MLflow's.", "Log it again.")
        folder = models_folder() / model_id
        if not (fetched / "artifacts" / "setup.json").is_file():
            raise ModelError(
                f"{place}: {name} was logged by an earlier version of hpo.",
                f"Run its study again: hpo run {version.study} --fresh",
            )
        check_setup(fetched / "artifacts" / "setup.json", trust=trust)
        if not folder.is_dir():
            shutil.copytree(fetched / "artifacts", Path(scratch) / "whole")
            with contextlib.suppress(OSError):  # another process was faster
                (Path(scratch) / "whole").rename(folder)
    return f"models:/{folder.name}"
