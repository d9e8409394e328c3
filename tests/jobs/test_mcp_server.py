"""An assistant reads studies over the Model Context Protocol, and starts runs only with permission."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from hpo.errors import HpoError
from hpo.jobs.mcp_server import make_server
from hpo.search.lifecycle import opened
from hpo.storage.reader import read_snapshots

READ = {"available_studies", "list_studies", "list_trials", "list_models", "list_figures", "show_figure"}


@pytest.fixture
def mcp() -> Any:
    return pytest.importorskip("mcp", reason="the extra mcp is not installed")


def as_client(mcp: Any, server: Any, talk: Callable[[Any], Awaitable[Any]]) -> Any:
    """What talk answers, with a client of the package that is connected to the server."""

    async def run() -> Any:
        async with mcp.Client(server) as client:
            return await talk(client)

    return asyncio.run(run())


async def ask(client: Any, tool: str, **arguments: Any) -> Any:
    """The answer of a tool as plain data."""
    answer = await client.call_tool(tool, arguments)
    assert not answer.is_error, answer.content
    (part,) = answer.content
    return json.loads(part.text)


def test_by_default_every_tool_only_reads(mcp: Any, kept: Any) -> None:
    async def talk(client: Any) -> Any:
        return (await client.list_tools()).tools

    tools = as_client(mcp, make_server(kept.root.parent), talk)
    assert {tool.name for tool in tools} == READ
    assert all(tool.annotations.read_only_hint for tool in tools)
    assert all(tool.description for tool in tools)
    more = as_client(mcp, make_server(kept.root.parent, allow_run=True), talk)
    assert {tool.name for tool in more} - READ == {"run_study", "stop_study"}


def test_studies_trials_models_and_figures_are_read(mcp: Any, kept: Any) -> None:
    async def talk(client: Any) -> None:
        studies = (await ask(client, "list_studies"))["studies"]
        name = studies[0]["study"]
        assert studies[0]["trials"] == {"complete": 2, "pruned": 1, "failed": 1}
        trials = await ask(client, "list_trials", study=name, best=1)
        assert [(each["trial"], each["value"]) for each in trials["trials"]] == [(0, 0.9)]
        assert [each["version"] for each in (await ask(client, "list_models"))["models"]] == [1]
        assert "figures" in await ask(client, "list_figures", study=name)
        answer = await client.call_tool("list_trials", {"study": "nothing"})
        assert answer.is_error
        assert "no study" in answer.content[0].text.lower()
        assert "digits-mlp" in json.dumps(await ask(client, "available_studies"))

    before = {path: path.stat().st_mtime_ns for path in kept.root.rglob("*") if path.is_file()}
    as_client(mcp, make_server(kept.root.parent), talk)
    after = {path: path.stat().st_mtime_ns for path in kept.root.rglob("*") if path.is_file()}
    # SQLite's own files beside a database come and go.
    assert {path for path in before if path.suffix in (".db", ".json", ".pt2")} <= {*after}
    assert {path: time for path, time in after.items() if path.suffix == ".db"} == {
        path: time for path, time in before.items() if path.suffix == ".db"
    }


def test_without_the_package_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(HpoError, match="mcp is not installed") as caught:
        make_server()
    assert "--extra mcp" in caught.value.hint


def test_a_running_study_is_not_started_again_and_the_log_of_a_run_is_kept(
    mcp: Any, kept: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (title,) = {each.study.title for each in read_snapshots(kept)}
    monkeypatch.setattr("hpo.jobs.mcp_server.study_files", lambda: {title: Path("x.yaml")})
    log = kept.reports / f"{title}-run.log"
    log.parent.mkdir(exist_ok=True)
    log.write_text("of an earlier run\n")

    async def talk(client: Any) -> str:
        answer = await client.call_tool("run_study", {"study": title, "trials": -1})
        assert answer.is_error
        return str(answer.content[0].text)

    server = make_server(kept.root.parent, allow_run=True)
    told = as_client(mcp, server, talk)
    assert "of an earlier run" not in told
    assert log.read_text().startswith("of an earlier run\n")
    assert len(log.read_text()) > len("of an earlier run\n")
    with opened(kept, title) as study:
        study.listen()
        assert "running already" in as_client(mcp, server, talk)


@pytest.mark.timeout(300)
def test_the_studies_of_the_home_are_seen_and_run_wherever_the_server_is_started(mcp: Any, tmp_path: Path) -> None:
    project, elsewhere = tmp_path / "project", tmp_path / "elsewhere"
    (project / "studies").mkdir(parents=True)
    (elsewhere / "studies").mkdir(parents=True)
    space = "{{trials: 1, space: {{model.hidden: {{int: [4, 8]}}}}}}"
    study = f"data: {{{{name: npz, path: ../{{0}}.npz}}}}\nmodel: {{{{kind: mlp}}}}\nsearch: {space}\n"
    (project / "studies" / "mine.yaml").write_text("question: Mine?\n" + study.format("gone"))
    (elsewhere / "studies" / "theirs.yaml").write_text(study.format("other"))
    environment = {key: value for key, value in os.environ.items() if key != "HPO_HOME"}
    environment["HPO_DATA"] = str(tmp_path / "cache")

    async def talk(client: Any) -> str:
        found = await ask(client, "available_studies")
        assert found["mine"] == "Mine?"
        assert "theirs" not in found
        answer = await client.call_tool("run_study", {"study": "mine"})
        if answer.is_error:  # it ended at once
            return str(answer.content[0].text)
        log = Path(json.loads(answer.content[0].text)["log"])
        end = time.monotonic() + 200
        while time.monotonic() < end and "gone.npz" not in log.read_text():
            await asyncio.sleep(0.2)
        return log.read_text()

    words = ["-m", "hpo", "mcp", "--allow-run", "--home", "../project"]
    server = mcp.StdioServerParameters(command=sys.executable, args=words, env=environment, cwd=elsewhere)
    assert "gone.npz" in as_client(mcp, server, talk)
    assert not (elsewhere / "mlruns").exists()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_command_speaks_the_protocol_starts_a_study_with_permission_and_shows_its_figures(
    mcp: Any, digits_cache: Path, tmp_path: Path
) -> None:
    environment = {**os.environ, "HPO_DATA": str(digits_cache), "HPO_HOME": str(tmp_path)}

    def command(*words: str) -> Any:
        words = ("-m", "hpo", "mcp", *words)
        return mcp.StdioServerParameters(command=sys.executable, args=list(words), env=environment, cwd=tmp_path)

    async def refused(client: Any) -> None:
        with pytest.raises(Exception, match="run_study"):
            await ask(client, "run_study", study="digits-mlp", trials=1)
        assert await ask(client, "list_studies") == {"studies": []}

    async def allowed(client: Any) -> None:
        answer = await client.call_tool("run_study", {"study": "../elsewhere.yaml"})
        assert answer.is_error
        started = await ask(client, "run_study", study="digits-mlp", trials=1, minutes=20)
        assert "started" in started or "finished" in started
        end = time.monotonic() + 1000
        figures: list[str] = []
        while time.monotonic() < end and not figures:
            await asyncio.sleep(1)
            if (await ask(client, "list_studies"))["studies"]:
                figures = (await ask(client, "list_figures", study="digits-mlp"))["figures"]
        first = figures[0]
        (image,) = (await client.call_tool("show_figure", {"study": "digits-mlp", "name": first})).content
        assert base64.b64decode(image.data).startswith(b"\x89PNG")

    as_client(mcp, command(), refused)
    as_client(mcp, command("--allow-run"), allowed)
