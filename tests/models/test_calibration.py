"""A temperature makes probabilities honest and changes no answer."""

from __future__ import annotations

import math

import pytest
import torch

from hpo.metrics import calibration_error
from hpo.models.calibration import (
    Difference,
    at_temperature,
    calibration_of,
    cross_entropies,
    cross_fitted,
    fit_temperature,
)


def drawn(count: int = 4000, classes: int = 5, *, factor: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels drawn from the softmax of logits, and the softmax of these times factor, which is too sure above 1."""
    generator = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(count, classes, generator=generator)
    labels = torch.multinomial(logits.softmax(1), 1, generator=generator).squeeze(1)
    return (factor * logits).softmax(1), labels


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_undoes_a_factor_of_the_logits(factor):
    probabilities, labels = drawn(factor=factor)
    assert fit_temperature(probabilities, labels) == pytest.approx(factor, rel=0.1)


def test_no_other_temperature_has_a_lower_cross_entropy():
    probabilities, labels = drawn(factor=3.0)
    best = fit_temperature(probabilities, labels)
    losses = {
        temperature: float(cross_entropies(at_temperature(probabilities, temperature), labels).mean())
        for temperature in (0.9 * best, best, 1.1 * best)
    }
    assert min(losses, key=losses.__getitem__) == best


def test_a_temperature_on_probabilities_is_one_on_logits():
    logits = 5 * torch.randn(100, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(at_temperature(logits.softmax(1), 2.5), (logits / 2.5).softmax(1))


@pytest.mark.parametrize("temperature", [0.2, 0.9, 1.7, 8.0])
def test_no_answer_changes(temperature):
    probabilities, _ = drawn(factor=3.0)
    assert torch.equal(at_temperature(probabilities, temperature).argmax(1), probabilities.argmax(1))


def test_certain_answers_stay_finite():
    probabilities = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert at_temperature(probabilities, 10.0).isfinite().all()
    assert math.isfinite(fit_temperature(probabilities, torch.tensor([1, 0])))


def test_overconfident_answers_are_calibrated_and_judged_on_other_images_than_they_were_fitted_on():
    probabilities, labels = drawn(factor=3.0)
    found = calibration_of(probabilities, labels)
    assert found is not None
    assert found.used
    assert found.error[1] < 0.2 * found.error[0]
    again = float(calibration_error(cross_fitted(probabilities, labels).log(), labels))
    assert found.error[1] == pytest.approx(again)


def test_a_temperature_that_gains_nothing_beyond_chance_is_not_used():
    probabilities, labels = drawn(count=300)
    found = calibration_of(probabilities, labels)
    assert found is not None
    assert not found.used


def test_few_images_calibrate_nothing():
    assert calibration_of(*drawn(count=99)) is None


def test_an_interval_holds_its_mean():
    difference = Difference.of(torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert difference.low < difference.value == 1.5 < difference.high
