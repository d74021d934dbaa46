"""Callers' types at the edge: taken as what they are, or refused by name when they are given."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import decimal
import enum
import json
import math
import pathlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.edge import values
from infra.edge.client import EdgeClient
from infra.edge.framelog import Frame
from infra.edge.spool import Spool
from infra.episode import Episode, decode
from infra.errors import ConfigError


class Nowhere:
    def statuses(self, episodes: Any) -> list[Any]:
        return ["unknown"] * len(episodes)

    def submit_many(self, uploads: Any) -> list[Any]:
        return ["committed"] * len(uploads)


class Tensor:
    """What a tensor of another library is to this one: it converts, and is nothing of ours."""

    def __init__(self, value: float) -> None:
        self.value = value

    def __float__(self) -> float:
        return self.value


class Bad:
    """Raises at whatever is asked of it."""

    def __float__(self) -> float:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("no")

    __hash__ = None  # type: ignore[assignment]


class Word(enum.StrEnum):
    ONLINE = "online"
    FAILURE = "failure"


@dataclasses.dataclass
class Grip:
    force: Any
    at: tuple[int, int]


@pytest.fixture
def client(tmp_path: Path) -> EdgeClient:
    return EdgeClient("arm-1", Spool(tmp_path / "spool", max_bytes=2**24), Nowhere())


def begin(client: EdgeClient, **changed: Any) -> None:
    given = {"task": "S1", "instruction": "go", "source": "online", "policy_version": 1} | changed
    client.begin(given.pop("task"), given.pop("instruction"), **given)


def frame(**changed: Any) -> Frame:
    plain = {"observation": np.zeros(3, np.float32), "action": np.zeros(2, np.float32), "reward": 0.0,
             "intervention": False, "timestamp": 0.0}  # fmt: skip
    return Frame(**(plain | changed))


def close(client: EdgeClient, **changed: Any) -> Episode:
    given = {"observation": np.zeros(3, np.float32), "timestamp": 0.1, "outcome": "failure", "substep_scores": (0.0,)}
    return decode(client.spool.read(client.close(**(given | changed))))


NUMBERS = [np.float32(0.5), np.float64(0.5), np.array(0.5), np.array([0.5]), Tensor(0.5), decimal.Decimal("0.5")]


@pytest.mark.parametrize("number", NUMBERS, ids=lambda n: type(n).__name__)
def test_numbers_are_taken_as_numbers(client: EdgeClient, number: Any) -> None:
    begin(client, source=Word.ONLINE, policy_version=np.int64(3), task=np.str_("S1"))
    client.record(frame(observation=[1, 2, 3], action=np.array([0.5, 1.0]), reward=number, timestamp=0))
    client.record(frame(observation=np.arange(3), intervention=np.bool_(True), timestamp=np.float32(0.05)))
    episode = close(client, timestamp=number, outcome=Word.FAILURE, substep_scores=np.array([number], object),
                    extra={"grip": np.float32(3.5)})  # fmt: skip
    assert (episode.policy_version, episode.source, episode.outcome) == (3, "online", "failure")
    assert episode.observations.dtype == np.float32 and episode.observations[0].tolist() == [1, 2, 3]
    assert (episode.rewards[0], episode.timestamps[-1], episode.substep_scores) == (0.5, 0.5, (0.5,))
    assert episode.intervention.tolist() == [False, True] and episode.extra == {"grip": 3.5}


WRONG_BEGIN = {
    "task": [None, 3, b"S1", "a\0b", "\ud800", "x" * 10_000, Bad()],
    "instruction": [None, ["go"], Path("go")],
    "source": ["Online", None, 1, Bad()],
    "policy_version": [1.5, "1", True, 2**70, Bad(), np.nan],
    "episode_id": ["x", 3, "../../etc/passwd", b"0" * 32],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG_BEGIN.items() for v in vs],
                         ids=lambda v: type(v).__name__)  # fmt: skip
def test_a_wrong_field_of_the_start_is_named_when_it_is_given(client: EdgeClient, field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field.replace("_id", ".id")):
        begin(client, **{field: value})
    begin(client)  # nothing is open
    client.record(frame())
    close(client)


WRONG_FRAME = {
    "observation": [None, "abc", ["1", "2", "3"], np.zeros((1, 3)), np.zeros(0), [0, np.nan, 0], [1e39, 0, 0], Bad(),
                    [[1], [2, 3]], np.zeros(3, complex)],
    "action": [None, 0.5, [np.inf, 0], np.array([{}, 1])],
    "reward": [None, "1", np.nan, 1e300, np.zeros(2), Bad()],
    "intervention": [None, "False", 2, np.zeros(3, bool), Bad()],
    "timestamp": [None, "0", np.inf, Bad(), datetime.timedelta(0)],
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG_FRAME.items() for v in vs],
                         ids=lambda v: type(v).__name__)  # fmt: skip
def test_a_wrong_field_of_a_frame_is_named_and_the_episode_goes_on(client: EdgeClient, field: str, value: Any) -> None:
    begin(client)
    with pytest.raises(ConfigError, match=field):
        client.record(frame(**{field: value}))
    client.record(frame())
    assert close(client).steps == 1


@pytest.mark.parametrize("changed", [{"observation": np.zeros(4)}, {"action": np.zeros(3)}])
def test_another_shape_in_the_middle_of_an_episode_is_named(client: EdgeClient, changed: dict[str, Any]) -> None:
    begin(client)
    client.record(frame())
    with pytest.raises(ConfigError, match="sizes"):
        client.record(frame(**changed))
    client.record(frame(timestamp=0.05))
    assert close(client).steps == 2


WRONG_END = {"observation": [None, np.zeros(4)], "timestamp": ["1", np.nan], "outcome": ["won", None, 3],
             "substep_scores": [None, "1", [np.nan], {"a": 1}, 1.0, Bad()]}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG_END.items() for v in vs],
                         ids=lambda v: type(v).__name__)  # fmt: skip
def test_a_refused_close_can_be_repeated_or_left(client: EdgeClient, field: str, value: Any) -> None:
    begin(client)
    client.record(frame())
    with pytest.raises(ConfigError, match=field):
        close(client, **{field: value})
    assert close(client).steps == 1  # with right values: nothing is lost
    begin(client)
    client.record(frame())
    with pytest.raises(ConfigError, match=field):
        close(client, **{field: value})
    begin(client)  # the attempt that could not be closed is dropped, and the journal says why
    client.record(frame())
    close(client)
    assert len(client.spool.pending()) == 2
    assert field in (client.spool.root / "journal.jsonl").read_text()


CYCLE: dict[str, Any] = {}
CYCLE["self"] = CYCLE
NOTES: dict[str, tuple[Any, Any]] = {
    "bool": (np.bool_(True), True),
    "array": (np.arange(3, dtype=np.int16), [0, 1, 2]),
    "0-d": (np.array(2), 2),
    "path": (pathlib.PurePosixPath("/a/b"), "/a/b"),
    "time": (datetime.datetime(2026, 1, 2, 3, 4), "2026-01-02T03:04:00"),
    "bytes": (b"\xff\x00", "/wA="),
    "set": ({2, 1}, [1, 2]),
    "tuple": ((1, (2, np.float64(3))), [1, [2, 3.0]]),
    "dataclass": (Grip(np.float32(1.5), (1, 2)), {"force": 1.5, "at": [1, 2]}),
    "enum": (Word.ONLINE, "online"),
    "keys": ({1: "a", np.int64(2): "b"}, {"1": "a", "2": "b"}),
    "tensor": (Tensor(0.25), 0.25),
}
REPLACED: dict[str, Any] = {
    "nan": math.nan, "inf": np.float32(np.inf), "big": 2**64, "bigger": 10**6000, "object": object(), "bad": Bad(),
    "cycle": CYCLE, "surrogate": "\ud800", "objects": np.array([{}, object()]), "long": "x" * 200_000, "lambda": len,
}  # fmt: skip


@pytest.mark.parametrize("name", NOTES)
def test_a_note_of_a_foreign_type_is_kept(client: EdgeClient, name: str) -> None:
    begin(client)
    client.record(frame())
    given, kept = NOTES[name]
    assert close(client, extra={"note": given, "seed": 3}).extra == {"note": kept, "seed": 3}


@pytest.mark.parametrize("name", REPLACED)
def test_a_note_that_json_cannot_hold_costs_no_frame_and_is_named(client: EdgeClient, name: str) -> None:
    begin(client)
    client.record(frame())
    closed = client.close(np.zeros(3), 0.1, "failure", (), {"odd": REPLACED[name], "seed": 3})
    episode = decode(client.spool.read(closed))
    assert episode.extra["seed"] == 3 and [key for key, _ in closed.changed] == ["odd"]
    assert "odd" in (client.spool.root / "journal.jsonl").read_text()


@pytest.mark.parametrize("extra", [[1], "text", 3, np.zeros(3), Bad()])
def test_an_extra_that_is_no_mapping_costs_no_frame(client: EdgeClient, extra: Any) -> None:
    begin(client)
    client.record(frame())
    assert close(client, extra=extra).steps == 1


def test_a_note_is_bounded(client: EdgeClient) -> None:
    taken, changed = values.note({f"k{i}": "x" * 1000 for i in range(200)} | {"seed": 1})
    assert len(json.dumps(taken)) <= values.MAX_EXTRA + 1000 and taken["seed"] == 1 and changed


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.complex_numbers()
    | st.datetimes() | st.decimals() | st.builds(Bad) | st.builds(object),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text() | st.integers() | st.none(), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(extra=ANYTHING)
def test_any_note_becomes_json(extra: Any) -> None:
    taken, _ = values.note(extra)
    json.dumps(taken, allow_nan=False).encode("ascii")
    assert json.loads(json.dumps(taken)) == taken


@settings(max_examples=200, deadline=None)
@given(value=ANYTHING)
def test_any_field_is_taken_or_refused(value: Any) -> None:
    for take in (values.number, values.whole, values.flag, values.text, values.vector, values.vector_of_scores):
        with contextlib.suppress(ConfigError):
            take(value, "the field")  # type: ignore[operator]


def test_a_driver_that_calls_in_the_wrong_order_is_told_and_may_go_on(client: EdgeClient) -> None:
    with pytest.raises(ConfigError, match="no episode is open"):
        client.record(frame())
    with pytest.raises(ConfigError, match="no episode is open"):
        close(client)
    client.discard("nothing is open")
    begin(client)
    with pytest.raises(ConfigError, match="still open"):
        begin(client)
    with pytest.raises(ConfigError, match="no frame"):
        close(client)
    begin(client)
    client.record(frame())
    closed = client.close(np.zeros(3), 0.1, "failure", ())
    for late in (lambda: client.record(frame()), lambda: close(client)):
        with pytest.raises(ConfigError, match="no episode is open"):
            late()
    begin(client, episode_id="0" * 32)
    client.discard("again")
    begin(client, episode_id="0" * 32)
    client.record(frame())
    close(client)
    assert closed in client.spool.pending() and len(client.spool.pending()) == 2


@pytest.mark.parametrize("robot_id", [None, 3, b"arm", ["arm"], "a\0b"])
def test_a_robots_name_is_a_text(tmp_path: Path, robot_id: Any) -> None:
    with pytest.raises(ConfigError, match="robot_id"):
        EdgeClient(robot_id, Spool(tmp_path, max_bytes=2**20), Nowhere())


def test_a_disk_that_fails_at_the_end_leaves_the_client_able_to_begin(
    client: EdgeClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin(client)
    client.record(frame())
    with monkeypatch.context() as broken:
        broken.setattr(client.spool, "_fsync", lambda: (_ for _ in ()).throw(OSError(5, "EIO")))
        with pytest.raises(OSError, match="EIO"):
            close(client)
    assert close(client).steps == 1  # tried again
    begin(client)
    client.record(frame())
    with monkeypatch.context() as broken:
        broken.setattr(client.spool, "_fsync", lambda: (_ for _ in ()).throw(OSError(5, "EIO")))
        with pytest.raises(OSError, match="EIO"):
            close(client)
    begin(client)  # or left
    client.record(frame())
    assert close(client).steps == 1


def shared(levels: int = 60) -> list[Any]:
    """2**levels values, in a few lists."""
    found: list[Any] = [0.0] * 2
    for _ in range(levels):
        found = [found, found]
    return found


@dataclasses.dataclass
class Node:
    """Of a scene graph in which all know all."""

    near: list[Any]


def graph(size: int = 30) -> Node:
    nodes = [Node([]) for _ in range(size)]
    for node in nodes:
        node.near += nodes
    return nodes[0]


def wide_cycle() -> list[Any]:
    found: list[Any] = []
    found += [found] * 1000
    return found


class Camera:
    """A frame on another device: to list it takes as long as it is large."""

    shape = (3, 100_000, 100_000)

    def tolist(self) -> list[Any]:
        raise AssertionError("listed")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("make", [shared, graph, wide_cycle, lambda: [[0] * 60_000] * 60_000, Camera,
                                  lambda: tuple(shared()), lambda: {"a": shared()}, lambda: memoryview(bytes(2**24))],
                         ids=str)  # fmt: skip
def test_a_structure_larger_than_it_looks_keeps_nobody_waiting(client: EdgeClient, make: Any) -> None:
    """As a note, as a note's key, in a note's place, and in the place of each number and text."""
    begin(client)
    client.record(Frame(np.zeros(3, np.float32), np.zeros(2, np.float32), 0.0, False, 0.0))
    extra: dict[Any, Any] = {"x": make(), "kept": 1}
    with contextlib.suppress(TypeError):  # not hashable
        extra[make()] = 2
    closed = client.close(np.zeros(3, np.float32), 1.0, "success", (1.0,), extra)
    assert decode(client.spool.read(closed)).extra["kept"] == 1 and "x" in dict(closed.changed)
    assert len(json.dumps(values.note(make())[0])) < 2**17
    for take in (values.number, values.whole, values.flag, values.text):
        with pytest.raises(ConfigError, match="speed"):
            take(make(), "speed")


@pytest.mark.parametrize(
    "value",
    [np.complex64(1 + 2j), np.array(1 + 2j), np.array("3.5"), np.array(b"3"), b"3", memoryview(b"12"), np.ma.masked,
     np.ma.array([1.0], mask=[True])],
    ids=repr,
)  # fmt: skip
def test_what_only_looks_like_a_number_is_refused(value: Any) -> None:
    for take in (values.number, values.whole, values.flag):
        with pytest.raises(ConfigError, match="reward"):
            take(value, "reward")


def test_a_process_that_raises_at_an_underflow_records_all_the_same() -> None:
    with np.errstate(all="raise"):
        assert values.vector([1e-310, 1.0], "observation").tolist() == [0, 1]


def test_a_masked_entry_is_no_measurement() -> None:
    with pytest.raises(ConfigError, match="observation"):
        values.vector(np.ma.array([1.0, 2.0], mask=[False, True]), "observation")
    assert values.vector(np.ma.array([1.0, 2.0]), "observation").tolist() == [1, 2]


@pytest.mark.parametrize("given", [None, {"observation": [1.0]}, (1, 2), np.zeros(3), Bad(), object()])
def test_a_frame_that_is_none_is_named_and_the_episode_goes_on(client: EdgeClient, given: Any) -> None:
    begin(client)
    with pytest.raises(ConfigError, match="frame"):
        client.record(given)
    client.record(Frame(np.zeros(3, np.float32), np.zeros(2, np.float32), 0.0, False, 0.0))
    assert client.spool.recording is not None


@pytest.mark.parametrize("given", ["", "x", 3, b"x", np.arange(2), [], Bad()])
def test_an_episodes_id_that_is_none_is_named(client: EdgeClient, given: Any) -> None:
    with pytest.raises(ConfigError, match="episode id"):
        begin(client, episode_id=given)
    begin(client)


@pytest.mark.parametrize(
    "reason", [object(), KeyError("x"), None, "\ud800", b"x", {"a": math.nan}, shared(), "x" * 2**20, Bad()]
)
def test_whatever_the_reason_is_an_attempt_can_be_discarded(client: EdgeClient, reason: Any) -> None:
    begin(client)
    client.discard(reason)
    assert list((client.spool.root / "open").iterdir()) == []
    line = json.loads((client.spool.root / "journal.jsonl").read_text())
    assert line["event"] == "discarded" and len(str(line)) < 2**17
    begin(client)
