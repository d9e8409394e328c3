"""What must hold of every picture: no label cut by the edge, none written over another."""

from __future__ import annotations

from itertools import combinations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text


def faults(figure) -> list[str]:
    """Labels that stick out of the figure, and pairs that cover each other; slanted ones are let off the latter."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    renderer = canvas.get_renderer()
    unseen = _unseen(figure)
    texts = [
        (text, text.get_window_extent(renderer))
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in unseen
    ]
    edge = figure.bbox.padded(1)
    cut = [
        f"cut: {text.get_text()!r}"
        for text, box in texts
        if box.x0 < edge.x0 or box.y0 < edge.y0 or box.x1 > edge.x1 or box.y1 > edge.y1
    ]
    straight = [(text, box.padded(-1)) for text, box in texts if text.get_rotation() in (0.0, 90.0)]
    return cut + [
        f"over each other: {one.get_text()!r}, {other.get_text()!r}"
        for (one, first), (other, second) in combinations(straight, 2)
        if first.overlaps(second)
    ]


def _unseen(figure) -> set[int]:
    """Texts of panels that are not shown, and tick labels beyond the limits of their axis, which are not drawn."""
    unseen = {id(text) for panel in figure.axes if not panel.get_visible() for text in panel.findobj(Text)}
    for axis in (axis for panel in figure.axes for axis in (panel.xaxis, panel.yaxis)):
        shown = set(map(id, axis._update_ticks())) if axis.axes.axison else set()
        ticks = [*axis.majorTicks, *axis.minorTicks]
        unseen |= {id(label) for tick in ticks if id(tick) not in shown for label in (tick.label1, tick.label2)}
    return unseen
