"""The page of a study from its findings: sections, interactive charts, figures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from hpo.report.figures.style import score_text
from hpo.report.page import charts, sections
from hpo.report.page.embed import scripts
from hpo.report.page.findings import Findings
from hpo.report.page.html import Html, page, picture

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# A chart is drawn in dark lines: on dark pages it is turned around; photographs stay what they are. On a phone, wide
# figures scroll by themselves at three quarters of their size: smaller ones could not be read.
_STYLE = """<style>
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem; }
.samples figure { margin: .4rem 0; } .samples img { image-rendering: pixelated; width: 100%; background: none; }
.drawn img { min-width: calc(.75 * var(--wide)); background: none; }
.drawn figcaption { position: sticky; left: 0; }
@media screen and (prefers-color-scheme: dark) { .drawn.lines img { filter: invert(.9) hue-rotate(180deg); } }
@media print { .drawn img { min-width: 0; } table { font-size: 8pt; } th, td { white-space: normal !important; } }
</style>"""


def study_page(findings: Findings) -> str:
    """The whole HTML file. What is not known is left out, and said."""
    study = findings.study
    parts: list[tuple[str, str]] = [
        ("", _STYLE + sections.opening(findings)),
        ("Result", sections.result(findings)),
        ("Data", sections.data(findings)),
        ("Protocol", sections.protocol(findings)),
        ("Search space", sections.space(findings)),
        ("The search", "\n".join(_search(findings))),
        ("The model", "\n".join(_model(findings))),
        ("Most confident mistakes", "\n".join(_mistakes(findings))),
        ("Cost", sections.cost(findings)),
        ("Use the model", sections.use(findings)),
        ("Repeat it", sections.repeat(findings)),
        ("", scripts({trial.number: charts.hover_text(study, trial) for trial in study.trials})),
    ]
    return page(study.title, [part for part in parts if part[1]])


def _search(findings: Findings) -> Iterator[str]:
    study, spec = findings.study, findings.spec
    if not any(trial.value is not None for trial in study.trials):
        yield "<p>No trial has a value yet: there is nothing to draw.</p>"
        return
    yield '<p class="dim">Point at a trial for its parameters, score and epochs.</p>'
    headed: list[tuple[str, Callable[[], str | None]]] = [
        ("Trade-off between objectives", lambda: charts.fronts(study)),
        ("Optimisation history", lambda: charts.history(study)),
        ("Parallel coordinates", lambda: charts.parallel(study, spec)),
        ("Each parameter", lambda: _grid(charts.slices(study, spec), score_text(study.objective))),
        ("Training of every trial", lambda: charts.curves(study)),
    ]
    for heading, draw in headed:
        chart = draw()
        if chart:
            yield f"<h3>{heading}</h3>{chart}"
    yield from _drawn(findings)


def _drawn(findings: Findings) -> Iterator[str]:
    """Figures of the whole study that need no pointing at."""
    from hpo.report.figures import space as space_figures
    from hpo.report.figures import study as study_figures

    study, shares = findings.study, findings.importances
    # Colours that mean numbers stay as they are on dark pages: as photographs do.
    drawn: list[tuple[str, Figure | None, str, str]] = [
        ("Heat map", space_figures.heat_map(study), "The score in each cell of the grid.", "png"),
        ("Effects", space_figures.effects(study), "Mean score over each option; bars are standard deviations.", "svg"),
        ("Importance", study_figures.importance_figure(shares), "Share of the importance, by two methods.", "svg"),
        ("Contour", space_figures.contour(study, findings.ranking), "The score over two parameters.", "png"),
        ("Workers", study_figures.timeline(study), "What each worker did, and when.", "svg"),
    ]
    for heading, figure, caption, form in drawn:
        if figure is not None:
            yield f"<h3>{heading}</h3>{_figure(figure, heading.lower(), caption, form=form)}"


def _grid(plots: list[Html], score: str) -> str:
    words = f"The {score} over each; grey trials are early, blue ones late, the star is the best."
    return f'<p class="dim">{words}</p><div class="plots">{"".join(plots)}</div>' if plots else ""


def _model(findings: Findings) -> Iterator[str]:
    """Figures of the shown trial."""
    from hpo.report.figures.trial import class_accuracy_figure, confusion_figure, roc_figure, training_curves
    from hpo.report.mistakes import rank_figure

    shown, names = findings.shown, findings.class_names
    if shown is None or shown.result is None:
        return
    result, answers = shown.result, findings.answers
    if result.epochs:
        caption = f"Trial {shown.number}: loss and scores over the epochs, the kept epoch marked."
        yield _figure(training_curves(result.epochs, best_epoch=result.best_epoch), "training curves", caption)
    if result.confusion:
        yield _figure(confusion_figure(result.confusion, names), "confusion matrix", "Validation images.")
        yield _figure(class_accuracy_figure(result.confusion, names), "accuracy of each class", "Validation images.")
    if answers is not None:
        curves = roc_figure(answers.labels, answers.probabilities, names)
        yield _figure(curves, "ROC curves", "Each class against all others, on the validation images.")
        ranks = rank_figure(answers.labels, answers.probabilities)
        if ranks is not None:
            caption = "Where the true class of the mistakes stands in the order of probabilities: 2 is a near miss."
            yield _figure(ranks, "rank of the true class among mistakes", caption)


def _mistakes(findings: Findings) -> Iterator[str]:
    from hpo.report.mistakes import mistakes_figure

    answers = findings.answers
    if answers is None or not answers.mistakes:
        return
    figure = mistakes_figure(answers.mistakes, answers.images, findings.class_names)
    if figure is not None:
        caption = "Each wrongly classified validation image beside the surest example of both classes."
        yield _figure(figure, "the most confident mistakes", caption, form="png")
    if findings.saliency:
        yield "<h3>Why these answers</h3>"
    for number, png in enumerate(findings.saliency, start=1):
        yield f'<div class="scroll drawn">{picture(png, f"what mistake {number} hangs on", caption="")}</div>'


def _figure(figure: Figure, alt: str, caption: str, *, form: str = "svg") -> str:
    """A drawn figure in the page: lines as SVG, which stays sharp; photographs as PNG, twice as fine as the screen."""
    buffer = io.BytesIO()
    # Without a date, the same study gives the same page.
    options = {"metadata": {"Date": None}, "transparent": True} if form == "svg" else {"dpi": 160}
    figure.savefig(buffer, format=form, **options)
    wide = round(figure.get_figwidth() * 96)
    kind = "drawn lines" if form == "svg" else "drawn"
    shown = picture(buffer.getvalue(), alt, caption=caption, width=wide)
    return f'<div class="scroll {kind}" style="--wide:{wide}px">{shown}</div>'
