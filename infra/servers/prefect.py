"""Prefect's server, with its tables in PostgreSQL: SQLite locks when several flows report at once."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from infra.errors import ConfigError
from infra.servers.postgres import Postgres
from infra.servers.server import Server
from infra.servers.toolchain import HOST, http_status


class Prefect(Server):
    """The orchestrator's server; unauthenticated, so on loopback alone."""

    name, wanted = "prefect", metadata.version("prefect")
    start_timeout_s = 180.0

    def __init__(self, programs: Path, data: Path, database: Postgres, port: int | None = None) -> None:
        super().__init__(programs, data, port)
        self._database = database

    @property
    def prepared(self) -> bool:
        return True

    def obtain(self) -> None:
        """It came with this package."""

    def initialise(self) -> None:
        if not self._database.ready():
            raise ConfigError(
                "Prefect's server keeps its tables in PostgreSQL, which does not run",
                "start both: `lwd servers up --only postgres,prefect`",
            )

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        env = {
            "PREFECT_HOME": str(self.data / "home"),
            "PREFECT_API_DATABASE_CONNECTION_URL": self._database.url("prefect", "asyncpg"),
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "DO_NOT_TRACK": "1",
            "PREFECT_API_URL": "",
        }
        return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(self.port)], env

    @property
    def api_url(self) -> str:
        return f"http://{HOST}:{self.port}/api"

    def ready(self) -> bool:
        return self.pid is not None and http_status(f"{self.api_url}/health") == 200
