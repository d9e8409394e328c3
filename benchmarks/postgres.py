"""A PostgreSQL server of one's own, for tests and benchmarks: in a new folder, on a free port, gone with the block."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PASSWORD = "a-word-of-tests"  # noqa: S105 - of a server that nobody else reaches


def binaries() -> Path | None:
    """The folder of initdb and pg_ctl; None where PostgreSQL is not installed."""
    found = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    found += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)  # where Debian puts them
    return next((folder for folder in found if (folder / "initdb").is_file()), None)


@dataclass(frozen=True)
class Server:
    """A running server; its superuser is hpo."""

    folder: Path
    port: int

    def url(self, database: str = "postgres") -> str:
        """The address of one of its databases, with the password."""
        return f"postgresql://hpo:{PASSWORD}@127.0.0.1:{self.port}/{database}"

    def make(self, database: str) -> str:
        """Make an empty database and return its address."""
        self.sql(f'CREATE DATABASE "{database}"')
        return self.url(database)

    def sql(self, *statements: str) -> None:
        """Have it run statements, one transaction each."""
        import psycopg

        with psycopg.connect(self.url(), autocommit=True) as connection:
            for statement in statements:
                connection.execute(statement.encode())

    def control(self, *words: str) -> None:
        """pg_ctl: start, stop, restart."""
        data, log = str(self.folder / "data"), str(self.folder / "log")
        _run("pg_ctl", "-D", data, "-l", log, "-w", *words)


@contextmanager
def server(settings: Mapping[str, str] | None = None) -> Iterator[Server]:
    """Start a server, with these settings of postgresql.conf; only passwords open it."""
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "word").write_text(PASSWORD, encoding="ascii")
    if os.geteuid() == 0:  # it refuses to run as root
        shutil.chown(folder, "postgres")
        shutil.chown(folder / "word", "postgres")
    made = Server(folder, port)
    try:
        words = ["-U", "hpo", "-A", "scram-sha-256", "--pwfile", str(folder / "word"), "--no-sync"]
        _run("initdb", "-D", str(folder / "data"), *words)
        options = {
            "listen_addresses": "127.0.0.1",
            "port": str(port),
            "unix_socket_directories": "",
            **(settings or {}),
        }
        with (folder / "data" / "postgresql.conf").open("a", encoding="ascii") as file:
            file.writelines(f"{name} = '{value}'\n" for name, value in options.items())
        made.control("start")
        yield made
    finally:
        if (folder / "data" / "postmaster.pid").exists():
            made.control("stop", "-m", "immediate")
        shutil.rmtree(folder, ignore_errors=True)


def _run(program: str, *words: str) -> None:
    folder = binaries()
    if folder is None:
        raise RuntimeError("PostgreSQL is not installed: apt-get install postgresql")
    options: dict[str, Any] = {"user": "postgres"} if os.geteuid() == 0 else {}
    subprocess.run([str(folder / program), *words], check=True, stdout=subprocess.DEVNULL, cwd="/", **options)
