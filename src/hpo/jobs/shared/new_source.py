"""Where a study of images of the user's own may be written, and what --set says of them."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from hpo.data.survey import kind_of
from hpo.errors import HpoError, SpecError
from hpo.spec.load import load_study, split_override


def refuse_among_images(source: Path, *, file: Path, home: Path | None = None, command: str = "new") -> None:
    """Refuse a study file, or a home's mlruns, inside a folder of images: it would be taken for a class.

    command is what `hpo` does with the source. Raises HpoError.
    """
    folder, here = source.expanduser().resolve(), Path.cwd().resolve()
    if not folder.is_dir():
        return
    for words, place, option in (("the study file", file, "--out FILE"), ("hpo's records", home, "--home DIR")):
        if place is None or not place.expanduser().resolve().is_relative_to(folder):
            continue
        outside = shlex.quote(os.path.relpath(folder.parent, here))
        from_outside = f"Run it from outside: cd {outside} && hpo {command} {shlex.quote(folder.name)}"
        hint = from_outside if here.is_relative_to(folder) else f"Choose a place outside of it: {option}"
        raise HpoError(f"{place}: {words} would be among the images of {folder}.", hint)


def data_settings(settings: Iterable[str]) -> list[str]:
    """Those of the texts of --set that are about the data: data.size=64."""
    return [text for text in settings if split_override(text)[0].split(".")[0] == "data"]


def refuse_other_settings(settings: Iterable[str], source: Path) -> None:
    """Refuse --set of anything but the data, which `hpo new` decides. Raises SpecError."""
    texts = list(settings)
    if other := [text for text in texts if text not in data_settings(texts)]:
        raise SpecError(
            f"--set {other[0]}: hpo new takes settings of data only, such as data.size=64.",
            f"Change the file that it writes, or: hpo run {shlex.quote(str(source))} --set {shlex.quote(other[0])}",
        )


def given_data(source: Path, settings: Iterable[str]) -> dict[str, Any]:
    """Name and path of the data, and what the texts of --set say of them; null where that is said. Raises HpoError."""
    texts = data_settings(settings)
    known = {"name": kind_of(source), "path": str(source)}
    if not texts:
        return known
    # A study around the data: its faults are reported as those of every other study.
    search = {"trials": 1, "space": {"training.optimizer.lr": {"float": [0.001, 0.1]}}}
    around = {"name": "new", "data": known, "model": {"kind": "mlp"}, "search": search}
    given = load_study(around, overrides=texts).data.model_dump(mode="json", exclude_unset=True)
    for key, value in known.items():
        if given[key] != value:
            raise SpecError(
                f"--set data.{key}={given[key]}: the images are those of {source}.",
                "Name the folder or file itself in place of it: hpo run PATH",
            )
    return given
