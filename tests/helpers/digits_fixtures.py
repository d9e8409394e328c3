"""The digits as trials see them, small enough for many trainings."""

from dataclasses import replace

import pytest
import torch

from hpo.data.prepare import TrialData, open_trial
from hpo.spec.study import DataSpec, SplitSpec

DIGITS, SPLIT = DataSpec(name="digits"), SplitSpec(kind="holdout")


@pytest.fixture(scope="module")
def digits_card(card):
    return card


@pytest.fixture(scope="module")
def digits(digits_card) -> TrialData:
    torch.set_num_threads(1)
    return open_trial(digits_card, SPLIT, device=torch.device("cpu"))


@pytest.fixture
def few(digits) -> TrialData:
    # Batches of 32 leave a smaller one, and not of one image.
    return replace(digits, train=digits.train[:330], valid=digits.valid[:200])
