"""The temperature and the views of a kept model are the same for the store, the gates, the report and predictions."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.execute.run_study import run_study
from hpo.home import Home
from hpo.jobs.promote import promote
from hpo.jobs.report import write_report
from hpo.jobs.shared.model_reference import find_model
from hpo.predict import load_model, predict_files
from hpo.spec.load import load_study
from hpo.tracking.runs import validation_predictions

# Less sure than it could be, by smoothed labels.
SETTINGS = {
    "training.precision": "float32",
    "training.patience": None,
    "training.epochs": 12,
    "training.optimizer.lr": 0.01,
    "training.label_smoothing": 0.3,
    "training.augment.crop": 1,
    "search.pruner": "none",
    "search.space": {"model.filters": {"choice": [24]}},
    "search.sampler": "random",
    "predict.views": "auto",
    "split.share": 0.4,
    "keep.figures": "none",
}


@pytest.fixture(scope="module")
def home(digits_cache: Path, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("project")
    shutil.copytree(digits_cache, folder / "data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_DATA", str(folder / "data"))
        patch.setenv("OMP_NUM_THREADS", "1")
        for name in ("MLFLOW_TRACKING_URI", "HPO_STORAGE", "HPO_HOME"):
            patch.delenv(name, raising=False)
        run_study(load_study("digits-cnn", overrides=SETTINGS), trials=1, workers=0, home=folder)
        yield Home.find(folder)


@pytest.fixture(scope="module")
def decided(home: Home) -> dict:
    (file,) = home.artifacts.glob("*/*/artifacts/report/answers.json")
    return json.loads(file.read_text())


def test_what_was_decided_is_in_the_model_and_its_run(home, decided):
    model = load_model("digits-cnn@challenger", home=home)
    (config,) = [json.loads(file.read_text()) for file in home.artifacts.glob("*/models/**/config.json")]
    assert (config.get("temperature") is not None) == decided["calibration"]["used"]
    assert ("views" in config) == decided["views"]["used"]
    assert decided["views"]["latency_ms"]["plain"] > 0
    reference = find_model(home, "digits-cnn/1")
    stored = validation_predictions(home, reference.kept("they are compared").run_id)
    images = np.load(Path(reference.card.folder) / "development_images.npy")[stored["rows"]]
    np.testing.assert_allclose(model.predict_levels(images), stored["probabilities"], atol=1e-5)
    if not decided["views"]["used"]:
        assert (stored["raw"].argmax(1) == stored["probabilities"].argmax(1)).all()


def test_a_temperature_lowers_the_calibration_error_of_a_network_of_smoothed_labels(decided):
    assert decided["calibration"]["used"]
    without, with_one = decided["calibration"]["error"]
    assert with_one < without


def test_the_report_says_what_was_decided(home, decided, tmp_path):
    page = write_report("digits-cnn", home=home.root.parent, out=tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h2>How sure it is</h2>" in re.sub(r"<h2[^>]*>", "<h2>", page)
    assert f"a temperature of {decided['calibration']['temperature']:.3f} is part of the model" in page
    assert "accuracy against coverage" in page
    assert "Views: " in page


def test_unsure_images_are_refused(home, tmp_path):
    model = load_model("digits-cnn@challenger", home=home)
    images = np.random.default_rng(0).integers(0, 256, (20, 8, 8), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(20)]
    for file, image in zip(files, images, strict=True):
        Image.fromarray(image).save(file)
    plain = predict_files(model, files)
    limit = float(np.median([row["probability"] for row in plain]))
    rows = predict_files(model, files, refuse_below=limit)
    for before, row in zip(plain, rows, strict=True):
        assert row["refused"] == (before["probability"] < limit)
        assert row["class"] == ("refused" if row["refused"] else before["class"])
        assert row["probabilities"] == before["probabilities"]
    assert 0 < sum(row["refused"] for row in rows) < 20
    asked = [
        "predict",
        "--format",
        "csv",
        "digits-cnn@challenger",
        *map(str, files),
        "--refuse-below",
        str(limit),
        "--home",
        str(home.root.parent),
    ]
    said = CliRunner().invoke(app, asked)
    assert said.exit_code == 0, said.output
    assert said.stdout.count(",refused,") == sum(row["refused"] for row in rows)
    assert CliRunner().invoke(app, [*asked, "--refuse-below", "1.5"]).exit_code == 2


def test_the_gates_pass_a_model_that_answers_as_it_was_kept(home):
    promotion = promote("digits-cnn", home=home.root.parent)
    assert promotion.promoted, promotion.reason
    assert [gate.name for gate in promotion.gates if not gate.passed] == []
