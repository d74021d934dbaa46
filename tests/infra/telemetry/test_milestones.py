"""Each stage of an episode's way is seen where it ends: in the metrics, and as a span of the episode's one trace."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from invariants import digest, example_episode, open_plane
from otlp import Collector, collecting
from waiting import wait_until

from infra.edge.client import EdgeClient
from infra.edge.framelog import Frame
from infra.edge.server import Upload
from infra.edge.spool import Spool
from infra.episode import Episode, encode
from infra.errors import ConflictError, UnavailableError
from infra.fleet.embedded import EmbeddedServer
from infra.prefetcher import Cache, Prefetcher
from infra.reader import SnapshotReader
from infra.servers.toolchain import free_port
from infra.settings import load_settings
from infra.telemetry import instruments, metrics, milestones, tracing


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    yield from collecting(monkeypatch)


@pytest.fixture
def on() -> Iterator[None]:
    metrics.enable("test")
    yield
    instruments.disable()


def counts(*prefixes: str) -> dict[str, float]:
    """Counters, and how often each histogram observed."""
    lines = metrics.render()[0].decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(prefixes))
    return {name: float(value) for name, value in pairs if "_bucket" not in name and "_sum" not in name}


class Refusal:
    rule, severity, message = "task", "block", "refused"


def check(episode: Episode) -> list[Refusal]:
    return [Refusal()] if episode.task == "S4" else []


def deliver(home: Path, tasks: tuple[str, ...]) -> None:
    """Record one episode of each task and bring them into a snapshot, as a robot and a coordinator do."""
    plane = open_plane(home)
    client = EdgeClient(
        "r0", Spool(home / "spool" / "r0", max_bytes=2**24), EmbeddedServer(plane.catalog, plane.objects, "r0")
    )
    for task in tasks:
        client.begin(task, "open the drawer", source="online", policy_version=1)
        for step in range(3):
            client.record(Frame(np.zeros(3, np.float32), np.zeros(5, np.float32), float(step == 2), False, step * 0.05))
        client.close(np.zeros(3, np.float32), 0.15, "success", (1.0,))
    assert client.sync().sent == len(tasks)
    plane.settle(check)
    client.sync()
    client.spool.release()


def load(home: Path, name: str = "learner") -> list[str]:
    """Fetch and read what is new; the episodes' ids."""
    settings, plane = load_settings(home=home), open_plane(home)
    cache = Cache(settings.cache_dir / name)
    fetcher = Prefetcher(plane.catalog, plane.objects, cache, budget=2**24)
    while fetcher.step(threading.Event()):
        pass
    found = []
    with SnapshotReader(settings, name=name, follow=False) as reader:
        while (increment := reader.poll()) is not None:
            found += [episode.episode_id for episode in increment.added]
    return found


@pytest.mark.usefixtures("on")
def test_the_metrics_of_an_episode_s_way(tmp_path: Path) -> None:
    deliver(tmp_path, ("S1", "S2", "S4"))
    assert counts("lwd_ingest", "lwd_coordinator", "lwd_episode") == {
        'lwd_ingest_episodes_total{result="committed",robot="r0"}': 3,
        'lwd_ingest_bytes_total{robot="r0"}': counts("lwd_ingest_bytes_total")['lwd_ingest_bytes_total{robot="r0"}'],
        "lwd_ingest_episode_bytes_count": 3,
        "lwd_coordinator_batch_seconds_count": 1,
        "lwd_coordinator_examine_seconds_count": 3,
        'lwd_coordinator_episodes_total{result="accepted"}': 2,
        'lwd_coordinator_episodes_total{result="quarantined"}': 1,
        'lwd_coordinator_episodes_total{result="repeated"}': 0,
        'lwd_coordinator_quarantined_total{stage="contract"}': 1,
        'lwd_episode_stage_seconds_count{stage="commit"}': 3,
        'lwd_episode_stage_seconds_count{stage="snapshot"}': 2,
    }
    assert len(load(tmp_path)) == 2
    milestones.sampled({f"{7:032x}": time.time() - 1})
    seen = counts("lwd_prefetch", "lwd_reader", "lwd_episode")
    assert seen.pop("lwd_prefetch_bytes_total") > 1000
    assert seen == {
        "lwd_prefetch_objects_total": 2,
        "lwd_prefetch_object_seconds_count": 2,
        'lwd_reader_version{reader="learner"}': 1,
        "lwd_reader_episodes_total": 2,
        "lwd_episode_to_learner_seconds_count": 2,
        'lwd_episode_stage_seconds_count{stage="commit"}': 3,
        'lwd_episode_stage_seconds_count{stage="snapshot"}': 2,
        'lwd_episode_stage_seconds_count{stage="load"}': 2,
        'lwd_episode_stage_seconds_count{stage="sample"}': 1,
    }
    load(tmp_path)  # a reader that is started again reads the same again: that is no new latency
    assert counts("lwd_episode_to_learner")["lwd_episode_to_learner_seconds_count"] == 2


