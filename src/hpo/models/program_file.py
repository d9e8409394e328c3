"""An exported program as a file, and those of earlier networks, whose graphs serve other weights.

To import what torch.export needs takes three times as long as to import torch. A graph depends on the architecture, not
on the weights, so the cache keeps the program of each architecture of our own families, without weights. A program made
of a kept one is used only if it answers as its network does.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.home import cache_folder
from hpo.models.safe_loader import check_program, load_program
from hpo.spec.study import Setup

_OWN_FAMILIES = ("mlp", "cnn", "convnet", "resnet")
_WEIGHTS, _WEIGHT = "data/weights/model_weights_config.json", "data/weights/weight_"
_GRAPH = "models/model.json"
_BY_WRITER = ("byteorder", ".data/serialization_id")  # entries that torch's writer adds by itself
_TOLERANCE = 1e-5  # of probabilities


def export_to(
    file: Path, whole: nn.Module, trace: Callable[[], Any], *, architecture: str, image_shape: Sequence[int]
) -> None:
    """Write the program of a module from uint8 images to probabilities: of the kept one, or of what trace() gives.

    architecture is of architecture_of; "" where the program is not kept. Raises ModelError where the module does what
    no program may that load_program loads.
    """
    kept = cache_folder() / "programs" / f"{architecture}.pt2" if architecture else None
    if kept is not None:
        with contextlib.suppress(Exception):  # it is not there, or damaged
            _rewrite(kept, file, weights=whole.state_dict())
            if _agrees(file, whole, image_shape):
                return
    with tempfile.TemporaryDirectory() as scratch:
        traced = Path(scratch) / file.name
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.export.save(trace(), traced)
        _rewrite(traced, file)
        check_program(file)
        if kept is not None:
            with contextlib.suppress(OSError, RuntimeError):  # a cache that cannot be written
                kept.parent.mkdir(parents=True, exist_ok=True)
                part = kept.with_name(f"{kept.name}.{os.getpid()}.part")
                _rewrite(traced, part, weights={})
                part.replace(kept)


def architecture_of(setup: Setup, config: Mapping[str, Any]) -> str:
    """A digest of all that the graph of a network's program depends on; "" for other networks than our own families."""
    if setup.model.kind not in _OWN_FAMILIES or config.get("members"):
        return ""
    model = setup.model.model_dump(mode="json")
    # A rate of dropout is nothing to a program; that there is dropout numbers the layers behind it.
    for name in (each for each in model if "dropout" in each):
        model[name] = [bool(rate) for rate in model[name]] if isinstance(model[name], list) else bool(model[name])
    facts = {name: config.get(name) for name in ("image_shape", "several_labels", "views")}
    facts |= {"classes": len(config["class_names"]), "calibrated": bool(config.get("temperature"))}
    whole = [model, facts, setup.task == "binary", torch.__version__, _code()]
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


@functools.cache
def _code() -> str:
    """A digest of the code that builds networks and programs."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def _rewrite(source: Path, target: Path, *, weights: Mapping[str, Tensor] | None = None) -> None:
    """Copy a program without the places of its maker's code: with its weights, with others, or with none where {}.

    Raises ValueError where the others have other names or shapes.
    """
    reader = torch._C.PyTorchFileReader(str(source))
    writer = torch._C.PyTorchFileWriter(str(target))
    for name in reader.get_all_records():
        if name in _BY_WRITER or (weights is not None and name.startswith(_WEIGHT)):
            continue
        entry = reader.get_record(name)
        if name == _GRAPH:
            graph = json.loads(entry)
            for node in graph["graph_module"]["graph"]["nodes"]:
                node["metadata"].pop("stack_trace", None)
            entry = json.dumps(graph).encode()
        writer.write_record(name, entry, len(entry))
    for path, entry in _packed(json.loads(reader.get_record(_WEIGHTS))["config"], weights) if weights else ():
        writer.write_record(path, entry, len(entry))
    writer.write_end_of_file()


def _packed(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> Iterator[tuple[str, bytes]]:
    if config.keys() != weights.keys():
        raise ValueError("other weights")
    for name, entry in config.items():
        values, meta = weights[name].detach(), entry["tensor_meta"]
        shape, strides = ([size["as_int"] for size in meta[each]] for each in ("sizes", "strides"))
        if shape != list(values.shape) or strides != list(values.stride()):
            raise ValueError(f"{name} has another shape")
        yield f"data/weights/{entry['path_name']}", values.reshape(-1).view(torch.uint8).numpy().tobytes()


def _agrees(file: Path, whole: nn.Module, image_shape: Sequence[int]) -> bool:
    """Whether a program answers as its module does, for one image and for several."""
    program, random = load_program(file), torch.Generator().manual_seed(0)
    images = torch.randint(256, (3, *image_shape), dtype=torch.uint8, generator=random)
    with torch.inference_mode():
        return all(torch.allclose(program(each), whole(each), rtol=0, atol=_TOLERANCE) for each in (images, images[:1]))
