"""What consumer and relay share of Kafka: options, topics, errors that name the broker and the fix, quiet logs."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from kafka import KafkaAdminClient, KafkaConsumer, KafkaProducer
from kafka import errors as kafka_errors
from kafka.admin import OffsetSpec
from kafka.net.compat import KafkaNetClient
from kafka.structs import TopicPartition

from infra.errors import ConfigError, LwdError, UnavailableError

log = logging.getLogger(__name__)
ANSWER_MS = 5000  # how long a broker may take to answer before it counts as away
_KINDS = (KafkaConsumer, KafkaProducer, KafkaAdminClient)
_BOUNDED = {
    "client_id": "lwd",
    "bootstrap_timeout_ms": ANSWER_MS,
    "request_timeout_ms": ANSWER_MS,
    "reconnect_backoff_max_ms": 1000,
    "metadata_max_age_ms": 30_000,
    "metrics_enabled": False,
}
_REFUSALS = (
    kafka_errors.AuthorizationError,
    kafka_errors.SaslAuthenticationFailedError,
    kafka_errors.UnsupportedSaslMechanismError,
    kafka_errors.KafkaConfigurationError,
    kafka_errors.InvalidTopicError,
    kafka_errors.InvalidReplicationFactorError,
    kafka_errors.InvalidSessionTimeoutError,
    kafka_errors.InvalidPartitionsError,
)


@dataclass(frozen=True)
class Topic:
    """A topic as the broker has it now.

    Attributes:
        identity: of this topic and no other of its name: made again after a loss, it is another.
        partitions: their numbers.
    """

    name: str
    identity: uuid.UUID
    partitions: tuple[int, ...]


class _OncePerOutage(logging.Handler):
    """Passes the first complaint of the client library on, and then no more until the broker has answered again."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.quiet = False

    def emit(self, record: logging.LogRecord) -> None:
        if not self.quiet:
            self.quiet = True
            log.warning("kafka client: %s (more of it is not shown until the broker answers)", record.getMessage())


_complaints = _OncePerOutage()


def hush() -> None:
    """Have the client library, which logs every try to connect, complain once per outage; repeating it is harmless."""
    library = logging.getLogger("kafka")
    library.setLevel(logging.WARNING)
    library.propagate = False
    library.handlers[:] = [_complaints]
    # A group's first member is given its partitions in two rounds, as its metadata comes; the first is no complaint.
    logging.getLogger("kafka.coordinator.assignors").setLevel(logging.ERROR)


def answered() -> None:
    """The broker has answered: its next silence is worth a line again."""
    _complaints.quiet = False


def connect(kind: Any, bootstrap: str, options: Mapping[str, Any], **chosen: Any) -> Any:
    """A client of `kind` (consumer, producer or admin), connected.

    Args:
        bootstrap: `host:port`, comma-separated.
        options: the deployment's, of kafka-python; each kind of client takes those that it knows.
        chosen: what the caller's promises rest on; the deployment cannot change it.

    Raises:
        ConfigError: an option is unknown, or is one that cannot be changed.
        UnavailableError: the broker does not answer.
    """
    hush()
    for name in options:
        if not any(name in known.DEFAULT_CONFIG for known in _KINDS):
            raise ConfigError(f"kafka_options: kafka-python has no option {name!r}", "correct its name or remove it")
        if name in chosen or name == "bootstrap_servers":
            raise ConfigError(f"kafka_options: {name!r} is not to be changed", "remove it; nothing lost rests on it")
    ours = {name: value for name, value in {**_BOUNDED, **options}.items() if name in kind.DEFAULT_CONFIG}
    clients: list[Any] = []

    def client(**configs: Any) -> Any:
        clients.append(KafkaNetClient(**configs))
        return clients[-1]

    try:
        with explained(bootstrap):
            servers = [server.strip() for server in bootstrap.split(",")]
            made = kind(bootstrap_servers=servers, kafka_client=client, **{**ours, **chosen})
    except LwdError:
        for left in clients:  # its thread would try to connect for ever
            with suppress(Exception):
                left.close()
        raise
    answered()
    return made


