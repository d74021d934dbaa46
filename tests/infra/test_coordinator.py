"""The coordinator: every event ends once, in a snapshot or in quarantine, whatever is in it and whoever dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from invariants import Plane, digest, example_episode, open_plane

from infra.catalog import dialect
from infra.catalog.schema import dead_letters, episodes, quarantine, snapshot_episodes
from infra.coordinator import Coordinator
from infra.episode import Episode, encode
from infra.errors import ConflictError, LeaseLostError, UnavailableError
from infra.events import DeadLetter, Event, announce, stored_offsets
from infra.events.outbox import OutboxLog
from infra.objects.directory import DirectoryStore
from infra.settings import Settings


@dataclass(frozen=True)
class Violation:
    rule: str
    severity: str
    message: str


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


def accept(episode: Episode) -> Sequence[Violation]:
    return []


def coordinator(
    plane: Plane, check: Callable[[Episode], Sequence[Violation]] = accept, **options: object
) -> Coordinator:
    values = {"objects": plane.objects, "events": OutboxLog(plane.catalog), "sleep": lambda seconds: None, **options}
    return Coordinator(plane.catalog, check=check, **values)  # type: ignore[arg-type]


def drain(worker: Coordinator) -> None:
    while worker.step():
        pass
    worker.lease.release()


def held(plane: Plane) -> dict[str, tuple[str, str]]:
    """id -> (stage, all reasons) of what is in quarantine."""
    with plane.catalog.read() as connection:
        rows = list(connection.execute(sa.select(quarantine)))
    return {row.episode_id: (row.stage, "; ".join(reason["message"] for reason in row.reasons)) for row in rows}


def members(plane: Plane) -> set[int]:
    return {int(m.episode_id, 16) for m in plane.snapshots.episodes(plane.snapshots.latest().version)}


def test_micro_batches_become_snapshots(plane: Plane) -> None:
    for number in range(5):
        plane.submit(example_episode(number))
    worker = coordinator(plane, micro_batch=2)
    assert [worker.step() for _ in range(4)] == [2, 2, 1, 0]
    assert [plane.snapshots.get(v).episodes for v in (1, 2, 3)] == [2, 4, 5]
    assert plane.snapshots.latest().version == 3
    assert plane.ingest.status(example_episode(1).episode_id) == "snapshot"


def test_what_the_episode_says_is_kept_beside_it(plane: Plane) -> None:
    episode = example_episode(1, task="L2", source="play", outcome="time_limit", policy_version=None)
    episode.intervention[1:3] = True
    plane.submit(episode)
    drain(coordinator(plane, lambda episode: [Violation("short", "warn", "only 4 steps")]))
    with plane.catalog.read() as connection:
        row = connection.execute(sa.select(snapshot_episodes)).one()
    assert (row.task, row.source, row.outcome, row.policy_version) == ("L2", "play", "time_limit", None)
    assert (row.steps, row.interventions) == (4, 2)
    assert row.warnings == [{"rule": "short", "severity": "warn", "message": "only 4 steps"}]


def test_duplicates_and_reordering_give_one_set(plane: Plane) -> None:
    """Faults 16 and 17: a log that repeats each event a hundred times, in another order each time."""

    class Noisy(OutboxLog):
        def poll(self, consumer: str, max_events: int) -> list[Event]:
            events = super().poll(consumer, max_events)
            return [event for n in range(100) for event in (events[::-1] if n % 2 else events)]

    for number in range(6):
        plane.submit(example_episode(number))
    worker = coordinator(plane, events=Noisy(plane.catalog), micro_batch=3)
    assert worker.step() == 300
    drain(worker)
    assert members(plane) == set(range(6))
    assert plane.snapshots.latest().version == 2


@pytest.mark.parametrize("damage", ["gone", "flipped", "truncated"])
def test_an_object_lost_before_its_snapshot_is_asked_for_again(plane: Plane, damage: str) -> None:
    """Faults 5 to 7: not in a snapshot, not dropped: the spool, which still has it, sends it again."""
    episode = example_episode(1)
    plane.submit(episode)
    with plane.catalog.read() as connection:
        path = plane.objects.root / connection.execute(sa.select(episodes.c.key)).scalar_one()
    data = path.read_bytes()
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(data[:700] if damage == "truncated" else data[:-1] + bytes([data[-1] ^ 1]))
    drain(coordinator(plane))
    assert members(plane) == set()
    assert held(plane)[episode.episode_id][0] == "store"
    assert plane.ingest.status(episode.episode_id) == "unknown"
    assert plane.submit(episode) == "committed"
    drain(coordinator(plane))
    assert members(plane) == {1} and held(plane) == {}


class Flaky(DirectoryStore):
    """A store whose reads fail a number of times, by not answering or by half an answer."""

    def __init__(self, root: Path, failures: int, unavailable: bool) -> None:
        super().__init__(root)
        self.failures, self.unavailable = failures, unavailable

    def get(self, key: str) -> bytes:
        data = super().get(key)
        if self.failures:
            self.failures -= 1
            if self.unavailable:
                raise UnavailableError("store: 503", "wait")
            return data[:100]
        return data


def test_a_store_that_is_away_stops_the_offsets_and_loses_nothing(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    plane.submit(example_episode(1))
    worker = coordinator(plane, objects=Flaky(plane.objects.root, 3, unavailable=True))
    with pytest.raises(UnavailableError):
        worker.step()
    assert plane.ingest.status(f"{1:032x}") == "committed"
    stop = threading.Event()
    monkeypatch.setattr("infra.coordinator.backoff", lambda attempt: 0.0)
    step = worker.step

    def step_and_stop() -> int:
        if handled := step():
            stop.set()
        return handled

    monkeypatch.setattr(worker, "step", step_and_stop)
    worker.run(stop, poll_s=0.0)
    assert members(plane) == {1}
    coordinator(plane).step()  # run() gave the lease back


def test_a_revoked_robot_is_refused_from_then_on(plane: Plane) -> None:
    plane.submit(example_episode(1, robot="r1"), produced_at=100.0)
    drain(coordinator(plane))
    snapshot = plane.snapshots.revoke("r1", 50.0, 150.0, reason="miscalibrated", actor="steward")
    assert (snapshot.version, snapshot.episodes) == (2, 0)
    plane.submit(example_episode(2, robot="r1"), produced_at=120.0)  # late, from its spool
    plane.submit(example_episode(3, robot="r1"), produced_at=160.0)
    plane.submit(example_episode(4, robot="r2"), produced_at=120.0)
    drain(coordinator(plane))
    assert members(plane) == {3, 4}
    assert held(plane)[f"{2:032x}"] == ("revoked", "r1 was revoked: miscalibrated")


def test_a_conflicting_copy_never_reaches_a_snapshot(plane: Plane) -> None:
    first, second = example_episode(1), example_episode(1, task="L1")
    plane.submit(first)
    with pytest.raises(ConflictError):
        plane.submit(second)
    drain(coordinator(plane))
    version = plane.snapshots.latest().version
    assert [m.sha256 for m in plane.snapshots.episodes(version)] == [digest(encode(first))]
    assert plane.ingest.status(first.episode_id, digest(encode(second))) == "quarantined"
    assert plane.ingest.status(first.episode_id, digest(encode(first))) == "snapshot"


# --- two coordinators -------------------------------------------------------------------------------------------------


def test_a_second_coordinator_is_refused_and_told_by_whom(plane: Plane) -> None:
    plane.submit(example_episode(1))
    first = coordinator(plane, holder="first:1")
    assert first.step() == 1
    with pytest.raises(LeaseLostError, match="held by first:1"):
        coordinator(plane).step()


def test_a_stale_coordinator_cannot_write(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fault 23: stopped between reading and committing for longer than its lease, while another took over."""
    clock = [1000.0]
    monkeypatch.setattr(dialect, "now", lambda connection: clock[0])
    plane.submit(example_episode(1))
    plane.submit(example_episode(2))
    other = coordinator(plane, holder="second:2", micro_batch=1)

    def stopped_meanwhile(episode: Episode) -> Sequence[Violation]:
        clock[0] += 60
        other.step()
        return []

    stale = coordinator(plane, stopped_meanwhile, holder="first:1", micro_batch=1)
    with pytest.raises(LeaseLostError, match="held by second:2"):
        stale.step()
    assert (members(plane), plane.snapshots.latest().version) == ({1}, 1)
    drain(other)
    assert members(plane) == {1, 2}
    assert plane.snapshots.verify() == 2


