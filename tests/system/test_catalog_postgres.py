"""The catalog on PostgreSQL: the same migrations, transactions and errors as on SQLite, and what only a server does."""

from __future__ import annotations

import os
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from invariants import KILLED, example_episode, in_process, open_plane, start_process

from infra.catalog import Catalog, dialect, schema
from infra.catalog.leases import Lease
from infra.catalog.store import MIGRATIONS
from infra.errors import ConfigError, LeaseLostError, UnavailableError
from infra.servers import Servers


@pytest.fixture
def url(servers: Servers) -> Iterator[str]:
    servers.postgres.start()
    name = f"catalog_{secrets.token_hex(4)}"
    servers.postgres.create_database(name)
    yield servers.postgres.url(name)
    engine = sa.create_engine(servers.postgres.url("postgres"), isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:  # a killed server reads through what is left of every test when it starts
        connection.exec_driver_sql(f"DROP DATABASE {name} WITH (FORCE)")
    engine.dispose()


@pytest.fixture
def catalog(url: str) -> Iterator[Catalog]:
    catalog = Catalog(url)
    catalog.migrate()
    yield catalog
    catalog.close()


def alembic(catalog: Catalog, move: Callable[..., None], revision: str) -> None:
    with catalog.begin() as connection:
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["connection"] = connection
        move(config, revision)


def measure(connection: sa.Connection, value: float = 1.0) -> None:
    connection.execute(schema.measurements.insert().values(name="n", value=value, at=0.0))


def count(catalog: Catalog) -> int:
    with catalog.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(schema.measurements)).scalar_one()


def snapshot_row(connection: sa.Connection, version: int = 1) -> None:
    values = {"digest": "d", "episodes": 0, "added": 0, "removed": 0, "reason": "", "writer": "", "created_at": 0.0}
    connection.execute(schema.snapshots.insert().values(version=version, parent=version - 1, **values))


# --- migrations -------------------------------------------------------------------------------------------------------


def test_migrations_make_exactly_the_schema(catalog: Catalog) -> None:
    catalog.check()
    with catalog.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_the_relays_index_holds_what_is_unsent_alone(catalog: Catalog) -> None:
    with catalog.read() as connection:
        indexes = {index["name"]: index for index in sa.inspect(connection).get_indexes("outbox")}
    assert "sent_at IS NULL" in indexes["ix_outbox_unsent"]["dialect_options"]["postgresql_where"]


def test_migrations_go_down_to_nothing_and_up_again(catalog: Catalog) -> None:
    alembic(catalog, command.downgrade, "base")
    assert catalog.revision() is None
    with catalog.read() as connection:
        assert sa.inspect(connection).get_table_names() == ["alembic_version"]
        left = "SELECT count(*) FROM pg_proc JOIN pg_namespace n ON n.oid = pronamespace WHERE nspname = 'public'"
        assert connection.exec_driver_sql(left).scalar_one() == 0
    catalog.migrate()
    catalog.check()


def test_an_upgrade_keeps_the_rows(url: str) -> None:
    catalog = Catalog(url)
    alembic(catalog, command.upgrade, "0001")
    with pytest.raises(ConfigError, match="has schema 0001, this version needs 0011"):
        catalog.check()
    row = {"episode_id": "a" * 32, "robot_id": "r0", "key": "k", "sha256": "0" * 64, "size": 1, "schema_version": 1}
    with catalog.begin() as connection:
        connection.execute(schema.outbox.insert().values(**row, trace_id="t", created_at=1.0))
        snapshot_row(connection)
    catalog.migrate()
    catalog.check()
    with catalog.begin() as connection:
        (kept,) = connection.execute(sa.select(schema.outbox))
        assert (kept.episode_id, kept.sent_at) == ("a" * 32, None)
        measure(connection)
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), catalog.begin() as connection:
        connection.exec_driver_sql("DELETE FROM snapshots")
    catalog.close()


def _migrate(url: str) -> None:
    Catalog(url).migrate()


