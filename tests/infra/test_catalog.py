"""The catalog: migrations, the two kinds of transaction, leases, and what its errors say."""

from __future__ import annotations

import os
import signal
import time
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
from infra.catalog.leases import Lease, held
from infra.errors import ConfigError, CorruptDataError, LeaseLostError, StorageFullError, UnavailableError
from infra.plane import open_catalog
from infra.settings import load_settings


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


# --- clocks that jump -------------------------------------------------------------------------------------------------

DAY = 86_400.0


def _take_and_die(home: Path, name: str, seconds: float, ahead: float) -> None:
    """A machine whose clock is wrong by `ahead` takes a lease and is killed."""
    dialect.now = lambda connection: time.time() + ahead  # type: ignore[assignment]
    Lease(Catalog(url(home)), name, seconds).acquire()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("ahead", [DAY, 3 * 365 * DAY, 60.0, 1e300])
def test_a_lease_of_a_clock_that_is_ahead_silences_nobody(catalog: Catalog, tmp_path: Path, ahead: float) -> None:
    assert in_process(_take_and_die, tmp_path, "coordinator", 10.0, ahead) == -9
    assert Lease(catalog, "coordinator", 10.0).acquire() == 2


def test_a_lease_of_a_clock_that_is_behind_lasts_as_long_as_it_is_renewed(catalog: Catalog, tmp_path: Path) -> None:
    assert in_process(_take_and_die, tmp_path, "coordinator", 10.0, -DAY) == -9
    assert Lease(catalog, "coordinator", 10.0).acquire() == 2


def test_a_lease_that_is_not_renewed_ends_though_the_clock_stands(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiter goes by its own monotonic clock where the catalog's is put back again and again."""
    clock, own = Clock(monkeypatch), [50.0]
    monkeypatch.setattr("infra.catalog.leases.time.monotonic", lambda: own[0])
    Lease(catalog, "c", 10.0, "dead").acquire()
    waiter = Lease(catalog, "c", 60.0, "waiter")  # what counts is what the holder asked for
    for _ in range(4):
        with pytest.raises(LeaseLostError, match="held by dead"):
            waiter.acquire()
        own[0] += 3.0
        clock.now -= 1.0
    assert waiter.acquire() == 2


@pytest.mark.parametrize("jump", [DAY, -DAY])
def test_a_holder_that_renews_keeps_its_lease_from_who_watches_it(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, jump: float
) -> None:
    clock, own = Clock(monkeypatch), [50.0]
    monkeypatch.setattr("infra.catalog.leases.time.monotonic", lambda: own[0])
    holder, waiter = Lease(catalog, "c", 10.0, "holder"), Lease(catalog, "c", 10.0, "waiter")
    clock.now = 10 * DAY

    def pass_by(seconds: float) -> None:
        clock.now += seconds
        own[0] += seconds

    for step in range(12):
        holder.acquire()
        with pytest.raises(LeaseLostError):
            waiter.acquire()
        pass_by(3.0)
        if step == 6:
            clock.now += jump
            with pytest.raises(LeaseLostError):
                waiter.acquire()
    pass_by(11.0)  # it died
    assert waiter.acquire() == 2


def _contend(home: Path, name: str, ahead: float, rounds: int) -> None:
    """What a standby process does, with a clock that is wrong by `ahead`."""
    dialect.now = lambda connection: time.time() + ahead  # type: ignore[assignment]
    catalog = Catalog(url(home))
    lease = Lease(catalog, "c", 0.6, name)
    for _ in range(rounds):
        try:
            lease.acquire()
            with catalog.begin() as connection:
                lease.guard(connection)
                values = {"name": name, "value": float(lease.token), "at": 0.0}
                connection.execute(schema.measurements.insert().values(values))
        except LeaseLostError:
            pass
        time.sleep(0.05)


def test_two_machines_whose_clocks_differ_by_a_day_do_not_take_turns(catalog: Catalog, tmp_path: Path) -> None:
    processes = [start_process(_contend, tmp_path, name, ahead, 40) for name, ahead in (("ahead", DAY), ("right", 0.0))]
    for process in processes:
        process.join()
    with catalog.read() as connection:
        rows = connection.execute(sa.select(schema.measurements).order_by(schema.measurements.c.id)).all()
    assert [row.value for row in rows] == sorted(row.value for row in rows), "fenced"
    assert len({(row.name, row.value) for row in rows}) == len({row.value for row in rows}), "one holder for each token"
    assert max(row.value for row in rows) <= 4, "a hand-over at most each way, and one when the first ends"


def test_who_looks_from_outside_sees_the_living_holders_alone(catalog: Catalog) -> None:
    mine = Lease(catalog, "coordinator", 10.0, "me")
    mine.acquire()
    with catalog.begin() as connection:
        values = {"holder": "x", "token": 1, "seconds": 10.0}
        connection.execute(schema.leases.insert().values(name="old", expires_at=1.0, **values))
        connection.execute(schema.leases.insert().values(name="wild", expires_at=time.time() + DAY, **values))
    with catalog.read() as connection:
        assert held(connection) == [("coordinator", "me")]
    mine.release()
    with catalog.read() as connection:
        assert held(connection) == []


# --- files that are no catalog ----------------------------------------------------------------------------------------


def _open(home: Path) -> None:
    open_catalog(load_settings(home=home), migrate=True).close()


@pytest.mark.parametrize("content", [b"x" * 5000, b"SQLite format 3\x00" + b"\xff" * 8000, b"\x00" * 4096])
def test_a_file_that_is_no_database_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "catalog.db").write_bytes(content)
    with pytest.raises((CorruptDataError, ConfigError), match=r"catalog.*catalog\.db"):
        _open(tmp_path)
    assert (tmp_path / "catalog.db").read_bytes() == content, "it is kept for a person"


