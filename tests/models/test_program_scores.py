"""A kept model of several views has one set of answers: in tables, pictures, pages and where it is explained."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hpo.execute.workers import job_process
from hpo.models import answers as answers_module
from hpo.models import build_model, load_trained, save_trained, whole_program
from hpo.models.calibration import Difference
from hpo.models.saliency import explain_images
from hpo.models.views import PLAIN, Choice, View
from hpo.records import DataCard, TrialResult, TrialState
from hpo.report.confidence import of_program
from hpo.report.figures import classifier
from hpo.spec.outcome import PredictSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec
from hpo.training.validation import leave_predictions

ROWS = np.arange(200)
VIEWS = (PLAIN, View(turns=1), View(turns=2))  # of digits, which change what the network answers


@pytest.fixture
def left(digits, digits_card: DataCard, tmp_path: Path) -> TrialResult:
    """What a trial has left of a network that was not trained, whose views are taken for the best ones."""
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=_model(), training=TrainingSpec())
    net = build_model(setup.model, image_shape=(8, 8, 1), classes=10, seed=3).eval()
    save_trained(net, setup, digits, tmp_path)
    program = whole_program(net, json.loads((tmp_path / "config.json").read_text()))
    images = torch.from_numpy(np.load(Path(digits_card.folder) / "development_images.npy")[ROWS])
    labels = torch.from_numpy(np.load(Path(digits_card.folder) / "development_labels.npy")[ROWS])
    with torch.no_grad():
        logits = program(images).log()
    result = TrialResult(0, TrialState.COMPLETE, scores={"valid_accuracy": 0.0, "latency_ms": 1.0})
    return leave_predictions(result, logits, labels, rows=torch.from_numpy(ROWS), folder=tmp_path)


def _model():
    from hpo.spec.models import MlpSpec

    return MlpSpec(kind="mlp", hidden=[16])


def _chosen(answer, labels, _):
    mean = torch.stack([answer(view) for view in VIEWS]).mean(0)
    difference = Difference(0.0, 0.0, 0.0)
    return Choice(VIEWS, (), len(labels), difference, difference), mean, mean


def test_tables_pictures_and_scores_are_of_the_mean_over_views(left, digits_card, tmp_path, monkeypatch):
    monkeypatch.setattr(answers_module, "choose", _chosen)
    folder = job_process.finish_trial(left, digits_card, PredictSpec(views="auto"))
    with np.load(folder / "validation.npz") as arrays:
        labels, predicted = arrays["labels"], arrays["probabilities"].argmax(1)
        assert (arrays["raw"].argmax(1) != predicted).any()
        assert (arrays["judged"] == predicted).all()
    counts = np.zeros((10, 10), int)
    np.add.at(counts, (labels, predicted), 1)
    record = json.loads((folder / "answers.json").read_text())
    shown = of_program(left, record)
    assert shown.confusion == tuple(map(tuple, counts.tolist())) != left.confusion
    assert shown.scores["valid_accuracy"] == pytest.approx(np.mean(labels == predicted))
    assert shown.scores["latency_ms"] == 1.0
    report = json.loads((folder / "classification_report.json").read_text())
    assert report["accuracy"] == pytest.approx(np.mean(labels == predicted))
    drawn = []
    monkeypatch.setattr(classifier, "confusion_figure", lambda confusion, *_, **__: drawn.append(confusion))
    job_process.draw_trial(replace(left, folder=str(folder)), digits_card, tmp_path / "figures")
    assert drawn == [shown.confusion]


def test_a_network_without_views_keeps_its_scores(left, digits_card):
    job_process.finish_trial(left, digits_card, PredictSpec())
    assert of_program(left, {}) is left
    assert "program" not in json.loads((Path(left.folder) / "answers.json").read_text())


def test_what_is_explained_has_the_probabilities_of_the_program_and_tells_of_its_views(left, digits):
    folder = Path(left.folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"views": [asdict(view) for view in VIEWS], "temperature": 0.5}
    (folder / "config.json").write_text(json.dumps(config))
    images = digits.images[:4].numpy()
    found = explain_images(folder, images, methods=["gradient"])
    with torch.no_grad():
        expected = whole_program(load_trained(folder)[0], config)(digits.images[:4].cpu())
    np.testing.assert_allclose([each.probabilities for each in found], expected.numpy(), atol=1e-6)
    assert [each.views for each in found] == [3] * 4
