"""Fill a budget of minutes: the network, the epochs, the number of trials and the final training that fit into it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hpo.errors import SpecError
from hpo.options import check_minutes

_USED = 0.8  # of the time: a trial that is cut off at the end is lost, and two trainings at once are slower than one
_START = 25.0  # seconds that processes, the first export and the registration take
_PRUNED = 0.6  # of the epochs of a trial are trained, on average, where successive halving ends every second one early
_FINAL = 1.25  # the final training sees the validation images, too
_LAST = 0.5  # of the time at most is for the final training of a network from scratch, the rest for the search
_HURRIED = 0.7, 2  # the same where time is too short for the fastest network, and the trials that are searched then
_MOST_TRIALS = 100
_FEATURES = 0.5  # of the time may be spent on the features of a frozen backbone


@dataclass(frozen=True)
class Preset:
    """What a budget is spent on.

    minutes are used where none are given. epochs are the fewest and most of a final training from scratch, trials the
    fewest of a search, widths the filters of the first block of the networks among which the measured speed decides.
    backbones is the number of frozen networks side by side at most, views that of augmented views of each image that
    they see.
    """

    minutes: float
    epochs: tuple[int, int]
    trials: int
    widths: tuple[int, ...]
    backbones: int
    views: int


PRESETS: Mapping[str, Preset] = {
    "quick": Preset(minutes=3, epochs=(8, 20), trials=2, widths=(16, 24, 32), backbones=1, views=0),
    "good": Preset(minutes=10, epochs=(16, 40), trials=4, widths=(16, 24, 32, 48), backbones=2, views=3),
    "best": Preset(minutes=60, epochs=(30, 80), trials=8, widths=(24, 32, 48, 64, 96), backbones=4, views=5),
}


def budget_of(preset: str, minutes: float | None) -> tuple[Preset, float]:
    """A preset by its name, and the minutes, by default its own. Raises HpoError for values that are neither."""
    if preset not in PRESETS:
        raise SpecError(f"--preset {preset}: is unknown.", f"Choose one of: {', '.join(PRESETS)}.")
    check_minutes(minutes)
    return PRESETS[preset], PRESETS[preset].minutes if minutes is None else minutes


@dataclass(frozen=True)
class Fill:
    """What fits: one of the networks or some of the backbones, and the numbers of the search.

    seconds is the estimate of the whole run on `workers` workers, closing that of its final training; last are the
    epochs of that, 0 for those of the search.
    """

    choice: Any
    epochs: int
    trials: int
    seconds: float
    closing: float
    views: int = 0
    last: int = 0


def usable(minutes: float) -> float:
    """The seconds of a budget that may be planned."""
    return max(10.0, 60 * minutes * _USED - _START)


def fill_from_scratch(
    preset: Preset, minutes: float, workers: int, epoch_seconds: Callable[[Any], float], networks: Sequence[Any]
) -> Fill:
    """The slowest network whose final training is long enough, and how long and how often the search trains it.

    epoch_seconds(network) measures; networks become slower, and none after the first that is too slow is measured.
    Epochs are worth most where they make the model, so the final training has up to half the time.
    """
    budget, least, most = usable(minutes), *preset.epochs
    chosen, seconds = networks[0], epoch_seconds(networks[0])
    for network in networks[1:]:
        slower = epoch_seconds(network)
        if _LAST * budget < least * slower * _FINAL:
            break
        chosen, seconds = network, slower
    share, fewest = (_LAST, preset.trials) if _LAST * budget >= least * seconds * _FINAL else _HURRIED
    last = min(most, max(1, int(share * budget / (_FINAL * seconds))))
    closing = last * seconds * _FINAL
    searched = (budget - closing) * workers / (_PRUNED * seconds)  # epochs
    epochs = min(last, max(1, int(searched / fewest)))
    trials = min(_MOST_TRIALS, max(fewest, int(searched / epochs)))
    total = _START + seconds * trials * epochs * _PRUNED / workers + closing
    return Fill(chosen, epochs, trials, total, closing, last=last if last > epochs else 0)


def fill_frozen(
    preset: Preset,
    minutes: float,
    workers: int,
    features: Sequence[tuple[Any, float]],
    head_seconds: float,
    *,
    epochs: int,
    augmented: bool,
) -> Fill:
    """As many of the backbones as fit, then as many augmented views, then trials of the head with the time left.

    features are the backbones, best first, with the seconds of one worker for all images; the first is always taken.
    head_seconds are those of one epoch of the head.
    """
    budget = usable(minutes)
    chosen, seconds = [features[0][0]], features[0][1] / workers
    for backbone, more in features[1 : preset.backbones]:
        if seconds + more / workers <= _FEATURES * budget:
            chosen.append(backbone)
            seconds += more / workers
    views = min(preset.views, int(_FEATURES * budget / seconds) - 1) if augmented else 0
    views = max(0, views)
    one = epochs * head_seconds
    left = budget - seconds * (1 + views) - _FINAL * one
    trials = min(_MOST_TRIALS, max(preset.trials, int(left * workers / (_PRUNED * one))))
    total = _START + seconds * (1 + views) + one * (trials * _PRUNED / workers + _FINAL)
    return Fill(tuple(chosen), epochs, trials, total, _FINAL * one, views)
