"""Networks that stand on others: what is frozen stays, what is not learns, and images come as the weights want them."""

from dataclasses import replace

import mlflow
import numpy as np
import pytest
import torch
from torch.nn import functional
from torchvision import models

from hpo.data.cache import models_folder
from hpo.errors import DataError, SpecError, TrainingError
from hpo.models import answers, build_model, export_program, parameter_count, save_trained
from hpo.models.backbones import Backbone, build_backbone, quick, stages
from hpo.models.transfer import transfer_of
from hpo.spec.models import (
    CnnSpec,
    FusionSpec,
    MlpSpec,
    TimmBackbone,
    TimmSpec,
    TorchvisionBackbone,
    TorchvisionSpec,
    TransferSpec,
)
from hpo.spec.outcome import PredictSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import AugmentSpec, OptimizerSpec, TrainingSpec
from hpo.tracking.models import save_model
from hpo.training.loop import predict_logits, train
from hpo.training.optimizers import build_optimizer, by_depth
from small_nets import SQUEEZE, TINY, weights_file

SPECS = {"torchvision": TorchvisionSpec, "timm": TimmSpec}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    return {net["kind"]: str(weights_file(net, folder)) for net in (SQUEEZE, TINY)}


@pytest.fixture
def pixels(digits):
    """The digits as such networks take them, and few of them."""
    return replace(digits, mean=(0.0,), std=(1.0,), train=digits.train[:128], valid=digits.valid[:64])


def _spec(files, net=TINY, **fields):
    return SPECS[net["kind"]](**net, weights=files[net["kind"]], **{"input_size": 32, **fields})


def _build(spec, seed=0, shape=(8, 8, 1)):
    return build_model(spec, image_shape=shape, classes=10, seed=seed)


