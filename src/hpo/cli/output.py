"""Output of all commands: tables, JSON, numbers as text, and errors."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import os
import re
import sys
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hpo.cli.silence import break_silence
from hpo.errors import HpoError, clean, disk_full, redact
from hpo.report.text import short_paths

_LONG = 500  # rows
_LONGEST = 99_999 * 3600  # of a duration, in seconds
INTERRUPTED = 130  # what a shell reports after Ctrl-C


def print_table(rows: Iterable[Sequence[object]], columns: Sequence[str]) -> None:
    """Rows below their column names; a name that begins with > is of a column of numbers, one with ~ may wrap.

    Long tables never wrap, nor do those that go into a pipe.
    """
    rows = list(rows)
    if len(rows) <= _LONG and (sys.stdout.isatty() or "COLUMNS" in os.environ):
        from hpo.cli import console

        console.print_table(rows, columns)
        return
    _print_plain_table(rows, columns)


def _print_plain_table(rows: Sequence[Sequence[object]], columns: Sequence[str]) -> None:
    """The same without rich, which takes a twentieth of a second, and a millisecond for each row."""
    from rich.cells import cell_len

    lines = [[column.lstrip(">~") for column in columns], *([str(cell) for cell in row] for row in rows)]
    widths = [max(map(cell_len, column)) for column in zip(*lines, strict=True)]
    numeric = [column.startswith(">") for column in columns]

    def padded(cell: str, width: int, right: bool) -> str:
        space = " " * (width - cell_len(cell))
        return space + cell if right else cell + space

    print_text("\n".join("  ".join(map(padded, line, widths, numeric)).rstrip() for line in lines))


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Labels and values in two columns."""
    from hpo.cli import console

    console.print_facts((label, message(words)) for label, words in facts)


def message(text: str) -> str:
    """A text for a person: paths below the working directory are relative, and commands work in this terminal."""
    from hpo.cli.commands import runnable

    text = runnable(text)
    try:
        here = str(Path.cwd())
    except FileNotFoundError:
        here = "/"
    if here != "/":
        text = re.sub(rf"(?<![\w.~-])(?<!file://){re.escape(here)}/(?=[\w.~-])", "", text)
    return text


def print_message(text: str) -> None:
    """message(text) on stdout."""
    print_text(message(text))


def print_progress(text: str) -> None:
    """One line about what happens now, on stderr."""
    break_silence()
    sys.stderr.write(f"{clean(message(text))}\n")
    sys.stderr.flush()


def print_warning(text: str) -> None:
    """One warning on stderr."""
    from rich.text import Text

    from hpo.cli.console import make_console

    make_console(stderr=True).print(Text.assemble(("warning: ", "yellow"), message(text)), soft_wrap=True)


def write_text(text: str, file: Path | None) -> None:
    """Write text to the file, or to stdout without one. Raises HpoError."""
    if file is None:
        print_text(text)
        return
    try:
        file.write_text(f"{clean(text)}\n", encoding="utf-8", errors="replace")
    except OSError as error:
        raise HpoError(f"{file}: cannot be written: {error.strerror}.", "Choose another file: --out FILE") from None


def is_live_terminal() -> bool:
    """True if stdout is a terminal that can be redrawn."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def to_json(value: object, *, indent: int | None = 2) -> str:
    """value as JSON text; see plain()."""
    return json.dumps(plain(value), indent=indent, ensure_ascii=False)


def print_json(value: object, *, indent: int | None = 2) -> None:
    """value as JSON on stdout; see plain()."""
    print_text(to_json(value, indent=indent))


def predictions_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Predictions as CSV: file, class, probability, p_NAME for each class, and error where a file has one."""
    classes = next((list(row["probabilities"]) for row in rows if row["probabilities"]), [])
    failed = any("error" in row for row in rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["file", "class", "probability", *(f"p_{name}" for name in classes), *["error"] * failed])
    for row in rows:
        probabilities = [row["probabilities"].get(name) for name in classes]
        errors = [row.get("error", "")] * failed
        writer.writerow([row["file"], row["class"], row["probability"], *probabilities, *errors])
    return buffer.getvalue().rstrip("\n")


