"""One look for all pictures: colours that the colour-blind tell apart, quiet axes, names that fit and differ."""

from __future__ import annotations

import math
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hpo.metrics import label_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 80
# Okabe & Ito (2008), without the yellow, which white paper swallows.
BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#222222"
GREY, PALE = "#6B7280", "#C4CAD2"
COLOURS = (BLUE, RED, GREEN, ORANGE, SKY, PINK, BLACK)
_DASHES = ("-", "--", ":")
_LABEL = 24  # letters of a name


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, outside pyplot, that makes room for its labels by itself."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def placed_figure(
    width: float, height: float, boxes: Sequence[tuple[float, float, float, float]]
) -> tuple[Figure, list[Axes]]:
    """A figure with panels at (left, bottom, width, height), all in inches.

    For pictures whose labels have a known size: making room for them by measuring takes half the time of drawing.
    """
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    places = [(left / width, low / height, wide / width, high / height) for left, low, wide, high in boxes]
    return figure, [figure.add_axes(place) for place in places]


def name_inches(names: Sequence[str]) -> float:
    """How wide the longest of these names is at 8 points, at most."""
    return 0.068 * max(map(len, names))


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. It is drawn once, where Figure.savefig draws twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(path, compress_level=4)


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th line; 21 differ."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)]}


def tidy(panel: Axes, *, x: str = "", y: str = "", title: str = "", whole: str = "") -> None:
    """Quiet frame and grid, small labels. whole names the axes ("x", "y", "xy") that count whole things."""
    from matplotlib.ticker import MaxNLocator

    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(color="#E5E8EC", linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(labelsize=8, color=GREY)
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    if title:
        panel.set_title(title, fontsize=10)
    for name in whole:
        getattr(panel, f"{name}axis").set_major_locator(MaxNLocator(integer=True, nbins=6))


def log_axes(panel: Axes, axes: str) -> None:
    """Logarithmic axes ("x", "y", "xy") with a few plain numbers; to be called when the data are in."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for name in axes:
        axis = getattr(panel, f"{name}axis")
        getattr(panel, f"set_{name}scale")("log")
        low, high = axis.get_view_interval()
        decades = math.log10(high / low)
        subs = (1.0, 2.0, 3.0, 5.0, 7.0) if decades < 1 else (1.0, 2.0, 5.0) if decades < 2 else (1.0,)
        axis.set_major_locator(LogLocator(subs=subs, numticks=8))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())


def panels_of(figure: Figure, count: int, *, columns: int, share_y: bool = False) -> list[Axes]:
    """count panels, row by row; what is left of the last row stays empty. share_y: labels stand on the left only."""
    columns = min(columns, count)
    rows = -(-count // columns)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel())
    for panel in panels[count:]:
        panel.set_visible(False)
    return panels[:count]


def legend(panel: Axes, **options: Any) -> None:
    """A legend without a border, where there is something to say."""
    if panel.get_legend_handles_labels()[1]:
        panel.legend(**{"framealpha": 0.85, "edgecolor": "none", "fontsize": 8, **options})


def short_name(name: str, width: int = _LABEL) -> str:
    """A name of at most width letters; what is left out shows as an ellipsis."""
    return name if len(name) <= width else f"{name[: width - 1].rstrip(' (,-_')}…"


def short_names(names: Sequence[str], width: int = _LABEL) -> list[str]:
    """short_name of each; those that would then read alike keep their ends too, or else get a number."""
    short = [short_name(name, width) for name in names]
    for shorten in (_middle_out, _numbered):
        counts = Counter(short)
        short = [
            text if counts[text] == 1 else shorten(name, width, index)
            for index, (name, text) in enumerate(zip(names, short, strict=True))
        ]
    return short


def wrapped(name: str, width: int, lines: int = 2) -> str:
    """A name over at most `lines` lines of width letters."""
    rows = textwrap.wrap(name.replace("(", " ("), width) or [""]
    return "\n".join(
        rows if len(rows) <= lines else [*rows[: lines - 1], short_name(" ".join(rows[lines - 1 :]), width)]
    )


def short_paths(paths: Sequence[str]) -> dict[str, str]:
    """Dotted path -> the shortest end of it that no other has; name and kind say nothing alone."""
    ends: dict[str, str] = {}
    for path in paths:
        parts = path.split(".")
        shortest = min(2 if parts[-1] in ("name", "kind", "size") else 1, len(parts))
        tries = (".".join(parts[-length:]) for length in range(shortest, len(parts) + 1))
        ends[path] = next(
            (end for end in tries if not any(o != path and f".{o}".endswith(f".{end}") for o in paths)), path
        )
    return ends


def value_text(value: Any) -> str:
    """A parameter's value as a label."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={value_text(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return "-".join(map(value_text, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def score_text(score: str) -> str:
    """A score's name as an axis label: valid_macro_auc -> validation macro AUC."""
    return label_of(score)


def _middle_out(name: str, width: int, _: int) -> str:
    head = (width - 1) // 2
    return name if len(name) <= width else f"{name[:head]}…{name[-(width - 1 - head) :]}"


def _numbered(name: str, width: int, index: int) -> str:
    return f"{short_name(name, width - 4)} {index}"
