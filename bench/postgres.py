"""A PostgreSQL server of its own in a temporary folder, for tests and measurements with several servers on one store.

It listens to a socket in its folder only, so it never meets another PostgreSQL.
"""

from __future__ import annotations

import glob
import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress

import sqlalchemy as sql

USER = "postgres"
"""The user of the system under whom the server runs if this process is root's, which PostgreSQL refuses."""
START_SECONDS = 30


def program(name: str) -> str | None:
    """Return the path of a program of PostgreSQL, or None. Debian keeps them outside of PATH."""
    known = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"))
    return known[-1] if known else shutil.which(name)


class Postgres:
    """A server that can be stopped and started. ``url`` is SQLAlchemy's address of its first database."""

    def __init__(self) -> None:
        self.folder = tempfile.mkdtemp(prefix="herd-pg-")
        self._process: subprocess.Popen[bytes] | None = None
        self._as_user = {}
        if os.getuid() == 0:
            shutil.chown(self.folder, USER, USER)
            self._as_user = {"user": USER, "group": USER, "extra_groups": ()}
        words = [program("initdb"), "-D", f"{self.folder}/data", "-A", "trust", "-U", "herd", "--no-sync"]
        subprocess.run(
            [*words, "-E", "UTF8"], check=True, capture_output=True, cwd=self.folder, **self._as_user
        )
        self.url = f"postgresql+psycopg://herd@/postgres?host={self.folder}"

    def start(self) -> None:
        """Start the server, and return when it answers."""
        words = [program("postgres"), "-D", f"{self.folder}/data", "-k", self.folder]
        words += ["-c", "listen_addresses=", "-c", "fsync=off", "-c", "max_connections=200"]
        self._process = subprocess.Popen(
            words, cwd=self.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **self._as_user
        )
        end = time.monotonic() + START_SECONDS
        while not self._answers():
            assert self._process.poll() is None, "PostgreSQL ended at its start"
            assert time.monotonic() < end, "PostgreSQL does not answer"
            time.sleep(0.05)

    def stop(self) -> None:
        """End the server at once, as a crash does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait()
            self._process = None

    def database(self, name: str) -> str:
        """Make an empty database and return its URL."""
        engine = sql.create_engine(self.url, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        engine.dispose()
        return self.url.replace("/postgres?", f"/{name}?")

    def close(self) -> None:
        """End the server and delete its folder."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        engine = sql.create_engine(self.url)
        with suppress(sql.exc.OperationalError), engine.connect():
            return True
        return False
