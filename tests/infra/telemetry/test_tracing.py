"""An episode's id is its trace: the context survives anything, and spans reach an OpenTelemetry collector whole."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from otlp import Collector, collecting

from infra.episode import new_episode_id
from infra.ingest import Claim
from infra.telemetry import tracing

EPISODE = "0af7651916cd43dd8448eb211c80319c"


def test_the_context_follows_from_the_episode_alone() -> None:
    context = tracing.traceparent(EPISODE)
    assert context == tracing.traceparent(EPISODE)  # after a crash, on another machine
    version, trace, parent, flags = context.split("-")
    assert (version, trace, flags) == ("00", EPISODE, "01")
    assert len(parent) == 16 and int(parent, 16)
    other = new_episode_id()
    assert tracing.traceparent(other).split("-")[2] != parent


def test_the_context_fits_where_it_travels() -> None:
    claim = Claim.read("r0", EPISODE, "0" * 64, 1, {"trace_id": tracing.traceparent(EPISODE)})
    assert tracing.parse(claim.trace_id) == tracing.parse(tracing.traceparent(EPISODE))


def test_a_context_is_taken_apart() -> None:
    found = tracing.parse(f"00-{EPISODE}-00f067aa0ba902b7-01")
    assert found == tracing.TraceContext(int(EPISODE, 16), 0x00F067AA0BA902B7, True)
    unwanted = tracing.parse(f"00-{EPISODE}-00f067aa0ba902b7-00")
    assert unwanted is not None and not unwanted.sampled


@pytest.mark.parametrize(
    "text",
    [
        "",
        EPISODE,
        f"00-{EPISODE}-00f067aa0ba902b7",
        f"01-{EPISODE}-00f067aa0ba902b7-01",
        f"00-{EPISODE.upper()}-00f067aa0ba902b7-01",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{EPISODE}-{'0' * 16}-01",
        f"00-{EPISODE}-00f067aa0ba902b7-01\n",
        f"00-{EPISODE}-00f067aa0ba902b7-01-more",
    ],
)
def test_what_is_no_context_is_ignored(text: str) -> None:
    assert tracing.parse(text) is None
    tracing.span("upload", text, 0.0, 1.0)


def test_without_an_exporter_nothing_is_imported_or_written() -> None:
    code = f"""
import sys
from infra.telemetry import tracing
assert not tracing.start("robot-r0") and not tracing.enabled()
tracing.root_span("spool.close", tracing.traceparent("{EPISODE}"), 1.0, 2.0)
tracing.span("upload", tracing.traceparent("{EPISODE}"), 1.0, 2.0, bytes=3)
tracing.stop()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    env = {name: value for name, value in os.environ.items() if not name.startswith("OTEL_")}
    said = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert said.stdout == "[]\n"


def test_a_missing_sdk_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    assert not tracing.start("coordinator")
    assert "pip install 'lwd[observability]'" in caplog.text


# --- with the SDK and a collector -------------------------------------------------------------------------------------


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    yield from collecting(monkeypatch)


def test_spans_arrive_as_one_trace(collector: Collector) -> None:
    assert tracing.start("robot-r0") and tracing.enabled()
    context = tracing.traceparent(EPISODE)
    tracing.root_span("spool.close", context, 100.0, 100.5, robot="r0")
    tracing.span("upload", context, 100.5, 101.25, bytes=4096)
    tracing.span("commit", context, 102.0, 101.0)  # the clocks of two machines disagree
    tracing.stop()
    assert {service for service, _ in collector.spans} == {"lwd-robot-r0"}
    spans = {span.name: span for _, span in collector.spans}
    assert {span.trace_id.hex() for span in spans.values()} == {EPISODE}
    root = spans["spool.close"]
    assert root.span_id.hex() == context.split("-")[2] and root.parent_span_id == b""
    assert {spans[name].parent_span_id for name in ("upload", "commit")} == {root.span_id}
    assert len({span.span_id for span in spans.values()}) == 3
    assert (root.start_time_unix_nano, root.end_time_unix_nano) == (100 * 10**9, 100_500_000_000)
    assert spans["upload"].attributes[0].key == "bytes" and spans["upload"].attributes[0].value.int_value == 4096
    assert spans["commit"].start_time_unix_nano == spans["commit"].end_time_unix_nano == 102 * 10**9


def test_a_context_that_nobody_wants_to_see_is_not_exported(collector: Collector) -> None:
    assert tracing.start("service")
    tracing.span("commit", tracing.traceparent(EPISODE)[:-2] + "00", 1.0, 2.0)
    tracing.span("commit", "free text", 1.0, 2.0)
    tracing.stop()
    assert collector.spans == []


def test_spans_are_exported_at_exit(collector: Collector, tmp_path: Path) -> None:
    code = f"""
from infra.telemetry import tracing
tracing.start("relay")
tracing.span("relay", tracing.traceparent("{EPISODE}"), 1.0, 2.0)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert [(service, span.name) for service, span in collector.spans] == [("lwd-relay", "relay")]


def test_a_collector_that_is_away_harms_nobody(collector: Collector) -> None:
    """The process goes on, and ends."""
    code = f"""
import os
os.environ["OTEL_EXPORTER_OTLP_ENDPOINT"] = "http://127.0.0.1:1"
from infra.telemetry import tracing
tracing.start("relay")
tracing.span("relay", tracing.traceparent("{EPISODE}"), 1.0, 2.0)
print("went on")
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert said.stdout == "went on\n"
