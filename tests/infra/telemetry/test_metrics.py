"""Metrics cost nothing while they are off, are found by Prometheus when on, and say what the catalog holds."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import Plane, digest, example_episode, open_plane

from infra.catalog import Catalog, schema
from infra.episode import Episode, encode
from infra.errors import ConflictError, CorruptDataError
from infra.objects.directory import DirectoryStore
from infra.servers.toolchain import free_port
from infra.settings import load_settings
from infra.telemetry import instruments, metrics
from infra.telemetry.catalog_metrics import CatalogMetrics
from infra.telemetry.instruments import Counter, Gauge, Histogram

ROOT = Path(__file__).parents[3]


@pytest.fixture
def on() -> Iterator[None]:
    metrics.enable("test")
    yield
    instruments.disable()


@pytest.fixture
def define() -> Iterator[type]:
    """Forgets the metrics that a test defines."""
    before = dict(metrics.DEFINED)
    yield Counter
    metrics.DEFINED.clear()
    metrics.DEFINED.update(before)


def values(prefix: str = "lwd_") -> dict[str, float]:
    """What is shown: each series with its labels."""
    lines = metrics.render()[0].decode().splitlines()
    return {line.rsplit(" ", 1)[0]: float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(prefix)}


# --- the definitions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", metrics.DEFINED)
def test_names_carry_their_unit_and_labels_are_bounded(name: str) -> None:
    metric = metrics.DEFINED[name]
    assert re.fullmatch(r"lwd_[a-z0-9_]+", name)
    assert (metric.kind == "counter") == name.endswith("_total")
    if isinstance(metric, Histogram):
        assert name.endswith(("_seconds", "_bytes"))
        assert list(metric.buckets) == sorted(set(metric.buckets))
    assert set(metric.labels) <= {
        "robot",
        "part",
        "cohort",
        "stage",
        "kind",
        "result",
        "operation",
        "route",
        "status",
        "reader",
    }
    assert metric.help.endswith(".") and len(metric.help) < 300


def test_latencies_have_buckets_from_10_ms_to_10_min() -> None:
    assert (instruments.LATENCY_S[0], instruments.LATENCY_S[-1]) == (0.01, 600.0)


def test_every_metric_is_fed_somewhere() -> None:
    """Each constant of infra.telemetry.metrics is used as `metrics.NAME` by some process."""
    mine = {node.targets[0].id for node in ast.parse((ROOT / "infra/telemetry/metrics.py").read_text()).body
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)}  # fmt: skip
    used: set[str] = {"DISK_FREE", "DISK_SIZE"}  # by serve() itself
    for package in ("infra", "flows", "lwd_model"):
        for path in (ROOT / package).rglob("*.py"):
            used |= set(re.findall(r"\bmetrics\.([A-Z_]+)\b", path.read_text()))
    assert {name for name in mine if name.isupper() and not name.startswith("_")} - used == set()


def test_a_name_is_defined_once(define: type[Counter]) -> None:
    define("lwd_twice_total", "Once.", by="test")
    with pytest.raises(ValueError, match="defined twice"):
        define("lwd_twice_total", "Once.", by="test")


# --- off and on -------------------------------------------------------------------------------------------------------


def test_off_nothing_is_kept_and_nothing_is_imported() -> None:
    code = """
import sys
from infra.telemetry import metrics
metrics.SETTLED.inc(result="accepted"); metrics.LEASE_HELD.set(1); metrics.ROBOT_POLICY.set_all({("r0",): 1.0})
metrics.LEASE_HELD.forget(); metrics.DISK_FREE.follow(lambda: 1.0)
with metrics.BATCH_SECONDS.time():
    pass
assert metrics.render() == (b"", "text/plain") and not metrics.enabled()
print([name for name in sys.modules if name.split(".")[0] in ("prometheus_client", "opentelemetry", "sqlalchemy")])
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said == "[]\n"


@pytest.mark.usefixtures("on")
def test_a_process_shows_its_own_metrics_only() -> None:
    metrics.enable("relay")
    metrics.CACHE_BYTES.set(5)
    shown = values()
    assert shown["lwd_relay_events_total"] == 0  # so that the first increase is seen
    assert shown["lwd_cache_used_bytes"] == 5
    assert "lwd_learner_updates_total" not in shown and "lwd_snapshot_version" not in shown
    assert values("process_resident_memory_bytes")


