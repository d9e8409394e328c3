"""A hyperparameter search as users write it today: Optuna, torch DataLoaders over PIL images, MLflow's fluent calls.

Complete in itself, and uses nothing of hpo: against_peer.py runs it beside the platform on the same candidates.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import optuna
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
WORKERS = 2
SEED = 0


class Images(Dataset[tuple[Tensor, int]]):
    """One part of an npz file with medmnist's keys; an item is a transformed image and its label."""

    def __init__(self, file: Path, part: str, transform: transforms.Compose) -> None:
        with np.load(file) as arrays:
            self.images = arrays[f"{part}_images"]
            self.labels = arrays[f"{part}_labels"].ravel()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[row])), int(self.labels[row])


def load(file: Path) -> tuple[Images, Images]:
    """The training and the validation part, normalised per channel as the training part asks for."""
    with np.load(file) as arrays:
        pixels = arrays["train_images"] / np.float32(255)
    channels = pixels.reshape(-1, pixels.shape[3] if pixels.ndim == 4 else 1)
    mean, std = channels.mean(axis=0, dtype=float), channels.std(axis=0, dtype=float)
    transform = transforms.Compose([transforms.ToTensor(), transforms.Normalize(mean.tolist(), std.tolist())])
    return Images(file, "train", transform), Images(file, "val", transform)


def suggest(trial: optuna.Trial, kind: str) -> dict[str, Any]:
    if kind == "mlp":
        params: dict[str, Any] = {
            "hidden": trial.suggest_int("hidden", 64, 1024, log=True),
            "dropout": trial.suggest_float("dropout", 0.0, 0.5),
            "batch_size": trial.suggest_categorical("batch_size", [32, 64, 128]),
        }
    else:
        params = {
            "filters": trial.suggest_int("filters", 8, 64, log=True),
            "kernel": trial.suggest_int("kernel", 3, 7, step=2),
            "batch_size": 64,
        }
    params["optimizer"] = trial.suggest_categorical("optimizer", ["sgd", "adam", "adamw"])
    params["lr"] = trial.suggest_float("lr", 1e-4, 1e-2, log=True)
    return params


