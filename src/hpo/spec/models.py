"""The network in a study file: one frozen part for each kind, of our own families and of pretrained networks."""

from __future__ import annotations

import difflib
import functools
import operator
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Discriminator, Field, Tag, model_validator

from hpo.spec.space import Activation, Part, Positive, Rate, Width

Freeze = Literal["all", "none"] | Annotated[int, Field(ge=1, le=1000)]


class _Backbone(Part):
    """A network without its classifier."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*$")]
    """As the library calls it: mobilenet_v2, tf_efficientnet_lite0."""
    weights: str = "imagenet"
    """imagenet: the library's own. none: fresh. Else a file, .safetensors or .pth: relative to the study file, or in
    --set to the working directory."""
    input_size: Annotated[int, Field(ge=8, le=2048)] | None = None
    """Side in pixels to which images are resized on the device. null: what the network was trained at; with fresh
    weights the images' own."""
    levels: Literal["last", "all"] = "last"
    """last: the features that its own classifier would see. all: also the averages of the maps that each of its
    stages gives, which tell of textures and colours: for images unlike the photos that the weights were trained on."""


class TorchvisionBackbone(_Backbone):
    """A classifier of torchvision.models."""

    kind: Literal["torchvision"]


class TimmBackbone(_Backbone):
    """A classifier of timm."""

    kind: Literal["timm"]


class Tuned(Part):
    """What of a backbone trains, and what comes after it."""

    freeze: Freeze = "none"
    """all: only the new head trains. none: everything does. A number: this many stages from the image on are frozen.
    What is frozen stays as it is, running means of batch norm included."""
    unfreeze_epoch: Positive | None = None
    """From this epoch on everything trains. null: what is frozen stays so."""
    views: Annotated[int, Field(ge=0, le=100)] = 0
    """With freeze all and augmentation: this many augmented views of each image go through the backbone once, and each
    epoch draws one of them. 0: every epoch augments again, and sends every image through the whole network."""
    dense: list[Width] = Field(default_factory=list)
    """Neurons of dense layers between the features and the classifier."""
    batch_norm: bool = False
    """Of the features, and after each dense layer."""
    activation: Activation = "relu"
    """After each dense layer."""
    dropout: Rate = 0.0
    """Share set to zero in training: of the features, and after each dense layer."""

    @property
    def frozen(self) -> bool:
        """Whether nothing but the head ever trains."""
        return self.freeze == "all" and self.unfreeze_epoch is None

    @model_validator(mode="after")
    def _unfreezing_needs_ice(self) -> Tuned:
        if self.unfreeze_epoch is not None and self.freeze == "none":
            raise ValueError("unfreeze_epoch needs something frozen. Set freeze, or remove it")
        return self


class _Single(Tuned, _Backbone):
    @model_validator(mode="after")
    def _random_weights_must_learn(self) -> _Single:
        _refuse_frozen_noise(self, [self])
        return self


class TorchvisionSpec(_Single):
    """A classifier of torchvision.models with a new head in place of its last layer."""

    kind: Literal["torchvision"]


class TimmSpec(_Single):
    """A classifier of timm with a new head in place of its last layer."""

    kind: Literal["timm"]


class FusionSpec(Tuned):
    """The last maps of several backbones, pooled to one size, laid side by side, and one head (middle fusion)."""

    kind: Literal["fusion"]
    backbones: Annotated[
        list[Annotated[TorchvisionBackbone | TimmBackbone, Field(discriminator="kind")]], Field(min_length=1)
    ]
    pool: Annotated[int, Field(ge=1, le=64)] = 1
    """Side in pixels to which the maps of each backbone are pooled by averages; 1: one number a map."""

    @model_validator(mode="after")
    def _random_weights_must_learn(self) -> FusionSpec:
        _refuse_frozen_noise(self, self.backbones)
        return self


class TransferSpec(Tuned):
    """The convolutions of a model that a study of this store trained, for images of any size, and a new head."""

    kind: Literal["transfer"]
    from_model: Annotated[str, Field(pattern=r"^models:/.+")]
    """models:/NAME@champion, models:/NAME/3 or models:/m-<id>. A study remembers the third form, the model itself."""
    freeze: Freeze = "all"
    """all: only the new head trains. none: everything does. A number: this many stages from the image on are frozen."""


def _refuse_frozen_noise(tuned: Tuned, backbones: Any) -> None:
    fresh = [backbone.name for backbone in backbones if backbone.weights == "none"]
    if tuned.freeze != "none" and fresh:
        raise ValueError(f"freeze {tuned.freeze} with weights none would keep {fresh[0]} random. Change one of the two")


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError(f"{value} is even, so the kernel has no middle pixel. Give an odd number")
    return value