@pytest.mark.usefixtures("on")
def test_counters_gauges_and_histograms(define: type[Counter]) -> None:
    counter = define("lwd_things_total", "Things.", by="test", labels=("kind",))
    counter.inc(kind="a")
    counter.inc(2, kind="a")
    counter.inc(kind="b")
    gauge = Gauge("lwd_level", "Level.", by="test", labels=("robot",))
    gauge.set_all({("r0",): 1.0, ("r1",): 2.0})
    gauge.set_all({("r1",): 3.0})
    histogram = Histogram("lwd_wait_seconds", "Wait.", by="test")
    histogram.observe(0.02)
    histogram.observe(-5.0)  # two clocks disagree
    with pytest.raises(RuntimeError), histogram.time():
        raise RuntimeError
    shown = values()
    assert shown['lwd_things_total{kind="a"}'] == 3 and shown['lwd_things_total{kind="b"}'] == 1
    assert {name: value for name, value in shown.items() if "level" in name} == {'lwd_level{robot="r1"}': 3}
    assert shown["lwd_wait_seconds_count"] == 3 and shown['lwd_wait_seconds_bucket{le="0.01"}'] == 2
    assert 0.02 <= shown["lwd_wait_seconds_sum"] < 10
    gauge.forget()
    assert not [name for name in values() if "level" in name]
    with pytest.raises(ValueError, match="use set"):
        metrics.LEASE_HELD.set_all({(): 1.0})


@pytest.mark.usefixtures("on")
def test_a_gauge_that_was_forgotten_can_be_set_again() -> None:
    metrics.UNACCOUNTED.set(3)
    metrics.UNACCOUNTED.forget()
    assert "lwd_unaccounted_episodes" not in values()
    metrics.UNACCOUNTED.forget()
    metrics.UNACCOUNTED.set(4)
    assert values()["lwd_unaccounted_episodes"] == 4


@pytest.mark.usefixtures("on")
def test_a_store_s_operations_are_counted(tmp_path: Path) -> None:
    store = DirectoryStore(tmp_path / "objects")
    store.put("policies/a/manifest.json", b"12345")
    (tmp_path / "file").write_bytes(b"123")
    store.put("policies/a/policy.safetensors", tmp_path / "file")
    assert store.get("policies/a/manifest.json") == b"12345"
    for _ in range(2):
        with pytest.raises(CorruptDataError):
            store.get("policies/b")
    assert not store.exists("policies/b")
    shown = {
        name: value for name, value in values("lwd_object").items() if "_bucket" not in name and "_sum" not in name
    }
    assert shown == {
        'lwd_object_operation_seconds_count{operation="put"}': 2,
        'lwd_object_operation_seconds_count{operation="get"}': 3,
        'lwd_object_operation_seconds_count{operation="exists"}': 1,
        'lwd_object_bytes_total{operation="put"}': 8,
        'lwd_object_bytes_total{operation="get"}': 5,
        'lwd_object_errors_total{kind="corrupt",operation="get"}': 2,
    }


# --- the endpoint -----------------------------------------------------------------------------------------------------


def test_without_a_port_nothing_is_served(tmp_path: Path) -> None:
    assert metrics.serve(load_settings(home=tmp_path), "coordinator") is None
    assert not metrics.enabled() and not (tmp_path / "metrics").exists()


@pytest.mark.usefixtures("on")
def test_prometheus_is_led_to_each_process(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, metrics_port=free_port())
    first, second = metrics.serve(settings, "coordinator"), metrics.serve(settings, "relay")
    assert first is not None and second is not None and first.port != second.port
    metrics.LEASE_HELD.set(1)
    ((found,),) = [json.loads((tmp_path / "metrics" / "relay.json").read_text())]
    assert found["labels"] == {"process": "relay", "host": found["labels"]["host"], "__scheme__": "http"}
    with urllib.request.urlopen(f"http://{found['targets'][0]}/metrics") as answer:
        text = answer.read().decode()
    assert "lwd_coordinator_lease_held 1.0" in text
    assert re.search(r"^lwd_disk_free_bytes [1-9]", text, re.MULTILINE)
    second.close()
    assert [path.name for path in (tmp_path / "metrics").iterdir()] == ["coordinator.json"]
    first.close()


