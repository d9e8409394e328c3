"""Attacks on homes, counts and ends of runs that once succeeded, by the number under which they were reported."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from PIL import Image

from attacks import ONE, Row, SkippedError, Stage, Verdict, changes, family, kill_family, mounted, tree


def same_images_elsewhere(stage: Stage) -> Verdict:
    """Another home that shares the data cache evaluates a study of another name."""
    other = stage.here / "there"
    other.mkdir()
    shutil.copy(stage.home / "s.yaml", other / "t.yaml")
    stage.hpo("run", "t.yaml", "--trials", 1, *ONE, cwd=other)
    said = stage.hpo("promote", "t", cwd=other)
    return said.code == 0 and "s (another home)" in said.text, said.evidence


def another_split_seed(stage: Stage) -> Verdict:
    stage.study("t.yaml", split="{kind: holdout, share: 0.2, test_share: 0.2, seed: 1}")
    stage.hpo("run", "t.yaml", "--trials", 1, *ONE)
    said = stage.hpo("evaluate", "t")
    return "are development images of s" in said.text, said.evidence


def damaged_ledger(stage: Stage) -> Verdict:
    with (stage.home / "mlruns/openings.jsonl").open("a") as file:
        file.write('{"study": "s"}\n')
    return stage.hpo("evaluate", "s").refused("openings.jsonl")


def base_of_another_split(stage: Stage) -> Verdict:
    stage.study(
        "t.yaml",
        split="{kind: holdout, share: 0.2, test_share: 0.2, seed: 1}",
        model="{kind: transfer, from_model: 'models:/s@champion'}",
    )
    ran = stage.hpo("run", "t.yaml", "--trials", 1, *ONE)
    said = stage.hpo("promote", "t")
    return ran.code == 0 and said.code == 1 and "base has not seen the test part" in said.text, said.evidence


def _killed(stage: Stage) -> None:
    """A run that dies once a trial has ended, before its model is exported."""
    stage.study()
    process = stage.start("run", "s.yaml", "--json", *ONE)
    ended = 0
    for line in process.stdout:
        ended += b'"event": "trial_ended"' in line
        if ended == 2:
            break
    kill_family(process.pid)
    process.wait()
    time.sleep(1)


def run_in_a_copy_of_a_killed_home(stage: Stage) -> Verdict:
    _killed(stage)
    copy = Path(shutil.copytree(stage.home, stage.here / "copy", symlinks=True))
    before = tree(stage.home)
    said = stage.hpo("run", "s.yaml", *ONE, cwd=copy)
    held, evidence = changes(before, tree(stage.home))
    return held and said.code == 0, evidence


def moved_after_a_kill(stage: Stage) -> Verdict:
    _killed(stage)
    moved = stage.home.rename(stage.here / "moved")
    said = stage.hpo("run", "s.yaml", *ONE, cwd=moved)
    models = stage.hpo("models", "--json", cwd=moved)
    return said.code == 0 and '"version": 1' in models.text, f"run: {said.evidence[:90]}; models: {models.text[:60]}"


def clean_in_a_copy(stage: Stage) -> Verdict:
    copy = Path(shutil.copytree(stage.home, stage.here / "copy", symlinks=True))
    before = tree(stage.home)
    stage.hpo("clean", "s", "--keep-models", "best:1", "--keep-figures", "none", "--yes", cwd=copy)
    return changes(before, tree(stage.home))


def run_in_a_copy(stage: Stage) -> Verdict:
    copy = Path(shutil.copytree(stage.home, stage.here / "copy", symlinks=True))
    before = tree(stage.home)
    stage.hpo("run", "s.yaml", "--trials", 3, *ONE, cwd=copy)
    return changes(before, tree(stage.home))


def percent_home(stage: Stage) -> Verdict:
    neighbour, odd = stage.home.rename(stage.here / "p q"), stage.here / "p%20q"
    odd.mkdir()
    before = tree(neighbour / "mlruns")
    stage.hpo("run", neighbour / "s.yaml", "--home", odd, "--trials", 3, *ONE, cwd=stage.here)
    held, evidence = changes(before, tree(neighbour / "mlruns"))
    own = (odd / "mlruns/optuna.db").exists()
    return held and own, f"{evidence} in the neighbour; own database: {own}"


def question_home(stage: Stage) -> Verdict:
    odd = stage.here / "a?b=c"
    odd.mkdir()
    stage.study()
    stage.hpo("run", stage.home / "s.yaml", "--home", odd, "--trials", 1, *ONE, cwd=stage.here)
    names = sorted(path.name for path in stage.here.iterdir() if path.name not in ("home", "cache"))
    return names == ["a?b=c"] and (odd / "mlruns/optuna.db").exists(), f"made: {names}"


def _ends(stage: Stage, own: str, *words: object, most: float, **how: Any) -> Verdict:
    """A study with code of its own ends within a bound."""
    stage.write("own.py", own)
    said = stage.hpo("run", "s.yaml", *words, *ONE, seconds=150, **how)
    return said.code is not None and said.seconds < most, said.evidence


SLEEPS = "import time\ndef load(**options):\n    time.sleep(1000)\n"
NET = """\
import os, subprocess, sys, time
import torch

