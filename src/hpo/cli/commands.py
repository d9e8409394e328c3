"""The table of the commands of `hpo`, and how they are called in this terminal."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import NamedTuple


class Listed(NamedTuple):
    """A command of the table: module:function, what it does in a few words, arguments as an example.

    doing is printed in a terminal if the command is silent for a second.
    """

    place: str
    words: str
    example: str
    doing: str


# Section -> command, in the order of --help.
SECTIONS: dict[str, dict[str, Listed]] = {
    "Search": {
        "new": Listed(
            "new:new",
            "Write a study for your own images, and say why it is as it is.",
            "photos --minutes 10",
            doing="looking at the images and measuring networks",
        ),
        "run": Listed(
            "run:run",
            "Run a study, or resume it; register its best model.",
            "digits-mlp --trials 50 --set training.epochs=20",
            doing="starting",
        ),
        "check": Listed(
            "look:check",
            "Validate a study, train one batch, estimate time and disk space.",
            "digits-mlp",
            doing="preparing the images and trying one batch",
        ),
        "stop": Listed(
            "run:stop", "Stop a running study, as Ctrl-C does.", "digits-mlp", doing="looking for supervisors"
        ),
        "ask": Listed(
            "ask:ask",
            "Print the next candidate, for a program that trains it itself.",
            "digits-mlp",
            doing="opening the study",
        ),
        "tell": Listed(
            "ask:tell",
            "Record how a candidate of `hpo ask` has ended, or one of its epochs.",
            "digits-mlp#3 --value 0.93",
            doing="opening the study",
        ),
        "worker": Listed(
            "cluster:worker",
            "Train trials of a study on a shared storage.",
            "digits-mlp",
            doing="looking for the study",
        ),
        "begin": Listed(
            "cluster:begin",
            "Create a study on a shared storage, for workers to train.",
            "digits-mlp --trials 200",
            doing="preparing the images",
        ),
        "manifest": Listed(
            "cluster:manifest",
            "Print a Kubernetes Job of workers.",
            "digits-mlp --image registry.example/hpo:1",
            doing="reading the study",
        ),
    },
    "Inspect": {
        "ui": Listed(
            "look:ui",
            "Open the MLflow UI on a study's trials, best first.",
            "digits-mlp",
            doing="looking for the study",
        ),
        "status": Listed("run:status", "Show the progress of every study.", "", doing="reading the studies"),
        "trials": Listed("look:trials", "List the trials of a study.", "digits-mlp --top 5", doing="reading the study"),
        "report": Listed(
            "report:report",
            "Write a page on a study: result, figures, mistakes, cost.",
            "digits-mlp --out report.html",
            doing="gathering the study's results and drawing figures",
        ),
        "compare": Listed(
            "use:compare", "Compare models on the same images.", "digits-mlp digits-cnn", doing="loading the models"
        ),
        "rerun": Listed(
            "run:rerun",
            "Train a trial again, and compare epoch by epoch.",
            "digits-mlp#3",
            doing="preparing the images",
        ),
        "studies": Listed("look:studies", "List the available studies.", "", doing="reading the study files"),
        "show": Listed("look:show", "Print a study with its defaults.", "digits-mlp", doing="reading the study file"),
        "schema": Listed(
            "look:schema",
            "Print the JSON Schema of a study file.",
            "> study.schema.json",
            doing="reading the parts of a study",
        ),
        "probe": Listed(
            "probe:probe",
            "Compare frozen backbones on a data set, and write a study of the best.",
            "eurosat-head --backbone timm:tf_efficientnet_lite0=lite0.pth",
            doing="preparing the images",
        ),
        "preview": Listed(
            "look:preview",
            "Draw augmented training images of a study.",
            "cifar10-v3 --out augmented.png",
            doing="preparing the images",
        ),
        "data": Listed("report:app", "Explore a data set.", "show digits", doing="reading the images"),
    },
    "Use models": {
        "ensemble": Listed(
            "ensemble:ensemble",
            "Make one model of several trials of a study.",
            "digits-mlp --from digits-cnn",
            doing="reading the trials",
        ),
        "promote": Listed(
            "use:promote",
            "Check a study's best model by the gates, and make it the champion.",
            "digits-mlp",
            doing="checking the gates",
        ),
        "evaluate": Listed(
            "use:evaluate", "Measure models on the sealed test part.", "digits-mlp", doing="loading the models"
        ),
        "models": Listed("use:models", "List the registered models.", "digits-mlp", doing="asking MLflow"),
        "predict": Listed(
            "use:predict", "Classify image files.", "digits-mlp photo.png --format csv", doing="loading the model"
        ),
        "serve": Listed(
            "deploy:serve",
            "Serve a model over HTTP, with a page to drop an image on.",
            "digits-mlp",
            doing="loading the model",
        ),
        "export-model": Listed(
            "deploy:export_model",
            "Write a model as ONNX, pt2, safetensors or an MLflow folder.",
            "digits-mlp --format pt2",
            doing="writing the model and comparing its answers",
        ),
        "card": Listed(
            "deploy:card",
            "Write a model card from the record.",
            "digits-mlp --out digits-card --licence MIT",
            doing="gathering the study's results",
        ),
        "explain": Listed(
            "report:explain",
            "Highlight the pixels that support a class.",
            "digits-mlp photo.png",
            doing="loading the model",
        ),
    },
    "Connect": {
        "mcp": Listed(
            "mcp:mcp",
            "Let an assistant read the studies, over the Model Context Protocol.",
            "--allow-run",
            doing="",
        ),
    },
    "Maintain": {
        "doctor": Listed(
            "store:doctor", "Find and repair problems in the stores.", "--fix", doing="reading both stores"
        ),
        "clean": Listed(
            "store:clean",
            "Free disk space.",
            "digits-mlp --keep-models best:3",
            doing="looking for what can be deleted",
        ),
        "export": Listed(
            "store:export",
            "Write a study, its runs and models, to one file.",
            "digits-mlp --out digits.zip",
            doing="reading the study",
        ),
        "import": Listed("store:import_", "Read an exported study.", "digits.zip", doing="reading the file"),
        "store": Listed(
            "store:app", "Show the stores, or upgrade their databases.", "status", doing="asking both stores"
        ),
    },
}


def find(name: str) -> Listed | None:
    """The command of that name."""
    return next((commands[name] for commands in SECTIONS.values() if name in commands), None)


def called_as() -> str:
    """What calls `hpo` again in this terminal: `uv run hpo` where that started it, a path where PATH has none."""
    script = Path(sys.argv[0])
    if script.parts[-2:] == ("hpo", "__main__.py"):
        # Compared as text: the Python of an environment is a link to one that does not have its packages.
        return f"{'python' if shutil.which('python') == sys.executable else shlex.quote(sys.executable)} -m hpo"
    if script.name != "hpo":
        return "hpo"  # a caller from Python
    if "UV_RUN_RECURSION_DEPTH" in os.environ:
        return "uv run hpo"
    return "hpo" if shutil.which("hpo") == str(script) else shlex.quote(str(script))


def runnable(text: str) -> str:
    """A message with its commands `hpo ...` as they are called in this terminal."""
    if (call := called_as()) == "hpo":
        return text
    names = "|".join(name for commands in SECTIONS.values() for name in commands)
    return re.sub(rf"(?<![\w/.-])(?<!uv run )(?<!-m )hpo(?= (?:{names})\b)", call.replace("\\", r"\\"), text)
