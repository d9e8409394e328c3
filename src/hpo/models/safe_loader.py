"""Load an exported program as data: no pickle, no expression and no code of its maker is run.

torch.export.load alone would: it unpickles weights and constants that say they are pickled, evaluates the symbolic
sizes of the graph as Python, compiles its guards, and looks operators up by name in all of torch. So the archive is
read with torch's own reader first, and refused where it holds more than tensors, plain operators and names.
"""

from __future__ import annotations

import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from hpo.errors import ModelError

# As in the code of logged models: it bounds memory, and larger chunks are not faster on a CPU.
_CHUNK_IMAGES = 64
_SAMPLE, _GRAPH = "data/sample_inputs/model.pt", "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
_ENTRY = re.compile(
    r"(?:\.data/(?:version|serialization_id)|byteorder|archive_(?:format|version)"
    rf"|data/weights/weight_\d+|data/constants/tensor_\d+|{'|'.join(map(re.escape, (_SAMPLE, _GRAPH, *_CONFIGS)))})"
)
# aten works on the tensors it is given, save for one operator, which reads a file.
_OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file\.)\w+\.\w+|torch\.sym_(?:float|int|ite|max|min|not)|math\.(?:ceil|floor|trunc)"
    r"|_operator\.(?:add|sub|mul|neg|mod|floordiv|truediv|eq|ne|lt|le|gt|ge|and_|or_|not_|getitem)"
)
_WORD = re.compile(r"[\w.:+-]{0,300}")
# Sizes such as 2*s34 or Max(1, s34): sympy runs them as Python, so no attribute, no power and no other call is let in.
_SIZE = re.compile(
    r"(?:Symbol\('\w+'(?:, \w+=(?:True|False))*\)"
    r"|\b(?:[su]\d+|Max|Min|Mod|PythonMod|FloorDiv|CeilDiv|CleanDiv|TruncToInt)\b"
    r"|\b\d{1,18}\b|[-+/(), ]|(?<!\*)\*(?!\*))*"
)
# Names become variables of generated Python; texts are quoted there.
_OTHERS = {
    "target": _OPERATOR,
    "expr_str": _SIZE,
    "name": re.compile(r"\w{1,300}"),
    "as_string": re.compile(r"[\w .,:;<>=+*/()-]{0,300}"),
}
_TREE_TYPE = re.compile(r'"type": (?!"builtins\.(?:tuple|list|dict)"|null)')
_NOTES = {"stack_trace", "nn_module_stack", "torch_fn"}  # of a node: kept as text, never looked up
_CALLING = {"as_custom_obj", "as_operator", "as_graph", "as_opaque_obj"}


def load_program(file: Path) -> Any:
    """The torch.export.ExportedProgram in a .pt2 file, on the CPU.

    Raises ModelError where the file is missing or damaged, and where loading it would run code.
    """
    try:
        found = next(_unsafe(file), None)
    except Exception as error:  # noqa: BLE001 - a damaged archive fails in many ways
        raise _damaged(file, error) from None
    if found:
        raise ModelError(
            f"{file}: not a plain exported program: {found}, and loading that could run code.",
            "Export the model again with hpo. If you trust its maker: --allow-pickle",
        )
    log = logging.getLogger("torch.export")
    level = log.level
    log.setLevel(logging.CRITICAL)  # else torch prints a traceback of the error that is raised here
    try:
        return torch.export.load(file)
    except Exception as error:  # noqa: BLE001
        raise _damaged(file, error) from None
    finally:
        log.setLevel(level)


def read_config(file: Path) -> dict[str, Any]:
    """The config.json next to a program: class_names, a list of text, and image_shape, [height, width, channels].

    What else is in it stays as it is. Raises ModelError where it is missing or damaged.
    """
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        height, width, channels = map(int, config["image_shape"])
        names = list(map(str, config["class_names"]))
        if not names or min(height, width, channels) < 1:
            raise ValueError("it has no classes, or images without pixels")
        for name in {"mean", "std"} & config.keys():
            if len(list(map(float, config[name]))) != channels:
                raise ValueError(f"{name} has not one value for each of {channels} channels")
        if "ranges" in config:
            pairs = {str(kind): (float(low), float(high)) for kind, (low, high) in config["ranges"].items()}
            if not all(low < high for low, high in pairs.values()):
                raise ValueError("ranges has one that does not rise")
            config["ranges"] = pairs
        return {**config, "image_shape": [height, width, channels], "class_names": names}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelError(f"{file}: damaged or missing: {error}.", "Restore it from a copy.") from None


