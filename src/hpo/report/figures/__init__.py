"""Figures of matplotlib in one style: colours for the colour-blind, quiet axes, PNG files and SVG for pages."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 80
# Okabe & Ito (2008), without the yellow, which white paper swallows.
BLUE, ORANGE, GREEN, RED, SKY, PINK, BLACK = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#222222"
GREY, PALE = "#6B7280", "#C4CAD2"
COLOURS = (BLUE, RED, GREEN, ORANGE, SKY, PINK, BLACK)
_DASHES = ("-", "--", ":")


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, outside pyplot, with constrained layout."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    return Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def placed_figure(
    width: float, height: float, boxes: Sequence[tuple[float, float, float, float]]
) -> tuple[Figure, list[Axes]]:
    """A figure with panels at (left, bottom, width, height), all in inches.

    For figures whose labels have a known size: measuring them for a layout takes half the time of drawing.
    """
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    places = [(left / width, low / height, wide / width, high / height) for left, low, wide, high in boxes]
    return figure, [figure.add_axes(place) for place in places]


def name_inches(names: Sequence[str]) -> float:
    """An upper bound of the width in inches of the longest name at 8 points."""
    return 0.068 * max(map(len, names))


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG. Figure.savefig would draw it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(path, compress_level=4)


def mark_trials(artist: Artist, numbers: Sequence[int]) -> None:
    """Note the trial of each point or line of an artist, so that a page can link them; nothing is drawn for it."""
    from matplotlib.collections import PathCollection

    kept = list(numbers)
    if isinstance(artist, PathCollection):  # points without a place are not drawn
        offsets: Any = np.ma.asarray(artist.get_offsets(), dtype=float).filled(np.nan)
        finite: Any = np.isfinite(offsets).all(axis=1)
        kept = [number for number, drawn in zip(numbers, finite.tolist(), strict=True) if drawn]
    artist.set_gid("trials-" + "-".join(map(str, kept)))


def svg_text(figure: Figure, *, transparent: bool) -> str:
    """A figure as an <svg> element for the inside of a page; `data-trials` are the numbers given to mark_trials.

    The same figure gives the same text: no date, and ids that follow from the content.
    """
    import matplotlib as mpl

    buffer = io.BytesIO()
    with mpl.rc_context({"svg.hashsalt": "hpo"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=transparent)
    text = buffer.getvalue().decode("utf-8")
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="trials-([\d-]*)"', r' data-trials="\1"', text)
    # Ids such as axes_1 are the same in every figure and are not referred to.
    return re.sub(r' id="[A-Za-z.0-9]+_\d+"', "", text)


def line_style(index: int) -> dict[str, Any]:
    """Colour and dashes of the index-th line; 21 differ."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": _DASHES[index // len(COLOURS) % len(_DASHES)]}


def tidy(panel: Axes, *, x: str = "", y: str = "", title: str = "", whole: str = "") -> None:
    """Quiet frame and grid, small labels. whole names the axes ("x", "y", "xy") with integer ticks."""
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
    """Logarithmic axes ("x", "y", "xy") with a few plain numbers. Call it after the data are drawn."""
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
    """count panels, row by row; the rest of the last row stays empty. share_y: only the left panels have labels."""
    columns = min(columns, count)
    rows = -(-count // columns)
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=share_y).ravel())
    for panel in panels[count:]:
        panel.set_visible(False)
    return panels[:count]


def legend(panel: Axes, **options: Any) -> None:
    """A legend without a border, if any artist has a label."""
    if panel.get_legend_handles_labels()[1]:
        panel.legend(**{"framealpha": 0.85, "edgecolor": "none", "fontsize": 8, **options})
