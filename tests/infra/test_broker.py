"""Connecting to a broker: what is refused before anything is sent, and a broker that is not there."""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from invariants import in_process
from kafka import KafkaConsumer, KafkaProducer

from infra.errors import ConfigError, UnavailableError
from infra.events import broker
from infra.events.relay import main


@pytest.fixture
def nobody() -> Iterator[str]:
    """An address at which nobody listens."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield f"127.0.0.1:{taken.getsockname()[1]}"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compresion_type": "gzip"}, "no option 'compresion_type'"),
        ({"acks": 1}, "'acks' is not to be changed"),
        ({"bootstrap_servers": "elsewhere:1"}, "'bootstrap_servers' is not to be changed"),
    ],
)
def test_options_that_cannot_be_are_named(nobody: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        broker.connect(KafkaProducer, nobody, options, acks="all")


def test_a_broker_that_is_not_there_is_named_once_and_leaves_no_thread(
    nobody: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Each kind of client is given only the options that it knows."""
    broker.answered()
    options = {"bootstrap_timeout_ms": 200, "sasl_plain_password": "hunter2", "linger_ms": 1, "fetch_min_bytes": 1}
    threads = threading.active_count()
    for kind in (KafkaConsumer, KafkaProducer):
        with pytest.raises(UnavailableError, match=rf"{nobody} does not answer[\s\S]*kafka_bootstrap"):
            broker.connect(kind, nobody, options)
    admin = broker.Admin(nobody, options)
    for ask in (lambda: admin.describe("t"), lambda: admin.create("t", 1)):
        with pytest.raises(UnavailableError, match=nobody):
            ask()
    admin.close()
    with pytest.raises(UnavailableError, match=nobody):
        broker.create_topic(nobody, "t", 1, options)
    assert threading.active_count() == threads
    assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
    assert "hunter2" not in caplog.text


def test_a_relay_where_there_is_nothing_to_relay_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert in_process(main, ["--home", str(tmp_path / "local")]) == ConfigError.exit_code
    assert "nothing to relay" in capfd.readouterr().err
