"""Compute an exported program from its archive with the operators that its graph names, and nothing else of torch.

torch.export.load makes Python of the graph, for which it imports torch's compiler: three times as long as torch itself
takes to import. A graph of plain networks needs no more than a loop over its operators. hpo.models.safe_loader checks
the archive first, and a copy of this file lies beside the one of that file in every logged model.
"""

from __future__ import annotations

import json
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_GRAPH = "models/model.json"
_CONFIGS = ("data/weights/model_weights_config.json", "data/constants/model_constants_config.json")
# Numbers of torch/_export/serde/schema.py.
_TYPES = {
    1: torch.uint8,
    2: torch.int8,
    3: torch.int16,
    4: torch.int32,
    5: torch.int64,
    6: torch.float16,
    7: torch.float32,
    8: torch.float64,
    9: torch.complex32,
    10: torch.complex64,
    11: torch.complex128,
    12: torch.bool,
    13: torch.bfloat16,
}
_FORMATS = {
    1: torch.contiguous_format,
    2: torch.channels_last,
    3: torch.channels_last_3d,
    4: torch.preserve_format,
}
_BY_PLACE = 1
_MODULES = {"_operator": operator, "math": math, "torch": torch}
_Values = dict[str, Any]


def _symbol(content: Mapping[str, Any], values: _Values) -> Any:
    """A size, by its name or as it is."""
    return values[content["as_name"]] if "as_name" in content else next(iter(content.values()))


def _tensor(content: Mapping[str, Any], values: _Values) -> Any:
    """A tensor by its name; {"as_none": true} is none."""
    found = content.get("as_tensor", content)
    return values[found["name"]] if "name" in found else None


def _each(read: Callable[[Any, _Values], Any]) -> Callable[[Any, _Values], Any]:
    return lambda content, values: [read(item, values) for item in content]


def _float(content: Any, _: _Values) -> float:
    return float(content)  # infinities are written as text


def _as_it_is(content: Any, _: _Values) -> Any:
    return content


# The kinds of an argument -> its value.
_ARGUMENTS: dict[str, Callable[[Any, _Values], Any]] = {
    "as_none": lambda *_: None,
    "as_tensor": _tensor,
    "as_optional_tensor": _tensor,
    "as_tensors": _each(_tensor),
    "as_optional_tensors": _each(_tensor),
    "as_sym_int": _symbol,
    "as_sym_float": _symbol,
    "as_sym_bool": _symbol,
    "as_sym_ints": _each(_symbol),
    "as_sym_floats": _each(_symbol),
    "as_sym_bools": _each(_symbol),
    "as_float": _float,
    "as_floats": _each(_float),
    "as_scalar_type": lambda content, _: _TYPES[content],
    "as_memory_format": lambda content, _: _FORMATS[content],
    "as_layout": lambda *_: torch.strided,
    "as_device": lambda *_: torch.device("cpu"),
    **dict.fromkeys(("as_int", "as_ints", "as_bool", "as_bools", "as_string", "as_strings"), _as_it_is),
}


def _only(union: Mapping[str, Any]) -> tuple[str, Any]:
    """The kind of an entry and its content."""
    ((kind, content),) = union.items()
    return kind, content


def _names(output: Mapping[str, Any]) -> list[str]:
    """What an output of an operator is called; a list of tensors has several names."""
    kind, content = _only(output)
    if kind == "as_none":
        return []
    return [
        each.get("name") or each.get("as_name", "") for each in (content if isinstance(content, list) else [content])
    ]


