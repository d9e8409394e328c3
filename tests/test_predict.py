from __future__ import annotations

import csv
import json
import shutil
import signal
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from hpo.cli.output import predictions_csv
from hpo.errors import DataError, ModelError
from hpo.predict import Classifier, load_model, predict_files, read_images

SHAPE = (8, 8, 3)
COLOURS = ("red", "green", "blue")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Classifier:
    """A classifier that names the colour of an image."""
    import torch

    from hpo.tracking.models import save_model

    class Colour(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return (images.float().mean((1, 2)) / 16.0).softmax(1)

    folder = tmp_path_factory.mktemp("model")
    example = (torch.zeros((2, *SHAPE), dtype=torch.uint8),)
    shapes = ({0: torch.export.Dim("images")},)
    torch.export.save(torch.export.export(Colour(), example, dynamic_shapes=shapes), folder / "net.pt2")
    (folder / "config.json").write_text(json.dumps({"class_names": COLOURS, "image_shape": SHAPE}))
    (folder / "setup.json").write_text("{}")
    save_model(folder / "model", folder, model_id="m-0", run_id="0", tags={})
    return load_model(folder / "model")


def flat(colour: object, mode: str = "RGB", size: tuple[int, int] = (20, 12)) -> Image.Image:
    return Image.new(mode, size, colour)


def test_a_classifier_gives_probabilities_and_names(model: Classifier) -> None:
    images = np.zeros((3, *SHAPE), np.uint8)
    images[range(3), :, :, range(3)] = 255
    probabilities = model.predict_proba(images)
    assert (probabilities.dtype, probabilities.shape) == (np.float32, (3, 3))
    np.testing.assert_allclose(probabilities.sum(1), 1.0, atol=1e-6)
    assert model.predict(images) == list(COLOURS) == list(model.class_names)
    assert model.image_shape == SHAPE
    assert model.predict(images[:0]) == []


@pytest.mark.parametrize(
    "images", [np.zeros((1, 8, 8, 3)), np.zeros((1, 9, 8, 3), np.uint8), np.zeros((1, 8, 8), np.uint8)]
)
def test_images_of_another_kind_are_refused(model: Classifier, images: np.ndarray) -> None:
    with pytest.raises(DataError, match=r"takes uint8 images of shape \(n, 8, 8, 3\)"):
        model.predict_proba(images)


@pytest.mark.parametrize(
    ("name", "image"),
    [
        ("rgb.png", flat((250, 0, 0))),
        ("rgb.jpg", flat((250, 0, 0))),
        ("rgb.bmp", flat((250, 0, 0), size=(1, 300))),
        ("cmyk.jpg", flat((5, 250, 250, 0), "CMYK")),
        ("palette.gif", flat((250, 0, 0)).convert("P")),
        ("opaque.webp", flat((250, 0, 0, 255), "RGBA")),
    ],
)
def test_any_size_and_mode_of_file_is_read(model: Classifier, tmp_path: Path, name: str, image: Image.Image) -> None:
    image.save(tmp_path / name)
    (row,) = predict_files(model, [tmp_path / name])
    assert (row["file"], row["class"]) == (str(tmp_path / name), "red")
    assert row["probability"] == row["probabilities"]["red"] > 0.9
    assert list(row["probabilities"]) == list(COLOURS)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("transparent.png", flat((9, 9, 9, 0), "RGBA"), 255),  # white shows through
        ("grey_alpha.png", flat((9, 0), "LA"), 255),
        ("half.png", flat((0, 0, 0, 128), "RGBA"), 127),
        ("bilevel.png", flat(1, "1"), 255),
        ("deep.png", Image.fromarray(np.full((9, 9), 25700, np.uint16)), 100),  # 16 bits are scaled, not cut
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_transparency_and_depth_come_out_right(
    tmp_path: Path, name: str, image: Image.Image, expected: int, channels: int
) -> None:
    image.save(tmp_path / name)
    read = read_images([tmp_path / name], (4, 6, channels))
    assert (read.shape, read.dtype) == ((1, 4, 6, channels), np.uint8)
    assert set(read.ravel()) == {expected}


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 3), np.uint8)
    pixels[:4] = 255  # white above, once turned by 180 degrees below
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
    (read,) = read_images([tmp_path / "photo.png"], SHAPE)
    assert (read[:4].max(), read[4:].min()) == (0, 255)


