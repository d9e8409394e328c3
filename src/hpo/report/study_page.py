"""The page of a study: its content as a record, and one HTML file of it."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from hpo.records import FINAL, DataCard, ModelVersion, SplitCard, StudyResult, Trial
from hpo.report import confidence, sections
from hpo.report.answer import compared, intervals_of, main_metric
from hpo.report.figures.images import Mistake
from hpo.report.page import escape, page, picture
from hpo.report.text import trial_tooltip
from hpo.report.trials import trials_table
from hpo.spec.study import StudySpec

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Samples:
    """Sample training images and channel statistics.

    strips holds a PNG of each class, some of its images side by side. mean and std have one value a channel, in [0, 1],
    over `counted` training images.
    """

    strips: tuple[bytes, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    counted: int


@dataclass(frozen=True)
class Answers:
    """The predictions of the page's model on its validation images.

    labels (n,) int64, probabilities (n, classes) float32, those of the exported program; raw are those of its network
    alone, and record says how the two differ (hpo.models.answers). images maps the positions of the mistakes and of
    their examples to (height, width, channels) uint8. Without images there are no mistakes to show.
    """

    labels: NDArray[Any]
    probabilities: NDArray[Any]
    mistakes: tuple[Mistake, ...] = ()
    images: Mapping[int, NDArray[Any]] = field(default_factory=dict)
    raw: NDArray[Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Opening:
    """One opening of the sealed test part: time, model, test scores (test_accuracy, ...) and purpose."""

    when: datetime
    version: int
    trial: int
    scores: Mapping[str, float]
    purpose: str = ""


@dataclass(frozen=True)
class Findings:
    """The content of a study's page. A part that is None or empty is left out, and `missing` says why in sentences.

    made is the time of the page. versions maps software (python, torch, commit, ...) to its version. importances maps
    stage -> method -> path to a share of the score's variance. saliency holds a PNG for each mistake, if requested.
    test_history has sentences on the images of the test part: which models they have measured, and who has seen them.
    """

    study: StudyResult
    spec: StudySpec
    made: datetime
    data: DataCard | None = None
    split: SplitCard | None = None
    samples: Samples | None = None
    answers: Answers | None = None
    model: ModelVersion | None = None
    openings: tuple[Opening, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    importances: Mapping[str, Mapping[str, Mapping[str, float]]] = field(default_factory=dict)
    saliency: tuple[bytes, ...] = ()
    missing: tuple[str, ...] = ()
    near_duplicates: str = ""
    test_history: tuple[str, ...] = ()

    @property
    def ranking(self) -> Mapping[str, float]:
        """The importances of the last stage by the last of the methods, or nothing."""
        methods = list(self.importances.values())[-1] if self.importances else {}
        return list(methods.values())[-1] if methods else {}

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, or their numbers if the data set's card is gone."""
        if self.data is not None:
            return self.data.class_names
        shown = self.shown
        return tuple(map(str, range(len(shown.result.confusion)))) if shown and shown.result else ()

    @property
    def shown(self) -> Trial | None:
        """The trial that the page describes: the registered model's, else the best final training, else the best.

        Its scores and confusion are those of its exported program.
        """
        trial = shown_trial(self.study, self.model)
        if trial is None or trial.result is None or self.answers is None:
            return trial
        return replace(trial, result=confidence.of_program(trial.result, self.answers.record))


def shown_trial(study: StudyResult, model: ModelVersion | None) -> Trial | None:
    """The trial behind the model; without one the best final training, else the best of the search, else None."""
    if model is not None:
        return next((trial for trial in study.trials if trial.number == model.trial), study.best)
    finals = study.ranked(FINAL)
    return finals[0] if finals else study.best


