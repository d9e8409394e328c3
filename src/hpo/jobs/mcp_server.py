"""A server of the Model Context Protocol: an assistant reads studies, trials and models, and runs them if allowed."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial, wraps
from pathlib import Path
from typing import Any

from hpo.errors import HpoError, ModelError, SpecError, redact
from hpo.home import Home
from hpo.records import FINAL, StudyResult, Trial, TrialState
from hpo.spec.files import study_files

_INSTRUCTIONS = (
    "Hyperparameter studies of image classifiers, run with `hpo`. Scores called valid_... are of validation images and "
    "were used to choose; only test_... scores of a model are unbiased."
)
_AT_ONCE = 3.0  # seconds in which a run that cannot begin ends
_MOST_TRIALS = 200  # of one answer


def make_server(home: str | Path | None = None, *, allow_run: bool = False) -> Any:
    """An mcp.server.mcpserver.MCPServer on a home; with allow_run, it also starts and stops studies.

    Raises HpoError where the package mcp is not installed.
    """
    if importlib.util.find_spec("mcp") is None:
        raise HpoError("the package mcp is not installed.", "Install the extra: uv sync --inexact --extra mcp")
    from mcp.server.mcpserver import MCPServer
    from mcp_types import ToolAnnotations

    server: Any = MCPServer("hpo", instructions=_INSTRUCTIONS)
    place = Home.find(home)
    reads = ToolAnnotations(read_only_hint=True, open_world_hint=False)
    for tool in _Reader(place).tools():
        server.add_tool(_told(tool), annotations=reads, structured_output=False)
    if allow_run:
        changes = ToolAnnotations(read_only_hint=False, destructive_hint=False, open_world_hint=False)
        for tool in _Runner(place).tools():
            server.add_tool(_told(tool), annotations=changes, structured_output=False)
    return server


def _told(tool: Callable[..., Any]) -> Callable[..., Any]:
    """The tool, whose user errors reach the assistant as one sentence, without secrets."""
    from mcp.server.mcpserver.exceptions import ToolError

    @wraps(tool)
    def call(*arguments: Any, **named: Any) -> Any:
        try:
            return tool(*arguments, **named)
        except HpoError as error:
            raise ToolError(redact(f"{error.message} {error.hint}")) from None

    return call


class _Reader:
    """The tools that only read."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def tools(self) -> list[Callable[..., Any]]:
        """The tools, whose names, docstrings and annotations are what an assistant sees."""
        return [
            self.available_studies,
            self.list_studies,
            self.list_trials,
            self.list_models,
            self.list_figures,
            self.show_figure,
        ]

    def available_studies(self) -> dict[str, Any]:
        """The study files at hand, by name, with the question that each is to answer."""
        from hpo.spec.load import read_yaml

        found: dict[str, Any] = {}
        for name, path in study_files().items():
            try:
                found[name] = read_yaml(path)[0].get("question", "")
            except SpecError as error:
                found[name] = f"broken: {error.message}"
        return found

    def list_studies(self) -> dict[str, Any]:
        """The studies that have run here: trials by state, whether they run now, and the best trial."""
        from hpo.storage.reader import read_snapshots

        listed = [
            {
                "study": each.study.title,
                "objective": each.study.objective,
                "direction": each.study.direction,
                "trials": {state.value: each.study.count(state) for state in TrialState if each.study.count(state)},
                "running_now": bool(each.holders),
                "best": _short(each.best) if each.best else None,
            }
            for each in read_snapshots(self._home, results=False)
        ]
        return {"studies": listed}

    def list_trials(self, study: str, best: int = 20) -> dict[str, Any]:
        """The best trials of a study, first the best, and how many there are of each state.

        study is a name of list_studies. best is the number of trials, 200 at most.
        """
        result = self._study(study)
        ranked = [*result.ranked(FINAL), *result.ranked()][: max(1, min(best, _MOST_TRIALS))]
        return {
            "study": result.title,
            "objective": result.objective,
            "counts": {state.value: result.count(state) for state in TrialState if result.count(state)},
            "trials": [_short(trial) for trial in ranked],
        }

    def list_models(self, name: str = "") -> dict[str, Any]:
        """The registered models with versions, aliases and scores; with a name only the versions of that model."""
        from hpo.tracking.registry import versions

        wanted = ("name", "version", "aliases", "study", "trial", "scores")
        return {"models": [{key: asdict(each)[key] for key in wanted} for each in versions(self._home, name or None)]}

    def list_figures(self, study: str) -> dict[str, Any]:
        """The names of a study's figures, for show_figure."""
        return {"figures": sorted(self._figures(self._study(study)))}

    def show_figure(self, study: str, name: str) -> Any:
        """One figure of a study as a PNG image; name is one of list_figures."""
        from mcp.server.mcpserver import Image

        found = self._figures(self._study(study))
        if name not in found:
            raise ModelError(f"{study}: there is no figure {name!r}.", f"Known: {', '.join(sorted(found)) or 'none'}.")
        return Image(data=found[name](), format="png")

    def _study(self, study: str) -> StudyResult:
        from hpo.storage.reader import list_trials

        return list_trials(self._home, study)

    def _figures(self, study: StudyResult) -> Mapping[str, Callable[[], bytes]]:
        """Name -> what reads the figure, of those in the study's run."""
        from hpo.tracking.runs import FIGURES, artifact, find_parent
        from hpo.tracking.store import connect, exists

        if not exists(self._home):
            return {}
        client = connect(self._home)
        parent = find_parent(client, study)
        if parent is None:
            return {}

        def read(path: str) -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                file = artifact(client, parent.info.run_id, path, folder)
                return file.read_bytes() if file is not None else b""

        listed = [file.path for file in client.list_artifacts(parent.info.run_id, FIGURES)]
        return {Path(path).stem: partial(read, path) for path in listed if path.endswith(".png")}


