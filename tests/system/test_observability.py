"""Metrics of the fleet profile on real servers: the catalog's on PostgreSQL, the relay's and the log's on Kafka."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from invariants import example_episode, open_plane
from log_tools import open_relay

from infra.coordinator import CONSUMER, Coordinator
from infra.plane import open_events
from infra.settings import load_settings
from infra.telemetry import instruments, metrics
from infra.telemetry.catalog_metrics import CatalogMetrics, times_of
from infra.telemetry.tracing import traceparent


@pytest.fixture
def on() -> Iterator[None]:
    metrics.enable("test")
    yield
    instruments.disable()


def shown(*prefixes: str) -> dict[str, float]:
    lines = metrics.render()[0].decode().splitlines()
    pairs = (line.rsplit(" ", 1) for line in lines if line.startswith(prefixes))
    return {name: float(value) for name, value in pairs if "_bucket" not in name and "_sum" not in name}


@pytest.mark.usefixtures("on")
def test_what_waits_is_seen_at_each_stage(fleet_home: Path) -> None:
    plane, settings = open_plane(fleet_home), load_settings(home=fleet_home)
    with closing(open_events(settings, plane.catalog)) as events, closing(open_relay(fleet_home)) as relay:
        collector = CatalogMetrics(plane.catalog, relayed=True, lag=lambda: events.lag(CONSUMER))

        def look() -> tuple[float, ...]:
            collector._due = collector._slow_due = 0.0
            assert collector.refresh()
            names = ("lwd_outbox_unsent_events", "lwd_consumer_lag_events", "lwd_unaccounted_episodes")
            return tuple(shown(*names)[name] for name in names)

        assert look() == (0, 0, 0)
        for number in range(3):
            plane.submit(example_episode(number), trace_id=traceparent(f"{number:032x}"))
        assert look() == (3, 0, 3)
        assert shown("lwd_outbox_oldest")["lwd_outbox_oldest_unsent_seconds"] > 0
        assert relay.step() == 3
        assert shown("lwd_relay", "lwd_episode_stage") == {
            "lwd_relay_events_total": 3,
            "lwd_relay_batch_seconds_count": 1,
            'lwd_episode_stage_seconds_count{stage="relay"}': 3,
        }
        assert look() == (0, 3, 3)
        coordinator = Coordinator(plane.catalog, plane.objects, events, lambda episode: [])
        while coordinator.step() == 0:
            pass
        while coordinator.step():
            pass
        coordinator.lease.release()
        assert look() == (0, 0, 0)
        assert shown("lwd_snapshot_episodes") == {"lwd_snapshot_episodes": 3}
    times, now = times_of(plane.catalog, [f"{number:032x}" for number in range(3)])
    for one in times:
        assert one.snapshot_at is not None and one.committed_at <= one.snapshot_at <= now
    assert {one.trace_id for one in times} == {traceparent(f"{number:032x}") for number in range(3)}
