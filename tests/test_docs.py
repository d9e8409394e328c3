"""The pages build strictly, stand alone, and say nothing that the code does not know."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import typer
import yaml

from hpo import distribution
from hpo.cli.app import SECTIONS, app, load_command
from hpo.spec.files import places, study_files
from hpo.spec.load import StudyLoader, load_study

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [*(ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG")), *sorted(DOCS.glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a snippet of a study file leaves out.
_REST = {
    "data": {"name": "digits"},
    "model": {"kind": "mlp"},
    "search": {"space": {"training.label_smoothing": {"float": [0.0, 0.1]}}},
}


class _Page(HTMLParser):
    """The ids of a page, what it links to, and what a browser fetches to show it."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id" and value:
                self.ids.add(value)
            elif name == "href" and value and tag == "a":
                self.links.append(value)
            elif name in ("href", "src") and value:
                self.fetched.append(value)


@pytest.mark.slow
def test_site_builds_strictly_links_nowhere_wrong_and_fetches_nothing(tmp_path):
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-n", "-q", "-d", str(tmp_path / "cache")]
    site = tmp_path / "site"
    done = subprocess.run([*command, str(DOCS), str(site)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    pages = {path: _Page(path) for path in site.rglob("*.html")}
    assert len(pages) >= len(PAGES) - 3
    for path, page in pages.items():
        for link in [*page.links, *page.fetched]:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                assert link in page.links, f"{path.name} fetches {link}"
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            assert target.is_file(), f"{path.name} links to {link}"
            # The search page makes its anchors itself.
            if parts.fragment and target in pages and not parts.query:
                assert unquote(parts.fragment) in pages[target].ids, f"{path.name} links to {link}"
    for style in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", style.read_text(encoding="utf-8")), style


def test_reference_is_what_the_schema_says():
    made = runpy.run_path(str(DOCS / "make_reference.py"))
    assert made["reference"]() == (DOCS / "reference.md").read_text(encoding="utf-8"), "run: docs/make_reference.py"
    assert made["places"]().split() == places(), "run: python docs/make_reference.py"


def test_the_index_names_each_page_by_a_task():
    tasks = (DOCS / "index.md").read_text(encoding="utf-8").partition("```{toctree}")[0]
    pages = {page.name for page in DOCS.glob("*.md")} - {"index.md"}
    assert set(re.findall(r"\]\(([\w-]+\.md)", tasks)) == pages


def test_cli_page_has_every_command_and_option():
    made = runpy.run_path(str(DOCS / "make_cli.py"))["cli_page"]()
    assert made == (DOCS / "cli.md").read_text(encoding="utf-8"), "run: python docs/make_cli.py"


def test_python_page_has_every_function():
    made = runpy.run_path(str(DOCS / "make_python.py"))["python_page"]()
    assert made == (DOCS / "python.md").read_text(encoding="utf-8"), "run: python docs/make_python.py"


def _commands(page: Path) -> list[str]:
    """Every line of a code block, and every piece of code in a sentence, that begins with hpo and a blank."""
    text = page.read_text(encoding="utf-8")
    blocks = [body for language, body in _FENCE.findall(text) if language in ("", "sh", "bash")]
    prose = _FENCE.sub("", text)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line.strip() for line in prose.splitlines() if line.startswith("    ")]
    found = [line.removeprefix("uv run ").removeprefix("$ ") for line in lines]
    found += [piece.replace("\n", " ") for piece in re.findall(r"`(hpo [^`]*)`", prose)]
    found += re.findall(r"uv run (hpo [^#\n]*)", "\n".join(lines))
    return [line for line in found if line.startswith("hpo ")]


@pytest.fixture(scope="module")
def program():
    """The commands of hpo as click has them; making them takes a second."""
    group = typer.main.get_command(app)
    for name in group.commands:
        group.commands[name] = load_command(name)
    return group


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_on_a_page_parses(page, program):
    text = page.read_text(encoding="utf-8")
    # photos is a folder of the reader's images, which `hpo run` takes in place of a study.
    known = {*study_files(), *re.findall(r"studies/([\w-]+)\.yaml", text), "STUDY", "photos"}
    _parse(_commands(page), program, known, page.name)


def test_every_example_of_help_parses(program):
    lines = [f"hpo {name} {listed.example}" for rows in SECTIONS.values() for name, listed in rows.items()]
    _parse(lines, program, set(study_files()), "--help")


def _parse(lines, program, known, place):
    for line in lines:
        assert "--install-completion" not in line, f"{place}: parsing it would change the shell of this machine"
        words = shlex.split(re.split(r"\s#|\s[|>]|&&", line)[0])[1:]
        # A number may stand as N.
        words = ["1" if word == "N" else word for word in words]
        command, name = program, words[0]
        while words and hasattr(command, "commands") and not words[0].startswith("-"):
            assert words[0] in command.commands, f"{place}: {line}"
            command = command.commands[words.pop(0)]
        try:
            study = command.make_context(name, words).params.get("study") if words else None
        except typer.Exit:
            continue  # --help and --version
        except Exception as error:  # noqa: BLE001 - told with the line
            # In a sentence, a command may be named without what it needs.
            if type(error).__name__ != "MissingParameter":
                pytest.fail(f"{place}: {line}: {error}")
            continue
        if name in ("run", "check", "show", "preview") and study and not study.endswith((".yaml", ".yml")):
            assert study in known, f"{place}: {line}: there is no such study"


def test_the_image_copies_what_there_is_and_its_commands_parse(program):
    """No builder of images is needed to see that."""
    text = (ROOT / "Containerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE) for name in line.split()]
    assert {"pyproject.toml", "src", "studies"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert f"!{name}\n" in (ROOT / ".containerignore").read_text(encoding="utf-8"), name
    assert (ROOT / ".containerignore").read_bytes() == (ROOT / ".dockerignore").read_bytes()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = [project["readme"], *project["license-files"], "constraints.txt"]
    assert set(needed) <= set(copied)
    (extras,) = re.findall(r'"\.\[([\w,]+)\]"', text)
    assert set(extras.split(",")) <= set(project["optional-dependencies"])
    (python,) = re.findall(r"^FROM python:(3\.\d+)-slim$", text, re.MULTILINE)
    assert f"Programming Language :: Python :: {python}" in project["classifiers"]
    commands = re.findall(r"registry\.example/hpo:1 (hpo .+)$", text, re.MULTILINE)
    assert len(commands) == 2
    (default,) = map(json.loads, re.findall(r"^CMD (.+)$", text, re.MULTILINE))
    _parse([*commands, " ".join(default)], program, set(), "Containerfile")


def test_the_citation_has_the_version_and_the_licence():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert cited["version"] == distribution.VERSION
    assert cited["title"].startswith(distribution.NAME)
    assert {"cff-version", "message", "title", "authors", "license"} <= set(cited)
    assert f"## {distribution.VERSION}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_study_on_a_page_is_valid(page, tmp_path):
    for language, body in _FENCE.findall(page.read_text(encoding="utf-8")):
        if language != "yaml":
            continue
        given = yaml.load(body, StudyLoader)  # noqa: S506 - a SafeLoader
        study = {**_REST, **given}
        if "space" not in study["search"] and "stages" not in study["search"]:
            study["search"] = {**_REST["search"], **study["search"]}
        file = tmp_path / "snippet.yaml"
        file.write_text(yaml.safe_dump(study), encoding="utf-8")
        load_study(file, trust=True)  # as if it lay where its reader works


def test_every_promise_of_the_threat_model_has_a_test():
    text = (DOCS / "threat-model.md").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^\| .*\|$", text, re.MULTILINE) if not row.startswith("| promise ")]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`([\w/]+\.py)::(\w+)`", row.rstrip("| ").rpartition("|")[2])
        assert named, row
        for path, name in named:
            assert f"\ndef {name}(" in (ROOT / "tests" / path).read_text(encoding="utf-8"), f"{path}::{name}"
