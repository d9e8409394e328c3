from __future__ import annotations

import multiprocessing
import os
import signal
import socket

from hpo.storage.liveness import Lease, clean_leases

FORK = multiprocessing.get_context("fork")


def _hold(folder, names):
    lease = Lease(folder, shared=False)
    names.put(lease.name)
    signal.pause()


def test_lease_of_a_killed_process_is_dead_at_once(tmp_path):
    names = FORK.Queue()
    holder = FORK.Process(target=_hold, args=(tmp_path, names))
    holder.start()
    name = names.get(timeout=30)
    mine = Lease(tmp_path, shared=False)
    assert mine.is_held(name)
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    assert not mine.is_held(name)
    assert mine.is_held(mine.name)
    mine.close()


def test_cleaning_removes_dead_leases_and_keeps_live_ones(tmp_path):
    (tmp_path / "lease-dead.lock").touch()
    live = Lease(tmp_path, shared=False)
    clean_leases(tmp_path)
    assert [path.name for path in tmp_path.glob("lease-*.lock")] == [live.name]
    live.close()
    assert not list(tmp_path.glob("lease-*.lock"))


def test_lease_is_near_only_on_the_machine_and_in_the_folder_of_its_lock(tmp_path):
    mine, other = Lease(tmp_path, shared=True), tmp_path / "other"
    other.mkdir()
    assert mine.is_near(mine.name)
    assert mine.is_held(mine.name)
    host, folder, file = mine.name.split("|")
    assert host == socket.gethostname()
    assert not mine.is_near(f"elsewhere|{folder}|{file}")
    theirs = Lease(other, shared=True)  # a container with the same name, and a disk of its own
    assert not mine.is_near(theirs.name)
    gone = f"{host}|{folder}|lease-x.lock"
    assert mine.is_near(gone)
    assert not mine.is_held(gone)
    mine.close()
    theirs.close()
