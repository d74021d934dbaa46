"""Prefect's server, with its tables in PostgreSQL: SQLite locks when several flows report at once.

Who may ask it may have commands run by its workers. Each server that LWD starts is on loopback, has a credential that
its folder keeps, and names its own pages as the only origins; a web page has neither the one nor the other.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path

from infra.errors import ConfigError
from infra.files import write_durably
from infra.servers.postgres import Postgres
from infra.servers.server import Server
from infra.servers.toolchain import HOST, http_status

CREDENTIAL = "credential"  # in the server's folder: what PREFECT_API_AUTH_STRING must be


def credential(folder: Path) -> str:
    """`user:password` of the server in this folder, made at the first use, for its owner's eyes only."""
    path = folder / CREDENTIAL
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, f"lwd:{secrets.token_urlsafe(32)}".encode(), mode=0o600)
    return path.read_text().strip()


def server_command(port: int) -> list[str]:
    """Start a server on loopback."""
    return [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)]


def server_environment(folder: Path, port: int) -> dict[str, str]:
    """Variables of a server: its credential, its own origins, no telemetry, and no other server to report to."""
    return {
        "PREFECT_SERVER_API_AUTH_STRING": credential(folder),
        "PREFECT_API_AUTH_STRING": credential(folder),  # its own services ask it, too
        "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": f"http://{HOST}:{port},http://localhost:{port}",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "DO_NOT_TRACK": "1",
        "PREFECT_API_URL": "",
    }


class Prefect(Server):
    """The orchestrator's server."""

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
            **server_environment(self.folder(), self.port),
        }
        return server_command(self.port), env

    @property
    def api_url(self) -> str:
        return f"http://{HOST}:{self.port}/api"

    def ready(self) -> bool:
        return self.pid is not None and http_status(f"{self.api_url}/health") == 200
