"""How long a network takes for one image."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import nn

from hpo.data.prepare import TrialData
from hpo.models import input_of


def latency_ms(net: nn.Module, data: TrialData, *, repeats: int = 30) -> float:
    """Milliseconds for one image through the network on its device, float32: the median of `repeats` runs."""
    net.eval()
    image = input_of(data)(data.images[data.train[:1]])
    seconds = []
    with torch.no_grad():
        for _ in range(3 + repeats):  # the first three warm up
            started = time.perf_counter()
            net(image).sum().item()
            seconds.append(time.perf_counter() - started)
    return 1000 * median(seconds[3:])
