"""End a running study from anywhere, as cleanly as Ctrl-C does."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import StoreError
from hpo.home import Home
from hpo.records import TrialState
from hpo.storage.reader import StudySnapshot, read_snapshots

_TICK = 0.25  # seconds between looks


@dataclass(frozen=True)
class Stop:
    """What a stop came to. supervisors is how many had the study and have ended; 0: none was seen.

    asked: on a shared storage supervisors of other machines that only wait are not seen, and stop as well; one that has
    not opened the study yet, because it still prepares its images, does not.
    stopped are the trials that were cut short and will be tried again; abandoned the trials of dead supervisors.
    """

    title: str
    supervisors: int
    stopped: tuple[int, ...] = ()
    abandoned: tuple[int, ...] = ()
    seconds: float = 0.0
    asked: bool = False


def stop_study(
    study: str,
    *,
    home: str | Path | None = None,
    timeout: float = 60.0,
    watch: Callable[[int], None] | None = None,
) -> Stop:
    """Ask every supervisor of a study to stop, on all machines that share its storage, and wait until they have.

    What they train is recorded as stopped and tried again by the next run. timeout is in seconds; a run that is begun
    later is not stopped. watch is called once with the number of supervisors. Raises StoreError where there is no such
    study, or where a supervisor is still there when the time is up.
    """
    from hpo.search.lifecycle import ask_to_stop

    place = Home.find(home)
    before = find_study(place, study)
    title = before.study.title
    if not before.holders and not place.shared:
        return Stop(title, 0, abandoned=before.abandoned)
    if watch is not None and before.holders:
        watch(len(before.holders))
    began = time.monotonic()
    running = {trial.number for trial in before.running}
    asked = {holder.lease for holder in before.holders}
    ask_to_stop(place, title, uuid.uuid4().hex)
    while True:
        time.sleep(_TICK)
        now = find_study(place, before.study.exact)
        left = [holder for holder in now.holders if holder.lease in asked]
        if not left:
            break
        if time.monotonic() - began > timeout:
            who = ", ".join(f"process {one.pid} on {one.host}" if one.pid else one.host for one in left)
            raise StoreError(
                f"{title}: still running after {timeout:.0f} s: {who}.",
                "It stops once it has put away what it trained; wait longer with --timeout, or press Ctrl-C there.",
            )
    # A trial that was handed out between the look and the stop was stopped too.
    cut = [
        trial.number
        for trial in now.study.trials
        if trial.state is TrialState.STOPPED and (trial.number in running or trial.number >= len(before.study.trials))
    ]
    return Stop(title, len(asked), tuple(cut), now.abandoned, time.monotonic() - began, asked=True)


def find_study(home: Home, name: str) -> StudySnapshot:
    """The newest generation of a study, or the one with exactly this title. Raises StoreError."""
    found = read_snapshots(home, results=False)
    newest = [one for one in found if one.study.name == name]
    exact = [one for one in found if one.study.exact == name]
    chosen = exact if "~" in name else newest
    if not chosen:
        known = ", ".join(one.study.title for one in found) or "none"
        raise StoreError(
            f"{home.root}: no study {name!r} has run here (known: {known}).", "Name its folder: --home DIR."
        )
    return max(chosen, key=lambda one: one.study.generation)