def _state(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _same(before, module):
    return all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("net", [SQUEEZE, TINY], ids=lambda net: net["kind"])
def test_a_frozen_network_keeps_weights_and_running_means_while_its_head_learns(files, net, pixels):
    built = _build(_spec(files, net, freeze="all"))
    transfer = transfer_of(built)
    before, head = _state(transfer.bodies), _state(transfer.head)
    spec = TrainingSpec(epochs=2, optimizer=OptimizerSpec(name="adamw", weight_decay=0.1))
    list(train(built, pixels, spec, seed=0, precision="float32"))
    assert _same(before, transfer.bodies)
    assert not _same(head, transfer.head)
    assert parameter_count(built) == sum(weight.numel() for weight in transfer.head.parameters())


def test_a_torchvision_network_sees_what_torchvision_shows_it(files):
    """Grey images as three equal channels, resized, normalised; features as its own classifier gets them."""
    images = torch.rand(4, 1, 8, 8)
    body = transfer_of(_build(_spec(files, SQUEEZE, freeze="all"))).bodies[0]
    net = models.get_model(SQUEEZE["name"], weights=None)
    net.load_state_dict(torch.load(files["torchvision"], weights_only=True))
    net.fc = torch.nn.Identity()
    shown = functional.interpolate(images.expand(-1, 3, -1, -1), (32, 32), mode="bilinear", align_corners=False)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.inference_mode():
        expected = net.eval()((shown - mean.view(3, 1, 1)) / std.view(3, 1, 1))
        torch.testing.assert_close(body(images), expected, atol=1e-4, rtol=1e-4)


def test_so_many_stages_stay_and_the_others_learn(files, pixels):
    built = _build(_spec(files, freeze=2))
    parts = stages(transfer_of(built).bodies[0])
    before = [_state(part) for part in parts]
    list(train(built, pixels, TrainingSpec(epochs=1), seed=0, precision="float32"))
    assert [_same(state, part) for state, part in zip(before, parts, strict=True)][:3] == [True, True, False]


def test_more_frozen_stages_than_there_are_is_an_error_that_counts_them(files):
    with pytest.raises(TrainingError, match=r"freeze 500: timm test_efficientnet has \d+ stages"):
        _build(_spec(files, freeze=500))


def test_what_is_frozen_learns_from_the_epoch_of_unfreezing(files, pixels):
    built = _build(_spec(files, freeze="all", unfreeze_epoch=2))
    body = transfer_of(built).bodies[0]
    before = _state(body)
    same = [_same(before, body) for _ in train(built, pixels, TrainingSpec(epochs=2), seed=0, precision="float32")]
    assert same == [True, False]


def test_stages_nearer_to_the_image_learn_slower(files):
    optimizer = build_optimizer(OptimizerSpec(layer_decay=0.5), _build(_spec(files)))
    scales = [group["scale"] for group in optimizer.param_groups]
    count = len(stages(transfer_of(_build(_spec(files))).bodies[0]))
    assert sorted(scales, reverse=True) == [0.5**distance for distance in range(count + 1)]


def test_every_weight_of_a_plain_network_has_one_depth():
    net = build_model(CnnSpec(kind="cnn", filters=4), image_shape=(8, 8, 1), classes=10, seed=0)
    depths = by_depth(net)
    assert sorted(depths) == [0, 1]
    assert sum(map(len, depths.values())) == len(list(net.parameters()))


def test_the_head_begins_alike_whether_a_backbone_is_made_or_remembered(files):
    first, again = (_build(_spec(files, freeze="all"), seed=7) for _ in range(2))
    assert transfer_of(first).bodies[0] is transfer_of(again).bodies[0]
    assert _same(_state(transfer_of(first).head), transfer_of(again).head)


@pytest.mark.parametrize("pool", [1, 2])
def test_fusion_lays_the_maps_of_all_backbones_side_by_side(files, pool):
    backbones = [{**net, "weights": files[net["kind"]], "input_size": 64} for net in (SQUEEZE, TINY)]
    spec = FusionSpec(kind="fusion", backbones=backbones, pool=pool, freeze="all")
    transfer = transfer_of(_build(spec))
    images = torch.rand(2, 1, 8, 8)
    with torch.inference_mode():
        counts = [body(images).shape[1] for body in transfer.bodies]
    assert transfer.head[-1].in_features == sum(counts)
    assert all(count % pool**2 == 0 for count in counts)


@pytest.mark.parametrize("pool", [None, 2])
@pytest.mark.parametrize("net", [SQUEEZE, TINY], ids=lambda net: net["kind"])
def test_all_levels_are_the_averages_of_each_stage_s_maps_beside_the_answer(files, net, pool):
    library = {"torchvision": TorchvisionBackbone, "timm": TimmBackbone}[net["kind"]]
    plain, deep = (
        build_backbone(
            library(**net, weights=files[net["kind"]], input_size=64, levels=levels), side=8, pool=side, loaded=True
        ).eval()
        for levels, side in (("last", None), ("all", pool))
    )
    images = torch.rand(2, 3, 64, 64)
    maps = []
    for part in stages(plain.net):
        # As they are then: an activation that works in place comes after some of them.
        part.register_forward_hook(lambda _, __, out: maps.append(out.clone()) if out.ndim == 4 else None)
    with torch.inference_mode():
        answer, found, fast = plain(images), deep(images), quick(deep)(images)
    kept = maps if pool else maps[:-1]
    levels = [functional.adaptive_avg_pool2d(each, pool or 1).flatten(1) for each in kept]
    torch.testing.assert_close(found, torch.cat([*levels, *([] if pool else [answer])], dim=1))
    torch.testing.assert_close(fast, found, atol=1e-4, rtol=1e-4)
    assert deep.digest != plain.digest


def test_a_network_without_maps_between_says_that_it_has_no_levels():
    spec = TimmSpec(kind="timm", name="test_vit", weights="none", levels="all")
    with pytest.raises(SpecError, match="test_vit has no separate stages") as caught:
        _build(spec, shape=(32, 32, 3))
    assert "levels to last" in caught.value.hint


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["torchvision", "timm", "levels", "fusion"])
def test_the_exported_program_agrees_through_plain_mlflow(files, pixels, kind, tmp_path):
    backbones = [{**net, "weights": files[net["kind"]], "input_size": 32} for net in (SQUEEZE, TINY)]
    named = {net["kind"]: _spec(files, net, freeze="all", dense=[16]) for net in (SQUEEZE, TINY)}
    named["levels"] = _spec(files, freeze="all", dense=[16], levels="all")
    spec = named.get(kind) or FusionSpec(kind="fusion", backbones=backbones, freeze="all")
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=spec, training=TrainingSpec())
    net = _build(spec, seed=3)
    save_trained(net, setup, pixels, tmp_path)
    export_program(tmp_path)
    save_model(tmp_path / "model", tmp_path, model_id="m-0", run_id="0", tags={})
    images = pixels.images[pixels.valid].numpy()
    answer = mlflow.pyfunc.load_model(str(tmp_path / "model")).predict(images)
    expected = predict_logits(net, pixels, pixels.valid, precision="float32").softmax(1)
    np.testing.assert_allclose(np.asarray(answer), expected, atol=1e-4)


