"""A GPU that is only pretended: its tensors hold their numbers in the CPU's memory and refuse what a GPU would refuse.

Within pretend_gpu() the device cuda:0 exists. What is computed there is computed on the CPU, so a training must end as
it does on the CPU, but for the order of sums. An operation whose tensors are on two devices fails as on a GPU, and what
would make the CPU wait for the GPU is counted. Not pretended: kernels, bfloat16, streams, memory and graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from hpo.training import augment, batches, checkpoint, trial

GPU = torch.device("cuda", 0)
_BETWEEN = ("aten::_to_copy", "aten::copy_")  # the operations that may see two devices
_INDEXING = ("aten::index", "aten::index_put_", "aten::index_put", "aten::_index_put_impl_")  # take indices of the CPU
# Their answer, or its shape, is not known before the GPU has computed it.
_WAITING = (
    "aten::_local_scalar_dense",
    "aten::nonzero",
    "aten::masked_select",
    "aten::_unique2",
    "aten::unique_dim",
    "aten::bincount",
    "aten::equal",
    "aten::is_nonzero",
)

# Those of the pretended GPU, by their address: torch passes another object of the same generator.
_generators: dict[int, torch.Generator] = {}


class WrongDeviceError(RuntimeError):
    """What torch would raise on a GPU."""


class OnGpu(torch.Tensor):
    """A tensor of the pretended GPU; to torch's own code, such as autograd's, it is on the device meta."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="meta",
        )

    def __init__(self, held):
        self.held = held

    def __repr__(self):
        return f"OnGpu({self.held})"

    device = property(lambda _: GPU)
    is_cuda = property(lambda _: True)
    is_meta = property(lambda _: False)

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, value):
        torch.Tensor.data.__set__(self, value)
        self.held = value.held

    def tolist(self):
        return self.cpu().tolist()

    def __tensor_flatten__(self):
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, *_):
        return OnGpu(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {}, None)


class PretendGpu(TorchDispatchMode):
    """Computes all operations of this thread. waits counts those after which a GPU is waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.operations: Counter[str] = Counter()  # on the GPU

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return _compute(func, args, kwargs or {}, self)


def _compute(func, args, kwargs, gpu):
    name, tensors = func._schema.name, [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    held = [tensor for tensor in tensors if isinstance(tensor, OnGpu)]
    asked = kwargs.get("device")
    # torch itself calls the tensor's own device meta.
    there = bool(held) if asked is None else torch.device(asked).type in ("cuda", *["meta"] * bool(held))
    if name in _BETWEEN and asked is None:
        there = isinstance(args[0], OnGpu)
    _check(name, args, kwargs, tensors, there=there)
    if gpu is not None and (held or there):
        gpu.operations[name] += 1
        if wait := _wait(name, args, kwargs, tensors, there=there):
            gpu.waits[wait] += 1
    plain = {key: tree_map(_held, value) for key, value in kwargs.items()}
    plain |= {} if asked is None else {"device": torch.device("cpu")}
    answer = func(*tree_map(_held, args), **plain)
    if not there:
        return answer
    return return_and_correct_aliasing(func, args, kwargs, tree_map(_on_gpu, answer))


def _held(value):
    return value.held if isinstance(value, OnGpu) else value


def _on_gpu(value):
    return OnGpu(value) if isinstance(value, torch.Tensor) and not isinstance(value, OnGpu) else value


def _check(name, args, kwargs, tensors, *, there):
    generator = kwargs.get("generator")
    if generator is not None and there != (generator._cdata in _generators):
        raise WrongDeviceError(f"{name}: Expected another device type for generator than '{generator.device}'")
    if name in _BETWEEN or not any(isinstance(tensor, OnGpu) for tensor in tensors):
        return
    elsewhere = [tensor for tensor in tensors if not isinstance(tensor, OnGpu)]
    if name in _INDEXING and isinstance(args[0], OnGpu):
        elsewhere = []
    # Numbers may lie on the CPU.
    if any(tensor.ndim for tensor in elsewhere) or (elsewhere and name == "aten::cat"):
        raise WrongDeviceError(f"{name}: Expected all tensors to be on the same device, but found cuda:0 and cpu")


def _wait(name, args, kwargs, tensors, *, there):
    """Why the GPU is waited for; "" if it is not."""
    if name in _BETWEEN:
        source = args[0] if name == "aten::_to_copy" else args[1]
        if isinstance(source, OnGpu) != there and not kwargs.get("non_blocking") and not (args[2:] and args[2]):
            return "copy to the GPU" if there else "copy to the CPU"
    if name in _INDEXING:
        if any(tensor.dtype is torch.bool for tensor in tree_leaves(args[1]) if tensor is not None):
            return f"{name} by a mask"
        if any(not isinstance(tensor, OnGpu) for tensor in tensors):
            return f"{name} by indices of the CPU"
    return name if name in _WAITING else ""


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """A machine with one GPU."""
    chance, plain = torch.Generator(), torch.Generator
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: False,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
        "get_rng_state": lambda *_: chance.get_state(),
        "set_rng_state": lambda state, *_: chance.set_state(state),
        "is_bf16_supported": lambda **_: False,
        "is_current_stream_capturing": lambda: False,
    }
    with pytest.MonkeyPatch.context() as patch, PretendGpu() as gpu:
        for name, stand_in in cuda.items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch, "inference_mode", torch.no_grad)  # wrapped tensors have no such mode
        patch.setattr(torch.accelerator, "current_accelerator", lambda **_: None)  # optimizers look for graph captures
        patch.setitem(checkpoint._GET, "cuda", cuda["get_rng_state"])
        patch.setitem(checkpoint._SET, "cuda", cuda["set_rng_state"])

        def made(device="cpu"):
            generator = plain()
            if torch.device(device).type == "cuda":
                _generators[generator._cdata] = generator
            return generator

        patch.setattr(torch, "Generator", made)
        try:
            yield gpu
        finally:  # what was remembered there is of no use elsewhere
            _generators.clear()
            for remembered in (trial.trial_data, batches._all_flipped, augment._aspect, augment._colours):
                remembered.cache_clear()
