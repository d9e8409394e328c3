"""What comes of a search: models that are kept, ensembles, how they answer, what promotion demands, references."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hpo.spec.space import Part, Positive, PublishedScore


class Reference(Part):
    """A published number to compare with the study's own."""

    label: str
    score: PublishedScore
    value: float
    source: str
    note: str = ""
    """What differs from this study's protocol."""


class KeepSpec(Part):
    """What stays on disk."""

    models: Annotated[str, Field(pattern=r"^(all|none|best:[1-9][0-9]{0,8})$")] = "best:10"
    """all, none, or best:K: a trial's model is kept while it is among the K best."""
    figures: Annotated[str, Field(pattern=r"^(all|none|best:[1-9][0-9]{0,8})$")] = "best:1"
    """The same for its pictures. They are drawn at the end of the search, of trials that keep their model."""

    @property
    def count(self) -> float:
        """How many trials keep their model; inf for all."""
        return _count(self.models)

    @property
    def figure_count(self) -> float:
        """How many trials keep their pictures; inf for all."""
        return _count(self.figures)


class EnsembleSpec(Part):
    """After the search: an ensemble of trials that keep their model, registered if its validation gain is above 0."""

    average: Literal["probabilities", "weights"] = "probabilities"
    """probabilities: of all members. weights: of trials with one architecture (a greedy soup, Wortsman et al. 2022),
    which is as fast as one network; trials that began with different weights hardly ever mix."""
    members: Annotated[int, Field(ge=2, le=64)] = 8
    """Different trials in it, at most."""
    parameters: Positive | None = None
    """Weights and biases of all members together, at most; null: as many as the search's constraint on a trial."""
    latency_ms: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Milliseconds for one image, the sum over members, at most; null: that of `promote`, if any."""


class PromoteSpec(Part):
    """What a logged model must keep to become champion, measured when it is promoted, on the machine that does it."""

    latency_ms: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """Milliseconds from one image to its probabilities by the logged program, on the CPU, at most; the median of 30."""
    size_mb: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    """All files of the model, in millions of bytes, at most."""


class PredictSpec(Part):
    """How a kept model answers: what its exported program does after its network, as validation images decide.

    A model with fewer than 100 of them, or of images with several labels, answers as its network does.
    """

    calibrate: Literal["auto", "off"] = "auto"
    """auto: probabilities p become p^(1 / T), normalised, T fitted on the validation images, if that lowers their
    cross-entropy beyond chance. No answer changes, only how sure it is (Guo et al. 2017)."""
    views: Literal["auto", "off"] = "off"
    """auto: the mean of several views of each image, if that lowers the cross-entropy beyond chance and the accuracy
    not at all. Views are flips, right-angle turns, shifts and crops that training.augment makes too. A prediction takes
    as many times as long as there are views."""


def _count(policy: str) -> float:
    return {"all": float("inf"), "none": 0}.get(policy) or float(policy.partition(":")[2] or 0)
