"""The soak's parts that need no server: the schedule of faults, robots without physics, their logs, the picture."""

from __future__ import annotations

import argparse
import itertools
import threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from bench.actors import KIND, Actor, made
from bench.history import check
from bench.latency_figure import PAPER
from bench.latency_figure import figure as latency_figure
from bench.oplog import OperationLog, operations
from bench.robots import parse_route
from bench.soak_figure import figure, rates
from bench.wide_check import wide_check
from infra.catalog import Catalog
from infra.coordinator import Coordinator
from infra.episode import Episode, encode
from infra.events.outbox import OutboxLog
from infra.fleet.embedded import EmbeddedServer
from infra.objects.directory import DirectoryStore

faults = pytest.importorskip("bench.faults")
FAULTS = ["a", "b", "c", "d", *faults.ONCE]


def test_the_schedule_is_seeded_and_holds_every_kind_in_every_round() -> None:
    first, again = (list(itertools.islice(faults.schedule(7, 10.0, FAULTS), 21)) for _ in range(2))
    assert first == again
    assert first != list(itertools.islice(faults.schedule(8, 10.0, FAULTS), 21))
    kinds = [fault.kind for fault in first]
    assert sorted(kinds[:5]) == sorted(FAULTS)
    assert Counter(kinds[5:]) == dict.fromkeys("abcd", 4), "what is done once is done in the first round"
    gaps = np.diff([0.0, *(fault.at for fault in first)])
    assert (gaps >= 5.0).all() and (gaps <= 15.0).all()


def test_episodes_keep_the_contract_and_break_it_where_they_are_told_to() -> None:
    rng = np.random.default_rng(0)
    assert wide_check(made(rng, "a0")) == []
    assert any(violation.severity == "block" for violation in wide_check(made(rng, "a0", breach=True)))
    wide, long = (made(rng, "a0", mib * 2**20) for mib in (3, 40))
    assert wide_check(wide) == wide_check(long) == []
    assert 2.98 < len(encode(wide)) / 2**20 < 3.02
    assert 39.9 < len(encode(long)) / 2**20 < 40.1
    assert long.observations.shape[1] < 2**16, "an observation is a few images, not all of the payload"
    assert len(encode(made(rng, "a0"))) < 20_481


def robot(home: Path, server: EmbeddedServer, episodes: int) -> Actor:
    options = argparse.Namespace(home=home, episodes=episodes, seconds=None, pace=0.0, poll=0.02, payload=0.0,
                                 breach=0.0, seed=0)  # fmt: skip
    return Actor(options, 0, server, OperationLog(home / KIND / "0.jsonl"))  # type: ignore[arg-type]


def test_a_robot_records_sends_logs_and_goes_on_after_a_kill(tmp_path: Path) -> None:
    catalog, objects = Catalog(f"sqlite:///{tmp_path}/catalog.db"), DirectoryStore(tmp_path / "objects")
    catalog.migrate()

    def contract(episode: Episode) -> list[object]:
        return list(wide_check(episode))

    coordinator = Coordinator(catalog, objects, OutboxLog(catalog), contract)  # type: ignore[arg-type]
    home, stop = tmp_path / "robots", threading.Event()

    def live(episodes: int) -> None:
        actor = robot(home, EmbeddedServer(catalog, objects, "a0"), episodes)
        thread = threading.Thread(target=actor.run, args=(stop,))
        thread.start()
        while thread.is_alive():
            coordinator.step()
            thread.join(0.01)

    live(3)
    live(5)  # another life of the same robot: two more
    log = list(operations(home / KIND))
    closed = [line["id"] for line in log if line["op"] == "closed"]
    assert len(closed) == len(set(closed)) == 5
    assert {line["id"] for line in log if line["op"] == "confirmed"} == set(closed)
    assert all(line["began"] <= line["at"] for line in log if line["op"] == "closed")
    verdict = check(catalog, objects, log, None)
    assert (verdict.broken, verdict.in_snapshot, verdict.acknowledged) == ([], 5, 5)


def test_a_file_ends_the_recording(tmp_path: Path) -> None:
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.db")
    catalog.migrate()
    (tmp_path / "enough").touch()
    robot(tmp_path, EmbeddedServer(catalog, DirectoryStore(tmp_path / "objects"), "a0"), 5).run(threading.Event())
    assert list(operations(tmp_path / KIND)) == []


def test_a_torn_line_does_not_swallow_the_next_one(tmp_path: Path) -> None:
    path = tmp_path / "operations" / "0.jsonl"
    path.parent.mkdir()
    path.write_text('{"op": "clo')
    OperationLog(path).write("sent", id="a", durable=True)
    assert [line["op"] for line in operations(tmp_path / "operations")] == ["sent"]


def test_a_route_is_pairs_of_ports() -> None:
    assert parse_route("80=81,443=8443") == {80: 81, 443: 8443}
    assert parse_route("") == {}
    with pytest.raises(argparse.ArgumentTypeError, match="80"):
        parse_route("80")


def test_rates_are_over_a_window() -> None:
    progress = [{"at": float(at), "settled": 2 * at} for at in range(0, 60, 3)]
    at, rate = rates(progress, "settled")
    assert rate == pytest.approx([2.0] * 19) and at[0] == pytest.approx(0.05)


def test_the_pictures_show_what_was_found(tmp_path: Path) -> None:
    found = {
        "episodes": 30, "unaccounted": 0, "duplicates_in_snapshot": 0, "faults_injected": {"kill_broker": 1},
        "faults": [{"kind": "kill_broker", "at": 2.0, "until": 4.0}],
        "progress": [{"at": at, "committed": 5 * at, "settled": 4 * at} for at in (0.0, 3.0, 6.0)],
    }  # fmt: skip
    assert "kill broker" in figure(tmp_path / "soak.svg", found).read_text()
    quantiles = {"p50": 0.5, "p99": 1.5}
    run = {"actors": 16, "payload_mib": 4.0, "link": {"delay_ms": 30.0, "mbit_s": 100.0}}
    run |= {"episode_to_learner_s": quantiles, "publish_to_active_s": quantiles}
    costs = {"commit_ms_by_catalogue_size": {"10000": 5.0, "100000": 5.5}}
    drawn = latency_figure({"runs": [run], **costs}, tmp_path / "latency.svg").read_text()
    assert "16 robots, 4 MiB, 30 ms, 100 Mbit/s" in drawn and "Table VI" in drawn
    assert PAPER["episode_to_learner_s"] == {"p50": 41.0, "p99": 148.0}
