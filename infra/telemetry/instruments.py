"""What a metric is made of: counters, gauges and histograms that cost nothing until this process is asked to show them.

Definitions are in `infra.telemetry.metrics`. `enable` turns them on; before that every call returns at once and
`prometheus_client` is not even imported, which is what robots want. A metric appears in the output when it was first
used, so that a process shows its own metrics and not the zeros of everybody else's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

LATENCY_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
SIZE_BYTES = tuple(float(2**power) for power in (16, 18, 20, 22, 24, 26, 28, 30))

DEFINED: dict[str, Instrument] = {}  # every metric by name, in order of definition

_lock = threading.Lock()
_registry: Any = None  # of prometheus_client, once enabled


class Instrument:
    """One metric.

    Args:
        name: with its unit; a counter's ends in `_total`.
        help: one sentence.
        by: the process that shows it: the first part of its name, `robot` for `robot-r0`.
        labels: their names; their values must be few and known beforehand, never an episode's id.
    """

    kind: ClassVar[str]

    def __init__(self, name: str, help: str, *, by: str, labels: tuple[str, ...] = ()) -> None:
        if name in DEFINED:
            raise ValueError(f"metric {name} is defined twice")
        self.name, self.help, self.by, self.labels = name, help, by, labels
        self._family: Any = None
        self._made_for: Any = None
        DEFINED[name] = self

    def _make(self) -> Any:
        raise NotImplementedError

    def _family_now(self) -> Any:
        """prometheus_client's metric; None while metrics are off."""
        if _registry is None:
            return None
        if self._made_for is not _registry:
            with _lock:
                if self._made_for is not _registry:
                    self._family, self._made_for = self._make(), _registry
        return self._family

    def _child(self, labels: Mapping[str, str]) -> Any:
        family = self._family_now()
        return family.labels(**labels) if family is not None and self.labels else family


class Counter(Instrument):
    """A number that only grows."""

    kind = "counter"

    def inc(self, amount: float = 1.0, **labels: str) -> None:
        """Add `amount`, at least 0."""
        if _registry is not None:
            self._child(labels).inc(amount)

    def _make(self) -> Any:
        import prometheus_client

        return prometheus_client.Counter(self.name, self.help, self.labels, registry=_registry)


class Gauge(Instrument):
    """A number that is what it is now."""

    kind = "gauge"

    def set(self, value: float, **labels: str) -> None:
        if _registry is not None:
            self._child(labels).set(value)

    def follow(self, function: Callable[[], float]) -> None:
        """Ask `function` for the value whenever the metrics are read."""
        if (family := self._family_now()) is not None:
            family.set_function(function)

    def set_all(self, values: Mapping[tuple[str, ...], float]) -> None:
        """Set the value of every series at once, by its labels' values; series that are not named disappear."""
        family = self._family_now()
        if family is None:
            return
        if not self.labels:
            raise ValueError(f"{self.name} has no labels: use set()")
        for key, value in values.items():
            family.labels(*key).set(value)
        for sample in family.collect()[0].samples:
            if (key := tuple(sample.labels[name] for name in self.labels)) not in values:
                family.remove(*key)

    def forget(self) -> None:
        """Show no series any more, until the next `set`: this process does not know the number now."""
        if (family := self._family_now()) is None:
            return
        if self.labels:
            family.clear()
        else:
            with _lock:
                _registry.unregister(family)
                self._made_for = None

    def _make(self) -> Any:
        import prometheus_client

        return prometheus_client.Gauge(self.name, self.help, self.labels, registry=_registry)


class Histogram(Instrument):
    """How often a value fell into each bucket.

    Args:
        buckets: upper bounds, ascending; `LATENCY_S` or `SIZE_BYTES`.
    """

    kind = "histogram"

    def __init__(
        self, name: str, help: str, *, by: str, labels: tuple[str, ...] = (), buckets: tuple[float, ...] = LATENCY_S
    ) -> None:
        super().__init__(name, help, by=by, labels=labels)
        self.buckets = buckets

    def observe(self, value: float, **labels: str) -> None:
        """Count `value`; one below 0, which two clocks that disagree can give, counts as 0."""
        if _registry is not None:
            self._child(labels).observe(max(value, 0.0))

    @contextmanager
    def time(self, **labels: str) -> Iterator[None]:
        """Observe how long the block takes, seconds, whether or not it raises."""
        began = time.monotonic()
        try:
            yield
        finally:
            self.observe(time.monotonic() - began, **labels)

    def _make(self) -> Any:
        import prometheus_client

        return prometheus_client.Histogram(self.name, self.help, self.labels, buckets=self.buckets, registry=_registry)


def enabled() -> bool:
    """Whether this process keeps metrics: ask before work that is done for them alone."""
    return _registry is not None


def enable(process: str) -> None:
    """Keep metrics from now on. Counters without labels that `process` owns begin at 0, so that rates see the first."""
    global _registry
    with _lock:
        if _registry is None:
            import prometheus_client

            prometheus_client.disable_created_metrics()
            registry = prometheus_client.CollectorRegistry()
            prometheus_client.ProcessCollector(registry=registry)
            _registry = registry
    for instrument in list(DEFINED.values()):
        if isinstance(instrument, Counter) and not instrument.labels and process.startswith(instrument.by):
            instrument.inc(0.0)


def disable() -> None:
    """Keep no metrics any more and forget their values; for tests."""
    global _registry
    with _lock:
        _registry = None


def registry() -> Any:
    """prometheus_client's registry of this process; None while metrics are off."""
    return _registry


def render() -> tuple[bytes, str]:
    """The metrics as Prometheus reads them: body and content type. Empty while they are off."""
    if _registry is None:
        return b"", "text/plain"
    import prometheus_client

    return prometheus_client.generate_latest(_registry), prometheus_client.CONTENT_TYPE_LATEST