def _short(trial: Trial) -> dict[str, Any]:
    result = trial.result
    return {
        "trial": trial.number,
        "value": trial.value,
        "final": trial.candidate.stage == FINAL,
        "parameters": dict(trial.candidate.parameters),
        "scores": dict(result.scores) if result is not None else {},
        "seconds": result.seconds if result is not None else None,
    }


class _Runner:
    """The tools that change something, for which the user has given permission."""

    def __init__(self, home: Home) -> None:
        self._home = home

    def tools(self) -> list[Callable[..., Any]]:
        """The tools, as those of _Reader."""
        return [self.run_study, self.stop_study]

    def run_study(self, study: str, trials: int | None = None, minutes: float = 60.0) -> dict[str, Any]:
        """Start a study, or resume it, in the background; see list_studies for its progress.

        study is a name of available_studies. trials is the study's total, by default what its file says. The run ends
        after so many minutes.
        """
        if study not in study_files():
            raise SpecError(f"there is no study {study!r}.", "See available_studies; files elsewhere are not run.")
        self._check_idle(study)
        words = ["run", study, "--timeout", f"{max(1, round(60 * minutes))}", "--home", str(self._home.root.parent)]
        words += ["--trials", str(trials)] if trials is not None else []
        log = self._home.create().reports / f"{study}-run.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            begun = output.tell()
            process = subprocess.Popen(  # noqa: S603 - the name of a study at hand, and numbers
                [sys.executable, "-m", "hpo", *words],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            code = process.wait(_AT_ONCE)
        except subprocess.TimeoutExpired:
            return {"started": f"hpo {' '.join(words)}", "process": process.pid, "log": str(log)}
        if code:
            raise HpoError(
                f"hpo {' '.join(words)} failed: {log.read_bytes()[begun:].decode(errors='replace')[-2000:].strip()}", ""
            )
        return {"finished": f"hpo {' '.join(words)}", "log": str(log)}

    def _check_idle(self, study: str) -> None:
        """Raise HpoError where the study runs now."""
        from hpo.storage.reader import read_snapshots

        if any(each.holders and each.study.name == study for each in read_snapshots(self._home, results=False)):
            raise HpoError(f"{study} is running already.", "See list_studies, or end it first: stop_study.")

    def stop_study(self, study: str) -> str:
        """Stop a running study, as Ctrl-C does; run_study resumes it."""
        from hpo.jobs.stop import stop_study

        done = stop_study(study, home=self._home.root.parent, timeout=60.0)
        return f"{done.title}: {done.supervisors} runs stopped, {len(done.stopped)} trials will be retried"
