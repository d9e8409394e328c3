"""Networks: exact parameter counts of the published ones, shapes, seeds, export, and the words of their errors."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from torch import nn

from hpo.errors import SpecError, TrainingError
from hpo.models import build_model, parameter_count
from hpo.spec.load import load_study, parse_study
from hpo.spec.models import ModelSpec

SPEC = TypeAdapter(ModelSpec)

R4 = {
    "kind": "convnet",
    "filters": [12, 24],
    "padding": ["same", "valid"],
    "dense": [600, 100],
    "dense_dropout": [0.4, 0.0],
}
V3 = {"kind": "convnet", "filters": [32, 64, 128, 256, 512], "dropout": [0.2, 0.5]}
FAMILIES = [
    {"kind": "mlp", "hidden": [32, 16], "dropout": 0.2, "batch_norm": True},
    {"kind": "cnn", "filters": 8, "pool_type": "average", "batch_norm": True},
    {"kind": "convnet", "depth": 2, "width": 8, "dropout": 0.1, "dense": [16]},
    {"kind": "resnet", "width": 8, "dense": [16], "repeats": 2, "dropout": 0.1},
]


def _build(model, image_shape=(28, 28, 3), classes=8, *, seed=0):
    return build_model(SPEC.validate_python(model), image_shape=image_shape, classes=classes, seed=seed)


def _convolutions(net):
    return [module for module in net.modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize(
    ("model", "image_shape", "classes", "count"),
    [
        ({"kind": "mlp", "hidden": 128, "dropout": 0.2}, (28, 28, 1), 10, 101_770),
        ({"kind": "mlp", "hidden": 4096, "dropout": 0.25}, (28, 28, 3), 8, 9_670_664),
        ({"kind": "mlp", "hidden": 128}, (28, 28, 3), 8, 302_216),
        ({"kind": "cnn", "filters": 64, "kernel": 9}, (28, 28, 3), 8, 115_976),
        ({"kind": "cnn", "filters": 128, "kernel": 3, "padding": "valid"}, (28, 28, 3), 8, 176_648),
        ({"kind": "resnet"}, (28, 28, 3), 8, 1_957_768),
        # Written out by hand from the reports' descriptions: convolutions, batch norms, dense layers.
        (
            {"kind": "convnet", "filters": [8, 32, 16], "batch_norm": False},
            (32, 32, 3),
            10,
            (27 * 8 + 8) + (72 * 32 + 32) + (288 * 16 + 16) + (256 * 10 + 10),
        ),
        (
            R4,
            (28, 28, 1),
            10,
            (9 * 12 + 12 + 24) + (108 * 24 + 24 + 48) + (864 * 600 + 600) + (600 * 100 + 100) + (100 * 10 + 10),
        ),
        (
            V3,
            (32, 32, 3),
            10,
            sum(9 * a * b + 3 * b for a, b in [(3, 32), (32, 64), (64, 128), (128, 256), (256, 512)]) + 5130,
        ),
    ],
)
def test_parameter_counts_are_the_published_ones(model, image_shape, classes, count):
    assert parameter_count(_build(model, image_shape, classes)) == count


@pytest.mark.parametrize("image_shape", [(8, 8, 1), (28, 28, 3), (32, 32, 3), (64, 64, 3)])
@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model["kind"])
def test_every_family_turns_images_into_one_logit_a_class(model, image_shape):
    net = _build(model, image_shape, 5)
    height, width, channels = image_shape
    logits = net(torch.rand(3, channels, height, width))
    assert logits.shape == (3, 5)
    assert logits.isfinite().all()
    assert net.training


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model["kind"])
def test_one_seed_gives_one_network_and_leaves_the_global_generator_alone(model):
    torch.manual_seed(5)
    untouched = torch.rand(1)
    torch.manual_seed(5)
    first, again, other = (_build(model, seed=seed).state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), untouched)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("model", FAMILIES, ids=lambda model: model["kind"])
def test_every_family_exports_for_any_number_of_images(model):
    net = _build(model, (16, 16, 3)).eval()
    batch = torch.export.Dim("batch", min=1, max=1000)
    program = torch.export.export(net, (torch.rand(2, 3, 16, 16),), dynamic_shapes=({0: batch},))
    images = torch.rand(7, 3, 16, 16)
    torch.testing.assert_close(program.module()(images), net(images))


@pytest.mark.parametrize(
    ("model", "side"),
    [
        ({"kind": "cnn", "kernel": 9, "padding": "valid"}, 8),
        ({"kind": "cnn", "pool": 5}, 4),
        ({"kind": "convnet", "depth": 4}, 8),
        ({"kind": "convnet", "depth": 2, "kernel": 7, "padding": "valid"}, 16),
        ({"kind": "resnet", "blocks": 4, "width": 4}, 8),
    ],
)
def test_too_small_images_are_refused_with_a_next_step(model, side):
    with pytest.raises(TrainingError, match=f"{model['kind']} does not fit images of .*{side}") as caught:
        _build(model, (side, side, 3))
    assert "larger images" in caught.value.hint


def test_depth_width_and_growth_say_the_filters_unless_they_are_listed():
    grown = SPEC.validate_python({"kind": "convnet", "depth": 4, "width": 16, "growth": 1.5})
    assert grown.block_filters == [16, 24, 36, 54]
    listed = SPEC.validate_python({"kind": "convnet", "depth": 4, "filters": [5, 7]})
    assert listed.block_filters == [5, 7]
    assert [layer.out_channels for layer in _convolutions(_build(grown.model_dump()))] == [16, 24, 36, 54]


def test_convolution_dropout_rises_linearly_with_depth():
    rates = [layer.p for layer in _build(V3, (32, 32, 3)) if isinstance(layer, nn.Dropout)]
    assert rates == pytest.approx([0.2, 0.275, 0.35, 0.425, 0.5])


def test_pooling_follows_only_the_blocks_that_are_named():
    five = {"kind": "convnet", "filters": [32, 64, 64, 128, 128], "pool_after": [1, 3, 5], "head": "global"}
    kinds = [type(layer).__name__ for layer in _build(five) if isinstance(layer, nn.Conv2d | nn.MaxPool2d)]
    assert kinds == ["Conv2d", "MaxPool2d", "Conv2d", "Conv2d", "MaxPool2d", "Conv2d", "Conv2d", "MaxPool2d"]


@pytest.mark.parametrize("kernel", [2, 3, 4, 5])
def test_strides_shrink_maps_as_pooling_does(kernel):
    common = {"kind": "convnet", "depth": 2, "width": 4, "kernel": kernel, "convs_per_block": 2}
    strided, pooled = (_build({**common, "pool": pool}, (16, 16, 1)) for pool in ("stride", "max"))
    assert [layer.stride for layer in _convolutions(strided)] == [(1, 1), (2, 2), (1, 1), (2, 2)]
    assert parameter_count(strided) == parameter_count(pooled)


def test_dense_dropout_without_dense_layers_is_of_the_features():
    net = _build({"kind": "convnet", "depth": 1, "head": "global", "dense_dropout": 0.4})
    assert [type(layer).__name__ for layer in net][-3:] == ["Flatten", "Dropout", "Linear"]


@pytest.mark.parametrize(
    ("model", "said"),
    [
        ({"kind": "convnet", "padding": ["same"]}, "padding lists 1 blocks of 3"),
        ({"kind": "convnet", "dense": [9], "dense_dropout": [0.1, 0.2]}, "dense_dropout lists 2 layers of 1"),
        ({"kind": "resnet", "kernel": 4}, "4 is even"),
        ({"kind": "resnet", "batch_norm": False, "zero_init": True}, "zero_init needs batch_norm"),
        ({"kind": "restnet"}, "no kind 'restnet'. Did you mean resnet.*mlp, cnn, convnet, resnet.*module:function"),
        ({"hidden": 3}, "kind is missing"),
        ({"kind": "own"}, "no kind 'own'"),
    ],
)
def test_what_cannot_be_is_refused_before_any_training(model, said):
    with pytest.raises(ValidationError, match=said):
        SPEC.validate_python(model)


def test_resnet_is_the_published_one():
    net = _build({"kind": "resnet"})
    kernels = [(layer.out_channels, layer.kernel_size[0], layer.stride[0]) for layer in _convolutions(net)]
    block = [(3, 2), (3, 1), (3, 1), (1, 2)]
    stages = [(filters, kernel, stride) for filters in (128, 256) for kernel, stride in block]
    assert kernels == [(64, 3, 1), *stages]
    assert all(layer.bias is not None for layer in _convolutions(net))


def test_zero_init_makes_each_block_begin_as_its_shortcut():
    model = {"kind": "resnet", "width": 4, "zero_init": True, "repeats": 2}
    block = _build(model)[4]  # the second block of the first stage, whose shortcut is the identity
    maps = torch.rand(2, 8, 6, 6)
    assert torch.equal(block(maps), maps)


def test_trainable_parameters_leave_out_the_frozen():
    net = _build({"kind": "cnn", "filters": 64, "kernel": 9}, (64, 64, 3))
    net[0].requires_grad_(False)
    assert parameter_count(net) == 524_296
    assert parameter_count(net, trainable=False) - parameter_count(net) == 15_616


OWN = """
import torch
from torch import nn

