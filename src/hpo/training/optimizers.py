"""What a training minimizes and how: losses, optimizers and learning-rate schedules by name."""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from hpo.data.prepare import TrialData
from hpo.errors import SpecError, TrainingError
from hpo.models.backbones import stages
from hpo.models.transfer import transfer_of
from hpo.spec.own_code import load_function
from hpo.spec.training import OptimizerSpec, ScheduleSpec, TrainingSpec


def class_weights(labels: Tensor, classes: int) -> Tensor:
    """labels (n,) -> (classes,) weights n / (classes * images of the class): scikit-learn's "balanced"."""
    counts = torch.bincount(labels, minlength=classes).clamp(min=1)
    return len(labels) / (classes * counts.float())


def positive_weights(labels: Tensor) -> Tensor:
    """labels (n, classes) of 0 and 1 -> (classes,) images without a label to each with it: BCEWithLogitsLoss's."""
    counts = labels.sum(0).clamp(min=1).float()
    return (len(labels) - counts).clamp(min=1) / counts


class Loss:
    """The mean loss of a batch as spec says. Labels are (n,), or (n, classes) of 0 and 1 where images have several.

    With a teacher it takes the rows (n,) of the images in place of their labels, see targets.
    """

    def __init__(self, spec: TrainingSpec, data: TrialData) -> None:
        self._smoothing, self._gamma, self._name = spec.label_smoothing, spec.focal_gamma, spec.loss
        labels = data.labels[data.train]
        self._several = labels.ndim == 2
        self._weights: Tensor | None = None
        if spec.class_weights == "balanced":
            self._weights = positive_weights(labels) if self._several else class_weights(labels, len(data.class_names))
        self._own: Callable[..., Tensor] | None = load_function(spec.loss, what="loss") if ":" in spec.loss else None
        self._every, self._soft = data.labels, None
        if data.taught is not None:
            self._share, self._heat = spec.teacher_weight, spec.teacher_temperature
            self._soft = cooled(data.taught, self._heat, several=self._several)

    def targets(self, rows: Tensor) -> Tensor:
        """What is to be learned of the images in these rows (n,): their labels, or with a teacher the rows."""
        return rows if self._soft is not None else self._every.index_select(0, rows)

    def labels(self, targets: Tensor) -> Tensor:
        """The labels of targets."""
        return self._every.index_select(0, targets) if self._soft is not None else targets

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """logits (n, classes) float32 and targets -> a scalar."""
        own = self._of(logits, self.labels(targets))
        if self._soft is None:
            return own
        soft = self._soft.index_select(0, targets)
        if self._several:
            taught = functional.binary_cross_entropy_with_logits(logits / self._heat, soft)
        else:
            taught = functional.cross_entropy(logits / self._heat, soft)
        # Its gradient is 1 / temperature^2 of that of the labels (Hinton et al. 2015, section 2.1).
        return (1 - self._share) * own + self._share * self._heat**2 * taught

    def _of(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self._own is not None:
            return _answer(self._own, self._name, logits, labels)
        if self._several:
            return self._of_labels(logits, labels.to(logits.dtype))
        if self._name == "cross_entropy":
            return functional.cross_entropy(logits, labels, weight=self._weights, label_smoothing=self._smoothing)
        # Lin et al. 2017: the cross-entropy of an image times (1 - p)^gamma, p the probability of its class.
        logs = logits.log_softmax(1).gather(1, labels.unsqueeze(1)).squeeze(1)
        each = -_power(1 - logs.exp(), self._gamma) * logs
        if self._weights is None:
            return each.mean()
        weights = self._weights[labels]
        return (weights * each).sum() / weights.sum()

    def _of_labels(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Mean binary cross-entropy over images and labels, or its focal form."""
        targets = labels * (1 - self._smoothing) + self._smoothing / 2
        each = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=self._weights, reduction="none")
        if self._name == "focal":
            each = each * _power(torch.where(labels > 0, logits, -logits).neg().sigmoid(), self._gamma)
        return each.mean()

    def share(self, part: Tensor, batch: Tensor) -> Tensor | float:
        """The share of a piece's mean loss in that of its batch, from their labels: a mean may be weighted by class."""
        if len(part) == len(batch):
            return 1.0
        if self._weights is None or self._several:
            return len(part) / len(batch)
        return self._weights[self.labels(part)].sum() / self._weights[self.labels(batch)].sum()


def cooled(probabilities: Tensor, temperature: float, *, several: bool) -> Tensor:
    """Probabilities (n, classes), p -> p^(1 / temperature), normalised; with several labels, each of (p, 1 - p)."""
    logs = probabilities.clamp_min(1e-7).log()
    if several:
        return ((logs - (1 - probabilities).clamp_min(1e-7).log()) / temperature).sigmoid()
    return (logs / temperature).softmax(1)


def _power(base: Tensor, exponent: float) -> Tensor:
    # The slope of x ** gamma at 0 is not finite for gamma below 1.
    return base.clamp(min=1e-8) ** exponent


def _answer(function: Callable[..., Tensor], name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """The loss that the user's function answers. Raises TrainingError where it fails or answers no scalar tensor."""
    try:
        loss = function(logits, labels)
    except Exception as error:
        raise TrainingError(
            f"loss {name}: the function fails: {type(error).__name__}: {error}.",
            f"Call it with logits of shape {tuple(logits.shape)} and labels {tuple(labels.shape)} int64.",
        ) from error
    if not isinstance(loss, Tensor) or loss.shape != () or not loss.requires_grad:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise TrainingError(
            f"loss {name}: returned {found}, not a scalar that depends on the logits.", "Return the mean over images."
        )
    return loss


def balanced_order(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """labels (n,) on the CPU -> (count,) places in 0..n-1, drawn with replacement, all classes present equally often.

    As WeightedRandomSampler with a weight of 1 / images of the class. Raises TrainingError for several labels an image.
    """
    if labels.ndim == 2:
        raise TrainingError(
            "training.sampling: balanced draws by the class of an image, and these have several labels.",
            "Weigh them instead: training.class_weights: balanced.",
        )
    weights = 1 / labels.bincount().clamp(min=1).double()
    return torch.multinomial(weights[labels], count, replacement=True, generator=generator)


Kind = TypeVar("Kind", bound=torch.optim.Optimizer)


def _plain_methods() -> None:
    for method in vars(torch.optim.Optimizer).values():
        plain = inspect.unwrap(method) if callable(method) else method
        if plain is not method:
            plain.__dynamo_disable = plain


def eager(kind: type[Kind]) -> type[Kind]:
    """The same optimizer without torch's compiler, whose import at the first step takes longer than that of torch.

    torch decorates `step` and the methods of Optimizer for its compiler. `step` loses its decorator here; the others
    get the answer that the compiler would give outside of a compiled function: the method itself.
    """
    _plain_methods()
    step = torch.no_grad()(inspect.unwrap(kind.step))
    return cast("type[Kind]", type(kind.__name__, (kind,), {"step": step}))


def _sgd(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    # torch refuses Nesterov without momentum; a search over both may propose it, and it means plain SGD.
    nesterov = spec.nesterov and spec.momentum > 0
    return eager(torch.optim.SGD)(
        weights, spec.lr, momentum=spec.momentum, nesterov=nesterov, weight_decay=spec.weight_decay, **fast
    )


def _rmsprop(weights: Any, spec: OptimizerSpec, **_: bool) -> torch.optim.Optimizer:
    return eager(torch.optim.RMSprop)(weights, spec.lr, momentum=spec.momentum, weight_decay=spec.weight_decay)


def _adam(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return eager(torch.optim.Adam)(weights, spec.lr, betas=betas, weight_decay=spec.weight_decay, **fast)


def _adamw(weights: Any, spec: OptimizerSpec, **fast: bool) -> torch.optim.Optimizer:
    betas = (spec.beta1, spec.beta2)
    return eager(torch.optim.AdamW)(weights, spec.lr, betas=betas, weight_decay=spec.weight_decay, **fast)


OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adam": _adam,
    "adamw": _adamw,
}


def of_timm(weights: Any, spec: OptimizerSpec, *, last: Tensor | None = None) -> torch.optim.Optimizer:
    """The optimizer that timm.optim calls so, over groups of weights; last is the weight of the last dense layer.

    Raises SpecError for a name or an option that timm does not have, and for optimizers that need another loop.
    """
    import timm.optim

    name = spec.name.removeprefix("timm/")
    try:
        kind = timm.optim.get_optimizer_info(name)
    except ValueError:
        close = difflib.get_close_matches(name, timm.optim.list_optimizers(), n=3)
        meant = f"Did you mean {' or '.join(close)}? " if close else ""
        raise SpecError(
            f"training.optimizer.name: timm {timm.__version__} has no optimizer {name!r}.",
            f"{meant}All: python -c 'import timm.optim; print(timm.optim.list_optimizers())'",
        ) from None
    if kind.second_order:
        raise SpecError(
            f"training.optimizer.name: {spec.name} needs second derivatives, which hpo does not compute.",
            "Choose another one.",
        )
    if last is not None and isinstance(kind.opt_class, type) and issubclass(kind.opt_class, timm.optim.Muon):
        # As its author advises: classes are no directions to be made orthogonal.
        weights = [part for group in weights for part in _without(group, last)]
    _plain_methods()
    try:
        made: torch.optim.Optimizer = timm.optim.create_optimizer_v2(
            weights, opt=name, lr=spec.lr, weight_decay=spec.weight_decay, **spec.options
        )
    except (ImportError, TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise SpecError(
            f"training.optimizer: {spec.name} cannot be made with lr {spec.lr:g}, weight_decay {spec.weight_decay:g} "
            f"and options {spec.options}: {str(error).rstrip('.')}.",
            "Correct training.optimizer.options, or choose another one.",
        ) from None
    return made


def _without(group: dict[str, Any], last: Tensor) -> list[dict[str, Any]]:
    """A group of weights, and apart from it the weight that learns by AdamW."""
    others = [weight for weight in group["params"] if weight is not last]
    if len(others) == len(group["params"]):
        return [group]
    apart = {**group, "params": [last], "use_fallback": True}
    return [{**group, "params": others}, apart] if others else [apart]


def check_optimizer(spec: OptimizerSpec) -> None:
    """Raise SpecError where an optimizer of timm cannot be made as spec says."""
    if spec.of_timm:
        of_timm([{"params": [nn.Parameter(torch.zeros(2, 2))]}], spec)


def build_optimizer(spec: OptimizerSpec, net: nn.Module) -> torch.optim.Optimizer:
    """The optimizer over the weights of net that train, now or later; as one fused kernel where torch has one.

    Each group has a `scale`, the factor of its learning rate: layer_decay to the power of its distance from the head.
    """
    transfer = transfer_of(net)
    later = transfer is not None and transfer.unfreeze_epoch is not None
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.requires_grad or later], "scale": spec.layer_decay**distance}
        for distance, weights in by_depth(net).items()
    ]
    groups = [group for group in groups if group["params"]]
    if spec.of_timm:
        dense = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear)]
        return of_timm(groups, spec, last=dense[-1] if dense else None)
    # A fused optimizer loops over the weights once, not once per operation: steps of small networks are 1.2 to 3 times
    # as fast.
    return OPTIMIZERS[spec.name](groups, spec, fused=groups[0]["params"][0].device.type in ("cpu", "cuda"))


def by_depth(net: nn.Module) -> dict[int, list[nn.Parameter]]:
    """The weights of net by their distance from the head, in stages; the head's is 0."""
    transfer = transfer_of(net)
    columns = [[*stages(body), transfer.head] for body in transfer.bodies] if transfer else [stages(net)]
    far = max(map(len, columns))  # weights outside of any stage, such as a class token, go with the first
    distance = {
        id(weight): place
        for column in columns
        for place, part in enumerate(reversed(column))
        for weight in part.parameters()
    }
    found: dict[int, list[nn.Parameter]] = {}
    for weight in net.parameters():
        found.setdefault(distance.get(id(weight), far - 1), []).append(weight)
    return found


def _share_of_period(spec: ScheduleSpec, done: float) -> float:
    """How much of the present period of the schedule is done, when this share of all batches is; both in [0, 1]."""
    lengths = [spec.period_growth**number for number in range(spec.restarts + 1)]
    left = done * sum(lengths)
    for length in lengths[:-1]:
        if left < length:
            return left / length
        left -= length
    return min(1.0, left / lengths[-1])


# Name -> factor of the learning rate after the warm-up: (spec, share of the remaining batches that are done, epochs
# that are done).
SCHEDULES: dict[str, Callable[[ScheduleSpec, float, int], float]] = {
    "constant": lambda _spec, _done, _epoch: 1.0,
    "cosine": lambda spec, done, _epoch: 0.5 * (1 + math.cos(math.pi * _share_of_period(spec, done))),
    "one_cycle": lambda _spec, done, _epoch: 0.5 * (1 + math.cos(math.pi * done)),
    "step": lambda spec, _done, epoch: float(spec.gamma ** (epoch // spec.step_epochs)),
    "exponential": lambda spec, _done, epoch: float(spec.gamma**epoch),
}


def learning_rate_factor(spec: ScheduleSpec, *, step: int, steps: int, epoch: int) -> float:
    """The factor, in [0, 1], of the learning rate in batch `step` of `steps`, of epoch `epoch`; both counted from 0."""
    rising = round(spec.rising * steps)
    if step < rising:
        return (step + 1) / rising
    return SCHEDULES[spec.name](spec, (step - rising) / max(1, steps - rising), epoch)
