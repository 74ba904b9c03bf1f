"""The database of keys, prices and the ledger: SQLite in one file, or another database by URL.

A write transaction sees every earlier one and excludes all others that touch the same key. In SQLite it
begins with BEGIN IMMEDIATE, so one process writes at a time. Elsewhere the code locks the key's row (SELECT …
FOR UPDATE, which SQLite ignores). Nothing else here depends on the kind of database.

SQLite runs in WAL mode with synchronous=NORMAL: after `kill -9` nothing that was committed is lost, and after
a power failure the file is intact but the last moments may be missing. Changes of keys are flushed to the
disk.

Migrations are numbered functions instead of Alembic's scripts. The store must upgrade itself, unasked, when a
new version of Herd opens it, and six tables do not justify a second description of the schema.
"""

from __future__ import annotations

import getpass
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import sqlalchemy as sql
from sqlalchemy import event
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError

from ..errors import ConfigError, StorageError
from ..files import storage_error
from .errors import StoreError
from .tables import audit, meta, metadata, prompts, servers

Migration = Callable[[sql.Connection], None]


def _add_servers_and_secret(connection: sql.Connection) -> None:
    """Change a store of version 1: several servers may share it, and other servers' caches are divided."""
    servers.create(connection)
    connection.exec_driver_sql("ALTER TABLE meta ADD COLUMN cache_secret VARCHAR(64)")
    connection.execute(meta.update().values(cache_secret=secrets.token_hex(32)))


MIGRATIONS: Sequence[Migration] = (_add_servers_and_secret, prompts.create)
"""Functions that upgrade a store from version 1 to 2, 2 to 3, and so on. A new store has the last one."""
BUSY_SECONDS = 30
"""How long a transaction waits for another process that writes, or for a connection."""
UPGRADE_LOCK = 0x68657264
"""PostgreSQL's number of the lock under which the tables are made and changed."""


class Store:
    """An open database. Safe to use from any thread.

    ``place`` is a path, or a URL of SQLAlchemy such as ``postgresql+psycopg://host/herd``.
    """

    def __init__(self, place: str | Path) -> None:
        is_url = "://" in str(place)
        self.name = _without_password(place)
        self.path = None if is_url else Path(place).expanduser().absolute()
        if self.path is not None:
            _prepare_file(self.path)
        try:
            self._engine = _engine(str(place) if self.path is None else f"sqlite:///{self.path}", self.path)
        except (SQLAlchemyError, ImportError) as error:
            raise ConfigError(f"store {self.name}: cannot be opened: {_reason(error)}") from None
        # Threads of one process wait for each other here, because SQLite's own waiting is polling.
        self._turn = threading.Lock() if self.path is not None else nullcontext()
        with self.write() as connection:
            _upgrade(connection, MIGRATIONS, self.name)

    @contextmanager
    def read(self) -> Iterator[sql.Connection]:
        """Yield a connection that sees one state of the store. Raises `StoreError` if that is unavailable."""
        with self._translated(), self._engine.connect() as connection:
            yield connection

    @contextmanager
    def write(self, durable: bool = False) -> Iterator[sql.Connection]:
        """Yield a connection with a transaction, committed at the end of the block unless it raises.

        ``durable``: the commit is flushed to the disk, so that it also survives a power failure. Raises
        `StoreError` if the store is unavailable or its disk is full. Nothing was changed then.
        """
        with self._turn, self._translated(), self._engine.connect() as connection:
            connection.execution_options(herd_write=True)
            if durable and self.path is not None:
                connection.connection.cursor().execute("PRAGMA synchronous = FULL")
            try:
                with connection.begin():
                    yield connection
            finally:
                if durable and self.path is not None:
                    connection.connection.cursor().execute("PRAGMA synchronous = NORMAL")

    def backup(self, target: Path) -> None:
        """Copy the store to the new file ``target`` while it is in use."""
        if self.path is None:
            raise ConfigError(f"store {self.name}: use the database's own tool for backups, e.g. pg_dump")
        if target.exists():
            raise StorageError(f"{target}: exists; choose another name for the backup")
        temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600))
            with closing(sqlite3.connect(self.path)) as source, closing(sqlite3.connect(temporary)) as copy:
                source.backup(copy)
                copy.execute("PRAGMA journal_mode = DELETE")  # one file, without a WAL beside it
            os.replace(temporary, target)
        except OSError as error:
            raise storage_error(target, error) from error
        except sqlite3.Error as error:
            raise StorageError(f"{target}: the backup failed: {error}; nothing was changed") from error
        finally:
            temporary.unlink(missing_ok=True)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Raise `StoreError` for errors of the database, except for violated constraints."""
        try:
            yield
        except IntegrityError:
            raise
        except (DBAPIError, sql.exc.TimeoutError) as error:
            reason = _reason(error)
            raise StoreError(f"the store of keys is unavailable ({reason}); try again later") from error


def cache_secret(store: Store) -> bytes:
    """Return the store's secret that keeps the caches of different key groups apart in other servers."""
    with store.read() as connection:
        return bytes.fromhex(connection.execute(sql.select(meta.c.cache_secret)).scalar_one())


