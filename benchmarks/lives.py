"""Forked lives of a run: what one says and prints, its processes, and their deaths."""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import json
import math
import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import util
from pathlib import Path
from typing import Any

from agreement import Seen
from hpo.errors import HpoError
from hpo.records import TrialState

Job = Callable[[Callable[[dict[str, Any]], object]], int | None]  # job(say), which may answer an exit code

LONGEST = 180.0  # seconds of a life; they take 2 to 20
_LAST = 20.0  # seconds in which its processes end after it
_PDEATHSIG, _SUBREAPER = 1, 36  # of prctl: who dies with its parent, and who is given the orphans of its children


@dataclass(frozen=True)
class Process:
    """A process as /proc shows it."""

    pid: int
    parent: int
    state: str
    cpu_seconds: float

    def __str__(self) -> str:
        """Where it is, for a reader who looks for what hangs."""
        folder, words = Path(f"/proc/{self.pid}"), []
        for name in ("wchan", "cmdline"):
            with contextlib.suppress(OSError):
                words.append((folder / name).read_text().replace("\0", " ")[:200])
        return " ".join([f"{self.pid} of {self.parent}: {self.state}, {self.cpu_seconds:.1f} s of CPU,", *words])


def descendants(pid: int) -> list[Process]:
    """The children of a process, then theirs."""
    children: dict[int, list[Process]] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            facts = (entry / "stat").read_text().rpartition(")")[2].split()
            seconds = (int(facts[11]) + int(facts[12])) / os.sysconf("SC_CLK_TCK")
            one = Process(int(entry.name), int(facts[1]), facts[0], seconds)
            children.setdefault(one.parent, []).append(one)
    found = children.get(pid, [])
    for one in found:
        found += children.get(one.pid, [])
    return found


def members(main: int, kind: str) -> list[int]:
    """The workers of a run, or its helper, which is nicer by 5: the children of its fork server."""
    nice, found = os.getpriority(os.PRIO_PROCESS, main), []
    family = descendants(main)
    servers = {one.pid for one in family if one.parent == main}
    for pid in [one.pid for one in family if one.parent in servers]:
        with contextlib.suppress(ProcessLookupError):
            if (os.getpriority(os.PRIO_PROCESS, pid) > nice) == (kind == "helper"):
                found.append(pid)
    return found


class Child:
    """A forked life: job(say) in a session of its own; what it says and prints, and when.

    It hangs if it has not ended at `until`. Who makes one adopts its orphans, has one at a time, and has no other
    children. Without a log it prints where its parent does.
    """

    def __init__(self, job: Job, log: Path | None, folder: Path, *, longest: float = LONGEST) -> None:
        ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0)
        self._lines, write = os.pipe()
        self.log, self.began, self.ended_trials = log, time.monotonic(), 0
        self.until = self.began + longest
        self.results: Seen = {}
        self.said: dict[str, Any] = {}
        self.left: list[int] = []
        self.hung = False
        self._rest = b""
        self.pid = os.fork()
        if not self.pid:
            _live(job, log, folder, write)
        os.close(write)

    def wait_for(self, wanted: Callable[[str], bool], timeout: float = math.inf) -> bool:
        """Until it says something that is wanted; False if it ended before, or hangs."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < min(deadline, self.until):
            while b"\n" in self._rest:
                line, _, self._rest = self._rest.partition(b"\n")
                if wanted(self._hear(json.loads(line))):
                    return True
            if select.select([self._lines], [], [], 0.1)[0]:
                heard = os.read(self._lines, 1 << 16)
                if not heard:
                    return False
                self._rest += heard
            elif self.ended:  # though one that it has started may still hold its pipe
                return False
        return False

    def _hear(self, said: dict[str, Any]) -> str:
        self.said = said
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
        """Its exit code, and the end of all that it has started: who is left after that is killed, and told."""
        self.wait_for(lambda _: False)
        if not _within(max(1.0, self.until - time.monotonic()), lambda: self.ended):
            self.hung = True
            self._tell_where()
            os.killpg(self.pid, signal.SIGKILL)
        os.close(self._lines)
        _within(_LAST, lambda: self.ended and not self._others())
        self.left = self._others()
        for pid in self.left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not _within(_LAST, lambda: self.ended):
            raise TimeoutError(f"SIGKILL does not end process {self.pid}")
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _tell_where(self) -> None:
        """Write its processes, and the stack of every thread of each, to its log."""
        with open(self.log or 2, "a", closefd=bool(self.log)) as log:
            log.write(f"It hangs, after {time.monotonic() - self.began:.0f} s. Its processes, then their stacks:\n")
            family = descendants(os.getpid())
            log.writelines(f"{one}\n" for one in family)
            for one in family:
                log.write(f"Process {one.pid}:\n")
                log.flush()
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGUSR1)  # which they inherit from _live
                    time.sleep(0.2)

    def _others(self) -> list[int]:
        """The processes that it has started; ended ones are buried on the way."""
        found = []
        for one in descendants(os.getpid()):
            if one.state == "Z" and one.parent == os.getpid() and one.pid != self.pid:
                os.waitpid(one.pid, os.WNOHANG)
            elif one.pid != self.pid:
                found.append(one.pid)
        return found


def _within(seconds: float, done: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not (well := done()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return well


def _live(job: Job, log: Path | None, folder: Path, write: int) -> None:
    """Be a life: never returns."""
    code = 70
    try:
        os.setsid()
        ctypes.CDLL(None).prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if log:
            output = os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
            for number in (1, 2):
                os.dup2(output, number)
            sys.stdout = sys.stderr = os.fdopen(output, "w", buffering=1)
        faulthandler.register(signal.SIGUSR1, file=2)
        os.chdir(folder)
        util.spawnv_passfds = _fork_instead
        code = job(lambda said: os.write(write, json.dumps(said).encode() + b"\n")) or 0
    except HpoError as error:
        print(f"HpoError: {error}")
        code = 1
    except BaseException:  # noqa: BLE001 - it goes to the log, which is read
        traceback.print_exc()
    finally:
        from hpo.execute.process import end_fork_server

        end_fork_server()
        sys.stdout.flush()
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
