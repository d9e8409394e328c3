"""Networks of one architecture, whose weights are averaged to one network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn

from hpo.models import CONFIG, SETUP, WEIGHTS, load_trained, normalisation, to_input
from hpo.models.answers import undecided
from hpo.spec.load import small_text
from hpo.spec.study import Setup

_BATCH = 128
_TRAINING_ONLY = ("freeze", "unfreeze_epoch", "views", "zero_init")  # of a model spec: they leave the graph as it is


class Soup:
    """The networks in folders (see load_trained) that have the architecture and the images of the first one.

    alike are their positions in folders. An architecture is the settings of the model and the shapes of the weights:
    networks with other activations or poolings have equal shapes. Averages are of weights and of the running statistics
    of batch norm; counts are those of the first network.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = folders
        self._net, config = load_trained(folders[0])
        self._config = undecided(config)
        self._states: dict[int, dict[str, Tensor]] = {}
        first = _architecture(folders[0], self._net)
        for position, folder in enumerate(folders):
            net, config = load_trained(folder)
            if undecided(config) == self._config and _architecture(folder, net) == first:
                self._states[position] = {name: tensor.clone() for name, tensor in net.state_dict().items()}
        self.alike = tuple(self._states)
        self._known: dict[tuple[int, ...], NDArray[np.float32]] = {}

    def probabilities(self, chosen: Sequence[int], images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """What the average of the networks at these positions answers to images, always the same: (n, classes)."""
        key = tuple(sorted(chosen))
        if key not in self._known:
            self._net.load_state_dict(self._average(key))
            config, several = self._config, bool(self._config.get("several_labels"))
            scale, shift = normalisation(config["mean"], config["std"], config["image_shape"])
            found = []
            with torch.inference_mode():
                for start in range(0, len(images), _BATCH):
                    part = torch.from_numpy(np.array(images[start : start + _BATCH]))
                    logits = self._net(to_input(part, scale, shift).contiguous())
                    found.append(logits.sigmoid() if several else logits.softmax(1))
            self._known[key] = torch.cat(found).numpy()
        return self._known[key]

    def save(self, chosen: Sequence[int], names: Sequence[str], target: Path) -> None:
        """Write the average to target, as save_trained does of one network.

        names say which trials are averaged; config.json names them with their setups, of which setup.json is one.
        """
        target.mkdir(parents=True, exist_ok=True)
        state = {name: tensor.contiguous() for name, tensor in self._average(chosen).items()}
        save_file(state, target / WEIGHTS)
        averaged = [
            {"trial": name, "setup": json.loads(small_text(self._folders[position] / SETUP))}
            for position, name in zip(chosen, names, strict=True)
        ]
        config = self._config | {"averaged": averaged}
        (target / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
        shutil.copyfile(self._folders[0] / SETUP, target / SETUP)

    def _average(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        states = [self._states[position] for position in chosen]
        return {
            name: torch.stack([state[name] for state in states]).mean(0) if tensor.is_floating_point() else tensor
            for name, tensor in states[0].items()
        }


def _architecture(folder: Path, net: nn.Module) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """The settings that the network of a folder was built with, and the shapes of its weights."""
    setup = Setup.model_validate_json(small_text(folder / SETUP))
    return graph_settings(setup), {name: tensor.shape for name, tensor in net.state_dict().items()}


def graph_settings(setup: Setup) -> dict[str, Any]:
    """The settings of a model on which its answers depend besides its weights; options of an own model are all kept."""
    model = setup.model.model_dump(mode="json")
    return {name: value for name, value in model.items() if "dropout" not in name and name not in _TRAINING_ONLY}