def _damaged(file: Path, error: Exception) -> ModelError:
    reason = "no such file" if isinstance(error, FileNotFoundError) else (str(error).splitlines() or [""])[0].strip()
    return ModelError(f"{file}: the exported program cannot be read: {reason or type(error).__name__}.", "Restore it.")


def _unsafe(file: Path) -> Iterator[str]:
    """What in the archive is more than data; ends at the first that makes further reading pointless."""
    with zipfile.ZipFile(file) as archive:
        names = [name.partition("/")[2] for name in archive.namelist()]
        packed, unpacked = file.stat().st_size, sum(entry.file_size for entry in archive.infolist())
        if unpacked > 2 * packed + 1_000_000:
            yield f"{unpacked:,} bytes packed into {packed:,}"
        elif broken := archive.testzip():
            raise ValueError(f"{broken} has another checksum than it should")
    # torch's own reader: what it sees is what torch.export.load will see.
    reader = torch._C.PyTorchFileReader(str(file))
    records = reader.get_all_records()
    for name in {*names, *records}:
        if not _ENTRY.fullmatch(name):
            yield f"an entry {name[:80]!r}"
    if sorted(names) != sorted(records) or len(set(names)) != len(names):
        yield "a list of entries that readers disagree on"
    for name in _CONFIGS:
        for entry in json.loads(reader.get_record(name))["config"].values():
            if entry["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", entry["path_name"]):
                yield f"a pickled value in {name}"
    try:
        torch.load(io.BytesIO(reader.get_record(_SAMPLE)), weights_only=True)
    except Exception:  # noqa: BLE001 - whatever stops it, torch.export.load would unpickle it then
        yield f"pickled objects in {_SAMPLE}"
    program = json.loads(reader.get_record(_GRAPH))
    if program.get("guards_code") or program["graph_module"].get("treespec_namedtuple_fields"):
        yield "guards or types of its own"
    yield from _suspicious(program, "")


def _suspicious(tree: Any, key: str) -> Iterator[str]:
    """Texts of the graph that are no names of tensors, operators or sizes."""
    if isinstance(tree, str):
        right = _OTHERS.get(key, _WORD)
        tree_of_arguments = key in ("in_spec", "out_spec") and not _TREE_TYPE.search(tree)
        if len(tree) > 10_000 or not (tree_of_arguments or right.fullmatch(tree)):
            yield f"{key or 'a text'} {tree[:80]!r}"
    elif isinstance(tree, list):
        for item in tree:
            yield from _suspicious(item, key)
    elif isinstance(tree, dict):
        for name, item in tree.items():
            if not _WORD.fullmatch(name) or (name in _CALLING and item):
                yield f"{name[:80]!r} in the graph"
            if name == "metadata" and isinstance(item, dict) and set(item) <= _NOTES:
                continue
            yield from _suspicious(item, name)


class Program:
    """A loaded exported program, on the CPU."""

    def __init__(self, file: Path) -> None:
        """Load it as load_program does, and raise as that does."""
        self._file = file
        self._net = load_program(file).module()

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images (n, height, width, channels) uint8 -> probabilities (n, classes) float32; n >= 0.

        Raises ModelError where the program does not accept them.
        """
        try:
            with torch.inference_mode():
                # A copy, because torch wants memory that may be written.
                chunks = [
                    self._net(torch.from_numpy(np.array(images[start : start + _CHUNK_IMAGES], order="C")))
                    for start in range(0, len(images) or 1, _CHUNK_IMAGES)
                ]
                found: NDArray[np.float32] = torch.cat(chunks).numpy()
        except Exception as error:
            raise ModelError(
                f"{self._file}: fails for images of shape {images.shape}: {str(error).splitlines()[0]}.",
                "The program and the config.json next to it do not fit: restore them from a copy.",
            ) from error
        return found
