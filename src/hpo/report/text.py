"""Values, names and study settings as text, for figures, pages and the terminal. Imports nothing heavy."""

from __future__ import annotations

import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

from hpo.metrics import label_of

if TYPE_CHECKING:
    from hpo.records import DataCard, StudyResult, Trial
    from hpo.spec.space import Choice, Float, Int
    from hpo.spec.study import DataSpec, SplitSpec

_LABEL = 24  # letters of a name
_VAGUE = ("size",)  # endings of a path that say nothing alone
_BY = {"stratified": "with equal class shares, at random", "random": "at random", "order": "the last rows of the file"}


_FOLDERS = re.compile(r"""(?<![\w/:.~-])(?:~|[A-Za-z]:)?[\\/](?:[^\\/\s'":]+[\\/])+(?=[^\\/\s])""")


def without_folders(text: str, source: str = "") -> str:
    """The text with the name alone of each file of an absolute path: pages travel, and folders are of one machine.

    source is a path that the text may name. Its folders may have spaces; in prose nobody can tell where such a path
    ends.
    """
    folders = re.match(r"(?:~|[A-Za-z]:)?[\\/].*[\\/](?=[^\\/])", source)
    if folders:
        text = re.sub(rf"(?<![\w/:.~-]){re.escape(folders.group())}", "", text)
    return _FOLDERS.sub("", text)


def duration(seconds: float) -> str:
    """0.84 s, 4.2 s, 42 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 9.95:
        return f"{seconds:.2g} s" if seconds < 1 else f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def counted(count: int, noun: str) -> str:
    """1 trial, 1,200 trials."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def times(count: int) -> str:
    """once, twice, 3 times."""
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def listed(items: Iterable[object]) -> str:
    """The items, separated by commas."""
    return ", ".join(map(str, items))


def short_name(name: str, width: int = _LABEL) -> str:
    """The name, cut to at most width letters with an ellipsis."""
    return name if len(name) <= width else f"{name[: width - 1].rstrip(' (,-_')}…"


def short_names(names: Sequence[str], width: int = _LABEL) -> list[str]:
    """short_name of each; names that would become equal keep their ends too, or else get a number."""
    short = [short_name(name, width) for name in names]
    for shorten in (_middle_out, _numbered):
        counts = Counter(short)
        short = [
            text if counts[text] == 1 else shorten(name, width, index)
            for index, (name, text) in enumerate(zip(names, short, strict=True))
        ]
    return short


def _middle_out(name: str, width: int, _: int) -> str:
    head = (width - 1) // 2
    return name if len(name) <= width else f"{name[:head]}…{name[-(width - 1 - head) :]}"


def _numbered(name: str, width: int, index: int) -> str:
    return f"{short_name(name, width - 4)} {index}"


def wrapped(name: str, width: int, lines: int = 2) -> str:
    """A name over at most `lines` lines of width letters."""
    rows = textwrap.wrap(name.replace("(", " ("), width) or [""]
    return "\n".join(
        rows if len(rows) <= lines else [*rows[: lines - 1], short_name(" ".join(rows[lines - 1 :]), width)]
    )


def short_paths(paths: Iterable[str]) -> dict[str, str]:
    """The shortest ending of each dotted path that no other shares; `optimizer` for training.optimizer.name."""
    meaning = {path: path.removesuffix(".name").removesuffix(".kind") for path in paths}
    short: dict[str, str] = {}
    for path, text in meaning.items():
        parts = text.split(".")
        shortest = min(2 if parts[-1] in _VAGUE else 1, len(parts))
        endings = (".".join(parts[-count:]) for count in range(shortest, len(parts) + 1))
        others = [f".{other}" for name, other in meaning.items() if name != path]
        short[path] = next((end for end in endings if not any(o.endswith(f".{end}") for o in others)), path)
    return short


def parameter_names(paths: Iterable[str], ranges: Mapping[str, Any]) -> dict[str, str]:
    """short_paths; for a value that was drawn `per` another place, the product that it is: lr*64/batch_size.

    ranges maps paths to their parameters as plain data.
    """
    return {path: name + relative_text(path, ranges) for path, name in short_paths(paths).items()}


