"""Run a study from Python: with images, a network and callbacks that are objects of the caller."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from hpo.api.inputs import data_place
from hpo.api.own_model import model_place
from hpo.api.progress import ProgressBar, in_notebook
from hpo.api.study import Study
from hpo.events import Event
from hpo.execute.run_study import run_study as run
from hpo.home import Home
from hpo.options import RunOptions
from hpo.spec.load import load_study
from hpo.spec.study import StudySpec


def run_study(
    study: StudySpec | Mapping[str, Any] | str | Path,
    options: RunOptions | None = None,
    *,
    data: Any = None,
    model: Callable[..., Any] | None = None,
    callbacks: Iterable[Callable[[Event], object]] = (),
    progress: bool = True,
    join: str = "",
    watch: Callable[[Event], object] | None = None,
    **named: Any,
) -> Study:
    """Run or resume a study until it has `trials` trials in all, and register its best model as challenger.

    study is a spec, the content of a study file as a mapping, a study's name or the path of its file. data replaces the
    study's: images and labels, a torch Dataset, or a mapping of parts (see hpo.api.inputs). model replaces the
    study's network: a function or class that builds an nn.Module from image_shape, classes and the options of the
    study (see hpo.api.own_model). named are fields of RunOptions, such as trials=20 and workers=2; they may be given
    instead of options, or replace some of them. callbacks and watch are called with every event of hpo.events, in
    order, in this process. progress shows a bar in notebooks. For join see hpo.execute.run_study.

    Ctrl-C ends the run cleanly: running trials are recorded as stopped, and the next run tries them again. Raises
    HpoError for whatever the user can fix.
    """
    options = replace(options or RunOptions(), **named)
    home = Home.find(options.home)
    spec = _spec(study, data, model, home, trust=options.trust)
    bar = [ProgressBar()] if progress and in_notebook() else []
    listeners: list[Callable[[Event], object]] = [*([watch] if watch is not None else []), *callbacks, *bar]

    def tell(event: Event) -> None:
        for listener in listeners:
            listener(event)

    return Study.of(run(spec, options, join=join, watch=tell if listeners else None), home)


def _spec(study: Any, data: Any, model: Any, home: Home, *, trust: bool) -> StudySpec:
    if data is None and model is None:
        return study if isinstance(study, StudySpec) else load_study(study, trust=trust)
    if isinstance(study, Mapping):
        tree = dict(study)
    else:
        spec = study if isinstance(study, StudySpec) else load_study(study, trust=trust)
        # Only what was given: a monitor that follows the objective is not given.
        tree = spec.model_dump(mode="json", exclude_unset=True)
    name = str(tree.get("name", "study"))
    if data is not None:
        place, has_validation = data_place(data, folder=home.root / "inputs", name=name)
        tree["data"] = {**{key: value for key, value in (tree.get("data") or {}).items() if key != "size"}, **place}
        if not has_validation:
            tree.setdefault("split", {"kind": "holdout"})
    if model is not None:
        tree["model"] = model_place(model, tree.get("model") or {}, name=name)
    return load_study(tree, trust=trust)