@pytest.mark.usefixtures("on")
def test_a_successor_s_file_stays(tmp_path: Path) -> None:
    settings = load_settings(home=tmp_path, metrics_port=free_port())
    old, new = metrics.serve(settings, "robot-r0"), metrics.serve(settings, "robot-r0")
    assert old is not None and new is not None
    old.close()
    ((entry,),) = [json.loads((tmp_path / "metrics" / "robot-r0.json").read_text())]
    assert entry["targets"] == [f"127.0.0.1:{new.port}"]
    new.close()
    new.close()  # again at exit
    assert not list((tmp_path / "metrics").iterdir())


def test_a_clean_exit_takes_the_file_away(tmp_path: Path) -> None:
    code = (
        "import sys; from infra.telemetry import metrics; from infra.settings import load_settings\n"
        "from pathlib import Path\n"
        f"home = Path({str(tmp_path)!r})\n"
        "metrics.serve(load_settings(home=home), 'learner'); print([p.name for p in (home / 'metrics').iterdir()])\n"
        "sys.exit(3)"
    )
    env = {**os.environ, "LWD_METRICS_PORT": str(free_port())}
    ended = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (3, "['learner.json']\n", "")
    assert not list((tmp_path / "metrics").iterdir())


# --- the catalog's numbers --------------------------------------------------------------------------------------------


def refuse(episode: Episode) -> list[object]:
    class Violation:
        rule, severity, message = "task", "block", "refused"

    return [Violation()] if episode.task == "S4" else []


def settle(plane: Plane) -> None:
    plane.settle(refuse, micro_batch=2)  # type: ignore[arg-type]


def now_shown(collector: CatalogMetrics) -> dict[str, float]:
    collector._slow_due = 0.0
    collector.collect()
    return values()


