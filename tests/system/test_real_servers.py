"""The real servers: each keeps what it acknowledged when it is killed, and the command line starts and stops them."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import sqlalchemy as sa
import yaml
from kafka import KafkaConsumer, KafkaProducer
from minio import Minio

from infra.errors import ConfigError, UnavailableError
from infra.servers import Servers
from infra.servers.garage import Garage
from infra.servers.kafka import TOPIC
from infra.servers.toolchain import HOST, http_status
from infra.settings import Settings, load_settings


@pytest.fixture
def settings(fleet_home: Path) -> Settings:
    return load_settings(home=fleet_home)


def killed_and_started(server) -> None:
    before = server.pid, server.port
    server.kill()
    assert server.crashed and not server.ready()
    server.start()
    assert server.ready() and not server.crashed
    assert server.pid != before[0] and server.port == before[1]


def store(settings: Settings) -> Minio:
    address, secret = settings.s3_endpoint.removeprefix("http://"), settings.s3_secret_key.get_secret_value()
    return Minio(address, access_key=settings.s3_access_key, secret_key=secret, region=settings.s3_region, secure=False)


def test_a_killed_postgres_keeps_its_rows(servers: Servers, settings: Settings) -> None:
    engine = sa.create_engine(settings.catalog_url)
    with engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE kept (n INTEGER)"))
    for n in range(2):
        with engine.begin() as connection:
            connection.execute(sa.text("INSERT INTO kept VALUES (:n)"), {"n": n})
        with engine.connect() as open_transaction:
            open_transaction.execute(sa.text("INSERT INTO kept VALUES (-1)"))
            killed_and_started(servers.postgres)
            open_transaction.invalidate()
        engine.dispose()
    with engine.begin() as connection:
        assert connection.execute(sa.text("SELECT n FROM kept ORDER BY n")).scalars().all() == [0, 1]
    engine.dispose()


def test_a_killed_garage_keeps_its_objects(servers: Servers, settings: Settings) -> None:
    objects = {f"kept/{n}": os.urandom(100_000 * 40**n) for n in range(2)}  # in one piece, and above a block's size
    for key, data in objects.items():
        store(settings).put_object(settings.s3_bucket, key, io.BytesIO(data), len(data))
        killed_and_started(servers.garage)
    for key, data in objects.items():
        assert store(settings).get_object(settings.s3_bucket, key).read() == data


def test_garage_without_s3_is_not_taken_for_a_store(
    servers: Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It goes on, and calls itself healthy, when another has taken its S3 port since that was seen to be free."""
    monkeypatch.setattr(Garage, "start_timeout_s", 20.0)
    monkeypatch.setattr(Garage, "_claim_ports", lambda self: None)
    garage = Garage(servers.garage.programs, tmp_path / "garage")
    try:
        with (
            socket.create_server((HOST, garage.port)),
            pytest.raises(UnavailableError, match="does not serve after 20 s:\n.*S3 .*Address already in use"),
        ):
            garage.start()
        assert http_status(f"http://{HOST}:{garage.named_port('admin_port')}/health") == 200
    finally:
        garage.kill()


def test_a_killed_kafka_keeps_its_records(servers: Servers, settings: Settings) -> None:
    producer = KafkaProducer(bootstrap_servers=settings.kafka_bootstrap, acks="all")
    for n in range(100):
        producer.send(settings.kafka_topic, b"%d" % n, partition=0).get(30)
    producer.close()
    killed_and_started(servers.kafka)
    consumer = KafkaConsumer(
        settings.kafka_topic,
        bootstrap_servers=settings.kafka_bootstrap,
        auto_offset_reset="earliest",
        consumer_timeout_ms=10_000,
    )
    assert [next(consumer).value for _ in range(100)] == [b"%d" % n for n in range(100)]
    consumer.close()


def test_a_stopped_server_is_not_taken_for_a_crashed_one(servers: Servers, settings: Settings) -> None:
    for server in servers.all(("postgres", "garage", "kafka")):
        server.stop()
        assert server.pid is None and not server.crashed
        server.start()
        assert server.ready()


