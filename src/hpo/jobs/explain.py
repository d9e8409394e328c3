"""Draw the saliency maps of a registered model for image files."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hpo.errors import HpoError, ModelError
from hpo.execute.base_model import check_setup
from hpo.home import Home

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AnyPath = str | Path


@dataclass(frozen=True)
class Explained:
    """One image file: its most probable class, the class that was explained, their probabilities, and the figure.

    views is over how many views of the image the model averages: probabilities are of their mean, the maps explain the
    network on the image as it is.
    """

    file: str
    predicted: str
    probability: float
    explained: str
    explained_probability: float
    methods: tuple[str, ...]
    picture: str
    views: int = 1


def explain(
    model: AnyPath,
    paths: Sequence[AnyPath],
    *,
    folder: AnyPath,
    methods: Sequence[str] = (),
    class_name: str | None = None,
    home: AnyPath | Home | None = None,
    trust: bool = False,
    scaled: bool = False,
) -> list[Explained]:
    """Draw one PNG for each image file into folder: the image, a map for each method, class probabilities.

    model is as in predict.load_model. methods are of gradient, integrated and gradcam; none means all that suit the
    network. class_name None explains each image's most probable class. trust allows a network that is a function from
    outside the working directory. scaled: the files hold images as they were prepared. Raises ModelError, DataError
    for a file that is no image, and HpoError where folder cannot be written.
    """
    from hpo.models.safe_loader import read_config
    from hpo.models.saliency import explain_images
    from hpo.predict import read_images
    from hpo.report.figures.images import saliency_figure

    with _parts(model, home, trust=trust) as parts:
        config = read_config(parts / "config.json")
        names = config["class_names"]
        target = None if class_name is None else _label(class_name, names)
        images = read_images(paths, tuple(config["image_shape"]), None if scaled else config.get("ranges"))
        explanations = explain_images(parts, images, methods=methods, target=target)
    rows = []
    for path, picture, found in zip(paths, _pictures(paths, Path(folder)), explanations, strict=True):
        best = max(range(len(names)), key=found.probabilities.__getitem__)
        title = f"{Path(path).name}: why {names[found.target]}?"
        if found.views > 1:
            title += f" (maps: the image as it is; probabilities: mean of {found.views} views)"
        figure = saliency_figure(found.image, found.maps, found.probabilities, names, target=found.target, title=title)
        _save(figure, picture)
        rows.append(
            Explained(
                file=str(path),
                predicted=names[best],
                probability=found.probabilities[best],
                explained=names[found.target],
                explained_probability=found.probabilities[found.target],
                methods=tuple(found.maps),
                picture=str(picture),
                views=found.views,
            )
        )
    return rows


def _save(figure: Figure, picture: Path) -> None:
    try:
        picture.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(picture)
    except OSError as error:
        raise HpoError(
            f"{picture}: cannot be written: {error.strerror}.", "Choose another folder: --out FOLDER"
        ) from None


@contextmanager
def _parts(model: AnyPath, home: AnyPath | Home | None, *, trust: bool) -> Iterator[Path]:
    """The folder of a logged model with program, config and setup, whose functions may be imported."""
    from hpo.tracking.registry import fetch, resolve

    with tempfile.TemporaryDirectory() as scratch:
        if Path(model, "MLmodel").is_file():
            place = Path(model)
        else:
            found = home if isinstance(home, Home) else Home.find(home)
            place = fetch(found, resolve(found, str(model)), Path(scratch))
        if not (place / "artifacts" / "config.json").is_file():
            raise ModelError(f"{model}: not a model that a study has logged.", "List the models: hpo models")
        check_setup(place / "artifacts" / "setup.json", trust=trust)
        yield place / "artifacts"


def _label(name: str, names: Sequence[str]) -> int:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise ModelError(f"--class: the model has no class {name!r}.", f"{hint}Classes: {', '.join(names)}.")
    return names.index(name)


def _pictures(paths: Sequence[AnyPath], folder: Path) -> list[Path]:
    """A PNG for each file, named after it; files with the same name in several folders are numbered."""
    seen: dict[str, int] = {}
    pictures = []
    for path in paths:
        stem = Path(path).stem
        seen[stem] = seen.get(stem, 0) + 1
        pictures.append(folder / (f"{stem}.png" if seen[stem] == 1 else f"{stem}-{seen[stem]}.png"))
    return pictures
