"""Attack a program by its command line and plain files, and print what held and what fell.

    uv run python benchmarks/attacks.py
    uv run python benchmarks/attacks.py --hpo OTHER/.venv/bin/hpo --only "24.5 archive"

Those that once succeeded are in attacks_files.py and attacks_runs.py; attacks_unnamed.py has those made up since.
docs/attacks.md lists all. `--hpo` names the hpo of the code to attack, so the same attacks run against an older
one. Each has a scratch folder of its own: an empty one, or a copy of a project with a finished and promoted study, at
the path where that study ran. A command that has not ended after its bound has fallen.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Verdict = tuple[bool, str]  # held, and the evidence in a line
STUDY = """\
data: {name: digits}
split: {kind: holdout, share: 0.2, test_share: 0.2}
model: {kind: cnn, filters: 4}
training: {epochs: 1, precision: float32}
keep: {figures: none}
search: {trials: 2, sampler: random, pruner: none, space: {training.optimizer.lr: {float: [0.001, 0.1]}}}
"""
ONE = ["--workers", "1", "--device", "cpu"]


@dataclass(frozen=True)
class Said:
    """How a command ended; code None: it was killed because it had not."""

    code: int | None
    text: str
    seconds: float

    @property
    def sound(self) -> bool:
        """Whether it ended with an answer or an error of its own, and steered no terminal."""
        raw = ("Traceback", "unexpected error", "\x1b", "\x07", "\u202e")
        return self.code in (0, 1, 2, 130) and not any(word in self.text for word in raw)

    @property
    def evidence(self) -> str:
        """The error, or its last line."""
        lines = [line.strip() for line in self.text.splitlines() if line.strip()]
        errors = [line for line in lines if "error" in line.lower() or "Error" in line]
        ended = "did not end" if self.code is None else f"code {self.code}"
        return f"{ended} after {self.seconds:.0f} s: {(errors or lines or [''])[-1]!r}"

    def refused(self, *words: str) -> Verdict:
        """It held if this was one error that says these words."""
        return self.sound and self.code in (1, 2) and all(word in self.text for word in words), self.evidence


@dataclass(frozen=True)
class Stage:
    """The scratch folder of one attack, the hpo to attack, and the environment."""

    here: Path
    program: Path
    env: dict[str, str] = field(default_factory=dict)

    @property
    def cache(self) -> Path:
        """Prepared data."""
        return self.here / "cache"

    @property
    def home(self) -> Path:
        """Where the study of the template ran."""
        return self.here / "home"

    @property
    def model(self) -> Path:
        """The folder of one of its logged models."""
        return next((self.home / "mlruns/artifacts").rglob("MLmodel")).parent

    def write(self, name: str, text: str) -> Path:
        """A file in the home."""
        file = self.home / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        return file

    def start(self, *words: object, cwd: Path | None = None, prefix: tuple[str, ...] = (), **env: str) -> Any:
        """A command, in a process group of its own."""
        self.home.mkdir(exist_ok=True)
        command = [*prefix, str(self.program), *map(str, words)]
        around = {**self.env, "HPO_DATA": str(self.cache), **env}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(command, cwd=cwd or self.home, env=around, start_new_session=True, **pipes)

    def hpo(self, *words: object, seconds: float = 180, interrupt: float | None = None, **how: Any) -> Said:
        """A command to its end, at most that long; interrupt: Ctrl-C after so many seconds."""
        began = time.monotonic()
        process = self.start(*words, **how)
        if interrupt is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(interrupt)
            process.send_signal(signal.SIGINT)
        try:
            out, code = process.communicate(timeout=seconds)[0], process.returncode
        except subprocess.TimeoutExpired:
            kill_family(process.pid)
            out, code = process.communicate()[0], None
        return Said(code, out.decode(errors="replace"), time.monotonic() - began)

    def study(self, name: str = "s.yaml", **changes: Any) -> Path:
        """A study file of the home; a key such as data replaces that line of STUDY, another is added."""
        lines = STUDY.splitlines()
        for key, text in changes.items():
            lines = [line for line in lines if not line.startswith(f"{key}:")] + [f"{key}: {text}"]
        return self.write(name, "\n".join(lines) + "\n")


Row = tuple[str, Callable[[Stage], Verdict], bool]  # its name, and whether it begins with a finished study


def family(pid: int) -> list[int]:
    """A process and all that it has started, as Linux lists them."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = [pid]
    for one in found:
        found += [child for child, parent in parents.items() if parent == one]
    return found