def test_height_and_width_are_not_mixed_up(tmp_path: Path) -> None:
    pixels = np.zeros((10, 20, 3), np.uint8)
    pixels[:, 10:] = 255
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    (read,) = read_images([tmp_path / "wide.png"], (5, 10, 3))
    assert (read[:, :4].max(), read[:, 6:].min()) == (0, 255)


def test_a_program_in_postscript_is_no_image_whatever_its_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, started = tmp_path / "picture.png", []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_, **__: started.append(True))
    Image.new("RGB", (8, 8)).save(path, "EPS")
    with Image.open(path) as opened, suppress(OSError, AttributeError, AssertionError):
        opened.load()
    assert started.pop(), "Pillow by itself starts Ghostscript"
    with pytest.raises(DataError, match=r"picture\.png: not an image that can be read"):
        read_images([path], SHAPE)
    assert not started


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "cut", "folder"])
def test_a_file_that_is_no_image_is_named(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "picture.png"
    rng = np.random.default_rng(0)
    if damage == "folder":
        path.mkdir()
    elif damage == "cut":
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:3000])
    elif damage != "missing":
        path.write_text("" if damage == "empty" else "no picture")
    with pytest.raises(DataError, match=r"picture\.png: not an image that can be read: \S"):
        read_images([path], SHAPE)


def test_many_files_are_read_in_their_order(model: Classifier, tmp_path: Path) -> None:
    paths = []
    for number, colour in enumerate(["#ff0000", "#00ff00", "#0000ff"] * 100):
        paths.append(tmp_path / f"{number}.png")
        flat(colour, size=(4, 4)).save(paths[-1])
    rows = predict_files(model, paths)
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    assert [row["class"] for row in rows] == list(COLOURS) * 100


def test_a_file_that_cannot_be_read_has_a_row_with_its_error_and_the_others_are_answered(
    model: Classifier, tmp_path: Path
) -> None:
    height, width, _ = model.image_shape
    generator = np.random.default_rng(0)
    for name in "ab":
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    paths = [tmp_path / name for name in ("a.png", "broken.png", "gone.png", "b.png")]
    rows = predict_files(model, paths)
    assert [row["file"] for row in rows] == [str(path) for path in paths]
    assert ["error" in row for row in rows] == [False, True, True, False]
    assert "broken.png: not an image" in rows[1]["error"]
    alone = [predict_files(model, [path])[0] for path in (paths[0], paths[3])]
    assert [rows[0]["class"], rows[3]["class"]] == [row["class"] for row in alone]
    assert rows[1]["class"] is None
    columns, *lines = predictions_csv(rows).splitlines()
    assert columns.endswith(",error")
    assert lines[1].startswith(f"{paths[1]},,,")
    assert len(list(csv.reader(predictions_csv(rows).splitlines()))[1]) == len(columns.split(","))
    assert predictions_csv([rows[0]]).splitlines()[0] == columns.removesuffix(",error")


def test_a_folder_that_is_no_model_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no file MLmodel"):
        load_model(tmp_path)
    (tmp_path / "MLmodel").write_text("flavors: {}")
    with pytest.raises(ModelError, match="not a model of images that loads here"):
        load_model(tmp_path)


def test_an_unknown_name_is_told_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match="no registered model named 'nothing'"):
        load_model("nothing", home=tmp_path)


def test_a_model_that_unpickles_is_refused_unless_it_is_asked_for(tmp_path: Path) -> None:
    import mlflow
    from sklearn.linear_model import LogisticRegression

    fitted = LogisticRegression().fit(np.arange(8.0).reshape(4, 2), [0, 1, 0, 1])
    mlflow.sklearn.save_model(fitted, tmp_path / "model", serialization_format="pickle", pip_requirements=[])
    with pytest.raises(ModelError, match=r"runs code of its maker when it is loaded.*--allow-pickle"):
        load_model(tmp_path / "model")
    with pytest.raises(ModelError, match="not a model of images"):
        load_model(tmp_path / "model", allow_pickle=True)


