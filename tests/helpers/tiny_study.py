"""A tiny study, a tiny network exported as the platform exports one, and records to feed a tracker with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hpo.records import Candidate, DataCard, Epoch, SplitCard, StudyResult, Trial, TrialResult, TrialState
from hpo.spec.load import parse_study
from hpo.spec.study import StudySpec

CLASSES = ("cat", "dog", "owl")
SHAPE = (8, 8, 3)


def export_net(folder: Path, shape: tuple[int, int, int] = SHAPE) -> Path:
    """net.pt2 and config.json of a linear softmax classifier: uint8 (n, h, w, c) -> float32 (n, 3)."""
    import torch

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(shape[0] * shape[1] * shape[2], len(CLASSES))

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return self.linear(images.flatten(1).float() / 255.0 - 0.5).softmax(1)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Net().eval()
    example = torch.zeros((2, *shape), dtype=torch.uint8)
    program = torch.export.export(net, (example,), dynamic_shapes=({0: torch.export.Dim("images")},))
    folder.mkdir(parents=True, exist_ok=True)
    torch.export.save(program, folder / "net.pt2")
    config = {"class_names": CLASSES, "image_shape": shape, "mean": [0.5] * shape[2], "std": [1.0] * shape[2]}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "setup.json").write_text("{}")
    return folder


def spec(name: str = "tiny") -> StudySpec:
    return parse_study(
        {
            "name": name,
            "question": "Which rate is best?",
            "data": {"name": "digits"},
            "model": {"kind": "mlp", "hidden": [16, 8]},
            "search": {"space": {"training.optimizer.lr": {"float": [1e-4, 1e-1], "log": True}}},
        }
    )


def data() -> DataCard:
    return DataCard(
        name="digits",
        folder="prepared",
        test_folder="sealed",
        digest="sha256:" + "ab" * 32,
        class_names=CLASSES,
        image_shape=SHAPE,
        development_count=1400,
        test_count=397,
        valid_start=None,
        official=True,
        source="scikit-learn",
    )


def split() -> SplitCard:
    return SplitCard({"train": 1100, "valid": 300, "test": 397}, {"train": (0.3, 0.3, 0.4)})


def candidate(number: int, **changes: Any) -> Candidate:
    values = {"ordinal": number, "parameters": {"training.optimizer.lr": 0.01 / (number + 1)}, "seed": 100 + number}
    return Candidate(number, **{**values, **changes})


def epochs(count: int, *, fold: int = 0) -> tuple[Epoch, ...]:
    return tuple(
        Epoch(n, {"train_loss": 1.0 / n, "valid_loss": 1.1 / n, "valid_accuracy": 1 - 0.5 / n}, 0.01, 0.25, fold)
        for n in range(1, count + 1)
    )


def result(number: int, state: TrialState = TrialState.COMPLETE, *, count: int = 3, **changes: Any) -> TrialResult:
    values: dict[str, Any] = {"epochs": epochs(count), "settings": {"device": "cpu", "precision": "float32"}}
    if state is TrialState.COMPLETE:
        values |= {
            "value": 0.9 + number / 1000,
            "best_epoch": count,
            "scores": {"valid_accuracy": 0.9 + number / 1000, "valid_loss": 0.4},
            "parameter_count": 579,
            "confusion": ((5, 1, 0), (0, 6, 0), (1, 0, 7)),
            "seconds": 1.5,
        }
    return TrialResult(number, state, **{**values, **changes})


def trial(number: int, state: TrialState = TrialState.COMPLETE, **changes: Any) -> Trial:
    ended = state.finished or state is TrialState.STOPPED
    outcome = result(number, state, **changes) if ended else None
    return Trial(candidate(number), state, outcome, started=1_700_000_000.0 + 10 * number, run_seconds=5.0)


def study(*trials: Trial, name: str = "tiny", generation: int = 1, created: float = 1.7e9) -> StudyResult:
    return StudyResult(
        name=name,
        generation=generation,
        direction="maximize",
        objective="valid_accuracy",
        trials=trials,
        spec=spec(name).model_dump(mode="json"),
        data_digest=data().digest,
        created=created,
    )