Kernel = Annotated[int, Field(ge=1, le=63)]
OddKernel = Annotated[Kernel, AfterValidator(_odd)]
Padding = Literal["same", "valid"]
Growth = Annotated[float, Field(ge=0.25, le=4.0)]
Few = Annotated[int, Field(ge=1, le=16)]
Whiten = Annotated[int, Field(ge=0, le=5)]
_DOTTED = r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$"  # package.module:function


class MlpSpec(Part):
    """Flatten, dense layers, softmax."""

    kind: Literal["mlp"]
    hidden: Width | list[Width] = 128
    """Neurons of the hidden layer, or of each of them: 128, or [512, 256]. [] is a linear classifier."""
    activation: Activation = "relu"
    dropout: Rate = 0.0
    """Share of hidden activations set to zero in training, after each hidden layer."""
    batch_norm: bool = False


class CnnSpec(Part):
    """One convolution, activation, pooling, softmax: the smallest convolutional network."""

    kind: Literal["cnn"]
    filters: Width = 32
    kernel: Kernel = 3
    """Side of the square kernels, in pixels."""
    padding: Padding = "same"
    activation: Activation = "relu"
    pool: Annotated[int, Field(ge=1, le=64)] | Literal["global"] = 2
    """Side and stride of the pooling window in pixels; 1 pools nothing; global pools each whole map to one number."""
    pool_type: Literal["max", "average"] = "max"
    batch_norm: bool = False
    dropout: Rate = 0.0
    """Share of pooled activations set to zero in training, before the classifier."""


class ConvnetSpec(Part):
    """Blocks of convolutions and pooling, then dense layers. Depth and width are numbers, so a search can vary them."""

    kind: Literal["convnet"]
    depth: Few = 3
    """Blocks."""
    width: Width = 32
    """Filters of the first block."""
    growth: Growth = 2.0
    """Filters of a block in units of those of the block before it."""
    whiten: Whiten = 0
    """Side in pixels of the patches of training images that a fixed first convolution whitens (Jordan 2024): its maps
    are uncorrelated and of equal variance, and their negatives. It is computed, not trained. 0: none."""
    filters: Annotated[list[Width], Field(min_length=1, max_length=16)] | None = None
    """Filters of each block, in place of depth, width and growth: [32, 64, 64, 128, 128]."""
    convs_per_block: Few = 1
    """Convolutions before each pooling; each with batch norm and activation of its own."""
    kernel: Kernel = 3
    """Side of the square kernels, in pixels."""
    padding: Padding | list[Padding] = "same"
    """same keeps the size of the maps, valid loses kernel - 1 pixels; for all blocks, or one for each."""
    batch_norm: bool = True
    activation: Activation = "relu"
    pool: Literal["max", "average", "stride", "none"] = "max"
    """What ends a block. stride: its last convolution moves by pool_size pixels."""
    pool_size: Annotated[int, Field(ge=2, le=16)] = 2
    """Side and step of the pooling window, in pixels."""
    pool_after: Literal["every"] | list[Few] = "every"
    """Blocks, counted from 1, that end with pooling; numbers beyond the depth do nothing."""
    dropout: Rate | tuple[Rate, Rate] = 0.0
    """Share of activations set to zero in training after each block; [first, last] rises linearly from the first block
    to the last."""
    head: Literal["flatten", "global"] = "flatten"
    """What the dense layers see: every pixel of the last maps, or the average of each map."""
    dense: list[Width] = Field(default_factory=list)
    """Neurons of the dense layers before the classifier."""
    dense_dropout: Rate | list[Rate] = 0.0
    """Share set to zero in training after each dense layer, or one for each; of the features where there is none."""

    @model_validator(mode="after")
    def _lists_fit(self) -> ConvnetSpec:
        blocks, dense = len(self.block_filters), len(self.dense)
        if isinstance(self.padding, list) and len(self.padding) != blocks:
            raise ValueError(f"padding lists {len(self.padding)} blocks of {blocks}. List one for each")
        if isinstance(self.dense_dropout, list) and len(self.dense_dropout) != dense:
            raise ValueError(f"dense_dropout lists {len(self.dense_dropout)} layers of {dense}. List one for each")
        return self

    @property
    def block_filters(self) -> list[int]:
        """Filters of each block."""
        grown = [max(1, round(self.width * self.growth**block)) for block in range(self.depth)]
        return self.filters or grown

    @property
    def block_dropout(self) -> list[float]:
        """Dropout after each block."""
        blocks = len(self.block_filters)
        first, last = self.dropout if isinstance(self.dropout, tuple) else (self.dropout, self.dropout)
        return [first + (last - first) * block / max(1, blocks - 1) for block in range(blocks)]