@pytest.mark.slow
def test_a_wiped_kafka_begins_again_with_the_topic(servers: Servers, settings: Settings) -> None:
    with pytest.raises(ConfigError, match="Kafka runs"):
        servers.kafka.wipe()
    servers.kafka.kill()
    servers.kafka.wipe()
    servers.kafka.start()
    consumer = KafkaConsumer(bootstrap_servers=settings.kafka_bootstrap)
    assert consumer.topics() - {"__consumer_offsets"} == {TOPIC}
    assert len(consumer.partitions_for_topic(TOPIC)) == 4
    consumer.close()


def test_each_deployment_has_its_own(servers: Servers, tmp_path: Path) -> None:
    other = Garage(servers.garage.programs, tmp_path / "garage", objects=tmp_path / "other disk")
    try:
        other.start()
        assert other.port != servers.garage.port and other.secret_key != servers.garage.secret_key
        assert (tmp_path / "other disk").is_dir()
        servers.garage.kill()
        assert other.ready()
        other.stop()
        servers.garage.start()
        assert servers.garage.ready() and other.pid is None
    finally:
        other.kill()


def test_servers_listen_on_loopback_alone_and_ask_for_passwords(servers: Servers, settings: Settings) -> None:
    right = sa.make_url(settings.catalog_url)
    for wrong in (right.set(password="guessed"), right.set(username="postgres")):
        with pytest.raises(sa.exc.OperationalError, match="password"):
            sa.create_engine(wrong).connect()
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(f"{settings.s3_endpoint}/{settings.s3_bucket}", timeout=5)
    for server in servers.all(("postgres", "garage", "kafka")):
        listening = {link.laddr.ip for link in psutil.Process(server.pid).net_connections() if link.status == "LISTEN"}
        assert listening and all(address.removeprefix("::ffff:") == "127.0.0.1" for address in listening), listening


@pytest.mark.slow
def test_prefect_serves_from_postgres(servers: Servers, settings: Settings) -> None:
    servers.postgres.stop()
    with pytest.raises(ConfigError, match="PostgreSQL, which does not run"):
        servers.prefect.start()
    servers.postgres.start()
    try:
        servers.prefect.start()
        killed_and_started(servers.prefect)
        engine = sa.create_engine(servers.postgres.url("prefect"))
        assert sa.inspect(engine).has_table("flow_run")
        engine.dispose()
    finally:
        servers.prefect.stop()
    assert servers.prefect.pid is None


def test_the_command_line_starts_shows_and_stops_them(tmp_path: Path) -> None:
    def lwd(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "flows.cli", "servers", *arguments, "--data", str(tmp_path / "data")]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})

    def shown() -> tuple[int, str]:
        done = lwd("status")
        return done.returncode, next(line for line in done.stdout.splitlines() if "garage" in line)

    if not Servers(tmp_path / "data").garage.prepared:
        pytest.skip("garage is not prepared: `make servers` gets it")
    up = lwd("up", "--only", "garage", "--home", str(tmp_path / "home"))
    try:
        assert up.returncode == 0, up.stderr
        garage = Servers(tmp_path / "data").garage
        written = yaml.safe_load((tmp_path / "home" / "settings.yaml").read_text())
        assert written["s3_endpoint"] == garage.endpoint and garage.ready(), "it outlives the command"
        code, line = shown()
        assert code == 0 and "serves" in line and str(garage.pid) in line and str(garage.port) in line
        garage.kill()
        code, line = shown()
        assert code == 1 and "crashed" in line
        garage.start()
        taken = lwd("up", "--only", "kafka", "--port", f"kafka={garage.port}", "--home", str(tmp_path / "home"))
        assert taken.returncode == 2 and f"kafka cannot have port {garage.port}" in taken.stderr
    finally:
        down = lwd("down", "--only", "garage")
    assert down.returncode == 0
    assert garage.pid is None and not garage.crashed
