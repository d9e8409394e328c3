"""The device of the GPU suite; HPO_TEST_DEVICE=cpu tries the logic of its tests where there is no GPU."""

import os

import pytest
import torch

from digits_fixtures import digits, digits_card, few  # noqa: F401


@pytest.fixture(scope="session")
def device() -> str:
    asked = os.environ.get("HPO_TEST_DEVICE", "cuda:0")
    if asked.startswith("cuda") and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU")
    return asked


@pytest.fixture
def cuda(device) -> str:
    if not device.startswith("cuda"):
        pytest.skip("only a GPU can show this")
    return device