@pytest.mark.usefixtures("on")
def test_unaccounted_episodes_are_followed_until_they_are_settled(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    collector = CatalogMetrics(plane.catalog, relayed=False)
    assert now_shown(collector)["lwd_unaccounted_episodes"] == 0
    for number in range(4):
        plane.submit(example_episode(number))
    shown = now_shown(collector)
    assert shown["lwd_unaccounted_episodes"] == 4
    assert 0 <= shown["lwd_unaccounted_oldest_seconds"] < 600
    settle(plane)  # one of the four is refused
    shown = now_shown(collector)
    assert shown["lwd_unaccounted_episodes"] == shown["lwd_unaccounted_oldest_seconds"] == 0
    assert shown['lwd_quarantine_episodes{stage="contract"}'] == 1
    assert (
        shown['lwd_quarantine_episodes{stage="conflict"}'] == 0
    )  # shown from the beginning, so that an alert sees 0 -> 1
    assert (shown["lwd_snapshot_version"], shown["lwd_snapshot_episodes"]) == (2, 3)
    assert abs(shown["lwd_snapshot_created_timestamp_seconds"] - time.time()) < 600
    refused = example_episode(3)
    plane.ingest.release(refused.episode_id, digest(encode(refused)))
    assert now_shown(collector)["lwd_unaccounted_episodes"] == 1
    settle(plane)
    assert now_shown(collector)["lwd_unaccounted_episodes"] == 0


@pytest.mark.usefixtures("on")
def test_a_copy_in_conflict_does_not_account_for_the_episode(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    episode = example_episode(0)
    plane.submit(episode)
    other = encode(example_episode(0, task="S2"))
    with pytest.raises(ConflictError):
        plane.ingest.submit("r0", episode.episode_id, other, digest(other), len(other))
    shown = now_shown(CatalogMetrics(plane.catalog, relayed=False))
    assert shown["lwd_unaccounted_episodes"] == 1
    assert shown['lwd_quarantine_episodes{stage="conflict"}'] == 1


@pytest.mark.usefixtures("on")
def test_a_long_outbox_is_judged_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("infra.telemetry.catalog_metrics._SCAN", 2)
    plane = open_plane(tmp_path)
    for number in range(3):
        plane.submit(example_episode(number))
    collector = CatalogMetrics(plane.catalog, relayed=False)
    assert "lwd_unaccounted_episodes" not in now_shown(collector)  # no number is better than one that is too low
    assert now_shown(collector)["lwd_unaccounted_episodes"] == 3


@pytest.mark.usefixtures("on")
def test_the_outbox_of_a_fleet(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    collector = CatalogMetrics(plane.catalog, relayed=True)
    shown = now_shown(collector)
    assert (shown["lwd_outbox_unsent_events"], shown["lwd_outbox_oldest_unsent_seconds"]) == (0, 0)
    for number in range(3):
        plane.submit(example_episode(number))
    with plane.catalog.begin() as connection:
        connection.execute(sa.update(schema.outbox).values(created_at=time.time() - 100))
        connection.execute(sa.update(schema.outbox).where(schema.outbox.c.seq == 1).values(sent_at=time.time()))
    shown = now_shown(collector)
    assert shown["lwd_outbox_unsent_events"] == 2
    assert 100 <= shown["lwd_outbox_oldest_unsent_seconds"] < 700
    assert "lwd_outbox_unsent_events" in values()
    collector.stand_down()
    others = ("lwd_catalog_metrics", "lwd_object")
    left = {name: value for name, value in values().items() if not name.startswith(others)}
    assert left == {"lwd_coordinator_lease_held": 0}


def test_in_the_local_profile_nothing_is_sent(tmp_path: Path, on: None) -> None:
    plane = open_plane(tmp_path)
    plane.submit(example_episode(0))
    assert not [name for name in now_shown(CatalogMetrics(plane.catalog, relayed=False)) if "outbox" in name]


@pytest.mark.usefixtures("on")
def test_robots_as_they_were_last_heard_of(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    now = time.time()
    said = {"spool_bytes": 30, "spool_limit": 100, "spool_episodes": 2, "refused": "policy 4 is not signed"}
    rows = [
        {"robot_id": "r0", "cohort": "learning", "active_version": 3, "last_seen": now - 5, "episodes": 7,
         "details": said},
        {"robot_id": "r1", "cohort": "canary", "active_version": None, "last_seen": now - 90, "episodes": 1,
         "details": {"spool_bytes": "a lot", "spool_limit": 10**400, "spool_episodes": True,
                     "safety": {"stop": 10**400, "clamp": "3"}, "ended": True}},
        {"robot_id": "r2", "cohort": "learning", "active_version": 1, "last_seen": now - 1e6, "episodes": 9,
         "details": None},
    ]  # fmt: skip
    with plane.catalog.begin() as connection:
        connection.execute(sa.insert(schema.robots), rows)
        tokens = [("r0", 5.0, None), ("r0", 9.0, None), ("r0", 99.0, 1.0)]
        for number, (robot, expires, revoked) in enumerate(tokens):
            connection.execute(
                sa.insert(schema.robot_tokens).values(
                    token_id=str(number),
                    robot_id=robot,
                    cohort="learning",
                    sha256="0",
                    actor="a",
                    created_at=0.0,
                    expires_at=expires,
                    revoked_at=revoked,
                )
            )
    robots = {name: value for name, value in now_shown(CatalogMetrics(plane.catalog, relayed=False)).items()
              if name.startswith("lwd_robot")}  # fmt: skip
    seen = robots.pop('lwd_robot_last_seen_timestamp_seconds{cohort="learning",robot="r0"}')
    assert seen == pytest.approx(now - 5)
    assert robots == {
        'lwd_robot_episodes{robot="r0"}': 7,
        'lwd_robot_episodes{robot="r1"}': 1,
        'lwd_robot_active_policy_version{robot="r0"}': 3,
        'lwd_robot_policy_refused{robot="r0"}': 1,
        'lwd_robot_hold{robot="r0"}': 0,
        'lwd_robot_spool_bytes{robot="r0"}': 30,
        'lwd_robot_spool_limit_bytes{robot="r0"}': 100,
        'lwd_robot_spool_episodes{robot="r0"}': 2,
        'lwd_robot_token_expires_timestamp_seconds{robot="r0"}': 9,
    }


@pytest.mark.usefixtures("on")
def test_policies_decisions_and_latencies(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    _measure(plane.catalog, "publish_to_active_s", 100.0)  # before this process: counted by the one before
    collector = CatalogMetrics(plane.catalog, relayed=False)
    shown = now_shown(collector)
    assert not [name for name in shown if name.startswith("lwd_policy_version")]
    with plane.catalog.begin() as connection:
        for version in (1, 2, 3):
            connection.execute(
                sa.insert(schema.policies).values(
                    version=version,
                    snapshot_version=0,
                    bundle_key="k",
                    manifest_sha256="0",
                    status="candidate",
                    created_at=version,
                )
            )
        connection.execute(sa.insert(schema.aliases).values(name="champion", version=2, updated_at=0.0))
        connection.execute(
            sa.insert(schema.promotions).values(
                version=2, decision="promote", evidence={}, proposer="gate", created_at=0.0
            )
        )
    _measure(plane.catalog, "publish_to_active_s", 0.3)
    _measure(plane.catalog, "publish_to_staged_s", 0.1)
    _measure(plane.catalog, "something else", 7.0)
    shown = now_shown(collector)
    shown = now_shown(collector)  # a measurement is counted once
    assert {name: value for name, value in shown.items() if name.startswith("lwd_policy_version")} == {
        'lwd_policy_version{kind="newest"}': 3,
        'lwd_policy_version{kind="champion"}': 2,
    }
    assert shown["lwd_policy_created_timestamp_seconds"] == 3
    assert shown['lwd_policy_decisions{kind="promote"}'] == 1 and shown['lwd_policy_decisions{kind="rollback"}'] == 0
    assert shown["lwd_policy_publish_to_active_seconds_sum"] == pytest.approx(0.3)
    assert shown["lwd_policy_publish_to_staged_seconds_count"] == 1


def _measure(catalog: Catalog, name: str, value: float) -> None:
    with catalog.begin() as connection:
        connection.execute(sa.insert(schema.measurements).values(name=name, value=value, at=0.0))


@pytest.mark.usefixtures("on")
def test_a_look_happens_now_and_then(tmp_path: Path) -> None:
    collector = CatalogMetrics(open_plane(tmp_path).catalog, relayed=False)
    assert [collector.refresh() for _ in range(3)] == [True, False, False]
    instruments.disable()
    collector._due = 0.0
    assert not collector.refresh()


@pytest.mark.usefixtures("on")
def test_what_cannot_be_shown_ends_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The coordinator looks between two micro-batches: an odd row must not keep it from the next."""
    plane = open_plane(tmp_path)
    row = {"robot_id": "r0", "cohort": "learning", "last_seen": time.time(), "episodes": 1, "details": ["no", "object"]}
    with plane.catalog.begin() as connection:
        connection.execute(sa.insert(schema.robots).values(row))
    collector = CatalogMetrics(plane.catalog, relayed=False)
    assert [collector.refresh() for _ in range(3)] == [True, False, False]
    assert [record.message for record in caplog.records] == ["metrics of the catalog"]


def test_looking_costs_no_scan_of_what_grows(tmp_path: Path) -> None:
    """SQLite's plans: what grows with the episodes is searched by an index, from where the last look ended."""
    plane = open_plane(tmp_path)
    collector, said = CatalogMetrics(plane.catalog, relayed=True), []
    plane.submit(example_episode(0))
    metrics.enable("test")

    @sa.event.listens_for(plane.catalog.engine, "before_cursor_execute")
    def remember(_c: object, cursor: object, text: str, given: object, _x: object, _m: object) -> None:
        if text.startswith("SELECT"):
            said.append((text, given))

    try:
        collector.collect()
        collector.collect()  # an episode is open now, and asked for by name
    finally:
        sa.event.remove(plane.catalog.engine, "before_cursor_execute", remember)
        instruments.disable()
    with plane.catalog.read() as connection:
        plans = {text: connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {text}", given).all() for text, given in said}
    steps = [row[3] for rows in plans.values() for row in rows]
    assert any(step.startswith("SEARCH outbox USING INTEGER PRIMARY KEY") for step in steps)
    scans = {
        step for step in steps if re.match(r"SCAN (episodes|outbox|snapshot_episodes|snapshots|measurements)\b", step)
    }
    # The partial index holds what is not sent, the primary key is walked from its end, until LIMIT.
    assert scans <= {"SCAN outbox USING INDEX ix_outbox_unsent", "SCAN snapshots"}
    assert "SCAN episodes" not in steps
