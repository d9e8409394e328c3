"""Attacks that nobody had reported: odd files and numbers, special files, damaged homes, streams that end."""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import time
import zipfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from attacks import ONE, Row, Stage, Verdict, tree

PICTURES = "{name: folder, path: pics}"
THOUSANDS = ", ".join(f"model.options.p{number}: {{int: [1, 2]}}" for number in range(2000))
HUGE = f"1{'0' * 400}"


def pictures(stage: Stage) -> Path:
    """A folder of two classes."""
    chance = np.random.default_rng(0)
    for name in ("long", "round"):
        folder = stage.home / "pics" / name
        folder.mkdir(parents=True)
        for number in range(12):
            pixels = chance.integers(0, 255, (16, 16), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    stage.study(data=PICTURES, split="{kind: holdout}")
    return stage.home / "pics"


def among_pictures(change: Callable[[Path], object], stage: Stage, *, refused: bool = False) -> Verdict:
    """A study of a folder of images, after this change to it."""
    change(pictures(stage))
    said = stage.hpo("check", "s.yaml", seconds=120)
    return said.sound and said.code == (2 if refused else 0), said.evidence


def _bomb(folder: Path) -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    side = 60_000
    rows = zlib.compress(b"\0" * (side // 8 + 1) * side, 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    (folder / "round/b.png").write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def _same(folder: Path) -> None:
    for file in (folder / "long").iterdir():
        shutil.copy(folder / "round" / file.name, file)


def _empty(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.unlink()


def table_names_other_files(stage: Stage) -> Verdict:
    pictures(stage)
    Image.new("L", (16, 16)).save(stage.here / "secret.png")
    rows = [f"pics/{name}/{number}.png,{name}" for name in ("long", "round") for number in range(12)]
    stage.write("labels.csv", "\n".join(["image,dx", *rows, "../secret.png,round", "/etc/passwd,long"]))
    stage.study(data="{name: table, path: labels.csv, image: image, label: dx}", split="{kind: holdout}")
    return stage.hpo("check", "s.yaml").refused("/etc/passwd")


def studied(*words: object, stage: Stage, **lines: str) -> Verdict:
    """A study file with these lines is one clear error of a command, `check` where none is named."""
    stage.study(**lines)
    return stage.hpo(*(words or ("show",)), "s.yaml", seconds=90).refused()


def odd_archive(manifest: str, stage: Stage) -> Verdict:
    with zipfile.ZipFile(stage.home / "x.zip", "w") as archive:
        archive.writestr("manifest.json", manifest)
    held, evidence = stage.hpo("import", "x.zip", "--home", stage.here / "new").refused()
    return held and not (stage.here / "new").exists(), evidence


def work_is_a_link(stage: Stage) -> Verdict:
    precious = stage.here / "precious"
    precious.mkdir()
    (precious / "a.txt").write_text("x")
    (stage.home / "mlruns").mkdir()
    (stage.home / "mlruns/work").symlink_to(precious)
    stage.study()
    ran, cleaned = stage.hpo("run", "s.yaml", *ONE), stage.hpo("clean", "--yes")
    kept = (precious / "a.txt").exists()
    return kept and ran.code == cleaned.code == 0, f"the foreign file is there: {kept}; {ran.evidence[:80]}"


def home_is_a_file(stage: Stage) -> Verdict:
    stage.write("h", "x")
    stage.study()
    return stage.hpo("run", "s.yaml", "--home", "h").refused("h")


def stores_elsewhere(stage: Stage) -> Verdict:
    away = stage.here / "away"
    away.mkdir()
    stage.write("hpo.toml", f'storage = "sqlite:///{away}/o.db"\ntracking = "file://{away}/runs"\n')
    said = stage.hpo("status")
    made = sorted(path.name for path in away.iterdir())
    return said.sound and not made, f"made: {made}; {said.evidence}"


def ledger_is_a_folder(stage: Stage) -> Verdict:
    (stage.home / "mlruns/openings.jsonl").mkdir(parents=True)
    return stage.hpo("doctor").refused("openings.jsonl")


def odd_config(stage: Stage) -> Verdict:
    folder = stage.home / "m"
    text = '{"class_names": ["a", "a"], "image_shape": [8, 8, 1], "mean": [NaN], "std": [0]}'
    stage.write("m/artifacts/config.json", text)
    stage.write("m/MLmodel", "flavors: {}\n")
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    return stage.hpo("predict", folder, "i.png").refused()


def half_image(stage: Stage) -> Verdict:
    (stage.home / "i.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return stage.hpo("predict", "nobody", "i.png").refused()


def function_in_a_choice(stage: Stage) -> Verdict:
    trap, away = stage.here / "trap", stage.here / "away"
    away.mkdir()
    stage.write("evilmod.py", f"open({str(trap)!r}, 'w')\n")
    study = stage.study(search="{trials: 2, space: {model.kind: {choice: ['evilmod:f', mlp]}}}").rename(away / "s.yaml")
    held, evidence = stage.hpo("check", study, PYTHONPATH=str(stage.home)).refused()
    return held and not trap.exists(), f"imported: {trap.exists()}; {evidence}"


def text_labels(stage: Stage) -> Verdict:
    images = np.zeros((20, 8, 8), np.uint8)
    np.savez(
        stage.home / "x.npz",
        train_images=images,
        train_labels=np.array(["a", "b"] * 10),
        test_images=images[:4],
        test_labels=np.array(list("abcd")),
    )
    stage.study(data="{name: npz, path: x.npz}")
    return stage.hpo("check", "s.yaml").refused("labels")


def many_trials(stage: Stage) -> Verdict:
    stage.study()
    return stage.hpo("run", "s.yaml", "--trials", HUGE, *ONE, seconds=60).refused("trials")


def many_workers(stage: Stage) -> Verdict:
    """A million processes, in a process group that may have 300."""
    stage.study()
    limit = ("prlimit", "--as=40000000000")
    return stage.hpo("run", "s.yaml", "--workers", 10**6, seconds=60, prefix=limit).refused("workers")


# Special files where a plain one is expected: a pipe that nobody writes to, and one without end.
def special(make: Callable[[Path], object], name: str, words: str, stage: Stage, **lines: str) -> Verdict:
    """A command that reads a file which is none."""
    stage.study(**lines)
    shutil.copytree(stage.model, stage.home / "m") if name.startswith("m/") else None
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    file = stage.home / name
    file.unlink(missing_ok=True)
    file.parent.mkdir(exist_ok=True)
    make(file)
    said = stage.hpo(*words.split(), seconds=60, prefix=("prlimit", "--as=12000000000"))
    return said.refused()


def _endless(file: Path) -> None:
    file.symlink_to("/dev/zero")


SPECIAL = {
    "hpo.toml": ("hpo.toml", "status", {}, False),
    "data.path of an npz": ("x.npz", "check s.yaml", {"data": "{name: npz, path: x.npz}"}, False),
    "a table": ("t.csv", "check s.yaml", {"data": "{name: table, path: t.csv}"}, False),
    "an archive": ("x.zip", "import x.zip --home new", {}, False),
    "an image": ("p.png", "predict s p.png", {}, True),
    "MLmodel": ("m/MLmodel", "predict m i.png", {}, True),
    "config.json": ("m/artifacts/config.json", "predict m i.png", {}, True),
    "net.pt2": ("m/artifacts/net.pt2", "predict m i.png", {}, True),
    "home.json": ("mlruns/home.json", "models", {}, True),
    "the ledger": ("mlruns/openings.jsonl", "evaluate s", {}, True),
}


# Surroundings that a program rarely has.
def around(script: str, stage: Stage, *, code: tuple[int, ...] = (0, 1, 2)) -> Verdict:
    """A shell's words around $HPO end without a traceback."""
    stage.study()
    command = ["bash", "-c", script]
    env = {**stage.env, "HPO": str(stage.program), "HPO_DATA": str(stage.cache)}
    ended = subprocess.run(command, cwd=stage.home, env=env, capture_output=True, check=False, timeout=120)
    text = (ended.stdout + ended.stderr).decode(errors="replace")
    held = ended.returncode in code and "Traceback" not in text and "unexpected error" not in text
    return held, f"code {ended.returncode}: {(text.strip().splitlines() or [''])[-1]!r}"


def two_measurements(stage: Stage) -> Verdict:
    """The same models measured twice at once."""
    processes = [stage.start("evaluate", "s#0", "s#1") for _ in range(2)]
    said = [process.communicate(timeout=180)[0].decode() for process in processes]
    lines = (stage.home / "mlruns/openings.jsonl").read_text().splitlines()
    counted = [next((line for line in text.splitlines() if "has been opened" in line), "") for text in said]
    sound = all(process.returncode == 0 for process in processes) and not any("Traceback" in text for text in said)
    return sound and all(counted), f"{len(lines)} lines in the ledger; {counted}"


def clean_and_run(stage: Stage) -> Verdict:
    """The disk is cleaned while a study runs."""
    running = stage.start("run", "s.yaml", "--trials", "5", *ONE)
    codes = []
    while running.poll() is None and len(codes) < 20:
        codes.append(stage.hpo("clean", "--yes", "--keep-models", "best:1").code)
        time.sleep(1)
    running.communicate(timeout=180)
    models = stage.hpo("predict", "s", _image(stage)).code
    return running.returncode == 0 and set(codes) == {0} and models == 0, f"run {running.returncode}, clean {codes}"


def _image(stage: Stage) -> Path:
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    return stage.home / "i.png"


def odd_ledger(stage: Stage) -> Verdict:
    wrong = []
    for line in (b"[]", b"null", b'{"when": 1e999}', b"\xff\xfe", b"[" * 9000, b'{"trial": 1%s}' % (b"0" * 5000)):
        (stage.home / "mlruns/openings.jsonl").write_bytes(line + b"\n")
        held, evidence = stage.hpo("evaluate", "s").refused("openings.jsonl")
        wrong += [] if held else [f"{line[:20]!r}: {evidence}"]
    return not wrong, "; ".join(wrong) or "six kinds of lines are refused"


def output_onto_a_store(stage: Stage) -> Verdict:
    file = stage.home / "mlruns/optuna.db"
    said = [stage.hpo("export", "s", "--output", file), stage.hpo("report", "s", "--out", file)]
    kept = file.read_bytes()[:6] == b"SQLite"
    return kept and all(each.sound for each in said), f"the database is one: {kept}; {said[0].evidence}"


def moved_while_named_by_a_link(stage: Stage) -> Verdict:
    """A link to the home instead of the home, and clean there: the same files, no copy."""
    link = stage.here / "link"
    link.symlink_to(stage.home)
    before = tree(stage.home / "mlruns/artifacts")
    said = [stage.hpo(words, cwd=stage.here, HPO_HOME=str(link)) for words in ("models", "doctor", "clean")]
    same = before == tree(stage.home / "mlruns/artifacts")
    return same and said[0].code == 0, f"artifacts as before: {same}; {said[1].evidence}"


UNNAMED: list[Row] = [
    ("u1 named pipe among images", partial(among_pictures, lambda p: os.mkfifo(p / "round/x.png")), False),
    ("u2 /dev/zero among images", partial(among_pictures, lambda p: _endless(p / "round/z.png")), False),
    ("u3 loop of linked folders", partial(among_pictures, lambda p: (p / "round/again").symlink_to(p)), False),
    ("u4 PNG of 60,000 x 60,000", partial(among_pictures, _bomb, refused=True), False),
    ("u5 table that names /etc/passwd", table_names_other_files, False),
    (
        "u6 class that sets the terminal's title",
        partial(among_pictures, lambda p: (p / "round").rename(p / "r\x1b]0;x\x07")),
        False,
    ),
    (
        "u7 class with a line break",
        partial(among_pictures, lambda p: (p / "round").rename(p / "r\nerror: all is lost")),
        False,
    ),
    ("u8 5,000 brackets", lambda stage: studied(stage=stage, question="[" * 5000 + "]" * 5000), False),
    ("u9 --home is a file", home_is_a_file, False),
    ("u10 mlruns/work is a link elsewhere", work_is_a_link, False),
    ("u11 manifest of 100,000 brackets", partial(odd_archive, "[" * 100_000), False),
    ("u12 infinite and negative numbers", partial(odd_archive, '{"format": 1e999, "members": {"a": -1}}'), False),
    ("u13 hpo.toml with stores elsewhere", stores_elsewhere, False),
    ("u14 --trials 10^400", many_trials, False),
    ("u15 negative seed", lambda stage: studied(stage=stage, seed="-5"), False),
    ("u16 a folder for the ledger", ledger_is_a_folder, False),
    ("u17 model of NaN and equal classes", odd_config, False),
    ("u18 half a PNG, unknown model", half_image, False),
    ("u19 function in a choice", function_in_a_choice, False),
    ("u20 classes without images", partial(among_pictures, _empty, refused=True), False),
    ("u21 two classes of the same images", partial(among_pictures, _same, refused=True), False),
    ("u22 npz with labels of text", text_labels, False),
    ("u23 --workers 10^6", many_workers, False),
    (
        "u24 range to 10^400",
        lambda stage: studied(stage=stage, search=f"{{space: {{training.epochs: {{int: [1, {HUGE}]}}}}}}"),
        False,
    ),
    (
        "u25 step of 5e-324",
        lambda stage: studied(stage=stage, search="{space: {training.optimizer.lr: {float: [0, 1], step: 5.0e-324}}}"),
        False,
    ),
    (
        "u26 2,000 searched places",
        lambda stage: studied(
            stage=stage,
            model="{kind: 'a:b'}",
            search=f"{{space: {{{THOUSANDS}}}}}",
        ),
        False,
    ),
    ("u27 half a character in a question", lambda stage: studied(stage=stage, question='"\\uD800"'), False),
    ("u28 six odd lines in the ledger", odd_ledger, True),
    ("u29 export and report onto optuna.db", output_onto_a_store, True),
    ("u30 two measurements at once", two_measurements, True),
    ("u31 clean beside a run", clean_and_run, True),
    ("u32 the home by a link", moved_while_named_by_a_link, True),
    ("u33 output to a full device", partial(around, "$HPO schema > /dev/full"), False),
    ("u34 output closed", partial(around, "$HPO studies >&-"), False),
    ("u35 a reader that leaves", partial(around, "set -o pipefail; $HPO schema | head -c 9", code=(0, 141)), False),
    ("u36 a working directory that is gone", partial(around, "mkdir g; cd g; rmdir ../g; $HPO status"), False),
    ("u37 no environment", partial(around, "env -i $HPO status"), False),
    ("u38 a terminal of ASCII", partial(around, "PYTHONIOENCODING=ascii $HPO show digits-mlp"), False),
    ("u39 a home of other bytes than UTF-8", partial(around, "$HPO run s.yaml --home $'h\\xff' --workers 0"), False),
    ("u40 HPO_DATA is a file", partial(around, "HPO_DATA=$PWD/s.yaml $HPO check s.yaml", code=(2,)), False),
]
for _number, (_what, (_name, _words, _lines, _done)) in enumerate(SPECIAL.items(), start=41):
    for _kind, _make in (("a pipe", os.mkfifo), ("endless", _endless)):
        _row = lambda stage, m=_make, n=_name, w=_words, x=_lines: special(m, n, w, stage, **x)  # noqa: E731
        UNNAMED.append((f"u{_number} {_what}: {_kind}", _row, _done))