def test_a_python_model_with_code_is_refused_and_not_imported(tmp_path: Path) -> None:
    import mlflow

    (tmp_path / "code.py").write_text(
        f"import mlflow\nopen({str(tmp_path / 'trap')!r}, 'a').write('x')\n"
        "class M(mlflow.pyfunc.PythonModel):\n    def predict(self, model_input): return model_input\n"
        "mlflow.models.set_model(M())\n"
    )
    mlflow.pyfunc.save_model(tmp_path / "model", python_model=str(tmp_path / "code.py"), pip_requirements=[])
    (tmp_path / "trap").unlink()
    with pytest.raises(ModelError, match=r"python_function.*--allow-pickle"):
        load_model(tmp_path / "model")
    assert not (tmp_path / "trap").exists()


def test_the_script_inside_a_model_of_hpo_is_not_run(model: Classifier, tmp_path: Path) -> None:
    copy = shutil.copytree(model.uri, tmp_path / "model")
    (copy / "logged_model_script.py").write_text("raise SystemExit('it was run')")
    images = np.zeros((1, *SHAPE), np.uint8)
    np.testing.assert_array_equal(load_model(copy).predict_proba(images), model.predict_proba(images))


def test_a_program_of_others_runs_elsewhere_and_its_death_is_an_error_once(
    model: Classifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.zeros((2, *SHAPE), np.uint8)
    again = load_model(model.uri)
    with pytest.raises(ModelError, match="fails for images of shape"):
        again._model.predict(images[:, :3])
    np.testing.assert_array_equal(again.predict_proba(images), model.predict_proba(images))  # it still answers
    again._model._process.send_signal(signal.SIGSEGV)
    with monkeypatch.context() as patch:
        patch.setattr(again._model._process, "poll", lambda: None)  # it dies over this question, not before it
        with pytest.raises(ModelError, match=r"has ended its process: signal SIGSEGV\."):
            again.predict_proba(images)
    np.testing.assert_array_equal(again.predict_proba(images), model.predict_proba(images))  # by another process


def test_a_model_of_a_server_is_loaded_again_too_and_leaves_nothing(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders: list[Path] = []

    def fetched(home: object, version: object, folder: Path) -> Path:
        folders.append(folder)
        return Path(shutil.copytree(model.uri, folder / "model"))

    monkeypatch.setattr("hpo.predict.fetch", fetched)
    monkeypatch.setattr("hpo.predict.resolve", lambda *_: SimpleNamespace(foreign=True, model_uri="models:/x/1"))
    images = np.zeros((2, *SHAPE), np.uint8)
    again = load_model("x", home=tmp_path)
    again._model._process.kill()
    again._model._process.wait()
    np.testing.assert_array_equal(again.predict_proba(images), model.predict_proba(images))
    del again
    assert not folders[0].exists()


def test_a_program_that_is_refused_is_told_from_its_process(model: Classifier, tmp_path: Path) -> None:
    copy = shutil.copytree(model.uri, tmp_path / "model")
    (copy / "artifacts" / "net.pt2").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"net\.pt2: the exported program cannot be read"):
        load_model(copy)


def test_an_mlmodel_that_would_unfold_without_end_is_read_in_no_time(tmp_path: Path) -> None:
    levels = "".join(f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]\n" for level in range(1, 12))
    (tmp_path / "MLmodel").write_text(f"a0: &a0 [x]\n{levels}flavors: [*a11]\n")
    with pytest.raises(ModelError, match="MLmodel names no flavor"):
        load_model(tmp_path)


def test_answers_of_a_model_that_are_no_probabilities_are_refused(model: Classifier) -> None:
    class Logits:
        def predict(self, levels: np.ndarray) -> np.ndarray:
            return np.full((len(levels), 3), 7.0, np.float32)

    wrong = replace(model, _model=Logits())
    with pytest.raises(ModelError, match=r"model: the answers lie 6 outside 0 to 1"):
        wrong.predict_proba(np.zeros((2, *SHAPE), np.uint8))