def default_store() -> str:
    """Return the place of the store: ``HERD_STORE``, or a file in the user's data folder."""
    return os.environ.get("HERD_STORE") or str(data_folder() / "serve.db")


def data_folder() -> Path:
    """Return the user's folder for data that cannot be made again."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "herd"


def now_ms() -> int:
    """Return the present time in milliseconds since 1970."""
    return time.time_ns() // 1_000_000


def record(connection: sql.Connection, actor: str, act: str, target: str, **details: Any) -> None:
    """Write an act of an administrator to the audit log, in the transaction that does it."""
    connection.execute(
        audit.insert().values(at_ms=now_ms(), actor=actor, act=act, target=target, details=details)
    )


def audit_log(store: Store, limit: int = 1000) -> list[dict[str, Any]]:
    """Return the newest ``limit`` acts of administrators, oldest first."""
    with store.read() as connection:
        rows = connection.execute(sql.select(audit).order_by(audit.c.id.desc()).limit(limit)).mappings()
        return [dict(row) for row in rows][::-1]


def shell_actor() -> str:
    """Return the name of the user of the command line for the audit log."""
    try:
        return f"shell:{getpass.getuser()}"
    except (KeyError, OSError):
        return f"shell:{os.getuid()}"


def _prepare_file(path: Path) -> None:
    """Create the file and its folder so that only the owner can read them."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
    except OSError as error:
        raise storage_error(path, error) from error


def _engine(url: str, path: Path | None) -> sql.Engine:
    if path is None:
        more = {"connect_args": {"connect_timeout": BUSY_SECONDS}} if url.startswith("postgresql") else {}
        return sql.create_engine(
            url, pool_pre_ping=True, pool_size=16, max_overflow=16, pool_timeout=BUSY_SECONDS, **more
        )
    arguments = {"timeout": BUSY_SECONDS, "check_same_thread": False, "isolation_level": None}
    engine = sql.create_engine(url, connect_args=arguments, pool_size=16, max_overflow=48)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        for pragma in ("journal_mode = WAL", "synchronous = NORMAL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: sql.Connection) -> None:
        writes = connection.get_execution_options().get("herd_write")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _upgrade(connection: sql.Connection, migrations: Sequence[Migration], name: str) -> None:
    """Create the tables of a new store, or apply the migrations that it lacks."""
    newest = len(migrations) + 1
    if connection.dialect.name == "postgresql":  # two servers may start at the same moment
        connection.execute(sql.select(sql.func.pg_advisory_xact_lock(UPGRADE_LOCK)))
    if not sql.inspect(connection).has_table("meta"):
        if sql.inspect(connection).get_table_names():
            raise ConfigError(f"store {name}: is another program's database; choose another place")
        metadata.create_all(connection)
        secret = secrets.token_hex(32)
        connection.execute(
            meta.insert().values(id=1, schema_version=newest, keys_version=0, cache_secret=secret)
        )
        return
    version = connection.execute(sql.select(meta.c.schema_version).with_for_update()).scalar_one()
    if version > newest:
        raise ConfigError(
            f"store {name}: has version {version}, and this Herd knows versions up to {newest}; update Herd"
        )
    for migration in migrations[version - 1 :]:
        migration(connection)
    if version < newest:
        connection.execute(meta.update().values(schema_version=newest))


def _without_password(place: str | Path) -> str:
    try:
        return sql.make_url(str(place)).render_as_string() if "://" in str(place) else str(place)
    except SQLAlchemyError:
        return "URL"


def _reason(error: Exception) -> str:
    """Return the first line of a database's own message, without the statement and its values."""
    cause = getattr(error, "orig", None) or error
    return (str(cause).strip().splitlines() or [type(cause).__name__])[0]
