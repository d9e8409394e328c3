"""What a study file may say of the network: one frozen part per family, told apart by `kind`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpo.spec.space import Part

Activation = Literal["relu", "leaky_relu", "elu", "gelu", "silu", "tanh", "sigmoid"]
Rate = Annotated[float, Field(ge=0.0, lt=1.0)]
Width = Annotated[int, Field(ge=1, le=65536)]


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
    kernel: Annotated[int, Field(ge=1, le=63)] = 3
    """Side of the square kernels, in pixels."""
    padding: Literal["same", "valid"] = "same"
    activation: Activation = "relu"
    pool: Annotated[int, Field(ge=1, le=64)] | Literal["global"] = 2
    """Side and stride of the pooling window in pixels; 1 pools nothing; global pools each whole map to one number."""
    pool_type: Literal["max", "average"] = "max"
    batch_norm: bool = False
    dropout: Rate = 0.0
    """Share of pooled activations set to zero in training, before the classifier."""


ModelSpec = Annotated[MlpSpec | CnnSpec, Field(discriminator="kind")]
