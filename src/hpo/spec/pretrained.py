"""What a study file may say of networks that others trained: torchvision, timm, several fused, one of this store."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpo.spec.basic import Activation, Rate, Width
from hpo.spec.scores import Positive
from hpo.spec.space import Part

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
    """last: the features that its own classifier would see. all: beside them the averages of the maps that each of its
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
    """all: only the new head trains. none: everything does. A number: so many stages from the image on are frozen.
    What is frozen stays as it is, running means of batch norm included."""
    unfreeze_epoch: Positive | None = None
    """From this epoch on everything trains. null: what is frozen stays so."""
    views: Annotated[int, Field(ge=0, le=100)] = 0
    """With freeze all and augmentation: so many augmented views of each image go through the backbone once, and each
    epoch draws one of them. 0: every epoch augments anew, and sends every image through the whole network."""
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
    """all: only the new head trains. none: everything does. A number: so many stages from the image on are frozen."""


def _refuse_frozen_noise(tuned: Tuned, backbones: Any) -> None:
    fresh = [backbone.name for backbone in backbones if backbone.weights == "none"]
    if tuned.freeze != "none" and fresh:
        raise ValueError(f"freeze {tuned.freeze} with weights none would keep {fresh[0]} random. Change one of the two")
