"""A logged program answers as the network did."""

import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch

from hpo.models import CONFIG, PROGRAM, WEIGHTS, build_model, export_program, load_trained, save_trained, save_weights
from hpo.models.safe_loader import Program, read_config
from hpo.models.views import View, candidates
from hpo.spec.models import CnnSpec, MlpSpec, TimmSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, TrainingSpec
from hpo.training.loop import predict_logits
from small_nets import TINY

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


def test_a_logged_network_with_a_backbone_is_loaded_from_its_program(digits, tmp_path):
    """Its program names the mean and deviation of the backbone's pixels, which are no weights."""
    model = TimmSpec(kind="timm", name=TINY["name"], weights="none", input_size=32)
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=model, training=TrainingSpec())
    net = build_model(model, image_shape=(8, 8, 1), classes=10, seed=3).eval()
    save_trained(net, setup, digits, tmp_path)
    export_program(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    images = torch.rand(3, 1, 8, 8)
    for _ in range(2):
        again, _ = load_trained(tmp_path)
        with torch.inference_mode():
            torch.testing.assert_close(again(images), net(images))
        save_weights(tmp_path, tmp_path)  # from the program; loaded from them next time


def test_what_is_left_on_disk_is_the_whole_network_and_holds_no_pickle(digits, tmp_path):
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=MODELS[0], training=TrainingSpec())
    net = build_model(MODELS[0], image_shape=(8, 8, 1), classes=10, seed=3)
    save_trained(net, setup, digits, tmp_path)
    again, config = load_trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
    assert config["class_names"] == [str(digit) for digit in range(10)]
    assert not (tmp_path / PROGRAM).exists()


@pytest.mark.parametrize("augment", [{}, {"flip_horizontal": True, "rotate90": True, "crop": 2, "zoom": 0.5}], ids=str)
def test_views_and_temperature_are_in_the_program_and_leave_the_weights_as_they_are(augment, digits, tmp_path):
    spec = AugmentSpec(**augment)
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=MODELS[1], training=TrainingSpec(augment=spec))
    net = build_model(MODELS[1], image_shape=(8, 8, 1), classes=10, seed=3).eval()
    save_trained(net, setup, digits, tmp_path)
    views = [view for views in candidates(spec, (8, 8, 1)) for view in views]
    config = read_config(tmp_path / CONFIG) | {"temperature": 1.7, "views": [asdict(view) for view in views]}
    (tmp_path / CONFIG).write_text(json.dumps(config))
    export_program(tmp_path)
    images = digits.images[digits.valid[:70]]
    parts = []
    for view in views or [View()]:
        changed = replace(digits, images=view(images))
        parts.append(predict_logits(net, changed, torch.arange(70), precision="float32").softmax(1))
    expected = (torch.stack(parts).mean(0).log() / 1.7).softmax(1)
    np.testing.assert_allclose(Program(tmp_path / PROGRAM).predict(images.numpy()), expected, atol=1e-5)
    plain = torch.export.load(tmp_path / PROGRAM).module()
    np.testing.assert_allclose(plain(images).detach(), expected, atol=1e-5)
    (tmp_path / WEIGHTS).unlink()
    again, _ = load_trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters(), strict=True))
