"""Networks: normalised images (n, channels, height, width) float in, logits (n, classes) out; saved and exported."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hpo.data.cache import models_folder
from hpo.data.prepare import TrialData
from hpo.errors import HpoError, ModelError, TrainingError
from hpo.models.basic import OneLogit, build_cnn, build_convnet, build_mlp, build_resnet
from hpo.models.calibration import Calibrated
from hpo.models.ensemble import Ensemble, build_ensemble
from hpo.models.program_file import architecture_of, export_to
from hpo.models.safe_loader import load_program, pieces, read_config
from hpo.models.transfer import build_transfer
from hpo.models.views import View, Views
from hpo.spec.load import small_text
from hpo.spec.models import ModelSpec, OwnModelSpec, Tuned
from hpo.spec.own_code import load_function
from hpo.spec.study import Setup

WEIGHTS, CONFIG, SETUP, PROGRAM = "weights.safetensors", "config.json", "setup.json", "net.pt2"
_ALIKE = ("class_names", "image_shape", "ranges", "several_labels")  # entries of config.json

# kind in the study file -> builder(spec, image shape (height, width, channels), number of outputs); a dotted kind is a
# network of the user's own. Builders of pretrained networks also take loaded and registered, see build_transfer.
MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": build_mlp,
    "cnn": build_cnn,
    "convnet": build_convnet,
    "resnet": build_resnet,
    "torchvision": build_transfer,
    "timm": build_transfer,
    "fusion": build_transfer,
    "transfer": build_transfer,
}


def build_model(
    spec: ModelSpec,
    *,
    image_shape: tuple[int, int, int],
    classes: int,
    seed: int,
    binary: bool = False,
    loaded: bool = True,
) -> nn.Module:
    """A freshly initialised network on the CPU; the same seed gives the same weights.

    image_shape is (height, width, channels). With binary=True, for 2 classes only, the network has one output and is
    wrapped in OneLogit. With loaded=False pretrained weights are not loaded, as the caller loads all weights.
    Raises TrainingError if the images are too small for the network, SpecError if a network of the user's own or of a
    library cannot be found, DataError if its weights cannot.
    """
    if binary and classes != 2:
        raise TrainingError(
            f"a network with one output separates 2 classes, not {classes}.", "Group the classes into two."
        )
    with torch.random.fork_rng(devices=[]):
        # torch's initialisers take no generator: the global one is set for the length of the block.
        torch.manual_seed(seed)
        try:
            tuned = {"loaded": loaded, "registered": load_registered} if isinstance(spec, Tuned) else {}
            net = MODELS.get(spec.kind, build_own)(spec, image_shape, 1 if binary else classes, **tuned)
        except (RuntimeError, ValueError) as error:
            raise TrainingError(
                f"model {spec.kind} does not fit images of {image_shape}: {error}.",
                "Choose smaller kernels, fewer or smaller poolings, or larger images.",
            ) from error
    return OneLogit(net) if binary else net


def load_trained(folder: Path, *, weights: bool = True) -> tuple[nn.Module, dict[str, Any]]:
    """The network that save_trained left, on the CPU in evaluation mode, and its config.

    A folder that holds the exported program in place of the weights, as a logged model's does, gives the same. With
    weights=False the network is fresh.
    """
    config, setup = read_config(folder / CONFIG), _setup(folder / SETUP)
    if not {"mean", "std"} <= config.keys():
        raise ModelError(f"{folder / CONFIG}: mean or std is missing.", "Restore it from a copy.")
    if members := config.get("members"):
        nets = [_fresh(Setup.model_validate(member["setup"]), config) for member in members]
        net: nn.Module = build_ensemble(config, nets)
    else:
        net = _fresh(setup, config)
    if weights:
        net.load_state_dict(_weights(folder, net))
    return net.eval(), config


def _fresh(setup: Setup, config: Mapping[str, Any]) -> nn.Module:
    """The network of a setup for the images and classes of a config, with weights that mean nothing."""
    shape, classes = tuple(config["image_shape"]), len(config["class_names"])
    binary = setup.task == "binary"
    return build_model(setup.model, image_shape=shape, classes=classes, seed=0, binary=binary, loaded=False)


def load_registered(uri: str, *, weights: bool) -> tuple[nn.Module, dict[str, Any]]:
    """load_trained for a model of the store, models:/ID, whose files are in models_folder()."""
    folder = models_folder() / uri.removeprefix("models:/")
    if not (folder / SETUP).is_file():
        raise ModelError(
            f"model.from_model: {uri}: its files are not in {folder}.", "Run the study where its store is."
        )
    return load_trained(folder, weights=weights)


def _setup(file: Path) -> Setup:
    try:
        return Setup.model_validate_json(small_text(file))
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{file}: damaged or missing: {reason}.", "Restore it from a copy.") from None


def _weights(folder: Path, net: nn.Module) -> dict[str, Tensor]:
    if (folder / WEIGHTS).is_file():
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS)
        return weights
    state = load_program(folder / PROGRAM).state_dict
    # Around the network there may be a program of several views, and a calibrated one.
    named = {name: name.removeprefix("program.").removeprefix("program.") for name in state}
    found = {plain[4:]: state[name] for name, plain in named.items() if plain.startswith("net.")}
    # A program also names buffers that the network makes by itself, such as the mean of a backbone's pixels.
    made = {name for name, _ in net.named_buffers()} - net.state_dict().keys()
    return {name: weight for name, weight in found.items() if name not in made}


def parameter_count(net: nn.Module, *, trainable: bool = True) -> int:
    """Number of weights and biases; with trainable=True only those that training changes."""
    return sum(weight.numel() for weight in net.parameters() if weight.requires_grad or not trainable)


def build_own(spec: OwnModelSpec, image_shape: tuple[int, int, int], classes: int) -> nn.Module:
    """The network that the named function returns for these images, classes and options, tried on two black images.

    Raises SpecError where there is no such function, TrainingError where it fails or returns something else than a
    network from float images (n, channels, height, width) to logits (n, classes).
    """
    function = load_function(spec.kind, what="model")
    height, width, channels = image_shape
    try:
        net = function(image_shape=image_shape, classes=classes, **spec.options)
        if not isinstance(net, nn.Module):
            raise TrainingError(
                f"model {spec.kind} returned {type(net).__name__}, not a network.", "Return a torch.nn.Module."
            )
        was_training = net.training
        with torch.inference_mode():
            logits = net.eval()(torch.zeros(2, channels, height, width))
        net.train(was_training)
    except HpoError:
        raise
    except Exception as error:
        shown = ", ".join(f"{name}={value!r}" for name, value in spec.options.items())
        raise TrainingError(
            f"model {spec.kind} fails for images of {image_shape}, {classes} classes and options {{{shown}}}: "
            f"{type(error).__name__}: {error}.",
            "Call the function yourself with these, then mend it or model.options.",
        ) from error
    found = tuple(getattr(logits, "shape", ()))
    if found != (2, classes):
        raise TrainingError(
            f"model {spec.kind} gives {found or type(logits).__name__} for 2 images and {classes} classes.",
            f"Return logits of shape (n, classes), here (2, {classes}).",
        )
    return net


def to_input(images: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """images (n, height, width, channels) uint8 -> (n, channels, height, width) float32 as images * scale + shift.

    scale and shift are (height, width, channels). The result has channels-last strides, which convolutions prefer,
    without a copy.
    """
    values = images.float()
    return torch.addcmul(shift, values, scale, out=values).permute(0, 3, 1, 2)


def normalisation(mean: Sequence[float], std: Sequence[float], image_shape: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, in [0, 1] units, -> (scale, shift) of to_input, on the CPU.

    One value for each pixel: spread over the image on every batch, one for each channel takes five times as long.
    """
    deviation = torch.tensor(std)
    scale, shift = 1 / (255 * deviation), -torch.tensor(mean) / deviation
    return scale.expand(*image_shape).contiguous(), shift.expand(*image_shape).contiguous()


