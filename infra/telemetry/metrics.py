"""Every metric of every process, in one place; and `serve`, which shows a process's own to Prometheus.

    metrics.serve(settings, "coordinator")        # in main(); nothing happens unless `metrics_port` is set
    metrics.QUARANTINED.inc(stage="decode")       # anywhere; free while metrics are off

Labels are bounded: `robot` is an enrolled robot, `part` a process of the online stage; `stage`, `kind`, `result`,
`operation` and `route` are words of this code. An episode's id is never a label: that is what traces are for
(`infra.telemetry.tracing`).
`docs/observability.md` explains each metric; `python -m infra.telemetry.metrics` prints its table.
"""

from __future__ import annotations

import atexit
import shutil
from pathlib import Path

from infra.settings import Settings
from infra.telemetry.exposition import Endpoint, announce
from infra.telemetry.instruments import DEFINED, SIZE_BYTES, Counter, Gauge, Histogram, enable, enabled, render

__all__ = ["DEFINED", "Endpoint", "announce", "enable", "enabled", "render", "serve"]

# --- an episode's way, measured where each stage ends -----------------------------------------------------------------

EPISODE_STAGE = Histogram(
    "lwd_episode_stage_seconds",
    "Time that an episode took from the stage before: commit (since the robot closed it), relay (committed to"
    " acknowledged by the broker), snapshot (since its commit), load (snapshot to learner), sample (load to first"
    " batch).",
    by="any",
    labels=("stage",),
)
EPISODE_TO_LEARNER = Histogram(
    "lwd_episode_to_learner_seconds",
    "From the moment that the robot closed the episode, by its clock, until the learner held it.",
    by="learner",
)

# --- objects: every process that talks to the store -------------------------------------------------------------------

OBJECT_SECONDS = Histogram(
    "lwd_object_operation_seconds",
    "Duration of an operation on the object store, retries included.",
    by="any",
    labels=("operation",),
)
OBJECT_BYTES = Counter(
    "lwd_object_bytes_total", "Bytes written to (put) and read from (get) the object store.", by="any",
    labels=("operation",),
)  # fmt: skip
OBJECT_ERRORS = Counter(
    "lwd_object_errors_total",
    "Operations on the object store that failed; kind: unavailable, full, refused, corrupt.",
    by="any",
    labels=("operation", "kind"),
)

# --- supervisor of the online stage -----------------------------------------------------------------------------------

PART_ISOLATED = Gauge(
    "lwd_part_isolated",
    "1 while the process `part` keeps dying without progress and is started again after minutes, else 0.",
    by="supervisor",
    labels=("part",),
)
PART_RESTARTS = Counter(
    "lwd_part_restarts_total", "Times that the process `part` was started again.", by="supervisor", labels=("part",)
)

# --- ingest service ---------------------------------------------------------------------------------------------------

HTTP_REQUESTS = Counter(
    "lwd_http_requests_total",
    "Requests answered by the ingest service; status: of HTTP.",
    by="service",
    labels=("route", "status"),
)
HTTP_SECONDS = Histogram(
    "lwd_http_request_seconds", "Duration of a request to the ingest service.", by="service", labels=("route",)
)
INGESTED = Counter(
    "lwd_ingest_episodes_total",
    "Episodes handed in; result: committed, known, conflict, corrupt, refused, unavailable.",
    by="service",
    labels=("robot", "result"),
)
INGESTED_BYTES = Counter("lwd_ingest_bytes_total", "Bytes of committed episodes.", by="service", labels=("robot",))
INGEST_EPISODE_BYTES = Histogram(
    "lwd_ingest_episode_bytes", "Size of a committed episode's object.", by="service", buckets=SIZE_BYTES
)
THROTTLED = Counter(
    "lwd_ingest_throttled_total",
    "Requests sent away to come back later; kind: backpressure (of the whole service), quota (of the robot),"
    " incoming (it has uploaded too much that it has not committed).",
    by="service",
    labels=("robot", "kind"),
)
CONNECTIONS = Gauge(
    "lwd_connections", "Connections that the service holds; kind: robot (has shown a valid token), stranger.",
    by="service", labels=("kind",),
)  # fmt: skip
CONNECTIONS_ENDED = Counter(
    "lwd_connections_ended_total",
    "Connections that the service ended; kind: head, body, unread, answer, idle, linger (a deadline), address, full,"
    " robot, descriptors (no room).",
    by="service",
    labels=("kind",),
)
DESCRIPTORS_SHORT = Gauge(
    "lwd_descriptors_short", "1 while the service has run out of file descriptors, else 0.", by="service"
)
TOKENS_REFUSED = Counter(
    "lwd_tokens_refused_total",
    "Requests without a valid token; kind: none, unknown, ended (expired or revoked), throttled.",
    by="service",
    labels=("kind",),
)
CERTIFICATE_EXPIRES = Gauge(
    "lwd_certificate_expires_timestamp_seconds", "When the ingest service's TLS certificate ends.", by="service"
)

