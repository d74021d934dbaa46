"""From a robot's bytes to a row: whatever they are, one verdict that a database takes, soon, and in little memory."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import hostile_bytes as hostile
import numpy as np
import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of
from invariants import Plane, digest, example_episode, open_plane
from test_coordinator import coordinator, drain, held, members

from data_contracts.checks import default_check
from infra.catalog.fits import misfit
from infra.catalog.schema import metadata, quarantine, snapshot_episodes
from infra.episode import MAX_META_BYTES, MAX_REASON_CHARS, MAX_REASONS, SCHEMA_VERSION, Episode, decode, encode
from infra.errors import CorruptDataError
from infra.events import Event
from infra.examine import Examiner, Verdict

EPISODE = example_episode(1)
PARTS = hostile.parts(EPISODE)
META: dict[str, Any] = json.loads(PARTS["meta.json"])
ARRAYS = ("observations", "actions", "rewards", "intervention", "timestamps")


def examined(data: bytes, check: Callable[[Episode], Sequence[Any]]) -> Verdict:
    """The verdict on an object of episode 1."""

    class Store:
        def get(self, key: str) -> bytes:
            return data

    event = Event(1, EPISODE.episode_id, "r0", "episodes/aa/x.tar", digest(data), len(data), SCHEMA_VERSION, "t")
    return Examiner(Store(), check).examine([event])[0]  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def database() -> Iterator[sa.Connection]:
    """The two tables that a verdict is written to, and nothing kept."""
    engine = sa.create_engine("sqlite://")
    metadata.create_all(engine)
    with engine.connect() as connection:
        yield connection


def written(database: sa.Connection, verdict: Verdict) -> None:
    """The verdict's row, in its table; and in PostgreSQL's, by the columns' own ranges."""
    if verdict.accepted:
        table, row = snapshot_episodes, verdict.row() | {"added": 1}
    else:
        table, row = quarantine, {
            "episode_id": verdict.event.episode_id, "sha256": verdict.event.sha256, "robot_id": "r0", "key": "k",
            "stage": verdict.stage, "reasons": verdict.reasons, "created_at": 0.0,
        }  # fmt: skip
    assert misfit(table, row) is None
    assert len(verdict.reasons) <= MAX_REASONS
    assert all(len(one["message"]) <= MAX_REASON_CHARS for one in verdict.reasons)
    with database.begin_nested() as transaction:
        database.execute(table.insert().values(row))
        transaction.rollback()


def holds(database: sa.Connection, data: bytes) -> None:
    """One verdict, whether the contract is the packaged one or asks for nothing."""
    for check in (default_check, lambda episode: []):
        written(database, examined(data, check))


def fuzz(examples: int) -> Callable[..., Any]:
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
    )


shapes = st.lists(st.integers(0, 3), max_size=5).map(tuple)
dtypes = st.sampled_from(
    ["<f4", ">f4", "<f8", ">f8", "<f2", "|b1", "|i1", "<i4", ">i8", "<u8", "<c8", "<U3", "|S2", "<M8[s]", "|O"]
)


@fuzz(4000)
@given(name=st.sampled_from(ARRAYS), shape=shapes, dtype=dtypes, order=st.sampled_from("CF"), fill=st.integers(0, 1))
def test_arrays_of_every_rank_dtype_and_order(
    database: sa.Connection, name: str, shape: tuple[int, ...], dtype: str, order: Any, fill: int
) -> None:
    array = np.zeros(shape, np.dtype(dtype), order=order)
    if fill and array.dtype.kind in "fiu":
        array += 1
    holds(database, hostile.with_array(EPISODE, name, array))


floats = arrays_of.arrays(np.float32, st.sampled_from([(4, 5), (5, 3), (4, 0), (0, 5), (5, 86)]))


@fuzz(500)
@given(name=st.sampled_from(["observations", "actions"]), array=floats)
def test_arrays_of_any_values(database: sa.Connection, name: str, array: np.ndarray[Any, Any]) -> None:
    holds(database, hostile.with_array(EPISODE, name, array))


texts = st.text(st.characters(), max_size=6) | st.sampled_from(["\x00", "\ud800", "x" * 70, "\x1b[31m", "[/red]", ""])
numbers = st.sampled_from([0, -1, 2**31, 2**40, 2**63, 10**400, 1.5, -0.0, 1e300, float("nan"), float("inf")])
leaves = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    leaves, lambda below: st.lists(below, max_size=3) | st.dictionaries(texts, below, max_size=3), max_leaves=4
)


