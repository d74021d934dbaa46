"""The prefetcher fetches in order, within its budget, verified; what cannot be read is withdrawn by a snapshot."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from invariants import Plane, assert_i2_at_most_once, assert_i3_gapless, example_episode, open_plane

from infra.coordinator import Coordinator
from infra.crashpoints import registered
from infra.errors import UnavailableError
from infra.events.outbox import OutboxLog
from infra.objects import UnreadableError
from infra.prefetcher import Cache, Prefetcher, next_increment

NEVER = threading.Event()


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


def commit(plane: Plane, numbers: range, micro_batch: int = 2) -> None:
    """Put episodes into snapshots of `micro_batch` each."""
    for number in numbers:
        plane.submit(example_episode(number))
    coordinator = Coordinator(
        plane.catalog, plane.objects, OutboxLog(plane.catalog), lambda episode: [], micro_batch=micro_batch
    )
    while coordinator.step():
        pass
    coordinator.lease.release()


def prefetcher(plane: Plane, budget: int = 2**24, **options: object) -> Prefetcher:
    cache = Cache(plane.home / "cache")
    return Prefetcher(plane.catalog, plane.objects, cache, budget=budget, pause_s=0.001, **options)  # type: ignore[arg-type]


def stems(folder: Path) -> set[str]:
    return {path.stem for path in folder.glob("*.tar")}


def test_it_fetches_version_by_version(plane: Plane) -> None:
    commit(plane, range(6))
    fetcher = prefetcher(plane)
    for version in (1, 2, 3):
        assert fetcher.step(NEVER) and fetcher.version == version
        assert stems(plane.home / "cache" / "new") == {m.sha256 for m in plane.snapshots.episodes(version)}
    assert not fetcher.step(NEVER)


def test_it_goes_on_from_a_version(plane: Plane) -> None:
    commit(plane, range(6))
    fetcher = prefetcher(plane, after=2)
    while fetcher.step(NEVER):
        pass
    assert stems(plane.home / "cache" / "new") == {m.sha256 for m in plane.snapshots.increment(2).added}


def test_the_budget_holds_and_taken_objects_make_room(plane: Plane) -> None:
    commit(plane, range(6))
    size = plane.snapshots.episodes(3)[0].size
    budget = 3 * size + size // 2
    fetcher, cache = prefetcher(plane, budget), Cache(plane.home / "cache")
    while fetcher.step(NEVER):
        pass
    assert fetcher.version == 1 and len(stems(cache.new)) == 3 and cache.used() <= budget
    for path in cache.new.glob("*.tar"):  # the reader takes them
        path.rename(cache.kept / path.name)
    while fetcher.step(NEVER):
        assert cache.used() <= budget
    assert fetcher.version == 3 and cache.used() <= budget


def test_an_object_larger_than_the_budget_passes_alone(plane: Plane) -> None:
    commit(plane, range(2), micro_batch=1)
    fetcher, cache = prefetcher(plane, budget=10), Cache(plane.home / "cache")
    assert fetcher.step(NEVER) and not fetcher.step(NEVER)
    assert len(stems(cache.new)) == 1
    for path in cache.new.glob("*.tar"):
        path.rename(cache.kept / path.name)
    assert fetcher.step(NEVER) and fetcher.version == 2


def rot(plane: Plane, key: str) -> None:
    data = bytearray(plane.objects.get(key))
    data[700] ^= 1
    plane.objects.put(key, bytes(data))


@pytest.mark.parametrize(
    "harm",
    [
        rot,
        lambda plane, key: plane.objects.put(key, plane.objects.get(key)[:-512]),
        lambda plane, key: plane.objects.delete(key),
    ],
    ids=["row 6: bit flip", "truncated at rest", "gone"],
)
def test_row_27_an_object_that_stays_unreadable_is_withdrawn_by_a_new_snapshot(
    plane: Plane, harm: Callable[[Plane, str], None]
) -> None:
    commit(plane, range(6))
    bad = plane.snapshots.episodes(2)[2]
    harm(plane, bad.key)
    fetcher = prefetcher(plane, retries=3)
    for _ in range(6):
        fetcher.step(NEVER)
    latest = plane.snapshots.latest()
    assert (latest.version, latest.removed) == (4, 1) and "after 3 tries" in latest.reason
    assert plane.ingest.status(bad.episode_id) == "quarantined"
    assert fetcher.version == 4
    assert stems(plane.home / "cache" / "new") == {m.sha256 for m in plane.snapshots.episodes(4)}
    assert_i2_at_most_once(plane.home)
    assert_i3_gapless(plane.home)


def test_row_7_a_truncated_answer_is_tried_again(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(plane, range(2))
    whole, answers = plane.objects.get, iter([100, 1000])
    monkeypatch.setattr(plane.objects, "get", lambda key: whole(key)[: next(answers, None)])
    fetcher = prefetcher(plane, retries=3)
    assert fetcher.step(NEVER) and fetcher.version == 1
    assert plane.snapshots.latest().version == 1


def test_row_8_a_store_that_does_not_answer_quarantines_nothing(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(plane, range(2))
    stop, calls = threading.Event(), itertools.count(1)
    whole = plane.objects.get

    def down(key: str) -> bytes:
        if next(calls) < 4:
            raise UnavailableError("the store answers 503", "wait")
        return whole(key)

    monkeypatch.setattr(plane.objects, "get", down)
    monkeypatch.setattr("infra.prefetcher.backoff", lambda *_: 0.001)
    fetcher = prefetcher(plane, retries=1)
    step = fetcher.step

    def step_and_stop(event: threading.Event) -> bool:
        worked = step(event)
        if worked:
            stop.set()
        return worked

    monkeypatch.setattr(fetcher, "step", step_and_stop)
    fetcher.run(stop, 0.001)
    assert plane.snapshots.latest().version == 1 and len(stems(plane.home / "cache" / "new")) == 2


@pytest.mark.parametrize("all_of_them", [False, True])
def test_answers_that_break_off_are_held_against_an_object_only_if_others_come(
    plane: Plane, monkeypatch: pytest.MonkeyPatch, all_of_them: bool
) -> None:
    """Damage at rest looks like a bad network, when a server finds it; a bad network must withdraw nothing."""
    commit(plane, range(6))
    bad, whole = plane.snapshots.episodes(1)[0], plane.objects.get

    def get(key: str) -> bytes:
        if all_of_them or key == bad.key:
            raise UnreadableError(f"object {key} did not come whole", "see the network")
        return whole(key)

    monkeypatch.setattr(plane.objects, "get", get)
    fetcher = prefetcher(plane, retries=2)
    if all_of_them:
        for _ in range(3):
            with pytest.raises(UnavailableError, match="did not come whole"):
                fetcher.step(NEVER)
        assert plane.snapshots.latest().version == 3
        all_of_them = False
    for _ in range(5):
        fetcher.step(NEVER)
    assert (plane.snapshots.latest().version, fetcher.version) == (4, 4)
    assert plane.ingest.status(bad.episode_id) == "quarantined"


def test_a_network_that_comes_back_while_others_are_asked_withdraws_nothing(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("infra.prefetcher._AT_ONCE", 1)  # one after the other: the order of the calls is what is tested
    commit(plane, range(2))
    whole, calls = plane.objects.get, itertools.count(1)

    def get(key: str) -> bytes:
        if next(calls) <= 2:  # both tries of the first object; then another is asked for, and comes
            raise UnreadableError(f"object {key} did not come whole", "see the network")
        return whole(key)

    monkeypatch.setattr(plane.objects, "get", get)
    fetcher = prefetcher(plane, retries=2)
    assert fetcher.step(NEVER) and fetcher.version == plane.snapshots.latest().version == 1


# --- several at once --------------------------------------------------------------------------------------------------


def test_four_objects_are_fetched_at_once(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(plane, range(8), micro_batch=8)
    whole, together = plane.objects.get, threading.Barrier(4)

    def get(key: str) -> bytes:
        together.wait(30)
        return whole(key)

    monkeypatch.setattr(plane.objects, "get", get)
    assert prefetcher(plane).step(NEVER)
    assert len(stems(plane.home / "cache" / "new")) == 8


@pytest.mark.parametrize("room", [1, 2, 3, 5])
def test_what_is_under_way_counts_against_the_budget(plane: Plane, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    commit(plane, range(6), micro_batch=6)
    size = plane.snapshots.episodes(1)[0].size
    cache, whole, lock = Cache(plane.home / "cache"), plane.objects.get, threading.Lock()
    under_way, most = 0, 0

    def get(key: str) -> bytes:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way + len(stems(cache.new)))
        data = whole(key)
        with lock:
            under_way -= 1
        return data

    monkeypatch.setattr(plane.objects, "get", get)
    fetcher = prefetcher(plane, budget=room * size + size // 2)
    brought: set[str] = set()
    while not fetcher.step(NEVER):
        new = stems(cache.new)
        assert 0 < len(new) <= room, "no progress, or beyond the budget"
        brought |= new
        for path in cache.new.glob("*.tar"):
            path.rename(cache.kept / path.name)
    assert most <= room
    assert brought | stems(cache.new) == {m.sha256 for m in plane.snapshots.episodes(1)}


def test_each_of_several_unreadable_objects_is_withdrawn(plane: Plane) -> None:
    commit(plane, range(6), micro_batch=6)
    bad = plane.snapshots.episodes(1)[1:4]
    for member in bad:
        rot(plane, member.key)
    fetcher = prefetcher(plane, retries=2)
    for _ in range(5):
        fetcher.step(NEVER)
    latest = plane.snapshots.latest()
    assert (latest.version, latest.episodes, fetcher.version) == (4, 3, 4)
    assert {plane.ingest.status(member.episode_id) for member in bad} == {"quarantined"}
    assert_i3_gapless(plane.home)


def test_what_was_brought_beside_a_failure_is_not_brought_again(plane: Plane, monkeypatch: pytest.MonkeyPatch) -> None:
    commit(plane, range(4), micro_batch=4)
    bad, whole, asked = plane.snapshots.episodes(1)[0].key, plane.objects.get, list[str]()

    def get(key: str) -> bytes:
        asked.append(key)
        if key == bad and asked.count(bad) == 1:
            raise UnavailableError("the store answers 503", "wait")
        return whole(key)

    monkeypatch.setattr(plane.objects, "get", get)
    fetcher = prefetcher(plane)
    with pytest.raises(UnavailableError, match="503"):
        fetcher.step(NEVER)
    assert fetcher.step(NEVER) and fetcher.version == 1
    assert len(asked) == 5 and asked.count(bad) == 2


def test_it_stops_between_two_tries(plane: Plane) -> None:
    commit(plane, range(2))
    rot(plane, plane.snapshots.episodes(1)[0].key)
    stop = threading.Event()
    stop.set()
    assert not prefetcher(plane).step(stop)
    assert plane.snapshots.latest().version == 1 and stems(plane.home / "cache" / "new") == set()


def test_the_next_step_reaches_over_what_was_withdrawn(plane: Plane) -> None:
    commit(plane, range(8))  # versions 1 to 4
    first, third = plane.snapshots.episodes(1)[0], plane.snapshots.increment(2, 3).added[0]
    plane.snapshots.withdraw([third.episode_id], reason="test", writer="test")  # 5
    plane.snapshots.withdraw([first.episode_id], reason="test", writer="test")  # 6
    step = next_increment(plane.catalog, 0)
    assert step is not None and step.version == 6 and len(step.added) == 6 and step.removed == ()
    step = next_increment(plane.catalog, 1)
    assert step is not None and (step.version, step.removed) == (2, ())
    step = next_increment(plane.catalog, 2)
    assert step is not None and (step.version, len(step.added), step.removed) == (5, 3, ())
    step = next_increment(plane.catalog, 5)
    assert step is not None and (step.version, step.added, step.removed) == (6, (), (first.episode_id,))
    assert next_increment(plane.catalog, 6) is None


def test_its_crash_points_are_known() -> None:
    """test_reader kills the process at each."""
    assert set(registered("prefetcher.py")) == {"prefetcher.fetched"}
