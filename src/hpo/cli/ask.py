"""`hpo ask` and `hpo tell`: the candidates of a study for a program that trains them itself."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from hpo.cli import output
from hpo.cli.options import Debug, HomeFolder, Study, Trials, Trust
from hpo.errors import SpecError


def ask(
    study: Study,
    trials: Trials = None,
    trust: Trust = False,
    home: HomeFolder = None,
    _debug: Debug = False,
) -> None:
    """Print the next candidate of a study as JSON, for a program that trains it itself: see `hpo tell`.

    The exit code is 1 where there is none now: the budget or the space is spent, or a running trial must end first.
    """
    from hpo.jobs.ask_tell import ask_tell

    with ask_tell(study, trials=trials, home=home, trust=trust) as session:
        asked = session.ask()
        if asked is None:
            output.print_message(f"{session.title}: there is no candidate now.")
            raise typer.Exit(1)
        session.hand_over(asked.number)
        output.print_json({"trial": f"{session.exact}#{asked.number}", **output.plain(asked)})


def tell(
    trial: Annotated[str, typer.Argument(metavar="STUDY#NUMBER", help="A trial that `hpo ask` has printed.")],
    value: Annotated[
        float | None,
        typer.Option(metavar="X", help="The objective.", show_default="the best that was reported"),
    ] = None,
    scores: Annotated[
        list[str] | None,
        typer.Option("--score", metavar="NAME=X", help="A further score, such as parameters=1200; may be repeated."),
    ] = None,
    epoch: Annotated[int | None, typer.Option(metavar="N", min=1, help="With --report: which epoch, from 1.")] = None,
    report: Annotated[
        list[float] | None,
        typer.Option(metavar="X", help="The objective after an epoch, for the pruner; the trial continues."),
    ] = None,
    pruned: Annotated[bool, typer.Option("--pruned", help="The pruner ended it.")] = False,
    failed: Annotated[str | None, typer.Option(metavar="REASON", help="It failed.")] = None,
    stopped: Annotated[bool, typer.Option("--stopped", help="It was interrupted, and is to be tried again.")] = False,
    home: HomeFolder = None,
    _debug: Debug = False,
) -> None:
    """End a trial that `hpo ask` has printed, or report one of its epochs; prints JSON.

    After --epoch and --report, `prune` says whether the pruner ends the trial: then end it with --pruned. With several
    objectives repeat --report, in the order of the study, and give all of them as --score at the end.
    """
    from hpo.jobs.ask_tell import ask_tell

    match = re.fullmatch(r"(.+)#([0-9]+)", trial)
    if match is None:
        raise SpecError(f"{trial}: this names no trial.", "Write STUDY#NUMBER, such as digits-mlp#3.")
    number = int(match[2])
    if bool(report) != (epoch is not None):
        raise SpecError("--report and --epoch belong together.", "Give both, or neither.")
    with ask_tell(match[1], home=home) as session:
        if report and epoch is not None:
            prune = session.report(number, epoch, report[0] if len(report) == 1 else report)
            session.hand_over(number)
            output.print_json({"trial": trial, "epoch": epoch, "prune": prune})
            return
        marks = {"pruned": pruned, "failed": failed is not None, "stopped": stopped}
        state = next((name for name, given in marks.items() if given), "complete")
        further = dict(map(_score, scores or ()))
        result = session.tell(number, value, scores=further, state=state, reason=failed or "")  # type: ignore[arg-type]
        output.print_json({"trial": trial, "state": result.state.value, "value": result.value, "reason": result.reason})


def _score(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        return name.strip(), float(value)
    except ValueError:
        raise SpecError(f"--score {text}: is no score.", "Write NAME=NUMBER, such as parameters=1200.") from None