@fuzz(3000)
@given(field=st.sampled_from([*META, "another"]), value=values, without=st.sampled_from([*META, "", "", ""]))
def test_metadata_of_every_json_type(database: sa.Connection, field: str, value: Any, without: str) -> None:
    meta = {name: one for name, one in (META | {field: value}).items() if name != without}
    holds(database, hostile.with_raw_meta(EPISODE, json.dumps(meta).encode()))


@fuzz(500)
@given(raw=st.binary(max_size=60) | st.text('{}[]":,0123456789.eE+-\\u d', max_size=40).map(str.encode))
def test_metadata_that_are_not_json(database: sa.Connection, raw: bytes) -> None:
    holds(database, hostile.with_raw_meta(EPISODE, raw))


@fuzz(1500)
@given(at=st.integers(0, 511), value=st.binary(min_size=1, max_size=12), member=st.integers(0, 5), right=st.booleans())
def test_headers_with_any_bytes(database: sa.Connection, at: int, value: bytes, member: int, right: bool) -> None:
    data = bytearray(encode(EPISODE))
    heads = [n for n in range(0, len(data), 512) if data[n : n + 32] == EPISODE.episode_id.encode()]
    place = heads[member]
    if right:  # with a checksum that says so
        data[place : place + 512] = hostile.patched(bytes(data[place : place + 512]), {min(at, 499): value})
    else:
        data[place + at : place + at + len(value)] = value
    holds(database, bytes(data))


@fuzz(500)
@given(cut=st.integers(0, 12_000), garbage=st.binary(max_size=40))
def test_truncated_and_followed_by_garbage(database: sa.Connection, cut: int, garbage: bytes) -> None:
    holds(database, encode(EPISODE)[:cut] + garbage)


# --- each known attack, by name ---------------------------------------------------------------------------------------

DEEP = b"[" * 100_000 + b"]" * 100_000


def meta_text(old: str, new: str) -> bytes:
    text = PARTS["meta.json"].decode()
    assert old in text
    return hostile.with_raw_meta(EPISODE, text.replace(old, new, 1).encode())


def with_npy(text: bytes, payload: bytes = b"", version: bytes = b"\x01\x00") -> bytes:
    return hostile.packed(EPISODE.episode_id, PARTS | {"actions.npy": hostile.npy(text, payload, version)})


def extended(kind: bytes, payload: bytes) -> bytes:
    """The honest object behind one extension header."""
    rest = [(hostile.header(f"{EPISODE.episode_id}.{suffix}", len(data)), data) for suffix, data in PARTS.items()]
    return hostile.tar([(hostile.header("././@LongLink", len(payload), kind=kind), payload), *rest])


def pax(records: int) -> bytes:
    return b"".join(b"%d %s\n" % (16, b"comment=%04d" % (n % 10_000)) for n in range(records))


REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "a zero-dimensional array": (lambda: hostile.with_array(EPISODE, "actions", np.float32(1)), "0 dimensions"),
    "one dimension more": (lambda: hostile.with_array(EPISODE, "rewards", np.zeros((4, 1), np.float32)), "2 dim"),
    "big-endian": (lambda: hostile.with_array(EPISODE, "actions", EPISODE.actions.astype(">f4")), ">f4"),
    "objects": (lambda: hostile.with_array(EPISODE, "actions", np.array([{}], object)), "not a number"),
    "a structure": (lambda: hostile.with_array(EPISODE, "actions", np.zeros(3, "<f4,<i2")), "numpy.save writes for"),
    "a shape of terabytes": (
        lambda: with_npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 5), }\n"), "0 bytes are no",
    ),
    "a million million rows of nothing": (
        lambda: with_npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (999999999999, 0), }\n"), "no array of",
    ),
    "a shape of 64 digits": (
        lambda: with_npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s, 5), }\n" % (b"9" * 64)), "header",
    ),
    "more dimensions than numpy has": (
        lambda: with_npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (%s), }\n" % (b"1, " * 65), bytes(4)),
        "cannot be read",
    ),
    "a negative shape": (
        lambda: with_npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (-4, -5), }\n", bytes(80)), "header",
    ),
    "a nested header": (lambda: with_npy(b"(" * 5000 + b")" * 5000 + b"\n"), "header"),
    "npy version 2": (
        lambda: with_npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 5), }\n", version=b"\x02\x00"), "1.0",
    ),
    "npy version 3": (
        lambda: with_npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 5), }\n", version=b"\x03\x00"), "1.0",
    ),
    "truth values of 255": (
        lambda: hostile.with_array(EPISODE, "intervention", np.full(4, 255, np.uint8).view(bool)), "neither 0 nor 1",
    ),
    "bytes behind the array": (
        lambda: hostile.packed(EPISODE.episode_id, PARTS | {"rewards.npy": PARTS["rewards.npy"] + b"x"}),
        "bytes are not",
    ),
    "deep metadata": (lambda: meta_text('"extra": {}', f'"extra": {{"a": {DEEP.decode()}}}'), "metadata"),
    "metadata of 40 levels": (
        lambda: meta_text('"extra": {}', '"extra": {"a": ' + "[" * 40 + "]" * 40 + "}"), "more than 32 levels",
    ),
    "a number of 5,000 digits": (lambda: meta_text('"extra": {}', '"extra": {"a": ' + "9" * 5000 + "}"), "not JSON"),
    "a number beyond 64 bits": (lambda: hostile.with_meta(EPISODE, extra={"a": 2**63}), "beyond 64 bits"),
    "1e400": (lambda: meta_text('"extra": {}', '"extra": {"a": 1e400}'), "beyond a double"),
    "NaN": (lambda: hostile.with_meta(EPISODE, started_at=float("nan")), "not JSON"),
    "a key twice": (lambda: meta_text('"extra": {}', '"extra": {}, "task": "S2"'), "twice"),
    "half of a surrogate pair": (lambda: hostile.with_meta(EPISODE, extra={"a": "\ud800"}), "surrogate"),
    "a NUL as a key": (lambda: hostile.with_meta(EPISODE, extra={"a\0": 1}), "NUL"),
    "an unknown field": (lambda: hostile.with_meta(EPISODE, colour="red"), "colour"),
    "scores that are text": (lambda: hostile.with_meta(EPISODE, substep_scores="110"), "not a list"),
    "extra that is a list": (lambda: hostile.with_meta(EPISODE, extra=[1]), "not an object"),
    "metadata over their cap": (
        lambda: hostile.with_meta(EPISODE, extra={"a": "x" * MAX_META_BYTES}), "over the cap",
    ),
    "a robot's id of megabytes": (lambda: hostile.with_meta(EPISODE, robot_id="r" * 10**6), "over the cap"),
    "pax": (lambda: extended(b"x", pax(250_000)), "not a plain file"),
    "global pax": (lambda: extended(b"g", pax(250_000)), "not a plain file"),
    "GNU long name": (lambda: extended(b"L", b"x" * 10**6), "not a plain file"),
    "GNU long link": (lambda: extended(b"K", b"x" * 10**6), "not a plain file"),
    "GNU sparse": (lambda: extended(b"S", b"x" * 600), "not a plain file"),
    "Solaris extension": (lambda: extended(b"X", pax(10)), "not a plain file"),
    "an unknown type": (lambda: extended(b"Z", b""), "not a plain file"),
    "a device": (lambda: extended(b"3", b""), "not a plain file"),
    "a directory": (lambda: extended(b"5", b""), "not a plain file"),
    "a base-256 size": (
        lambda: hostile.tar([(hostile.header(f"{EPISODE.episode_id}.meta.json", 0, at_124=b"\x80" + bytes(11)), b"")]),
        "octal",
    ),
    "padding that is not zeros": (
        lambda: encode(EPISODE).replace(PARTS["meta.json"] + b"\0", PARTS["meta.json"] + b"x", 1), "not zeros",
    ),
    "garbage at the end": (lambda: encode(EPISODE)[:-1] + b"x", "record of zeros"),
    "megabytes of zeros at the end": (lambda: encode(EPISODE) + bytes(10**6), "record of zeros"),
    "no end": (lambda: encode(EPISODE).rstrip(b"\0"), "truncated|unexpected end"),
    "an unknown member": (
        lambda: hostile.packed(EPISODE.episode_id, PARTS | {"camera.npy": PARTS["actions.npy"]}),
        "none of an episode's",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_known_attack_is_refused_by_name_and_in_little_memory(database: sa.Connection, name: str) -> None:
    make, message = REFUSED[name]
    data = make()
    tracemalloc.start()
    try:
        with pytest.raises(CorruptDataError, match=message) as caught:
            decode(data, name="object")
        assert tracemalloc.get_traced_memory()[1] < 2 * len(data) + 2**22
    finally:
        tracemalloc.stop()
    assert len(caught.value.problem) < 1000
    holds(database, data)


def test_fortran_order_is_read_as_what_it_is() -> None:
    found = decode(hostile.with_array(EPISODE, "actions", np.asfortranarray(EPISODE.actions)))
    np.testing.assert_array_equal(found.actions, EPISODE.actions)
    assert found.actions.flags.c_contiguous and encode(found) == encode(EPISODE)


def test_the_fullest_metadata_take_a_few_times_their_size() -> None:
    """Many small values are what takes the most for its bytes."""
    extra = {"a": [[{}, 0]] * ((MAX_META_BYTES - 1000) // 9)}
    data = encode(example_episode(1, extra=extra))
    tracemalloc.start()
    try:
        assert decode(data).extra == extra
        assert tracemalloc.get_traced_memory()[1] < 64 * MAX_META_BYTES
    finally:
        tracemalloc.stop()
    with pytest.raises(CorruptDataError, match="over the cap"):
        encode(example_episode(1, extra={"a": "x" * MAX_META_BYTES}))


def test_python_s_own_writer_is_read() -> None:
    """Whoever packs an episode with `tarfile` in USTAR, with an owner, a mode and a time."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for suffix, data in PARTS.items():
            info = tarfile.TarInfo(f"{EPISODE.episode_id}.{suffix}")
            info.size, info.mtime, info.uname, info.mode = len(data), 1_700_000_000, "robot", 0o600
            archive.addfile(info, io.BytesIO(data))
    assert encode(decode(out.getvalue())) == encode(EPISODE)


@pytest.fixture
def plane(tmp_path: Path) -> Plane:
    return open_plane(tmp_path)


def submit(plane: Plane, number: int, data: bytes) -> None:
    plane.ingest.submit("r0", f"{number:032x}", data, digest(data), len(data), {})


@pytest.mark.parametrize(
    "data",
    [
        hostile.with_array(EPISODE, "actions", np.float32(1)),
        hostile.with_meta(EPISODE, policy_version=2**40),
        hostile.with_meta(EPISODE, policy_version=True),
        hostile.with_meta(EPISODE, task={"a": 1}),
        hostile.with_meta(EPISODE, task="x" * 65),
        hostile.with_meta(EPISODE, source=None),
        hostile.with_meta(EPISODE, outcome=["success"]),
        hostile.with_meta(EPISODE, schema_version=1.0, policy_version=0.5),
    ],
    ids=["zero-dimensional", "2^40", "bool", "object", "long", "null", "list", "float"],
)
def test_with_a_contract_that_asks_for_nothing_the_catalog_is_still_written(plane: Plane, data: bytes) -> None:
    submit(plane, 1, data)
    plane.submit(example_episode(2))
    drain(coordinator(plane))
    assert members(plane) == {2} and set(held(plane)) == {EPISODE.episode_id}


def test_a_row_that_the_database_refuses_is_quarantined_and_the_rest_goes_on(
    plane: Plane, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were the widths forgotten, too: the database's own refusal is that episode's trouble alone."""
    monkeypatch.setattr("infra.examine.misfit", lambda table, values: None)
    for number in range(4):
        submit(plane, number, hostile.with_meta(example_episode(number), policy_version=[number] if number % 2 else 1))
    drain(coordinator(plane))
    assert members(plane) == {0, 2}
    assert {stage for stage, _ in held(plane).values()} == {"contract"}
    assert all("the catalog cannot keep it" in why for _, why in held(plane).values())


def test_reasons_without_end_are_capped(plane: Plane) -> None:
    from test_coordinator import Violation

    many = [Violation(f"rule-{n}" * 50, "warn" if n % 2 else "block", "\x00\ud800" + "x" * 10**5) for n in range(500)]
    plane.submit(example_episode(1))
    drain(coordinator(plane, lambda episode: many))
    with plane.catalog.read() as connection:
        reasons = connection.execute(sa.select(quarantine.c.reasons)).scalar_one()
    assert len(reasons) == MAX_REASONS and "469 more reasons" in reasons[-1]["message"]
    assert all(len(one["message"]) <= MAX_REASON_CHARS and len(one["rule"]) <= 64 for one in reasons)
    assert misfit(quarantine, {"reasons": reasons}) is None
