"""A progress bar for notebooks, which listens to the events of a run."""

from __future__ import annotations

import importlib
import sys
import time
from html import escape
from typing import Any

from hpo.events import Event, Notice, StudyEnded, StudyOpened, TrialEnded
from hpo.records import TrialState

_EVERY = 0.2  # seconds between two drawings


def in_notebook() -> bool:
    """True in a Jupyter kernel; IPython is not imported for it."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    return getattr(shell, "kernel", None) is not None


class ProgressBar:
    """Shows the number of finished trials, the best one and the last notice, in the cell that runs the study."""

    def __init__(self) -> None:
        self.text = "preparing"
        self.best = ""
        self.done = self.total = 0
        self._objective = ""
        self._handle: Any = None
        self._drawn = 0.0

    def __call__(self, event: Event) -> None:
        """Take up an event."""
        if isinstance(event, Notice):
            self.text = event.text
        elif isinstance(event, StudyOpened):
            self.total, self.done, self._objective = event.budget, event.finished, event.study.objective
            best = event.study.best
            self.best = self._words(best.value, best.number) if best is not None and best.value is not None else ""
            self.text = f"{event.workers} workers, {event.device}"
        elif isinstance(event, TrialEnded):
            result = event.result
            self.done += result.state.finished and self.done < self.total
            if event.best and result.value is not None:
                self.best = self._words(result.value, result.number)
            if result.state is TrialState.FAILED:
                self.text = f"trial {result.number} failed: {result.reason}"
        elif isinstance(event, StudyEnded):
            self.text = f"{event.model.name} version {event.model.version}" if event.model else event.reason.value
        self._draw(at_once=isinstance(event, StudyEnded | StudyOpened))

    def _words(self, value: float, number: int) -> str:
        return f"best {self._objective} {value:.4f}, trial {number}"

    def __repr__(self) -> str:
        return " · ".join(filter(None, (f"{self.done} of {self.total or '?'} trials", self.best, self.text)))

    def _repr_html_(self) -> str:
        share = f'value="{self.done}" max="{self.total}"' if self.total else ""
        return f'<progress {share} style="width:16rem"></progress> {escape(repr(self))}'

    def _draw(self, *, at_once: bool) -> None:
        now = time.monotonic()
        if self._handle is None:
            # IPython is no dependency: where a notebook runs, it is there.
            self._handle = importlib.import_module("IPython.display").display(self, display_id=True)
        elif at_once or now - self._drawn > _EVERY:
            self._handle.update(self)
            self._drawn = now
