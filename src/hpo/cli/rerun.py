"""`hpo rerun`: repeat a trial and compare its numbers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Trust

if TYPE_CHECKING:
    from hpo.jobs.rerun import EpochCheck

_MARKS = {"equal": "=", "close": "~", "differs": "x"}


def rerun(
    trial: Annotated[str, typer.Argument(metavar="STUDY/TRIAL", help="digits-mlp/3.", show_default=False)],
    tolerance: Annotated[float, typer.Option(min=0.0, help="Differences of a score up to this count as close.")] = 1e-3,
    device: Annotated[
        str | None,
        typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:N or mps.", show_default="the trial's"),
    ] = None,
    trust: Trust = False,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Train a finished trial again from its record, and compare epoch by epoch.

    = equal bit for bit, ~ within the tolerance, x beyond it; exit code 1 where they differ. Nothing is stored.
    """
    from hpo.jobs.rerun import Agreement
    from hpo.jobs.rerun import rerun as train_again

    watch = None if as_json else _show
    found = train_again(trial, tolerance=tolerance, device=device, home=home, trust=trust, watch=watch)
    if as_json:
        output.print_json(found)
    else:
        threads = f"{found.threads} thread{'s' if found.threads > 1 else ''}"
        output.print_text(f"{found}  ({found.device}, {found.precision or 'no precision'}, {threads})")
        if not found.same_machine:
            output.print_warning("the trial used another device or precision, or they are unknown")
    if found.agreement is Agreement.DIFFERS:
        raise typer.Exit(1)


def _show(check: EpochCheck) -> None:
    """One line for each epoch, with a heading above the first."""
    if (check.fold, check.number) == (0, 1):
        output.print_text(f"  {'epoch':>8}  {'then':>7}  {'again':>7}  difference")
    place = f"{check.fold + 1}.{check.number}" if check.fold else str(check.number)
    then, again = (output.show_score(value) or "-" for value in (check.objective, check.again))
    apart = f"{check.difference:.2g} {check.score}" if check.difference else "0"
    output.print_text(f"{_MARKS[check.agreement]} {place:>8}  {then:>7}  {again:>7}  {apart}")