def test_the_trace_of_an_episode_s_way(tmp_path: Path, collector: Collector) -> None:
    tracing.start("everything")
    deliver(tmp_path, ("S1", "S4"))
    (accepted,) = load(tmp_path)
    milestones.sampled({accepted: time.time()})
    tracing.stop()
    traces: dict[str, list[str]] = {}
    for _, span in sorted(collector.spans, key=lambda pair: pair[1].end_time_unix_nano):
        traces.setdefault(span.trace_id.hex(), []).append(span.name)
    stages = ["spool.close", "upload", "commit", "examine", "snapshot", "load", "first_sample"]
    assert sorted(traces.pop(accepted)) == sorted(stages)
    (refused,) = traces.values()
    assert sorted(refused) == sorted(stages[:4])
    roots = {span.trace_id: span.span_id for _, span in collector.spans if span.name == "spool.close"}
    for _, span in collector.spans:
        assert span.parent_span_id == (b"" if span.name == "spool.close" else roots[span.trace_id])
        assert span.start_time_unix_nano <= span.end_time_unix_nano


@pytest.mark.usefixtures("on")
def test_what_a_robot_is_answered_is_counted(tmp_path: Path) -> None:
    plane, episode = open_plane(tmp_path), example_episode(1)
    server = EmbeddedServer(plane.catalog, plane.objects, "r0")
    data, other = encode(episode), encode(example_episode(1, task="L4"))
    for payload in (data, data, other):
        server.submit_many([Upload(episode.episode_id, digest(payload), len(payload), payload)])
    assert counts("lwd_ingest_episodes_total") == {
        'lwd_ingest_episodes_total{result="committed",robot="r0"}': 1,
        'lwd_ingest_episodes_total{result="conflict",robot="r0"}': 1,
    }


@pytest.mark.usefixtures("on")
@pytest.mark.parametrize(
    ("outcome", "known", "result"),
    [
        ("committed", False, "committed"),
        ("snapshot", True, "known"),
        (ConflictError("a", "b"), False, "conflict"),
        (UnavailableError("a", "b"), False, "unavailable"),
    ],
)
def test_the_words_for_what_became_of_an_upload(outcome: str, known: bool, result: str) -> None:
    class Claim:
        robot_id, size, trace_id = "r7", 10, "free text"

    milestones.handed_in(Claim(), outcome, known, 1.0, 2.0)
    assert counts("lwd_ingest_episodes_total") == {f'lwd_ingest_episodes_total{{result="{result}",robot="r7"}}': 1}
    stages = counts("lwd_episode_stage")
    assert bool(stages) == (result == "committed")


def test_a_process_shows_itself_from_its_start_to_its_end(tmp_path: Path) -> None:
    """The coordinator, as Prometheus finds and reads it."""
    plane = open_plane(tmp_path)
    plane.submit(example_episode(1))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}  # it loads `check` from here
    env |= {"LWD_METRICS_PORT": str(free_port()), "LWD_POLL_S": "0.02"}
    command = [sys.executable, "-m", "infra.coordinator", "--home", str(tmp_path), "--check", "test_milestones:check"]
    process = subprocess.Popen(command, env=env)
    file = tmp_path / "metrics" / "coordinator.json"
    try:
        wait_until(file.exists)
        ((target,),) = [entry["targets"] for entry in json.loads(file.read_text())]

        def text() -> str:
            assert process.poll() is None
            with urllib.request.urlopen(f"http://{target}/metrics") as answer:
                return str(answer.read().decode())

        wait_until(
            lambda: {"lwd_coordinator_lease_held 1.0", "lwd_snapshot_version 1.0"} <= {*text().splitlines()}, text
        )
        shown = dict(line.rsplit(" ", 1) for line in text().splitlines() if not line.startswith("#"))
        assert shown['lwd_coordinator_episodes_total{result="accepted"}'] == "1.0"
        assert shown["lwd_unaccounted_episodes"] == shown["lwd_consumer_lag_events"] == "0.0"
        assert float(shown["process_resident_memory_bytes"]) > 0
        process.terminate()
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert not file.exists()
