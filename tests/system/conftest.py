"""Real servers for the system tests: Kafka, Garage and PostgreSQL, started once, with data of their own.

A server that cannot be had on this machine skips its tests by name. Each test gets a database, a bucket and a topic of
its own, in a home in the fleet profile.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))  # `invariants`

from infra.errors import LwdError
from infra.events.broker import create_topic
from infra.servers import Servers, write_settings


@pytest.hookimpl(tryfirst=True)  # before markers choose
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything here is a system test, and may take its time."""
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.system)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """The three servers, serving."""
    folder = Path(tempfile.mkdtemp(prefix="lwd-servers-"))
    folder.chmod(0o755)  # PostgreSQL runs as another user where the tests run as root
    running = Servers(folder)
    try:
        for server in running.all(("postgres", "garage", "kafka")):
            try:
                if not server.prepared:  # building it here would run into the tests' time-outs
                    pytest.skip(f"{server.name} is not prepared: `make servers` gets it")
                server.start()
            except LwdError as error:
                pytest.skip(f"{server.name} cannot be had here: {error.problem}")
        yield running
    finally:
        for server in running.all():
            server.kill()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture
def fleet_home(tmp_path: Path, servers: Servers) -> Iterator[Path]:
    """A home in the fleet profile: `load_settings(home=fleet_home)` names its database, bucket and topic."""
    for server in servers.all(("postgres", "garage", "kafka")):
        server.start()  # a test before this one may have left it dead
    name = secrets.token_hex(4)
    servers.postgres.create_database(f"lwd_{name}")
    servers.garage.create_bucket(f"lwd-{name}")
    create_topic(servers.kafka.bootstrap, f"lwd.{name}", 4)
    own = {
        "catalog": servers.postgres.url(f"lwd_{name}"),
        "s3_bucket": f"lwd-{name}",
        "kafka_topic": f"lwd.{name}",
        "poll_s": 0.05,
    }
    home = tmp_path / "home"
    write_settings(home, {**servers.settings(), **own})
    yield home
    with contextlib.suppress(psycopg.Error):  # many databases make recovery from the next kill slow
        servers.postgres.drop_database(f"lwd_{name}")