class Net(torch.nn.Module):
    def __init__(self, shape, classes):
        super().__init__()
        self.layer = torch.nn.Linear(shape[0] * shape[1] * shape[2], classes)

    def forward(self, images):
        {0}
        return self.layer(images.flatten(1))

def build(*, image_shape, classes):
    return Net(image_shape, classes)
"""


def data_hangs(stage: Stage) -> Verdict:
    stage.study(data="{name: 'own:load'}")
    return _ends(stage, SLEEPS, "--timeout", "5s", most=60)


def data_hangs_at_ctrl_c(stage: Stage) -> Verdict:
    stage.study(data="{name: 'own:load'}")
    return _ends(stage, SLEEPS, most=90, interrupt=30)


def export_hangs(stage: Stage) -> Verdict:
    stage.study(model="{kind: 'own:build'}")
    own = NET.format("torch.compiler.is_exporting() and time.sleep(1000)")
    return _ends(stage, own, "--timeout", "40s", most=80)


def model_hangs(stage: Stage) -> Verdict:
    stage.study(model="{kind: 'own:build'}")
    return _ends(stage, NET.format("time.sleep(1000)"), "--timeout", "40s", most=80)


def orphan(stage: Stage) -> Verdict:
    """A worker dies while a process that it has started lives, and holds the pipe."""
    stage.study(model="{kind: 'own:build'}")
    own = NET.format("if self.training: subprocess.Popen(['sleep', '170'], close_fds=False); os.kill(os.getpid(), 9)")
    return _ends(stage, own, most=140)


def prints(stage: Stage) -> Verdict:
    stage.study(model="{kind: 'own:build'}")
    stage.write("own.py", NET.format("os.write(1, b'no json\\n')"))
    process = stage.start(
        "run", "s.yaml", "--json", "--trials", "1", *ONE, prefix=("sh", "-c", '"$@" 2>/dev/null', "sh")
    )
    lines = process.communicate(timeout=180)[0].splitlines()
    bad = [line for line in lines if not line.startswith(b"{")]
    return bool(lines) and not bad, f"{len(bad)} of {len(lines)} lines are no JSON"


def half_export(stage: Stage) -> Verdict:
    part = stage.write("s.zip.part", "x")
    os.utime(part, (1, 1))
    said = stage.hpo("clean", "--yes")
    return not part.exists(), said.evidence


def emptied_storage(stage: Stage) -> Verdict:
    for file in stage.home.glob("mlruns/optuna.db*"):
        file.unlink()
    said = stage.hpo("doctor")
    return said.code == 1 and "ledger" in said.text, said.evidence


def damaged_mlflow(stage: Stage) -> Verdict:
    file = stage.home / "mlruns/mlflow.db"
    file.write_bytes(b"x" * 4096 + file.read_bytes()[4096:])
    said = stage.hpo("doctor")
    return said.sound and "next run" not in said.text and said.code == 1, said.evidence


def ui_at_sigterm(stage: Stage) -> Verdict:
    process = stage.start("ui", "--port", "5873")
    time.sleep(25)
    others = family(process.pid)
    process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(20)
    time.sleep(5)
    left = [pid for pid in others if Path(f"/proc/{pid}/cmdline").exists()]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    return not left and len(others) > 1, f"{len(left)} of {len(others)} processes left"


def full_disk(stage: Stage) -> Verdict:
    if os.geteuid():
        raise SkippedError("only root may mount a small disk")
    stage.study(model="{kind: mlp, hidden: 60000}")
    small = stage.here / "small"
    small.mkdir()
    with mounted("-t", "tmpfs", "-o", "size=12m", "none", str(small)):
        said = stage.hpo("run", stage.home / "s.yaml", "--home", small, *ONE)
    return said.sound and "space" in said.text and "enforce fail" not in said.text, said.evidence


def read_only(stage: Stage) -> Verdict:
    if os.geteuid():
        raise SkippedError("only root may mount a folder read-only")
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    fails = []
    with mounted("--bind", str(stage.home), str(stage.home)):
        subprocess.run(["mount", "-o", "remount,ro,bind", str(stage.home)], check=True)
        commands = ["status", "trials s", "models", f"predict s {stage.home}/i.png", "compare s#0 s#1", "report s"]
        for words in commands:
            said = stage.hpo(*words.split(), "--home", stage.home, cwd=stage.here)
            if said.code:
                fails.append(f"{words}: {said.evidence}")
    return not fails, "; ".join(fails) or f"{len(commands)} commands answer"


def memory_limit(stage: Stage) -> Verdict:
    stage.study()
    said = stage.hpo("run", "s.yaml", *ONE, prefix=("prlimit", "--as=3000000000"))
    return said.sound and "limit" in said.text, said.evidence


RUNS: list[Row] = [
    ("17.1 24.3 the same test images in another home", same_images_elsewhere, True),
    ("17.1 test images of another split, in the first one's training", another_split_seed, True),
    ("17.1 damaged line of the ledger", damaged_ledger, True),
    ("24.4 base of a transfer trained on the test images", base_of_another_split, True),
    ("17.3 24.1 run in a copy of a killed home", run_in_a_copy_of_a_killed_home, False),
    ("17.3 24.1 run in a home moved after a kill", moved_after_a_kill, False),
    ("24.1 clean in a copy", clean_in_a_copy, True),
    ("24.1 run in a copy", run_in_a_copy, True),
    ("17.6 24.12 address space of 3 GB", memory_limit, False),
    ("17.6 24.12 reading in a read-only home", read_only, True),
    ("17.7 24.11 killed worker with a living child", orphan, False),
    ("17.7 24.11 own model that hangs, --timeout", model_hangs, False),
    ("24.10 home p%20q beside p q", percent_home, True),
    ("24.10 home a?b=c", question_home, False),
    ("24.11 own data that hang, --timeout", data_hangs, False),
    ("24.11 own data that hang, Ctrl-C", data_hangs_at_ctrl_c, False),
    ("24.11 export that hangs, --timeout", export_hangs, False),
    ("24.12 damaged mlflow.db", damaged_mlflow, True),
    ("24.12 emptied storage beside a ledger", emptied_storage, True),
    ("24.12 a model that prints, and --json", prints, False),
    ("24.12 ui ended by SIGTERM", ui_at_sigterm, True),
    ("24.12 .part of a killed export", half_export, True),
    ("24.12 full disk", full_disk, False),
]
