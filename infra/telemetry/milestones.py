"""What each stage of an episode's way leaves behind, as metrics and as spans: one call where the stage ends.

Each returns at once while neither metrics nor traces are on. Beginnings are times of this process, seconds since the
epoch; times of the catalog's clock come as `Times`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from infra.errors import ConflictError, CorruptDataError, LwdError, StorageFullError, UnavailableError
from infra.telemetry import metrics, tracing


class Claimed(Protocol):
    """An episode as it is handed in, announced or relayed: a claim, an event, a row of the outbox."""

    @property
    def robot_id(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def trace_id(self) -> str: ...


class Judged(Protocol):
    """The coordinator's verdict: accepted, or refused at a stage."""

    @property
    def stage(self) -> str: ...


@dataclass(frozen=True)
class Times:
    """An episode by its clocks, seconds since the epoch: the robot's when it closed it, the catalog's when it was
    committed and when the snapshot was made that took it in (None: in none)."""

    trace_id: str
    produced_at: float
    committed_at: float
    snapshot_at: float | None


def on() -> bool:
    """Whether anybody wants to know."""
    return metrics.enabled() or tracing.enabled()


def closed(episode_id: str, robot_id: str, began: float) -> None:
    """The robot has closed an episode."""
    if tracing.enabled():
        context = tracing.traceparent(episode_id)
        tracing.root_span("spool.close", context, began, time.time(), episode=episode_id, robot=robot_id)


def uploaded(episode_id: str, size: int, began: float) -> None:
    """The server has acknowledged an episode to its robot."""
    if tracing.enabled():
        tracing.span("upload", tracing.traceparent(episode_id), began, time.time(), bytes=size)


def handed_in(claim: Claimed, outcome: str | LwdError, known: bool, produced_at: float | None, began: float) -> None:
    """The server has answered an episode that was handed in.

    Args:
        outcome: its status, or the error.
        known: it had been committed before.
        produced_at: the robot's clock when it closed the episode.
    """
    if not on():
        return
    if isinstance(outcome, LwdError) or known:
        result = _word(outcome) if isinstance(outcome, LwdError) else "known"
        metrics.INGESTED.inc(robot=claim.robot_id, result=result)
        return
    now = time.time()
    metrics.INGESTED.inc(robot=claim.robot_id, result="committed")
    metrics.INGESTED_BYTES.inc(claim.size, robot=claim.robot_id)
    metrics.INGEST_EPISODE_BYTES.observe(claim.size)
    if produced_at is not None:
        metrics.EPISODE_STAGE.observe(now - produced_at, stage="commit")
    tracing.span("commit", claim.trace_id, began, now, robot=claim.robot_id, bytes=claim.size)


def relayed(rows: Sequence[Claimed], committed_at: Sequence[float], began: float) -> None:
    """The broker has acknowledged rows of the outbox, and they are marked."""
    if not on():
        return
    now = time.time()
    metrics.RELAYED.inc(len(rows))
    metrics.RELAY_SECONDS.observe(now - began)
    for row, at in zip(rows, committed_at, strict=True):
        metrics.EPISODE_STAGE.observe(now - at, stage="relay")
        tracing.span("relay", row.trace_id, began, now)


def examined(event: Claimed, began: float) -> None:
    """The coordinator has judged an episode."""
    if on():
        now = time.time()
        metrics.EXAMINE_SECONDS.observe(now - began)
        tracing.span("examine", event.trace_id, began, now)


def settled(verdicts: Iterable[Judged], repeated: int, times: Iterable[Times], version: int, began: float) -> None:
    """The coordinator has committed a micro-batch.

    Args:
        repeated: events that had been settled before.
        times: of those of its episodes that are in a snapshot.
        version: that snapshot's.
    """
    now = time.time()
    metrics.BATCH_SECONDS.observe(now - began)
    metrics.SETTLED.inc(repeated, result="repeated")
    for verdict in verdicts:
        metrics.SETTLED.inc(result="quarantined" if verdict.stage else "accepted")
        if verdict.stage:
            metrics.QUARANTINED.inc(stage=verdict.stage)
    for one in times:
        if one.snapshot_at is not None:
            metrics.EPISODE_STAGE.observe(one.snapshot_at - one.committed_at, stage="snapshot")
            tracing.span("snapshot", one.trace_id, began, now, version=version)


def loaded(reader: str, times: Iterable[Times], now: float) -> None:
    """A reader has handed episodes over for the first time; `now` by the catalog's clock."""
    for one in times:
        metrics.EPISODE_TO_LEARNER.observe(now - one.produced_at)
        if one.snapshot_at is not None:
            metrics.EPISODE_STAGE.observe(now - one.snapshot_at, stage="load")
            tracing.span("load", one.trace_id, one.snapshot_at, now, reader=reader)


def sampled(held_since: Mapping[str, float]) -> None:
    """The learner has drawn from episodes, by id, for the first time since it holds them."""
    now = time.time()
    for episode_id, since in held_since.items():
        metrics.EPISODE_STAGE.observe(now - since, stage="sample")
        tracing.span("first_sample", tracing.traceparent(episode_id), since, now)


def _word(error: LwdError) -> str:
    if isinstance(error, ConflictError):
        return "conflict"
    if isinstance(error, CorruptDataError):
        return "corrupt"
    return "unavailable" if isinstance(error, UnavailableError | StorageFullError) else "refused"
