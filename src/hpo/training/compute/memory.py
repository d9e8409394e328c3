"""Memory that does not suffice: how it is told from other faults, and how to go on with less."""

from __future__ import annotations

import gc

import torch

from hpo.spec.study import Setup

# What torch and CUDA's libraries say in plain RuntimeErrors.
_WORDS = ("not enough memory", "out of memory", "cannot allocate memory", "alloc_failed")


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether this, or what caused it, says that memory did not suffice, on the CPU or on a GPU."""
    while error is not None:
        told = isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)
        if told or isinstance(error, MemoryError | torch.OutOfMemoryError):
            return True
        error = error.__cause__
    return False


def halved(setup: Setup) -> Setup | None:
    """The setup with half as many images at once in the network and the same effective batch; None at one image."""
    training = setup.training
    now = min(training.micro_batch or training.batch_size, training.batch_size)
    if now == 1:
        return None
    return setup.model_copy(update={"training": training.model_copy(update={"micro_batch": -(-now // 2)})})


def free_memory() -> None:
    """Give back what a failed training held; no traceback may hold on to it any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
