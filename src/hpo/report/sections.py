"""The sections of a study's page, each from the findings to HTML."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from hpo.metrics import METRICS, direction_of, label_of, metric_of, name_of
from hpo.records import AFTER_SEARCH, ENSEMBLE, FINAL, DataCard, Trial, TrialState
from hpo.report import text
from hpo.report.answer import RESAMPLES, answer, intervals_of, last_opening
from hpo.report.page import Html, channel_table, escape, origin_rows, picture, table
from hpo.report.statistics import Interval
from hpo.report.text import value_text
from hpo.spec.automatic import chosen_pruner, chosen_sampler
from hpo.spec.outcome import Reference
from hpo.spec.search import PrunerSpec, SamplerSpec

if TYPE_CHECKING:
    from hpo.report.study_page import Findings, Samples

MOST_CLASSES = 60  # sample strips shown


def opening(findings: Findings) -> str:
    """The question, the answer in a sentence, the state of the study, and a list of what is missing."""
    study = findings.study
    ends = text.listed(f"{study.count(state):,} {state.value}" for state in TrialState if study.count(state))
    lines = [f"<p><strong>{escape(findings.spec.question)}</strong></p>"] if findings.spec.question else []
    lines.append(f'<p class="answer">{answer(findings, intervals_of(findings))}</p>')
    lines.append(
        f'<p class="dim">Study {escape(study.title)}: {text.counted(len(study.trials), "trial")}'
        f"{f' ({ends})' if ends else ''}. This page was made on {findings.made:%Y-%m-%d}.</p>"
    )
    if findings.missing:
        items = "".join(f"<li>{escape(text.without_folders(sentence))}</li>" for sentence in findings.missing)
        lines.append(f"<h3>What is missing</h3><ul>{items}</ul>")
    return "\n".join(lines)


def result(findings: Findings) -> str:
    """The scores with their intervals, the test part if it was opened, and the published numbers."""
    shown = findings.shown
    if shown is None or shown.result is None:
        return "<p>There is no complete trial yet, and so no result.</p>"
    study, opened, intervals = findings.study, last_opening(findings), intervals_of(findings)
    name = {FINAL: "final training", ENSEMBLE: "ensemble"}.get(shown.candidate.stage or "", "best trial")
    if shown.result.members:
        average = shown.result.settings.get("average", "probabilities")
        members = text.listed(f"{name} x {count}" for name, count in shown.result.members.items())
        name = f"mean of the {average} of {escape(members)}, which were chosen by the validation images"
    always = [name for name, metric in METRICS.items() if not metric.on_request]
    further = [name_of(score) for score in shown.result.scores if score.startswith("valid_") and metric_of(score)]
    # Losses last.
    scores = sorted(dict.fromkeys([*always, *further]), key=lambda name: direction_of(f"valid_{name}"))
    rows = [
        (
            label_of(score),
            _score(shown.result.scores.get(f"valid_{score}")),
            _ends(intervals.get(f"valid_{score}")),
            *((_score(opened.scores.get(f"test_{score}")), _ends(intervals.get(f"test_{score}"))) if opened else ()),
        )
        for score in scores
    ]
    head = ["score", ">validation", ">95 % interval", *([">test", ">95 % interval"] if opened else [])]
    sentence = (
        f"<p>The model of this page is trial {shown.number}, the {name}"
        f"{f', version {findings.model.version} in the registry' if findings.model else ''}. "
        f"{_test_sentence(findings)}</p>"
    )
    searched = sum(trial.state is TrialState.COMPLETE for trial in study.counted)
    flatter = (
        f'<p class="dim">Intervals are percentiles of {RESAMPLES:,} bootstrap resamples of the images; they hold for '
        f"this one training. The validation score is the best of {text.counted(searched, 'complete trial')}, chosen "
        "by it, and therefore flatters; a test score does not.</p>"
    )
    tables = f"{_folds(shown)}{_objectives(findings)}{_references(findings, intervals)}"
    return f"{sentence}{table(head, rows)}{flatter}{tables}"


def _test_sentence(findings: Findings) -> str:
    history = "".join(f" {escape(sentence)}" for sentence in findings.test_history)
    if not findings.openings:
        return (
            "The sealed test part was never opened, so there are no test results. "
            f"<code>hpo promote {escape(findings.study.name)}</code> opens it.{history}"
        )
    often = text.times(len(findings.openings))
    other = "" if last_opening(findings) else ", but not for this model"
    return f"The sealed test part was opened {often}{other}.{history}"


def _folds(shown: Trial) -> str:
    folds = shown.result.folds if shown.result else ()
    if not folds:
        return ""
    names = [name for name in folds[0] if name.startswith("valid_")]
    rows = [(f"fold {place}", *(f"{fold[name]:.4f}" for name in names)) for place, fold in enumerate(folds)]
    head = ["", *(f">{name.removeprefix('valid_').replace('_', ' ')}" for name in names)]
    return f"<h3>Folds</h3>{table(head, rows)}"


def _objectives(findings: Findings) -> str:
    study = findings.study
    if len(study.objectives) < 2:
        return ""
    rows = [
        (trial.number, *(value_text(each) for each in trial.result.values), _parameters(trial))
        for trial in study.pareto()
        if trial.result is not None
    ]
    head = [">trial", *(f">{score}" for score, _ in study.objectives), "parameters"]
    return f"<h3>Trials that none beats in every objective</h3>{table(head, rows)}"


def _references(findings: Findings, intervals: Mapping[str, Interval]) -> str:
    """Published numbers; intervals maps score to interval, as valid_accuracy, test_accuracy, ..."""
    if not findings.spec.references:
        return ""
    rows = [_reference(findings, reference, intervals) for reference in findings.spec.references]
    head = ["published", "score", ">value", ">this study", ">95 % interval", ">difference", "what differs in protocol"]
    return f"<h3>Comparison with published numbers</h3>{table([*head, 'source'], rows)}"


def _reference(findings: Findings, reference: Reference, intervals: Mapping[str, Interval]) -> tuple[object, ...]:
    shown, look = findings.shown, last_opening(findings)
    if reference.score.startswith("test_"):
        own = look.scores.get(reference.score) if look else None
        lacking = "not measured" if findings.openings else "test part not opened"
    else:
        own = shown.result.scores.get(reference.score) if shown and shown.result else None
        lacking = "none yet"
    return (
        reference.label,
        label_of(reference.score),
        f"{reference.value:.4f}",
        lacking if own is None else f"{own:.4f}",
        _ends(intervals.get(reference.score)) if own is not None else "",
        "" if own is None else f"{100 * (own - reference.value):+.2f} points",
        reference.note,
        reference.source,
    )


def data(findings: Findings, shares_figure: str) -> str:
    """Origin of the images, class shares of each part, sample images, mean and deviation."""
    card = findings.data
    if card is None:
        return f"<p>Data set {escape(findings.spec.data.name)}, digest <code>{findings.study.data_digest}</code>.</p>"
    declared = text.declares_groups(findings.spec.data, findings.spec.split)
    rows = origin_rows(card, findings.near_duplicates, groups_declared=declared)
    parts: list[str] = [table((), [("data set", card.name), *rows])]
    if findings.split is not None:
        counts = findings.split.counts
        shares = {part: each for part, each in findings.split.shares.items() if counts.get(part)}
        head = ["class", *(f">{part} ({counts[part]:,})" for part in shares)]
        body = [
            (name, *(f"{shares[part][label]:.1%}" for part in shares)) for label, name in enumerate(card.class_names)
        ]
        parts.append(f"<h3>Share of each class</h3>{shares_figure}")
        parts.append(f"<details><summary>The shares as numbers</summary>{table(head, body)}</details>")
    if findings.samples is not None:
        parts += _sample_images(card, findings.samples)
    return "\n".join(parts)


def _sample_images(card: DataCard, samples: Samples) -> Iterator[str]:
    strips = [
        picture(strip, f"training images of class {name}", caption=name)
        for name, strip in zip(card.class_names, samples.strips, strict=True)
        if strip
    ]
    yield '<h3>Training images</h3><p class="dim">Drawn at random from the training part.</p>'
    yield f'<div class="samples">{"".join(strips[:MOST_CLASSES])}</div>'
    if len(strips) > MOST_CLASSES:
        yield f'<p class="dim">{len(strips) - MOST_CLASSES} more classes are not shown.</p>'
    yield f"<h3>Channels</h3>{channel_table(samples.mean, samples.std)}"
    yield f'<p class="dim">Of pixel / 255, over {samples.counted:,} training images.</p>'


def protocol(findings: Findings) -> str:
    """How candidates were trained, compared and chosen, and how the test part was used."""
    spec, study = findings.spec, findings.study
    search, training = spec.search, spec.training
    aims = [f"{aim.better} {aim.score}" for aim in search.objectives] or [f"{search.better} {search.objective}"]
    stages = [trial.candidate.stage for trial in study.trials if trial.candidate.stage not in (None, *AFTER_SEARCH)]
    budget = (
        f"{text.counted(len(search.stages), 'stage')}: {text.listed(dict.fromkeys(stages) or ['not begun'])}"
        if search.stages
        else f"{text.counted(len(study.counted), 'trial')} so far, {search.trials:,} in the study file"
    )
    epochs = f"up to {training.epochs} a trial" if training.patience else f"{training.epochs} a trial"
    patience = f", stopped after {training.patience} without a better {training.monitor}" if training.patience else ""
    rows: list[tuple[str, object]] = [
        ("task", f"{spec.task}, model kind {spec.model.kind}"),
        ("validation", text.split_text(spec.split)),
        ("aim", " and ".join(aims)),
        ("kept epoch", f"the one with the best {training.monitor}"),
        ("epochs", epochs + patience),
        ("budget", budget),
        (
            "sampler",
            _chosen(search.sampler, chosen_sampler(spec))
            if not search.stages
            else "the full grid of each stage, unless the stage names another",
        ),
        ("pruner", _chosen(search.pruner, chosen_pruner(spec))),
        ("seeds", f"study seed {spec.seed}; each trial's own follows from it and the trial's number"),
    ]
    if study.fitted:
        rows.append(("fitted to minutes", study.fitted["text"]))
    if outside := sum(trial.outside for trial in study.trials):
        rows.append(("left out", f"{text.counted(outside, 'trial')} of an earlier space, on record but not counted"))
    if study.enough:
        rows.append(("ended early", study.enough))
    if search.constraints:
        rows.append(("constraints", text.listed(search.constraints)))
    if spec.final is not None:
        changed = text.listed(f"{path} = {value}" for path, value in spec.final.set.items()) or "nothing"
        who = "the best candidate" if spec.final.finalists == 1 else f"the best {spec.final.finalists}, each"
        race = f"{who} with {text.counted(spec.final.seeds, 'seed')}"
        rows.append(("final training", f"{race}; changed: {changed}; trained on: {spec.final.on}"))
    rows.append(("test part", _seal(findings)))
    return table((), rows)


def _chosen(written: SamplerSpec | PrunerSpec, chosen: tuple[SamplerSpec | PrunerSpec, str]) -> str:
    part, reason = chosen
    return f"{written.name}: {part.name}, because {reason}" if reason else part.name


def _seal(findings: Findings) -> object:
    if not findings.openings:
        return "sealed: no trial can read it, and it was never opened"
    looks = "; ".join(
        f"{look.when:%Y-%m-%d %H:%M} UTC {f'to {look.purpose}' if look.purpose else 'for'} version {look.version} "
        f"(trial {look.trial})"
        for look in findings.openings
    )
    return (
        f"sealed during the search, opened {text.times(len(findings.openings))}, after the choice, only to measure: "
        f"{looks}"
    )


def space(findings: Findings) -> str:
    """Every parameter of the search, its range, and its value in the page's model."""
    search, shown = findings.spec.search, findings.shown
    chosen = shown.candidate.parameters if shown else {}
    rows: list[tuple[str, ...]] = []
    for stage, given in [(stage.name, stage.space) for stage in search.stages] or [("", search.space)]:
        for path, parameter in given.items():
            own = value_text(chosen[path]) if path in chosen else ""
            rows.append((stage, path, text.range_text(parameter), text.condition_text(parameter.when), own))
    refined = [(stage.name, stage.refine) for stage in search.stages if stage.refine]
    rows += [(name, "all of the stages before", f"ranges shrunk to {share:.0%}", "", "") for name, share in refined]
    head = ("stage", "parameter", "tried", "only if", "best value")
    used = [column for column in range(len(head)) if any(row[column] for row in rows)]
    return table([head[column] for column in used], [[row[column] for column in used] for row in rows])


