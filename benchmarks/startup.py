"""Seconds before and after the trials of a small study, and of each command, as ratios to bare imports.

    python benchmarks/startup.py [--repeats 3] [--hpo COMMAND]

Everything runs in fresh processes and a fresh home, one after the other, `import torch` and `import typer` in between;
each figure is the median of the repeats. Nothing else should run on the machine. --hpo names the command of another
version, to compare with; both versions share the cache of prepared data.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

TRIALS = 6
IMPORTS = {name: [sys.executable, "-c", f"import {name}"] for name in ("torch", "typer")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hpo", default=str(Path(sys.executable).with_name("hpo")))
    options = parser.parse_args()
    seconds: dict[str, list[float]] = defaultdict(list)
    for _ in range(options.repeats):
        with tempfile.TemporaryDirectory() as home:
            for name, took in measure(options.hpo, home).items():
                seconds[name].append(took)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"| {'what':34} | seconds | to its import |\n|---|---:|---:|")
    for name, median in medians.items():
        base = "import typer" if name in ("hpo --help", "hpo studies", "hpo models") else "import torch"
        print(f"| {name:34} | {median:7.2f} | {median / medians[base]:.2f} |")


def measure(hpo: str, home: str) -> dict[str, float]:
    """Seconds of each import and command."""
    found = {f"import {name}": timed(command) for name, command in IMPORTS.items()}
    found |= run_study(hpo, home)
    image = Path(home) / "image.png"
    write_image(image)
    commands = {
        "hpo --help": ["--help"],
        "hpo studies": ["studies"],
        "hpo models": ["models", "--home", home],
        "hpo predict, one image": ["predict", "digits-mlp", str(image), "--home", home],
        "hpo report": ["report", "digits-mlp", "--home", home],
        "hpo promote": ["promote", "digits-mlp", "--home", home],
        "hpo check": ["check", "digits-mlp"],
    }
    return found | {name: timed([hpo, *words]) for name, words in commands.items()}


def run_study(hpo: str, home: str) -> dict[str, float]:
    """Seconds from the command to the first epoch, from the last trial to the prompt, and of the whole command."""
    words = [hpo, "run", "digits-mlp", "--trials", str(TRIALS), "--home", home, "--json"]
    started, times = time.perf_counter(), {}
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            event = json.loads(line)["event"]
            if event != "epoch_ended" or event not in times:
                times[event] = time.perf_counter() - started  # of trial_ended the last one stays
    whole = time.perf_counter() - started
    assert process.returncode == 0, words
    return {
        "command to study opened": times["study_opened"],
        "command to first epoch": times["epoch_ended"],
        "last trial to the prompt": whole - times["trial_ended"],
        f"hpo run digits-mlp --trials {TRIALS}": whole,
    }


def timed(command: Sequence[str]) -> float:
    """Wall seconds of a command that must succeed."""
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - started


def write_image(path: Path) -> None:
    """One of the digits, as a PNG of 8 x 8 pixels."""
    from PIL import Image

    Image.linear_gradient("L").resize((8, 8)).save(path)


if __name__ == "__main__":
    main()