def test_processes_that_start_together_all_migrate(url: str) -> None:
    processes = [start_process(_migrate, url) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    Catalog(url).check()


# --- transactions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["snapshots", "promotions"])
@pytest.mark.parametrize("statement", ["UPDATE {} SET created_at = 1", "DELETE FROM {}", "TRUNCATE {} CASCADE"])
def test_the_audit_tables_refuse_change(catalog: Catalog, table: str, statement: str) -> None:
    with catalog.begin() as connection:
        snapshot_row(connection)
        values = {"snapshot_version": 0, "bundle_key": "k", "manifest_sha256": "0", "status": "c", "created_at": 0.0}
        connection.execute(schema.policies.insert().values(version=1, **values))
        promotion = {"version": 1, "decision": "promote", "evidence": {}, "proposer": "p", "created_at": 0.0}
        connection.execute(schema.promotions.insert().values(**promotion))
    with pytest.raises(sa.exc.DBAPIError, match="append-only"), catalog.begin() as connection:
        connection.exec_driver_sql(statement.format(table))


def test_a_gap_between_versions_is_refused_by_the_database(catalog: Catalog) -> None:
    with pytest.raises(sa.exc.IntegrityError, match="gapless"), catalog.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO snapshots VALUES (3, 1, 'd', 0, 0, 0, 'reason', 'writer', 0)"
        )  # parent 1, version 3


def test_writers_at_once_make_gapless_versions(url: str, catalog: Catalog) -> None:
    def work() -> None:
        own = Catalog(url)
        for _ in range(15):
            with own.begin() as connection:
                last = connection.execute(sa.select(sa.func.max(schema.snapshots.c.version))).scalar() or 0
                snapshot_row(connection, last + 1)
        own.close()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with catalog.read() as connection:
        versions = list(connection.execute(sa.select(schema.snapshots.c.version)).scalars())
    assert sorted(versions) == list(range(1, 61))


def test_the_order_of_the_outbox_is_the_order_of_commits(url: str, catalog: Catalog) -> None:
    """A reader of the outbox that saw entry n never finds an earlier one afterwards, whoever commits when."""
    stop = threading.Event()

    def write() -> None:
        own = Catalog(url)
        while not stop.is_set():
            with own.begin() as connection:
                row = {"episode_id": secrets.token_hex(16), "robot_id": "r", "key": "k", "sha256": "0", "size": 1}
                connection.execute(schema.outbox.insert().values(**row, schema_version=1, trace_id="t", created_at=0.0))
        own.close()

    threads = [threading.Thread(target=write) for _ in range(3)]
    for thread in threads:
        thread.start()
    seen: list[int] = []
    while len(seen) < 200:
        with catalog.read() as connection:
            query = sa.select(schema.outbox.c.seq).order_by(schema.outbox.c.seq)
            found = list(connection.execute(query).scalars())
        assert found[: len(seen)] == seen
        seen = found
    stop.set()
    for thread in threads:
        thread.join()


def test_a_reader_sees_one_state_and_blocks_no_writer(catalog: Catalog) -> None:
    query = sa.select(sa.func.count()).select_from(schema.measurements)
    with catalog.read() as reader:
        before = reader.execute(query).scalar_one()
        with catalog.begin() as writer:
            measure(writer)
        assert reader.execute(query).scalar_one() == before
    assert count(catalog) == before + 1


def test_begin_rows_keeps_no_writer_waiting_and_others_from_its_rows(url: str, catalog: Catalog) -> None:
    with catalog.begin() as connection:
        for value in range(3):
            measure(connection, value)
    rows = sa.select(schema.measurements.c.value).order_by(schema.measurements.c.id)
    with catalog.begin_rows() as one:
        assert one.execute(rows.limit(2).with_for_update(skip_locked=True)).scalars().all() == [0.0, 1.0]
        with catalog.begin_rows() as other:
            assert other.execute(rows.with_for_update(skip_locked=True)).scalars().all() == [2.0]
        with catalog.begin() as writer:
            measure(writer, 3.0)
        assert count(catalog) == 4


