"""The catalog: migrations, the two kinds of transaction, leases, and what its errors say."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import in_process, start_process
from sqlalchemy.dialects import postgresql

from infra.catalog import Catalog, dialect, schema
from infra.catalog.leases import Lease
from infra.errors import ConfigError, LeaseLostError, StorageFullError, UnavailableError


def url(home: Path) -> str:
    return f"sqlite:///{home / 'catalog.db'}"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(url(tmp_path))
    catalog.migrate()
    return catalog


def measure(connection: sa.Connection, value: float) -> None:
    connection.execute(schema.measurements.insert().values(name="n", value=value, at=0.0))


def count(catalog: Catalog) -> int:
    with catalog.read() as connection:
        return connection.execute(sa.select(sa.func.count()).select_from(schema.measurements)).scalar_one()


def test_migrations_make_exactly_the_schema(catalog: Catalog) -> None:
    with catalog.read() as connection:
        assert compare_metadata(MigrationContext.configure(connection), schema.metadata) == []


def test_migrate_may_be_repeated_and_keeps_rows(catalog: Catalog) -> None:
    with catalog.begin() as connection:
        measure(connection, 1.0)
    catalog.migrate()
    catalog.check()
    assert count(catalog) == 1


def _migrate(home: Path) -> None:
    Catalog(url(home)).migrate()


def test_processes_that_start_together_all_migrate(tmp_path: Path) -> None:
    processes = [start_process(_migrate, tmp_path) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    Catalog(url(tmp_path)).check()


def test_a_catalog_without_tables_is_named_with_its_fix(tmp_path: Path) -> None:
    catalog = Catalog(url(tmp_path))
    with pytest.raises(ConfigError, match=r"catalog\.db has schema None"):
        catalog.check()
    with pytest.raises(ConfigError, match=r"no such table: measurements[\s\S]*migrate"):
        count(catalog)


@pytest.mark.parametrize("bad", ["mysql://u:secret@host/db", "sqlite://", "sqlite:///:memory:"])
def test_other_databases_are_refused_without_showing_the_password(bad: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Catalog(bad)
    assert "secret" not in str(caught.value)


def test_begin_is_undone_by_an_exception(catalog: Catalog) -> None:
    def fail() -> None:
        with catalog.begin() as connection:
            measure(connection, 1.0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert count(catalog) == 0


def test_a_reader_sees_one_state_and_blocks_no_writer(catalog: Catalog) -> None:
    query = sa.select(sa.func.count()).select_from(schema.measurements)
    with catalog.read() as reader:
        before = reader.execute(query).scalar_one()
        with catalog.begin() as writer:
            measure(writer, 1.0)
        assert reader.execute(query).scalar_one() == before
    assert count(catalog) == before + 1


def _next_numbers(home: Path, times: int) -> None:
    catalog = Catalog(url(home))
    for _ in range(times):
        with catalog.begin() as connection:
            last = connection.execute(sa.select(sa.func.max(schema.policies.c.version))).scalar() or 0
            connection.execute(
                schema.policies.insert().values(
                    version=last + 1, snapshot_version=0, bundle_key="k", manifest_sha256="0", status="candidate",
                    created_at=0.0,
                )
            )  # fmt: skip


def test_read_then_write_from_many_processes_loses_nothing(catalog: Catalog, tmp_path: Path) -> None:
    processes = [start_process(_next_numbers, tmp_path, 20) for _ in range(4)]
    for process in processes:
        process.join(60)
    assert {process.exitcode for process in processes} == {0}
    with catalog.read() as connection:
        versions = list(connection.execute(sa.select(schema.policies.c.version)).scalars())
    assert sorted(versions) == list(range(1, 81))


@pytest.mark.parametrize("statement", ["UPDATE snapshots SET digest = 'x'", "DELETE FROM snapshots"])
def test_the_audit_tables_refuse_change(catalog: Catalog, statement: str) -> None:
    with catalog.begin() as connection:
        connection.execute(
            schema.snapshots.insert().values(
                version=1, parent=0, digest="d", episodes=0, added=0, removed=0, reason="", writer="", created_at=0.0
            )
        )
    with pytest.raises(sa.exc.IntegrityError, match="append-only"), catalog.begin() as connection:
        connection.exec_driver_sql(statement)


def test_a_gap_between_versions_is_refused_by_the_database(catalog: Catalog) -> None:
    with pytest.raises(sa.exc.IntegrityError, match="gapless"), catalog.begin() as connection:
        connection.execute(
            schema.snapshots.insert().values(
                version=3, parent=1, digest="d", episodes=0, added=0, removed=0, reason="", writer="", created_at=0.0
            )
        )


def test_a_full_disk_is_named_and_nothing_is_committed(catalog: Catalog, tmp_path: Path) -> None:
    def fill() -> None:
        with catalog.begin() as connection:
            pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
            connection.exec_driver_sql(f"PRAGMA max_page_count = {pages}")
            for value in range(10_000):
                measure(connection, value)

    with pytest.raises(StorageFullError, match=r"catalog\.db is full"):
        fill()
    catalog.close()  # a new connection: room again
    assert count(catalog) == 0
    with catalog.begin() as connection:
        measure(connection, 1.0)
    assert count(catalog) == 1


def test_a_stuck_writer_is_an_unavailable_catalog(catalog: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr(dialect, "BUSY_S", 0.05)
    other = Catalog(url(tmp_path))
    with catalog.begin(), pytest.raises(UnavailableError, match="locked"), other.begin():
        raise AssertionError("two writers at once")


def test_upserts_are_the_same_on_both_databases(catalog: Catalog) -> None:
    row = {"robot_id": "r0", "cohort": "learning", "last_seen": 1.0}
    with catalog.begin() as connection:
        assert dialect.insert_if_absent(connection, schema.robots, row)
        assert not dialect.insert_if_absent(connection, schema.robots, {**row, "cohort": "production"})
        dialect.upsert(connection, schema.robots, {**row, "last_seen": 2.0})
        found = connection.execute(sa.select(schema.robots)).one()
    assert (found.cohort, found.last_seen, found.episodes) == ("learning", 2.0, 0)


def test_every_table_compiles_for_postgresql() -> None:
    for table in schema.metadata.sorted_tables:
        ddl = str(sa.schema.CreateTable(table).compile(dialect=postgresql.dialect()))
        assert "AUTOINCREMENT" not in ddl
        assert ("BIGSERIAL" in ddl) == (table.autoincrement_column is not None)


# --- leases -----------------------------------------------------------------------------------------------------------


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(dialect, "now", lambda connection: self.now)


def test_one_lease_one_holder_who_is_named(catalog: Catalog) -> None:
    first = Lease(catalog, "coordinator", 10.0, holder="robot-room:1")
    assert first.acquire() == first.acquire() == 1
    with pytest.raises(LeaseLostError, match="held by robot-room:1"):
        Lease(catalog, "coordinator", 10.0).acquire()
    Lease(catalog, "another role", 10.0).acquire()
    first.release()
    assert Lease(catalog, "coordinator", 10.0).acquire() == 2


def test_a_write_under_a_lost_lease_is_refused_in_its_transaction(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    first, second = Lease(catalog, "c", 10.0, "first"), Lease(catalog, "c", 10.0, "second")
    first.acquire()
    clock.now += 11
    second.acquire()

    def write() -> None:
        with catalog.begin() as connection:
            measure(connection, 1.0)
            first.guard(connection)

    with pytest.raises(LeaseLostError, match="held by second"):
        write()
    assert count(catalog) == 0
    clock.now += 11  # though the second's has expired too, the first's token is stale for good
    with pytest.raises(LeaseLostError):
        write()


def test_an_expired_lease_that_nobody_took_still_writes(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    lease = Lease(catalog, "c", 10.0)
    lease.acquire()
    clock.now += 60
    with catalog.begin() as connection:
        lease.guard(connection)
    with pytest.raises(LeaseLostError):  # and is renewed by it
        Lease(catalog, "c", 10.0).acquire()


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["acquire", "write", "release", "wait"])), max_size=30)
)
@settings(max_examples=15, deadline=None)
def test_writes_are_ordered_by_their_tokens(tmp_path_factory: pytest.TempPathFactory, actions) -> None:  # type: ignore[no-untyped-def]
    """Whatever two processes do, the tokens of the writes that commit never decrease, and one token has one holder."""
    catalog = Catalog(url(tmp_path_factory.mktemp("lease")))
    catalog.migrate()
    with pytest.MonkeyPatch.context() as patch:
        clock = Clock(patch)
        holders = {name: Lease(catalog, "c", 10.0, name) for name in "ab"}
        written: list[tuple[int, str]] = []
        for name, action in actions:
            try:
                if action == "acquire":
                    holders[name].acquire()
                elif action == "release":
                    holders[name].release()
                elif action == "wait":
                    clock.now += 6
                else:
                    with catalog.begin() as connection:
                        holders[name].guard(connection)
                    written.append((holders[name].token, name))
            except LeaseLostError:
                continue
    catalog.close()
    assert [token for token, _ in written] == sorted(token for token, _ in written)
    assert len({token for token, _ in written}) == len(set(written))


def _die_inside(home: Path) -> None:
    import os
    import signal

    with Catalog(url(home)).begin() as connection:
        measure(connection, 1.0)
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_writer_leaves_nothing_and_blocks_nobody(catalog: Catalog, tmp_path: Path) -> None:
    assert in_process(_die_inside, tmp_path) == -9
    with catalog.begin() as connection:
        measure(connection, 2.0)
    assert count(catalog) == 1
