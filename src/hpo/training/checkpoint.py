"""Checkpoints of trainings: one file each, written atomically, used only if it fits the training."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.records import DataCard, Epoch
from hpo.spec.study import Setup
from hpo.training.data_parallel import ALONE, Ranks

_FORMAT = 1
_SEAL_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class Saved:
    """A training so far: the epochs of all folds, the measured precisions, and the state after the last epoch.

    state is that of the current fold, None between two folds.
    """

    epochs: tuple[Epoch, ...] = ()
    precisions: Mapping[str, str] = field(default_factory=dict)
    state: Mapping[str, Any] | None = None

    def of(self, fold: int) -> tuple[Epoch, ...]:
        """The epochs of one fold."""
        return tuple(epoch for epoch in self.epochs if epoch.fold == fold)

    def fits(self, net: nn.Module) -> bool:
        """True if the state has the weights of net: a user may have changed their own network in between."""
        if self.state is None:
            return True
        kept, own = self.state["net"], net.state_dict()
        return kept.keys() == own.keys() and all(kept[name].shape == own[name].shape for name in own)


class Checkpoint:
    """The file of one training; with path None nothing is stored.

    It begins with a checksum of its content and of all that determines the training: setup, data, seed, kind of device
    and version of torch, number of ranks. A damaged file, or that of another training, is read as an empty Saved.
    """

    def __init__(
        self,
        path: Path | None,
        setup: Setup,
        card: DataCard,
        *,
        seed: int,
        device_name: str,
        ranks: Ranks = ALONE,
    ) -> None:
        self._path, self._ranks = path, ranks
        self._marks = _marks(setup, card, seed=seed, device_name=device_name, ranks=self._ranks.count)

    def load(self) -> Saved:
        """Read the file; without a valid one, an empty Saved."""
        try:
            raw = memoryview(self._path.read_bytes()) if self._path else memoryview(b"")
        except OSError:
            return Saved()
        content = raw[_SEAL_BYTES:]
        if bytes(raw[:_SEAL_BYTES]) != self._seal(content):
            return Saved()
        plain = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        return Saved(tuple(Epoch(**epoch) for epoch in plain["epochs"]), plain["precisions"], plain["state"])

    def save(
        self, epochs: Sequence[Epoch], precisions: Mapping[str, str], state: Mapping[str, Any] | None = None
    ) -> None:
        """Replace the file, as the first rank. If the disk refuses, the training continues without a checkpoint."""
        if self._path is None or not self._ranks.leads:
            return
        content = io.BytesIO()
        plain = {"epochs": [_plain(epoch) for epoch in epochs], "precisions": dict(precisions), "state": state}
        torch.save(plain, content)
        part = self._path.with_name(f"{self._path.name}.{os.getpid()}.part")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with part.open("wb") as file:
                file.write(self._seal(content.getbuffer()))
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            part.replace(self._path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()

    def _seal(self, content: memoryview) -> bytes:
        digest = hashlib.sha256(self._marks)
        digest.update(content)
        return digest.digest()


def _marks(setup: Setup, card: DataCard, *, seed: int, device_name: str, ranks: int) -> bytes:
    """A digest of everything that determines a training, in 32 bytes; the interval of checkpoints does not."""
    training = setup.training.model_copy(update={"checkpoint": None})
    settings = setup.model_copy(update={"training": training}).model_dump_json()
    marks = [str(_FORMAT), torch.__version__, settings, card.digest, str(seed), torch.device(device_name).type]
    marks += [f"{ranks} ranks"] if ranks > 1 else []
    return hashlib.sha256("\n".join(marks).encode()).digest()


def _plain(epoch: Epoch) -> dict[str, Any]:
    return {**asdict(epoch), "scores": {name: float(value) for name, value in epoch.scores.items()}}


def random_state(generator: torch.Generator, device: torch.device) -> list[Tensor]:
    """The states of the random generators of a training: data order, torch's own, and the device's if it has one."""
    own = [_GET[device.type](device)] if device.type in _GET else []
    return [generator.get_state(), torch.get_rng_state(), *own]


def set_random_state(states: Sequence[Tensor], generator: torch.Generator, device: torch.device) -> None:
    """Restore the states that random_state returned."""
    generator.set_state(states[0])
    torch.set_rng_state(states[1])
    if device.type in _SET:
        _SET[device.type](states[2], device)


_GET: Mapping[str, Callable[[torch.device], Tensor]] = {
    "cuda": torch.cuda.get_rng_state,
    "mps": lambda _device: torch.mps.get_rng_state(),
}
_SET: Mapping[str, Callable[[Tensor, torch.device], None]] = {
    "cuda": torch.cuda.set_rng_state,
    "mps": lambda state, _device: torch.mps.set_rng_state(state),
}