def test_an_examination_longer_than_the_lease_keeps_it(plane: Plane) -> None:
    """Else an episode that takes long goes from one coordinator to the other for ever, and those behind it wait."""
    plane.submit(example_episode(1))
    standby = coordinator(plane, holder="second:2", lease_s=1.0)

    def long(episode: Episode) -> Sequence[Violation]:
        end = time.monotonic() + 2.5
        while time.monotonic() < end:
            with pytest.raises(LeaseLostError, match="held by first:1"):
                standby.step()
            time.sleep(0.05)
        return []

    assert coordinator(plane, long, holder="first:1", lease_s=1.0).step() == 1
    assert members(plane) == {1}


@pytest.mark.parametrize("skew", [-3600.0, 3600.0])
def test_a_clock_that_jumps_changes_no_order(plane: Plane, monkeypatch: pytest.MonkeyPatch, skew: float) -> None:
    """Fault 24."""
    plane.submit(example_episode(1))
    worker = coordinator(plane)
    worker.step()
    now = dialect.now
    monkeypatch.setattr(dialect, "now", lambda connection: now(connection) + skew)
    plane.submit(example_episode(2))
    drain(worker)
    assert [plane.snapshots.get(v).episodes for v in (1, 2)] == [1, 2]
    assert plane.snapshots.verify() == 2


