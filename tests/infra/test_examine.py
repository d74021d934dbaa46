"""Verdicts: whatever an event's object holds, it ends accepted or refused with a reason, and alone."""

from __future__ import annotations

import itertools
import threading
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from invariants import Plane, digest, example_episode, open_plane
from test_coordinator import Flaky, Violation, coordinator, drain, held, members

from infra import examine
from infra.episode import SCHEMA_VERSION, Episode, encode
from infra.errors import UnavailableError
from infra.events import Event
from infra.examine import Examiner
from infra.objects import UnreadableError


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


@pytest.mark.parametrize("severity", ["block", "a severity of a newer contract"])
def test_a_broken_rule_quarantines_that_episode_alone(plane: Plane, severity: str) -> None:
    def check(episode: Episode) -> Sequence[Violation]:
        rules = [Violation("range", "warn", "odd"), Violation("finite", severity, "NaN in actions")]
        return rules if episode.episode_id.endswith("1") else []

    for number in range(3):
        plane.submit(example_episode(number))
    drain(coordinator(plane, check))
    assert members(plane) == {0, 2}
    assert held(plane) == {f"{1:032x}": ("contract", "odd; NaN in actions")}
    assert plane.ingest.status(f"{1:032x}") == "quarantined"


def test_the_batch_check_sees_what_was_accepted(plane: Plane) -> None:
    seen: list[list[str]] = []

    def batch_check(batch: Sequence[Episode]) -> dict[str, list[Violation]]:
        seen.append([episode.episode_id[-1] for episode in batch])
        return {
            batch[0].episode_id: [Violation("gx", "block", "range")],
            batch[1].episode_id: [Violation("w", "warn", "m")],
        }

    for number in range(4):
        plane.submit(example_episode(number))

    def check(episode: Episode) -> Sequence[Violation]:
        return [Violation("r", "block", "m")] if episode.episode_id.endswith("0") else []

    drain(coordinator(plane, check, batch_check=batch_check))
    assert seen == [["1", "2", "3"]]
    assert members(plane) == {2, 3}


@pytest.mark.parametrize("which", ["check", "batch_check"])
def test_a_check_that_breaks_accepts_nothing_and_can_be_mended(plane: Plane, which: str) -> None:
    def broken(_: object) -> list[Violation]:
        raise ZeroDivisionError("in the check")

    episode = example_episode(1)
    plane.submit(episode)
    drain(coordinator(plane, broken) if which == "check" else coordinator(plane, batch_check=broken))
    assert "ZeroDivisionError" in held(plane)[episode.episode_id][1]
    plane.ingest.release(episode.episode_id, digest(encode(episode)))
    assert plane.ingest.status(episode.episode_id) == "committed"
    drain(coordinator(plane))
    assert members(plane) == {1} and held(plane) == {}


def _submit_bytes(plane: Plane, number: int, data: bytes, **meta: object) -> None:
    plane.ingest.submit("r0", f"{number:032x}", data, digest(data), len(data), meta)