class ResnetSpec(Part):
    """A stem, residual blocks that halve the maps and multiply the filters, global average pooling, dense layers.

    By default: 1,957,768 trainable parameters for RGB images and 8 classes. More blocks of one width (repeats) and
    batch norm in the shortcuts make the networks of He et al. (2016).
    """

    kind: Literal["resnet"]
    blocks: Few = 2
    """Stages, each of which halves the maps."""
    repeats: Few = 1
    """Residual blocks in a stage; all but its first keep size and filters, and their shortcut is the identity."""
    width: Width = 64
    """Filters of the stem."""
    growth: Growth = 2.0
    """Filters of a stage in units of those of the stage (or stem) before it."""
    whiten: Whiten = 0
    """Side in pixels of the patches that a fixed first convolution whitens, as in convnet. 0: none."""
    convs_per_block: Few = 3
    kernel: OddKernel = 3
    """Side of the square kernels of the blocks, in pixels; odd."""
    stem_kernel: OddKernel = 3
    stem_stride: Annotated[int, Field(ge=1, le=8)] = 1
    stem_pool: Annotated[int, Field(ge=1, le=8)] = 1
    """Side and step of a max pooling after the stem, in pixels; 1 pools nothing."""
    batch_norm: bool = True
    """After each convolution of the stem and the blocks."""
    shortcut_batch_norm: bool = False
    """After the 1x1 convolutions of the shortcuts."""
    zero_init: bool = False
    """Each block begins as its shortcut: the scale of its last batch norm starts at 0 (Goyal et al. 2017)."""
    activation: Activation = "relu"
    dense: Width | list[Width] = 256
    """Neurons of the dense layer before the classifier, or of each of them; [] has none."""
    dropout: Rate = 0.0
    """Share set to zero in training: of the pooled features, and after each dense layer."""

    @model_validator(mode="after")
    def _zero_init_has_a_scale(self) -> ResnetSpec:
        if self.zero_init and not self.batch_norm:
            raise ValueError("zero_init needs batch_norm, whose scale it sets. Turn one on or the other off")
        return self


class OwnModelSpec(Part):
    """A network of your own: `kind: package.module:function`, called as described in docs/own-model.md."""

    kind: Annotated[str, Field(pattern=_DOTTED)]
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the function. A search varies them as model.options.NAME, if they are listed here."""


# The `kind` of a study file -> its part. hpo.models.MODELS has the builders; its import would load torch.
FAMILIES: dict[str, type[Part]] = {
    "mlp": MlpSpec,
    "cnn": CnnSpec,
    "convnet": ConvnetSpec,
    "resnet": ResnetSpec,
    "torchvision": TorchvisionSpec,
    "timm": TimmSpec,
    "fusion": FusionSpec,
    "transfer": TransferSpec,
}


def _kind_of(value: Any) -> Any:
    return value.get("kind") if isinstance(value, Mapping) else getattr(value, "kind", None)


def _tag(value: Any) -> str:
    kind = _kind_of(value)
    return kind if kind in FAMILIES else "own"


def _known(value: Any) -> Any:
    """Value itself, if its kind is one there is: pydantic's own complaint would not name the dotted form."""
    kind, families = _kind_of(value), tuple(FAMILIES)
    if kind in families or (isinstance(kind, str) and re.match(_DOTTED, kind)):
        return value
    close = difflib.get_close_matches(str(kind), families, n=1)
    fault = "kind is missing" if kind is None else f"there is no kind {kind!r}"
    meant = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(
        f"{fault}.{meant} The families: {', '.join(families)}. A network of your own: kind: package.module:function"
    )


def model_type() -> Any:
    """The type of a study file's `model`: the part of its kind in FAMILIES, or OwnModelSpec for a dotted kind."""
    parts = [Annotated[part, Tag(kind)] for kind, part in FAMILIES.items()]
    return Annotated[
        functools.reduce(operator.or_, [*parts, Annotated[OwnModelSpec, Tag("own")]]),
        Discriminator(_tag),
        BeforeValidator(_known),
    ]


ModelSpec = model_type()


def fixed_size_reason(model: Any) -> str:
    """The reason why a network of this spec cannot see images of several sizes; "" if it can, or is the user's own."""
    if isinstance(model, Tuned):
        return "its backbone resizes all images to one size"
    flat = isinstance(model, ConvnetSpec) and model.head == "flatten"
    if flat or isinstance(model, MlpSpec) or (isinstance(model, CnnSpec) and model.pool != "global"):
        return "its dense layers see every pixel"
    return ""
