"""Lives, judges and the process of the kill suite that hang are ended in time, and their stacks are reported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

# In a process of its own, since whoever makes lives adopts and ends all that they leave.
HANGING = """
import os, sys, time
from pathlib import Path

import faults
from faults import Torment, watched
from lives import Child

folder = Path(sys.argv[2])


def stand_still(*_):
    time.sleep(600)


def with_a_child(say):
    if not os.fork():
        os.setsid()
        stand_still()
    stand_still()


def life():
    one = Child(with_a_child, folder / "log", folder, longest=1)
    code = one.join()
    print((folder / "log").read_text(), f"hung {one.hung}, exit code {code}, {len(one.left)} left")


def judge():
    faults.judge = stand_still
    torment = Torment(folder, longest=1)
    torment.judged(folder, "export", {})
    print(*torment.tally.findings.sentences)


def suite():
    print("exit code", watched(with_a_child, folder, longest=1))


globals()[sys.argv[1]]()
"""


@pytest.mark.parametrize(
    ("which", "ends"),
    [
        ("life", "hung True, exit code -9, 1 left"),
        ("judge", "judge of export): exit code -9, processes left []: It hangs, after"),
        ("suite", "exit code -9"),
    ],
)
def test_what_hangs_is_ended_in_time_and_the_stacks_of_its_processes_are_reported(tmp_path, which, ends):
    benchmarks = Path(__file__).parents[2] / "benchmarks"
    output = tmp_path / "output"
    with output.open("w") as file:
        code = subprocess.run(
            [sys.executable, "-c", HANGING, which, str(tmp_path)],
            stdout=file,
            stderr=file,
            cwd=benchmarks,
            timeout=200,
            check=False,
        ).returncode
    said = output.read_text()
    assert code == 0, said
    assert ends in said, said
    processes = 1 if which == "judge" else 2
    assert said.count("s of CPU") == processes, said
    assert said.count("in stand_still") == processes, said
