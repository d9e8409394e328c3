"""The measured speed of a training, from which trials and epochs are fitted to minutes."""

import time

import pytest

from hpo.data.prepare import prepare
from hpo.spec.load import load_study
from hpo.training import preflight
from hpo.training.loop import predict_logits


def test_an_epoch_has_all_steps_and_one_pass_through_the_validation_images(monkeypatch, digits_cache):
    monkeypatch.setenv("HPO_DATA", str(digits_cache))
    spec = load_study("digits-mlp", overrides={"training.batch_size": 64})
    card = prepare(spec.data, spec.split)
    seen = []

    def slowly(net, data, rows, **options):
        seen.append(len(rows))
        time.sleep(0.25)
        return predict_logits(net, data, rows, **options)

    monkeypatch.setattr(preflight, "predict_logits", slowly)
    monkeypatch.setattr("hpo.training.loop.predict_logits", lambda *_, **__: pytest.fail("an epoch was validated"))
    speed = preflight.measure_speed(spec.setup, card, device_name="cpu", seed=0, threads=1)
    valid = round(0.2 * card.development_count)
    steps = -(-(card.development_count - valid) // 64)
    assert seen == [pytest.approx(valid, abs=5)]
    assert 0.25 <= speed.epoch_seconds - steps * speed.batch_seconds < speed.epoch_seconds
    assert speed.batch_seconds > 0