def cost(findings: Findings) -> str:
    """Trials, epochs and time of the search and of the final training, and those of published numbers."""
    study = findings.study
    groups = {
        "search": [trial for trial in study.trials if trial.candidate.stage not in AFTER_SEARCH],
        "final training": [trial for trial in study.trials if trial.candidate.stage == FINAL],
    }
    rows = []
    for name, trials in groups.items():
        if trials:
            results = [trial.result for trial in trials if trial.result is not None]
            epochs, seconds = sum(len(each.epochs) for each in results), sum(each.seconds for each in results)
            rows.append((name, f"{len(trials):,}", f"{epochs:,}", text.duration(seconds)))
    head = ("", ">trials", ">epochs", ">time of training")
    parts: list[str] = [table(head, rows) if rows else "<p>Nothing was trained yet.</p>"]
    begun = [trial.started for trial in study.trials if trial.started]
    if begun:
        ended = max(trial.started + trial.run_seconds for trial in study.trials if trial.started)
        workers = len({trial.worker for trial in study.trials if trial.worker})
        parts.append(
            f"<p>From the first trial's start to the last one's end: {text.duration(ended - min(begun))}, with "
            f"{text.counted(workers, 'worker')}. Pauses between runs are included.</p>"
        )
    shown = findings.shown
    if shown is not None and shown.result is not None:
        parts.append(
            f"<p>The model has {shown.result.parameter_count:,} parameters, trained in {len(shown.result.epochs)} "
            f"epochs and {text.duration(shown.result.seconds)}; its weights are those of epoch "
            f"{shown.result.best_epoch}.</p>"
        )
    costs = [(reference.label, reference.note) for reference in findings.spec.references if "epoch" in reference.note]
    if costs:
        parts.append(
            f"<h3>Cost of the published numbers</h3>{table(('published', 'as reported'), dict.fromkeys(costs))}"
        )
    return "\n".join(parts)


