"""One image, what a network looked at in it, and what it thought."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from numpy.typing import NDArray

_TITLES = {"gradient": "gradient", "integrated": "integrated gradients", "gradcam": "Grad-CAM"}
_BARS, _LABEL = 10, 24  # classes shown; letters of a class name
_OTHER, _EXPLAINED = "#a9b4c2", "#1f6feb"


def saliency_figure(
    image: NDArray[Any],
    maps: Mapping[str, NDArray[Any]],
    probabilities: Sequence[float],
    class_names: Sequence[str],
    *,
    target: int,
    title: str = "",
) -> Figure:
    """The image, each map drawn over it, and the probabilities of the likeliest classes, the explained one coloured.

    image is (height, width, channels) uint8; maps are (height, width) in [0, 1] by method.
    """
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
        # What matters little lets the image show through.
        panel.imshow(values, cmap="inferno", vmin=0, vmax=1, alpha=0.35 + 0.6 * values)
        panel.set_title(_TITLES.get(method, method), fontsize=10)
    for panel in axes[:-1]:
        panel.set_axis_off()
    _bars(axes[-1], probabilities, class_names, target)
    figure.suptitle(title, fontsize=11)
    return figure


def _bars(panel: Any, probabilities: Sequence[float], class_names: Sequence[str], target: int) -> None:
    """Horizontal bars, the likeliest class on top; the explained class is always among them."""
    order = sorted(range(len(class_names)), key=lambda label: -probabilities[label])
    kept = order[:_BARS] if target in order[:_BARS] else [*order[: _BARS - 1], target]
    kept.reverse()
    values = [probabilities[label] for label in kept]
    names = [_short(class_names[label]) for label in kept]
    panel.barh(range(len(kept)), values, color=[_EXPLAINED if label == target else _OTHER for label in kept])
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


def _short(name: str) -> str:
    return name if len(name) <= _LABEL else f"{name[: _LABEL - 1].rstrip(' (,')}…"