# --- relay ------------------------------------------------------------------------------------------------------------

RELAYED = Counter("lwd_relay_events_total", "Outbox rows that the broker acknowledged.", by="relay")
RELAY_FAILURES = Counter("lwd_relay_failures_total", "Batches that the broker or the catalog did not take.", by="relay")
RELAY_SECONDS = Histogram(
    "lwd_relay_batch_seconds", "From reading a batch of the outbox to marking it sent.", by="relay"
)

# --- coordinator ------------------------------------------------------------------------------------------------------

SETTLED = Counter(
    "lwd_coordinator_episodes_total",
    "Episodes settled; result: accepted, quarantined, repeated (settled before).",
    by="coordinator",
    labels=("result",),
)
QUARANTINED = Counter(
    "lwd_coordinator_quarantined_total",
    "Episodes that the coordinator refused, by the stage of the check that did.",
    by="coordinator",
    labels=("stage",),
)
BATCH_SECONDS = Histogram(
    "lwd_coordinator_batch_seconds", "One micro-batch: read, checked, committed.", by="coordinator"
)
EXAMINE_SECONDS = Histogram(
    "lwd_coordinator_examine_seconds", "One episode: fetched, decoded and checked against the contract.",
    by="coordinator",
)  # fmt: skip
COORDINATOR_RETRIES = Counter(
    "lwd_coordinator_retries_total", "Micro-batches given up because a server was away; all are tried again.",
    by="coordinator",
)  # fmt: skip
LEASE_HELD = Gauge("lwd_coordinator_lease_held", "1 while this coordinator holds the lease, else 0.", by="coordinator")
CONSUMER_LAG = Gauge(
    "lwd_consumer_lag_events", "Events in the log that the coordinator has not settled.", by="coordinator"
)

# --- of the catalog: shown by the coordinator that holds the lease (catalog_metrics) ----------------------------------

UNACCOUNTED = Gauge(
    "lwd_unaccounted_episodes", "Committed episodes in no snapshot and not in quarantine.", by="coordinator"
)
UNACCOUNTED_OLDEST = Gauge(
    "lwd_unaccounted_oldest_seconds", "Age of the oldest unaccounted episode since its announcement; 0 with none.",
    by="coordinator",
)  # fmt: skip
OUTBOX_UNSENT = Gauge(
    "lwd_outbox_unsent_events", "Outbox rows that the relay has not sent, counted up to 100000; fleet profile only.",
    by="coordinator",
)  # fmt: skip
OUTBOX_OLDEST = Gauge(
    "lwd_outbox_oldest_unsent_seconds", "Age of the oldest outbox row not sent; 0 with none; fleet profile only.",
    by="coordinator",
)  # fmt: skip
QUARANTINE = Gauge(
    "lwd_quarantine_episodes", "Episodes in quarantine, by the stage that put them there.", by="coordinator",
    labels=("stage",),
)  # fmt: skip
DEAD_LETTERS = Gauge("lwd_dead_letters", "Records of the log that are no events, kept with a reason.", by="coordinator")
SNAPSHOT_VERSION = Gauge("lwd_snapshot_version", "The current snapshot's version.", by="coordinator")
SNAPSHOT_EPISODES = Gauge("lwd_snapshot_episodes", "Members of the current snapshot.", by="coordinator")
SNAPSHOT_CREATED = Gauge(
    "lwd_snapshot_created_timestamp_seconds", "When the current snapshot was made.", by="coordinator"
)
ROBOT_SEEN = Gauge(
    "lwd_robot_last_seen_timestamp_seconds",
    "Last heartbeat of each robot that has not said goodbye and was seen within a day.",
    by="coordinator",
    labels=("robot", "cohort"),
)
ROBOT_EPISODES = Gauge("lwd_robot_episodes", "Episodes that the robot says it has closed.", by="coordinator",
                       labels=("robot",))  # fmt: skip
