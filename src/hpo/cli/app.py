"""The command `hpo`: a table of its commands, each of which is imported when it is used."""

from __future__ import annotations

import atexit
import io
import os
import sys
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

from hpo.cli import output
from hpo.cli.options import Command, Debug, write_options


class Listed(NamedTuple):
    """A command of the table: module:function, what it does in a few words, and arguments as an example."""

    place: str
    words: str
    example: str


# Section -> command, in the order of --help.
SECTIONS: dict[str, dict[str, Listed]] = {
    "Search": {
        "run": Listed(
            "run:run",
            "Run a study, or resume it; register its best model.",
            "digits-mlp --trials 50 --set training.epochs=20",
        ),
        "check": Listed("look:check", "Validate a study, train one batch, estimate time and disk space.", "digits-mlp"),
        "stop": Listed("run:stop", "Stop a running study, as Ctrl-C does.", "digits-mlp"),
        "worker": Listed("cluster:worker", "Train trials of a study on a shared storage.", "digits-mlp"),
        "begin": Listed(
            "cluster:begin", "Create a study on a shared storage, for workers to train.", "digits-mlp --trials 200"
        ),
        "manifest": Listed(
            "cluster:manifest",
            "Print a Kubernetes Job of workers.",
            "digits-mlp --image registry.example/hpo:1",
        ),
    },
    "Inspect": {
        "ui": Listed("look:ui", "Open the MLflow UI on a study's trials, best first.", "digits-mlp"),
        "status": Listed("run:status", "Show the progress of every study.", ""),
        "trials": Listed("look:trials", "List the trials of a study.", "digits-mlp --top 5"),
        "report": Listed(
            "report:report",
            "Write a page on a study: result, figures, mistakes, cost.",
            "digits-mlp -o report.html",
        ),
        "compare": Listed("use:compare", "Compare models on the same images.", "digits-mlp digits-cnn"),
        "rerun": Listed("run:rerun", "Train a trial again, and compare epoch by epoch.", "digits-mlp/3"),
        "studies": Listed("look:studies", "List the available studies.", ""),
        "show": Listed("look:show", "Print a study with its defaults.", "digits-mlp"),
        "schema": Listed("look:schema", "Print the JSON Schema of a study file.", "> study.schema.json"),
        "preview": Listed(
            "look:preview",
            "Draw augmented training images of a study.",
            "cifar10-v3 -o augmented.png",
        ),
        "data": Listed("report:app", "Explore a data set.", "show digits"),
    },
    "Use models": {
        "promote": Listed(
            "use:promote", "Check a study's best model by the gates, and make it the champion.", "digits-mlp"
        ),
        "evaluate": Listed("use:evaluate", "Measure models on the sealed test part.", "digits-mlp"),
        "models": Listed("use:models", "List the registered models.", "digits-mlp"),
        "predict": Listed("use:predict", "Classify image files.", "digits-mlp photo.png --format csv"),
        "explain": Listed("report:explain", "Highlight the pixels that support a class.", "digits-mlp photo.png"),
    },
    "Maintain": {
        "doctor": Listed("store:doctor", "Find and repair problems in the stores.", "--fix"),
        "clean": Listed("store:clean", "Free disk space.", "digits-mlp --keep-models best:3"),
        "export": Listed(
            "store:export", "Write a study, its runs and models, to one file.", "digits-mlp -o digits.zip"
        ),
        "import": Listed("store:import_", "Read an exported study.", "digits.zip"),
        "store": Listed("store:app", "Show the stores, or upgrade their databases.", "status"),
    },
}


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
        if "mlflow" not in sys.modules:
            sys.exit(code)
        # Unloading the modules of mlflow and optuna one by one would take two seconds.
        from hpo.execute.process import end_fork_server

        atexit._run_exitfuncs()
        end_fork_server()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
