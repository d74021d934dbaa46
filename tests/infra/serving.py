"""The ingest service for tests: in a thread of this process, or as the process that it is."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import urllib3
from invariants import Plane, open_plane
from waiting import wait_until

from infra.crashpoints import VARIABLE
from infra.edge.remote import RemoteServer
from infra.objects import ObjectStore
from infra.service.app import UNSETTLED_MAX, make_app
from infra.service.auth import Tokens
from infra.service.listen import Listener
from infra.settings import load_settings


@dataclass
class Served:
    """A service at `url`, and robots of it."""

    plane: Plane
    url: str
    options: dict[str, Any] = field(default_factory=dict)  # of RemoteServer

    def enrol(self, robot: str = "r0", cohort: str = "learning") -> str:
        return Tokens(self.plane.catalog).enrol(robot, cohort, days=1, actor="test")

    def robot(self, robot: str = "r0", cohort: str = "learning", **options: Any) -> RemoteServer:
        given = {"robot_id": robot, "cohort": cohort, "timeout_s": 20.0, **self.options, **options}
        return RemoteServer(self.url, self.enrol(robot, cohort), **given)

    def ask(
        self, method: str, path: str, token: str | None = None, body: Any = None, **headers: str
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One request as anybody could make it: status, JSON or bytes, headers."""
        given = {} if token is None else {"Authorization": f"Bearer {token}"}
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given |= {} if data is body else {"Content-Type": "application/json"}
        response = urllib3.request(method, self.url + path, body=data, headers=given | headers, retries=False,
                                   redirect=False, timeout=10)  # fmt: skip
        try:
            return response.status, response.json(), response.headers
        except ValueError:
            return response.status, response.data, response.headers


@contextmanager
def serving(
    home: Path, *, objects: ObjectStore | None = None, unsettled_max: int = UNSETTLED_MAX, **settings: Any
) -> Iterator[Served]:
    """In a thread, until the block ends."""
    plane = open_plane(home)
    listener = Listener(load_settings(home=home, ingest_port=0, **settings))
    app = make_app(load_settings(home=home, **settings), plane.catalog, objects or plane.objects,
                   unsettled_max=unsettled_max)  # fmt: skip
    thread = threading.Thread(target=listener.serve, args=(app,), name="service")
    thread.start()
    try:
        yield Served(plane, listener.url)
    finally:
        listener.stop()
        thread.join(30)
        assert not thread.is_alive()


class Process:
    """The service as a process of its own, at a port that stays the same over its lives."""

    def __init__(self, home: Path, **env: str) -> None:
        self.home = home
        self.plane = open_plane(home)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self._env = os.environ | {"LWD_INGEST_PORT": str(self.port), "OMP_NUM_THREADS": "1"} | env
        self.served = Served(self.plane, f"http://127.0.0.1:{self.port}")
        self.process: subprocess.Popen[bytes] | None = None
        self.limit: int | None = None  # of its file descriptors

    def start(self, crash: str | None = None) -> None:
        command = [sys.executable, "-m", "infra.service", "--home", str(self.home), "--parent", str(os.getpid())]
        if self.limit is not None:
            command = ["sh", "-c", f'ulimit -n {self.limit}; exec "$@"', "sh", *command]
        env = self._env | ({VARIABLE: crash} if crash else {})
        self.process = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL)
        wait_until(self._serves)

    def _serves(self) -> bool:
        assert self.process is not None and self.process.poll() is None, "the service ended at its start"
        try:
            return self.served.ask("GET", "/healthz")[0] == 200
        except urllib3.exceptions.HTTPError:
            return False

    def wait(self) -> int:
        """Its exit code, when it ends."""
        assert self.process is not None
        return self.process.wait(60)

    def stop(self) -> int:
        """SIGTERM; its exit code."""
        assert self.process is not None
        self.process.terminate()
        return self.wait()

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