ROBOT_POLICY = Gauge(
    "lwd_robot_active_policy_version", "The policy that the robot runs.", by="coordinator", labels=("robot",)
)
ROBOT_REFUSES = Gauge(
    "lwd_robot_policy_refused", "1 while the robot refuses the policy announced to it, else 0.", by="coordinator",
    labels=("robot",),
)  # fmt: skip
ROBOT_SAFETY = Gauge(
    "lwd_robot_safety_events", "Control steps that the robot's shield altered in this life of it.", by="coordinator",
    labels=("robot", "kind"),
)  # fmt: skip
ROBOT_HELP = Gauge(
    "lwd_robot_asks_for_help", "1 while the robot says that a person should look at it, else 0.", by="coordinator",
    labels=("robot",),
)  # fmt: skip
ROBOT_HOLD = Gauge(
    "lwd_robot_hold", "1 while the robot may run no policy that it has and begins no episode, else 0.",
    by="coordinator", labels=("robot",),
)  # fmt: skip
ROBOT_SPOOL = Gauge("lwd_robot_spool_bytes", "What the robot's spool holds.", by="coordinator", labels=("robot",))
ROBOT_SPOOL_LIMIT = Gauge(
    "lwd_robot_spool_limit_bytes", "What the robot's spool may hold.", by="coordinator", labels=("robot",)
)
ROBOT_PENDING = Gauge(
    "lwd_robot_spool_episodes", "Closed episodes in the robot's spool that no snapshot holds yet.", by="coordinator",
    labels=("robot",),
)  # fmt: skip
TOKEN_EXPIRES = Gauge(
    "lwd_robot_token_expires_timestamp_seconds", "When the robot's last valid token ends.", by="coordinator",
    labels=("robot",),
)  # fmt: skip
POLICY_VERSION = Gauge(
    "lwd_policy_version", "Version of a policy by role; kind: newest, champion, canary, previous.", by="coordinator",
    labels=("kind",),
)  # fmt: skip
POLICY_CREATED = Gauge(
    "lwd_policy_created_timestamp_seconds", "When the newest policy was published.", by="coordinator"
)
POLICY_PERMISSION = Gauge(
    "lwd_policy_permission_left_ratio",
    "Part of its time that a cohort's permission has left; below 0 it has ended; kind: current, champion.",
    by="coordinator", labels=("cohort", "kind"),
)  # fmt: skip
POLICY_REFUSALS = Gauge(
    "lwd_policy_refusals", "Robots that refuse a policy that cohorts are told to run, and were not overruled.",
    by="coordinator",
)  # fmt: skip
POLICY_DECISIONS = Gauge(
    "lwd_policy_decisions",
    "Decisions in the audit; kind: canary, safe, withdraw, refuse, promote, rollback, overrule.",
    by="coordinator", labels=("kind",),
)  # fmt: skip
PUBLISH_TO_STAGED = Histogram(
    "lwd_policy_publish_to_staged_seconds", "From a policy's announcement until a robot had it verified on its disk.",
    by="coordinator",
)  # fmt: skip
PUBLISH_TO_ACTIVE = Histogram(
    "lwd_policy_publish_to_active_seconds", "From a policy's announcement until a robot ran it.", by="coordinator"
)
COLLECT_SECONDS = Histogram(
    "lwd_catalog_metrics_seconds", "Duration of one look at the catalog for these metrics.", by="coordinator"
)

# --- canary watcher ---------------------------------------------------------------------------------------------------

CANARY_LOOKS = Counter(
    "lwd_canary_looks_total",
    "Looks at the candidate on trial; result: continue, harm, safe, stop.",
    by="canary",
    labels=("result",),
)
CANARY_EPISODES = Gauge("lwd_canary_episodes", "Episodes that the candidate on trial has run.", by="canary")
CANARY_ROBOTS = Gauge("lwd_canary_robots", "Robots of the canary cohort, while something is on trial.", by="canary")

# --- reconciler and garbage collection --------------------------------------------------------------------------------

RECONCILED = Counter(
    "lwd_reconciled_total",
    "What the reconciler mended; kind: announced_again, objects_lost, incoming_deleted, unfinished_deleted.",
    by="reconciler",
    labels=("kind",),
)
ORPHANS = Gauge(
    "lwd_orphan_objects", "Objects of episodes that the catalog has no row of, at the last sweep.", by="reconciler"
)
RECONCILE_FINISHED = Gauge(
    "lwd_reconcile_finished_timestamp_seconds", "When the reconciler last came to its end.", by="reconciler"
)
RECONCILE_SECONDS = Histogram("lwd_reconcile_seconds", "Duration of one reconciliation.", by="reconciler")

# --- prefetcher and reader --------------------------------------------------------------------------------------------

