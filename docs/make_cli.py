"""Write docs/cli.md, every command and option, from the table of commands: python docs/make_cli.py."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from hpo.cli.app import SECTIONS, load_command

PAGE = Path(__file__).with_name("cli.md")
_INTRO = """\
# Command line (CLI)

Every command and option, as `--help` prints them; `python docs/make_cli.py` writes this page. All commands accept
`-h`, and `--debug`, which shows tracebacks.

Exit codes: 0 after success; 1 if a check, a gate or the study itself failed, or after an unexpected error; 2 if the
command, the study file or the data must be corrected; 130 after Ctrl-C or `hpo stop`.

Environment variables: `HPO_HOME` (the folder that holds `mlruns`), `HPO_DATA` (the data cache), `HPO_STORAGE` and
`MLFLOW_TRACKING_URI` (stores on servers, see [several machines](cluster.md)).

The option `--install-completion` of `hpo` adds completion to bash, zsh and fish.
"""


def cli_page() -> str:
    """The whole page as Markdown."""
    parts = [_INTRO]
    for section, commands in SECTIONS.items():
        parts.append(f"## {section}\n")
        for name, listed in commands.items():
            example = f"    hpo {name} {listed.example}".rstrip()
            parts += [*_sections(f"hpo {name}", load_command(name)), f"Example:\n\n{example}\n"]
    return "\n".join(parts)


def _sections(title: str, command: Any) -> Iterator[str]:
    """The section of a command; of a group, the sections of its commands."""
    if hasattr(command, "commands"):
        for name, inner in command.commands.items():
            yield from _sections(f"{title} {name}", inner)
        return
    yield f"### {title}\n"
    yield f"{inspect.cleandoc(command.help)}\n"
    rows = [row for parameter in command.params for row in _row(parameter)]
    if rows:
        yield "\n".join(["| argument or option | meaning | default |", "|---|---|---|", *rows, ""])


def _row(parameter: Any) -> Iterator[str]:
    """The row of an argument or option; --debug, which all commands have, is in the introduction."""
    if parameter.opts == ["--debug"]:
        return
    if parameter.param_type_name == "argument":
        name = parameter.metavar or parameter.name.upper()
        name += "..." if parameter.nargs == -1 and not name.endswith("...") else ""
    else:
        name = ", ".join([*parameter.opts, *parameter.secondary_opts])
        name += "" if parameter.is_flag else f" {parameter.metavar}"
    cells = [f"`{name}`", parameter.help, _default(parameter)]
    yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "**required**"
    if isinstance(parameter.show_default, str):
        return parameter.show_default
    value = parameter.default
    if value is None or value == "" or isinstance(value, bool):
        return "on" if value is True else ""
    return f"`{value.value if isinstance(value, Enum) else value}`"


if __name__ == "__main__":
    PAGE.write_text(cli_page(), encoding="utf-8")