def use(findings: Findings) -> str:
    """Code that loads the model."""
    name, model = findings.study.name, findings.model
    if model is None:
        run = f"hpo run {name}"
        return f"<p>No model of this study is registered. A study that runs to its end registers one:</p>{_code(run)}"
    shape = findings.data.image_shape if findings.data is not None else ()
    sized = f" of shape (n, {', '.join(map(str, shape))})" if shape else ""
    code = "\n".join(
        [
            "from hpo import load_model",
            "",
            f'model = load_model("{model.name}/{model.version}")',
            f"probabilities = model.predict_proba(images)  # images: uint8{sized}",
            "names = model.predict(images)",
        ]
    )
    plain = "\n".join(
        [
            "import mlflow",
            "",
            'mlflow.set_tracking_uri("sqlite:///mlruns/mlflow.db")',
            f'model = mlflow.pyfunc.load_model("models:/{model.name}/{model.version}")',
            "probabilities = model.predict(images)",
        ]
    )
    return (
        f"<p>In Python, in the folder that holds <code>mlruns</code>:</p>{_code(code)}"
        f"<p>Without this package, with MLflow alone:</p>{_code(plain)}"
        f"<p>Image files:</p>{_code(f'hpo predict {model.name}/{model.version} IMAGE...')}"
    )


