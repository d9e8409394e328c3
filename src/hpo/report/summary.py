"""A run of a study as a short Markdown text: the winner, its scores, failures, cost, next commands."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from hpo.records import FINAL, StudyResult, Trial, TrialState
from hpo.report.parameters import groups
from hpo.report.text import markdown_table, ranges_of, relative_text, score_text, value_text

_FRONT = 12  # rows of the table of trade-offs
_NUMBER = re.compile(r"\d[\d.,e+-]*")


def failure_lines(study: StudyResult) -> list[str]:
    """`3 not_finite, 2 setup`, then the most frequent reason; empty if no trial failed.

    Interrupted trials do not count. Reasons that differ only in numbers are counted together; the newest is shown.
    """
    ended = [trial for trial in study.trials if trial.state.finished and trial.result is not None]
    failed = [
        trial.result
        for trial in ended
        if trial.result is not None and (trial.result.failure is not None or trial.state is TrialState.FAILED)
    ]
    if not failed:
        return []
    # Records of earlier versions have no kind.
    kinds = Counter(result.failure.value if result.failure else "unclassified" for result in failed)
    lines = [", ".join(f"{count} {kind}" for kind, count in kinds.most_common())]
    reasons = Counter(_NUMBER.sub("#", result.reason) for result in failed if result.reason)
    if reasons:
        (commonest, count), *_ = reasons.most_common(1)
        newest = next(result for result in reversed(failed) if _NUMBER.sub("#", result.reason) == commonest)
        lines.append(f"{newest.reason} (trial {newest.number}{f', and {count - 1} more so' if count > 1 else ''})")
    return lines


def study_summary(study: StudyResult, *, winner: Trial | None, model: str = "", remarks: Sequence[str] = ()) -> str:
    """Markdown: question, winner with parameters and scores, stages, trade-offs, cost, next commands.

    winner is the trial of the study's model; None shows the best of the search. model is the name of the registered
    winner, "" without one. remarks are lines about the choice. All scores are on validation images.
    """
    lines = [f"# {study.title}", ""]
    if question := study.spec.get("question"):
        lines += [str(question), ""]
    shown = winner or study.best
    if shown is None:
        lines += ["No trial is complete: there is no winner.", ""]
    else:
        lines += _winner(study, shown, chosen=winner is not None)
    lines += [line for remark in remarks for line in (remark, "")]
    lines += _stages(study)
    if len(study.objectives) > 1:
        lines += _front(study)
    if failures := failure_lines(study):
        lines += ["## Failures", "", *(part for line in failures for part in (line, ""))]
    lines += _cost(study)
    lines += ["## Next", "", "```", *_commands(study, shown is not None, model), "```", ""]
    return "\n".join(lines)


def _winner(study: StudyResult, trial: Trial, *, chosen: bool) -> list[str]:
    final = ", trained again after the search" if trial.candidate.stage == FINAL else ""
    heading = "Winner" if chosen else "Best of the search so far"
    better = "higher" if study.direction == "maximize" else "lower"
    value = f"{score_text(study.objective)} **{trial.value or 0.0:.4f}** ({better} is better)"
    ranges = ranges_of(study)
    lines = [f"**{heading}: trial {trial.number}**{final}, {value}.", ""]
    lines += markdown_table(
        ("parameter", "value"),
        ((path + relative_text(path, ranges), value_text(v)) for path, v in trial.candidate.parameters.items()),
    )
    if trial.result is not None:
        scores = trial.result.scores
        rows = [
            (score_text(name), f"{value:.4f}" + (f" ± {scores[f'{name}_std']:.4f}" if f"{name}_std" in scores else ""))
            for name, value in scores.items()
            if name.startswith("valid_") and not name.endswith("_std")
        ]
        rows += [("trainable parameters", f"{trial.result.parameter_count:,}")] if trial.result.parameter_count else []
        rows += [("best epoch", str(trial.result.best_epoch))] if trial.result.best_epoch else []
        lines += markdown_table(("score", "value"), rows)
    return lines


def _stages(study: StudyResult) -> list[str]:
    rows = []
    for group in groups(study):
        if group.name:
            best = study.ranked(group.name)[0]
            held = best.candidate.parameters
            chosen = [f"{p.label} = {value_text(held[p.path])}" for p in group.parameters if p.path in held]
            rows.append((group.name, str(len(group.trials)), ", ".join(chosen), f"{best.value:.4f}", str(best.number)))
    heads = ("stage", "complete trials", "best", score_text(study.objective), "trial")
    return ["## Stages", "", *markdown_table(heads, rows)] if rows else []


def _front(study: StudyResult) -> list[str]:
    names = [score for score, _ in study.objectives]
    front = study.pareto()
    rows = [
        (str(trial.number), *(f"{value:.6g}" for value in trial.result.values))
        for trial in front[:_FRONT]
        if trial.result
    ]
    more = [f"And {len(front) - _FRONT} more.", ""] if len(front) > _FRONT else []
    return [
        "## Pareto front",
        "",
        *markdown_table(("trial", *map(score_text, names)), rows),
        *more,
    ]


def _cost(study: StudyResult) -> list[str]:
    ends = ", ".join(f"{study.count(state)} {state.value}" for state in TrialState if study.count(state))
    epochs = sum(len(trial.result.epochs) for trial in study.trials if trial.result)
    hours = sum(trial.run_seconds for trial in study.trials) / 3600
    spent = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
    return ["## Cost", "", f"Trials: {ends or 'none'}. {epochs} epochs, {spent} of one worker.", ""]


def _commands(study: StudyResult, complete: bool, model: str) -> list[str]:
    ended = study.count(*(state for state in TrialState if state.finished))
    rows = [(f"hpo report {study.title}", "the study as one page")] if complete else []
    rows += [("hpo ui", "all trials, their curves and pictures in MLflow")]
    if not study.spec.get("search", {}).get("stages"):
        rows += [(f"hpo run {study.name} --trials {ended + max(10, ended // 2)}", "continue the search")]
    if model:
        rows += [
            (f"hpo promote {study.name}", "open the sealed test part, once, and make it champion"),
            (f"hpo predict {model} IMAGE...", "use the model"),
        ]
    width = max(len(command) for command, _ in rows)
    return [f"{command:{width}}  # {text}" for command, text in rows]
