"""Transfer learning: pretrained bodies, which may be frozen, and a new head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from hpo.errors import ModelError
from hpo.models.backbones import AnyBackbone, Backbone, build_backbone, check_channels, shared_backbone, stages
from hpo.models.basic import dense_layers
from hpo.spec.models import Freeze, FusionSpec, TimmBackbone, TorchvisionBackbone, TorchvisionSpec, TransferSpec, Tuned


class Transfer(nn.Module):
    """Features of one or several bodies side by side, and a head. It takes pixels in [0, 1]: bodies normalise.

    What is frozen stays in evaluation mode, so that running means and dropout stay as they are.
    """

    def __init__(self, bodies: list[Backbone], head: nn.Module, *, freeze: Freeze, unfreeze_epoch: int | None) -> None:
        super().__init__()
        self.bodies = nn.ModuleList(bodies)
        self.head = head
        self.unfreeze_epoch = unfreeze_epoch
        self._frozen = [part for body in bodies for part in _frozen_parts(body, freeze)]
        for part in self._frozen:
            part.requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) in [0, 1] -> logits (n, classes)."""
        logits: Tensor = self.head(torch.cat([body(images) for body in self.bodies], dim=1))
        return logits

    def train(self, mode: bool = True) -> Transfer:
        """As always, but what is frozen stays in evaluation mode."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    @property
    def frozen_bodies(self) -> list[int]:
        """The places of the bodies that are frozen as a whole."""
        return [place for place, body in enumerate(self.bodies) if any(body is part for part in self._frozen)]

    def begin_epoch(self, number: int) -> None:
        """Let everything train from unfreeze_epoch on."""
        if self.unfreeze_epoch is not None and number >= self.unfreeze_epoch:
            for part in self._frozen:
                part.requires_grad_(True)
            self._frozen = []


def transfer_of(net: nn.Module) -> Transfer | None:
    """The Transfer module of a network, if it has one."""
    return next((part for part in net.modules() if isinstance(part, Transfer)), None)


def _frozen_parts(body: Backbone, freeze: Freeze) -> list[nn.Module]:
    if freeze == "none":
        return []
    if freeze == "all":
        return [body]
    parts = stages(body)
    if freeze >= len(parts):
        raise ValueError(f"freeze {freeze}: {body.label} has {len(parts)} stages. Give a smaller number, or all")
    return parts[:freeze]


def build_transfer(
    spec: Tuned,
    image_shape: tuple[int, int, int],
    outputs: int,
    *,
    loaded: bool = True,
    registered: Callable[..., tuple[nn.Module, dict[str, Any]]],
) -> nn.Module:
    """The bodies that spec names, with their weights where loaded is True, and a fresh head.

    registered(uri, weights=loaded) loads a model of the store and its config, for spec.kind transfer.
    """
    check_channels(image_shape[2])
    before = torch.get_rng_state()
    if isinstance(spec, TransferSpec):
        bodies = [_body_of(spec.from_model, *registered(spec.from_model, weights=loaded))]
    else:
        pool = spec.pool if isinstance(spec, FusionSpec) else None
        bodies = [_body(each, spec, side=min(image_shape[:2]), pool=pool, loaded=loaded) for each in _named(spec)]
    # The head's first weights must not depend on whether a body was made or remembered.
    torch.set_rng_state(before)
    height, width, channels = image_shape
    with torch.inference_mode():
        black = torch.zeros(2, channels, height, width)
        # A shared body is where the last training had it.
        features = sum(body.eval()(black.to(body.mean.device)).shape[1] for body in bodies)
    layers: list[nn.Module] = [nn.BatchNorm1d(features)] if spec.batch_norm else []
    layers += [nn.Dropout(spec.dropout)] if spec.dropout else []
    layers += dense_layers(
        features, spec.dense, activation=spec.activation, dropout=spec.dropout, batch_norm=spec.batch_norm
    )
    head = nn.Sequential(*layers, nn.Linear(spec.dense[-1] if spec.dense else features, outputs))
    return Transfer(bodies, head, freeze=spec.freeze, unfreeze_epoch=spec.unfreeze_epoch).train()


def _named(spec: Tuned) -> list[AnyBackbone]:
    if isinstance(spec, FusionSpec):
        return list(spec.backbones)
    kind = TorchvisionBackbone if isinstance(spec, TorchvisionSpec) else TimmBackbone
    return [kind.model_validate({field: getattr(spec, field) for field in kind.model_fields})]


def _body(named: AnyBackbone, spec: Tuned, *, side: int, pool: int | None, loaded: bool) -> Backbone:
    if spec.frozen and loaded:
        return shared_backbone(named, side=side, pool=pool)
    return build_backbone(named, side=side, pool=pool, loaded=loaded)


def _body_of(uri: str, net: nn.Module, config: dict[str, Any]) -> Backbone:
    """All layers of a model of the store up to its last maps, which are flattened."""
    net = getattr(net, "net", net)  # of a binary network
    layers = list(net.children())
    flat = next((place for place, layer in enumerate(layers) if isinstance(layer, nn.Flatten)), 0)
    if not isinstance(net, nn.Sequential) or not any(isinstance(part, nn.Conv2d) for part in net[:flat].modules()):
        raise ModelError(
            f"model.from_model: {uri} has no convolutions before its first dense layer.",
            "Name a model of a cnn, convnet or resnet study.",
        )
    return Backbone(net[: flat + 1], mean=config["mean"], std=config["std"], label=f"model {uri}")
