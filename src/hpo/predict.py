"""A registered model to class probabilities, for images in memory or in files."""

from __future__ import annotations

import contextlib
import json
import math
import signal
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from hpo.data.image_files import read_picture
from hpo.data.pixels import Ranges, input_kind, kind_of, range_for, to_levels
from hpo.errors import DataError, ModelError, SpecError
from hpo.home import Home
from hpo.spec.load import read_yaml
from hpo.tracking.registry import fetch, resolve
from hpo.tracking.store import load_mlflow

AnyPath = str | Path
REFUSED = "refused"  # in place of a class
_CHUNK_FILES = 256
_LONGEST_LINE = 100_000  # of what another process says before it sends numbers
_LIST = "Take one that a study has registered: hpo models"


@dataclass(frozen=True)
class Classifier:
    """A loaded model. image_shape is (height, width, channels); uri says where it came from.

    ranges are those of the pixels that it was trained on; None for a model that knows none, which takes uint8 levels.
    several_labels: an image may have any number of the classes.
    """

    uri: str
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    _model: Any = field(repr=False)
    ranges: Ranges | None = None
    several_labels: bool = False

    @property
    def input_kind(self) -> str:
        """The dtype of images in the values of the training data: uint8 mostly."""
        return input_kind(self.ranges or {})

    def predict_proba(self, images: np.ndarray) -> np.ndarray:
        """Images (n, height, width, channels) -> probabilities (n, classes) float32, rows summing to 1.

        With several_labels each is that of its own label, and a row need not sum to 1.

        Images are uint8 or of the kind of pixel that the model was trained on, and are scaled as those were. Grey
        images may come as (n, height, width). Raises DataError for another type or shape, and for NaN.
        """
        kind = kind_of(images.dtype)
        limits = range_for(kind, self.ranges or {})
        if images.ndim == 3 and self.image_shape[2] == 1:
            images = images[..., np.newaxis]
        if limits is None or images.ndim != 4 or images.shape[1:] != self.image_shape:
            kinds = " or ".join(dict.fromkeys((self.input_kind, "uint8")))
            raise DataError(
                f"images of type {images.dtype} and shape {images.shape}: {self.uri} takes {kinds} images of shape "
                f"(n, {', '.join(map(str, self.image_shape))}).",
                "Convert them, or give image files to hpo predict, which resizes.",
            )
        if images.dtype.kind == "f" and (lacking := int((~np.isfinite(images)).sum())):
            raise DataError(f"images: {lacking:,} pixel values are NaN or infinite.", "Replace them by numbers.")
        return self.predict_levels(to_levels(images, limits))

    def predict_levels(self, levels: np.ndarray) -> np.ndarray:
        """The same for images that are scaled already, as those of prepared data are: (n, h, w, channels) uint8."""
        from hpo.models.safe_loader import check_answers

        found, classes = np.asarray(self._model.predict(levels)), len(self.class_names)
        try:
            return check_answers(found, images=len(levels), classes=classes, several=self.several_labels)
        except ModelError as error:
            raise ModelError(f"{self.uri}: {error.message}", error.hint) from None

    def predict(self, images: np.ndarray) -> list[str]:
        """Images as for predict_proba -> the name of the most probable class of each; see labels for several."""
        return [self.class_names[row] for row in self.predict_proba(images).argmax(axis=1)]


def load_model(model: AnyPath, *, home: AnyPath | Home | None = None, allow_pickle: bool = False) -> Classifier:
    """Load a model: NAME (champion, else challenger), NAME@ALIAS, NAME/VERSION, models:/..., or a folder with MLmodel.

    home is a project's folder, by default the working directory. A model that hpo has logged is loaded as data: its
    program, class names and image shape. Unless it was trained in this home, its program runs in a process of its own.
    Any other may run code of its maker when it is loaded (pickles, scripts), so it is refused unless allow_pickle is
    True. Raises ModelError where there is no such model or it takes no images.
    """
    if Path(model, "MLmodel").is_file():
        return _load(Path(model), str(model), allow_pickle, own=False)
    if isinstance(model, Path):
        raise ModelError(f"{model}: there is no file MLmodel in it.", "Give a model's folder, or a name: hpo models")
    home = home if isinstance(home, Home) else Home.find(home)
    version = resolve(home, model)
    with contextlib.ExitStack() as files:
        fetched = fetch(home, version, Path(files.enter_context(tempfile.TemporaryDirectory())))
        own = home.embedded and not version.foreign and fetched.resolve().is_relative_to(home.artifacts.resolve())
        loaded = _load(fetched, version.model_uri, allow_pickle, own=own)
        if isinstance(loaded._model, _ProgramElsewhere):  # another process may have to load it again
            weakref.finalize(loaded._model, files.pop_all().close)
        return loaded


