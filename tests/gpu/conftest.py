"""The device of the GPU suite; HPO_TEST_DEVICE=cpu tries the logic of its tests where there is no GPU."""

import os
import tempfile
from pathlib import Path

import filelock
import pytest
import torch

from digits_fixtures import digits, digits_card, few  # noqa: F401


@pytest.fixture(scope="session")
def device() -> str:
    asked = os.environ.get("HPO_TEST_DEVICE", "cuda:0")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    return asked


@pytest.fixture(autouse=True)
def alone(device):
    """One test at a time on the GPU, whatever pytest-xdist does: some look at its free memory."""
    with filelock.FileLock(Path(tempfile.gettempdir()) / "hpo-gpu-tests.lock"):
        yield


@pytest.fixture
def cuda(device) -> str:
    if not device.startswith("cuda"):
        pytest.skip("only a GPU can show this")
    return device
