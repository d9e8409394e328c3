"""What a model is given later is bit for bit what it was trained on: files, arrays, logged models, saliency."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from blobs import as_set, deep_png, prepared_images, tiff
from hpo.data.prepare import prepare
from hpo.execute.workers.task import Task, train_task
from hpo.models import SETUP, export_program
from hpo.predict import load_model, predict_files, read_images
from hpo.spec.load import load_study
from hpo.spec.study import DataSpec, SplitSpec
from hpo.tracking.models import save_model

HOLDOUT = SplitSpec(kind="holdout")


def eight_bit(mode):
    def write(generator, path, exif, size):
        values = generator.integers(0, 256, (*size, 4), dtype=np.uint8)
        image = Image.fromarray(values, "RGBA")
        image = image.convert("RGB").convert(mode) if mode not in ("RGBA", "LA", "PA") else image.convert(mode)
        image.save(path, "PNG", exif=exif)

    return write


def jpeg(mode):
    def write(generator, path, exif, size):
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).convert(mode)
        image.save(path, "JPEG", exif=exif)

    return write


def other(form):
    def write(generator, path, exif, size):
        image = Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8))
        image.save(path, form, **({"exif": exif} if form in ("TIFF", "WEBP") else {}))

    return write


def fractions(low, high, dtype):
    def write(generator, path, _exif, size):
        tiff(generator.uniform(low, high, size).astype(dtype), path)

    return write


def deep(bits, channels):
    def write(generator, path, _exif, size):
        deep_png(generator.integers(0, 1 << bits, (*size, channels)).squeeze(), path)

    return write


def sixteen_bit_with_exif(generator, path, exif, size):
    Image.fromarray(generator.integers(0, 4096, size).astype(np.uint16)).save(path, "PNG", exif=exif)


WRITERS = {
    **{f"png {mode}": eight_bit(mode) for mode in ("1", "L", "P", "RGB", "RGBA", "LA")},
    **{f"jpeg {mode}": jpeg(mode) for mode in ("L", "RGB", "CMYK")},
    **{form: other(form) for form in ("BMP", "GIF", "TIFF", "WEBP", "PPM")},
    "f4": fractions(0, 1, "f4"),
    "f8": fractions(-1000, 3000, "f8"),
    "f2": fractions(0, 1, "f2"),
    "i2": fractions(-1024, 3071, "i2"),
    **{f"{bits} bits x {channels}": deep(bits, channels) for bits in (10, 12, 16) for channels in (1, 3)},
    "12 bits with opacity": deep(12, 4),
    "12 bits turned": sixteen_bit_with_exif,
}
LAYOUTS = ("{label}/{n}", "{label}/more/{n}", "train/{label}/{n}", "train/{label}.{n}")


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    names=st.lists(st.sampled_from(sorted(WRITERS)), min_size=1, max_size=3),
    orientation=st.integers(1, 8),
    ending=st.sampled_from([".png", ".JPG", ".jfif", "", ".dat"]),
    layout=st.sampled_from(LAYOUTS),
    size=st.sampled_from([None, 5, 12]),
    seed=st.integers(0, 2**31),
)
def test_files_are_read_for_prediction_bit_for_bit_as_for_training(
    names, orientation, ending, layout, size, seed, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("same")
    generator = np.random.default_rng(seed)
    exif = Image.Exif()
    exif[0x0112] = orientation
    side = (9, 9) if size is None else (9, 7)
    if layout.endswith(".{n}") and not ending:
        ending = ".png"
    for number in range(12):
        path = folder / "photos" / (layout.format(label="ab"[number % 2], n=number) + ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[names[number // 2 % len(names)]](generator, path, exif, side)
    data = DataSpec(name="folder", path=str(folder / "photos"), size=size)
    card = prepare(data, SplitSpec(kind="holdout", share=0.3, test_share=0.3), cache=folder / "cache")
    assert card.files == {"seen": 12, "used": 12}
    files = [path for path in (folder / "photos").rglob("*") if path.is_file()]
    assert as_set(read_images(files, card.image_shape, card.ranges)) == as_set(prepared_images(card))


def slow(*names):
    return [pytest.param(name, marks=pytest.mark.slow) for name in names]


ARRAYS = {
    "float32": lambda generator: generator.random((60, 8, 8), dtype=np.float32),
    "float64": lambda generator: generator.normal(0, 500, (60, 8, 8, 3)),
    "int16": lambda generator: generator.integers(-1024, 3072, (60, 8, 8, 1)).astype(np.int16),
    "uint16": lambda generator: generator.integers(0, 4096, (60, 8, 8, 2)).astype(np.uint16),
    "uint8": lambda generator: generator.integers(0, 256, (60, 8, 8, 3), dtype=np.uint8),
}


def train(card, tmp_path, **overrides):
    """A small network that was trained on a card's data, logged as MLflow has it; returns its folder."""
    spec = load_study("digits-mlp", overrides={"training.epochs": 1, "training.precision": "float32", **overrides})
    left = tmp_path / "left"
    training = train_task(Task(0, spec.setup, 7, card.sealed, str(left)), "cpu")
    message = next(training)
    while not hasattr(message, "result"):
        message = training.send(True)
    assert message.result.state == "complete", message.result.reason
    export_program(left)
    assert (left / SETUP).is_file()
    save_model(tmp_path / "model", left, model_id="m-0", run_id="0", tags={})
    return tmp_path / "model"