def _load(folder: Path, uri: str, allow_pickle: bool, *, own: bool) -> Classifier:
    parts = folder / "artifacts"
    ours = (parts / "net.pt2").is_file() and (parts / "config.json").is_file()
    if allow_pickle:
        return _load_any(folder, uri)
    if not ours:
        flavors = _flavors(folder)
        if not flavors:
            raise ModelError(f"{uri}: not a model of images that loads here: MLmodel names no flavor.", _LIST)
        raise ModelError(
            f"{uri}: a model of MLflow flavor {flavors}, which runs code of its maker when it is loaded.",
            "If you trust its maker: --allow-pickle (in Python: allow_pickle=True). Those of hpo need no such trust.",
        )
    program: Any = None if own else _ProgramElsewhere(parts / "net.pt2")  # it starts while torch is imported here
    from hpo.models.safe_loader import Program, read_config

    config = read_config(parts / "config.json")
    height, width, channels = config["image_shape"]
    # The script next to it, which MLflow would run, is left alone.
    names, several = tuple(config["class_names"]), bool(config.get("several_labels"))
    if program is None:
        program = Program(parts / "net.pt2")
    else:
        program.wait()
    return Classifier(uri, names, (height, width, channels), program, config.get("ranges"), several)


class _ProgramElsewhere:
    """A safe_loader.Program in a process of its own: its crash ends no other, and it draws and prints there."""

    def __init__(self, file: Path) -> None:
        """Begin to load it; wait() ends that."""
        self._file = file
        self._begin()

    def _begin(self) -> None:
        script = Path(__file__).parent / "models" / "safe_loader.py"
        self._process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-I", str(script), str(self._file.absolute())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        # Its input ends with this object, and so does it.
        weakref.finalize(self, _end, self._process)

    def wait(self) -> None:
        """Wait until it is loaded. Raises ModelError as that does."""
        self._answer(rows=0)

    def predict(self, levels: np.ndarray) -> np.ndarray:
        """Levels (n, height, width, channels) uint8 -> what the program answers, float32; n >= 0."""
        if self._process.poll() is not None:  # images before these were too much for it
            self._begin()
            self.wait()
        pipe: Any = self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # its answer, or the lack of one, tells why
            pipe.write(json.dumps(levels.shape).encode() + b"\n")
            pipe.write(np.ascontiguousarray(levels).data)
            pipe.flush()
        return self._answer(rows=len(levels))

    def _answer(self, *, rows: int) -> np.ndarray:
        pipe: Any = self._process.stdout
        line = pipe.readline(_LONGEST_LINE)
        if not line.endswith(b"\n"):
            code = self._process.wait()
            ended = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            raise ModelError(
                f"{self._file}: the program has ended its process: {ended}.",
                "It crashed or took too much memory: do not use it, or give it fewer images and more memory.",
            )
        head = json.loads(line)
        if isinstance(head, dict):
            raise ModelError(*map(str, head["error"]))
        if head[0] != rows:
            raise ModelError(f"{self._file}: {head[0]} answers for {rows} images.", _LIST)
        return np.frombuffer(pipe.read(4 * math.prod(head)), np.float32).reshape(head)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            if pipe is not None:
                pipe.close()
    process.wait()


def _flavors(folder: Path) -> str:
    try:
        flavors = read_yaml(folder / "MLmodel")[0]["flavors"]
        return ", ".join(sorted(map(str, flavors or ())))
    except (SpecError, KeyError, TypeError):
        return ""


def _load_any(folder: Path, uri: str) -> Classifier:
    mlflow = load_mlflow()
    try:
        model = mlflow.pyfunc.load_model(str(folder))
        images = model.metadata.get_input_schema().inputs[0]
        height, width, channels = images.shape[1:]
        names = tuple(model.metadata.get_output_schema().input_names())
    except Exception as error:
        raise ModelError(
            f"{uri}: not a model of images that loads here: {str(error) or type(error).__name__}.", _LIST
        ) from error
    config = model.metadata.metadata or {}
    ranges, several = config.get("ranges"), bool(config.get("several_labels"))
    return Classifier(uri, names, (height, width, channels), _Levels(model), ranges and _pairs(ranges), several)


