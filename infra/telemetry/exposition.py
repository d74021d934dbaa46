"""A process's metrics on HTTP, and the file by which Prometheus finds them (its file_sd format)."""

from __future__ import annotations

import errno
import json
import logging
import socket
from pathlib import Path
from typing import Any

from infra.errors import UnavailableError
from infra.files import write_durably
from infra.telemetry.instruments import registry

_PORTS = 200  # how many ports are tried
_log = logging.getLogger(__name__)


class Endpoint:
    """Answers `GET /metrics` on loopback until it is closed. Metrics must be enabled.

    Args:
        home: the deployment; the file lies below its `metrics` folder.
        process: unique name of this process in the deployment.
        first_port: the first of the ports that are tried.

    Raises:
        UnavailableError: no port is free.
    """

    def __init__(self, home: Path, process: str, first_port: int) -> None:
        self._server, self.port = _listen(first_port)
        self._target = f"127.0.0.1:{self.port}"
        self._file = announce(home, process, self._target)
        _log.info("metrics on http://%s/metrics", self._target)

    def withdraw(self) -> None:
        """Let Prometheus forget this process. After a kill the file stays: the target is down, as it should be."""
        _withdraw(self._file, self._target)

    def close(self) -> None:
        """Withdraw, and answer no more."""
        self.withdraw()
        self._server.shutdown()
        self._server.server_close()


def announce(home: Path, process: str, target: str, scheme: str = "http") -> Path:
    """Write `<home>/metrics/<process>.json`, which leads Prometheus to `target` (host:port); returns the file."""
    file = home / "metrics" / f"{process}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    labels = {"process": process, "host": socket.gethostname(), "__scheme__": scheme}
    write_durably(file, json.dumps([{"targets": [target], "labels": labels}]).encode())
    return file


def _withdraw(file: Path, target: str) -> None:
    """Remove the file, unless a successor of the same name has replaced it."""
    try:
        if json.loads(file.read_bytes())[0]["targets"] == [target]:
            file.unlink()
    except (FileNotFoundError, ValueError):
        return


def _listen(first: int) -> tuple[Any, int]:
    import prometheus_client

    for port in range(first, min(first + _PORTS, 65536)):
        try:
            server, _ = prometheus_client.start_http_server(port, "127.0.0.1", registry())
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            continue
        return server, server.server_port
    raise UnavailableError(f"no port from {first} on is free for metrics", "set LWD_METRICS_PORT to another one")