def build(kind: str, params: dict[str, Any], shape: torch.Size, classes: int) -> nn.Module:
    channels, height, width = shape
    if kind == "mlp":
        return nn.Sequential(
            nn.Flatten(),
            nn.Linear(channels * height * width, params["hidden"]),
            nn.ReLU(),
            nn.Dropout(params["dropout"]),
            nn.Linear(params["hidden"], classes),
        )
    return nn.Sequential(
        nn.Conv2d(channels, params["filters"], params["kernel"], padding="same"),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(params["filters"] * (height // 2) * (width // 2), classes),
    )


def build_optimizer(params: dict[str, Any], net: nn.Module) -> torch.optim.Optimizer:
    if params["optimizer"] == "sgd":
        return torch.optim.SGD(net.parameters(), lr=params["lr"], momentum=0.9)
    if params["optimizer"] == "adam":
        return torch.optim.Adam(net.parameters(), lr=params["lr"])
    return torch.optim.AdamW(net.parameters(), lr=params["lr"], weight_decay=0.0)


def train_epoch(net: nn.Module, loader: DataLoader[Any], optimizer: torch.optim.Optimizer) -> tuple[float, float]:
    """Mean loss and accuracy over the training images, as seen while learning."""
    net.train()
    criterion = nn.CrossEntropyLoss()
    loss_sum, hits, seen = 0.0, 0, 0
    for images, labels in loader:
        images, labels = images.to(DEVICE), labels.to(DEVICE)
        optimizer.zero_grad()
        logits = net(images)
        loss = criterion(logits, labels)
        loss.backward()
        optimizer.step()
        loss_sum += loss.item() * len(labels)
        hits += (logits.argmax(1) == labels).sum().item()
        seen += len(labels)
    return loss_sum / seen, hits / seen


@torch.no_grad()
def evaluate(net: nn.Module, loader: DataLoader[Any]) -> tuple[float, float]:
    """Mean loss and accuracy over the validation images."""
    net.eval()
    criterion = nn.CrossEntropyLoss()
    loss_sum, hits, seen = 0.0, 0, 0
    for images, labels in loader:
        images, labels = images.to(DEVICE), labels.to(DEVICE)
        logits = net(images)
        loss_sum += criterion(logits, labels).item() * len(labels)
        hits += (logits.argmax(1) == labels).sum().item()
        seen += len(labels)
    return loss_sum / seen, hits / seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="npz file with medmnist's keys")
    parser.add_argument("--model", choices=["mlp", "cnn"], default="mlp")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--model-format", choices=["pt2", "pickle"], default="pt2", help="how MLflow stores a network")
    parser.add_argument("--until", type=float, help="search by TPE and MedianPruner until a trial is as good as this")
    parser.add_argument("--limit", type=float, default=float("inf"), help="with --until: seconds for the search")
    parser.add_argument("--candidates", type=Path, help="JSON list of parameters to try, in place of random ones")
    args = parser.parse_args()

    mlflow.set_tracking_uri("sqlite:///mlflow.db")
    mlflow.set_experiment(f"peer-{args.model}")
    train_set, valid_set = load(args.data)
    classes = int(train_set.labels.max()) + 1
    example = torch.stack([train_set[0][0], train_set[1][0]]).numpy()

    def objective(trial: optuna.Trial) -> float:
        params = suggest(trial, args.model)
        torch.manual_seed(SEED)
        train_loader = DataLoader(train_set, batch_size=params["batch_size"], shuffle=True, num_workers=WORKERS)
        valid_loader = DataLoader(valid_set, batch_size=params["batch_size"], num_workers=WORKERS)
        net = build(args.model, params, train_set[0][0].shape, classes).to(DEVICE)
        optimizer = build_optimizer(params, net)
        best = 0.0
        with mlflow.start_run(run_name=f"trial-{trial.number}", nested=True):
            mlflow.log_params({**params, "epochs": args.epochs, "seed": SEED})
            for epoch in range(1, args.epochs + 1):
                train_loss, train_accuracy = train_epoch(net, train_loader, optimizer)
                valid_loss, valid_accuracy = evaluate(net, valid_loader)
                mlflow.log_metric("train_loss", train_loss, step=epoch)
                mlflow.log_metric("train_accuracy", train_accuracy, step=epoch)
                mlflow.log_metric("valid_loss", valid_loss, step=epoch)
                mlflow.log_metric("valid_accuracy", valid_accuracy, step=epoch)
                best = max(best, valid_accuracy)
                if args.until is not None:
                    trial.report(valid_accuracy, step=epoch)
                    if trial.should_prune():
                        raise optuna.TrialPruned
            logged = time.perf_counter()
            # pt2 is MLflow's default and wants an example; of one image, it would take images one by one only.
            model = mlflow.pytorch.log_model(
                net, name="model", input_example=example, serialization_format=args.model_format
            )
            trial.set_user_attr("model_uri", model.model_uri)
            trial.set_user_attr("log_model_seconds", time.perf_counter() - logged)
        return best

    started = time.perf_counter()

    def report(search: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        nonlocal started
        now = time.perf_counter()
        line = {"trial": trial.number, "valid_accuracy": trial.value, "seconds": now - started, **trial.user_attrs}
        print(json.dumps(line), flush=True)
        started = now
        if args.until is not None and trial.value is not None and trial.value >= args.until:
            search.stop()

    sampler = optuna.samplers.RandomSampler(seed=SEED) if args.until is None else optuna.samplers.TPESampler(seed=SEED)
    study = optuna.create_study(direction="maximize", sampler=sampler, pruner=optuna.pruners.MedianPruner())
    for params in json.loads(args.candidates.read_text()) if args.candidates else []:
        study.enqueue_trial(params)
    with mlflow.start_run(run_name="study"):
        count, limit = (args.trials, None) if args.until is None else (None, args.limit)
        study.optimize(objective, n_trials=count, timeout=limit, n_jobs=1, callbacks=[report])
        mlflow.log_metric("best_valid_accuracy", study.best_value)
    if args.until is not None:
        mlflow.register_model(study.best_trial.user_attrs["model_uri"], "best")


if __name__ == "__main__":
    main()