# Figures are drawn in dark lines, so dark pages invert them; photographs and colour maps stay as they are. Wide figures
# have a second, narrow form for phones.
_STYLE = """<style>
.samples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 1.5rem; }
.samples figure { margin: .4rem 0; } .samples img { image-rendering: pixelated; width: 100%; background: none; }
.drawn svg, .drawn img { width: var(--wide); max-width: 100%; height: auto; border-radius: 4px; }
.drawn img { background: none; }
.small { display: none; }
@media screen and (max-width: 40rem) { .large { display: none; } .small { display: block; } }
.drawn [data-trial] { cursor: pointer; }
.drawn [data-trial].lit { stroke: #d6006c !important; stroke-width: 2.5px !important; stroke-opacity: 1 !important; }
.drawn use[data-trial].lit { fill: #d6006c !important; fill-opacity: 1 !important; }
tr:has(.lit) { background: var(--tint); }
#tip { position: fixed; z-index: 1; max-width: 22rem; padding: .4rem .6rem; border: 1px solid var(--line);
  border-radius: 4px; background: var(--paper); font-size: .85rem; pointer-events: none; overflow-wrap: anywhere; }
@media screen and (prefers-color-scheme: dark) { .lines svg { filter: invert(.9) hue-rotate(180deg); } }
@media print { .tall { max-height: none; } #tip { display: none; } table { font-size: 8pt; }
  th, td { white-space: normal !important; } }
</style>"""

# Points and lines of one trial are found by its number: pointing at one shows its text and lights all of them up.
_SCRIPT = """
(() => {
  const texts = JSON.parse(document.getElementById("trials").textContent);
  const charts = document.querySelectorAll(".drawn svg");
  const tip = document.createElement("div");
  tip.id = "tip"; tip.hidden = true;
  document.body.append(tip);
  for (const group of document.querySelectorAll("[data-trials]")) {
    const numbers = group.dataset.trials.split("-").filter(Boolean);
    const marks = [...group.querySelectorAll("path, use")].filter(mark => !mark.closest("defs"));
    marks.forEach((mark, index) => { mark.dataset.trial = numbers.length === 1 ? numbers[0] : numbers[index]; });
  }
  // Numbers by value, texts by letters, empty cells last; the first click on numbers puts the largest on top.
  for (const table of document.querySelectorAll(".sortable")) {
    table.querySelectorAll("th").forEach((head, column) => {
      const button = document.createElement("button");
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const rows = [...table.tBodies[0].rows], text = row => row.cells[column].textContent;
        const value = row => Number(text(row).replace(/,/g, ""));
        const numeric = rows.every(row => Number.isFinite(value(row)));
        const down = (head.ariaSort || (numeric ? "ascending" : "descending")) === "ascending";
        table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const order = (one, other) => numeric ? value(one) - value(other) : text(one).localeCompare(text(other));
        rows.sort((one, other) => (!text(one) - !text(other)) || (down ? -1 : 1) * order(one, other));
        table.tBodies[0].append(...rows);
      });
    });
  }
  let lit;
  const around = [[0, 0], [3, 0], [-3, 0], [0, 3], [0, -3], [5, 5], [-5, 5], [5, -5], [-5, -5]];
  const light = number => {
    if (number === lit) return;
    document.querySelectorAll(".lit").forEach(mark => mark.classList.remove("lit"));
    if (number) document.querySelectorAll(`[data-trial="${number}"]`).forEach(mark => mark.classList.add("lit"));
    lit = number;
  };
  const show = event => {
    let number;
    for (const [x, y] of around) {
      const mark = document.elementFromPoint(event.clientX + x, event.clientY + y)?.closest("[data-trial]");
      if (mark) { number = mark.dataset.trial; break; }
    }
    light(number);
    tip.hidden = !(number in texts);
    if (tip.hidden) return;
    tip.innerHTML = texts[number];
    tip.style.left = Math.max(4, Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8)) + "px";
    tip.style.top = Math.max(4, Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8)) + "px";
  };
  for (const row of document.querySelectorAll(".sortable tbody tr")) {
    const number = row.querySelector("[data-trial]").dataset.trial;
    row.addEventListener("pointerenter", () => light(number));
    row.addEventListener("pointerleave", () => light(undefined));
  }
  for (const chart of charts) {
    chart.addEventListener("pointermove", show);
    chart.addEventListener("pointerdown", show);
    chart.addEventListener("pointerleave", show);
  }
  document.body.dataset.drawn = charts.length;
})();
"""


