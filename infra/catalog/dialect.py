"""All that differs between SQLite and PostgreSQL: transactions, clocks, upserts, append-only tables, errors."""

from __future__ import annotations

import re
import shutil
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite

from infra.errors import ConfigError, CorruptDataError, LwdError, StorageFullError, UnavailableError, shown

BUSY_S = 30.0
_WRITERS_LOCK = 0x4C574421  # any constant: the advisory lock that serialises writers on PostgreSQL
_NEARLY_FULL = 2**20
# libpq's own patience is hours: a server that vanished without a word must be an error within BUSY_S.
_PATIENCE = {
    "connect_timeout": 10,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": int(BUSY_S * 1000),
}
_NO_TABLE = ("42P01", "42703")  # undefined table, undefined column
_DAMAGED = re.compile(
    r"file is not a database|database disk image is malformed|malformed database schema|Could not decode to UTF-8"
)
_DAMAGED_STATES = ("XX001", "XX002")  # data corrupted, index corrupted
_REFUSED = ("28000", "28P01", "3D000")  # no such role, wrong password, no such database
_REFUSED_TEXT = re.compile(r"password authentication failed|no password supplied|(role|database) \".*\" does not exist")


def make_engine(url: str) -> sa.Engine:
    """An engine whose `write=True` transactions are serialised and durable on either database."""
    parsed = sa.make_url(url)
    if parsed.get_backend_name() == "sqlite":
        return _sqlite_engine(parsed)
    if parsed.get_backend_name() == "postgresql":
        bounded = {name: value for name, value in _PATIENCE.items() if name not in parsed.query}
        return sa.create_engine(parsed, pool_pre_ping=True, connect_args=bounded)
    raise ConfigError(
        f"catalog URL {parsed.render_as_string(hide_password=True)!r} names neither SQLite nor PostgreSQL",
        "set LWD_CATALOG to sqlite:///path or postgresql+psycopg://user@host/database",
    )


def _sqlite_engine(url: sa.URL) -> sa.Engine:
    if url.database is None or url.database in ("", ":memory:"):
        raise ConfigError("the catalog cannot be an in-memory SQLite database", "give a path: sqlite:///path")
    path = Path(url.database)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnavailableError(f"catalog folder {path.parent}: {error.strerror}", "make it writable") from error
    engine = sa.create_engine(url, connect_args={"timeout": BUSY_S})

    @sa.event.listens_for(engine, "connect")
    def _connect(connection: Any, record: Any) -> None:
        connection.isolation_level = None  # this module issues BEGIN itself
        _enable_wal(connection)
        connection.execute("PRAGMA synchronous=FULL")  # an acknowledged commit survives a power cut
        connection.execute("PRAGMA foreign_keys=ON")
        record.info["file"] = _identity(path)

    @sa.event.listens_for(engine, "begin")
    def _begin(connection: sa.Connection) -> None:
        if connection.info.get("file") != _identity(path):
            # SQLite would go on with the file that has no name any more, and what it acknowledges would be gone.
            connection.invalidate()
            raise UnavailableError(
                f"the catalog's file {path} was removed or replaced under a process that has it open",
                "stop the deployment before moving its files; the process goes on with the file that is there now",
            )
        # IMMEDIATE: a writer queues at BEGIN; upgrading from a read would fail at once, whatever the busy timeout.
        write = connection.get_execution_options().get("write", False)
        connection.exec_driver_sql("BEGIN IMMEDIATE" if write else "BEGIN")

    return engine


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file it is; None while there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_dev, stat.st_ino


