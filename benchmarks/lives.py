"""Forked lives of a run: what one says and prints, its processes, and their deaths."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing import util
from pathlib import Path
from typing import Any

from agreement import Seen
from hpo.errors import HpoError
from hpo.records import TrialState

LONGEST = 180.0  # seconds of a life; they take 2 to 20


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text().split())
    return found


def members(main: int, kind: str) -> list[int]:
    """The workers of a run, or its helper, which is nicer by 5: the children of its fork server."""
    nice, found = os.getpriority(os.PRIO_PROCESS, main), []
    for pid in [pid for server in _children(main) for pid in _children(server)]:
        with contextlib.suppress(ProcessLookupError):
            if (os.getpriority(os.PRIO_PROCESS, pid) > nice) == (kind == "helper"):
                found.append(pid)
    return found


class Child:
    """A forked life: job(say) in a session of its own; what it says and prints, and when."""

    def __init__(self, job: Callable[[Callable[[dict[str, Any]], None]], None], log: Path, folder: Path) -> None:
        self._lines, write = os.pipe()
        self.log, self.began, self.ended_trials = log, time.monotonic(), 0
        self.results: Seen = {}
        self.code: int | None = None
        self.hung = False
        self._rest = b""
        self.pid = os.fork()
        if not self.pid:
            _live(job, log, folder, write)
        os.close(write)

    def wait_for(self, wanted: Callable[[str], bool], timeout: float = LONGEST) -> bool:
        """Until it says something that is wanted; False if it ended before, or has lived for too long."""
        deadline = min(time.monotonic() + timeout, self.began + LONGEST)
        while time.monotonic() < deadline:
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                if wanted(self._hear(json.loads(line))):
                    return True
            if select.select([self._lines], [], [], 0.1)[0]:
                heard = os.read(self._lines, 1 << 16)
                if not heard:
                    return False
                self._rest += heard
        return False

    def _hear(self, said: dict[str, Any]) -> str:
        if "finished" in said:
            self.ended_trials = said["finished"]
        if "number" in said and TrialState(said["state"]).finished:
            self.ended_trials += 1
            self.results[said["number"]] = (said["state"], said["value"])
        return str(said["event"])

    def kill(self, target: str, chance: random.Random) -> str:
        """SIGKILL of one of that kind, or of main where there is none; says of whom, "" where it has ended."""
        if self.ended:
            return ""
        victims = members(self.pid, target) if target in ("worker", "helper") else []
        if target == "all":
            os.killpg(self.pid, signal.SIGKILL)
        else:
            os.kill(chance.choice(victims) if victims else self.pid, signal.SIGKILL)
        return target if victims or target == "all" else "main"

    @property
    def ended(self) -> bool:
        """Whether its process has."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def join(self) -> int:
        """Its exit code, and the end of all that it has started: who is left after that is killed, and told.

        One that lives for too long writes the stack of every thread of its processes to its log before it is killed.
        """
        self.wait_for(lambda _: False)
        deadline = time.monotonic() + 20
        while not self.ended and time.monotonic() < deadline:
            time.sleep(0.01)
        if not self.ended:
            self.hung = True
            os.killpg(self.pid, signal.SIGUSR1)
            time.sleep(1)
            os.killpg(self.pid, signal.SIGKILL)
        while not self.ended:
            time.sleep(0.01)
        os.close(self._lines)
        deadline = time.monotonic() + 20
        left = self._session()
        while left and time.monotonic() < deadline:
            time.sleep(0.02)
            left = self._session()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.left = left
        _, status = os.waitpid(self.pid, 0)
        self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def _session(self) -> list[int]:
        """The processes of its session but itself; ended ones are buried on the way."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                _, _, facts = (entry / "stat").read_text().rpartition(")")
                state, parent, _, session = facts.split()[:4]
                pid = int(entry.name)
                if int(session) != self.pid or pid == self.pid:
                    continue
                if state == "Z" and int(parent) == os.getpid():
                    os.waitpid(pid, os.WNOHANG)
                else:
                    found.append(pid)
        return found


def _live(job: Callable[[Callable[[dict[str, Any]], None]], None], log: Path, folder: Path, write: int) -> None:
    """Be a life: never returns."""
    code = 70
    try:
        os.setsid()
        output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        for number in (1, 2):
            os.dup2(output, number)
        faulthandler.register(signal.SIGUSR1, file=2)
        sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        os.chdir(folder)
        util.spawnv_passfds = _fork_instead
        job(lambda said: os.write(write, json.dumps(said).encode() + b"\n"))  # type: ignore[func-returns-value]
        code = 0
    except HpoError as error:
        print(f"HpoError: {error}")
        code = 1
    except BaseException:  # noqa: BLE001 - it goes to the log, which is read
        traceback.print_exc()
    finally:
        from hpo.execute.process import end_fork_server

        end_fork_server()
        os._exit(code)


_spawn = util.spawnv_passfds


def _fork_instead(path: str, arguments: list[Any], descriptors: list[int]) -> int:
    """Start multiprocessing's fork server as a fork of this process, which has imported all that it imports."""
    command = os.fsdecode(arguments[-1])
    if "forkserver" not in command:
        return int(_spawn(path, arguments, descriptors))
    pid = os.fork()
    if pid:
        return pid
    try:
        low = 3
        for number in sorted(descriptors):
            os.closerange(low, number)
            low = number + 1
        os.closerange(low, 1 << 16)
        exec(command, {})  # noqa: S102 - what multiprocessing would have given to a new interpreter
    finally:
        os._exit(0)
