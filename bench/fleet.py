"""A deployment in the fleet profile on real servers of its own, for benchmarks: started, supervised, removed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil

from bench.envelope import ROOT
from bench.robots import robot_name
from infra.catalog import Catalog
from infra.errors import LwdError, UnavailableError
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_objects
from infra.servers import Servers, write_settings
from infra.servers.proxy import FaultProxy
from infra.servers.toolchain import free_port
from infra.service.auth import Tokens
from infra.settings import Settings, load_settings
from infra.supervisor import ProcessSpec, Supervisor

SERVERS = ("postgres", "garage", "kafka")
COORDINATORS = ("coordinator-1", "coordinator-2")
CHECK = "bench.wide_check:wide_check"  # actors may send observations as wide as images


def sigterm_interrupts() -> None:
    """SIGTERM as Ctrl-C, from now on: nobody's servers stay behind when a benchmark is ended early."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)


class Fleet:
    """Servers, processes and actors of one run.

    Args:
        folder: of homes and logs; made anew.
        all_links: every process reaches the store through `store_link`, and robots the service through `service_link`.
            Otherwise nothing goes through them but what takes `route`.
        settings: further entries of the home's settings file.

    Attributes:
        store_link, service_link: the proxies before store and service.
    """

    def __init__(self, folder: Path, *, all_links: bool = True, **settings: Any) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.home, self.robots = folder / "home", folder / "robots"
        # PostgreSQL may run as another user, who must be able to enter this folder.
        self._data = Path(tempfile.mkdtemp(prefix="lwd-fleet-"))
        self._data.chmod(0o755)
        self.servers = Servers(self._data)
        self._links: list[FaultProxy] = []
        try:
            self.start_servers()
            service = free_port()
            self.store_link = self._link(self.servers.garage.port)
            self.service_link = self._link(service)
            self.url = f"http://127.0.0.1:{self.service_link.port if all_links else service}"
            self.route = f"{self.servers.garage.port}={self.store_link.port},{service}={self.service_link.port}"
            own: dict[str, Any] = {
                "ingest_port": service,
                "poll_s": 0.05,
                "robot_episodes_per_min": 1e6,
                "robot_mib_per_min": 1e6,
            }
            if all_links:
                own["s3_endpoint"] = f"http://127.0.0.1:{self.store_link.port}"
            write_settings(self.home, {**self.servers.settings(SERVERS), **own, **settings})
            self.settings: Settings = load_settings(home=self.home)
            self.catalog: Catalog = open_catalog(self.settings, migrate=True)
            self.objects: ObjectStore = open_objects(self.settings)
        except BaseException:
            self._remove()
            raise
        self.supervisor = Supervisor(
            self.home / "logs", max_deaths=1000, backoff_s=0.1, longest_pause_s=1.0, quick_s=0.5
        )
        self._cpu: dict[str, dict[int, float]] = {}

    def start_servers(self) -> None:
        """Start those that do not run."""
        for server in self.servers.all(SERVERS):
            server.start()

    def start_processes(self, *, reconcile_s: float, grace_s: float, sweep_s: float) -> None:
        """Service, relay, two coordinators, reconciler and reader; returns when the service answers."""
        reconciler = ["--every", str(reconcile_s), "--grace", str(grace_s), "--sweep", str(sweep_s)]
        check = ["--check", CHECK, "--standby"]
        for name, module, *arguments in (
            ("service", "infra.service"),
            ("relay", "infra.events.relay"),
            *((name, "infra.coordinator", *check) for name in COORDINATORS),
            ("reconciler", "infra.reconcile", *reconciler),
            ("reader", "bench.fleet_reader"),
        ):
            self.start(name, module, "--home", str(self.home), *arguments)
        end = time.monotonic() + 60.0
        while time.monotonic() < end:
            self.supervisor.poll()
            with suppress(OSError), urlopen(f"{self.url}/healthz", timeout=2.0):
                return
            time.sleep(0.2)
        said = "\n".join(f"{server.name}: {server.log_tail(3)}" for server in self.servers.all(SERVERS))
        raise UnavailableError(f"the service does not answer at {self.url}; the servers' logs end with\n{said}",
                               f"read {self.home / 'logs'}")  # fmt: skip

    def enrol(self, count: int, others: Sequence[str] = ()) -> None:
        """Tokens for the robots `a0` to `a<count - 1>`, and for others by name."""
        tokens = Tokens(self.catalog)
        self.robots.mkdir(parents=True, exist_ok=True)
        names = [*(robot_name(number) for number in range(count)), *others]
        made = {name: tokens.enrol(name, "learning", days=1, actor="benchmark") for name in names}
        self._tokens.write_text(json.dumps(made))

    def token(self, robot: str) -> str:
        """Of an enrolled robot."""
        return str(json.loads(self._tokens.read_text())[robot])

    def start_robots(self, name: str, module: str, count: int, hosts: int, arguments: Sequence[str]) -> list[str]:
        """The first `count` robots in `hosts` processes of `module`; the processes' names."""
        names = []
        for host in range(hosts):
            first, last = host * count // hosts, (host + 1) * count // hosts
            place = ["--home", str(self.robots), "--tokens", str(self._tokens), "--url", self.url]
            names.append(f"{name}-{host}")
            self.start(names[-1], module, *place, "--first", str(first), "--count", str(last - first), *arguments)
        return names

    def start(self, name: str, module: str, *arguments: str) -> None:
        """One more supervised process."""
        command = [sys.executable, "-m", module, *arguments, "--parent", str(os.getpid())]
        env = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.supervisor.start(ProcessSpec(name, command, env))

    def prefetcher(self) -> psutil.Process:
        """The reader's; psutil.NoSuchProcess while there is none."""
        for child in psutil.Process(self.supervisor.pid("reader")).children():
            if "infra.prefetcher" in child.cmdline():
                return child
        raise psutil.NoSuchProcess(0)

    def cpu_seconds(self) -> dict[str, float]:
        """What each process and server has used so far, over all its lives; call it often, lest a life be missed."""
        pids = {name: self.supervisor.pid(name) for name in self.supervisor.restarts}
        pids |= {server.name: server.pid for server in self.servers.all(SERVERS) if server.pid is not None}
        for name, pid in pids.items():
            with suppress(psutil.Error):
                process = psutil.Process(pid)
                for one in (process, *process.children(recursive=True)):
                    with suppress(psutil.Error):
                        used = one.cpu_times()
                        part = "prefetcher" if "infra.prefetcher" in one.cmdline() else name.split("-")[0]
                        self._cpu.setdefault(part, {})[one.pid] = used.user + used.system
        return {part: round(sum(lives.values()), 1) for part, lives in sorted(self._cpu.items())}

    def close(self) -> None:
        """End everything and remove the servers' data."""
        self.supervisor.stop()
        with suppress(LwdError):
            self.catalog.close()
        self._remove()

    @property
    def _tokens(self) -> Path:
        return self.robots / "tokens.json"

    def _link(self, port: int) -> FaultProxy:
        self._links.append(FaultProxy("127.0.0.1", port))
        return self._links[-1]

    def _remove(self) -> None:
        for link in self._links:
            link.close()
        for server in self.servers.all(SERVERS):
            server.kill()
        shutil.rmtree(self._data, ignore_errors=True)