def test_an_event_without_its_row_is_passed_over(plane: Plane) -> None:
    """A log restored to later than the catalog announces what was never committed here."""
    claim = {"robot_id": "r0", "key": "episodes/00/x.tar", "sha256": "0" * 64, "size": 1, "trace_id": "t"}
    with plane.catalog.begin() as connection:
        announce(connection, episode_id=f"{1:032x}", schema_version=1, **claim)  # type: ignore[arg-type]
    plane.submit(example_episode(2))
    drain(coordinator(plane))
    assert members(plane) == {2} and held(plane) == {}


@pytest.mark.parametrize(
    "lie",
    [
        {"robot_id": "r1"},
        {"schema_version": 7},
        {"key": f"episodes/00/{'0' * 64}.tar"},
        {"size": 2**62},
        {"trace_id": ""},
    ],
    ids=str,
)
def test_what_the_log_says_beside_the_name_of_an_episode_is_not_believed(plane: Plane, lie: dict[str, Any]) -> None:
    """Whoever can write to the broker could else have an honest episode refused."""

    class Forged(OutboxLog):
        def poll(self, consumer: str, max_events: int) -> list[Event | DeadLetter]:
            return [replace(event, **lie) for event in super().poll(consumer, max_events)]  # type: ignore[type-var]

    plane.submit(example_episode(1))
    drain(coordinator(plane, events=Forged(plane.catalog)))
    assert members(plane) == {1} and held(plane) == {}


# --- dead letters -----------------------------------------------------------------------------------------------------


class Poisoned(OutboxLog):
    """A log of two partitions, of which the second holds records that are no events."""

    name = "poisoned"
    letters = (DeadLetter(1, 1, "{", "no JSON"), DeadLetter(2, 1, "[]", "no object"))

    def poll(self, consumer: str, max_events: int) -> list[Event | DeadLetter]:
        with self._catalog.read() as connection:
            position = stored_offsets(connection, consumer).get(1, 0)
        found = [letter for letter in self.letters if letter.offset > position]
        return [*found, *super().poll(consumer, max_events)]


def test_row_18_poison_is_kept_with_its_reason_and_the_partition_advances(plane: Plane) -> None:
    for number in (1, 2):
        plane.submit(example_episode(number))
    worker = coordinator(plane, events=Poisoned(plane.catalog), micro_batch=1)
    assert [worker.step() for _ in range(3)] == [3, 1, 0]
    with plane.catalog.read() as connection:
        rows = connection.execute(sa.select(dead_letters).order_by(dead_letters.c.position)).all()
        assert stored_offsets(connection, "coordinator") == {0: 2, 1: 2}
    assert [(row.log, row.partition, row.position, row.payload, row.reason) for row in rows] == [
        ("poisoned", 1, 1, "{", "no JSON"),
        ("poisoned", 1, 2, "[]", "no object"),
    ]
    assert members(plane) == {1, 2}


