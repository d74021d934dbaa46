"""Real servers on one machine, without containers: Kafka, Garage (S3), PostgreSQL, and Prefect's server on it.

Programs are prepared once and shared; each server's data lies in a folder of its own, outside the clone. For those who
have servers, none of this is needed: the settings name them by URL.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml

from infra.errors import ConfigError
from infra.files import write_durably
from infra.servers.garage import BUCKET, REGION, Garage
from infra.servers.kafka import TOPIC, Kafka
from infra.servers.postgres import Postgres
from infra.servers.prefect import Prefect
from infra.servers.server import Server
from infra.settings import SETTINGS_FILE, settings_of
from infra.variables import variable

T = TypeVar("T")
NAMES = ("postgres", "garage", "kafka", "prefect")  # in the order in which they are started


def servers_folder() -> Path:
    """Where programs and data are: `LWD_SERVERS_DIR`, or the user's cache folder (for root, one that others can enter:
    PostgreSQL runs as another user)."""
    if named := variable("LWD_SERVERS_DIR"):
        return Path(named).resolve()
    if os.geteuid() == 0:
        return Path("/var/cache/lwd/servers")
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lwd" / "servers"


class Servers:
    """The set of servers of one deployment.

    Args:
        data: folder of their data; `servers_folder()/data` by default.
        programs: folder of the prepared programs.
        ports: by server's name, where not the one that it chose at its first start. Kept from then on.
    """

    def __init__(
        self, data: Path | None = None, programs: Path | None = None, ports: Mapping[str, int] | None = None
    ) -> None:
        programs = programs or servers_folder() / "programs"
        data = (data or servers_folder() / "data").resolve()
        port = _known(ports or {}).get
        self.postgres = Postgres(programs, data / "postgres", port("postgres"))
        self.garage = Garage(programs, data / "garage", port("garage"))
        self.kafka = Kafka(programs, data / "kafka", port("kafka"))
        self.prefect = Prefect(programs, data / "prefect", self.postgres, port("prefect"))

    def all(self, names: Sequence[str] = NAMES) -> list[Server]:
        """The servers of these names, in the order of starting.

        Raises:
            ConfigError: a name is none of `NAMES`.
        """
        wanted = _known(dict.fromkeys(names))
        return [getattr(self, name) for name in NAMES if name in wanted]

    def settings(self, names: Sequence[str] = NAMES) -> dict[str, Any]:
        """What a home's settings file says to use these servers; of those not named it keeps what it says."""
        values: dict[str, Any] = {"profile": "fleet"}
        if "postgres" in names:
            values["catalog"] = self.postgres.url("lwd")
        if "garage" in names:
            values |= {"s3_endpoint": self.garage.endpoint, "s3_region": REGION, "s3_bucket": BUCKET}
            values |= {"s3_access_key": self.garage.access_key, "s3_secret_key": self.garage.secret_key}
        if "kafka" in names:
            values |= {"kafka_bootstrap": self.kafka.bootstrap, "kafka_topic": TOPIC}
        return values


def write_settings(home: Path, values: dict[str, Any]) -> Path:
    """Write a home's settings file, readable by its owner alone; what it said of other things stays.

    Raises:
        ConfigError: there is a file which is no YAML mapping.
    """
    home.mkdir(parents=True, exist_ok=True)
    path, known = home / SETTINGS_FILE, settings_of(home)
    write_durably(path, yaml.safe_dump({**known, **values}, sort_keys=False).encode(), mode=0o600)
    return path


def _known(given: Mapping[str, T]) -> Mapping[str, T]:
    if unknown := set(given) - set(NAMES):
        raise ConfigError(f"there is no server {sorted(unknown)[0]!r}", f"choose of {', '.join(NAMES)}")
    return given
