"""Heartbeats of the servers on one shared database, to tell a dead server from a busy one.

Each server increments the count in its row of the table ``servers``, and watches the rows of the others. A
server whose count did not change for `LEASE_SECONDS`, in which the database always answered, is considered
dead: its machine is lost, and with it the counters of its open requests. Only counts are compared, so the
clocks of the machines may differ.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

import sqlalchemy as sql

from .errors import StoreError
from .store import Store
from .tables import servers

log = logging.getLogger("herd.serve")

BEAT_SECONDS = 5.0
LEASE_SECONDS = 900.0
"""A server that starts again within this time settles its requests from its counters."""


class Leases:
    """A thread that sends the heartbeats of the server ``name``, and notices dead servers.

    It calls ``settle_dead`` with the name of each dead server, and then deletes the server's row.
    """

    def __init__(
        self,
        store: Store,
        name: str,
        settle_dead: Callable[[str], object],
        beat_seconds: float = BEAT_SECONDS,
        lease_seconds: float = LEASE_SECONDS,
    ) -> None:
        self._store, self._name, self._settle_dead = store, name, settle_dead
        self._beat_seconds, self._lease_seconds = beat_seconds, lease_seconds
        self._seen: dict[str, tuple[int, float]] = {}  # the count of each other server, and since when
        self._closing = threading.Event()
        self.beat()
        self._thread = threading.Thread(target=self._run, name="herd-leases", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Send a heartbeat, and settle dead servers. Raises `StoreError` if the store is unavailable."""
        mine = servers.c.name == self._name
        count_up = servers.update().where(mine).values(beats=servers.c.beats + 1)
        with self._store.write() as connection:
            if connection.execute(count_up).rowcount == 0:
                connection.execute(servers.insert().values(name=self._name, beats=1))
            others = connection.execute(sql.select(servers).where(~mine)).all()
        now, before = time.monotonic(), self._seen
        unchanged = {name for name, beats in others if name in before and before[name][0] == beats}
        self._seen = {name: (beats, before[name][1] if name in unchanged else now) for name, beats in others}
        for name, (beats, since) in list(self._seen.items()):
            if now - since >= self._lease_seconds:
                log.warning("server %s sends no heartbeat: its reservations are released", name)
                self._settle_dead(name)
                self.forget(name, beats)

    def close(self, *, signs_off: bool) -> None:
        """Stop, and delete the row of this server if it has nothing left open."""
        self._closing.set()
        self._thread.join()
        try:
            if signs_off:
                self.forget(self._name)
        except StoreError as error:
            log.warning("this server could not sign off: %s", error)

    def forget(self, name: str, beats: int | None = None) -> None:
        """Delete the row of a server, unless it has sent a heartbeat since ``beats``."""
        where = servers.c.name == name
        if beats is not None:
            where = sql.and_(where, servers.c.beats == beats)
        with self._store.write() as connection:
            connection.execute(servers.delete().where(where))

    def _run(self) -> None:
        while not self._closing.wait(self._beat_seconds):
            try:
                self.beat()
            except StoreError as error:
                log.warning("no heartbeat could be sent: %s", error)
                self._seen.clear()  # the others could not send one either
