"""Two classes from a network of one output."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class OneLogit(nn.Module):
    """A network of one output z (n, 1) as one of two logits [0, z] (n, 2).

    softmax([0, z])[1] = sigmoid(z), so cross-entropy on these logits is binary cross-entropy on z.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        """Images (n, channels, height, width) -> logits (n, 2); the second class is the one that z speaks for."""
        return functional.pad(self.net(images), (1, 0))
