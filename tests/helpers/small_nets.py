"""Small networks of both libraries with weights in a file, as if somebody had trained them."""

from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torchvision import models

SQUEEZE = {"kind": "torchvision", "name": "shufflenet_v2_x0_5"}
TINY = {"kind": "timm", "name": "test_efficientnet"}


def weights_file(net: dict[str, str], folder: Path, *, seed: int = 0) -> Path:
    """A file of whole random weights, the classifier of 1,000 classes included, and running means of its own."""
    torch.manual_seed(seed)
    timm_kind = net["kind"] == "timm"
    made = timm.create_model(net["name"]) if timm_kind else models.get_model(net["name"], weights=None)
    for name, buffer in made.named_buffers():
        if name.endswith("running_mean"):
            buffer.copy_(torch.randn_like(buffer) * 0.1)
    state = {name: tensor.contiguous() for name, tensor in made.state_dict().items()}
    file = folder / f"{net['name']}-{seed}.{'safetensors' if timm_kind else 'pth'}"
    if timm_kind:
        save_file(state, file)
    else:
        torch.save(state, file)
    return file
