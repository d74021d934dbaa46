"""An episode's way as one trace, from the robot's spool to the learner's first batch: W3C trace context, OpenTelemetry.

The trace's id *is* the episode's id, and the span that the others hang from follows from it. So the context needs no
state, survives every crash, and whoever knows an episode finds its trace. It travels as `trace_id` in what the robot
hands in, in the catalog's rows and in the broker's headers.

Spans are written when a process ends a stage, from times that it knows anyway, and only where an exporter is
configured: OTEL_EXPORTER_OTLP_ENDPOINT is set and the extra `lwd[observability]` installed. Otherwise nothing is
imported and `span` returns at once.

    spool.close -> upload -> commit -> relay -> examine -> snapshot -> load -> first_sample
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import threading
from dataclasses import dataclass
from typing import Any

_ENDPOINTS = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
_FORMAT = re.compile(r"00-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})")
_SAMPLED = 1
_EXPORT_TIMEOUT_S = 5.0  # a collector that is away must not hold a process up when it ends
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TraceContext:
    """A traceparent, taken apart: the trace, the span to hang from, and whether anybody wants to see it."""

    trace_id: int
    span_id: int
    sampled: bool


def traceparent(episode_id: str) -> str:
    """The W3C traceparent of an episode, 55 characters.

    Args:
        episode_id: 32 lower-case hex digits.
    """
    return f"00-{episode_id}-{_root_span(episode_id)}-01"


def parse(text: str) -> TraceContext | None:
    """The context in a traceparent; None where the text is none, as W3C demands of everybody who reads one."""
    found = _FORMAT.fullmatch(text)
    if found is None:
        return None
    trace_id, span_id, flags = (int(part, 16) for part in found.groups())
    return TraceContext(trace_id, span_id, bool(flags & _SAMPLED)) if trace_id and span_id else None


def start(process: str) -> bool:
    """Export this process's spans from now on, if an exporter is configured; whether one is.

    Args:
        process: its name, shown as the service `lwd-<process>` unless OTEL_SERVICE_NAME is set.
    """
    return _exporter.start(process)


def enabled() -> bool:
    """Whether spans go anywhere: ask before work that is done for them alone."""
    return _exporter.tracer is not None


def span(name: str, context: str, begin: float, end: float, **attributes: str | int | float | bool) -> None:
    """Write one span of an episode's trace.

    Args:
        name: of the stage.
        context: the episode's traceparent; nothing is written where it is none.
        begin, end: seconds since the epoch.
        attributes: shown with the span; never a URL or a credential.
    """
    if _exporter.tracer is not None and (parent := parse(context)) is not None and parent.sampled:
        _exporter.write(name, parent, begin, max(begin, end), attributes, root=False)


def root_span(name: str, context: str, begin: float, end: float, **attributes: str | int | float | bool) -> None:
    """Write the span that the others hang from; otherwise as `span`. For the robot, which makes the context."""
    if _exporter.tracer is not None and (own := parse(context)) is not None and own.sampled:
        _exporter.write(name, own, begin, max(begin, end), attributes, root=True)


def stop() -> None:
    """Export what is written so far, and nothing any more. At exit this happens by itself."""
    _exporter.stop()


def _root_span(episode_id: str) -> str:
    digest = hashlib.sha256(f"lwd spool.close {episode_id}".encode()).hexdigest()[:16]
    return digest if int(digest, 16) else "1".zfill(16)  # all zeros is no span


class _Exporter:
    """OpenTelemetry's SDK, imported only where it is wanted."""

    def __init__(self) -> None:
        self.tracer: Any = None
        self._provider: Any = None
        self._ids = threading.local()  # of the root span that is being made

    def start(self, process: str) -> bool:
        if self.tracer is not None or not any(os.environ.get(name) for name in _ENDPOINTS):
            return self.tracer is not None
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import SERVICE_NAME, Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        except ImportError as error:
            _log.warning("no traces: %s is not installed; `pip install 'lwd[observability]'`", error.name)
            return False
        ids = self._ids

        class Ids(RandomIdGenerator):
            """Random, but for the root span: its ids are the episode's."""

            def generate_trace_id(self) -> int:
                given: int | None = getattr(ids, "trace", None)
                return super().generate_trace_id() if given is None else given

            def generate_span_id(self) -> int:
                given: int | None = getattr(ids, "span", None)
                return super().generate_span_id() if given is None else given

        name = os.environ.get("OTEL_SERVICE_NAME") or f"lwd-{process}"
        provider = TracerProvider(resource=Resource.create({SERVICE_NAME: name}), id_generator=Ids())
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(timeout=_EXPORT_TIMEOUT_S)))
        self._provider, self.tracer = provider, provider.get_tracer("lwd")
        return True

    def write(
        self, name: str, context: TraceContext, begin: float, end: float, attributes: dict[str, Any], *, root: bool
    ) -> None:
        from opentelemetry import trace
        from opentelemetry.context import Context

        around = Context()
        if root:
            self._ids.trace, self._ids.span = context.trace_id, context.span_id
        else:
            flags = trace.TraceFlags(trace.TraceFlags.SAMPLED)
            parent = trace.SpanContext(context.trace_id, context.span_id, is_remote=True, trace_flags=flags)
            around = trace.set_span_in_context(trace.NonRecordingSpan(parent), around)
        try:
            started = self.tracer.start_span(name, around, attributes=attributes, start_time=_nanoseconds(begin))
        finally:
            self._ids.trace = self._ids.span = None
        started.end(_nanoseconds(end))

    def stop(self) -> None:
        if self._provider is not None:
            self._provider.shutdown()
        self._provider = self.tracer = None


def _nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)


_exporter = _Exporter()
