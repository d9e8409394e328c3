"""One training: optimizer, schedule, augmentation, and when to stop."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from hpo.spec.space import OptimizerName, Part, Positive, Rate, Score, Seed, Share


class OptimizerSpec(Part):
    """How weights follow gradients. An optimizer ignores fields that it does not have."""

    name: OptimizerName = "adam"
    """timm/muon, timm/lion, timm/lamb and so on are those of timm.optim (timm.optim.list_optimizers), which take lr,
    weight_decay and `options`. The last dense layer of a network learns by AdamW with timm's Muon, as biases do."""
    lr: Annotated[float, Field(gt=0.0, le=100.0)] = 1e-3
    """Learning rate; with a schedule, its highest."""
    momentum: Rate = 0.0
    """sgd and rmsprop."""
    nesterov: bool = False
    """sgd with a momentum above 0."""
    weight_decay: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """L2 penalty; decoupled from the gradient in adamw."""
    beta1: Rate = 0.9
    """adam and adamw: decay of the first moment."""
    beta2: Rate = 0.999
    """adam and adamw: decay of the second moment."""
    options: dict[str, Any] = Field(default_factory=dict)
    """timm: further keyword arguments, such as {momentum: 0.95, nesterov: true}. A search varies them as
    training.optimizer.options.NAME, if they are listed here."""
    layer_decay: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """Each stage of the network learns at this times the rate of the stage after it, the head at the full rate."""

    @property
    def of_timm(self) -> bool:
        """Whether it is one of timm's."""
        name: str = self.name
        return name.startswith("timm/")

    @model_validator(mode="after")
    def _options_are_of_timm(self) -> OptimizerSpec:
        if self.options and not self.of_timm:
            raise ValueError(f"options are for optimizers of timm, and this is {self.name}. Leave them out")
        return self


class ScheduleSpec(Part):
    """How the learning rate moves, batch by batch."""

    name: Literal["constant", "cosine", "one_cycle", "step", "exponential"] = "constant"
    """cosine: to 0 along half a cosine. one_cycle: up over `warmup`, then down along a cosine (Smith 2018).
    step: times gamma every step_epochs. exponential: times gamma every epoch."""
    warmup: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of all batches in which the rate climbs linearly to its highest; one_cycle takes 0.3 where this is 0."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    step_epochs: Positive = 10
    restarts: Annotated[int, Field(ge=0, le=100)] = 0
    """cosine: how often the rate returns to its highest (Loshchilov & Hutter 2017)."""
    period_growth: Annotated[float, Field(ge=1.0, le=10.0)] = 1.0
    """restarts: the length of each period in units of that of the one before."""

    @property
    def rising(self) -> float:
        """Share of all batches in which the rate climbs."""
        return (self.warmup or 0.3) if self.name == "one_cycle" else self.warmup


