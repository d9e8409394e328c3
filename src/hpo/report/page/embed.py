"""Charts of plotly.js inside a page: their data, the library, and one script that draws them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from hpo.report.page.html import Html, escape

_STYLE = """
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 1rem; }
figure.chart { overflow-x: auto; min-width: 0; } figure.chart figcaption { position: sticky; left: 0; }
@media print { .plots { grid-template-columns: 1fr 1fr; } .plot { min-width: 0 !important; } }
"""

_SCRIPT = """
(() => {
  const told = JSON.parse(document.getElementById("trials").textContent);
  const plots = [...document.querySelectorAll(".plot")];
  const paper = matchMedia("print");
  const colours = () => {
    const style = getComputedStyle(document.documentElement);
    const of = name => style.getPropertyValue(name).trim();
    return paper.matches ? {ink: "#000", line: "#ccc", ground: "#fff"}
      : {ink: of("--ink"), line: of("--line"), ground: of("--paper")};
  };
  const themed = layout => {
    const {ink, line, ground} = colours();
    const change = {"font.color": ink, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      "hoverlabel.bgcolor": ground, "hoverlabel.bordercolor": line, "hoverlabel.font.color": ink};
    for (const name of ["xaxis", "yaxis"])
      for (const part of ["gridcolor", "linecolor", "zerolinecolor"]) change[`${name}.${part}`] = line;
    (layout.annotations || []).forEach((_, place) => { change[`annotations[${place}].bgcolor`] = ground; });
    (layout.shapes || []).forEach((_, place) => { change[`shapes[${place}].line.color`] = line; });
    return change;
  };
  const draw = plot => {
    const {data, layout} = JSON.parse(plot.nextElementSibling.textContent);
    for (const trace of data) if (trace.trials) trace.text = trace.trials.map(number => told[number]);
    // A finger that drags scrolls the page.
    layout.dragmode = matchMedia("(pointer: coarse)").matches ? false : "zoom";
    return Plotly.newPlot(plot, data, layout, {displayModeBar: false, responsive: true, showTips: false})
      .then(() => Plotly.relayout(plot, themed(layout)));
  };
  const again = () => plots.forEach(plot => {
    Plotly.relayout(plot, {...themed(plot.layout), width: paper.matches ? plot.clientWidth : null});
  });
  Promise.all(plots.map(draw)).then(() => { document.body.dataset.drawn = plots.length; });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
  paper.addEventListener("change", again);
})();
"""


def scripts(texts: Mapping[int, str]) -> Html:
    """What the charts of a page need, once, at its end: plotly.js, what pointing at each trial says, and a style."""
    from plotly.offline import get_plotlyjs

    return Html(
        f"<style>{_STYLE}</style>\n"
        f'<script type="application/json" id="trials">{_json(texts)}</script>\n'
        f"<script>{get_plotlyjs()}</script>\n<script>{_SCRIPT}</script>"
    )


def chart(
    data: Sequence[Mapping[str, Any]],
    layout: Mapping[str, Any],
    *,
    label: str,
    caption: str = "",
    height: int = 340,
    least: int = 0,
) -> Html:
    """A place for a chart, with its data beside it; narrower than `least` pixels it scrolls by itself.

    data and layout are those of a plotly.js figure; a trace's `trials` (numbers) become the texts of these trials.
    """
    for axis in ("xaxis", "yaxis"):
        layout = {**layout, axis: {"automargin": True, **layout.get(axis, {})}}
    whole = {
        "margin": {"l": 50, "r": 12, "t": 12, "b": 45},
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        "hovermode": "closest",
        "font": {"size": 12, "family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'DejaVu Sans', sans-serif"},
        "hoverlabel": {"align": "left"},
        "showlegend": sum(bool(trace.get("name")) for trace in data) > 1,
        **layout,
    }
    words = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return Html(
        f'<figure class="chart"><div class="plot" role="img" aria-label="{escape(label)}" '
        f'style="height:{height}px;min-width:{least}px"></div>'
        f'<script type="application/json">{_json({"data": list(data), "layout": whole})}</script>{words}</figure>'
    )


def _json(value: Any) -> str:
    """JSON that may stand inside a script element."""
    return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _finite(value: Any) -> Any:
    """NaN and infinities, which JSON lacks, as null: a gap in the chart."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