def build(*, image_shape, classes, width=4):
    height, wide, channels = image_shape
    return nn.Sequential(nn.Flatten(), nn.Linear(height * wide * channels, width), nn.ReLU(), nn.Linear(width, classes))

def not_a_network(*, image_shape, classes):
    return "network"

def wrong_shape(*, image_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes + 1))

def breaks(*, image_shape, classes):
    raise KeyError("weights")

number = 3
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's in the working directory, which is not on sys.path."""
    (tmp_path / "own_networks.py").write_text(OWN, encoding="utf-8")
    (tmp_path / "own_broken.py").write_text("import not_there_at_all", encoding="utf-8")
    (tmp_path / "own_syntax.py").write_text("def build(:", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield "own_networks"
    sys.modules.pop("own_networks", None)


def test_a_network_of_the_users_own_is_found_in_the_working_directory_and_gets_its_options(own):
    net = _build({"kind": f"{own}:build", "options": {"width": 6}}, (8, 8, 1), 3)
    assert parameter_count(net) == 64 * 6 + 6 + 6 * 3 + 3
    same = _build({"kind": f"{own}:build", "options": {"width": 6}}, (8, 8, 1), 3)
    assert all(torch.equal(one, two) for one, two in zip(net.parameters(), same.parameters(), strict=True))


@pytest.mark.parametrize(
    ("kind", "options", "error", "said"),
    [
        ("own_absent:build", {}, SpecError, "no module 'own_absent'"),
        ("own_broken:build", {}, SpecError, "no module 'not_there_at_all'"),
        ("own_syntax:build", {}, SpecError, "importing own_syntax fails: SyntaxError"),
        ("own_networks:bild", {}, SpecError, "no function 'bild'. It has: .*build"),
        ("own_networks:number", {}, SpecError, "no function 'number'"),
        ("own_networks:not_a_network", {}, TrainingError, "returned str, not a network"),
        ("own_networks:wrong_shape", {}, TrainingError, r"gives \(2, 4\) for 2 images and 3 classes"),
        ("own_networks:breaks", {}, TrainingError, "KeyError: 'weights'"),
        ("own_networks:build", {"depth": 2}, TrainingError, "depth=2.*unexpected keyword"),
    ],
)
def test_what_is_wrong_with_an_own_network_is_said_with_a_next_step(own, kind, options, error, said):
    with pytest.raises(error, match=said) as caught:
        _build({"kind": kind, "options": options}, (8, 8, 1), 3)
    assert caught.value.hint


def test_options_of_an_own_network_can_be_searched():
    study = {
        "name": "own",
        "data": {"name": "digits"},
        "model": {"kind": "somewhere.models:build", "options": {"width": 4, "deep": {"skip": False}}},
        "search": {"space": {"model.options.width": {"int": [4, 64]}, "model.options.deep.skip": {"choice": [True]}}},
    }
    setup = parse_study(study, trust=True).with_values({"model.options.width": 9, "model.options.deep.skip": True})
    assert setup.model.options == {"width": 9, "deep": {"skip": True}}
    study["search"]["space"] = {"model.options.height": {"int": [4, 64]}}
    with pytest.raises(SpecError, match="no 'height' there \\(known: width, deep\\)"):
        parse_study(study)


def test_the_documented_own_network_is_one(tmp_path, monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "own-model.md").read_text(encoding="utf-8")
    code, study = (guide.split(f"```{language}\n")[1].split("```")[0] for language in ("python", "yaml"))
    (tmp_path / "my_networks.py").write_text(code, encoding="utf-8")
    (tmp_path / "digits-own.yaml").write_text(study, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = load_study(tmp_path / "digits-own.yaml")
    for values in ({"model.options.filters": 8, "model.options.squeeze": 2}, {}):
        net = build_model(spec.with_values(values).model, image_shape=(8, 8, 1), classes=10, seed=0)
        assert net(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    sys.modules.pop("my_networks")


@pytest.mark.parametrize("kind", ["cnn", "convnet", "resnet"])
def test_maps_are_pooled_before_relu_with_the_same_values_and_gradients(kind):
    stem = {"stem_pool": 2} if kind == "resnet" else {}
    pooled_first = _build({"kind": kind, "activation": "relu", **stem}, (16, 16, 3), 4)
    usual = _build({"kind": kind, "activation": "relu", **stem}, (16, 16, 3), 4)
    places = [
        place
        for place, (one, two) in enumerate(pairwise(usual))
        if isinstance(one, nn.MaxPool2d) and isinstance(two, nn.ReLU)
    ]
    assert places
    for place in places:
        usual[place], usual[place + 1] = usual[place + 1], usual[place]
    images = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    for net in (pooled_first, usual):
        logits = net.train()(images)
        torch.nn.functional.cross_entropy(logits, torch.arange(8) % 4).backward()
        found.append([logits, *(weight.grad for weight in net.parameters())])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_function_that_falls_somewhere_is_computed_before_the_pooling():
    layers = [type(layer) for layer in _build({"kind": "cnn", "activation": "gelu"}, (8, 8, 1), 4)]
    assert layers.index(nn.GELU) < layers.index(nn.MaxPool2d)