def study_page(findings: Findings) -> str:
    """The whole HTML file. Unknown parts are left out and listed as missing."""
    study = findings.study
    texts = json.dumps({trial.number: trial_tooltip(study, trial) for trial in study.trials}).replace("<", "\\u003c")
    parts: list[tuple[str, str]] = [
        ("", _STYLE + sections.opening(findings) + _comparison(findings)),
        ("Result", sections.result(findings)),
        ("Data", sections.data(findings, _shares(findings))),
        ("Protocol", sections.protocol(findings)),
        ("Search space", sections.space(findings)),
        ("The search", "\n".join(_search(findings))),
        ("All trials", _trials(study)),
        ("The model", "\n".join(_model(findings))),
        ("How sure it is", "\n".join(_confidence(findings))),
        ("Most confident mistakes", "\n".join(_mistakes(findings))),
        ("Cost", sections.cost(findings)),
        ("Use the model", sections.use(findings)),
        ("Repeat it", sections.repeat(findings)),
        ("", f'<script type="application/json" id="trials">{texts}</script>\n<script>{_SCRIPT}</script>'),
    ]
    return page(study.title, [part for part in parts if part[1]])


def _comparison(findings: Findings) -> str:
    """The study's score next to the published ones."""
    from hpo.report.figures.overview import scores_figure

    scores = list(compared(findings, intervals_of(findings)))
    if all(score.own for score in scores):
        return ""
    caption = "This study next to the published numbers; lines are 95 % intervals."
    return _figure(lambda: scores_figure(scores, score=main_metric(findings)), "published numbers", caption)


def _shares(findings: Findings) -> str:
    from hpo.report.figures.overview import class_shares_figure

    split, card = findings.split, findings.data
    shares = {part: each for part, each in split.shares.items() if split.counts.get(part)} if split else {}
    if not shares or card is None or len(card.class_names) > sections.MOST_CLASSES:
        return ""
    caption = f"Percent of each part; the number is the share of {next(iter(shares))}."
    return _figure(lambda: class_shares_figure(shares, card.class_names), "share of each class", caption)


def _trials(study: StudyResult) -> str:
    words = '<p class="dim">Best first. Click a column to sort by it.</p>'
    return f"{words}{trials_table(study)}" if study.trials else ""


def _search(findings: Findings) -> Iterator[str]:
    """Figures of the whole study."""
    from hpo.report.figures import pairs as pair_figures
    from hpo.report.figures import space as space_figures
    from hpo.report.figures import study as study_figures

    study, shares = findings.study, findings.importances
    if not any(trial.value is not None for trial in study.trials):
        yield "<p>No trial has a value yet: there is nothing to draw.</p>"
        return
    yield '<p class="dim">Point at a trial for its parameters, score and epochs; it is marked in every figure.</p>'
    drawn: list[tuple[str, Callable[[], Figure | None], str]] = [
        ("Pareto front", lambda: study_figures.pareto_front(study), "Trials on the front are beaten by no other."),
        (
            "Hypervolume",
            lambda: study_figures.hypervolume_figure(study),
            "Share of the box between the worst and the best value of each objective that a trial so far dominates.",
        ),
        ("Optimisation history", lambda: study_figures.optimisation_history(study), "The score of each trial."),
        ("Parallel coordinates", lambda: space_figures.parallel_coordinates(study), "Each line is a complete trial."),
        ("Each parameter", lambda: space_figures.slices(study), "The score over each parameter."),
        ("Learning curves", lambda: study_figures.learning_curves(study), "Each line is a trial."),
        ("Heat map", lambda: pair_figures.heat_map(study), "The score in each cell of the grid."),
        ("Effects", lambda: space_figures.effects(study), "Mean score over each option; bars: standard deviations."),
        ("Importance", lambda: study_figures.importance_figure(shares), "Share of the importance."),
        ("Contour", lambda: pair_figures.contour(study, findings.ranking), "The score over two parameters."),
        ("Timeline", lambda: study_figures.timeline(study), "The trials of each worker over time."),
    ]
    for heading, draw, caption in drawn:
        # Inverted, a colour map would no longer be read as what it is.
        figure = _figure(draw, heading, caption, colours=heading in ("Heat map", "Contour"))
        if figure:
            yield f"<h3>{heading}</h3>{figure}"