@pytest.mark.parametrize("kind", ["float32", *slow("float64", "int16", "uint16", "uint8")])
def test_a_logged_model_takes_arrays_in_the_values_of_its_training_data(tmp_path, kind):
    import mlflow

    images = ARRAYS[kind](np.random.default_rng(0))
    np.savez(tmp_path / "own.npz", train_images=images, train_labels=np.arange(60) % 3)
    data = DataSpec(name="npz", path=str(tmp_path / "own.npz"))
    card = prepare(data, HOLDOUT, cache=tmp_path / "cache")
    folder = train(card, tmp_path, **{"data.name": "npz", "data.path": data.path, "split.kind": "holdout"})
    model, logged = load_model(folder), mlflow.pyfunc.load_model(str(folder))
    assert model.ranges == card.ranges
    whole = images if images.ndim == 4 else images[..., None]
    signature = logged.metadata.get_input_schema().inputs[0]
    assert (signature.type.name, signature.shape) == (kind, (-1, *card.image_shape))
    ours, theirs = model.predict_proba(images), np.asarray(logged.predict(whole))
    np.testing.assert_array_equal(ours, theirs.astype(np.float32))
    prepared = {image.tobytes(): p for image, p in zip(*_levels(card, model), strict=True)}
    from hpo.data.pixels import to_levels

    levels = to_levels(whole, card.ranges[kind])
    np.testing.assert_array_equal(ours, np.stack([prepared[image.tobytes()] for image in levels]))
    trusted = load_model(folder, allow_pickle=True)
    assert trusted.ranges == card.ranges
    np.testing.assert_array_equal(trusted.predict_proba(images), ours)
    np.testing.assert_array_equal(trusted.predict_levels(levels), ours)


def _levels(card, model):
    images = prepared_images(card)
    return images, model.predict_levels(images)


@pytest.mark.parametrize("name", ["f4", *slow("i2", "12 bits x 1", "12 bits x 3")])
def test_predict_and_explain_see_files_as_training_did(tmp_path, name):
    from hpo.jobs.explain import explain

    generator = np.random.default_rng(0)
    for number in range(40):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.img"
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[name](generator, path, Image.Exif(), (8, 8))
    data = DataSpec(name="folder", path=str(tmp_path / "photos"))
    card = prepare(data, HOLDOUT, cache=tmp_path / "cache")
    folder = train(card, tmp_path, **{"data.name": "folder", "data.path": data.path, "split.kind": "holdout"})
    model = load_model(folder)
    images, probabilities = _levels(card, model)
    known = {image.tobytes(): p for image, p in zip(images, probabilities, strict=True)}
    files = sorted((tmp_path / "photos").rglob("*.img"))
    wanted = [known[image.tobytes()] for image in read_images(files, card.image_shape, card.ranges)]
    rows = predict_files(model, files)
    np.testing.assert_array_equal([list(row["probabilities"].values()) for row in rows], np.stack(wanted))
    explained = explain(folder, files[:3], folder=tmp_path / "why", methods=["gradient"], home=tmp_path)
    for row, right in zip(explained, wanted, strict=False):
        assert abs(row.probability - right.max()) < 1e-6
    assert Path(explained[0].picture).is_file()