def input_of(data: TrialData) -> Callable[[Tensor], Tensor]:
    """A function from images of this data, (n, height, width, channels) uint8 on its device, to a network's input.

    Of features it takes those of the unchanged images.
    """
    if data.images.dtype != torch.uint8:
        return _plain_view
    device = data.images.device
    scale, shift = (part.to(device) for part in normalisation(data.mean, data.std, data.images.shape[1:]))
    return partial(to_input, scale=scale, shift=shift)


def _plain_view(features: Tensor) -> Tensor:
    return features if features.ndim == 2 else features[:, 0]


def save_trained(net: nn.Module, setup: Setup, data: TrialData, folder: Path) -> None:
    """Write to folder what export_program needs: weights, setup, and the normalisation of images."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    config = {
        "class_names": list(data.class_names),
        "image_shape": list(data.images.shape[1:]),
        "mean": list(data.mean),
        "std": list(data.std),
        "ranges": {kind: list(limits) for kind, limits in data.ranges.items()},
        **({"several_labels": True} if data.labels.ndim == 2 else {}),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    (folder / SETUP).write_text(setup.model_dump_json(indent=1), encoding="utf-8")


def save_ensemble(folders: Sequence[Path], names: Sequence[str], counts: Sequence[int], target: Path) -> None:
    """Write to target what export_program needs of an ensemble, as save_trained does of one network.

    folders hold the members as load_trained reads them, the best first, whose setup stands for all; names say which
    trials they are, and counts how often each counts. config.json names them, too. Raises ModelError where their images
    or classes differ.
    """
    target.mkdir(parents=True, exist_ok=True)
    nets, configs = zip(*(load_trained(folder) for folder in folders), strict=True)
    for name, config in zip(names, configs, strict=True):
        if different := [key for key in _ALIKE if config.get(key) != configs[0].get(key)]:
            raise ModelError(
                f"{name}: its {different[0]} differ from those of {names[0]}.",
                "Members of an ensemble take the same images and answer with the same classes, in one order.",
            )
    members = [
        {"trial": name, "count": count, "mean": config["mean"], "std": config["std"], "setup": json.loads(setup)}
        for name, count, config, setup in zip(
            names, counts, configs, (small_text(folder / SETUP) for folder in folders), strict=True
        )
    ]
    channels = configs[0]["image_shape"][2]
    common = all((each["mean"], each["std"]) == (configs[0]["mean"], configs[0]["std"]) for each in configs)
    config = {key: configs[0][key] for key in (*_ALIKE, "mean", "std") if key in configs[0]} | {"members": members}
    config |= {} if common else {"mean": [0.0] * channels, "std": [1.0] * channels}
    net = build_ensemble(config, nets)
    save_file({name: tensor.contiguous() for name, tensor in net.state_dict().items()}, target / WEIGHTS)
    (target / CONFIG).write_text(json.dumps(config, indent=1), encoding="utf-8")
    shutil.copyfile(folders[0] / SETUP, target / SETUP)


class _Whole(nn.Module):
    """uint8 images (n, height, width, channels) -> float32 probabilities (n, classes); of each label with several."""

    def __init__(
        self, net: nn.Module, *, mean: Sequence[float], std: Sequence[float], image_shape: Sequence[int], several: bool
    ) -> None:
        super().__init__()
        self.net = net
        self._several = several
        scale, shift = normalisation(mean, std, image_shape)
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

    def forward(self, images: Tensor) -> Tensor:
        inputs = to_input(images, self.scale, self.shift).contiguous()
        if isinstance(self.net, Ensemble):
            return self.net.probabilities(inputs)
        logits: Tensor = self.net(inputs)
        return logits.sigmoid() if self._several else logits.softmax(1)


def export_program(folder: Path) -> Path:
    """Write net.pt2 next to the weights in folder: float32, on the CPU, for any number of images.

    Raises ModelError where the network does what no program may that load_program loads.
    """
    net, config = load_trained(folder)
    export_to(
        folder / PROGRAM,
        whole_program(net, config),
        lambda: traced(net, config),
        architecture=architecture_of(_setup(folder / SETUP), config),
        image_shape=config["image_shape"],
    )
    return folder / PROGRAM


def save_weights(source: Path, folder: Path) -> None:
    """Write the weights of a trained or logged network, in the folder source, to folder as safetensors."""
    net, _ = load_trained(source)
    state = {name: tensor.detach().contiguous().clone() for name, tensor in net.state_dict().items()}
    save_file(state, folder / WEIGHTS)


class TrainedNet:
    """The network of load_trained as images see it; it predicts as hpo.models.safe_loader.Program does."""

    def __init__(self, folder: Path) -> None:
        net, config = load_trained(folder)
        self._whole = whole_program(net, config)

    def predict(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        """Images (n, height, width, channels) uint8 -> probabilities (n, classes) float32; n >= 0."""
        with torch.inference_mode():
            chunks = [self._whole(torch.from_numpy(np.array(piece))) for piece in pieces(images)]
            found: NDArray[np.float32] = torch.cat(chunks).numpy()
        return found


def whole_program(net: nn.Module, config: Mapping[str, Any]) -> nn.Module:
    """What is exported of a network and its config: a module from uint8 images to probabilities, in evaluation mode.

    The config may name views, records of hpo.models.views.View, and a temperature.
    """
    shape, several = config["image_shape"], bool(config.get("several_labels"))
    program: nn.Module = _Whole(net, mean=config["mean"], std=config["std"], image_shape=shape, several=several)
    if views := config.get("views"):
        program = Views(program, [View.read(each) for each in views])
    if temperature := config.get("temperature"):
        program = Calibrated(program, float(temperature))
    return program.eval()


def traced(net: nn.Module, config: Mapping[str, Any]) -> torch.export.ExportedProgram:
    """The program of a network in evaluation mode and of what its config says, for any number of uint8 images."""
    whole = whole_program(net, config)
    # A batch of one would be taken for a constant.
    example = torch.zeros((2, *config["image_shape"]), dtype=torch.uint8)
    batch = torch.export.Dim("batch", min=1, max=1_000_000)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch warns of its own deprecations while it traces
        return torch.export.export(whole, (example,), dynamic_shapes=({0: batch},))
