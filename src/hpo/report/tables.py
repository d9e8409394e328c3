"""What a confusion matrix says of each class."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def classification_report(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> dict[str, Any]:
    """(true, predicted) counts -> precision, recall, f1 in [0, 1] and support of each class, their means, the accuracy.

    A share of nothing is 0. macro_average is the plain mean over classes, weighted_average weighs by support.
    """
    total = sum(map(sum, confusion))
    classes: dict[str, dict[str, float]] = {}
    for index, name in enumerate(class_names):
        hits = confusion[index][index]
        true = sum(confusion[index])
        predicted = sum(row[index] for row in confusion)
        classes[name] = {
            "precision": hits / predicted if predicted else 0.0,
            "recall": hits / true if true else 0.0,
            "f1": 2 * hits / (true + predicted) if true + predicted else 0.0,
            "support": true,
        }
    rows = list(classes.values())
    scores = ("precision", "recall", "f1")
    return {
        "classes": classes,
        "macro_average": {score: sum(row[score] for row in rows) / len(rows) for score in scores},
        "weighted_average": {
            score: sum(row[score] * row["support"] for row in rows) / total if total else 0.0 for score in scores
        },
        "accuracy": sum(confusion[index][index] for index in range(len(class_names))) / total if total else 0.0,
        "support": total,
    }


def report_text(report: dict[str, Any]) -> str:
    """A classification report as an aligned table."""
    width = max(16, *(len(name) for name in report["classes"]))
    lines = [f"{'':{width}}  precision    recall        f1   support", ""]
    for name, row in report["classes"].items():
        lines.append(_line(name, width, row, row["support"]))
    lines.append("")
    means = ("macro_average", "weighted_average")
    lines += [_line(name.replace("_", " "), width, report[name], report["support"]) for name in means]
    lines.append(f"{'accuracy':{width}}  {'':9} {'':9} {report['accuracy']:9.4f} {report['support']:9}")
    return "\n".join(lines) + "\n"


def _line(name: str, width: int, row: dict[str, float], support: float) -> str:
    return f"{name:{width}}  {row['precision']:9.4f} {row['recall']:9.4f} {row['f1']:9.4f} {support:9}"