PREFETCHED = Counter("lwd_prefetch_objects_total", "Objects brought to the reader's disk.", by="prefetcher")
PREFETCHED_BYTES = Counter("lwd_prefetch_bytes_total", "Bytes brought to the reader's disk.", by="prefetcher")
PREFETCH_SECONDS = Histogram(
    "lwd_prefetch_object_seconds", "One object from the store to the reader's disk, retries included.", by="prefetcher"
)
PREFETCH_RETRIES = Counter("lwd_prefetch_retries_total", "Fetches that failed or brought wrong bytes.", by="prefetcher")
WITHDRAWN = Counter(
    "lwd_prefetch_withdrawn_total", "Episodes withdrawn by a new snapshot, because no try could read them.",
    by="prefetcher",
)  # fmt: skip
CACHE_BYTES = Gauge("lwd_cache_used_bytes", "What the reader's cache holds.", by="prefetcher")
CACHE_LIMIT = Gauge("lwd_cache_limit_bytes", "What the reader's cache may hold.", by="prefetcher")
READER_VERSION = Gauge("lwd_reader_version", "Snapshot that the reader holds whole.", by="learner", labels=("reader",))
READER_EPISODES = Counter("lwd_reader_episodes_total", "Episodes handed to the learner.", by="learner")
PREFETCHER_RESTARTS = Counter("lwd_reader_prefetcher_restarts_total", "Prefetchers started in place of one that ended.",
                              by="learner")  # fmt: skip

# --- learner ----------------------------------------------------------------------------------------------------------

UPDATES = Counter("lwd_learner_updates_total", "Updates of the agent since this process started.", by="learner")
UPDATE_SECONDS = Histogram("lwd_learner_update_seconds", "Duration of one update.", by="learner")
UPDATES_DONE = Gauge("lwd_learner_updates", "Updates of the online stage done, over all lives of the learner.",
                     by="learner")  # fmt: skip
UPDATES_ALLOWED = Gauge("lwd_learner_updates_allowed", "Updates that the episodes at hand allow.", by="learner")
RANK_STALENESS = Gauge(
    "lwd_learner_rank_staleness", "Versions between what the fastest rank has read and what all ranks hold.",
    by="learner",
)  # fmt: skip
REPLAY_EPISODES = Gauge("lwd_learner_replay_episodes", "Online episodes in the learner's replay.", by="learner")
LEARNER_REFUSED = Counter(
    "lwd_learner_refused_total", "Episodes that the learner could not take and withdrew.", by="learner"
)
LEARNER_FALLS = Counter(
    "lwd_learner_falls_total", "Returns to the last good checkpoint after NaN or divergence.", by="learner"
)
TRAINING = Gauge(
    "lwd_learner_training", "The learner's own training metrics, the latest; kind: their name, for example a loss.",
    by="learner", labels=("kind",),
)  # fmt: skip
PUBLISH_SECONDS = Histogram(
    "lwd_learner_publish_seconds", "Exporting, signing, storing and announcing a policy.", by="learner"
)

# --- the machine: read at each scrape, by every process ---------------------------------------------------------------

DISK_FREE = Gauge("lwd_disk_free_bytes", "Free space on the disk of the deployment's home.", by="any")
DISK_SIZE = Gauge("lwd_disk_size_bytes", "Size of the disk of the deployment's home.", by="any")


def serve(settings: Settings, process: str) -> Endpoint | None:
    """Show this process's metrics on loopback, at the first free port from `settings.metrics_port` on.

    Args:
        process: its name, unique in the deployment: `coordinator`, `robot-r0`.

    Returns:
        The endpoint, withdrawn at exit by itself; None, and nothing was done, while `metrics_port` is not set.

    Raises:
        UnavailableError: no port is free.
    """
    if settings.metrics_port is None:
        return None
    enable(process)
    _show_disk(settings.home)
    endpoint = Endpoint(settings.home, process, settings.metrics_port)
    atexit.register(endpoint.withdraw)
    return endpoint


def _show_disk(home: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    DISK_FREE.follow(lambda: float(shutil.disk_usage(home).free))
    DISK_SIZE.follow(lambda: float(shutil.disk_usage(home).total))


def table() -> str:
    """The rows of the documentation's table, Markdown."""
    return "\n".join(
        f"| `{m.name}` | {m.kind} | {m.by} | {', '.join(f'`{label}`' for label in m.labels) or '–'} | {m.help} |"
        for m in DEFINED.values()
    )


if __name__ == "__main__":
    print(table())
