"""A logged program answers as the network did."""

import numpy as np
import pytest
import torch

from hpo.models import PROGRAM, build_model, export_program, load_trained, save_trained
from hpo.spec.models import CnnSpec, MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec
from hpo.training.loop import predict_logits

MODELS = [MlpSpec(kind="mlp", hidden=16, batch_norm=True, dropout=0.5), CnnSpec(kind="cnn", filters=4, dropout=0.5)]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.kind)
def test_the_program_takes_raw_images_and_agrees_with_the_network(model, digits, tmp_path):
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=model, training=TrainingSpec())
    net = build_model(model, image_shape=(8, 8, 1), classes=10, seed=3)
    save_trained(net, setup, digits, tmp_path)
    program = torch.export.load(export_program(tmp_path)).module()
    expected = predict_logits(net, digits, digits.valid, precision="float32").softmax(1)
    images = digits.images[digits.valid]
    assert images.dtype == torch.uint8
    np.testing.assert_allclose(program(images).detach(), expected, atol=1e-5)
    np.testing.assert_allclose(program(images[:1]).detach(), expected[:1], atol=1e-5)


def test_what_is_left_on_disk_is_the_whole_network_and_holds_no_pickle(digits, tmp_path):
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=MODELS[0], training=TrainingSpec())
    net = build_model(MODELS[0], image_shape=(8, 8, 1), classes=10, seed=3)
    save_trained(net, setup, digits, tmp_path)
    again, config = load_trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert config["class_names"] == [str(digit) for digit in range(10)]
    assert not (tmp_path / PROGRAM).exists()