@pytest.fixture
def cells(tmp_path, monkeypatch, digits):
    """A network of report R1 in the store of models: 64 kernels of 9x9 for RGB images of 28 pixels, 8 classes."""
    monkeypatch.setenv("HPO_DATA", str(tmp_path))
    model = CnnSpec(kind="cnn", filters=64, kernel=9)
    setup = Setup(data=DataSpec(name="bloodmnist"), split=SplitSpec(), model=model, training=TrainingSpec())
    data = replace(
        digits,
        images=torch.zeros(1, 28, 28, 3, dtype=torch.uint8),
        class_names=tuple("abcdefgh"),
        mean=(0.5,) * 3,
        std=(0.2,) * 3,
    )
    net = build_model(model, image_shape=(28, 28, 3), classes=8, seed=1)
    save_trained(net, setup, data, models_folder() / "m-1")
    return net


def test_convolutions_of_28_pixels_serve_64_with_a_new_head(cells):
    spec = TransferSpec(kind="transfer", from_model="models:/m-1")
    net = build_model(spec, image_shape=(64, 64, 3), classes=8, seed=0)
    assert parameter_count(net) == 524_296
    assert parameter_count(net, trainable=False) - parameter_count(net) == 15_616
    image = torch.rand(1, 3, 64, 64)
    with torch.inference_mode():
        expected = cells[:4]((image - 0.5) / 0.2)
        torch.testing.assert_close(transfer_of(net).bodies[0](image), expected)


def test_a_model_without_convolutions_cannot_change_its_resolution(cells, digits):
    model = MlpSpec(kind="mlp", hidden=4)
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=model, training=TrainingSpec())
    save_trained(_build(model), setup, digits, models_folder() / "m-2")
    with pytest.raises(Exception, match="models:/m-2 has no convolutions"):
        _build(TransferSpec(kind="transfer", from_model="models:/m-2"))


def test_frozen_noise_is_refused():
    with pytest.raises(ValueError, match="freeze all with weights none would keep mobilenet_v2 random"):
        TorchvisionSpec(kind="torchvision", name="mobilenet_v2", weights="none", freeze="all")
    with pytest.raises(ValueError, match="unfreeze_epoch needs something frozen"):
        TorchvisionSpec(kind="torchvision", name="mobilenet_v2", unfreeze_epoch=3)


@pytest.mark.parametrize(
    ("net", "meant"),
    [
        ({"kind": "torchvision", "name": "mobilenetv2"}, "mobilenet_v2"),
        ({"kind": "timm", "name": "resnet-18"}, "resnet18"),
    ],
)
def test_an_unknown_name_is_answered_with_a_near_one(net, meant):
    with pytest.raises(SpecError, match=meant):
        _build(SPECS[net["kind"]](**net, weights="none"))


@pytest.mark.parametrize("net", [SQUEEZE, TINY], ids=lambda net: net["kind"])
def test_weights_of_another_network_are_refused(files, net):
    other = files["timm" if net["kind"] == "torchvision" else "torchvision"]
    with pytest.raises(DataError, match=r"not weights of (torchvision|timm)'s"):
        _build(SPECS[net["kind"]](**net, weights=other))


def test_images_of_four_channels_are_refused(files):
    with pytest.raises(TrainingError, match="4 channels"):
        _build(_spec(files), shape=(8, 8, 4))


def test_networks_on_one_frozen_backbone_share_its_features_when_their_views_are_chosen(
    files, pixels, tmp_path, monkeypatch
):
    file = tmp_path / "images.npy"
    np.save(file, pixels.images.numpy())
    augment = AugmentSpec(flip_horizontal=True, rotate90=True)
    setup = Setup(
        data=DataSpec(name="digits"),
        split=SplitSpec(),
        model=_spec(files, freeze="all"),
        training=TrainingSpec(augment=augment),
    )
    decided, seen = [], []
    real = Backbone.forward
    monkeypatch.setattr(Backbone, "forward", lambda body, images: (seen.append(len(images)), real(body, images))[1])
    answers._MEMORY.begin(None)
    for number, (seed, remembers) in enumerate([(0, True), (1, True), (1, False)]):
        if not remembers:
            monkeypatch.setattr(answers, "_MOST_BYTES", 0)
            answers._MEMORY.begin(None)
        folder = tmp_path / str(number)
        net = _build(setup.model, seed)
        save_trained(net.eval(), setup, pixels, folder)
        rows, labels = np.arange(200), pixels.labels[:200].numpy()
        raw = predict_logits(net, pixels, torch.arange(200), precision="float32").softmax(1).detach().numpy()
        np.savez(folder / "validation.npz", rows=rows, labels=labels, probabilities=raw)
        seen.clear()
        record = answers.decide_answers(folder, folder / "validation.npz", file, PredictSpec(views="auto"))
        decided.append(([each["loss"] for each in record["views"]["tried"]], sum(count for count in seen if count > 1)))
    first, second, alone = decided
    assert first[1] == alone[1] == 200 * 8 + 2, "eight symmetries; two black images measure the features"
    assert second[1] == 2
    assert second[0] == alone[0] != first[0]
