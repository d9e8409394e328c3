"""Early stopping: the best epoch of a training so far, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor, nn

from hpo.errors import NotFiniteError
from hpo.metrics import direction_of
from hpo.spec.training import TrainingSpec


class EarlyStopping:
    """The best epoch of a training by spec.monitor; with validates=False, without validation images, none is best.

    score (higher is better), epoch and state, the weights of the best epoch, are saved in checkpoints.
    """

    def __init__(self, spec: TrainingSpec, *, validates: bool) -> None:
        self.score, self.epoch = -math.inf, 0
        self.state: dict[str, Tensor] | None = None
        self._spec, self._validates = spec, validates
        self._sign = 1.0 if direction_of(spec.monitor) == "maximize" else -1.0

    def note(self, number: int, measured: Mapping[str, float], net: nn.Module) -> bool:
        """Compare an epoch of net with the best; True if it is the last, by spec.epochs or spec.patience.

        Raises NotFiniteError if a loss is not finite.
        """
        losses = {name: value for name, value in measured.items() if name.endswith("_loss")}
        if not all(map(math.isfinite, losses.values())):
            shown = ", ".join(f"{name} {value}" for name, value in losses.items())
            raise NotFiniteError(f"epoch {number}: {shown}.", "It diverged: a lower learning rate usually helps.")
        if self._validates and self._sign * measured[self._spec.monitor] > self.score:
            self.score, self.epoch = self._sign * measured[self._spec.monitor], number
            self.state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        patience = self._spec.patience
        stale = self._validates and patience is not None and number - self.epoch >= patience
        return stale or number == self._spec.epochs
