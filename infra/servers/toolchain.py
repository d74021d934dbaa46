"""What the servers need of the machine: programs on the PATH, commands run to their end, one at a time, free ports."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import http.client
import os
import pwd
import random
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from infra.errors import ConfigError

HOST = "127.0.0.1"
_FIRST_PORT = 20_000
_given: set[int] = set()  # by this process: one that is not listened on yet is not given twice
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # loopback is not reached through a proxy
_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")


def program(name: str, what: str, fix: str) -> str:
    """Path of a program.

    Args:
        what: who needs it, and what it is: "Kafka needs Maven".

    Raises:
        ConfigError: it is not on the PATH.
    """
    path = shutil.which(name)
    if path is None:
        raise ConfigError(f"{what}: no {name} on the PATH", fix)
    return path


def run(
    argv: Sequence[str], what: str, *, fix: str, env: Mapping[str, str] | None = None, user: str | None = None
) -> str:
    """Run a command to its end; its output.

    Raises:
        ConfigError: it failed; `what` it was for, the end of what it printed, and `fix`.
    """
    done = subprocess.run(
        list(argv),
        env={**os.environ, **(env or {})},
        capture_output=True,
        text=True,
        cwd="/",
        check=False,
        **identity(user),
    )
    if done.returncode:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-12:])
        raise ConfigError(f"{what} failed ({argv[0]} ended with {done.returncode}):\n{tail}", fix)
    return done.stdout


def identity(user: str | None) -> dict[str, Any]:
    """What subprocess is told to run as another user, without root's groups; nothing for None."""
    return {} if user is None else {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []}


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock, waiting for another process or thread that has it; the kernel frees it if this one dies."""
    with path.open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def free_port() -> int:
    """A loopback port that nothing listens on, below those that the kernel gives to clients.

    Such a port stays free while its server is down: no connection is given it as its own end, and a client that knocks
    at it cannot be connected to itself, as happens on loopback with a port of the kernel's range.
    """
    try:
        end = int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError):
        end = 32_768
    candidates = range(_FIRST_PORT, end) if end > _FIRST_PORT + 1000 else range(10_000, 65_536)
    for port in random.SystemRandom().sample(candidates, 200):
        if port not in _given and refusal(port) is None:
            _given.add(port)
            return port
    raise ConfigError(f"200 ports tried on {HOST}, none is free", "give one by hand: `lwd servers up --port`")


def refusal(port: int) -> str | None:
    """Why a server could not listen on this port of loopback; None if it could."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except PermissionError:
            return "this user may not listen there"
        except OSError as error:
            return f"{_listener(port)} listens there" if error.errno == errno.EADDRINUSE else str(error)
    return None


def answers(port: int) -> bool:
    """Whether something accepts connections there."""
    with contextlib.suppress(OSError), socket.create_connection((HOST, port), timeout=0.5):
        return True
    return False


def _listener(port: int) -> str:
    """Name and process id of who listens there, as far as this user may know."""
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
                return f"{psutil.Process(connection.pid).name()} (process {connection.pid})"
    return "another process"


def http_status(url: str) -> int | None:
    """The status that a GET on this machine is answered with; None if there is no answer, or none in HTTP."""
    try:
        with _direct.open(url, timeout=2.0) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except (OSError, http.client.HTTPException):
        return None