def test_a_file_that_is_cut_off_is_named(catalog: Catalog, tmp_path: Path) -> None:
    catalog.close()
    path = tmp_path / "catalog.db"
    path.write_bytes(path.read_bytes()[: 4096 * 3])
    with pytest.raises(CorruptDataError, match="damaged"):
        _open(tmp_path)


@pytest.mark.parametrize("revision", ["9999", "", "f00d; drop table", "é"])
def test_a_catalog_of_a_later_version_is_left_alone(catalog: Catalog, tmp_path: Path, revision: str) -> None:
    with catalog.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = :r"), {"r": revision})
    for work in (catalog.migrate, catalog.check, lambda: _open(tmp_path)):
        with pytest.raises(ConfigError, match="of a later one"):
            work()
    assert catalog.revision() == revision


@pytest.mark.parametrize("table", ["pins", "snapshots", "outbox"])
def test_a_missing_table_is_named(catalog: Catalog, tmp_path: Path, table: str) -> None:
    with catalog.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {table}")
    with pytest.raises(CorruptDataError, match=f"no table {table}"):
        _open(tmp_path)


def test_a_folder_in_place_of_the_catalog_is_named(tmp_path: Path) -> None:
    (tmp_path / "catalog.db").mkdir()
    with pytest.raises(UnavailableError, match=r"catalog\.db"):
        _open(tmp_path)


def test_a_catalog_that_cannot_be_written_is_named(catalog: Catalog, tmp_path: Path) -> None:
    catalog.close()
    reader = Catalog(f"sqlite:///file:{tmp_path / 'catalog.db'}?mode=ro&uri=true")
    with pytest.raises(UnavailableError, match="readonly"), reader.begin() as connection:
        measure(connection, 1.0)


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_is_taken_away_acknowledges_nothing(catalog: Catalog, tmp_path: Path, replaced: bool) -> None:
    """SQLite itself would go on writing to the file that has no name any more."""
    with catalog.begin() as connection:
        measure(connection, 1.0)
    for path in tmp_path.glob("catalog.db*"):
        path.rename(tmp_path / f"moved-{path.name}")
    if replaced:
        other = Catalog(url(tmp_path))
        other.migrate()
        other.close()
    with pytest.raises(UnavailableError, match="removed or replaced"), catalog.begin() as connection:
        measure(connection, 2.0)
    if replaced:  # and goes on with the one that is there
        with catalog.begin() as connection:
            measure(connection, 3.0)
        assert count(catalog) == 1