def _pairs(ranges: Mapping[str, Sequence[float]]) -> Ranges:
    return {kind: (float(low), float(high)) for kind, (low, high) in ranges.items()}


class _Levels:
    """A model of MLflow that takes uint8 levels, whatever its signature says of the values that people give it."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def predict(self, levels: np.ndarray) -> np.ndarray:
        """Levels (n, height, width, channels) uint8 -> probabilities (n, classes)."""
        ours = getattr(self._model, "_model_impl", None)
        script: Any = getattr(ours, "python_model", None)
        if hasattr(script, "predict_levels"):
            return np.asarray(script.predict_levels(levels))
        return np.asarray(self._model.predict(levels))


def read_images(paths: Sequence[AnyPath], shape: tuple[int, int, int], ranges: Ranges | None = None) -> np.ndarray:
    """Image files of any size and mode -> (n, height, width, channels) uint8.

    They are turned upright by their EXIF tag, laid on white where they are transparent, scaled by the range of their
    kind of pixel, made grey (1 channel) or RGB (3) and stretched bilinearly to height and width. ranges are those of
    the model; see read_picture for None. Raises DataError naming the file that is missing or damaged.
    """
    images = np.empty((len(paths), *shape), np.uint8)
    for row, path in enumerate(paths):
        images[row] = _read_image(path, shape, ranges)
    return images


def _read_image(path: AnyPath, shape: tuple[int, int, int], ranges: Ranges | None) -> np.ndarray:
    height, width, channels = shape
    levels = read_picture(Path(path), mode={1: "L", 3: "RGB"}.get(channels), size=(width, height), ranges=ranges)
    if levels.size != height * width * channels:
        raise DataError(f"{path}: not {channels} bands, which the model takes.", "Use predict_proba with an array.")
    return levels.reshape(shape)


def predict_files(
    model: Classifier, paths: Sequence[AnyPath], *, refuse_below: float | None = None
) -> list[dict[str, Any]]:
    """One row per image file: file, class, probability (of that class), probabilities (class name -> probability).

    A file that cannot be read has a row with `error`, which says why, and neither class nor probabilities. Where an
    image may have several labels, labels lists those above 1/2, class shows them as text, and probability is the
    highest. With refuse_below in [0, 1] an image whose highest probability is below it has the class "refused", and
    every row without error says in `refused` whether it was. Raises DataError for that with several labels an image.
    """
    if refuse_below is not None and model.several_labels:
        raise DataError(
            f"{model.uri}: an image may have several labels, so no one probability says how sure the answer is.",
            "Predict without refusing, and judge each label by its own probability.",
        )
    rows = list(_rows(model, paths))
    if refuse_below is not None:
        for row in rows:
            if "error" not in row:
                row["refused"] = row["probability"] < refuse_below
                row["class"] = REFUSED if row["refused"] else row["class"]
    return rows


def _rows(model: Classifier, paths: Sequence[AnyPath]) -> Iterator[dict[str, Any]]:
    for start in range(0, len(paths), _CHUNK_FILES):
        read: dict[int, np.ndarray] = {}
        errors: dict[int, DataError] = {}
        chunk = paths[start : start + _CHUNK_FILES]
        for index, path in enumerate(chunk):
            try:
                read[index] = _read_image(path, model.image_shape, model.ranges)
            except DataError as error:
                errors[index] = error
        found = dict(zip(read, model.predict_levels(np.stack(list(read.values()))), strict=True)) if read else {}
        for index, path in enumerate(chunk):
            if index in errors:
                row: dict[str, Any] = {"file": str(path), "class": None, "probability": None, "probabilities": {}}
                yield {**row, "error": errors[index].message}
                continue
            probabilities = dict(zip(model.class_names, map(float, found[index]), strict=True))
            likeliest = max(probabilities, key=probabilities.__getitem__)
            labels = [name for name, probability in probabilities.items() if probability > 0.5]
            name = (", ".join(labels) or "none") if model.several_labels else likeliest
            yield {
                "file": str(path),
                "class": name,
                "probability": probabilities[likeliest],
                **({"labels": labels} if model.several_labels else {}),
                "probabilities": probabilities,
            }
