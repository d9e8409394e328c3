"""Seconds from the command to a registered model of a test accuracy, for the platform and for the peer.

Both search as they normally do: the platform by its shipped study, the peer by TPE and MedianPruner over the space of
peer.py, both with as many epochs as the shipped study has. A search ends at the first trial whose validation accuracy
is MARGIN above the test accuracy, since the best of several trials is a lucky one. Then the accuracy of the registered
model on the test part is measured, once for each side.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from against_peer import PEER, lines_of

STUDIES = Path(__file__).parents[1] / "studies"
MARGIN = 0.01


def run_platform(model: str, data: Path, until: float, folder: Path, limit: float) -> tuple[float, str]:
    """Seconds of `hpo run`, and what came of it."""
    spec: dict[str, Any] = yaml.safe_load((STUDIES / f"bloodmnist-{model}.yaml").read_text(encoding="utf-8"))
    spec["data"] = {"name": "npz", "path": str(data)}
    spec["search"] |= {"until": until, "trials": 1000}
    spec.pop("final", None)
    file = folder / "until.yaml"
    file.write_text(yaml.safe_dump(spec), encoding="utf-8")
    command = [sys.executable, "-m", "hpo", "run", str(file), "--home", str(folder), "--json", "--timeout", str(limit)]
    events, seconds = lines_of(command, folder)
    return seconds, f"{sum(event['event'] == 'trial_ended' for _, event in events)} trials"


def run_peer(model: str, data: Path, until: float, folder: Path, limit: float) -> tuple[float, str]:
    """Seconds of the peer's script, and what came of it."""
    epochs = yaml.safe_load((STUDIES / f"bloodmnist-{model}.yaml").read_text(encoding="utf-8"))["training"]["epochs"]
    options = {"data": data, "model": model, "epochs": epochs, "until": until, "limit": limit}
    command = [sys.executable, str(PEER)]
    for name, value in options.items():
        command += [f"--{name}", str(value)]
    records, seconds = lines_of(command, folder)
    return seconds, f"{len(records)} trials"


def accuracy_on_test(folder: Path, data: Path, *, ours: bool) -> float:
    """Of the model that a side has registered, loaded through MLflow."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{folder / 'mlruns' / 'mlflow.db' if ours else folder / 'mlflow.db'}")
    with np.load(data) as arrays:
        images, labels = arrays["test_images"], arrays["test_labels"].ravel()
        pixels = arrays["train_images"] / np.float32(255)
    version = max(mlflow.MlflowClient().search_model_versions(), key=lambda found: int(found.version))
    model = mlflow.pyfunc.load_model(f"models:/{version.name}/{version.version}")
    if not ours:  # its network takes images that are normalised already
        mean, std = pixels.mean(axis=(0, 1, 2), dtype=float), pixels.std(axis=(0, 1, 2), dtype=float)
        images = ((images / np.float32(255) - mean) / std).astype(np.float32).transpose(0, 3, 1, 2)
    scores = [np.asarray(model.predict(images[start : start + 256])) for start in range(0, len(images), 256)]
    return float((np.concatenate(scores).argmax(1) == labels).mean())


def compare(model: str, data: Path, *, score: float, limit: float) -> None:
    """Print seconds, trials and test accuracy of both sides; limit is in seconds, for each search."""
    took = {}
    for name, run in (("platform", run_platform), ("peer", run_peer)):
        with tempfile.TemporaryDirectory() as folder:
            took[name], text = run(model, data, score + MARGIN, Path(folder), limit)
            found = accuracy_on_test(Path(folder), data, ours=name == "platform")
        reached = "reached" if found >= score else "not reached"
        print(f"{model}, {name}: {took[name]:.1f} s, {text}; test accuracy {found:.4f}: {score} {reached}", flush=True)
    print(f"{model}: ratio {took['peer'] / took['platform']:.1f}; searched until {score + MARGIN:.4f} in validation")
