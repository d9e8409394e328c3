"""A data set or a study's is explored by name, without torch; a logged model is explained by name."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.errors import DataError, ModelError, SpecError
from hpo.jobs.data_report import explore, write_page
from hpo.jobs.explain import explain

runner = CliRunner()


@pytest.fixture(scope="module", autouse=True)
def data_folder(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_DATA", str(tmp_path_factory.mktemp("data")))
        yield


def test_a_data_set_is_shown_as_published_and_a_study_s_as_it_splits() -> None:
    published, _ = explore("digits")
    assert list(published.counts) == ["train", "test"]
    own, pictures = explore("digits-mlp", images=3)
    assert list(own.counts) == ["train", "valid", "test"]
    assert sum(own.totals.values()) == sum(published.totals.values()) == 1797
    assert own.data.digest == published.data.digest
    assert set(pictures) == set(own.pictured)
    assert len(own.pictured) == 30
    assert all(png.startswith(b"\x89PNG") for png in pictures.values())


def test_a_file_of_one_s_own_takes_the_place_of_the_published_one(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (30, 28, 28, 3), dtype=np.uint8)
    labels = np.arange(30) % 8
    np.savez(tmp_path / "x.npz", **{f"{part}_images": images for part in ("train", "val", "test")},
             **{f"{part}_labels": labels for part in ("train", "val", "test")})  # fmt: skip
    for name in ("bloodmnist", "bloodmnist-mlp"):
        facts, _ = explore(name, path=tmp_path / "x.npz")
        assert facts.totals == {"train": 30, "valid": 30, "test": 30}
        assert facts.shared == {"train and valid": 30, "train and test": 30, "valid and test": 30}


def test_what_is_neither_data_set_nor_study_is_told_with_the_closest() -> None:
    with pytest.raises(DataError, match="neither a data set nor a study named 'digitz'") as caught:
        explore("digitz")
    assert "digits" in caught.value.hint
    with pytest.raises(DataError, match="npz needs the place of your images"):
        explore("npz")
    with pytest.raises(SpecError, match="no such file"):
        explore("nothing.yaml")


def test_the_command_prints_numbers_and_writes_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = runner.invoke(app, ["data", "show", "digits"])
    assert result.exit_code == 0, result.output
    assert result.output.splitlines()[-1] == "mlruns/reports/data-digits.html"
    assert "1,438" in result.output
    assert "</html>" in (tmp_path / "mlruns" / "reports" / "data-digits.html").read_text()
    result = runner.invoke(app, ["data", "show", "digits-mlp", "--json", "--out", "pages/x.html"])
    told = json.loads(result.output)
    assert sum(told["counts"]["test"]) == 359
    assert set(told["copies"]) == {"train", "valid", "test"}
    assert (tmp_path / "pages" / "x.html").is_file()
    result = runner.invoke(app, ["data", "show", "digits", "--json"])
    assert (result.exit_code, len(list(tmp_path.rglob("*.html")))) == (0, 2)


def test_looking_at_data_needs_no_torch() -> None:
    code = "import sys; from hpo.jobs.data_report import explore; explore('digits'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_page_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    from hpo.errors import HpoError

    with pytest.raises(HpoError, match="cannot be written"):
        write_page(*explore("digits", images=0), tmp_path)


# Explanations


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A convolutional network of the digits, as a study logs it."""
    import torch

    from hpo.data.prepare import open_trial, prepare
    from hpo.models import build_model, export_program, save_trained
    from hpo.spec.models import CnnSpec
    from hpo.spec.study import DataSpec, Setup, SplitSpec
    from hpo.spec.training import TrainingSpec
    from hpo.tracking.models import save_model

    split = SplitSpec(kind="holdout")
    model = CnnSpec(kind="cnn", filters=4)
    setup = Setup(data=DataSpec(name="digits"), split=split, model=model, training=TrainingSpec())
    data = open_trial(prepare(setup.data, split), split, device=torch.device("cpu"))
    folder = tmp_path_factory.mktemp("logged")
    net = build_model(model, image_shape=(8, 8, 1), classes=10, seed=0)
    save_trained(net, setup, data, folder)
    export_program(folder)
    save_model(folder / "model", folder, model_id="m-0", run_id="0", tags={})
    return folder / "model"


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    made = [tmp_path / "a" / "one.png", tmp_path / "b" / "one.png", tmp_path / "two.jpg"]
    for number, path in enumerate(made):
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (20, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return made


def test_each_image_gets_a_picture_and_the_probabilities_that_predict_tells(logged, files, tmp_path) -> None:
    from hpo.predict import load_model, predict_files

    rows = explain(logged, files, folder=tmp_path / "out")
    assert [Path(row.picture).name for row in rows] == ["one.png", "one-2.png", "two.png"]
    for row, expected in zip(rows, predict_files(load_model(logged), files), strict=True):
        assert (row.predicted, row.explained, row.file) == (expected["class"], expected["class"], expected["file"])
        assert row.probability == pytest.approx(expected["probability"], abs=1e-5)
        assert row.methods == ("gradient", "integrated", "gradcam")
        with Image.open(row.picture) as picture:
            assert picture.width > 3 * picture.height


def test_method_and_class_are_the_user_s_choice(logged, files, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    command = ["explain", str(logged), str(files[0]), "--method", "gradcam", "--class", "7", "--out", "out", "--json"]
    result = runner.invoke(app, command)
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.output)
    assert (row["explained"], row["methods"], row["picture"]) == ("7", ["gradcam"], "out/one.png")
    result = runner.invoke(app, [*command[:3], "--class", "seven"])
    assert result.exit_code == 2
    assert "the model has no class 'seven'" in result.output


def test_a_model_or_an_image_that_is_missing_is_told(logged, files, tmp_path, monkeypatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ModelError, match="no registered model named 'nothing'"):
        explain("nothing", files, folder=tmp_path, home=tmp_path)
    with pytest.raises(DataError, match=r"gone\.png: not an image"):
        explain(logged, [tmp_path / "gone.png"], folder=tmp_path)
    (tmp_path / "MLmodel").write_text("")
    with pytest.raises(ModelError, match="not a model that a study has logged"):
        explain(tmp_path, files, folder=tmp_path)
