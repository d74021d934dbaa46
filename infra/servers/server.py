"""What every server has in common: it is prepared once, started detached, waited for, stopped, or killed in tests."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from infra.errors import ConfigError, UnavailableError
from infra.files import write_durably
from infra.lifeline import MARK
from infra.servers.toolchain import HOST, answers, free_port, identity, locked, refusal

_PORT_S = 3.0  # a killed process's last threads may hold its port a little longer than its number


class Server(ABC):
    """One server on loopback.

    Its process outlives the command that started it; a pid file and the ports it was given lie with its data. Objects
    made for the same folder, in one process or in several, stand for the same server.

    Args:
        programs: folder that the prepared programs share.
        data: this server's own folder.
        port: where it listens; by default a free one, chosen at the first start and kept.
    """

    name: str
    wanted: str  # the version that is prepared, or the least that will do
    start_timeout_s = 120.0  # one that ends is noticed at once; a busy machine takes its time
    stop_signal = signal.SIGTERM
    further_ports: Sequence[str] = ()  # names of those it needs besides `port`
    folder_mode = 0o700

    def __init__(self, programs: Path, data: Path, port: int | None = None) -> None:
        self.programs = programs
        self.data = data
        self._port = port

    @property
    @abstractmethod
    def prepared(self) -> bool:
        """Whether the program is there."""

    @abstractmethod
    def obtain(self) -> None:
        """Get the program."""

    @abstractmethod
    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        """The command and the variables added to the environment; writes the configuration it needs."""

    @property
    def version(self) -> str:
        """Of the program, as far as it is known."""
        return self.wanted

    def prepare(self) -> None:
        """Get the program, once; a second caller waits for the first.

        Raises:
            ConfigError: a tool that it needs is missing, or failed.
        """
        if self.prepared:
            return
        self.programs.mkdir(parents=True, exist_ok=True)
        with locked(self.programs / f".{self.name}.lock"):
            if not self.prepared:
                self.obtain()

    def ready(self) -> bool:
        """Whether it serves."""
        return self.pid is not None and answers(self.port)

    def initialise(self) -> None:  # noqa: B027 (most servers need nothing)
        """What the first start needs, before the process."""

    def settle(self) -> None:  # noqa: B027
        """What every start needs once it serves: databases, topics."""

    @property
    def port(self) -> int:
        return self.named_port("port", self._port)

    def named_port(self, name: str, wanted: int | None = None) -> int:
        """A port of this server, chosen once and kept in its folder."""
        path = self.data / name
        kept = int(path.read_text()) if path.exists() else None
        if kept is not None and wanted in (None, kept):
            return kept
        port = wanted or free_port()
        write_durably(self.folder() / name, str(port).encode())
        return port

    def folder(self) -> Path:
        """Its own folder, made if need be; others may not look into it."""
        if not self.data.exists():
            self.data.mkdir(parents=True, exist_ok=True)
            self.data.chmod(self.folder_mode)
        return self.data

    @property
    def pid(self) -> int | None:
        """Process id while it runs. A number that another process has meanwhile is not taken for it: that one has
        neither its start time nor, should the clock have been set, its command line."""
        try:
            line, _, command = (self.data / "pid").read_text().partition("\n")
            pid, started = line.split()
            process = psutil.Process(int(pid))
            same = abs(process.create_time() - float(started)) < 1.0 or process.cmdline() == command.split("\0")
            return process.pid if same and _lives(process) else None
        except (OSError, ValueError, psutil.Error):
            return None

    @property
    def crashed(self) -> bool:
        """Whether it was started and is gone without having been stopped."""
        return (self.data / "pid").exists() and self.pid is None

    def start(self) -> None:
        """Start it, unless it runs, and wait until it serves.

        Raises:
            ConfigError: a program is missing, or its port is taken.
            UnavailableError: it ended or did not serve in time; the end of its log is quoted.
        """
        with locked(self.folder() / "lock"):
            if self.pid is None:
                self.prepare()
                self._claim_ports()
                self.initialise()
                self._spawn()
            self._wait()
            self.settle()

    def stop(self, timeout_s: float = 30.0) -> None:
        """Ask it to end, then SIGKILL; nothing happens if it does not run."""
        self._end(self.stop_signal, timeout_s)
        (self.data / "pid").unlink(missing_ok=True)

    def kill(self) -> None:
        """SIGKILL, as a crash would; its data stays."""
        self._end(signal.SIGKILL, 10.0)

    def log_tail(self, lines: int = 15) -> str:
        with contextlib.suppress(OSError):
            return "\n".join((self.data / "server.log").read_text(errors="replace").splitlines()[-lines:])
        return ""

    def user(self) -> str | None:
        """Whom to run as, when that is not the caller."""
        return None

    def _claim_ports(self) -> None:
        for name in ("port", *self.further_ports):
            port = self.port if name == "port" else self.named_port(name)
            end = time.monotonic() + _PORT_S
            while (why := refusal(port)) and time.monotonic() < end:
                time.sleep(0.1)
            if why:
                raise ConfigError(
                    f"{self.name} cannot have port {port} on {HOST}: {why}",
                    f"stop that, or remove {self.data / name} to let {self.name} choose another",
                )

    def _spawn(self) -> None:
        argv, env = self.command()
        (self.data / "server.log").touch(mode=0o600)
        with (self.data / "server.log").open("ab") as log:
            process = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**_unmarked(os.environ), **env},
                cwd="/",
                start_new_session=True,  # Ctrl-C in the terminal is not for it
                **identity(self.user()),
            )
        started = 0.0
        with contextlib.suppress(psutil.Error):  # it may have ended already
            started = psutil.Process(process.pid).create_time()
        process.returncode = 0  # it is not waited for through this object, which would complain
        command = "\0".join(argv)
        write_durably(self.data / "pid", f"{process.pid} {started}\n{command}".encode(), mode=0o600)

    def _wait(self) -> None:
        end = time.monotonic() + self.start_timeout_s
        while not self.ready():
            self._reap()
            if self.pid is None:
                raise UnavailableError(
                    f"{self.name} ended at once:\n{self.log_tail()}", f"whole log: {self.data / 'server.log'}"
                )
            if time.monotonic() > end:
                raise UnavailableError(
                    f"{self.name} does not serve after {self.start_timeout_s:.0f} s:\n{self.log_tail()}",
                    f"try `lwd servers up` again; whole log: {self.data / 'server.log'}",
                )
            time.sleep(0.1)

    def _end(self, number: int, timeout_s: float) -> None:
        pid = self.pid
        if pid is None:
            return
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
        except psutil.NoSuchProcess:
            return
        _send(number, family if number == signal.SIGKILL else [process])
        deadline = time.monotonic() + timeout_s
        while any(map(_lives, family)):
            self._reap()
            if time.monotonic() > deadline + 10.0:
                raise UnavailableError(f"{self.name} (process {pid}) does not end", "see why: its disk may be gone")
            if time.monotonic() > deadline:
                _send(signal.SIGKILL, family)
            time.sleep(0.05)
        self._reap()

    def _reap(self) -> None:
        """Collect the process if it is a child of this one that has ended; other children are not ours to collect."""
        with contextlib.suppress(OSError, ValueError):
            os.waitpid(int((self.data / "pid").read_text().split()[0]), os.WNOHANG)


def _unmarked(environment: Mapping[str, str]) -> dict[str, str]:
    """Without the mark of the command that starts it: it outlives that command."""
    return {name: value for name, value in environment.items() if name != MARK}


def _send(number: int, processes: Sequence[psutil.Process]) -> None:
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.send_signal(number)


def _lives(process: psutil.Process) -> bool:
    """Whether any thread of it is left: the first one's end shows the process as ended, though others, on a busy
    machine, still hold its ports and files."""
    with contextlib.suppress(psutil.Error):
        ended = process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
        return process.is_running() and not ended
    return False