class AugmentSpec(Part):
    """Random changes of the training images, batch by batch, on the device; 0 and false are off.

    Each image draws amounts of its own. All that moves pixels is one resampling, all that changes colours is another.
    """

    flip_horizontal: bool = False
    """Half of the images, left to right."""
    alternate_flips: bool = False
    """flip_horizontal: a coin for each image decides in which epochs it is mirrored, the even or the odd ones (Jordan
    2024), so that two epochs show both sides of each image."""
    flip_vertical: bool = False
    """Half of the images, upside down."""
    rotate90: bool = False
    """By a random multiple of 90 degrees; square images only."""
    rotate: Annotated[float, Field(ge=0.0, le=180.0)] = 0.0
    """By an angle within this many degrees, either way."""
    shift: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Across and down, each by up to this share of the side, either way."""
    crop: Annotated[int, Field(ge=0, le=64)] = 0
    """Random crop after padding by this number of pixels: a shift by whole pixels, which does not blur."""
    zoom: Annotated[float, Field(ge=0.0, le=3.0)] = 0.0
    """By a factor between 1 / (1 + zoom) and 1 + zoom."""
    fill: Literal["reflect", "edge", "black"] = "reflect"
    """What comes in from beyond the edges."""
    brightness: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """By a factor within 1 +- this."""
    contrast: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Distance from the mean grey of the image, by a factor within 1 +- this."""
    saturation: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Distance from each pixel's grey, by a factor within 1 +- this; RGB only."""
    hue: Annotated[float, Field(ge=0.0, le=0.5)] = 0.0
    """By up to this share of the colour circle, either way; RGB only."""
    randaugment: Annotated[int, Field(ge=0, le=10)] = 0
    """Number of different changes of each image, drawn from rotation, shifts, shears, zoom, brightness, contrast and
    saturation, all of one strength and random sign (after Cubuk et al. 2020)."""
    magnitude: Annotated[float, Field(ge=0.0, le=1.0)] = 0.3
    """randaugment: the strength. 1 is 45 degrees, 0.4 of the side, a shear or zoom by 0.5, a factor 1 +- 0.9."""
    erase: Annotated[float, Field(ge=0.0, le=1.0)] = 0.0
    """Share of the images in which a random rectangle is painted with the mean colour (after Zhong et al. 2020)."""
    erase_area: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    """erase: the largest rectangle, as a share of the image."""
    mixup: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Blend the images and labels of each batch with those of another order of it, share ~ Beta(mixup, mixup)
    (Zhang et al. 2018)."""
    cutmix: Annotated[float, Field(ge=0.0, le=10.0)] = 0.0
    """Paste a rectangle of other images instead, area ~ Beta(cutmix, cutmix) (Yun et al. 2019). With both, a coin
    decides for each batch."""


class TrainingSpec(Part):
    """One training."""

    epochs: Positive = 20
    """The most; early stopping may end it sooner."""
    data_growth: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The first epoch goes through this share of the training images, each further one through as much more, until all
    take part: short epochs suffice to recognise poor candidates. The classes keep their shares. 1: always all."""
    first_size: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    """The first epoch sees images whose sides are shrunk to this share; they grow epoch by epoch, and the last third of
    the epochs sees whole images. For networks that end in an average over the maps. 1: always whole ones."""
    batch_size: Annotated[int, Field(ge=1, le=65536)] = 64
    optimizer: OptimizerSpec = OptimizerSpec()
    schedule: ScheduleSpec = ScheduleSpec()
    augment: AugmentSpec = AugmentSpec()
    loss: Annotated[str, Field(pattern=r"^(cross_entropy|focal|[A-Za-z_][\w.]*:[A-Za-z_]\w*)$")] = "cross_entropy"
    """What is minimized: cross_entropy (of each label, where images have several), focal (Lin et al. 2017), or
    package.module:function of (logits (n, classes), labels) that returns a scalar tensor. The score valid_loss is
    cross-entropy always."""
    focal_gamma: Annotated[float, Field(ge=0.0, le=10.0)] = 2.0
    """focal: how much less well-classified images weigh; 0 is cross-entropy."""
    sampling: Literal["shuffled", "balanced"] = "shuffled"
    """balanced: the images of an epoch are drawn with replacement, every class equally often."""
    teacher: str | None = None
    """A logged model (NAME, NAME@ALIAS or NAME/NUMBER), such as an ensemble, whose probabilities of the training images
    without augmentation are learned as soft labels (distillation, Hinton et al. 2015). null: none."""
    teacher_weight: Share = 0.9
    """Share of the teacher's labels in the loss; the images' own labels have the rest."""
    teacher_temperature: Annotated[float, Field(ge=1.0, le=100.0)] = 2.0
    """Divides the logarithms of the teacher's probabilities and the logits: the higher, the more the less probable
    classes count."""
    label_smoothing: Rate = 0.0
    class_weights: Literal["none", "balanced"] = "none"
    """balanced: each class weighs n / (classes * images of the class) in the loss."""
    monitor: Score = "valid_accuracy"
    """The score whose best epoch's weights are kept, and that early stopping watches. Left out: the search's objective
    (the first of several that is a validation score)."""
    scores: list[Score] = Field(default_factory=list)
    """Further scores of every epoch, such as [valid_mcc]; those that monitor and search name need not be listed."""
    patience: Positive | None = None
    """Stop after this number of epochs without a better monitor; null: never."""
    clip_norm: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """A gradient longer than this, over all weights, is shortened to it. null: never."""
    micro_batch: Positive | None = None
    """Images that go through the network at once; gradients of a batch's pieces are summed before each step, so that a
    large batch fits into little memory. Batch norm sees the pieces. null: the whole batch."""
    ema: Rate = 0.0
    """Evaluate and keep a moving average of the weights, which keeps this share of itself in every step (less in the
    first steps). 0: the weights themselves."""
    checkpoint: Positive | None = None
    """Save the training every this many epochs: an interrupted trial resumes from there. null: it starts again. May
    change when a study is resumed."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """auto: the faster of the two for this network, batch and device, by a short measurement."""
    seed: Seed | None = None
    """Initialisation, data order and dropout; null: a seed of its own for each trial, from the study's seed."""

    @model_validator(mode="after")
    def _loss_fits(self) -> TrainingSpec:
        if self.loss != "cross_entropy" and self.label_smoothing:
            raise ValueError(f"label_smoothing belongs to cross_entropy, and loss is {self.loss}. Leave one out")
        if ":" in self.loss and self.class_weights != "none":
            raise ValueError(f"class_weights do not reach {self.loss}. Leave them out, and weigh in your function")
        return self

    def watching(self, monitor: Score) -> TrainingSpec:
        """The same training with another monitor, which counts as given only where this one's was."""
        return TrainingSpec.model_construct(_fields_set=self.model_fields_set, **{**dict(self), "monitor": monitor})

    def size_of(self, epoch: int) -> float:
        """The share of their sides to which the images of an epoch, counted from 1, are shrunk."""
        growing = max(1, math.ceil(self.epochs * 2 / 3) - 1)
        return min(1.0, self.first_size + (1 - self.first_size) * (epoch - 1) / growing)

    def share(self, epoch: int) -> float:
        """How much of the training images an epoch, counted from 1, goes through: what it costs, in full epochs."""
        return min(1.0, epoch * self.data_growth)
