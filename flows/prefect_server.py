"""One Prefect server for a whole run: started before the heavy work, since its start is slow on busy cores."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from infra.errors import UnavailableError
from infra.loopback import ask_directly
from infra.servers.prefect import credential, server_command, server_environment
from infra.servers.toolchain import HOST, free_port, http_status, refusal

QUIET = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
    "PREFECT_LOGGING_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_ENABLED": "false",
}
_STOP_S = 15.0


def require_port(port: int | None) -> None:
    """UnavailableError if a server of ours would need this port and cannot have it."""
    if port is not None and "PREFECT_API_URL" not in os.environ and (why := refusal(port)):
        raise UnavailableError(
            f"Prefect's server cannot have port {port} on {HOST}: {why}", "stop that, or pass --port with another one"
        )


@contextmanager
def prefect_server(home: Path, *, port: int | None = None, start_timeout_s: float = 180.0) -> Iterator[str]:
    """Run a Prefect server on loopback for the length of the block, and point this process at it.

    Where `PREFECT_API_URL` is set already, that server is used and none is started. Otherwise no `PREFECT_…` variable
    of the caller holds within the block: each is meant for another server, its database among them.

    Args:
        home: folder of the server's SQLite database, of its log and of its credential.
        port: a fixed port, or any free one.

    Raises:
        UnavailableError: the port is in use, or the server did not answer in time; its log is named.
    """
    ask_directly()
    if url := os.environ.get("PREFECT_API_URL"):
        yield url
        return
    require_port(port)
    port = port or free_port()
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://{HOST}:{port}/api"
    ours = {"PREFECT_API_URL": url, "PREFECT_API_AUTH_STRING": credential(home)}
    before = {name: os.environ.get(name) for name in ours}
    foreign = {name for name in os.environ if name.startswith("PREFECT_")} - QUIET.keys() - {"PREFECT_HOME"}
    before |= {name: os.environ.pop(name) for name in foreign}
    log = home / "server.log"
    # A session of its own: Ctrl-C reaches the flow first, which still needs the server to record how it ended.
    with log.open("ab") as out:
        server = subprocess.Popen(
            server_command(port),
            cwd=home,  # Prefect reads `.env` and `prefect.toml` of its folder
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **QUIET, "PREFECT_HOME": str(home), **server_environment(home, port)},
            start_new_session=True,
        )
    try:
        os.environ.update(QUIET, PREFECT_HOME=str(home), **ours)
        _await(url, server, log, start_timeout_s)
        yield url
    finally:
        _stop(server)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _stop(server: subprocess.Popen[bytes]) -> None:
    """SIGTERM, and SIGKILL to its whole session where that takes too long."""
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(_STOP_S)
    with contextlib.suppress(OSError):  # nobody is left
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


def _await(url: str, server: subprocess.Popen[bytes], log: Path, timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        if http_status(f"{url}/health") == 200:
            return
        time.sleep(0.3)
    raise UnavailableError(f"the Prefect server did not answer at {url}", f"read {log} for the cause")
