"""The store: transactions, versions, backups, and what happens when it is unavailable or its disk is full."""

import sqlite3
import threading

import pytest
import sqlalchemy as sql
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateTable
from sqlalchemy.sql import ClauseElement

from herd.errors import ConfigError, StorageError
from herd.serve import keys, statements
from herd.serve.errors import StoreError
from herd.serve.keys import KeyPolicy, create_key, list_keys
from herd.serve.store import MIGRATIONS, Store, _upgrade, audit_log, cache_secret, record
from herd.serve.tables import meta, metadata


def test_only_the_owner_can_read_the_store(store):
    assert store.path.stat().st_mode & 0o077 == 0
    assert store.path.parent.stat().st_mode & 0o077 == 0


def test_write_ahead_logging_is_on(store):
    with store.read() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA foreign_keys").scalar() == 1


def test_a_transaction_that_raises_changes_nothing(store):
    def write_and_fail():
        with store.write() as connection:
            record(connection, "test", "act", "target")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_and_fail()
    assert audit_log(store) == []


def test_writes_of_many_threads_and_two_stores_all_count(store):
    other = Store(store.path)

    def add(place):
        for _ in range(25):
            with place.write() as connection:
                count = connection.execute(sql.select(meta.c.keys_version)).scalar_one()
                connection.execute(meta.update().values(keys_version=count + 1))

    threads = [threading.Thread(target=add, args=(place,)) for place in (store, other) * 4]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    with store.read() as connection:
        assert connection.execute(sql.select(meta.c.keys_version)).scalar_one() == 8 * 25


def test_missing_migrations_are_applied_once_and_in_order(store):
    def add_column(connection):
        connection.exec_driver_sql("ALTER TABLE audit ADD COLUMN origin TEXT")

    def fill_column(connection):
        connection.exec_driver_sql("UPDATE audit SET origin = 'before'")

    with store.write() as connection:
        record(connection, "test", "act", "target")
    for _ in range(2):
        with store.write() as connection:
            _upgrade(connection, [*MIGRATIONS, add_column, fill_column], "test")
    with store.read() as connection:
        assert connection.exec_driver_sql("SELECT origin FROM audit").scalars().all() == ["before"]
        assert connection.execute(sql.select(meta.c.schema_version)).scalar_one() == len(MIGRATIONS) + 3


def test_a_store_of_version_1_gets_what_it_lacks(store):
    key, _ = create_key(store, "alice", KeyPolicy(), actor="test")
    with store.write() as connection:
        connection.exec_driver_sql("DROP TABLE servers")
        connection.exec_driver_sql("DROP TABLE prompts")
        connection.exec_driver_sql("ALTER TABLE meta DROP COLUMN cache_secret")
        connection.execute(meta.update().values(schema_version=1))
    again = Store(store.path)
    assert [each.id for each in list_keys(again)] == [key.id]
    assert len(cache_secret(again)) == 32
    again.close()


def test_a_migration_that_fails_leaves_the_old_version(store):
    def good(connection):
        connection.exec_driver_sql("ALTER TABLE audit ADD COLUMN origin TEXT")

    def bad(connection):
        raise RuntimeError("no")

    def upgrade():
        with store.write() as connection:
            _upgrade(connection, [*MIGRATIONS, good, bad], "test")

    with pytest.raises(RuntimeError):
        upgrade()
    with store.read() as connection:
        assert "origin" not in {column["name"] for column in sql.inspect(connection).get_columns("audit")}


def test_a_store_of_a_newer_herd_is_refused(store):
    with store.write() as connection:
        connection.execute(meta.update().values(schema_version=99))
    with pytest.raises(ConfigError, match=r"version 99.*update Herd"):
        Store(store.path)


def test_another_program_s_database_is_refused(tmp_path):
    path = tmp_path / "other.db"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE things (x)")
    with pytest.raises(ConfigError, match="another program"):
        Store(path)


def test_a_file_that_is_no_database_is_an_error_of_one_line(tmp_path):
    path = tmp_path / "text.db"
    path.write_text("hello " * 1000)
    with pytest.raises(StoreError, match="not a database"):
        Store(path)
    assert path.read_text().startswith("hello")


def test_an_unknown_kind_of_url_is_an_error_without_the_password():
    with pytest.raises(ConfigError) as caught:
        Store("nothing://user:secret@host/name")
    assert "secret" not in str(caught.value)


def test_a_backup_of_a_store_in_use_is_a_store(store, tmp_path):
    create_key(store, "alice", KeyPolicy(), actor="test")
    target = tmp_path / "copies" / "copy.db"
    with store.write() as connection:  # uncommitted changes are not in the copy
        record(connection, "test", "act", "target")
        store.backup(target)
    assert target.stat().st_mode & 0o077 == 0
    assert [path.name for path in target.parent.iterdir()] == ["copy.db"]
    copy = Store(target)
    assert [key.name for key in list_keys(copy)] == ["alice"]
    assert [row["act"] for row in audit_log(copy)] == ["create key"]
    copy.close()


def test_a_backup_overwrites_nothing(store, tmp_path):
    target = tmp_path / "precious"
    target.write_text("mine")
    with pytest.raises(StorageError, match="exists"):
        store.backup(target)
    assert target.read_text() == "mine"


def test_a_full_disk_refuses_writes_and_loses_nothing(store):
    create_key(store, "alice", KeyPolicy(), actor="test")
    with store.read() as connection:  # SQLite then says what it says on a full disk
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()

    @sql.event.listens_for(store._engine, "begin")
    def limit(connection):
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")

    def fill():
        for number in range(200):
            create_key(store, f"key{number}", KeyPolicy(), actor="test" * 30)

    with pytest.raises(StoreError, match="full") as caught:
        fill()
    assert caught.value.status == 503
    sql.event.remove(store._engine, "begin", limit)
    assert list_keys(store)[0].name == "alice"


def test_every_table_and_statement_exists_in_postgresql_too():
    dialect = postgresql.dialect()
    for table in metadata.sorted_tables:
        assert "CREATE TABLE" in str(CreateTable(table).compile(dialect=dialect))
    made = [
        value
        for module in (statements, keys)
        for value in vars(module).values()
        if isinstance(value, ClauseElement)
    ]
    texts = [
        str(statement.compile(dialect=dialect))
        for statement in made
        if hasattr(statement, "get_execution_options")
    ]
    assert len(texts) >= 12
    for locking in (
        statements.LOCK_KEY,
        keys._LOCKED_KEY,
    ):  # SQLite needs no lock, as it has one writer at a time
        assert str(locking.compile(dialect=dialect)).endswith("FOR UPDATE")