def test_dead_letters_alone_make_no_snapshot_and_are_buried_once(plane: Plane) -> None:
    class Again(Poisoned):
        def poll(self, consumer: str, max_events: int) -> list[Event | DeadLetter]:
            return list(self.letters)

    worker = coordinator(plane, events=Again(plane.catalog))
    assert worker.step() == worker.step() == 2
    with plane.catalog.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(dead_letters)).scalar_one() == 2
    assert plane.snapshots.latest().version == 0


# --- the influence cap ------------------------------------------------------------------------------------------------


def test_one_robot_makes_up_no_more_than_its_share(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.coordinator.INFLUENCE_FROM", 4)
    for number, robot in enumerate(["a", "a", "a", "b", "a", "b", "b", "a"]):
        plane.submit(example_episode(number, robot=robot))
    drain(coordinator(plane, influence_max=0.6, micro_batch=3))
    # 0 to 3 begin the snapshot; then a has 3 of 4: its next would be 4 of 5, b's are welcome, and then a's again.
    assert members(plane) == {0, 1, 2, 3, 5, 6, 7}
    stage, why = held(plane)[f"{4:032x}"]
    assert stage == "influence" and why == "a would make up 4 of 5 episodes, above 60%"
    late = example_episode(4, robot="a")
    plane.ingest.release(late.episode_id, digest(encode(late)))
    drain(coordinator(plane, influence_max=0.6))
    assert held(plane)[late.episode_id][0] == "influence", "5 of 8 is too much still"
    plane.submit(example_episode(8, robot="b"))
    drain(coordinator(plane, influence_max=0.6))
    plane.ingest.release(late.episode_id, digest(encode(late)))
    drain(coordinator(plane, influence_max=0.6))
    assert members(plane) == set(range(9)) and held(plane) == {}


def test_what_was_revoked_does_not_count_towards_the_share(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.coordinator.INFLUENCE_FROM", 4)
    for number in range(6):
        plane.submit(example_episode(number, robot="ab"[number % 2]), produced_at=float(number))
    drain(coordinator(plane, influence_max=0.6))
    plane.snapshots.revoke("a", 0.0, 2.0, reason="loose gripper", actor="steward")  # leaves one of a and three of b
    for number in (6, 7):
        plane.submit(example_episode(number, robot="ab"[number % 2]), produced_at=float(number))
    drain(coordinator(plane, influence_max=0.6))
    assert members(plane) == {1, 3, 4, 5, 6} and held(plane)[f"{7:032x}"][0] == "influence"


def test_the_share_counts_once_enough_robots_are_seen(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.coordinator.INFLUENCE_FROM", 4)
    defaults = {name: Settings.model_fields[f"influence_{name}"].default for name in ("max", "robots")}
    assert 0 < defaults["max"] < 1
    own = {f"influence_{name}": value for name, value in defaults.items()}
    for number, robot in enumerate("aaaaaabcd"):  # four robots: one may do most of the work
        plane.submit(example_episode(number, robot=robot))
    drain(coordinator(plane, micro_batch=3, **own))
    assert members(plane) == set(range(9)) and held(plane) == {}
    at_work = coordinator(plane, micro_batch=3, **own)
    for number, robot in enumerate("eaaebcdea", 9):
        plane.submit(example_episode(number, robot=robot))
    drain(at_work)  # 6 of 10 already; a's next would be the 7th of 11, and so on; the last is the 7th of 17
    assert {stage for stage, _ in held(plane).values()} == {"influence"}
    assert members(plane) == set(range(18)) - {10, 11}
    plane.submit(example_episode(18, robot="a"))
    drain(at_work)
    assert 18 in members(plane)


def test_without_a_cap_nothing_is_counted(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.coordinator.INFLUENCE_FROM", 0)
    monkeypatch.setattr("infra.coordinator._members_of", lambda *_: 1 / 0)
    plane.submit(example_episode(1))
    drain(coordinator(plane))
    assert members(plane) == {1}
