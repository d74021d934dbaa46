"""The spool keeps what was closed through SIGKILL, torn writes, rot and a full disk; fault matrix rows 1 and 9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from infra.edge.framelog import EpisodeEnd, EpisodeStart, Frame, close_record
from infra.edge.spool import Spool
from infra.episode import decode
from infra.errors import ConfigError, ConflictError, CorruptDataError, StorageFullError

OBS, ACT = 7, 5


def start(number: int) -> EpisodeStart:
    return EpisodeStart(f"{number:032x}", "r0", "S1", "open the drawer", "online", 3, 1.7e9)


def frame(t: int, *, intervention: bool = False) -> Frame:
    rng = np.random.default_rng(t)
    observation = rng.normal(size=OBS).astype(np.float32)
    return Frame(observation, rng.uniform(-1, 1, ACT).astype(np.float32), float(t == 9), intervention, 0.05 * t)


def end(steps: int) -> EpisodeEnd:
    return EpisodeEnd(frame(steps).observation, 0.05 * steps, "success", (1.0, 0.5), {"seed": 4})


def write(spool: Spool, number: int, steps: int = 10) -> None:
    spool.begin(start(number))
    for t in range(steps):
        spool.append(frame(t, intervention=t >= 6))


def test_a_closed_episode_reads_back_as_it_was_recorded(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    write(spool, 1)
    closed = spool.close(end(10))
    episode = decode(spool.read(closed))
    assert episode.observations.shape == (11, OBS) and episode.actions.shape == (10, ACT)
    np.testing.assert_array_equal(episode.observations[:10], [frame(t).observation for t in range(10)])
    np.testing.assert_array_equal(episode.observations[10], frame(10).observation)
    np.testing.assert_array_equal(episode.actions[3], frame(3).action)
    assert episode.rewards.tolist() == [0.0] * 9 + [1.0]
    assert episode.intervention.tolist() == [False] * 6 + [True] * 4
    np.testing.assert_allclose(episode.timestamps, np.arange(11) * 0.05)
    assert (episode.outcome, episode.substep_scores, episode.policy_version) == ("success", (1.0, 0.5), 3)
    assert [c.sha256 for c in spool.pending()] == [closed.sha256]
    spool.confirm(closed)
    assert spool.pending() == [] and spool.used_bytes() == 0


def test_an_observation_may_be_large_and_one_that_is_too_large_is_named(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**26)
    spool.begin(start(1))
    large = Frame(np.full(100_000, 0.5, np.float32), np.zeros(ACT, np.float32), 0.0, False, 0.0)
    spool.append(large)
    with pytest.raises(ConfigError, match="more than the 16 MiB"):
        spool.append(replace(large, observation=np.zeros(2**22, np.float32), timestamp=0.05))
    spool.append(replace(large, timestamp=0.05))  # the episode goes on
    closed = spool.close(EpisodeEnd(large.observation, 0.1, "failure", (0.0,)))
    assert decode(spool.read(closed)).observations.shape == (3, 100_000)


def test_an_unfinished_episode_is_discarded_with_its_reason_and_closed_ones_stay(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    write(spool, 1)
    spool.close(end(10))
    write(spool, 2, steps=4)
    spool.release()
    again = Spool(tmp_path, max_bytes=2**20)
    assert [closed.episode_id for closed in again.pending()] == [start(1).episode_id]
    (line,) = (json.loads(text) for text in (tmp_path / "journal.jsonl").read_text().splitlines())
    assert line["episode_id"] == start(2).episode_id and "4 whole frames" in line["reason"]


@pytest.fixture(scope="module")
def whole_log(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    root = tmp_path_factory.mktemp("log")
    spool = Spool(root, max_bytes=2**20)
    write(spool, 1)
    log = root / "open" / f"{start(1).episode_id}.log"
    before = log.read_bytes()
    spool._append(close_record(end(10)))
    whole = log.read_bytes()
    assert len(whole) > len(before)
    spool.release()
    return whole


@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_a_log_torn_or_damaged_anywhere_is_never_taken_for_an_episode(
    data: st.DataObject, whole_log: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    at = data.draw(st.integers(0, len(whole_log) - 1))
    torn = whole_log[:at]
    if data.draw(st.booleans()):
        torn = whole_log[:at] + bytes([whole_log[at] ^ 0x10]) + whole_log[at + 1 :]
    root = tmp_path_factory.mktemp("torn")
    (root / "open").mkdir()
    (root / "open" / f"{start(1).episode_id}.log").write_bytes(torn)
    spool = Spool(root, max_bytes=2**20)
    assert spool.pending() == [] and not list((root / "open").iterdir())
    assert start(1).episode_id in (root / "journal.jsonl").read_text()
    spool.release()


def test_a_log_killed_after_its_close_record_is_sealed_at_the_next_start(tmp_path: Path, whole_log: bytes) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open" / f"{start(1).episode_id}.log").write_bytes(whole_log)
    spool = Spool(tmp_path, max_bytes=2**20)
    assert [closed.episode_id for closed in spool.recovered] == [start(1).episode_id]
    assert decode(spool.read(spool.pending()[0])).steps == 10
    assert not list((tmp_path / "open").iterdir())


def test_sealing_twice_gives_the_same_file(tmp_path: Path, whole_log: bytes) -> None:
    """Killed after the tar's rename and before the log's removal: the second sealing changes nothing."""
    log = tmp_path / "open" / f"{start(1).episode_id}.log"
    log.parent.mkdir()
    log.write_bytes(whole_log)
    first = Spool(tmp_path, max_bytes=2**20)
    (before,) = first.pending()
    first.release()
    log.write_bytes(whole_log)
    assert [closed.sha256 for closed in Spool(tmp_path, max_bytes=2**20).pending()] == [before.sha256]


WRITER = """
import sys
sys.path.insert(0, sys.argv[2])
from test_spool import Spool, Path, write, end, frame, start
spool = Spool(Path(sys.argv[1]), max_bytes=2**24)
for number in range(3):
    write(spool, number); spool.close(end(10))
