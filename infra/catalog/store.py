"""Opening the catalog, bringing its schema up to date, and its kinds of transaction."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from infra.catalog import dialect
from infra.catalog.schema import metadata
from infra.errors import ConfigError, CorruptDataError

MIGRATIONS = Path(__file__).parent / "migrations"


class Catalog:
    """The SQL database behind everything. Safe for threads; each process opens its own.

    Args:
        url: SQLAlchemy URL, SQLite or PostgreSQL (`Settings.catalog_url`).

    Raises:
        ConfigError: another database, or none.
    """

    def __init__(self, url: str) -> None:
        self.engine = dialect.make_engine(url)
        self._writer = self.engine.execution_options(write=True)
        isolation = "REPEATABLE READ" if self.engine.dialect.name == "postgresql" else None
        self._reader = self.engine.execution_options(isolation_level=isolation) if isolation else self.engine

    @contextmanager
    def begin(self) -> Iterator[sa.Connection]:
        """A write transaction: serialised against every other one, durable when the block ends, undone if it raises.

        Keep it short and free of network or disk work.

        Raises:
            StorageFullError: the database's disk is full; nothing was committed.
            UnavailableError: it could not be reached, or stayed locked for 30 s, or its file was replaced.
            CorruptDataError: its file is damaged.
        """
        with self._explained(), self._writer.begin() as connection:
            dialect.lock_writers(connection)
            yield connection

    @contextmanager
    def begin_rows(self) -> Iterator[sa.Connection]:
        """A write transaction that holds only the rows it locks (`SELECT … FOR UPDATE SKIP LOCKED`): writers go on.

        For work on rows that nobody else changes, which may wait for another server up to half a minute: the relay's.
        Nothing may rest on its order against other transactions: no versions, no leases, no outbox entries. On SQLite,
        which has no row locks, it is `begin()`.

        Raises:
            StorageFullError, UnavailableError: as `begin`.
        """
        with self._explained(), self._writer.begin() as connection:
            dialect.limit_locks(connection)
            yield connection

    @contextmanager
    def read(self) -> Iterator[sa.Connection]:
        """A read transaction that sees one state throughout and blocks no writer."""
        with self._explained(), self._reader.connect() as connection, connection.begin() as transaction:
            yield connection
            transaction.rollback()

    def migrate(self) -> None:
        """Create the tables or upgrade them to this version's; processes may do so at once.

        Raises:
            ConfigError: they are of a later version.
        """
        with self.begin() as connection:
            self._must_be_known(_revision(connection))
            config = Config()
            config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
            config.attributes["connection"] = connection
            command.upgrade(config, "head")

    def revision(self) -> str | None:
        """Of the tables; None where there are none yet."""
        with self.read() as connection:
            return _revision(connection)

    def check(self) -> None:
        """Raise ConfigError unless the tables are those of this version."""
        head = ScriptDirectory(str(MIGRATIONS)).get_current_head()
        current = self.revision()
        self._must_be_known(current)
        if current != head:
            raise ConfigError(
                f"catalog {self._name} has schema {current}, this version needs {head}", "run `lwd migrate`"
            )
        with self.read() as connection:
            missing = sorted(metadata.tables.keys() - set(sa.inspect(connection).get_table_names()))
        if missing:
            raise CorruptDataError(
                f"catalog {self._name} has schema {current}, but no table {missing[0]}", "restore it from its backup"
            )

    @property
    def _name(self) -> str:
        return self.engine.url.render_as_string(hide_password=True)

    def _must_be_known(self, revision: str | None) -> None:
        known = {script.revision for script in ScriptDirectory(str(MIGRATIONS)).walk_revisions()}
        if revision is not None and revision not in known:
            raise ConfigError(
                f"catalog {self._name} has schema {revision}, which this version does not know: it is of a later one",
                "use the version of lwd that upgraded it, or restore the backup from before",
            )

    def close(self) -> None:
        """Give the connections back; the catalog opens them again when it is used."""
        self.engine.dispose()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except UnicodeDecodeError as error:
            if not _of_the_driver(error):
                raise
            # SQLite's own message about a damaged schema, which quotes it.
            raise dialect.damaged(self.engine.url, "its schema is no text") from error
        except sa.exc.DBAPIError as error:
            explained = dialect.explain(error, self.engine.url)
            if explained is None:
                raise
            raise explained from error


def _of_the_driver(error: BaseException) -> bool:
    """Whether it came up in the database's driver, and not in the code that uses the transaction."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals.get("__name__", "")).startswith(("sqlalchemy.", "sqlite3", dialect.__name__))


def _revision(connection: sa.Connection) -> str | None:
    """Of the tables; None where there are none yet."""
    heads = MigrationContext.configure(connection).get_current_heads()
    return "+".join(sorted(heads)) if heads else None
