"""Figures of matplotlib in one style: colours for the colour-blind, quiet axes, PNG files and SVG for pages."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

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
PHONE = 4.4  # inches: the text of a figure of this width can still be read on a phone
_for_phone = ContextVar("for_phone", default=False)


@contextmanager
def for_phone() -> Iterator[None]:
    """Figures that are made inside are narrow: their panels are below each other."""
    token = _for_phone.set(True)
    try:
        yield
    finally:
        _for_phone.reset(token)


def is_narrow() -> bool:
    """True inside for_phone()."""
    return _for_phone.get()


def columns_of(most: int) -> int:
    """The number of panels side by side: most, or 1 on a phone."""
    return 1 if is_narrow() else most


def new_figure(width: float, height: float) -> Figure:
    """An empty figure of this size in inches, outside pyplot, with constrained layout. On a phone it is narrower."""
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    width = min(width, PHONE) if is_narrow() else width
    return Figure(figsize=(width, height), dpi=DPI, layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.08))


def placed_figure(
    width: float, height: float, boxes: Sequence[tuple[float, float, float, float]]
) -> tuple[Figure, list[Axes]]:
    """A figure with panels at (left, bottom, width, height), all in inches.

    For figures whose labels have a known size: measuring them for a layout takes half the time of drawing.
    """
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    figure.set_size_inches(width, height)  # the caller has seen to phones
    places = [(left / width, low / height, wide / width, high / height) for left, low, wide, high in boxes]
    return figure, [figure.add_axes(place) for place in places]


def name_inches(names: Sequence[str]) -> float:
    """An upper bound of the width in inches of the longest name at 8 points."""
    return 0.068 * max(map(len, names))


def png_bytes(figure: Figure) -> bytes:
    """A figure as PNG."""
    buffer = io.BytesIO()
    save_png(figure, buffer)
    return buffer.getvalue()


def save_png(figure: Figure, path: Path | io.BytesIO) -> None:
    """Write a figure as PNG. Figure.savefig would draw it twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(path, "PNG", compress_level=4)


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

    The same figure gives the same text: no date, and ids that follow from the content. Figure.savefig would draw it
    twice.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    buffer = io.BytesIO()
    for patch in (figure.patch, *(panel.patch for panel in figure.axes)) if transparent else ():
        patch.set(facecolor="none", edgecolor="none")
    # Ids of figures of one page must differ, for what a hidden figure defines is not drawn.
    with mpl.rc_context({"svg.hashsalt": "hpo narrow" if is_narrow() else "hpo"}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
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


def robust_limits(values: ArrayLike) -> tuple[float, float]:
    """The ends of an axis that shows the values: without outliers, where those would squash all others.

    Outliers are farther from the quartiles than 1.5 times their distance (Tukey 1977). Those of two values or of none
    are (0, 1) and the values themselves.
    """
    found: NDArray[np.float64] = np.asarray(values, dtype=np.float64)
    found = found[np.isfinite(found)]
    if not len(found):
        return 0.0, 1.0
    low, high = float(found.min()), float(found.max())
    first, third = np.quantile(found, [0.25, 0.75])
    reach = 1.5 * (third - first)
    inside = found[(found >= first - reach) & (found <= third + reach)]
    squashed = len(found) > 4 and 2 * (inside.max() - inside.min()) < high - low
    # Equal values have no scale of their own.
    return (float(inside.min()), float(inside.max())) if squashed and reach > 0 else (low, high)


def fit_y(
    panel: Axes, values: ArrayLike, *, most: float = math.inf, margin: float = 0.08, note: bool = True
) -> tuple[float, float]:
    """Let the vertical axis fit robust_limits of the values, and (note) say how many lie outside; returns its ends.

    most is the largest possible value, above which the axis has no ticks. Draw outliers with mark_outside.
    """
    low, high = robust_limits(values)
    room = margin * (high - low) or 0.02 * max(abs(high), 1e-3)
    below, above = (int(np.sum(np.asarray(values) < low)), int(np.sum(np.asarray(values) > high)))
    # Markers of outliers are inside of the axis.
    ends = low - room * (1 + 0.5 * (below > 0)), high + room * (1 + 0.5 * (above > 0))
    panel.set_ylim(*ends)
    if high <= most < ends[1]:
        panel.set_yticks([tick for tick in panel.get_yticks() if ends[0] <= tick <= most + 1e-9])
    for count, edge, at, side in ((below, "below", low, 0.08), (above, "above", high, 0.92)):
        if count and note:
            place: dict[str, Any] = {"x": 0.99, "ha": "right", "va": "bottom" if edge == "below" else "top"}
            text = f"{count} {edge} {at:.3g}"
            panel.text(s=text, y=side, fontsize=7, color=GREY, transform=panel.transAxes, **place)
    return ends


def mark_outside(panel: Axes, x: ArrayLike, y: ArrayLike, numbers: Sequence[int] = ()) -> None:
    """Triangles at the edge of the panel for the points above and below it; numbers are the trials of the points."""
    across, up = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    low, high = panel.get_ylim()
    for outside, edge, marker in ((up < low, low, "v"), (up > high, high, "^")):
        if outside.any():
            inside = edge + (0.025 if marker == "v" else -0.025) * (high - low)
            style: dict[str, Any] = {"s": 26, "facecolor": "none", "edgecolor": RED, "linewidth": 1.1, "zorder": 4}
            points = panel.scatter(across[outside], np.full(int(outside.sum()), inside), marker=marker, **style)
            if numbers:
                mark_trials(points, [number for number, out in zip(numbers, outside.tolist(), strict=True) if out])


def panel_grid(
    count: int,
    *,
    columns: int,
    width: float,
    height: float,
    below: float,
    left: float = 0.8,
    gap: float = 0.6,
    above: float = 0.35,
    right: float = 0.15,
    head: float = 0.0,
) -> tuple[Figure, list[Axes]]:
    """A placed_figure of count panels of this width and height, row by row, all in inches.

    left, right and head are the room beside all panels and above them; each has above for its title and below for its
    labels, and gap is the room between two columns. On a phone the panels are below each other.
    """
    columns = min(columns_of(columns), count)
    if is_narrow():
        width = PHONE - left - right
    rows = -(-count // columns)
    whole = PHONE if is_narrow() else left + columns * width + (columns - 1) * gap + right
    tall = head + rows * (above + height + below)
    places = [divmod(index, columns) for index in range(count)]
    boxes = [
        (left + column * (width + gap), tall - head - (row + 1) * (above + height + below) + below, width, height)
        for row, column in places
    ]
    return placed_figure(whole, tall, boxes)


def panels_of(figure: Figure, count: int, *, columns: int) -> list[Axes]:
    """count panels, row by row; the rest of the last row stays empty."""
    columns = min(columns, count)
    rows = -(-count // columns)
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for panel in panels[count:]:
        panel.set_visible(False)
    return panels[:count]


def legend(panel: Axes, **options: Any) -> None:
    """A legend without a border, if any artist has a label."""
    if panel.get_legend_handles_labels()[1]:
        panel.legend(**{"framealpha": 0.85, "edgecolor": "none", "fontsize": 8, **options})