def test_poison_is_put_aside_with_its_reason_and_the_rest_goes_on(plane: Plane) -> None:
    good = encode(example_episode(1))
    _submit_bytes(plane, 2, b"not a tar")
    _submit_bytes(plane, 3, good[: len(good) // 2])
    _submit_bytes(plane, 4, good)  # says that it is episode 1
    _submit_bytes(plane, 5, encode(example_episode(5, robot="r9")))
    _submit_bytes(plane, 6, encode(example_episode(6)), schema_version=99)
    _submit_bytes(plane, 7, encode(example_episode(7, schema_version=2)))
    _submit_bytes(plane, 8, b"")
    plane.submit(example_episode(9))
    drain(coordinator(plane))
    assert members(plane) == {9}
    found = {int(identifier, 16): reason for identifier, reason in held(plane).items()}
    stages = {number: stage for number, (stage, _) in found.items()}
    assert stages == {2: "decode", 3: "decode", 4: "identity", 5: "identity", 6: "schema", 7: "identity", 8: "decode"}
    assert "schema version 99" in found[6][1]
    assert "'r9'" in found[5][1]


def test_a_truncated_read_is_tried_again(plane: Plane) -> None:
    plane.submit(example_episode(1))
    drain(coordinator(plane, objects=Flaky(plane.objects.root, 4, unavailable=False)))
    assert members(plane) == {1} and held(plane) == {}


# --- several at once --------------------------------------------------------------------------------------------------


def event(number: int, data: bytes, **changes: object) -> Event:
    claim = {"robot_id": "r0", "key": f"episodes/{number}.tar", "sha256": digest(data), "size": len(data)}
    values = {"offset": number, "episode_id": f"{number:032x}", "schema_version": SCHEMA_VERSION, "trace_id": "t"}
    return Event(**{**values, **claim, **changes})  # type: ignore[arg-type]


class Together(dict[str, bytes]):
    """Objects that come only when four are asked for at once, later ones first."""

    def __init__(self, data: dict[str, bytes]) -> None:
        super().__init__(data)
        self.barrier = threading.Barrier(4)

    def get(self, key: str) -> bytes:  # type: ignore[override]
        order = self.barrier.wait(30)
        threading.Event().wait(0.01 * order)
        return self[key]


def test_objects_are_fetched_at_once_and_judged_in_order() -> None:
    data = {number: encode(example_episode(number)) for number in range(8)}
    data[3] = b"not a tar"
    judged: list[int] = []

    def check(episode: Episode) -> Sequence[Violation]:
        assert threading.current_thread() is threading.main_thread()
        judged.append(int(episode.episode_id, 16))
        return []

    events = [event(number, content) for number, content in data.items()]
    events.insert(5, event(9, b"", schema_version=99))
    store = Together({f"episodes/{number}.tar": content for number, content in data.items()})
    verdicts = Examiner(store, check).examine(events)  # type: ignore[arg-type]
    assert [verdict.event for verdict in verdicts] == events
    assert judged == [0, 1, 2, 4, 5, 6, 7]
    assert [(v.event.offset, v.stage) for v in verdicts if not v.accepted] == [(3, "decode"), (9, "schema")]


class Large:
    """Objects of 4 MiB, made when they are asked for."""

    def __init__(self, events: int) -> None:
        self.shape = (5, 2**18)
        self.events = [event(number, self.get(f"episodes/{number}.tar")) for number in range(events)]

    def get(self, key: str) -> bytes:
        number = int(key.removeprefix("episodes/").removesuffix(".tar"))
        return encode(example_episode(number, observations=np.full(self.shape, number, np.float32)))


@pytest.mark.parametrize("ahead", [1, 12 * 2**20], ids=["larger than what is fetched ahead", "two at once"])
def test_memory_does_not_grow_with_the_number_of_episodes(monkeypatch: pytest.MonkeyPatch, ahead: int) -> None:
    monkeypatch.setattr(examine, "_AHEAD_BYTES", ahead)
    store, peaks = Large(12), []
    tracemalloc.start()
    try:
        for events in store.events[:4], store.events:
            tracemalloc.reset_peak()
            verdicts = Examiner(store, lambda episode: []).examine(events)  # type: ignore[arg-type]
            peaks.append(tracemalloc.get_traced_memory()[1])
            assert all(verdict.accepted for verdict in verdicts)
    finally:
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 12 * store.events[0].size


def test_a_store_that_goes_away_among_several_decides_nothing(plane: Plane) -> None:
    for number in range(6):
        plane.submit(example_episode(number))

    class Away(type(plane.objects)):  # type: ignore[misc]
        calls = itertools.count()

        def get(self, key: str) -> bytes:
            if next(self.calls) == 3:
                raise UnavailableError("store: 503", "wait")
            return super().get(key)

    worker = coordinator(plane, objects=Away(plane.objects.root), micro_batch=6)
    with pytest.raises(UnavailableError):
        worker.step()
    assert plane.snapshots.latest().version == 0 and held(plane) == {}
    drain(worker)
    assert members(plane) == set(range(6))


def test_an_object_whose_bytes_break_off_is_asked_for_again_and_keeps_nobody_waiting(plane: Plane) -> None:
    for number in range(3):
        plane.submit(example_episode(number))
    lost = f"{1:032x}"

    class Damaged(type(plane.objects)):  # type: ignore[misc]
        def get(self, key: str) -> bytes:
            data = super().get(key)
            if lost.encode() in data:
                raise UnreadableError(f"object {key} did not come whole", "send it again")
            return data

    drain(coordinator(plane, objects=Damaged(plane.objects.root)))
    assert members(plane) == {0, 2} and held(plane)[lost][0] == "store"
    assert plane.ingest.status(lost) == "unknown"
