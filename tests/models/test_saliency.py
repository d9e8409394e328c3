"""Saliency finds what a network was taught to look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.errors import ModelError
from hpo.models import build_model, export_program, save_trained
from hpo.models.basic import OneLogit
from hpo.models.saliency import METHODS, explain_images, integrated_gradients, last_maps, log_odds, saliency
from hpo.spec.models import CnnSpec, ConvnetSpec, MlpSpec, ResnetSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec

SIDE, CORNER = 12, slice(0, 4)
KINDS = {
    "mlp": MlpSpec(kind="mlp", hidden=16),
    "cnn": CnnSpec(kind="cnn", filters=8, kernel=3),
    "convnet": ConvnetSpec(kind="convnet", depth=2, width=8, batch_norm=False),
}


def planted(count: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Noise (n, 1, 12, 12), which in class 1 has a cross of 4 x 4 pixels in its upper left corner."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 2, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, SIDE, SIDE, generator=generator)
    images[:, 0, CORNER, CORNER] += labels[:, None, None] * (torch.eye(4) + torch.eye(4).flip(1))
    return images, labels


def taught(kind: str, *, binary: bool = False) -> nn.Module:
    net = build_model(KINDS[kind], image_shape=(SIDE, SIDE, 1), classes=2, seed=0, binary=binary)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    for step in range(300):
        images, labels = planted(64, seed=1000 + step)  # new noise each time, so that none can be learnt by heart
        optimizer.zero_grad()
        functional.cross_entropy(net(images), labels).backward()
        optimizer.step()
    net.eval()
    images, labels = planted(256, seed=2)
    assert (net(images).argmax(1) == labels).float().mean() > 0.99
    return net


@pytest.fixture(scope="module")
def nets() -> dict[str, nn.Module]:
    torch.set_num_threads(1)
    return {kind: taught(kind) for kind in KINDS}


@pytest.mark.parametrize(
    ("kind", "method"), [(kind, method) for kind in KINDS for method in METHODS if (kind, method) != ("mlp", "gradcam")]
)
def test_most_saliency_lies_on_the_only_pixels_that_matter(nets: dict[str, nn.Module], kind: str, method: str) -> None:
    images, labels = planted(32, seed=3)
    for image in images[labels == 1]:
        found = saliency(nets[kind], image, 1, method)
        assert (found.shape, found.dtype) == ((SIDE, SIDE), np.float32)
        assert (found.min() >= 0, found.max()) == (True, pytest.approx(1.0))
        assert found[CORNER, CORNER].sum() / found.sum() > 0.5  # a ninth of the image


@pytest.mark.parametrize("kind", KINDS)
def test_integrated_gradients_add_up_to_the_change_of_the_log_odds(nets: dict[str, nn.Module], kind: str) -> None:
    images, _ = planted(8, seed=4)
    for target in (0, 1):
        given = log_odds(nets[kind], images, target=target) - log_odds(nets[kind], images * 0, target=target)
        sums = integrated_gradients(nets[kind], images, target).sum((1, 2, 3))
        torch.testing.assert_close(sums, given, rtol=0.02, atol=0.1)


def test_integrated_gradients_of_a_linear_network_are_weight_times_input() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
    inputs = torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = (net[1].weight[1] - net[1].weight[0]).reshape(1, 1, 4, 4)
    torch.testing.assert_close(integrated_gradients(net, inputs, 1), (weights * inputs).detach(), rtol=1e-4, atol=1e-6)


def test_pixels_that_a_network_never_reads_matter_nothing() -> None:
    class LeftHalf(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            left = images[..., :4].sum((1, 2, 3))
            return torch.stack([left, -left, left**2], dim=1)

    image = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(0))
    for method in ("gradient", "integrated"):
        found = saliency(LeftHalf(), image, 2, method)
        assert found[:, :4].min() >= 0
        assert found.max() == pytest.approx(1.0)
        assert not found[:, 4:].any()


def test_the_log_odds_are_those_of_the_softmax() -> None:
    logits = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = logits.softmax(1)[:, 2]
    torch.testing.assert_close(log_odds(nn.Identity(), logits, target=2), torch.log(share / (1 - share)))
    far = torch.tensor([[0.0, 200.0]])
    assert log_odds(nn.Identity(), far, target=1).item() == 200


def test_both_classes_of_a_network_of_one_output_can_be_explained() -> None:
    net = taught("mlp", binary=True)
    assert isinstance(net, OneLogit)
    image = planted(1, seed=5)[0]
    first, second = (saliency(net, image, target, "gradient") for target in (0, 1))
    assert first.any()
    np.testing.assert_allclose(first, second, atol=1e-6)


def test_explaining_changes_neither_the_network_nor_the_image(nets: dict[str, nn.Module]) -> None:
    net, image = nets["cnn"], planted(1, seed=6)[0][0]
    weights = [weight.clone() for weight in net.parameters()]
    before = image.clone()
    for method in METHODS:
        saliency(net, image, 1, method)
    assert torch.equal(image, before)
    assert not image.requires_grad
    assert all(torch.equal(now, then) for now, then in zip(net.parameters(), weights, strict=True))
    assert not any(layer._forward_hooks or layer._backward_hooks for layer in net.modules())
    assert not net.training


def test_grad_cam_looks_at_the_last_maps() -> None:
    zeros = torch.zeros(1, 3, 16, 16)
    for spec, kind in ((KINDS["convnet"], nn.Conv2d), (ResnetSpec(kind="resnet", width=4, dense=8), nn.Module)):
        net = build_model(spec, image_shape=(16, 16, 3), classes=3, seed=0).eval()
        layer = last_maps(net, zeros)
        assert isinstance(layer, kind)
        children = list(net.children())
        later = children[children.index(layer) + 1 :]
        assert not any(isinstance(part, nn.Conv2d) for child in later for part in child.modules())


def test_grad_cam_of_a_network_without_convolutions_says_so(nets: dict[str, nn.Module]) -> None:
    with pytest.raises(ModelError, match="needs the maps of a convolution") as caught:
        saliency(nets["mlp"], planted(1, seed=0)[0], 0, "gradcam")
    assert "--method gradient" in caught.value.hint


# What is left on disk


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
def test_a_logged_network_is_explained_from_its_program(kind, digits, tmp_path) -> None:
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=KINDS[kind], training=TrainingSpec())
    net = build_model(setup.model, image_shape=(8, 8, 1), classes=10, seed=3)
    save_trained(net, setup, digits, tmp_path)
    images = digits.images[:3].numpy()
    from_weights = explain_images(tmp_path, images)
    export_program(tmp_path)
    (tmp_path / "weights.safetensors").unlink()
    from_program = explain_images(tmp_path, images)
    program = torch.export.load(tmp_path / "net.pt2").module()
    for first, second, row in zip(from_weights, from_program, program(digits.images[:3]).tolist(), strict=True):
        assert list(first.maps) == [method for method in METHODS if method != "gradcam" or kind == "cnn"]
        assert first.target == second.target == int(np.argmax(row))
        np.testing.assert_allclose(first.probabilities, row, atol=1e-5)
        for method, found in first.maps.items():
            np.testing.assert_allclose(found, second.maps[method], atol=1e-5)
    (chosen,) = explain_images(tmp_path, images[:1], methods=["gradient"], target=7)
    assert (chosen.target, list(chosen.maps)) == (7, ["gradient"])


def test_a_model_without_its_setup_says_what_to_do(tmp_path) -> None:
    with pytest.raises(ModelError, match=r"there is no setup\.json") as caught:
        explain_images(tmp_path, np.zeros((1, 8, 8, 1), np.uint8))
    assert "--fresh" in caught.value.hint
