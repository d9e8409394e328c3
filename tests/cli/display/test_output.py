"""Numbers, times and parameters in words."""

from __future__ import annotations

import pytest

from hpo.cli.output import parse_duration, plain, show_bytes, show_parameters
from hpo.report.text import duration, short_paths


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("90", 90),
        ("45s", 45),
        ("30m", 1800),
        ("30min", 1800),
        ("1h", 3600),
        ("1h30m", 5400),
        ("1.5h", 5400),
        ("2m 5s", 125),
    ],
)
def test_durations_are_read_as_people_write_them(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-5", "soon", "1d", "1.2.3h", "m", "1h-5m"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not a time"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "0.012 s"), (3.14, "3.1 s"), (59.7, "1 min 00 s"), (125, "2 min 05 s"), (7500, "2 h 05 min")],
)
def test_seconds_are_shown_in_the_unit_that_fits(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bytes_are_shown_in_the_unit_that_fits() -> None:
    assert [show_bytes(count) for count in (12, 3400, 512e6, 1.25e9, 2e15)] == [
        "12 B",
        "3.4 kB",
        "512 MB",
        "1.2 GB",
        "2000.0 TB",
    ]


def test_short_paths_are_the_shortest_that_stay_different() -> None:
    paths = ["model.dropout", "head.dropout", "training.optimizer.name", "training.optimizer.lr", "model.kind"]
    assert list(short_paths(paths).values()) == ["model.dropout", "head.dropout", "optimizer", "lr", "model"]


def test_parameters_are_shown_to_three_digits() -> None:
    shown = show_parameters({"model.hidden": [512, 256], "training.optimizer.lr": 0.00123456, "model.batch_norm": True})
    assert shown == "hidden=[512,256] lr=0.00123 batch_norm=true"


def test_numbers_that_json_lacks_become_null() -> None:
    assert plain({"a": float("nan"), "b": [float("inf"), 1.5]}) == {"a": None, "b": [None, 1.5]}
