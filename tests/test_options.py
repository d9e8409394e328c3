"""RunOptions print the command line that they come from: a flag that is forgotten on the way fails here."""

from __future__ import annotations

import shlex
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from hpo.cli.app import app
from hpo.errors import HpoError
from hpo.options import RunOptions

WORDS = st.text("abc=/.[ ']\"$", min_size=1, max_size=8).filter(lambda text: not text.startswith("-"))
COUNTS = st.integers(1, 10**6)
# What a type's values are on a command line; the fields named here take only some of them.
OF_TYPE: dict[Any, st.SearchStrategy[Any]] = {
    bool: st.just(True),
    tuple[str, ...]: st.lists(WORDS, min_size=1, max_size=3).map(tuple),
    str | None: WORDS,
    str | Path | None: WORDS.map(Path),
    int | None: COUNTS,
    float | None: st.floats(0.001, 1e6),
}
OF_NAME = {
    "workers": st.integers(0, 10_000),
    "stack": st.integers(1, 10_000),
    "device": st.sampled_from(["cpu", "cuda", "cuda:1"]),
    "engine": st.sampled_from(["ray", "slurm", "in_process"]),
    "gpus_per_trial": st.just(1.0),
}
HINTS = get_type_hints(RunOptions)
VALUES = {
    part.name: OF_NAME[part.name] if part.name in OF_NAME else OF_TYPE[HINTS[part.name]] for part in fields(RunOptions)
}
ENGINE_OF = {part.name: part.metadata.get("engine") for part in fields(RunOptions)}
NOT_FOR = {part.name: part.metadata.get("not_for") for part in fields(RunOptions)}


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch):
    """parsed(words) -> the options that `hpo run` makes of them."""
    seen: list[RunOptions] = []
    monkeypatch.setattr("hpo.cli.run.start", lambda study, options, **display: seen.append(options))

    def parse(command: str) -> RunOptions:
        done = CliRunner().invoke(app, shlex.split(command)[1:])
        assert done.exit_code == 0, done.output
        return seen.pop()

    return parse


@st.composite
def some_options(draw: st.DrawFn) -> RunOptions:
    """Any subset of the fields that one engine can have."""
    engine = draw(st.sampled_from(["processes", "ray", "slurm"]))
    possible = [
        name for name in VALUES if ENGINE_OF[name] in (None, engine) and NOT_FOR[name] != engine and name != "engine"
    ]
    names = draw(st.sets(st.sampled_from(possible)))
    names -= {"extend"} if "fresh" in names else set()  # they exclude each other
    return RunOptions(engine=engine, **{name: draw(VALUES[name]) for name in sorted(names)})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(options=some_options())
def test_printed_command_parses_back_to_the_same_options(parsed, options):
    assert parsed(options.command_line("run", "digits-mlp")) == options


@pytest.mark.parametrize("name", VALUES)
def test_every_field_is_a_flag_of_hpo_run(parsed, name):
    engine = ENGINE_OF[name] or "processes"
    samples = {bool: True, tuple[str, ...]: ("a=1", "b=2"), str | Path | None: Path("x y"), int | None: 3}
    known = {"device": "cpu", "engine": "ray", "keep_models": "all", "precision": "float32", "address": "auto"}
    known["gpus_per_trial"] = 2.0
    value = known.get(name, samples.get(HINTS[name], 2.5))
    options = replace(RunOptions(engine=engine), **{name: value})
    command = options.command_line("run", "digits-mlp")
    assert command != replace(options, **{name: getattr(RunOptions(), name)}).command_line("run", "digits-mlp")
    assert parsed(command) == options


def test_the_command_that_resumes_a_study_repeats_all_but_what_concerns_one_run():
    options = RunOptions(workers=1, device="cpu", keep_models="best:2", fresh=True, retry_failed=True, timeout=60)
    assert options.to_resume().flags() == ["--workers", "1", "--device", "cpu", "--keep-models", "best:2"]


def test_a_job_of_a_scheduler_has_the_options_of_its_worker_and_no_other():
    options = RunOptions(engine="slurm", workers=8, stack=4, device="cuda", trust=True, slurm=("partition=gpu",))
    assert options.of_worker().flags() == ["--trust", "--stack", "4", "--device", "cuda"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"trials": 0}, "--trials 0: is not between 1 and"),
        ({"workers": -1}, "--workers -1: is not between 0 and 10,000"),
        ({"stack": 0}, "--stack 0: is not between 1 and"),
        ({"trials": 10**400}, r"--trials 1000000000\.\.\.: is not between 1 and 1,000,000,000"),
        ({"workers": 10**6}, "--workers 1000000: is not between 0 and 10,000"),
        ({"address": "auto"}, "--address: is only for --engine ray"),
        ({"engine": "ray", "detach": True}, "--detach: is only for --engine slurm"),
        ({"engine": "slurm", "timeout": 5.0}, "--timeout: is not for --engine slurm"),
    ],
)
def test_values_that_cannot_be_are_one_clear_error(given, message):
    with pytest.raises(HpoError, match=message) as error:
        RunOptions(**given)
    assert error.value.hint