def kill_family(pid: int) -> None:
    """SIGKILL for a process and all that it has started."""
    for one in family(pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(one, signal.SIGKILL)


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file below, with its size and the time of its last change, but what SQLite keeps for readers."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(("-shm", "-wal"))]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


def changes(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> Verdict:
    """It held if no file was written, added or deleted."""
    names = sorted({name for name, _ in before.items() ^ after.items()})
    gone = sum(name not in after for name in names)
    return not names, f"{len(names)} files changed, {gone} of them deleted" + (f": {names[0]}" if names else "")


def arrays(stage: Stage, name: str = "x.npz", **parts: Any) -> Path:
    """An npz of two classes that anything can tell apart, with these arrays replaced or added."""
    chance = np.random.default_rng(0)
    for part, count in (("train", 120), ("test", 40)):
        labels = np.arange(count) % 2
        images = chance.integers(0, 60, (count, 8, 8), dtype=np.uint8)
        images[labels == 1, :4] += 150
        parts = {f"{part}_images": images, f"{part}_labels": labels, **parts}
    stage.home.mkdir(exist_ok=True)
    np.savez(stage.home / name, **parts)
    return stage.home / name


@contextlib.contextmanager
def mounted(*words: str) -> Any:
    """A mount of the system's; the last word is its folder."""
    subprocess.run(["mount", *words], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", words[-1]], check=True)


class SkippedError(Exception):
    """This machine does not allow the attack."""


def template(stage: Stage) -> None:
    """A project with a finished study, its champion, and an opening of its test part."""
    stage.study()
    for words in (["run", "s.yaml", *ONE], ["promote", "s"]):
        said = stage.hpo(*words, seconds=600)
        if said.code:
            raise SystemExit(f"hpo {words[0]} fails: {said.text}")


def play(attack: Callable[[Stage], Verdict], stage: Stage, whole: Path | None) -> tuple[str, str]:
    """One attack in its folder: held, fell or skipped, and the evidence."""
    shutil.rmtree(stage.here, ignore_errors=True)
    if whole:
        shutil.copytree(whole, stage.here, symlinks=True)
    else:
        stage.home.mkdir(parents=True)
    try:
        held, evidence = attack(stage)
    except SkippedError as reason:
        return "skipped", str(reason)
    except Exception as error:  # noqa: BLE001 - an attack that does not find what it expects has an answer, too
        held, evidence = False, f"{type(error).__name__}: {error}"
    printable = "".join(sign if sign.isprintable() else "?" for sign in evidence).replace(str(stage.here), "...")
    return ("held" if held else "fell"), printable[:300]


def main() -> None:
    """Parse, attack, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hpo", type=Path, default=Path(sys.executable).with_name("hpo"), help="the one to attack")
    parser.add_argument("--only", default="", help="attacks whose name has this in it; several separated by commas")
    parser.add_argument("--json", type=Path, help="write the results there as well")
    options = parser.parse_args()
    from attacks_files import FILES
    from attacks_runs import RUNS
    from attacks_unnamed import UNNAMED

    attacks = [row for row in [*FILES, *RUNS, *UNNAMED] if any(word in row[0] for word in options.only.split(","))]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("HPO_", "MLFLOW_"))} | {"OMP_NUM_THREADS": "1"}
    results = {}
    with tempfile.TemporaryDirectory(prefix="hpo-attacks-", ignore_cleanup_errors=True) as scratch:
        stage, whole = Stage(Path(scratch) / "here", options.hpo.absolute(), env), Path(scratch) / "template"
        if any(done for _, _, done in attacks):
            template(stage)
            stage.here.rename(whole)
        for name, attack, done in attacks:
            began = time.monotonic()
            verdict, evidence = results[name] = play(attack, stage, whole if done else None)
            print(f"{verdict:<8}{name}  [{time.monotonic() - began:.0f} s]\n        {evidence}", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1))
    counts = [sum(verdict == word for verdict, _ in results.values()) for word in ("held", "fell", "skipped")]
    print("{} held, {} fell, {} skipped".format(*counts))
    sys.exit(counts[1] > 0)


if __name__ == "__main__":
    main()
