"""The command `hpo`, whose commands are imported when they are used."""

from __future__ import annotations

import atexit
import io
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from hpo.cli import output
from hpo.cli.commands import SECTIONS
from hpo.cli.options import Command, Debug, write_options


class Commands(TyperGroup):
    """The group `hpo`: it lists its commands from the table, and imports the one that is called."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        for commands in SECTIONS.values():
            for name, listed in commands.items():
                self.add_command(TyperCommand(name, help=listed.words))

    def resolve_command(self, ctx: Any, args: list[str]) -> tuple[str | None, Any, list[str]]:
        """The command that is called, imported, and what follows its name."""
        name, command, rest = super().resolve_command(ctx, args)
        return name, load_command(str(name)) if command else None, rest

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The options, then the commands in their sections."""
        write_options(self, ctx, formatter)
        width = max(map(len, self.commands))
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                formatter.write_dl([(name.ljust(width), listed.words) for name, listed in commands.items()])


def load_command(name: str) -> Any:
    """The command of that name in the table, imported."""
    listed = next(commands[name] for commands in SECTIONS.values() if name in commands)
    module, _, attribute = listed.place.partition(":")
    found = getattr(import_module(f"hpo.cli.{module}"), attribute)
    one = typer.Typer(add_completion=False, rich_markup_mode=None)
    if isinstance(found, typer.Typer):
        one.add_typer(found, name=name)
    else:
        one.command(name, cls=Command)(found)
    command = typer.main.get_group(one).commands[name]
    command.epilog = f"Example: hpo {name} {listed.example}".rstrip()
    return command


app = typer.Typer(
    name="hpo",
    cls=Commands,
    help="Hyperparameter studies of image classifiers: Optuna searches, PyTorch trains, MLflow records.",
    epilog="Begin with: hpo run digits-mlp",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def _print_version(asked: bool) -> None:
    if asked:
        import hpo

        output.print_text(f"hpo {hpo.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
    debug: Debug = False,
) -> None:
    pass


def main() -> None:
    """The entry point of the command `hpo`."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # its caller has closed it
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the process ends
    for stream in (sys.stdout, sys.stderr):
        # A terminal that cannot show a character gets a question mark, not a traceback.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # pydantic would look through all installed packages for plugins.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app(prog_name="hpo")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        try:
            sys.stdout.flush()
        except OSError as error:
            code = output.fail(error)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it exits
        # Unloading the modules of mlflow and optuna one by one would take two seconds.
        atexit._run_exitfuncs()
        if "hpo.execute.process" in sys.modules:
            from hpo.execute.process import end_fork_server

            end_fork_server()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
