"""The study files at hand and the places in them, by name: what the shell completes, so it imports no pydantic."""

from __future__ import annotations

import difflib
from pathlib import Path

from hpo.errors import SpecError

SHIPPED = (
    Path(__file__).parents[1] / "_studies",  # in a wheel
    Path(__file__).parents[3] / "studies",  # in a checkout
)
PLACES = Path(__file__).with_name("places.txt")  # docs/make_reference.py writes it from the schema


def study_files() -> dict[str, Path]:
    """Name -> file of every study at hand: `studies/` of the working directory first, then those that ship."""
    found: dict[str, Path] = {}
    for folder in (Path.cwd() / "studies", *SHIPPED):
        if folder.is_dir():
            for path in sorted([*folder.glob("*.yaml"), *folder.glob("*.yml")]):
                found.setdefault(path.stem, path)
    return found


def find_study(study: str | Path) -> Path:
    """The file of a study given by name, or by a path that ends in .yaml or .yml. Raises SpecError."""
    text = str(study)
    if text.endswith((".yaml", ".yml")):
        path = Path(text).expanduser()
        if not path.is_file():
            raise SpecError(f"{text}: no such file.", "Check the path, or list the studies that ship: hpo studies")
        return path
    found = study_files()
    if text not in found:
        close = difflib.get_close_matches(text, found, n=1)
        hint = f"Did you mean {close[0]}?" if close else "List what there is: hpo studies."
        raise SpecError(
            f"there is no study named {text!r}.", f"{hint} A file of your own: give its path, ending in .yaml"
        )
    return found[text]


def places() -> list[str]:
    """Every place of a study file as a dotted path, in alphabetical order; what is below a list has no index."""
    return PLACES.read_text(encoding="utf-8").split()


def similar_key(keys: tuple[str, ...]) -> str | None:
    """The key that an unknown one, at the end of the path to it, was probably meant to be."""
    above = ".".join(key for key in keys[:-1] if not key.isdigit())
    siblings = [place.rpartition(".")[2] for place in places() if place.rpartition(".")[0] == above]
    return next(iter(difflib.get_close_matches(keys[-1], siblings, n=1)), None)
