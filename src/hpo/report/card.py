"""The model card of a study's model: Markdown with the head that the Hugging Face Hub reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import yaml

from hpo.metrics import label_of
from hpo.records import FINAL
from hpo.report.answer import intervals_of, last_opening, own_scores
from hpo.report.text import counted, declares_groups, groups_row, listed, split_text, without_folders
from hpo.spec.automatic import chosen_pruner, chosen_sampler

if TYPE_CHECKING:
    from hpo.records import Trial, TrialResult
    from hpo.report.statistics import Interval
    from hpo.report.study_page import Findings

_UNKNOWN = "not stated"
# Licences by the names of the Hub; whatever else is `other`, with its name beside.
_LICENCES: Mapping[str, str] = {
    "CC BY 4.0": "cc-by-4.0",
    "CC BY-NC 4.0": "cc-by-nc-4.0",
    "CC BY-SA 4.0": "cc-by-sa-4.0",
    "MIT": "mit",
    "Apache-2.0": "apache-2.0",
}
_SCORES = ("accuracy", "balanced_accuracy", "macro_f1", "macro_auc", "loss")


def model_card(findings: Findings, *, licence: str = "") -> str:
    """The card: use, data, protocol, scores with 95 % intervals, limits, licence. Nothing in it is guessed.

    licence is that of the model, which the record cannot know; "" leaves it open.
    """
    parts = [_head(findings, licence), f"# {findings.study.title}", _summary(findings), *_sections(findings, licence)]
    return "\n\n".join(part.rstrip() for part in parts) + "\n"


def _head(findings: Findings, licence: str) -> str:
    """The metadata of the Hub, as YAML between lines of dashes."""
    head: dict[str, object] = {
        "library_name": "mlflow",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "hpo-studies"],
    }
    if licence:
        known = _LICENCES.get(licence)
        head |= {"license": known} if known else {"license": "other", "license_name": licence}
    scores, name = own_scores(findings), findings.data.name if findings.data else findings.spec.data.name
    results = [
        {"type": score, "value": round(scores[f"{part}_{score}"], 4), "name": f"{label_of(f'{part}_{score}')}"}
        for part in ("test", "valid")
        for score in _SCORES
        if f"{part}_{score}" in scores
    ]
    if results:
        task, data = {"type": "image-classification"}, {"type": name, "name": name}
        head["model-index"] = [
            {"name": findings.study.title, "results": [{"task": task, "dataset": data, "metrics": results}]}
        ]
    return f"---\n{yaml.safe_dump(head, sort_keys=False, allow_unicode=True)}---"


def _summary(findings: Findings) -> str:
    model, data = findings.model, findings.data
    words = f"An image classifier of {len(findings.class_names)} classes"
    if data is not None:
        height, width, channels = data.image_shape
        words += f" for images of {width} x {height} pixels and {counted(channels, 'channel')}"
    version = f", version {model.version} of {model.name}" if model is not None else ""
    question = f" Question of its study: {findings.spec.question}" if findings.spec.question else ""
    return f"{words}{version}.{question}"


def _sections(findings: Findings, licence: str) -> Iterator[str]:
    yield _use(findings)
    yield _data(findings)
    yield _protocol(findings)
    yield _scores(findings)
    yield _limits(findings)
    of_data = (findings.data.licence if findings.data else "") or _UNKNOWN
    yield f"## Licence\n\n- model: {licence or _UNKNOWN}\n- data: {of_data}"


def _use(findings: Findings) -> str:
    model = findings.model
    reference = f"models:/{model.name}/{model.version}" if model is not None and model.version else "FOLDER"
    return f"""## Use

```python
import mlflow

model = mlflow.pyfunc.load_model("{reference}")  # or the folder of this card
table = model.predict(images)  # {_input(findings)} -> a column of probabilities for each class
```

Classes, in the order of the columns: {listed(findings.class_names)}."""


def _input(findings: Findings) -> str:
    """What the model takes, as its signature says it: the kind of the training images' pixels where there is one."""
    shape = "(n, height, width, channels)"
    if findings.data is None:
        return shape
    kinds = list(findings.data.ranges)
    return f"{kinds[0] if len(kinds) == 1 else 'uint8'} {shape}"


def _data(findings: Findings) -> str:
    data, lines = findings.data, ["## Data", ""]
    if data is None:
        return "\n".join([*lines, f"The record of the data ({findings.study.data_digest}) is not here."])
    lines += [f"- source: {without_folders(data.source, data.source) if data.source else data.name}"]
    lines += [f"- digest of pixels and labels: `{data.digest}`", f"- parts: {split_text(findings.spec.split)}"]
    if findings.split is not None:
        lines += [f"- {part}: {count:,} images" for part, count in findings.split.counts.items()]
        lines += ["", "| class | share of the training images |", "|---|---|"]
        shares = findings.split.shares.get("train", ())
        lines += [f"| {_cell(name)} | {share:.1%} |" for name, share in zip(data.class_names, shares, strict=False)]
        lines.append("")
    declared = declares_groups(findings.spec.data, findings.spec.split)
    lines += [f"- {label}: {text}" for label, text in groups_row(data, declared=declared)]
    lines += [f"- near-duplicates: {findings.near_duplicates}"] if findings.near_duplicates else []
    lines += [f"- note: {without_folders(warning, data.source)}" for warning in data.warnings]
    lines += [f"- citation: {data.citation}"] if data.citation else []
    return "\n".join(lines)


