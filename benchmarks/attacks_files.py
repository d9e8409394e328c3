"""Attacks by files and texts of others that once succeeded, by the number under which they were reported."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import sqlite3
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from attacks import ONE, Row, Stage, Verdict, arrays

SECRET = "xyzzy-plugh-42"  # noqa: S105 - planted


def searched_places(stage: Stage) -> Verdict:
    spaces = {"split.seed": "{int: [0, 9]}", "split.test_share": "{float: [0.1, 0.3]}"}
    spaces |= {"split.share": "{float: [0.1, 0.3]}", "data.name": "{choice: [digits, fashionmnist]}"}
    spaces |= {"data.size": "{choice: [28, 64]}", "data.groups": "{choice: [{a: ['0']}, {b: ['0']}]}"}
    accepted = []
    for path, values in spaces.items():
        stage.study("t.yaml", search=f"{{trials: 2, sampler: random, space: {{{path}: {values}}}}}")
        if stage.hpo("show", "t.yaml").code == 0:
            accepted.append(path)
    return not accepted, f"accepted: {accepted or 'none'}"


def test_is_validation(stage: Stage) -> Verdict:
    with np.load(arrays(stage)) as parts:
        test = parts["test_images"], parts["test_labels"]
    arrays(stage, val_images=test[0], val_labels=test[1])
    stage.study(data="{name: npz, path: x.npz}", split="{kind: official}")
    return stage.hpo("check", "s.yaml").refused("40")


def test_in_training(stage: Stage) -> Verdict:
    with np.load(arrays(stage)) as parts:
        test = parts["test_images"].copy()
        test[:7] = parts["train_images"][:7]
    arrays(stage, test_images=test)
    stage.study(data="{name: npz, path: x.npz}", split="{kind: holdout}")
    return stage.hpo("check", "s.yaml").refused("7 of the 40 test images")


def changed_content(stage: Stage) -> Verdict:
    """Other labels in a file of equal size and time."""
    file = arrays(stage)
    stage.study(data="{name: npz, path: x.npz}", split="{kind: holdout}")
    first = stage.hpo("data", "show", "s.yaml", "--json").text
    facts = file.stat()
    arrays(stage, train_labels=np.repeat([0, 1], [80, 40]))
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    second = stage.hpo("data", "show", "s.yaml", "--json")
    return second.code == 0 and second.text != first, f"answers differ: {second.text != first}; {second.evidence[:80]}"


def _with_program(stage: Stage, net: Callable[[Any], Any]) -> Path:
    """A copy of the model with another program."""
    import torch

    class Net(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return net(images)

    folder = Path(shutil.copytree(stage.model, stage.here / "model"))
    example = (torch.zeros((2, 8, 8, 1), dtype=torch.uint8),)
    shapes = ({0: torch.export.Dim("n")},)
    torch.export.save(torch.export.export(Net(), example, dynamic_shapes=shapes), folder / "artifacts/net.pt2")
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    return folder


def _out_of_bounds(stage: Stage) -> Path:
    """A program whose view of 97 numbers was made to reach 4 GB far in its file."""
    import torch

    def net(images: Any) -> Any:
        view = torch.ops.aten._reshape_alias(torch.zeros(97), [97], [1])
        return torch.softmax(view.fill_(1.0)[:10].expand(images.shape[0], 10), 1)

    folder = _with_program(stage, net)
    with zipfile.ZipFile(folder / "artifacts/net.pt2") as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    graph = next(name for name in entries if name.endswith("models/model.json"))
    program = json.loads(entries[graph])
    for node in program["graph_module"]["graph"]["nodes"]:
        for given in node["inputs"] if "_reshape_alias" in node["target"] else ():
            if "as_ints" in given["arg"]:
                given["arg"]["as_ints"] = [1 << 20 if given["name"] == "size" else 1 << 12]
    entries[graph] = json.dumps(program).encode()
    with zipfile.ZipFile(folder / "artifacts/net.pt2", "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return folder


def writes_out_of_bounds(stage: Stage) -> Verdict:
    return stage.hpo("predict", _out_of_bounds(stage), "i.png").refused("_reshape_alias")


def returns_the_heap(stage: Stage) -> Verdict:
    folder = _with_program(stage, lambda images: images.new_empty((images.shape[0], 10)).float())
    return stage.hpo("predict", folder, "i.png").refused("empty")


def plain_mlflow(stage: Stage) -> Verdict:
    """MLflow without hpo loads the model whose program was replaced."""
    folder = _out_of_bounds(stage)
    script = (
        "import sys; sys.modules['hpo'] = None\nimport mlflow, numpy\n"
        f"m = mlflow.pyfunc.load_model({str(folder)!r})\n"
        "print('answers', m.predict(numpy.zeros((1, 8, 8, 1), 'uint8')))"
    )
    command = [stage.program.with_name("python"), "-c", script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=stage.env, timeout=180)
    said = (ended.stdout + ended.stderr).strip().splitlines()[-1:]
    return ended.returncode == 1 and "_reshape_alias" in ended.stderr, f"code {ended.returncode}: {said}"


def postscript(stage: Stage) -> Verdict:
    trap = stage.here / "trap"
    program = stage.write("bin/gs", f"#!/bin/sh\ntouch {trap}\n")
    program.chmod(0o755)
    Image.new("RGB", (8, 8)).save(stage.home / "i.eps")
    (stage.home / "i.eps").rename(stage.home / "i.png")
    said = stage.hpo("predict", "s", "i.png", PATH=f"{program.parent}:{os.environ['PATH']}")
    return not trap.exists(), f"Ghostscript started: {trap.exists()}; {said.evidence}"


def steering_text(stage: Stage) -> Verdict:
    folder = Path(shutil.copytree(stage.model, stage.here / "model"))
    config = json.loads((folder / "artifacts/config.json").read_text())
    config["class_names"] = [f"{name}\x1b]0;owned\x07" for name in config["class_names"]]
    (folder / "artifacts/config.json").write_text(json.dumps(config))
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    stage.study(question='"\\e]0;owned\\a"')
    said = [stage.hpo("predict", folder, "i.png", *more) for more in ([], ["--format", "csv"])]
    said.append(stage.hpo("show", "s.yaml"))
    raw = ["\x1b" in each.text for each in said]
    return not any(raw), f"escape sequences printed by predict, its csv, show: {raw}"


def unfolding_mlmodel(stage: Stage) -> Verdict:
    folder = Path(shutil.copytree(stage.model, stage.here / "model"))
    shutil.rmtree(folder / "artifacts")
    levels = "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 9))
    (folder / "MLmodel").write_text(f"a0: &a0 [x]\n{levels}flavors: [*a8]\n")
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    return stage.hpo("predict", folder, "i.png", prefix=("prlimit", "--cpu=20")).refused("MLmodel")


def huge_image_shape(stage: Stage) -> Verdict:
    folder = Path(shutil.copytree(stage.model, stage.here / "model"))
    config = json.loads((folder / "artifacts/config.json").read_text())
    config["image_shape"] = [10**6, 10**6, 1]
    (folder / "artifacts/config.json").write_text(json.dumps(config))
    Image.new("L", (8, 8)).save(stage.home / "i.png")
    return stage.hpo("predict", folder, "i.png").refused("config.json")


def archive(stage: Stage, change: Callable[[dict[str, bytes]], None], *, honest: bool = True) -> Path:
    """The exported study after a change of its members; honest: with a manifest that agrees."""
    file = stage.home / "s.zip"
    if not file.exists():
        stage.hpo("export", "s", "--out", file)
    with zipfile.ZipFile(file) as old:
        members = {name: old.read(name) for name in old.namelist()}
    change(members)
    if honest:
        manifest = json.loads(members["manifest.json"])
        others = {name: data for name, data in members.items() if name != "manifest.json"}
        manifest["members"] = {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in others.items()
        }
        members["manifest.json"] = json.dumps(manifest).encode()
    changed = stage.home / "changed.zip"
    with zipfile.ZipFile(changed, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    return changed


def number(member: str, name: str, value: object) -> Callable[[dict[str, bytes]], None]:
    """A change that gives a field of a member another value."""

    def change(members: dict[str, bytes]) -> None:
        members[member], count = re.subn(rf'"{name}": [\d.]+'.encode(), f'"{name}": {value}'.encode(), members[member])
        if not count:
            raise ValueError(f"{member} has no {name}")

    return change


def huge_number_in_archive(stage: Stage) -> Verdict:
    file = archive(stage, number("runs.jsonl", "started", 10**30))
    said = stage.hpo("import", file, "--home", stage.here / "new")
    held, evidence = said.refused()
    return held and "disk" not in said.text and not (stage.here / "new").exists(), evidence


def version_9999(stage: Stage) -> Verdict:
    def change(members: dict[str, bytes]) -> None:
        for name in ("number", "champion", "challenger"):
            number("registered.json", name, 9999)(members)

    new = stage.here / "new"
    said = stage.hpo("import", archive(stage, change), "--home", new)
    if said.code:
        return said.refused()
    with sqlite3.connect(new / "mlruns/mlflow.db") as database:
        (rows,) = database.execute("SELECT count(*) FROM model_versions").fetchone()
    return rows < 3, f"{rows} versions in the registry; {said.evidence}"


def members_as_list(stage: Stage) -> Verdict:
    def change(members: dict[str, bytes]) -> None:
        members["manifest.json"] = json.dumps({**json.loads(members["manifest.json"]), "members": []}).encode()

    return stage.hpo("import", archive(stage, change, honest=False), "--home", stage.here / "new").refused()


def alias_of_an_archive(stage: Stage) -> Verdict:
    """The export of a foreign study with the name of mine."""
    file = archive(stage, lambda _: None)
    mine = stage.here / "mine"
    mine.mkdir()
    shutil.copy(stage.home / "s.yaml", mine)
    stage.hpo("run", "s.yaml", "--trials", 1, *ONE, cwd=mine)
    before = stage.hpo("models", "--json", cwd=mine).text
    said = stage.hpo("import", file, "--home", mine)
    after = stage.hpo("models", "--json", cwd=mine).text
    return said.code == 2 and before == after, f"registry changed: {before != after}; {said.evidence}"


def names_of_functions(stage: Stage) -> Verdict:
    trap, away = stage.here / "trap", stage.here / "away"
    away.mkdir()
    stage.write("evilmod.py", f"open({str(trap)!r}, 'w')\n")
    said = []
    for name in ("evilmod:f:x", "evilmod:f ", "evilmod:f/g", "evilmod: f", "evilmod:f"):
        study = stage.study(data=f"{{name: '{name}'}}").rename(away / "s.yaml")
        said.append(stage.hpo("check", study, PYTHONPATH=str(stage.home)))
    return not trap.exists() and all(each.code == 2 for each in said), f"imported: {trap.exists()}; {said[0].evidence}"


def passwords(stage: Stage) -> Verdict:
    leaks = []
    for address in (f"postgresql://127.0.0.1:1/x?user=me&password={SECRET}", f"postgresql://me:a/{SECRET}@h/x"):
        for words in (["status"], ["store", "status", "--json"], ["trials", "s"]):
            shown = SECRET in stage.hpo(*words, HPO_STORAGE=address).text
            leaks += [f"{' '.join(words)} ({address.partition('//')[2][:9]}...)"] * shown
    return not leaks, f"the password is printed by: {', '.join(leaks) or 'nothing'}"


def secret_variables(stage: Stage) -> Verdict:
    stage.write("own.py", "import os\ndef load(**options):\n    raise ValueError(os.environ['DB_PASS'])\n")
    stage.study(data="{name: 'own:load'}")
    said = stage.hpo("check", "s.yaml", DB_PASS=SECRET)
    return SECRET not in said.text and "ValueError" in said.text, said.evidence


FILES: list[Row] = [
    ("17.2 24.2 searched places that decide what is judged", searched_places, False),
    ("17.2 24.4 validation part equal to the test part", test_is_validation, False),
    ("24.4 test images among the training images", test_in_training, False),
    ("24.4 other content of equal size and time", changed_content, False),
    ("17.5 24.8 names of functions in six spellings", names_of_functions, False),
    ("17.5 PostScript called png", postscript, True),
    ("17.5 24.9 escape sequences in class names and questions", steering_text, True),
    ("17.5 24.5 replaced program, loaded by plain MLflow", plain_mlflow, True),
    ("17.5 24.7 10^30 in an archive", huge_number_in_archive, True),
    ("24.5 program that writes out of bounds", writes_out_of_bounds, True),
    ("24.5 program that returns memory as it is", returns_the_heap, True),
    ("24.6 passwords in addresses", passwords, False),
    ("24.6 DB_PASS in an error", secret_variables, False),
    ("24.7 version number 9999 in an archive", version_9999, True),
    ("24.7 members: [] in a manifest", members_as_list, True),
    ("24.7 archive of the same name moves an alias", alias_of_an_archive, True),
    ("24.9 MLmodel whose aliases unfold", unfolding_mlmodel, True),
    ("24.9 image_shape of 10^6 x 10^6", huge_image_shape, True),
]