def _enable_wal(connection: Any) -> None:
    """Switching to WAL ignores the busy timeout, so that processes starting together must retry."""
    deadline = time.monotonic() + BUSY_S
    while connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
        try:
            connection.execute("PRAGMA journal_mode=WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def lock_writers(connection: sa.Connection) -> None:
    """One write transaction at a time on PostgreSQL too (SQLite does so by itself).

    Gapless versions, the order of the outbox and the fencing of leases rest on it.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(*_limits(), sa.func.pg_advisory_xact_lock(_WRITERS_LOCK)))


def limit_locks(connection: sa.Connection) -> None:
    """Have the transaction wait for a lock no longer than SQLite would, and hold none while its process stands still.

    Without it a process stopped between two statements (SIGSTOP, a machine that sleeps) keeps every writer out for as
    long as it likes; the server ends its transaction instead, and what it does when it goes on is refused.
    """
    if connection.dialect.name == "postgresql":
        connection.execute(sa.select(*_limits()))


def _limits() -> list[sa.ColumnElement[str]]:
    limit = f"{int(BUSY_S * 1000)}ms"
    names = ("lock_timeout", "idle_in_transaction_session_timeout")
    return [sa.func.set_config(name, limit, sa.true()) for name in names]


def now(connection: sa.Connection) -> float:
    """The catalog's clock, seconds since the epoch: the database server's where there is one."""
    if connection.dialect.name == "postgresql":
        return float(connection.execute(sa.select(sa.extract("epoch", sa.func.clock_timestamp()))).scalar_one())
    return time.time()


def damages(connection: sa.Connection) -> list[str]:
    """What the database finds wrong with its own file; PostgreSQL checks its pages by itself."""
    if connection.dialect.name != "sqlite":
        return []
    found = [str(row[0]) for row in connection.exec_driver_sql("PRAGMA integrity_check(20)")]
    if problems := [f"the catalog's file is damaged: {text}" for text in found if text != "ok"]:
        return problems  # nothing else can be asked of such a file
    strays = [(row[0], row[2]) for row in connection.exec_driver_sql("PRAGMA foreign_key_check")]
    return [
        f"{strays.count(pair)} rows of {pair[0]} name a row of {pair[1]} that is not there"
        for pair in sorted(set(strays))
    ]


def _insert(connection: sa.Connection, table: sa.Table) -> Any:
    return (postgresql if connection.dialect.name == "postgresql" else sqlite).insert(table)


def insert_if_absent(connection: sa.Connection, table: sa.Table, values: dict[str, Any]) -> bool:
    """Insert one row unless its key (primary or unique) is taken; whether it was inserted."""
    statement = _insert(connection, table).values(values).on_conflict_do_nothing()
    # RETURNING and not the row count, which drivers need not give for an INSERT.
    return connection.execute(statement.returning(*table.primary_key)).first() is not None


def upsert(connection: sa.Connection, table: sa.Table, values: dict[str, Any]) -> None:
    """Insert one row, or update the given columns of the row with the same primary key."""
    keys = [column.name for column in table.primary_key]
    statement = _insert(connection, table).values(values)
    changed = {name: statement.excluded[name] for name in values if name not in keys}
    connection.execute(statement.on_conflict_do_update(index_elements=keys, set_=changed))


def append_only_ddl(dialect: str, table: str) -> Sequence[str]:
    """Statements that make the database refuse UPDATE and DELETE on `table`."""
    if dialect == "postgresql":
        function = f"{table}_append_only"
        return (
            f"CREATE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS "
            f"$$ BEGIN RAISE EXCEPTION '{table} is append-only'; END $$",
            f"CREATE TRIGGER {function} BEFORE UPDATE OR DELETE ON {table} FOR EACH ROW EXECUTE FUNCTION {function}()",
        )
    return tuple(
        f"CREATE TRIGGER {table}_no_{verb.lower()} BEFORE {verb} ON {table} "
        f"BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END"
        for verb in ("UPDATE", "DELETE")
    )


def remove_append_only_ddl(dialect: str, table: str) -> Sequence[str]:
    """Statements for after the table was dropped: its triggers went with it, a function does not."""
    return (f"DROP FUNCTION {table}_append_only()",) if dialect == "postgresql" else ()


def damaged(url: sa.URL, text: str) -> CorruptDataError:
    """The error for a catalog whose file holds what no catalog holds."""
    where = url.database if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
    return CorruptDataError(
        f"catalog {where}: {text}; its file is damaged",
        "stop everything, keep the damaged files, restore the catalog from its backup or begin with none, then "
        "`lwd data recover` brings back what the store has",
    )


def explain(error: sa.exc.DBAPIError, url: sa.URL) -> LwdError | None:
    """The actionable error behind a driver's, or None where it is a mistake in the code."""
    where = url.database if url.get_backend_name() == "sqlite" else url.render_as_string(hide_password=True)
    text = str(error.orig).strip()
    state = getattr(error.orig, "sqlstate", None)
    if state in _NO_TABLE:
        return ConfigError(f"catalog {where}: {text}", "create or upgrade it with `lwd migrate`")
    if _DAMAGED.search(text) or state in _DAMAGED_STATES:
        return damaged(url, shown(text))
    if not isinstance(error, sa.exc.OperationalError) and not error.connection_invalidated:
        return None
    full = "disk is full" in text or state == "53100"
    if not full and "disk I/O error" in text and url.database is not None:
        full = shutil.disk_usage(Path(url.database).parent).free < _NEARLY_FULL
    if full:
        return StorageFullError(f"the disk of the catalog {where} is full; nothing was committed", "free space on it")
    if "no such table" in text or "no such column" in text:
        return ConfigError(f"catalog {where}: {text}", "create or upgrade it with `lwd migrate`")
    if "readonly" in text:
        return UnavailableError(f"catalog {where}: {text}", "make the file and its folder writable for this user")
    if state in _REFUSED or _REFUSED_TEXT.search(text):
        return ConfigError(f"catalog {where}: {text}", "correct the user, password and database of LWD_CATALOG")
    return UnavailableError(f"catalog {where}: {text}", "see that it is up and not held by a stuck process, then retry")
