"""Images with the answers of a network: its most confident mistakes, and saliency maps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from hpo.report.figures import BLACK, BLUE, GREY, PALE, RED, is_narrow, placed_figure, tidy
from hpo.report.text import short_name, short_names, wrapped

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_BARS = 10  # classes whose probability is drawn; of more, the likeliest and the true or explained one
_TITLES = {"gradient": "gradient", "integrated": "integrated gradients", "gradcam": "Grad-CAM"}


@dataclass(frozen=True)
class Mistake:
    """A wrong answer, with examples of the two classes involved.

    position, predicted_example and true_example are rows of the arrays that were searched. An example is the image of
    that class with the highest probability of it (None: the class has no other image). probabilities holds one value
    in [0, 1] for each class.
    """

    position: int
    true: int
    predicted: int
    probabilities: tuple[float, ...]
    predicted_example: int | None
    true_example: int | None

    @property
    def positions(self) -> tuple[int, ...]:
        """The rows of all its images."""
        rows = (self.position, self.predicted_example, self.true_example)
        return tuple(row for row in rows if row is not None)


def confident_mistakes(
    labels: NDArray[np.integer], probabilities: NDArray[np.floating], *, count: int = 5
) -> list[Mistake]:
    """labels (n,), probabilities (n, classes) -> the wrong answers with the highest probability, highest first."""
    predicted, sure = probabilities.argmax(axis=1), probabilities.max(axis=1)
    wrong = np.flatnonzero(predicted != labels)
    chosen = wrong[np.argsort(-sure[wrong], kind="stable")][:count]
    return [
        Mistake(
            position=int(place),
            true=int(labels[place]),
            predicted=int(predicted[place]),
            probabilities=tuple(map(float, probabilities[place])),
            predicted_example=_example(labels, probabilities, int(predicted[place]), but=int(place)),
            true_example=_example(labels, probabilities, int(labels[place]), but=int(place)),
        )
        for place in chosen
    ]


def ranks_of_truth(labels: NDArray[np.integer], probabilities: NDArray[np.floating]) -> NDArray[np.int64]:
    """labels (n,), probabilities (n, classes) -> (n,) rank of the true class, 1 the likeliest; ties as argmax."""
    ordered = np.argsort(-probabilities, axis=1, kind="stable")
    return np.asarray((ordered == labels[:, None]).argmax(axis=1) + 1, dtype=np.int64)


def rank_figure(labels: NDArray[np.integer], probabilities: NDArray[np.floating], *, title: str = "") -> Figure | None:
    """Histogram of the rank of the true class among wrongly classified images; None with two classes or no mistake."""
    classes = probabilities.shape[1]
    ranks = ranks_of_truth(labels, probabilities)
    counts = np.bincount(ranks, minlength=classes + 1)[2:]
    if classes < 3 or not counts.sum():
        return None
    width = max(4.8, 1.2 + 0.5 * (classes - 1))
    figure, (panel,) = placed_figure(width, 3.4, [(0.75, 0.55, width - 0.9, 2.45)])
    places = np.arange(2, classes + 1)
    panel.bar(places, counts, color=BLUE, width=0.75)
    for place, number in zip(places, counts, strict=True):
        if number:
            share = f"{number}\n{100 * number / counts.sum():.0f} %"
            panel.text(place, number, share, ha="center", va="bottom", fontsize=7.5)
    heading = f"{counts.sum()} mistakes of {len(labels)} images"
    tidy(panel, x="rank of the true class", y="mistakes", title=f"{title}: {heading}" if title else heading, whole="y")
    panel.set_xticks(places)
    panel.set_ylim(0, 1.2 * counts.max())
    panel.grid(visible=False, axis="x")
    return figure


def mistakes_figure(
    mistakes: Sequence[Mistake], images: Mapping[int, NDArray[np.uint8]], class_names: Sequence[str], *, title: str = ""
) -> Figure | None:
    """Each mistake, an example of the predicted and of the true class, and the probabilities.

    images maps the positions of the mistakes to (height, width, channels) uint8. None where there is no mistake.
    """
    if not mistakes:
        return None
    names, captions = short_names(class_names), short_names(class_names, 34)
    bars = min(len(names), _MOST_BARS)
    side, gap, bar = (0.95, 0.15, 1.0) if is_narrow() else (1.3, 0.25, 1.9)  # inches
    row = max(side + 0.55, 0.17 * bars + 0.35)
    head = 0.75 if title else 0.45
    start = 3 * (side + gap) + 0.1 + 0.066 * max(map(len, names))  # left end of the bars
    width, height = start + gap + bar + 0.7, head + row * len(mistakes)
    figure, (panel,) = placed_figure(width, height, [(0, 0, width, height)])  # one panel in inches, y downwards
    panel.set_axis_off()
    if title:
        panel.text(gap, 0.25, title, fontsize=11, va="center")
    heads = ("the mistake", "predicted class", "true class")
    for column, text in enumerate(heads):
        panel.text(gap + column * (side + gap) + side / 2, head - 0.16, text, fontsize=9, ha="center", color=GREY)
    panel.text(start + gap, head - 0.16, "probability", fontsize=9, color=GREY)
    for index, mistake in enumerate(mistakes):
        top = head + index * row
        shown = (
            (mistake.position, f"{captions[mistake.predicted]}?", RED),
            (mistake.predicted_example, captions[mistake.predicted], RED),
            (mistake.true_example, captions[mistake.true], BLUE),
        )
        for column, (place, text, colour) in enumerate(shown):
            left = gap + column * (side + gap)
            _image(panel, None if place is None else images[place], left, top, side)
            panel.text(
                left + side / 2,
                top + side + 0.04,
                wrapped(text, round(15 * side)),
                ha="center",
                va="top",
                fontsize=7,
                color=colour,
            )
        _bars(panel, mistake, names, left=start + gap, top=top, width=bar, step=min(0.26, (row - 0.35) / bars))
    panel.set_xlim(0, width)
    panel.set_ylim(height, 0)
    panel.set_aspect("auto")
    return figure


def _example(labels: NDArray[np.integer], probabilities: NDArray[np.floating], label: int, *, but: int) -> int | None:
    of_class = np.flatnonzero((labels == label) & (np.arange(len(labels)) != but))
    # The image of a class with the highest probability of it is right if any of the class is.
    return int(of_class[probabilities[of_class, label].argmax()]) if len(of_class) else None


def _image(panel: Axes, image: NDArray[np.uint8] | None, left: float, top: float, side: float) -> None:
    if image is None:
        panel.text(left + side / 2, top + side / 2, "no other\nimage", ha="center", va="center", fontsize=8, color=GREY)
        return
    high, wide = side * image.shape[0] / max(image.shape[:2]), side * image.shape[1] / max(image.shape[:2])
    across, down = left + (side - wide) / 2, top + (side - high) / 2
    channels = image.shape[2]
    pixels = image[..., :3] if channels >= 3 else image[..., 0]
    extent = (across, across + wide, down + high, down)
    panel.imshow(pixels, extent=extent, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto")


def _bars(
    panel: Axes, mistake: Mistake, names: Sequence[str], *, left: float, top: float, width: float, step: float
) -> None:
    order = list(np.argsort(-np.asarray(mistake.probabilities), kind="stable"))
    if len(order) > _MOST_BARS:
        order = sorted(
            [mistake.true, *[label for label in order if label != mistake.true][: _MOST_BARS - 1]], key=order.index
        )
    colours = {mistake.predicted: RED, mistake.true: BLUE}
    middles = [top + (place + 0.5) * step for place in range(len(order))]
    values = [mistake.probabilities[label] for label in order]
    panel.barh(
        middles,
        [width * value for value in values],
        left=left,
        height=0.72 * step,
        color=[colours.get(int(label), PALE) for label in order],
    )
    for middle, label, value in zip(middles, order, values, strict=True):
        colour = colours.get(int(label), BLACK)
        panel.text(left - 0.06, middle, names[label], ha="right", va="center", fontsize=7, color=colour)
        if value >= 0.0005:
            panel.text(left + width * value + 0.05, middle, f"{value:.3f}", ha="left", va="center", fontsize=7)


def saliency_figure(
    image: NDArray[Any],
    maps: Mapping[str, NDArray[Any]],
    probabilities: Sequence[float],
    class_names: Sequence[str],
    *,
    target: int,
    title: str = "",
) -> Figure:
    """The image, each map drawn over it, and the probabilities of the likeliest classes, the explained one in colour.

    image is (height, width, channels) uint8; maps are (height, width) in [0, 1] by method.
    """
    from matplotlib.figure import Figure

    panels = 1 + len(maps)
    ratio = image.shape[0] / image.shape[1]
    figure = Figure(figsize=(2.5 * panels + 4.2, 2.5 * ratio + 0.9), dpi=100, layout="constrained")
    axes = figure.subplots(1, panels + 1, width_ratios=[1.0] * panels + [1.1])
    shown = image[..., 0] if image.shape[2] < 3 else image
    axes[0].imshow(shown, cmap="gray", vmin=0, vmax=255)
    axes[0].set_title("image", fontsize=10)
    grey = image[..., :3].mean(axis=2)
    for panel, (method, values) in zip(axes[1:-1], maps.items(), strict=True):
        panel.imshow(grey, cmap="gray", vmin=0, vmax=255)
        # Where a map is low, the image shows through.
        panel.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.35 + 0.6 * values)
        panel.set_title(_TITLES.get(method, method), fontsize=10)
    for panel in axes[:-1]:
        panel.set_axis_off()
    _class_bars(axes[-1], probabilities, class_names, target)
    figure.suptitle(title, fontsize=11)
    return figure


def _class_bars(panel: Axes, probabilities: Sequence[float], class_names: Sequence[str], target: int) -> None:
    """Horizontal bars, the likeliest class on top; the explained class is always among them."""
    order = sorted(range(len(class_names)), key=lambda label: -probabilities[label])
    kept = order[:_MOST_BARS] if target in order[:_MOST_BARS] else [*order[: _MOST_BARS - 1], target]
    kept.reverse()
    values = [probabilities[label] for label in kept]
    names = [short_name(class_names[label]) for label in kept]
    panel.barh(range(len(kept)), values, color=[BLUE if label == target else PALE for label in kept])
    panel.set_yticks(range(len(kept)), names, fontsize=8)
    panel.get_yticklabels()[kept.index(target)].set_fontweight("bold")
    for place, value in enumerate(values):
        panel.text(value + 0.02, place, f"{value:.3f}", va="center", fontsize=7)
    panel.set_xlim(0, 1.2)
    panel.set_ylim(len(kept) - 0.4 - max(len(kept), 5), len(kept) - 0.4)  # two bars are no thicker than five
    panel.set_xticks([0, 0.5, 1])
    panel.tick_params(axis="x", labelsize=7)
    panel.spines[["top", "right"]].set_visible(False)
    panel.set_title("probability", fontsize=10)