def repeat(findings: Findings) -> str:
    """The study file, the data's digest, versions, machine and command."""
    from hpo.spec.load import dump_study

    study, spec = findings.study, findings.spec
    budget = "" if spec.search.stages or len(study.counted) == spec.search.trials else f" --trials {len(study.counted)}"
    rows: list[tuple[str, object]] = [("data digest", Html(f"<code>{escape(study.data_digest or 'not known')}</code>"))]
    rows += list(_machine(findings))
    if findings.versions:
        rows.append(("versions", text.listed(f"{name} {version}" for name, version in findings.versions.items())))
    whole = dump_study(spec).rstrip()
    file = text.without_folders(whole)
    moved = "" if file == whole else "<p>Files that it names are here without their folders.</p>"
    return (
        f"<p>Save the study file below as <code>{escape(study.name)}.yaml</code>, then:</p>"
        f"{_code(f'hpo run {study.name}.yaml{budget}')}{table((), rows)}"
        f"<details><summary>The study file, with every default</summary>{moved}{_code(file)}</details>"
    )


def _machine(findings: Findings) -> Iterator[tuple[str, str]]:
    results = [trial.result for trial in findings.study.trials if trial.result is not None]
    for setting in ("device", "precision", "threads", "layout", "graph"):
        seen = dict.fromkeys(result.settings[setting] for result in results if setting in result.settings)
        if seen:
            yield setting, text.listed(seen)
    workers = sorted({trial.worker for trial in findings.study.trials if trial.worker})
    if workers:
        yield "workers", text.listed(workers)


def _code(text: str) -> str:
    return f"<pre><code>{escape(text)}</code></pre>"


def _parameters(trial: Trial) -> str:
    return text.listed(f"{path} = {value_text(given)}" for path, given in trial.candidate.parameters.items())


def _score(score: float | None) -> str:
    return "" if score is None else f"{score:.4f}"


def _ends(interval: Interval | None) -> str:
    return f"{interval.low:.4f} to {interval.high:.4f}" if interval else ""