class Graph:
    """A program of one tensor to one tensor, on the CPU. state_dict are its weights and buffers, by their names."""

    def __init__(self, file: Path) -> None:
        """Read it; raises KeyError, ValueError, TypeError or RuntimeError where something is not as it should be."""
        reader = torch._C.PyTorchFileReader(str(file))
        if reader.get_record("byteorder").decode() != sys.byteorder:
            raise ValueError("it was written on a machine with another order of bytes")
        tensors = {name: tensor for config in _CONFIGS for name, tensor in _tensors(reader, config).items()}
        module = json.loads(reader.get_record(_GRAPH))["graph_module"]
        graph, signature = module["graph"], module["signature"]
        self.state_dict: dict[str, Tensor] = {}
        self._given: _Values = {}
        asked = []
        for kind, spec in map(_only, signature["input_specs"]):
            if kind == "user_input":
                asked.append(spec["arg"]["as_tensor"]["name"])
            else:
                name = spec[{"parameter": "parameter_name", "buffer": "buffer_name"}.get(kind, "tensor_constant_name")]
                self._given[spec["arg"]["name"]] = tensors[name]
                if kind != "tensor_constant":
                    self.state_dict[name] = tensors[name]
        ((kind, answer),) = map(_only, signature["output_specs"])
        if kind != "user_output" or len(asked) != 1:
            raise ValueError("it takes more than one tensor, or answers more")
        self._asked, self._answer = asked[0], answer["arg"]["as_tensor"]["name"]
        self._wanted = graph["tensor_values"][self._asked]
        self._steps = [(_function(node["target"]), node["inputs"], node["outputs"]) for node in graph["nodes"]]
        self._done = _last_uses(graph["nodes"], keep={self._answer, *self._given})

    def __call__(self, images: Tensor) -> Tensor:
        """The answer for images of the type and shape that it was exported for; sizes with a name are free."""
        self._check(images)
        values: _Values = {**self._given, self._asked: images}
        for (function, inputs, outputs), done in zip(self._steps, self._done, strict=True):
            places, words = [], {}
            for each in inputs:
                kind, content = _only(each["arg"])
                value = _ARGUMENTS[kind](content, values)
                if each["kind"] == _BY_PLACE:
                    places.append(value)
                else:
                    words[each["name"]] = value
            found = function(*places, **words)
            names = [name for output in outputs for name in _names(output)]
            several = isinstance(found, tuple | list)
            values.update(zip(names, found if several else [found], strict=False))
            for name in done:
                values.pop(name, None)
        answer: Tensor = values[self._answer]
        return answer

    def _check(self, images: Tensor) -> None:
        sizes = [size.get("as_int") for size in self._wanted["sizes"]]
        fits = len(sizes) == images.ndim and all(
            wanted in (None, size) for wanted, size in zip(sizes, images.shape, strict=True)
        )
        if not fits or images.dtype != _TYPES[self._wanted["dtype"]]:
            shape = ", ".join("n" if size is None else str(size) for size in sizes)
            raise ValueError(f"it takes ({shape}) of {_TYPES[self._wanted['dtype']]}")


def _function(target: str) -> Callable[..., Any]:
    """The function that a node names; which ones may be named is checked before."""
    *module, name, overload = target.split(".")
    function: Callable[..., Any] = getattr(getattr(torch.ops.aten, name) if module else _MODULES[name], overload)
    return function


def _tensors(reader: Any, config: str) -> dict[str, Tensor]:
    """The tensors that a config of the archive lists, by their names; several may share one record."""
    found, records = {}, dict[str, Tensor]()
    for name, entry in json.loads(reader.get_record(config))["config"].items():
        meta, path = entry["tensor_meta"], entry["path_name"]
        kind = _TYPES[meta["dtype"]]
        if path not in records:
            content = bytearray(reader.get_record(f"{config.rpartition('/')[0]}/{path}"))
            # A clone lies where torch would put it: sums of differently aligned memory differ in their last bit.
            records[path] = torch.frombuffer(content or bytearray(1), dtype=torch.uint8)[: len(content)].clone()
        sizes, strides = ([each["as_int"] for each in meta[key]] for key in ("sizes", "strides"))
        # as_strided raises where that lies outside the record.
        found[name] = records[path].view(kind).as_strided(sizes, strides, meta["storage_offset"]["as_int"])
    return found


def _last_uses(nodes: Sequence[Mapping[str, Any]], *, keep: set[str]) -> list[list[str]]:
    """For each node, what is not needed after it: large images would fill the memory with what lies between."""
    seen, done = set(keep), []
    for node in reversed(nodes):
        names = {*_mentioned(node["inputs"]), *(name for output in node["outputs"] for name in _names(output))}
        done.append(sorted(names - seen))
        seen |= names
    return done[::-1]


def _mentioned(tree: Any) -> list[str]:
    """All values that the arguments of a node name."""
    if isinstance(tree, list):
        return [name for item in tree for name in _mentioned(item)]
    if not isinstance(tree, dict):
        return []
    if "arg" in tree:
        return _mentioned(tree["arg"])
    own = [tree[key] for key in ("name", "as_name") if isinstance(tree.get(key), str)]
    return own + [name for item in tree.values() for name in _mentioned(item)]