def print_text(text: str) -> None:
    """One text and a newline to stdout, flushed, without styles or wrapping."""
    break_silence()
    sys.stdout.write(f"{clean(text)}\n")
    sys.stdout.flush()


def plain(value: object) -> Any:
    """Records, mappings, numpy numbers and arrays as JSON types; NaN and infinities, which JSON lacks, as null."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):
        return plain(value.tolist())
    return str(value)


def fail(error: BaseException, *, as_json: bool = False, debug: bool = False) -> int:
    """Print an error to stderr and return the exit code.

    2 for an error that the user can fix, 1 for an unexpected one and for a closed pipe, 130 for Ctrl-C.
    """
    break_silence()
    if isinstance(error, BrokenPipeError):
        # Python flushes stdout once more as it exits; that must not fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if debug:
        sys.stderr.write(clean(redact("".join(traceback.format_exception(error)))))
    if isinstance(error, KeyboardInterrupt):
        said, hint, code = "interrupted", "", INTERRUPTED
    elif isinstance(error, HpoError):
        said, hint, code = error.message, error.hint, error.exit_code
    elif isinstance(error, MemoryError):
        said = f"the memory of this machine does not suffice: {redact(str(error))}".rstrip(": ")
        hint, code = "End other programs, or give it fewer or smaller images.", HpoError.exit_code
    elif isinstance(error, FileNotFoundError) and _is_adrift():
        said, hint, code = "the working directory is gone.", "Go to a folder that exists: cd", HpoError.exit_code
    elif disk_full(error):
        said, hint = f"no space is left: {redact(str(error))}.", "Free some, and run it again."
        code = HpoError.exit_code
    else:
        said = f"unexpected error {type(error).__name__}: {' '.join(redact(str(error)).split())}".rstrip(": ")
        hint, code = ("" if debug else "Run again with --debug for the traceback."), 1
    if as_json:
        sys.stderr.write(json.dumps({"error": said, "hint": hint}) + "\n")
        return code

    from rich.text import Text

    from hpo.cli.console import make_console

    console = make_console(stderr=True)
    label = Text() if code != 2 else Text("error: ", "bold red")
    console.print(Text.assemble(label, message(said)), soft_wrap=True)
    if hint:
        console.print(Text(message(hint), "dim"), soft_wrap=True)
    return code


def _is_adrift() -> bool:
    try:
        Path.cwd()
    except FileNotFoundError:
        return True
    return False


def parse_duration(text: str) -> float:
    """Seconds in "90", "45s", "30m", "1h" or "1h30m"; raises ValueError."""
    match = re.fullmatch(r"(?:([\d.]+)h)?(?:([\d.]+)m(?:in)?)?(?:([\d.]+)s?)?", text.replace(" ", ""))
    try:
        hours, minutes, seconds = (float(part or 0) for part in match.groups()) if match else (0.0, 0.0, 0.0)
    except ValueError:
        hours = minutes = seconds = 0.0
    total = 3600 * hours + 60 * minutes + seconds
    if not 0 < total <= _LONGEST:
        raise ValueError(f"{text[:20]!r} is not a time. Write 90 (seconds), 45s, 30m, 1h or 1h30m, at most 99999h.")
    return total


def show_bytes(count: float) -> str:
    """512 B, 3.4 MB, 1.2 GB; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def show_score(value: float | None) -> str:
    """Four decimals, the resolution of 10,000 validation images."""
    return "" if value is None else f"{value:.4f}"


def show_openings(study: str, count: int, *, now: int | None = None) -> str:
    """The number of openings of a study's test part; now is the number of openings by this command."""
    if not count:
        return f"The test part of {study} has never been opened."
    times = "once" if count == 1 else f"{count} times"
    just = {None: "", 0: "; this time it stayed closed", count: ", just now"}.get(now, f", {now} of these just now")
    return f"The test part of {study} has been opened {times}{just}."


def show_parameters(parameters: Mapping[str, Any], names: Mapping[str, str] | None = None) -> str:
    """hidden=312 activation=relu lr=0.0031: the values of a candidate, to three digits."""
    names = names or short_paths(parameters)
    return " ".join(f"{names.get(path, path)}={_short(value)}" for path, value in parameters.items())


def _short(value: Any) -> str:
    value = plain(value)
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
