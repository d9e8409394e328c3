"""How sure a model is: its calibration, its views, and its accuracy where unsure answers are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from hpo.records import TrialResult
from hpo.report.page import escape, table
from hpo.report.statistics import accuracy_at_coverage


def of_program(result: TrialResult, record: Mapping[str, Any]) -> TrialResult:
    """A trial's result with the scores and the confusion of its exported program, where those are not its network's.

    record is what was decided at its export (hpo.models.answers); only views change what a model answers.
    """
    if not (program := record.get("program")):
        return result
    confusion = tuple(tuple(row) for row in program["confusion"])
    return replace(result, scores={**result.scores, **program["scores"]}, confusion=confusion)


def calibration(record: Mapping[str, Any]) -> str:
    """What was decided on validation images beside the network: temperature and views (hpo.models.answers)."""
    parts = []
    if found := record.get("calibration"):
        (error, after), change = found["error"], found["difference"]
        decided = (
            f"a temperature of {found['temperature']:.3f} is part of the model" if found["used"] else "none is used"
        )
        parts.append(
            f"Temperature: {decided}. Calibration error {error:.4f} without, {after:.4f} with one; cross-entropy "
            f"{change['value']:+.4f} (95 % interval {change['low']:+.4f} to {change['high']:+.4f}; "
            f"{found['images']:,} validation images, each half judged with the temperature of the other half)."
        )
    if found := record.get("views"):
        loss, accuracy, times = found["loss"], found["accuracy"], found["latency_ms"]
        decided = (
            f"the mean of {len(found['views'])} views: {'; '.join(found['views'])}" if found["used"] else "none is used"
        )
        cost = f", {times['views']:.2f} ms an image in place of {times['plain']:.2f}" if found["used"] else ""
        parts.append(
            f"Views: {decided}{cost}. Cross-entropy {loss['value']:+.4f} ({loss['low']:+.4f} to {loss['high']:+.4f}), "
            f"accuracy {100 * accuracy['value']:+.2f} points ({100 * accuracy['low']:+.2f} to "
            f"{100 * accuracy['high']:+.2f}), each half judged with the views that were best on the other half."
        )
    if record.get("program"):
        parts.append(
            "All scores, tables and pictures of the model on this page are of the mean over views. The training "
            "curves, and what the search compares, are of the network on the image as it is."
        )
    return "".join(f"<p>{escape(part)}</p>" for part in parts)


def coverage(labels: NDArray[Any], probabilities: NDArray[Any]) -> str:
    """A table of what refusing the least sure answers gives, on validation images (n,), (n, classes)."""
    curve = accuracy_at_coverage(labels, probabilities)
    rows = []
    for share in (1.0, 0.95, 0.9, 0.8):
        threshold, accuracy = curve.at(share)
        rows.append((f"{share:.0%}", "0" if share == 1 else f"{threshold:.4f}", f"{accuracy:.4f}"))
    return table((">answered", ">refuse below", ">accuracy"), rows)