def _protocol(findings: Findings) -> str:
    study, spec, shown = findings.study, findings.spec, findings.shown
    network = getattr(spec.model, "name", "") or spec.model.kind
    if shown is not None and shown.result is not None:
        several = len(shown.result.members) if _averages(shown.result) == "probabilities" else 0
        network += f", {several} trained networks together" * bool(several)
        network += f", {shown.result.parameter_count:,} parameters"
    trials, names = counted(len(study.counted), "trial"), (chosen_sampler(spec)[0].name, chosen_pruner(spec)[0].name)
    lines = ["## How it was made", "", f"- network: {network}"]
    lines.append(f"- search: {trials} of {names[0]}, pruner {names[1]}, by {study.objective}")
    if shown is not None:
        lines.append(f"- this model: trial {shown.number}{_origin(shown)}")
    versions = ", ".join(f"{name} {version}" for name, version in findings.versions.items())
    lines += [f"- software: {versions}"] if versions else []
    return "\n".join(lines)


def _averages(result: TrialResult) -> str:
    """What of its members an ensemble averages: probabilities or weights; "" for a network that was trained."""
    return result.settings.get("average", "probabilities") if result.members else ""


def _origin(shown: Trial) -> str:
    """How the trial of the model came to be, after its number."""
    if shown.result is not None and (average := _averages(shown.result)):
        members = listed(
            f"{name} ({count} times)" if count > 1 else name for name, count in shown.result.members.items()
        )
        return f", the mean of the {average} of {members}, which were chosen by the validation images"
    final = ", a final training of the search's best" if shown.candidate.stage == FINAL else ""
    return f"{final}; {', '.join(f'{path} {value}' for path, value in shown.candidate.parameters.items())}"


def _scores(findings: Findings) -> str:
    scores, intervals, opened = own_scores(findings), intervals_of(findings), last_opening(findings)
    lines: list[str] = []
    for part in ("test", "valid"):
        for score in _SCORES:
            name = f"{part}_{score}"
            if name in scores:
                told = _interval(intervals.get(name))
                lines.append(f"| {part} | {label_of(name)} | {scores[name]:.4f} | {told} |")
    heads = ["| part | score | value | 95 % interval |", "|---|---|---|---|"]
    lines = ["## Scores", "", *([*heads, *lines, ""] if lines else []), *_searched(findings)]
    if opened is None and any(name.startswith("valid_") for name in scores):
        lines.append(
            "The test part has not been opened for this model. It was chosen by the validation scores, which are"
        )
        lines.append("therefore too high as an estimate.")
    elif opened is None:
        lines.append("The test part has not been opened for this model.")
    else:
        made = findings.shown.result.ended if findings.shown is not None and findings.shown.result is not None else 0.0
        earlier = sum(each.when.timestamp() < made for each in findings.openings)
        when = f"{earlier} of them before this model was made" if earlier else "after the choice was made"
        lines.append(f"The test part was opened {counted(len(findings.openings), 'time')} in this study, {when}.")
        lines += [f"- {sentence}" for sentence in findings.test_history]
    return "\n".join(lines)


def _searched(findings: Findings) -> Iterator[str]:
    """For a final training on all images: why it has no validation scores, and those of the search that chose it."""
    shown = findings.shown
    final = shown is not None and shown.candidate.stage == FINAL
    if shown is None or not final or any(name.startswith("valid_") for name in own_scores(findings)):
        return
    told = "This model was trained on the validation images too, so it has no validation scores of its own."
    same = [each for each in findings.study.ranked() if each.candidate.parameters == shown.candidate.parameters]
    scores = same[0].result.scores if same and same[0].result is not None else {}
    found = [
        f"{label_of(f'valid_{each}')} {scores[f'valid_{each}']:.4f}" for each in _SCORES if f"valid_{each}" in scores
    ]
    if found:
        told += f" The best trial of the search with the same parameters, trial {same[0].number}, has {listed(found)}."
        told += " They chose these parameters, and are therefore too high as an estimate."
    yield told
    yield ""


def _interval(interval: Interval | None) -> str:
    return f"{interval.low:.4f} to {interval.high:.4f}" if interval is not None else "-"


def _limits(findings: Findings) -> str:
    lines = ["## Limits", ""]
    given = "a probability for each of its labels" if _several(findings) else "one of its classes"
    lines.append(f"- It gives every image {given}, also images of something else.")
    lines.append("- Scores hold for images like those above; other cameras, places or populations were not measured.")
    if findings.split is not None and (shares := findings.split.shares.get("train")) and not _several(findings):
        ratio = max(shares) / max(min(shares), 1e-9)
        lines += [f"- The largest class has {ratio:.1f} times the images of the smallest."] if ratio > 2 else []
    if findings.data is not None and not declares_groups(findings.spec.data, findings.spec.split):
        lines.append("- No groups (patients, places, devices) were declared, so one may be in two parts.")
    worst = _worst(findings)
    lines += [f"- On validation images, the class that is recognised least is {worst}."] if worst else []
    return "\n".join(lines)


def _several(findings: Findings) -> bool:
    return findings.data is not None and findings.data.several_labels


def _worst(findings: Findings) -> str:
    shown = findings.shown
    counts = shown.result.confusion if shown is not None and shown.result is not None else ()
    recalls = [(row[index] / sum(row), index, sum(row)) for index, row in enumerate(counts) if sum(row)]
    if not recalls or _several(findings):
        return ""
    share, index, count = min(recalls)
    return f"{findings.class_names[index]} ({share:.1%} of {count:,})"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
