"""Classifiers of torchvision and timm without their classifier: pixels in, features out."""

from __future__ import annotations

import contextlib
import copy
import difflib
import hashlib
import io
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr
from functools import cached_property, lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.data.cache import hub_file, read_weights, torchvision_file
from hpo.errors import DataError, SpecError, TrainingError
from hpo.spec.models import TimmBackbone, TorchvisionBackbone

AnyBackbone = TorchvisionBackbone | TimmBackbone
# What fresh networks are fed with; any would do.
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Backbone(nn.Module):
    """Pixels in [0, 1] (n, 1 or 3 channels, height, width) -> features (n, count).

    Grey images become three equal channels; images are resized to `size` pixels square and normalised as the weights
    want them. With pool, net gives maps, which are averaged down to pool x pool; else it gives features itself.
    """

    def __init__(
        self,
        net: nn.Module,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        size: int | None = None,
        pool: int | None = None,
        label: str = "",
    ) -> None:
        super().__init__()
        self.net = net
        self.size = size
        self.pool = pool
        self.label = label
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).reshape(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """The features of images."""
        if images.shape[1] == 1 and self.mean.shape[1] == 3:
            images = images.expand(-1, 3, -1, -1)
        if self.size is not None and images.shape[-2:] != (self.size, self.size):
            smaller = min(images.shape[-2:]) > self.size
            # Antialiasing only makes a difference where images shrink.
            images = functional.interpolate(
                images, (self.size, self.size), mode="bilinear", align_corners=False, antialias=smaller
            )
        features: Tensor = self.net((images - self.mean) / self.std)
        if self.pool is not None:
            features = functional.adaptive_avg_pool2d(features, self.pool)
        return features.flatten(1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that decides the features of an image: for backbones that never change."""
        identity = [self.label, str(self.size), str(self.pool), str(self.mean.tolist()), str(self.std.tolist())]
        digest = hashlib.sha256("|".join([*identity, version("torch").partition("+")[0]]).encode())
        for name, tensor in self.net.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def quick(body: Backbone) -> Backbone:
    """A copy of a frozen body for many images: batch norm is folded into the convolutions before it.

    1.4 times the images/s of MobileNetV2 on a CPU, for features that differ by rounding. A network that torch.fx cannot
    follow stays as it is.
    """
    from torch.fx.experimental.optimization import fuse

    copied = copy.deepcopy(body).eval()
    with contextlib.suppress(Exception), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(copied.net, _Levels):
            # It was followed when it was cut. A copy made by fuse itself would be one in training mode.
            copied.net.graph = fuse(copied.net.graph, inplace=True, no_trace=True)
        else:
            copied.net = fuse(copied.net)
        copied.to(memory_format=torch.channels_last)
    return copied


def stages(net: nn.Module) -> list[nn.Module]:
    """The parts of a network from the image on: its children, or those of the child that is nearly all of it."""
    parts = [child for child in net.children() if any(True for _ in child.parameters())]
    sizes = [sum(weight.numel() for weight in part.parameters()) for part in parts]
    largest = max(range(len(parts)), key=sizes.__getitem__, default=None)
    if largest is None or not any(True for _ in parts[largest].children()) or sizes[largest] < 0.8 * sum(sizes):
        return parts
    return [*parts[:largest], *(stages(parts[largest]) or [parts[largest]]), *parts[largest + 1 :]]


@lru_cache(maxsize=8)
def shared_backbone(spec: AnyBackbone, *, side: int, pool: int | None) -> Backbone:
    """build_backbone with its weights, once for each process: for backbones that nobody changes."""
    body = build_backbone(spec, side=side, pool=pool, loaded=True).eval().requires_grad_(False)
    # Their images come with channels last; weights of that layout are 1.3 to 1.9 times as fast on a CPU.
    return body.to(memory_format=torch.channels_last)


def build_backbone(spec: AnyBackbone, *, side: int, pool: int | None, loaded: bool) -> Backbone:
    """The network named by spec for images of `side` pixels, with its weights where loaded is True.

    pool: the side to which its last maps are pooled; None gives the features that its own classifier would see. Raises
    SpecError for an unknown name, DataError where weights cannot be had or are another network's.
    """
    build = _torchvision if spec.kind == "torchvision" else _timm
    loaded = loaded and spec.weights != "none"
    if spec.levels == "last":
        return build(spec, side=side, pool=pool, loaded=loaded)
    body = build(spec, side=side, pool=None, loaded=loaded)
    body.net = _with_levels(body.net, spec, max(body.size or side, 224), pool)
    body.label += f", all levels at {pool}"
    return body


def _torchvision(spec: AnyBackbone, *, side: int, pool: int | None, loaded: bool) -> Backbone:
    from torchvision import models

    known = models.list_models(module=models)
    if spec.name not in known:
        raise _unknown("torchvision", spec.name, known)
    official = models.get_model_weights(spec.name).DEFAULT
    transforms = official.transforms()
    trained = spec.weights != "none"
    size = spec.input_size or (transforms.crop_size[0] if trained else None)
    if size is None and side < min(official.meta["min_size"]):
        size = min(official.meta["min_size"])
    extra: dict[str, Any] = {}
    if spec.name in ("googlenet", "inception_v3"):
        # Their second classifiers are of no use here; they were trained on images scaled in another way than they say.
        extra = {"aux_logits": False, "init_weights": True, "transform_input": trained}
    net = models.get_model(spec.name, weights=None, **extra)
    _drop_classifier(net)
    if loaded:
        file = torchvision_file(official.url) if spec.weights == "imagenet" else Path(spec.weights)
        _load(net, read_weights(file), f"{file}: not weights of torchvision's {spec.name}")
    if pool is not None:
        net = _torchvision_maps(net, max(size or side, 224))
    mean, std = transforms.mean, transforms.std
    return Backbone(net, mean=mean, std=std, size=size, pool=pool, label=f"torchvision {spec.name}")


def _drop_classifier(net: nn.Module) -> None:
    """Replace the last layer of a classifier by nothing."""
    layers = [(name, layer) for name, layer in net.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    parent, _, name = layers[-1][0].rpartition(".")
    setattr(net.get_submodule(parent), name, nn.Identity())


def _load(net: nn.Module, state: dict[str, Tensor], wrong: str) -> None:
    """Load what fits, which must be all of the network. Tensors of the classifier are left over."""
    own = net.state_dict()
    lacking = [
        name
        for name, tensor in own.items()
        if not name.endswith("num_batches_tracked") and (name not in state or state[name].shape != tensor.shape)
    ]
    if lacking:
        raise DataError(
            f"model.weights: {wrong}: {len(lacking)} of {len(own)} tensors are missing or of another shape, such as "
            f"{lacking[0]}.",
            "Name the file of this network, or another network.",
        )
    net.load_state_dict({name: state.get(name, tensor) for name, tensor in own.items()})


class _Extracted(nn.Module):
    """A network that a feature extractor has cut, which answers with a dict."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.net(images)["maps"]
        return maps


def _torchvision_maps(net: nn.Module, side: int) -> nn.Module:
    """The network cut after its last maps, found by a look at every step of it on a black image."""
    from torchvision.models import VisionTransformer
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    if isinstance(net, VisionTransformer):
        return _OneMap(net)
    _, steps = get_graph_node_names(net)
    with torch.inference_mode():
        seen = create_feature_extractor(net, steps).eval()(torch.zeros(1, 3, side, side))
    maps = [
        name for name, value in seen.items() if isinstance(value, Tensor) and value.ndim == 4 and value.shape[2] > 1
    ]
    return _Extracted(create_feature_extractor(net, {maps[-1]: "maps"}).train())


class _Levels(nn.Module):
    """A network cut by a feature extractor into pooled maps of its stages (n, count), which are laid side by side."""

    def __init__(self, graph: nn.Module) -> None:
        super().__init__()
        self.graph = graph

    def forward(self, images: Tensor) -> Tensor:
        found: dict[str, Tensor] = self.graph(images)
        return torch.cat(list(found.values()), dim=1)


def _pooled(maps: Tensor, side: int, channels_last: bool) -> Tensor:
    return functional.adaptive_avg_pool2d(maps.permute(0, 3, 1, 2) if channels_last else maps, side).flatten(1)


def _with_levels(net: nn.Module, spec: AnyBackbone, side: int, pool: int | None) -> nn.Module:
    """The network giving the maps of all its stages, pooled; without pool the last ones are those of its own answer.

    Raises SpecError for a network that torch.fx cannot follow, or that has no maps to show.
    """
    import timm.layers
    from torchvision.models import feature_extraction

    library: Any = feature_extraction if spec.kind == "torchvision" else timm.layers
    names = {part: name for name, part in net.named_modules()}
    try:
        wanted = {names[part]: names[part] for part in stages(net)}
        with torch.inference_mode():
            seen = library.create_feature_extractor(net, wanted).eval()(torch.zeros(1, 3, side, side))
        shapes = {name: maps.shape[1:] for name, maps in seen.items() if maps.ndim == 4}
        if len(shapes) < 2:
            raise ValueError(f"{len(shapes)} of its stages give maps")
        last = library.get_graph_node_names(net)[1][-1]
        if pool is None:
            shapes.popitem()
        cut = library.create_feature_extractor(net, {name: name for name in [*shapes, *([] if pool else [last])]})
    except (TypeError, ValueError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise SpecError(
            f"model.levels: {spec.kind}'s {spec.name} has no separate stages: {str(error).splitlines()[0]}.",
            "Set levels to last.",
        ) from None
    for graph in (cut.train_graph, cut.eval_graph):
        end = next(node for node in graph.nodes if node.op == "output")
        given = dict(end.args[0])
        for name, shape in shapes.items():
            # Pooled where they arise: maps that are held until the end cost a third of the images/s. Of square images
            # the maps' height and width are equal; where those come first, channels are last.
            with graph.inserting_after(given[name]):
                arguments = (given[name], pool or 1, shape[0] == shape[1] != shape[2])
                given[name] = graph.call_function(_pooled, arguments)
        end.args = (given,)
    cut.graph = cut.train_graph
    return _Levels(cut.train())


class _OneMap(nn.Module):
    """Features as maps of one pixel, for a network of tokens, which has no maps."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.net(images)
        return features[..., None, None]


class _TimmMaps(nn.Module):
    """The last maps (n, channels, height, width) of a timm network; the mean token of one that has no maps."""

    def __init__(self, net: Any) -> None:
        super().__init__()
        self.net = net
        self.channels_last = getattr(net, "output_fmt", "NCHW") == "NHWC"

    def forward(self, images: Tensor) -> Tensor:
        maps: Tensor = self.net.forward_features(images)
        if maps.ndim == 3:
            return maps.mean(1)[..., None, None]
        return maps.permute(0, 3, 1, 2) if self.channels_last else maps


def _timm(spec: AnyBackbone, *, side: int, pool: int | None, loaded: bool) -> Backbone:
    import timm

    if not timm.is_model(spec.name.partition(".")[0]):
        raise _unknown("timm", spec.name, timm.list_models())
    facts = timm.get_pretrained_cfg(spec.name)
    if facts is None:
        raise _unknown("timm", spec.name, timm.list_pretrained())
    usual, trained = facts.input_size[1], spec.weights != "none"
    size = spec.input_size or (usual if trained or facts.fixed_input_size else None)
    extra = {"img_size": size} if facts.fixed_input_size and size != usual else {}
    if size is None and side < 32:
        size = 32  # most of its networks halve the maps five times
    random_state = torch.get_rng_state()
    # Its builders write notes to stderr.
    with redirect_stderr(io.StringIO()):
        net = timm.create_model(spec.name, pretrained=False, num_classes=0, **extra)
        if loaded:
            published = spec.weights == "imagenet"
            if published and not facts.hf_hub_id:
                raise DataError(
                    f"timm publishes no weights for {spec.name}.", "Set model.weights to none or to a file."
                )
            file = hub_file(facts.hf_hub_id, facts.hf_hub_filename) if published else Path(spec.weights)
            torch.set_rng_state(random_state)
            net = _loaded_timm(net, spec, file, extra)
    mean, std = (facts.mean, facts.std) if trained else (_IMAGENET_MEAN, _IMAGENET_STD)
    whole = net if pool is None else _TimmMaps(net)
    return Backbone(whole, mean=mean, std=std, size=size, pool=pool, label=f"timm {spec.name}")


def _loaded_timm(fresh: nn.Module, spec: AnyBackbone, file: Path, extra: dict[str, Any]) -> nn.Module:
    """The network with a file's weights, by timm's own loading, which knows the names of older files.

    It takes what fits and is silent about the rest, so the weights are compared with `fresh`, which was made from the
    same random numbers.
    """
    import timm

    read_weights(file)  # for its errors
    overlay = {"file": str(file)}
    try:
        net: nn.Module = timm.create_model(
            spec.name, pretrained=True, num_classes=0, pretrained_cfg_overlay=overlay, **extra
        )
    except (RuntimeError, KeyError, ValueError) as error:
        raise DataError(
            f"model.weights: {file}: not weights of timm's {spec.name}: {str(error).splitlines()[0]}.",
            "Name the file of this network, or another network.",
        ) from None
    before = dict(fresh.named_parameters())
    random = [name for name, weight in before.items() if weight.ndim > 1 and weight.std() > 0]
    same = [name for name, weight in net.named_parameters() if name in random and torch.equal(weight, before[name])]
    if same or not random:
        raise DataError(
            f"model.weights: {file}: not weights of timm's {spec.name}: {len(same)} of {len(random)} tensors are not "
            f"in it, such as {same[0] if same else 'any'}.",
            "Name the file of this network, or another network.",
        )
    return net


def _unknown(library: str, name: str, known: Sequence[str]) -> SpecError:
    close = difflib.get_close_matches(name.partition(".")[0], known, n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"See {library}'s list of models."
    return SpecError(f"model.name: {library} has no classifier {name!r}.", hint)


def check_channels(channels: int) -> None:
    """Raise TrainingError for images that are neither grey nor RGB."""
    if channels not in (1, 3):
        raise TrainingError(f"images of {channels} channels: pretrained networks take grey or RGB.", "Convert them.")
