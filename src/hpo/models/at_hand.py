"""Pretrained networks whose weights are on this machine already, so that nothing need be downloaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hpo.errors import DataError, SpecError
from hpo.spec.models import TimmBackbone, TorchvisionBackbone

AnyBackbone = TorchvisionBackbone | TimmBackbone
# Small networks first: on a CPU, their features of a thousand images take seconds.
_USUAL = (
    *(("timm", name) for name in ("tf_efficientnet_lite0", "efficientnet_b0", "mobilenetv3_large_100")),
    *(("torchvision", name) for name in ("mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "resnet18")),
    *(("torchvision", name) for name in ("resnet50", "convnext_tiny")),
)


def backbones_at_hand() -> list[AnyBackbone]:
    """The usual networks whose published weights are in the caches of torchvision and of the Hugging Face hub."""
    return list(_found())


def _found() -> Iterator[AnyBackbone]:
    import timm
    import torch
    from huggingface_hub import try_to_load_from_cache
    from torchvision import models

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    for kind, name in _USUAL:
        if kind == "torchvision":
            url = models.get_model_weights(name).DEFAULT.url
            if (folder / url.rpartition("/")[2]).is_file():
                yield TorchvisionBackbone(kind="torchvision", name=name, levels="all")
        elif facts := timm.get_pretrained_cfg(name):
            names = [facts.hf_hub_filename] if facts.hf_hub_filename else ["model.safetensors", "pytorch_model.bin"]
            if any(isinstance(try_to_load_from_cache(facts.hf_hub_id, each), str) for each in names):
                yield TimmBackbone(kind="timm", name=name, levels="all")


def backbone_from(text: str) -> AnyBackbone:
    """The network in a text NAME=FILE, of torchvision where it has one of that name, else of timm.

    Raises SpecError for another text, DataError where there is no such file.
    """
    import timm
    from torchvision import models

    name, _, file = text.partition("=")
    place = Path(file).expanduser()
    if not name or not file:
        raise SpecError(f"--weights {text}: not of the form NAME=FILE.", "For example: mobilenet_v2=weights.pth")
    if not place.is_file():
        raise DataError(f"--weights {text}: no such file.", "Give a .safetensors or .pth file of this network.")
    if name in models.list_models(module=models):
        return TorchvisionBackbone(kind="torchvision", name=name, weights=str(place.absolute()), levels="all")
    if timm.is_model(name):
        return TimmBackbone(kind="timm", name=name, weights=str(place.absolute()), levels="all")
    raise SpecError(f"--weights {text}: neither torchvision nor timm has a classifier {name!r}.", "Correct the name.")