def relative_text(path: str, ranges: Mapping[str, Any]) -> str:
    """From the value that is used at a path to the one that was drawn, as text: *64/batch_size, or ""."""
    part = ranges.get(path) or {}
    if not part.get("per"):
        return ""
    return f"*{part['reference']:g}/{next(iter(short_paths([part['per']]).values()))}"


def ranges_of(study: StudyResult) -> dict[str, Any]:
    """What each searched place may be, as plain data; the later stage's where two vary one place."""
    search = study.spec.get("search") or {}
    spaces = [search.get("space") or {}, *(stage.get("space") or {} for stage in search.get("stages") or ())]
    return {path: part for each in spaces for path, part in each.items()}


def value_text(value: Any) -> str:
    """A parameter's value as a label."""
    if isinstance(value, float):
        return f"{value:.3g}"
    if isinstance(value, Mapping):
        return listed(f"{key}={value_text(part)}" for key, part in value.items())
    if isinstance(value, list | tuple):
        return "-".join(map(value_text, value)) or "none"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def trial_tooltip(study: StudyResult, trial: Trial) -> str:
    """Number, score, epochs, time and parameters of a trial, as lines of HTML."""
    result, stage = trial.result, trial.candidate.stage
    lines = [f"<b>trial {trial.number}</b> {trial.state.value}" + (f", {escape(stage)}" if stage else "")]
    if result is not None and result.value is not None:
        lines.append(f"{label_of(study.objective)} {result.value:.4f}")
    if result is not None and result.epochs:
        best = f", best {result.best_epoch}" if result.best_epoch else ""
        lines.append(f"{counted(len(result.epochs), 'epoch')}{best}, {duration(result.seconds)}")
    names = parameter_names(trial.candidate.parameters, ranges_of(study))
    lines += [
        f"{escape(names[path])} = {escape(short_name(value_text(value), 60))}"
        for path, value in trial.candidate.parameters.items()
    ]
    return "<br>".join(lines)


def range_text(parameter: Float | Int | Choice) -> str:
    """The options of a parameter, or its range and scale."""
    from hpo.spec.space import Choice, Float

    if isinstance(parameter, Choice):
        return listed(map(value_text, parameter.choice))
    low, high = parameter.ends()
    scale = " on a logarithmic scale" if parameter.log else f" in steps of {parameter.step}" if parameter.step else ""
    times = ""
    if isinstance(parameter, Float) and parameter.per is not None:
        times = f", times {parameter.per} / {parameter.reference:g}"
    return f"{value_text(low)} to {value_text(high)}{scale}{times}"


def condition_text(when: Mapping[str, Any]) -> str:
    """The condition under which a parameter is used."""
    return " and ".join(f"{path} is {listed(want) if isinstance(want, list) else want}" for path, want in when.items())


def declares_groups(data: DataSpec, split: SplitSpec) -> bool:
    """Whether a study says which images must not be divided. Without, a card's groups are clusters that were found."""
    return bool(split.group or data.group)


def groups_row(card: DataCard, *, declared: bool) -> list[tuple[str, str]]:
    """Label and text of the groups that no two parts share; empty where there are none. See declares_groups."""
    if not card.groups:
        return []
    if declared:
        return [("groups", f"{card.groups:,}, each in one part")]
    return [("clusters of near-duplicates", f"{card.groups:,}, a single image counted as one; none is divided")]


def split_text(split: SplitSpec) -> str:
    """How train and validation were divided."""
    if split.kind == "official":
        return "the validation part of the data set"
    if split.kind == "holdout":
        return f"{split.share:.3g} of the development images held out, {_BY[split.by]} (split seed {split.seed})"
    if split.kind == "none":
        return "no validation part: every development image trains"
    share = "" if split.fraction == 1 else f" on {split.fraction:.0%} of the development images"
    return f"{split.folds}-fold cross-validation{share}, {split.by} (split seed {split.seed})"


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """Lines of a Markdown table and an empty one; a name that begins with > is of a column of numbers."""
    lines = [f"| {' | '.join(map(str, row))} |" for row in rows]
    if not lines:
        return []
    rule = "".join("--:|" if head.startswith(">") else "---|" for head in heads)
    return [f"| {' | '.join(head.removeprefix('>') for head in heads)} |", f"|{rule}", *lines, ""]