spool.begin(start(99))
print("recording", flush=True)
t = 0
while True:
    spool.append(frame(t % 9)); t += 1
"""


def test_row_01_sigkill_in_the_middle_of_a_write(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None and process.stdout.readline() == b"recording\n"
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    spool = Spool(tmp_path, max_bytes=2**24)  # the dead process's lock is gone
    assert sorted(closed.episode_id for closed in spool.pending()) == [start(n).episode_id for n in range(3)]
    assert [decode(spool.read(closed)).steps for closed in spool.pending()] == [10] * 3
    assert start(99).episode_id in (tmp_path / "journal.jsonl").read_text()


def test_a_full_spool_stops_safely(tmp_path: Path) -> None:
    limit = 60_000
    spool = Spool(tmp_path, max_bytes=limit)
    write(spool, 1)
    spool.close(end(10))
    spool.begin(start(2))

    def fill() -> None:
        for t in range(10_000):
            spool.append(frame(t))

    with pytest.raises(StorageFullError, match="fix: .*LWD_SPOOL_MAX_MIB"):
        fill()
    spool.discard("full")
    assert spool.used_bytes() <= limit
    (closed,) = spool.pending()
    assert decode(spool.read(closed)).steps == 10
    spool.confirm(closed)
    write(spool, 3)  # there is room again
    spool.close(end(10))


def test_no_space_left_on_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    write(spool, 1)
    spool.close(end(10))
    spool.begin(start(2))

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("infra.edge.spool.os.write", full)
    with pytest.raises(StorageFullError):
        spool.append(frame(0))
    monkeypatch.undo()
    spool.discard("full")
    assert len(spool.pending()) == 1


def test_two_processes_cannot_share_a_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    with pytest.raises(ConflictError, match="belongs to another"):
        Spool(tmp_path, max_bytes=2**20)
    spool.release()
    Spool(tmp_path, max_bytes=2**20).release()


def test_bytes_that_rotted_are_set_aside_and_not_sent(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    write(spool, 1)
    closed = spool.close(end(10))
    data = bytearray(closed.path.read_bytes())
    data[2000] ^= 1
    closed.path.write_bytes(data)
    with pytest.raises(CorruptDataError, match=closed.episode_id):
        spool.read(closed)
    assert spool.pending() == [] and (tmp_path / "aside" / closed.path.name).exists()


def test_ids_are_checked_before_any_path_is_built(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    with pytest.raises(ConfigError, match="32 lower-case hex"):
        spool.begin(EpisodeStart("../../etc/passwd", "r0", "S1", "x", "online", None, 0.0))
    write(spool, 1, steps=1)
    with pytest.raises(ConfigError, match="still open"):
        spool.begin(start(2))


def test_an_episode_that_is_confirmed_while_the_spool_is_listed_is_left_out(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    (tmp_path / "closed" / f"{'a' * 32}.{'b' * 64}.tar").symlink_to(tmp_path / "gone")  # listed, but not there any more
    assert spool.pending() == []
    spool.release()


def test_a_spool_that_was_released_is_another_ones(tmp_path: Path) -> None:
    """Given back twice, it closes no file of another's; nothing more is written into it."""
    spool = Spool(tmp_path, max_bytes=2**20)
    write(spool, 1)
    spool.release()
    with (tmp_path / "other").open("wb") as other:  # has the descriptor that the lock had
        spool.release()
        other.write(b"x")
    second = Spool(tmp_path, max_bytes=2**20)
    for use in (lambda: write(spool, 2), spool.pending, lambda: spool.close(end(1))):
        with pytest.raises(ConfigError):
            use()
    second.release()


def test_a_forked_process_does_not_write_into_its_parents_spool(tmp_path: Path) -> None:
    spool = Spool(tmp_path, max_bytes=2**20)
    write(spool, 1)
    before = (tmp_path / "open" / f"{1:032x}.log").read_bytes()
    child = os.fork()
    if child == 0:
        refused = 0
        for use in (lambda: spool.append(frame(3)), lambda: spool.close(end(10)), lambda: spool.discard("x"),
                    spool.pending):  # fmt: skip
            try:
                use()
            except ConfigError:
                refused += 1
        os._exit(refused)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 4
    assert (tmp_path / "open" / f"{1:032x}.log").read_bytes() == before
    assert decode(spool.read(spool.close(end(10)))).steps == 10
