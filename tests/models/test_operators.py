"""The operators that a program may have: each kind of network and each layer of torch is exported into the list."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as f

from hpo.models import build_model, traced
from hpo.models.basic import ACTIVATIONS
from hpo.models.interpreter import Graph
from hpo.models.safe_loader import LAYERS, UNMARKED, is_plain
from hpo.spec import models as specs

pytestmark = pytest.mark.slow  # a minute of exports
SHAPE = (16, 16, 3)
CONFIG = {"image_shape": SHAPE, "mean": [0.5] * 3, "std": [0.2] * 3}


def networks() -> Iterator[Any]:
    """Every kind that a study can name, but for a network of its own, with each of its parts."""
    for activation in ACTIVATIONS:
        yield specs.MlpSpec(kind="mlp", hidden=4, batch_norm=True, dropout=0.5, activation=activation)
    for kind in ("max", "average"):
        yield specs.CnnSpec(kind="cnn", filters=4, pool="global", pool_type=kind, dropout=0.5)
        yield specs.ConvnetSpec(kind="convnet", width=4, depth=2, pool=kind, batch_norm=True, dense=[4])
    yield specs.ConvnetSpec(kind="convnet", width=4, depth=2, pool="stride", padding="valid", head="global")
    yield specs.ResnetSpec(kind="resnet", width=4, blocks=1, dropout=0.5)
    yield specs.TorchvisionSpec(kind="torchvision", name="mobilenet_v3_small", weights="none", input_size=32)
    yield specs.TimmSpec(kind="timm", name="test_vit", weights="none", input_size=160)
    bodies = [
        specs.TorchvisionBackbone(kind="torchvision", name="mobilenet_v2", weights="none", levels="all"),
        specs.TimmBackbone(kind="timm", name="test_resnet", weights="none", input_size=8),
    ]
    yield specs.FusionSpec(kind="fusion", backbones=bodies, pool=2, batch_norm=True, dropout=0.1)


def emitted(program: torch.export.ExportedProgram) -> set[str]:
    """The operators of aten in a program, as relu.default."""
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    return {str(target).removeprefix("aten.") for target in targets if isinstance(target, torch._ops.OpOverload)}


def unknown(operators: set[str]) -> set[str]:
    return {name for name in operators if name not in LAYERS | UNMARKED and not is_plain(*name.split("."))}


def check_answers(program: torch.export.ExportedProgram, images: Tensor, file: Path) -> None:
    """Our loop over the operators of a program computes what torch makes of it, to the last bit."""
    torch.export.save(program, file)
    with torch.inference_mode():
        found, wanted = Graph(file)(images.clone()), torch.export.load(file).module()(images.clone())
    assert torch.equal(found, wanted), program


@pytest.fixture(scope="module")
def of_networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    file = tmp_path_factory.mktemp("networks") / "net.pt2"
    images = torch.randint(0, 256, (5, *SHAPE), dtype=torch.uint8)
    for spec in networks():
        for binary in (False, True):
            net = build_model(spec, image_shape=SHAPE, classes=2, seed=0, binary=binary).eval()
            config = {**CONFIG, **({"several_labels": True} if binary else {})}
            program = traced(net, config)
            found.setdefault(spec.kind, set()).update(emitted(program))
            check_answers(program, images, file)
    return found


ROWS, WORDS, MAPS, CUBES = (3, 4), (3, 6, 4), (3, 4, 8, 8), (3, 4, 4, 4, 4)
PLAIN = [nn.CELU, nn.ELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6]
PLAIN += [nn.SELU, nn.SiLU, nn.Dropout]
CURVED = [nn.GELU, nn.GLU, nn.Hardshrink, nn.LogSigmoid, nn.PReLU, nn.Sigmoid, nn.Softplus, nn.Softshrink, nn.Softsign]
CURVED += [nn.Tanh, nn.Tanhshrink, nn.AlphaDropout, nn.FeatureAlphaDropout]
ATTENTION = nn.MultiheadAttention(4, 2, batch_first=True)
# What networks of people's own and of the libraries are written with, by the shape of what it is tried on.
LAYERS_OF_OWN: dict[tuple[int, ...], list[Callable[[Tensor], Any]]] = {
    ROWS: [
        *(layer() for layer in PLAIN + CURVED),
        *(layer(inplace=True) for layer in PLAIN),
        *[nn.Linear(4, 3), nn.BatchNorm1d(4), nn.Softmax(1), nn.LogSoftmax(1), nn.Softmin(1), nn.Threshold(0.1, 2.0)],
        *[nn.RMSNorm(4), nn.LayerNorm(4), nn.Unflatten(1, (2, 2))],
        *[
            lambda x: nn.CosineSimilarity()(x, x),
            lambda x: nn.PairwiseDistance()(x, x),
            lambda x: f.bilinear(x, x, x.new_ones(2, 4, 4)),
        ],
        *[lambda x: x @ x.mT, lambda x: torch.einsum("ab,cb->ac", x, x), lambda x: torch.outer(x[0], x[0])],
        *[lambda x: torch.stack([x, x]), lambda x: torch.cat([x, x]), lambda x: torch.where(x > 0, x, 0.0)],
        *[lambda x: x.masked_fill(x > 0, 0.0), lambda x: f.one_hot((x > 0).long(), 2), lambda x: f.normalize(x)],
        *[lambda x: x.topk(2)[0] + x.sort(1)[0][:, :2], lambda x: x.gather(1, (x > 0).long()), lambda x: x.T],
        *[lambda x: x.std(1) + x.var(1) + x.norm(dim=1), lambda x: x.max(1)[0] + x.min(1)[0] + x.amax(1)],
        *[lambda x: x + torch.arange(4) + torch.zeros(4) + torch.ones(4) + torch.full((4,), 2.0)],
        *[lambda x: x + torch.zeros_like(x) + torch.ones_like(x) + torch.full_like(x, 2.0), lambda x: x @ torch.eye(4)],
        *[lambda x: x + x.new_zeros(4) + x.new_ones(4) + x.new_full((4,), 2.0), lambda x: x.tril() + x.triu()],
        *[lambda x: x.cumsum(1) + x.cumprod(1), lambda x: x.clamp(0, 1).sqrt().pow(2), lambda x: x.tile(1, 2)],
        *[
            lambda x: x.repeat_interleave(2, 1),
            lambda x: x[:, None].expand(-1, 2, -1),
            lambda x: x.expand_as(x).reshape_as(x),
        ],
        *[
            lambda x: x.type_as(x).to(x).to("cpu"),
            lambda x: x.double().half().float(),
            lambda x: x.round().long().float(),
        ],
        *[lambda x: x.logsumexp(1) + x.sum(1) + x.mean() + x.prod(1), lambda x: torch.addmm(x, x, x.new_ones(4, 4))],
        *[lambda x: x.clone().add_(1).mul_(2).sub_(1).div_(x), lambda x: x.reshape(-1, 2, 2).squeeze(-1)],
        *[
            lambda x: x.clone().fill_(1) + x.clone().zero_() + x.clone().copy_(x),
            lambda x: 1 - x,
            lambda x: x.detach().contiguous(),
        ],
        *[
            lambda x: x.index_select(1, torch.tensor([1, 0])),
            lambda x: x[:, torch.tensor([1, 0])] + torch.tensor([1.0]),
        ],
        *[lambda x: x.unfold(1, 2, 1), lambda x: x.movedim(0, 1), lambda x: x + torch.linspace(0, 1, 4)],
        *[lambda x: torch.lerp(x, x, 0.5) + torch.addcmul(x, x, x), lambda x: x.abs().log().exp().rsqrt()],
        *[lambda x: torch.meshgrid(x[0], x[0], indexing="ij"), lambda x: x.view(-1, 2, 2), lambda x: x.narrow(1, 0, 2)],
    ],
    WORDS: [
        *[nn.Conv1d(6, 4, 3), nn.Conv1d(6, 4, 3, padding="same"), nn.ConvTranspose1d(6, 4, 3), nn.InstanceNorm1d(6)],
        *[nn.AvgPool1d(2), nn.MaxPool1d(2), nn.AdaptiveAvgPool1d(2), nn.AdaptiveMaxPool1d(2), nn.LPPool1d(2, 2)],
        *[
            nn.ReflectionPad1d(1),
            nn.ReplicationPad1d(1),
            nn.Upsample(scale_factor=2),
            nn.Upsample(scale_factor=2, mode="linear"),
        ],
        *[nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), lambda x: ATTENTION(x, x, x)],
        *[lambda x: f.scaled_dot_product_attention(x, x, x), lambda x: x.bmm(x.transpose(1, 2)), lambda x: x.unbind(1)],
        *[lambda x: f.embedding((x > 0).long(), x[0]), lambda x: x.swapaxes(1, 2), lambda x: torch.cdist(x, x)],
        *[
            lambda x: torch.baddbmm(x, x, x.new_ones(3, 4, 4)[: x.shape[0]]),
            lambda x: x.split(2, 1),
            lambda x: x.split([2, 4], 1),
        ],
    ],
    MAPS: [
        *[nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding="same"), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)],
        *[
            nn.GroupNorm(2, 4),
            nn.InstanceNorm2d(4),
            nn.LocalResponseNorm(2),
            nn.Softmax2d(),
            nn.Flatten(),
            nn.LPPool2d(2, 2),
        ],
        *[
            nn.MaxPool2d(2),
            nn.AvgPool2d(2),
            nn.AdaptiveAvgPool2d(1),
            nn.AdaptiveMaxPool2d(1),
            nn.Dropout2d(),
            nn.Unfold(2),
        ],
        *[
            nn.ReflectionPad2d(1),
            nn.ReplicationPad2d(1),
            nn.ZeroPad2d(1),
            nn.CircularPad2d(1),
            nn.ConstantPad2d(1, 2.0),
        ],
        *[nn.PixelShuffle(2), nn.PixelUnshuffle(2), nn.ChannelShuffle(2), nn.MaxPool2d(2, return_indices=True)],
        *(nn.Upsample(scale_factor=2, mode=mode) for mode in ("nearest", "bilinear", "bicubic", "nearest-exact")),
        *(lambda x, m=mode: f.interpolate(x, (4, 4), mode=m, antialias=True) for mode in ("bilinear", "bicubic")),
        *[
            lambda x: nn.Fold((8, 8), 8)(x.flatten(2)[..., :1].repeat(1, 16, 1)),
            lambda x: x.roll(1, 2),
            lambda x: x.flip(3),
        ],
        *[
            lambda x: x.chunk(2, 1),
            lambda x: torch.fft.rfft2(x).abs(),
            lambda x: f.grid_sample(x, x[:, :2].movedim(1, 3)),
        ],
    ],
    CUBES: [
        *[nn.Conv3d(4, 4, 3), nn.ConvTranspose3d(4, 4, 3), nn.BatchNorm3d(4), nn.MaxPool3d(2), nn.AvgPool3d(2)],
        *[nn.AdaptiveAvgPool3d(1), nn.Dropout3d(), nn.Upsample(scale_factor=2, mode="trilinear")],
    ],
}


class _Layer(nn.Module):
    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, values: Tensor) -> Any:
        found = self.function(values)
        return found if isinstance(found, Tensor) else found[0]


@pytest.fixture(scope="module")
def of_layers(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    found: set[str] = set()
    file = tmp_path_factory.mktemp("layers") / "net.pt2"
    for shape, functions in LAYERS_OF_OWN.items():
        for function in functions:
            values = torch.rand(shape)
            with torch.no_grad():
                program = torch.export.export(
                    _Layer(function).eval(), (values.clone(),), dynamic_shapes=({0: torch.export.Dim.AUTO},)
                )
            found |= emitted(program)
            check_answers(program, values, file)
    return found


def test_networks_of_each_kind_are_made_of_the_operators_on_the_list(of_networks: dict[str, set[str]]) -> None:
    assert set(of_networks) >= {*specs.FAMILIES} - {"transfer"}  # convolutions of another kind, which are tried here
    lacking = {kind: unknown(found) for kind, found in of_networks.items() if unknown(found)}
    assert lacking == {}, "look at each, then add it to LAYERS in models/safe_loader.py"


def test_the_list_holds_what_layers_need_and_no_more(of_networks: dict[str, set[str]], of_layers: set[str]) -> None:
    everything = of_layers.union(*of_networks.values())
    assert unknown(everything) == set(), "look at each, then add it to LAYERS in models/safe_loader.py"
    assert set() == {name for name in LAYERS if name not in everything or is_plain(*name.split("."))}
