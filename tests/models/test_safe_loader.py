"""An exported program loads as data: whatever would run code of its maker is refused before torch sees it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from hpo.errors import ModelError
from hpo.models import PROGRAM, build_model, export_program, save_trained
from hpo.models.safe_loader import Program, check_answers, load_program, read_config
from hpo.spec.models import MlpSpec
from hpo.spec.study import DataSpec, Setup, SplitSpec
from hpo.spec.training import TrainingSpec

GRAPH, SAMPLE = "models/model.json", "data/sample_inputs/model.pt"
WEIGHTS = "data/weights/model_weights_config.json"
Change = Callable[[dict[str, bytes], Path], None]


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hpo.data.prepare import TrialData

    folder = tmp_path_factory.mktemp("program")
    model = MlpSpec(kind="mlp", hidden=4)
    setup = Setup(data=DataSpec(name="digits"), split=SplitSpec(), model=model, training=TrainingSpec())
    rows = torch.arange(4)
    images = torch.zeros((4, 8, 8, 1), dtype=torch.uint8)
    data = TrialData(images, rows, rows, rows, ("0", "1", "2", "3"), (0.3,), (0.2,))
    save_trained(build_model(model, image_shape=(8, 8, 1), classes=4, seed=0), setup, data, folder)
    return export_program(folder)


def changed(program: Path, folder: Path, change: Change) -> tuple[Path, Path]:
    """A copy of the program with a change to its entries; the second path is what the change would make."""
    with zipfile.ZipFile(program) as archive:
        root = archive.namelist()[0].partition("/")[0]
        entries = {name.partition("/")[2]: archive.read(name) for name in archive.namelist()}
    trap = folder / "trap"
    change(entries, trap)
    with zipfile.ZipFile(folder / PROGRAM, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"{root}/{name}", content)
    return folder / PROGRAM, trap


def pickled_weight(entries: dict[str, bytes], trap: Path) -> None:
    config = json.loads(entries[WEIGHTS])
    first = next(iter(config["config"].values()))
    first["use_pickle"] = True
    buffer = io.BytesIO()
    torch.save(Touch(trap), buffer)
    entries[WEIGHTS] = json.dumps(config).encode()
    entries[f"data/weights/{first['path_name']}"] = buffer.getvalue()


def pickled_sample(entries: dict[str, bytes], trap: Path) -> None:
    buffer = io.BytesIO()
    torch.save(Touch(trap), buffer)
    entries[SAMPLE] = buffer.getvalue()


def pickled_constant(entries: dict[str, bytes], trap: Path) -> None:
    name = "data/constants/model_constants_config.json"
    entry = {"path_name": "opaque_obj_0", "is_param": False, "use_pickle": True, "tensor_meta": None}
    entries[name] = json.dumps({"config": {"x": entry}}).encode()
    entries["data/constants/opaque_obj_0"] = pickle.dumps(Touch(trap))


def in_graph(old: str, new: Callable[[Path], str]) -> Change:
    def change(entries: dict[str, bytes], trap: Path) -> None:
        text = entries[GRAPH].decode()
        assert old in text
        entries[GRAPH] = text.replace(old, new(trap).replace("\\", "\\\\").replace('"', '\\"')).encode()

    return change


def size_expression(entries: dict[str, bytes], trap: Path) -> None:
    program = json.loads(entries[GRAPH])

    def poison(tree: Any) -> None:
        for key, item in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
            if key == "expr_str":
                tree[key] = f"__import__('pathlib').Path({str(trap)!r}).touch() or Symbol('s0')"
            poison(item)

    poison(program)
    entries[GRAPH] = json.dumps(program).encode()


def guard(entries: dict[str, bytes], trap: Path) -> None:
    program = json.loads(entries[GRAPH])
    program["guards_code"] = [f"open({str(trap)!r}, 'w')"]
    entries[GRAPH] = json.dumps(program).encode()


def extra_entry(name: str) -> Change:
    def change(entries: dict[str, bytes], trap: Path) -> None:
        entries[name] = b"x"

    return change


HARMFUL: dict[str, Change] = {
    "a pickled weight": pickled_weight,
    "a pickled sample input": pickled_sample,
    "a pickled constant": pickled_constant,
    "a size that is code": size_expression,
    "a guard that is code": guard,
    "a name that is code": in_graph('"images"', lambda trap: f'"x=open({str(trap)!r},chr(119))"'),
    "a compiled library": extra_entry("data/aotinductor/model/run.so"),
    "weights of the older kind": extra_entry("data/weights/model.pt"),
    "constants of the older kind": extra_entry("data/constants/model.pt"),
    "a path upwards": extra_entry("../../escaped"),
    "an extra file": extra_entry("extra/x"),
}


@pytest.mark.parametrize("change", HARMFUL.values(), ids=HARMFUL)
def test_a_program_that_could_run_code_is_refused_unopened(program: Path, tmp_path: Path, change: Change) -> None:
    file, trap = changed(program, tmp_path, change)
    with pytest.raises(ModelError, match=r"could do harm|cannot be read"):
        load_program(file)
    assert not trap.exists()


# What runs code, reaches memory of others, hands it out, draws numbers, prints, or reads and writes files.
FORBIDDEN = ["torch.hub.load", "torch.ops.mylib.run.default", "torch.ops.aten.from_file.default"]
FORBIDDEN += [f"torch.ops.aten.{name}" for name in ("as_strided.default", "_reshape_alias.default", "resize_.default")]
FORBIDDEN += [f"torch.ops.aten.{name}" for name in ("set_.source_Tensor", "empty.memory_format", "empty_like.default")]
FORBIDDEN += [
    f"torch.ops.aten.{name}" for name in ("rand.default", "bernoulli.default", "normal_.default", "seed.none")
]
FORBIDDEN += [f"torch.ops.aten.{name}" for name in ("_print.default", "save.default", "_conj.default", "relu.nothing")]
FORBIDDEN += [f"torch.ops.aten.{name}" for name in ("__class__.mro", "max_pool2d_with_indices_backward.default")]


@pytest.mark.parametrize("operator", FORBIDDEN)
def test_an_operator_that_does_more_than_compute_is_refused_by_name(
    program: Path, tmp_path: Path, operator: str
) -> None:
    file, _ = changed(program, tmp_path, in_graph("torch.ops.aten.relu.default", lambda _: operator))
    with pytest.raises(ModelError, match=f"the operator {operator}, which is not among those of plain networks"):
        load_program(file)


def written(net: Callable[[torch.Tensor], torch.Tensor], file: Path) -> Path:
    """A program of a function of uint8 images (n, 8, 8, 1), exported as anyone may."""

    class Net(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return net(images)

    shapes = {"images": {0: torch.export.Dim("images")}}
    example = (torch.zeros((2, 8, 8, 1), dtype=torch.uint8),)
    torch.export.save(torch.export.export(Net().eval(), example, dynamic_shapes=shapes), file)
    return file


ATTACKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "memory of others": lambda images: torch.empty((images.shape[0], 4)),
    "all of a storage": lambda images: images.float().as_strided((1, 4), (1, 1)).expand(images.shape[0], 4),
    "random numbers": lambda images: torch.rand((images.shape[0], 4)),
    "dropout as in training": lambda images: torch.dropout(images.float().flatten(1)[:, :4], 0.5, True),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_a_program_of_anyone_that_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ModelError, match=r"the operator torch\.ops\.aten\.\w+\.\w+, which (is not|draws)"):
        load_program(written(ATTACKS[name], tmp_path / PROGRAM))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"as_scalar_type": 7', '"as_int": -2'),
        ('"name": "dtype", "arg": {"as_scalar_type": 7}', '"name": "non_blocking", "arg": {"as_int": -2}'),
    ],
    ids=["a number", "a number in its place"],
)
def test_a_type_that_is_only_a_number_is_refused(program: Path, tmp_path: Path, before: str, after: str) -> None:
    def change(entries: dict[str, bytes], trap: Path) -> None:
        assert before.encode() in entries[GRAPH]
        entries[GRAPH] = entries[GRAPH].replace(before.encode(), after.encode(), 1)

    with pytest.raises(
        ModelError, match=r"the operator torch\.ops\.aten\.to\.dtype, (whose dtype is none|which is given)"
    ):
        load_program(changed(program, tmp_path, change)[0])


def test_weights_of_another_layout_than_plain_rows_are_refused(program: Path, tmp_path: Path) -> None:
    def sparse(entries: dict[str, bytes], trap: Path) -> None:
        entries[WEIGHTS] = entries[WEIGHTS].replace(b'"layout": 7', b'"layout": 2', 1)

    with pytest.raises(ModelError, match="'layout' in the graph"):
        load_program(changed(program, tmp_path, sparse)[0])


GOOD = np.full((2, 4), 0.25, np.float32)


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        (GOOD[:1], r"shape \(1, 4\) for 2 images and 4 classes"),
        (GOOD * np.float32("nan"), "NaN or infinite"),
        (GOOD.astype(np.int64), "of type int64"),
        (GOOD * 2, "add up to 1 only within 1"),
        (GOOD + np.array([[1, -1, 0, 0]], np.float32), "lie 0.75 outside 0 to 1"),
    ],
)
def test_answers_that_are_no_probabilities_are_refused(answers: np.ndarray, fault: str) -> None:
    with pytest.raises(ModelError, match=fault):
        check_answers(answers, images=2, classes=4, several=False)


def test_probabilities_are_let_through() -> None:
    np.testing.assert_array_equal(check_answers(GOOD, images=2, classes=4, several=False), GOOD)
    check_answers(GOOD * 3, images=2, classes=4, several=True)
    check_answers(GOOD[:0], images=0, classes=4, several=False)


@pytest.mark.parametrize(
    "content",
    [
        '{"class_names": ["a"], "image_shape": [1000000, 1000000, 3]}',
        '{"class_names": ["a"], "image_shape": [1e400, 8, 1]}',
        f'{{"class_names": ["a"], "image_shape": [8, 8, 1], "mean": [1{"0" * 400}]}}',
        '{"class_names": ["a"], "image_shape": [8, 8, 1], "std": [NaN]}',
        '{"class_names": ["a"], "image_shape": [8, 8, 1], "ranges": {"float32": [0, Infinity]}}',
        f'{{"class_names": ["a"], "image_shape": [8, 8, {"9" * 5000}]}}',
        f'{{"class_names": ["{"a" * 20_000_000}"], "image_shape": [8, 8, 1]}}',
    ],
    ids=["large", "infinite", "long", "nan", "range", "digits", "bytes"],
)
def test_sizes_and_numbers_without_end_are_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ModelError, match="damaged or missing"):
        read_config(tmp_path / "config.json")


@pytest.mark.parametrize("name", ["a pickled weight", "a pickled sample input", "a size that is code"])
def test_torch_itself_would_have_run_that_code(program: Path, tmp_path: Path, name: str) -> None:
    file, trap = changed(program, tmp_path, HARMFUL[name])
    with contextlib.suppress(Exception):  # it fails after the fact
        torch.export.load(file)
    assert trap.exists()


def test_an_unchanged_copy_is_loaded_and_answers_as_before(program: Path, tmp_path: Path) -> None:
    file, _ = changed(program, tmp_path, lambda entries, trap: None)
    images = np.random.default_rng(0).integers(0, 256, (70, 8, 8, 1), np.uint8)
    np.testing.assert_array_equal(Program(file).predict(images), Program(program).predict(images))
    assert Program(program).predict(images).shape == (70, 4)
    assert Program(program).predict(images[:0]).shape == (0, 4)


def _pickle(content: bytes) -> bytes:
    return pickle.dumps(content)


DAMAGED: dict[str, Callable[[bytes], bytes]] = {
    "another magic number": lambda content: b"MZ\x90\x00" + content[4:],
    "a script before it": lambda content: b"#!/bin/sh\n" + content,
    "a pickle": _pickle,
    "half of it": lambda content: content[: len(content) // 2],
    "nothing": lambda content: b"",
}


@pytest.mark.parametrize("change", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_is_no_program_is_refused(program: Path, tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    (tmp_path / PROGRAM).write_bytes(change(program.read_bytes()))
    with pytest.raises(ModelError, match="the exported program cannot be read"):
        load_program(tmp_path / PROGRAM)


def _sizes(entry: dict[str, Any]) -> None:
    entry["sizes"] = [{"as_int": 10**9}] * 2


def _offset(entry: dict[str, Any]) -> None:
    entry["storage_offset"] = {"as_int": 10**6}


def _strides(entry: dict[str, Any]) -> None:
    entry["strides"] = [{"as_int": 10**6}] * 2


@pytest.mark.parametrize("change", [_sizes, _offset, _strides])
def test_weights_that_reach_beyond_their_file_are_refused(
    program: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    def beyond(entries: dict[str, bytes], trap: Path) -> None:
        config = json.loads(entries[WEIGHTS])
        for entry in config["config"].values():
            if len(entry["tensor_meta"]["sizes"]) == 2:
                change(entry["tensor_meta"])
        entries[WEIGHTS] = json.dumps(config).encode()

    with pytest.raises(ModelError, match="the exported program cannot be read"):
        Program(changed(program, tmp_path, beyond)[0])


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="there are no such devices here")
@pytest.mark.parametrize("name", [PROGRAM, "config.json"])
def test_a_file_without_an_end_is_refused_unread(tmp_path: Path, name: str) -> None:
    """Reading it would hang, or fill the memory."""
    read = load_program if name == PROGRAM else read_config
    for place in ("pipe", "device"):
        (tmp_path / place).mkdir()
        file = tmp_path / place / name
        os.mkfifo(file) if place == "pipe" else file.symlink_to("/dev/full")
        with pytest.raises(ModelError, match="it is no ordinary file"):
            read(file)


def test_a_bomb_is_not_unpacked(program: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(program) as archive, zipfile.ZipFile(tmp_path / PROGRAM, "w", zipfile.ZIP_DEFLATED) as bomb:
        for name in archive.namelist():
            bomb.writestr(name, bytes(300_000_000) if name.endswith("weight_0") else archive.read(name))
    with pytest.raises(ModelError, match="300,"):
        load_program(tmp_path / PROGRAM)
