"""Write a registered model as files that other programs read, once they answer as it does."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import yaml
from numpy.typing import NDArray

from hpo.errors import HpoError, ModelError
from hpo.home import Home
from hpo.jobs.shared.gates import parity_verdict

if TYPE_CHECKING:
    from hpo.jobs.shared.gates import Verdict
    from hpo.records import ModelVersion

FORMATS = ("onnx", "pt2", "safetensors", "mlflow")
_PATHS = {"setup.json": ("path", "weights"), "MLmodel": ("uri", "model_code_path")}  # keys that hold paths of a machine
_AFTER = "after export"
_MOST = 2_000  # images of a model that was trained on all of them
_DRAWN = 64  # random images, where those of the study are not on this machine


@dataclass(frozen=True)
class ExportedModel:
    """A folder with a model's files. parity compares their answers with the program's, on `images`."""

    model: ModelVersion
    folder: Path
    files: tuple[str, ...]
    parity: Verdict
    images: str


def export_model(
    model: str,
    *,
    form: str = "onnx",
    out: str | Path | None = None,
    home: str | Path | None = None,
    trust: bool = False,
) -> ExportedModel:
    """Write a registered model into a new folder, by default NAME-VERSION-FORMAT in the working directory.

    onnx: model.onnx; pt2: net.pt2, an exported program of torch; safetensors: weights.safetensors with setup.json, from
    which hpo builds the network; mlflow: the folder that MLflow loads. Each but the last comes with config.json: class
    names, image shape, pixel ranges. The files are loaded again and must answer as the program does, on the validation
    images of the study where they are here, else on random ones; otherwise nothing is written. trust allows a network
    of a function from outside the working directory. Raises HpoError.
    """
    from hpo.tracking.registry import fetch, resolve

    if form not in FORMATS:
        raise HpoError(f"--format {form}: is unknown.", f"Choose one of: {', '.join(FORMATS)}.")
    if form == "onnx":
        from hpo.models.onnx_export import check_installed

        check_installed()
    place = Home.find(home)
    version = resolve(place, model)
    target = Path(out) if out is not None else Path(f"{version.name}-{version.version}-{form}")
    if target.exists():
        raise HpoError(f"{target}: exists already.", "Choose another folder: --out FOLDER")
    target.absolute().parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryDirectory(dir=target.absolute().parent) as made:
        fetched = fetch(place, version, Path(scratch))
        parts = fetched / "artifacts"
        if not (parts / "net.pt2").is_file() or not (parts / "config.json").is_file():
            raise ModelError(f"{version.model_uri}: no model that hpo has logged.", "Take one of: hpo models")
        _check_code(parts, version, trust=trust)
        folder = Path(made) / "model"
        folder.mkdir()
        _write(form, fetched, folder)
        images, origin = _images(place, version, parts)
        verdict = _parity(form, folder, parts, images)
        if not verdict.passed:
            raise ModelError(f"{version.model_uri}: as {form} it answers otherwise: {verdict}.", "Take another format.")
        folder.rename(target)
    files = sorted(str(path.relative_to(target)) for path in target.rglob("*") if path.is_file())
    return ExportedModel(version, target, tuple(files), verdict, origin)


def _check_code(parts: Path, version: ModelVersion, *, trust: bool) -> None:
    from hpo.spec.load import read_yaml
    from hpo.spec.own_code import check_stored

    if (parts / "setup.json").is_file():
        check_stored(read_yaml(parts / "setup.json")[0], trust=trust, origin=version.model_uri)


def _write(form: str, fetched: Path, folder: Path) -> None:
    parts = fetched / "artifacts"
    if form == "mlflow":
        shutil.copytree(fetched, folder, dirs_exist_ok=True)
        _without_folders(folder / "MLmodel")
        _without_folders(folder / "artifacts" / "setup.json")
        return
    shutil.copyfile(parts / "config.json", folder / "config.json")
    if form == "pt2":
        shutil.copyfile(parts / "net.pt2", folder / "net.pt2")
    elif form == "onnx":
        from hpo.models.onnx_export import export_onnx

        export_onnx(parts, folder)
    else:
        from hpo.models import save_weights

        shutil.copyfile(parts / "setup.json", folder / "setup.json")
        save_weights(parts, folder)
        _without_folders(folder / "setup.json")


def _without_folders(file: Path) -> None:
    """Reduce the paths of this machine in a file of JSON or YAML to the names of their files."""
    if not file.is_file():
        return
    text, keys = file.read_text(encoding="utf-8"), _PATHS[file.name]
    if file.suffix == ".json":
        text = json.dumps(_named(json.loads(text), keys), indent=1)
    else:
        text = yaml.safe_dump(_named(yaml.safe_load(text), keys), allow_unicode=True, sort_keys=False)
    file.write_text(text, encoding="utf-8")


def _named(tree: Any, keys: tuple[str, ...], key: str = "") -> Any:
    if isinstance(tree, dict):
        return {name: _named(value, keys, name) for name, value in tree.items()}
    if isinstance(tree, list):
        return [_named(each, keys) for each in tree]
    return re.split(r"[/\\]", tree)[-1] if key in keys and isinstance(tree, str) else tree


def _images(home: Home, version: ModelVersion, parts: Path) -> tuple[NDArray[np.uint8], str]:
    """Images to compare answers on (n, height, width, channels), and what they are."""
    from hpo.jobs.shared.model_reference import find_model
    from hpo.models.safe_loader import read_config
    from hpo.tracking.runs import validation_predictions

    try:
        found = find_model(home, f"{version.name}/{version.version}", trust=True)  # none of its code is run
        answers = validation_predictions(home, version.run_id)
        images = np.load(Path(found.card.folder) / "development_images.npy", mmap_mode="r", allow_pickle=False)
        if answers is not None:
            return images[answers["rows"]], f"{len(answers['rows']):,} validation images"
        return images[:_MOST], f"{min(len(images), _MOST):,} training images"  # it was trained on all there are
    except (HpoError, OSError, ValueError):  # of another home, or its data are elsewhere
        shape = read_config(parts / "config.json")["image_shape"]
        drawn = np.random.default_rng(0).integers(0, 256, (_DRAWN, *shape), dtype=np.uint8)
        return drawn, f"{_DRAWN} random images, for those of its study are not here"


def _parity(form: str, folder: Path, parts: Path, images: NDArray[np.uint8]) -> Verdict:
    from hpo.models.safe_loader import Program, read_config

    theirs = Program(parts / "net.pt2").predict(images)
    program: Any
    if form == "onnx":
        from hpo.models.onnx_export import MODEL, OnnxProgram

        program = OnnxProgram(folder / MODEL)
    elif form == "safetensors":
        from hpo.models import TrainedNet

        program = TrainedNet(folder)
    else:
        program = Program(folder / ("artifacts/net.pt2" if form == "mlflow" else "net.pt2"))
    several = bool(read_config(parts / "config.json").get("several_labels"))
    return parity_verdict(
        program.predict(images), theirs, kind="float32", several=several, origin="as in the program", after=_AFTER
    )
