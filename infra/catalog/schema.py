"""The catalog's tables. Times are seconds since the epoch (double); order is by version or sequence, never by time."""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
    text,
)

metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

# SQLite numbers rows by itself only in a column declared INTEGER; PostgreSQL should have 64 bits.
Sequence64 = BigInteger().with_variant(Integer, "sqlite")

# --- episodes: committed by ingest, announced by the outbox -----------------------------------------------------------

episodes = Table(
    "episodes",
    metadata,
    Column("episode_id", String(32), primary_key=True),
    Column("robot_id", String(64), nullable=False),
    Column("key", String(255), nullable=False, index=True),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("schema_version", Integer, nullable=False),
    Column("trace_id", String(64), nullable=False),
    Column("produced_at", Double, nullable=False),  # the robot's clock, when its spool closed the episode
    Column("committed_at", Double, nullable=False, index=True),  # the catalog's clock
    Column("cohort", String(32)),  # the robot's when it was committed; '' of none, null where that was not known
    Index(None, "robot_id", "committed_at"),
)

outbox = Table(
    "outbox",
    metadata,
    Column("seq", Sequence64, primary_key=True, autoincrement=True),
    Column("episode_id", String(32), nullable=False, index=True),
    Column("robot_id", String(64), nullable=False),
    Column("key", String(255), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("schema_version", Integer, nullable=False),
    Column("trace_id", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
    Column("sent_at", Double),  # set by a relay to a broker; unused while the outbox itself is the log
    Index("ix_outbox_unsent", "seq", postgresql_where=text("sent_at IS NULL"), sqlite_where=text("sent_at IS NULL")),
    sqlite_autoincrement=True,
)

consumer_offsets = Table(
    "consumer_offsets",
    metadata,
    Column("consumer", String(64), primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("position", BigInteger, nullable=False),  # the last offset whose effects are committed
)

dead_letters = Table(  # records of the log that are no events: settled by keeping them
    "dead_letters",
    metadata,
    Column("log", String(255), primary_key=True),
    Column("partition", Integer, primary_key=True),
    Column("position", BigInteger, primary_key=True),
    Column("payload", Text, nullable=False),  # at most 4 KiB
    Column("reason", Text, nullable=False),
    Column("created_at", Double, nullable=False),
)

# --- snapshots: the pointer is the highest version, so it cannot disagree with the rows -------------------------------

snapshots = Table(
    "snapshots",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),
    Column("parent", Integer, nullable=False),  # 0 for the first
    Column("digest", String(64), nullable=False),
    Column("episodes", Integer, nullable=False),
    Column("added", Integer, nullable=False),
    Column("removed", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("writer", String(128), nullable=False),
    Column("created_at", Double, nullable=False),
    CheckConstraint("version = parent + 1", name="gapless"),
)

snapshot_episodes = Table(
    "snapshot_episodes",
    metadata,
    Column("episode_id", String(32), ForeignKey("episodes.episode_id"), primary_key=True),
    Column("added", Integer, nullable=False, index=True),
    Column("removed", Integer, index=True),
    # What the coordinator read in the episode itself, for composition queries.
    Column("task", String(64), nullable=False),
    Column("source", String(16), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("policy_version", Integer),
    Column("steps", Integer, nullable=False),
    Column("interventions", Integer, nullable=False),  # steps with an operator in control
    Column("warnings", JSON, nullable=False),  # [{rule, severity, message}] of severity warn
    Column("safety", JSON),  # {kind: count} of the robot's shield; null where there was no event
    CheckConstraint("removed is null or removed > added", name="order"),
)

quarantine = Table(
    "quarantine",
    metadata,
    Column("id", Sequence64, primary_key=True, autoincrement=True),
    Column("episode_id", String(32), nullable=False),
    Column("sha256", String(64), nullable=False),
    Column("robot_id", String(64), nullable=False),
    Column("key", String(255), nullable=False, index=True),
    # conflict: same id, other digest; schema, decode, identity, contract: refused by the coordinator; store: the object
    # is lost or damaged and is wanted again from the spool; read: a reader gave up on it; revoked: by a steward.
    Column("stage", String(16), nullable=False),
    Column("reasons", JSON, nullable=False),  # [{rule, severity, message}]
    Column("version", Integer),  # the snapshot that removed it, where it had been in one
    Column("created_at", Double, nullable=False),
    UniqueConstraint("episode_id", "sha256"),
)

revocations = Table(
    "revocations",
    metadata,
    Column("id", Sequence64, primary_key=True, autoincrement=True),
    Column("robot_id", String(64), nullable=False, index=True),
    Column("since", Double, nullable=False),
    Column("until", Double, nullable=False),
    Column("reason", Text, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
)

pins = Table(  # versions that somebody still reads: what they hold is not collected
    "pins",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("version", Integer, nullable=False),
    Column("updated_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
)

collections = Table(  # garbage collections: below the highest floor, snapshots may have lost objects
    "collections",
    metadata,
    Column("id", Sequence64, primary_key=True, autoincrement=True),
    Column("floor", Integer, nullable=False),
    Column("objects", Integer, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
)

recoveries = Table(  # what was brought back from the store, and which losses are known since
    "recoveries",
    metadata,
    Column("id", Sequence64, primary_key=True, autoincrement=True),
    Column("episodes", Integer, nullable=False),
    Column("conflicts", Integer, nullable=False),
    Column("left", Integer, nullable=False),  # objects that are no whole episode
    Column("holes", JSON, nullable=False),  # table -> numbers that no row has
    Column("actor", String(64), nullable=False),
    Column("created_at", Double, nullable=False),
)

leases = Table(
    "leases",
    metadata,
    Column("name", String(64), primary_key=True),
    Column("holder", String(128), nullable=False),
    Column("token", BigInteger, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("seconds", Double, nullable=False, server_default="60"),  # how long it lasts without renewal
)

# --- policies ---------------------------------------------------------------------------------------------------------

policies = Table(
    "policies",
    metadata,
    Column("version", Integer, primary_key=True, autoincrement=False),  # gapless: max + 1 inside begin()
    Column("parent", Integer),
    Column("snapshot_version", Integer, nullable=False),  # the data it learned from; 0 before any snapshot
    Column("bundle_key", String(255), nullable=False),  # prefix of the bundle's objects
    Column("manifest_sha256", String(64), nullable=False),
    Column("status", String(16), nullable=False),  # candidate | champion | refused | retired | ...
    Column("proposer", String(64), nullable=False, server_default=""),
    Column("details", JSON),
    Column("created_at", Double, nullable=False),
)

aliases = Table(
    "aliases",
    metadata,
    Column("name", String(32), primary_key=True),  # champion | canary | previous
    Column("version", Integer, ForeignKey("policies.version"), nullable=False),
    Column("updated_at", Double, nullable=False),
)

announcements = Table(
    "announcements",
    metadata,
    Column("seq", Sequence64, primary_key=True, autoincrement=True),
    Column("cohort", String(32), nullable=False),
    Column("version", Integer, ForeignKey("policies.version"), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("manifest_key", String(255), nullable=False),
    Column("authorisation", JSON),  # the signed statement that permits a lower version
    Column("created_at", Double, nullable=False),
    Column("epoch", Integer, nullable=False, server_default="0"),  # of policy_epochs; 0 before any reset
    CheckConstraint("kind in ('publish', 'promote', 'rollback')", name="kind"),
    Index(None, "cohort", "seq"),
    sqlite_autoincrement=True,
)

policy_permissions = Table(  # until when a cohort may run what, renewed in place: two rows a cohort
    "policy_permissions",
    metadata,
    Column("cohort", String(32), primary_key=True),
    Column("role", String(16), primary_key=True),  # current | champion
    Column("number", BigInteger, nullable=False),  # grows over all rows; a robot takes none of a lower one
    Column("epoch", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("manifest_sha256", String(64), nullable=False),
    Column("issued_at", Double, nullable=False),
    Column("valid_until", Double, nullable=False),
    Column("signature", Text, nullable=False),  # empty: withdrawn, shown to no robot
)

policy_epochs = Table(  # resets of the announcements' numbers, each signed
    "policy_epochs",
    metadata,
    Column("epoch", Integer, primary_key=True, autoincrement=False),
    Column("created_at", Double, nullable=False),
    Column("signature", Text, nullable=False),
    Column("actor", String(64), nullable=False),
    Column("reason", Text, nullable=False),
)

policy_refusals = Table(  # policies that a robot could not run: told once by each robot
    "policy_refusals",
    metadata,
    Column("version", Integer, ForeignKey("policies.version"), primary_key=True),
    Column("robot_id", String(64), primary_key=True),
    Column("reason", Text, nullable=False),  # at most 300 characters
    Column("created_at", Double, nullable=False),
    Column("overruled_by", String(64)),  # who said that it does not count
)

promotions = Table(  # append-only: the database refuses updates and deletes
    "promotions",
    metadata,
    Column("id", Sequence64, primary_key=True, autoincrement=True),
    Column("version", Integer, ForeignKey("policies.version"), nullable=False),
    Column("from_version", Integer),
    Column("decision", String(16), nullable=False),  # promote | refuse | rollback | canary | ...
    Column("evidence", JSON, nullable=False),
    Column("proposer", String(64), nullable=False),
    Column("approver", String(64)),
    Column("artifact_sha256", String(64), nullable=False, server_default=""),  # what an approval binds to
    Column("created_at", Double, nullable=False),
    sqlite_autoincrement=True,
)

trials = Table(  # comparisons of a candidate with the champion, in the order in which they began: the stream
    "trials",
    metadata,
    Column("id", Sequence64, primary_key=True, autoincrement=True),
    Column("kind", String(16), nullable=False),  # gate: in evaluation | canary: at work
    Column("candidate", Integer, ForeignKey("policies.version"), nullable=False),
    Column("champion", Integer, ForeignKey("policies.version"), nullable=False),
    Column("reference", Integer, ForeignKey("policies.version"), nullable=False),
    Column("conditions_sha256", String(64), nullable=False),  # of all that a result depends on
    Column("conditions", JSON, nullable=False),
    Column("spec", JSON, nullable=False),  # the gate's thresholds when the trial began
    Column("position", Integer, nullable=False),  # t in the stream, from 1
    Column("level", Double, nullable=False),  # alpha_t
    Column("seed", BigInteger, nullable=False),  # of the start states, drawn when the trial began
    Column("verdict", String(16), nullable=False, server_default=""),  # PASS or FAIL, once given
    Column("created_at", Double, nullable=False),
    UniqueConstraint("kind", "candidate", "champion", "reference", "conditions_sha256"),
    UniqueConstraint("position"),
)

trial_episodes = Table(  # each counts once
    "trial_episodes",
    metadata,
    Column("trial", Sequence64, ForeignKey("trials.id"), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("task", String(64), primary_key=True),
    Column("number", Integer, primary_key=True),  # of the start state
    Column("result", JSON, nullable=False),
)

robot_tokens = Table(  # what a robot shows to the ingest service; the token itself is nowhere
    "robot_tokens",
    metadata,
    Column("token_id", String(16), primary_key=True),
    Column("robot_id", String(64), nullable=False, index=True),
    Column("cohort", String(32), nullable=False),
    Column("sha256", String(64), nullable=False),  # of the secret part
    Column("actor", String(64), nullable=False),  # who enrolled the robot
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("revoked_at", Double),
)

robots = Table(
    "robots",
    metadata,
    Column("robot_id", String(64), primary_key=True),
    Column("cohort", String(32), nullable=False),
    Column("active_version", Integer),
    Column("staged_version", Integer),
    Column("last_seen", Double, nullable=False),
    Column("episodes", Integer, nullable=False, server_default="0"),
    Column("details", JSON),
)

# --- latencies --------------------------------------------------------------------------------------------------------

loads = Table(  # episode-to-learner: episodes.produced_at, committed_at, snapshots.created_at, loads.loaded_at
    "loads",
    metadata,
    Column("reader", String(64), primary_key=True),
    Column("version", Integer, primary_key=True),
    Column("loaded_at", Double, nullable=False),
)

measurements = Table(  # publish-to-active and any other number worth a percentile
    "measurements",
    metadata,
    Column("id", Sequence64, primary_key=True, autoincrement=True),
    Column("name", String(64), nullable=False),
    Column("subject", String(64), nullable=False, server_default=""),  # a robot, an episode, a reader
    Column("version", Integer),
    Column("value", Double, nullable=False),
    Column("at", Double, nullable=False),
    Index(None, "name", "at"),
    Index(None, "subject", "version"),
)
