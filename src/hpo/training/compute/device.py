"""Which devices there are, and which a request means."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hpo.errors import HpoError


def resolve_devices(request: str) -> list[str]:
    """`auto`, cpu, cuda, cuda:N or mps -> names of the devices to use, at least one.

    auto: all GPUs, else mps, else cpu; cuda: all GPUs. Raises HpoError for a device that is not here.
    """
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    mps = ["mps"] if torch.backends.mps.is_available() else []
    here = {"auto": gpus or mps or ["cpu"], "cpu": ["cpu"], "cuda": gpus, "mps": mps} | {gpu: [gpu] for gpu in gpus}
    if not here.get(request):
        present = ", ".join(["auto", "cpu", *(["cuda"] if gpus else []), *gpus, *mps])
        raise HpoError(f"--device {request}: there is no such device here.", f"Choose one of: {present}.")
    return here[request]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with so many CPU threads for the length of the block."""
    before = torch.get_num_threads()
    use_threads(count)
    try:
        yield
    finally:
        use_threads(before)


def use_threads(count: int) -> None:
    """Let torch compute with so many CPU threads in this process."""
    torch.set_num_threads(count)


def device_clock(device: torch.device) -> Callable[[], float]:
    """A clock for computing on device, in seconds: CPU seconds of this thread on a CPU, else wall seconds.

    On a CPU other processes do not count. Elsewhere each reading waits until the device has finished.
    """
    if device.type == "cpu":
        return time.thread_time

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
        return time.perf_counter()

    return now
