"""The network of an ensemble answers the mean of its members, however they normalise images; so does its program."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from hpo.data.prepare import TrialData
from hpo.errors import ModelError
from hpo.models import build_model, export_program, load_trained, save_ensemble, save_trained
from hpo.models.ensemble import Ensemble
from hpo.models.safe_loader import Program
from hpo.models.soup import Soup, graph_settings
from hpo.spec.study import Setup

SHAPE, CLASSES = (8, 8, 1), 3


def _data(mean: float = 0.3, *, several: bool = False, names: str = "abc") -> TrialData:
    labels = torch.zeros((4, CLASSES) if several else 4, dtype=torch.int64)
    images, rows = torch.zeros((4, *SHAPE), dtype=torch.uint8), torch.arange(4)
    return TrialData(images, labels, rows[:2], rows[2:], tuple(names), (mean,), (0.25,))


def _setup(**model: object) -> Setup:
    parts = {"data": {"name": "digits"}, "split": {"kind": "holdout"}, "training": {"epochs": 1}}
    return Setup.model_validate({**parts, "model": model})


def _saved(folder: Path, seed: int, data: TrialData, **model: object) -> Path:
    setup = _setup(**{"kind": "mlp", "hidden": 16, "batch_norm": True, **model})
    save_trained(build_model(setup.model, image_shape=SHAPE, classes=CLASSES, seed=seed).eval(), setup, data, folder)
    export_program(folder)
    return folder


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (20, *SHAPE), np.uint8)


@pytest.mark.parametrize(("several", "second"), [(False, 0.3), (False, 0.6), (True, 0.6)])
def test_the_program_of_an_ensemble_answers_the_mean_of_its_members(tmp_path, images, several, second):
    folders = [
        _saved(tmp_path / str(seed), seed, _data(mean, several=several)) for seed, mean in ((0, 0.3), (1, second))
    ]
    save_ensemble(folders, ["s#0", "s#1"], [3, 1], tmp_path / "both")
    first, other = (Program(folder / "net.pt2").predict(images) for folder in folders)
    found = Program(export_program(tmp_path / "both")).predict(images)
    np.testing.assert_allclose(found, 0.75 * first + 0.25 * other, atol=1e-6)
    # The program alone builds the network again, as for saliency.
    (tmp_path / "both" / "weights.safetensors").unlink()
    net, config = load_trained(tmp_path / "both")
    assert isinstance(net, Ensemble)
    assert [member["trial"] for member in config["members"]] == ["s#0", "s#1"]
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2) / 255
    inputs = (pixels - config["mean"][0]) / config["std"][0]
    with torch.no_grad():
        logits = net(inputs)
    answers = logits.sigmoid() if several else logits.softmax(1)
    np.testing.assert_allclose(answers.numpy(), found, atol=1e-5)


def test_members_of_other_classes_are_refused(tmp_path):
    folders = [_saved(tmp_path / names, 0, _data(names=names)) for names in ("abc", "acb")]
    with pytest.raises(ModelError, match="s#1: its class_names differ from those of s#0"):
        save_ensemble(folders, ["s#0", "s#1"], [1, 1], tmp_path / "both")


def test_a_soup_has_the_mean_of_the_weights_and_leaves_other_architectures_out(tmp_path, images):
    data = _data()
    folders = [_saved(tmp_path / str(seed), seed, data) for seed in range(2)]
    folders.insert(1, _saved(tmp_path / "wide", 0, data, hidden=32))
    soup = Soup(folders)
    assert soup.alike == (0, 2)
    first, _, second = (load_trained(folder)[0].state_dict() for folder in folders)
    soup.save((0, 2), ("s#0", "s#2"), tmp_path / "soup")
    mixed, config = load_trained(tmp_path / "soup")
    setup = json.loads((folders[0] / "setup.json").read_text())
    assert config["averaged"] == [{"trial": name, "setup": setup} for name in ("s#0", "s#2")]
    for name, tensor in mixed.state_dict().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, (first[name] + second[name]) / 2)
    program = Program(export_program(tmp_path / "soup"))
    np.testing.assert_allclose(program.predict(images), soup.probabilities((2, 0), images), atol=1e-6)
    np.testing.assert_allclose(
        Program(folders[0] / "net.pt2").predict(images), soup.probabilities((0,), images), atol=1e-6
    )


MLP, CNN = {"kind": "mlp", "hidden": 16}, {"kind": "cnn", "filters": 4}


@pytest.mark.parametrize(
    ("first", "second", "alike"),
    [
        ({**MLP, "activation": "relu"}, {**MLP, "activation": "tanh"}, (0,)),
        ({**CNN, "pool_type": "max"}, {**CNN, "pool_type": "average"}, (0,)),
        ({**MLP, "dropout": 0.1}, {**MLP, "dropout": 0.4}, (0, 1)),  # a rate of dropout is nothing to the answers
    ],
)
def test_networks_with_weights_of_equal_shapes_and_another_graph_are_left_out_of_a_soup(tmp_path, first, second, alike):
    folders = [tmp_path / "first", tmp_path / "second"]
    for folder, model in zip(folders, (first, second), strict=True):
        setup = _setup(**model)
        net = build_model(setup.model, image_shape=SHAPE, classes=CLASSES, seed=0)
        save_trained(net, setup, _data(), folder)
    shapes = [{name: each.shape for name, each in load_trained(one)[0].state_dict().items()} for one in folders]
    assert shapes[0] == shapes[1]
    assert Soup(folders).alike == alike


def test_settings_that_only_training_reads_leave_an_architecture_as_it_is():
    backbone = {"kind": "torchvision", "name": "resnet18"}
    one = _setup(**backbone, freeze="all", unfreeze_epoch=3, views=2, dropout=0.1)
    assert graph_settings(one) == graph_settings(_setup(**backbone))
    assert graph_settings(one) != graph_settings(_setup(**backbone, levels="all"))
    residual = _setup(kind="resnet", zero_init=True)
    assert graph_settings(residual) == graph_settings(_setup(kind="resnet"))


def test_an_ensemble_of_certain_networks_has_finite_logits():
    class Certain(nn.Module):
        def forward(self, images):
            return torch.tensor([[0.0, 200.0]]).expand(len(images), 2)

    nets = [Certain(), Certain()]
    for several in (False, True):
        logits = Ensemble(nets, shares=[0.5, 0.5], several=several)(torch.zeros(1, 1, 2, 2))
        assert torch.isfinite(logits).all()