@contextmanager
def explained(bootstrap: str, topic: str = "") -> Iterator[None]:
    """Turns the client library's errors into ours.

    Raises:
        ConfigError: the broker refuses what was asked: credentials, permissions, no such topic.
        UnavailableError: it does not answer, or not yet.
    """
    try:
        yield
    except kafka_errors.UnknownTopicOrPartitionError as error:
        raise missing(bootstrap, topic) from error
    except _REFUSALS as error:
        raise ConfigError(
            f"the Kafka broker {bootstrap} refuses{f' topic {topic}' if topic else ''}: {error}",
            "correct kafka_options, or what this user may do there",
        ) from error
    except (kafka_errors.KafkaError, OSError, RuntimeError) as error:  # RuntimeError: its I/O loop was closed
        raise UnavailableError(
            f"the Kafka broker {bootstrap} does not answer: {error}", "start it, or correct kafka_bootstrap"
        ) from error


def missing(bootstrap: str, topic: str) -> ConfigError:
    """The error for a topic that is not there."""
    return ConfigError(
        f"the Kafka broker {bootstrap} has no topic {topic!r}",
        f"create it: kafka-topics.sh --bootstrap-server {bootstrap} --create --topic {topic} --partitions 8, "
        "or `lwd servers up` for servers of its own",
    )


class Admin:
    """Questions about topics, from any thread; connects at the first one, and anew after a failure."""

    def __init__(self, bootstrap: str, options: Mapping[str, Any]) -> None:
        self._bootstrap = bootstrap
        self._options = options
        self._client: Any = None
        self._lock = threading.Lock()

    def describe(self, topic: str) -> Topic:
        """The topic; ConfigError if there is none, UnavailableError if the broker does not answer."""
        with self._connected(topic) as client:
            found = client.describe_topics([topic])[0]
            if found["error_code"]:
                raise kafka_errors.for_code(found["error_code"])(topic)
        partitions = tuple(sorted(partition["partition_index"] for partition in found["partitions"]))
        return Topic(topic, uuid.UUID(str(found["topic_id"])), partitions)

    def bounds(self, topic: str, partitions: Iterable[int]) -> dict[int, tuple[int, int]]:
        """Per partition, the offset of its first record and the one that its next record will have."""
        places = [TopicPartition(topic, partition) for partition in partitions]
        if not places:
            return {}
        with self._connected(topic) as client:
            first = client.list_partition_offsets(dict.fromkeys(places, OffsetSpec.EARLIEST), timeout_ms=ANSWER_MS)
            end = client.list_partition_offsets(dict.fromkeys(places, OffsetSpec.LATEST), timeout_ms=ANSWER_MS)
        return {place.partition: (first[place].offset, end[place].offset) for place in places}

    def create(self, topic: str, partitions: int) -> None:
        """Create the topic, with the broker's own number of replicas; nothing happens if there is one."""
        with self._connected(topic) as client, suppress(kafka_errors.TopicAlreadyExistsError):
            client.create_topics({topic: {"num_partitions": partitions, "replication_factor": -1}})
        with self._connected(topic) as client:
            client.wait_for_topics([topic], timeout_ms=2 * ANSWER_MS)

    def close(self) -> None:
        with self._lock:
            self._drop()

    def _drop(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            with suppress(Exception):
                client.close()

    @contextmanager
    def _connected(self, topic: str) -> Iterator[Any]:
        with self._lock:
            if self._client is None:
                self._client = connect(KafkaAdminClient, self._bootstrap, self._options)
            try:
                with explained(self._bootstrap, topic):
                    yield self._client
            except UnavailableError:
                self._drop()
                raise
        answered()


def create_topic(bootstrap: str, topic: str, partitions: int, options: Mapping[str, Any] | None = None) -> None:
    """Create the topic of the log; nothing happens if there is one.

    Args:
        bootstrap: `host:port`, comma-separated.
        partitions: how many consumers can ever share it; one robot's episodes stay in one.
        options: of kafka-python: TLS, SASL, time-outs.

    Raises:
        ConfigError: the broker refuses.
        UnavailableError: the broker does not answer.
    """
    admin = Admin(bootstrap, options or {})
    try:
        admin.create(topic, partitions)
    finally:
        admin.close()
