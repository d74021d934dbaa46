"""One Prefect server for a whole run: started before the heavy work, since its start is slow on busy cores."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import UnavailableError
from infra.servers.toolchain import HOST, free_port, http_status, refusal

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}


@contextmanager
def prefect_server(home: Path, *, port: int | None = None, start_timeout_s: float = 180.0) -> Iterator[str]:
    """Run a Prefect server on loopback for the length of the block, and point this process at it.

    Where `PREFECT_API_URL` is set already, that server is used and none is started.

    Args:
        home: folder of the server's SQLite database and of its log.
        port: a fixed port, or any free one.

    Raises:
        UnavailableError: the port is in use, or the server did not answer in time; its log is named.
    """
    if url := os.environ.get("PREFECT_API_URL"):
        yield url
        return
    if port is not None and (why := refusal(port)):
        raise UnavailableError(
            f"Prefect's server cannot have port {port} on {HOST}: {why}", "stop that, or pass --port with another one"
        )
    port = port or free_port()
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://{HOST}:{port}/api"
    os.environ.update(QUIET, PREFECT_HOME=str(home), PREFECT_API_URL=url)
    log = home / "server.log"
    # A session of its own: Ctrl-C reaches the flow first, which still needs the server to record how it ended.
    with log.open("ab") as out:
        server = subprocess.Popen(
            [sys.executable, "-m", "prefect", "server", "start", "--host", HOST, "--port", str(port)],
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        _await(url, server, log, start_timeout_s)
        yield url
    finally:
        server.terminate()
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            server.kill()
        os.environ.pop("PREFECT_API_URL", None)


def _await(url: str, server: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        if http_status(f"{url}/health") == 200:
            return
        time.sleep(0.3)
    raise UnavailableError(f"the Prefect server did not answer at {url}", f"read {log} for the cause")
