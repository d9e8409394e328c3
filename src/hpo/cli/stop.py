"""`hpo stop` and `hpo status`: stop running studies, and show what is running."""

from __future__ import annotations

import shlex
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hpo.cli.display import output
from hpo.cli.options import AsJson, Debug, HomeFolder, Study, read_duration, study_name
from hpo.errors import clean
from hpo.records import FINAL, TrialState
from hpo.report.text import duration

if TYPE_CHECKING:
    from hpo.storage.reader import StudySnapshot


def stop(
    study: Study,
    timeout: Annotated[
        float | None, typer.Option(parser=read_duration, metavar="TIME", help="How long to wait.", show_default="60")
    ] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Stop a running study from another terminal, as Ctrl-C does; the next hpo run resumes it.

    All its supervisors on the shared storage stop. Running trials are recorded as stopped and tried again.
    """
    from hpo.jobs.stop import stop_study

    def say(count: int) -> None:
        if not as_json:
            processes = "supervisor" if count == 1 else "supervisors"
            typer.echo(f"{clean(study)}: asked {count} {processes} to stop ...", err=True)

    done = stop_study(study_name(study), home=home, timeout=timeout or 60.0, watch=say)
    again = f"hpo run {shlex.quote(study)}" + (f" --home {shlex.quote(str(home))}" if home else "")
    if as_json:
        output.print_json({**output.plain(done), "next": again})
        return
    if not done.supervisors:
        output.print_text(f"{done.title}: nothing runs.")
        if done.asked:
            output.print_text("Idle workers on other machines stop too; workers that are still starting do not.")
        if done.abandoned:
            count = len(done.abandoned)
            trials = f"{count} trial{'s' * (count > 1)}"
            output.print_text(f"{trials} of a dead supervisor will be tried again by the next run: {again}")
        return
    count = len(done.stopped)
    words = "no trial was running" if not count else f"{count} trial{'s' * (count > 1)} stopped, to be tried again"
    output.print_text(f"{done.title}: stopped in {duration(done.seconds)}; {words}.")
    output.print_text(f"Resume with: {again}")


def status(
    study: Annotated[str | None, typer.Argument(help="Only this study.", show_default="all")] = None,
    home: HomeFolder = None,
    as_json: AsJson = False,
    _debug: Debug = False,
) -> None:
    """Show the progress of every study and its running supervisors; read-only."""
    from hpo.home import Home
    from hpo.storage.reader import read_snapshots

    place = Home.find(home)
    wanted = study_name(study) if study else None
    found = [one for one in read_snapshots(place, results=False) if wanted in (None, one.study.name, one.study.title)]
    if as_json:
        output.print_json([_facts(one) for one in found])
        return
    if not found:
        output.print_text(f"No study has run in {place.root}. Begin with: hpo run digits-mlp")
        return
    columns = ["study", "at work", ">running", ">complete", ">pruned", ">failed", ">of", "objective", ">best", ">trial"]
    output.print_table([_row(one) for one in found], columns)
    for one in found:
        for holder in one.holders:
            where = f"process {holder.pid} on {holder.host}" if holder.pid else f"a process on {holder.host}"
            since = f", for {duration(time.time() - holder.since)}" if holder.since else ""
            numbers = [str(trial.number) for trial in one.running if one.leases[trial.number] == holder.lease]
            trials = f", trial {', '.join(numbers)}" if numbers else ""
            output.print_text(f"{one.study.title}: {where}{since}{trials}")
    for one in found:
        if one.abandoned:
            count = len(one.abandoned)
            text = f"{count} trial{'s' * (count > 1)} of a dead supervisor: hpo run resumes, hpo doctor has details"
            output.print_warning(f"{one.study.title}: {text}")


def _row(one: StudySnapshot) -> list[str]:
    counts = _counts(one)
    workers = {(one.leases[trial.number], trial.worker) for trial in one.running}
    at_work = "-"
    if one.holders:
        runs = f"{len(one.holders)} runs, " if len(one.holders) > 1 else ""
        at_work = f"{runs}{len(workers)} worker{'s' * (len(workers) != 1)}"
    return [
        one.study.title,
        at_work,
        str(len(one.running) or ""),
        *(str(counts[state] or "") for state in (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAILED)),
        str(_budget(one) or ""),
        one.study.objective,
        output.show_score(one.best.value if one.best else None),
        str(one.best.number) if one.best else "",
    ]


def _counts(one: StudySnapshot) -> dict[TrialState, int]:
    searched = [trial.state for trial in one.study.counted if trial.candidate.stage != FINAL]
    return {state: searched.count(state) for state in TrialState}


def _budget(one: StudySnapshot) -> int | None:
    """The budget of the study in trials; None where it is the sum over stages, which only a running study knows."""
    search = one.study.spec.get("search") or {}
    return None if search.get("stages") else search.get("trials")


def _facts(one: StudySnapshot) -> dict[str, Any]:
    return {
        "study": one.study.title,
        "objective": one.study.objective,
        "budget": _budget(one),
        "trials": {state.value: count for state, count in _counts(one).items()},
        "supervisors": [output.plain(holder) for holder in one.holders],
        "workers": len({(one.leases[trial.number], trial.worker) for trial in one.running}),
        "running": [
            {"trial": t.number, "worker": t.worker, "seconds": time.time() - t.started, "lease": one.leases[t.number]}
            for t in one.running
        ],
        "abandoned": one.abandoned,
        "best": {"trial": one.best.number, "value": one.best.value} if one.best else None,
    }