def test_a_writer_that_waits_too_long_gives_up(url: str, catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    holding, done = threading.Event(), threading.Event()

    def hold() -> None:
        with Catalog(url).begin():
            holding.set()
            done.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    assert holding.wait(30)
    monkeypatch.setattr(dialect, "BUSY_S", 0.2)
    try:
        with pytest.raises(UnavailableError, match="lock timeout"), catalog.begin():
            raise AssertionError("two writers at once")
    finally:
        done.set()
        holder.join()


def _stand_still_inside(url: str) -> None:
    catalog = Catalog(url)
    dialect.BUSY_S = 0.5
    with catalog.begin() as connection:
        measure(connection)
        os.kill(os.getpid(), signal.SIGSTOP)


def test_a_writer_that_stands_still_keeps_nobody_out(url: str, catalog: Catalog) -> None:
    """Stopped between two statements: the server ends its transaction, which cannot be committed any more."""
    process = start_process(_stand_still_inside, url)
    try:
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.read_text().rsplit(")", 1)[1].split()[0] != "T":
            time.sleep(0.01)
        with catalog.begin() as connection:
            measure(connection, 2.0)
        assert count(catalog) == 1
    finally:
        os.kill(process.pid, signal.SIGCONT)
        process.join(60)
    assert process.exitcode == 1
    assert count(catalog) == 1


def _die_inside(url: str) -> None:
    with Catalog(url).begin() as connection:
        measure(connection)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_nothing_and_blocks_nobody(url: str, catalog: Catalog) -> None:
    assert in_process(_die_inside, url) == KILLED
    with catalog.begin() as connection:
        measure(connection)
    assert count(catalog) == 1


def test_the_databases_clock_decides_a_lease(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 24: a process whose clock is an hour off neither loses its lease nor takes another's."""
    first = Lease(catalog, "coordinator", 30.0, holder="first:1")
    first.acquire()
    with monkeypatch.context() as patch:
        now = time.time()
        for skew in (3600.0, -3600.0):
            patch.setattr(time, "time", lambda skew=skew: now + skew)
            with pytest.raises(LeaseLostError, match="held by first:1"):
                Lease(catalog, "coordinator", 30.0).acquire()
            with catalog.begin() as connection:
                first.guard(connection)
                assert abs(dialect.now(connection) - now) < 600


# --- errors -----------------------------------------------------------------------------------------------------------


def test_a_stopped_server_is_unavailable_until_it_is_back(servers: Servers, catalog: Catalog) -> None:
    assert count(catalog) == 0
    servers.postgres.kill()
    try:
        for ask in (catalog.read, catalog.begin, catalog.begin_rows):
            with pytest.raises(UnavailableError, match="see that it is up") as caught, ask():
                raise AssertionError("it answers")
            assert servers.postgres.password not in str(caught.value)
    finally:
        servers.postgres.start()
    with catalog.begin() as connection:
        measure(connection)
    assert count(catalog) == 1


def test_a_server_restarted_inside_a_transaction(servers: Servers, catalog: Catalog) -> None:
    def write() -> None:
        with catalog.begin() as connection:
            measure(connection)
            servers.postgres.stop()
            servers.postgres.start()
            measure(connection)

    def commit() -> None:
        with catalog.begin() as connection:
            measure(connection)
            servers.postgres.kill()
            servers.postgres.start()

    def read() -> None:
        with catalog.read() as connection:
            connection.execute(sa.select(1))
            servers.postgres.stop()
            servers.postgres.start()
            connection.execute(sa.select(1))

    for work in (write, commit, read):
        with pytest.raises(UnavailableError):
            work()
    assert count(catalog) == 0


def test_missing_tables_and_databases_and_wrong_passwords_are_settings(servers: Servers, url: str) -> None:
    with pytest.raises(ConfigError, match=r"does not exist[\s\S]*lwd migrate"):
        count(Catalog(url))
    with pytest.raises(ConfigError, match=r'database "nowhere" does not exist[\s\S]*LWD_CATALOG'):
        Catalog(servers.postgres.url("nowhere")).revision()
    wrong = url.replace(servers.postgres.password, "guessed")
    with pytest.raises(ConfigError, match="password authentication failed") as caught:
        Catalog(wrong).revision()
    assert "guessed" not in str(caught.value)


def test_a_mistake_in_the_code_stays_what_it_is(catalog: Catalog) -> None:
    with pytest.raises(sa.exc.ProgrammingError), catalog.begin() as connection:
        connection.exec_driver_sql("SELEC 1")


def test_an_episode_handed_in_twice_is_one_row_and_one_announcement(fleet_home: Path) -> None:
    plane = open_plane(fleet_home)
    assert plane.submit(example_episode(1)) == "committed"
    assert plane.submit(example_episode(1)) == "committed"
    with plane.catalog.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(schema.outbox)).scalar_one() == 1