def _model(findings: Findings) -> Iterator[str]:
    """Figures of the shown trial."""
    from hpo.report.figures.classifier import class_accuracy_figure, confusion_figure, roc_figure, training_curves
    from hpo.report.figures.images import rank_figure

    shown, names = findings.shown, findings.class_names
    if shown is None or shown.result is None:
        return
    result, answers = shown.result, findings.answers
    if result.epochs:
        caption = f"Trial {shown.number}: loss and scores over the epochs, the kept epoch marked."
        draw = partial(training_curves, result.epochs, best_epoch=result.best_epoch)
        yield _figure(draw, "training curves", caption)
    if result.confusion:
        draw = partial(confusion_figure, result.confusion, names)
        yield _figure(draw, "confusion matrix", "Validation images.")
        draw = partial(class_accuracy_figure, result.confusion, names)
        yield _figure(draw, "accuracy of each class", "Validation images.")
    elif findings.data is not None and findings.data.several_labels:
        yield "<p>Images have several labels: there is no confusion of one class with another to show.</p>"
    if answers is not None:
        labels, probabilities = answers.labels, answers.probabilities
        draw = partial(roc_figure, labels, probabilities, names)
        yield _figure(draw, "ROC curves", "Each class against all others, on the validation images.")
        if labels.ndim == 1:
            caption = "Rank of the true class of each mistake in the order of probabilities: 2 is a near miss."
            yield _figure(partial(rank_figure, labels, probabilities), "rank of the true class among mistakes", caption)


def _confidence(findings: Findings) -> Iterator[str]:
    """Calibration of the shown model, accuracy against coverage, and the views that it averages."""
    from hpo.report.figures.confidence import coverage_figure, reliability_figure

    answers = findings.answers
    if answers is None or answers.labels.ndim != 1 or not len(answers.labels):
        return
    labels, probabilities, record = answers.labels, answers.probabilities, answers.record
    yield confidence.calibration(record)
    fitted = record.get("calibration", {}).get("used", False)
    before = answers.raw if fitted else None
    caption = "Validation images, in bins of the confidence. On the diagonal 80 % sure means right in 80 of 100 cases."
    yield _figure(partial(reliability_figure, labels, probabilities, before), "reliability", caption)
    caption = "If the least sure answers are refused: accuracy of the others (hpo predict --refuse-below)."
    yield _figure(partial(coverage_figure, labels, probabilities), "accuracy against coverage", caption)
    yield confidence.coverage(labels, probabilities)


def _mistakes(findings: Findings) -> Iterator[str]:
    from hpo.report.figures.images import mistakes_figure

    answers = findings.answers
    if answers is None or not answers.mistakes:
        return
    draw = partial(mistakes_figure, answers.mistakes, answers.images, findings.class_names)
    caption = "Each wrongly classified validation image, with the most confident example of both classes."
    yield _figure(draw, "the most confident mistakes", caption, photo=True)
    if findings.saliency:
        yield "<h3>Saliency of the mistakes</h3>"
    for number, png in enumerate(findings.saliency, start=1):
        yield f'<div class="drawn">{picture(png, f"saliency of mistake {number}", caption="")}</div>'


def _figure(
    draw: Callable[[], Figure | None], label: str, caption: str, *, photo: bool = False, colours: bool = False
) -> str:
    """A figure inside the page, and one for phones if it is wide; "" without one."""
    from hpo.report.figures import PHONE, for_phone

    figure = draw()
    if figure is None:
        return ""
    kind = "drawn" if colours or photo else "drawn lines"
    inside = _drawing(figure, label, photo=photo, transparent=not colours)
    if figure.get_figwidth() > PHONE + 0.5:
        with for_phone():
            narrow = draw()
            small = _drawing(narrow, label, photo=photo, transparent=not colours) if narrow is not None else ""
        inside = f'<div class="large">{inside}</div><div class="small">{small}</div>'
    return f'<figure class="{kind}">{inside}<figcaption>{escape(caption)}</figcaption></figure>'


def _drawing(figure: Figure, label: str, *, photo: bool, transparent: bool) -> str:
    """A figure as SVG, which is sharp at any size, or with photographs as PNG at twice the size."""
    from hpo.report.figures import save_png, svg_text

    wide = f"--wide:{round(figure.get_figwidth() * 96)}px"
    if photo:
        buffer = io.BytesIO()
        figure.set_dpi(160)
        save_png(figure, buffer)
        return f'<div style="{wide}">{picture(buffer.getvalue(), label)}</div>'
    named = f'<svg role="img" aria-label="{escape(label)}" style="{wide}"'
    return svg_text(figure, transparent=transparent).replace("<svg", named, 1)
