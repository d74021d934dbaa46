"""Keeps a set of processes alive: what dies is started again, what finishes is left, what cannot live is named."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from infra.errors import UnavailableError


@dataclass(frozen=True)
class ProcessSpec:
    """One supervised process.

    Attributes:
        name: unique; its log is `<name>.log`.
        argv: the command.
        env: variables added to this process's own.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass
class _Child:
    spec: ProcessSpec
    process: subprocess.Popen[bytes]
    started: float
    restarts: int = 0
    quick_deaths: int = 0
    due: float | None = None  # when to start it again
    finished: bool = False


class Supervisor:
    """Start, watch, restart and stop processes.

    A child that exits with 0 is finished. One that dies otherwise is started again after a pause that doubles with
    each quick death; after `max_quick_deaths` in a row within `quick_s` of its start it is given up on.

    Args:
        logs: folder for the children's output, one file each, appended to.
        backoff_s: first pause before a restart.
        quick_s: a life shorter than this counts as a quick death.
        max_quick_deaths: how many in a row are borne.
    """

    def __init__(self, logs: Path, *, backoff_s: float = 0.2, quick_s: float = 20.0, max_quick_deaths: int = 5) -> None:
        self._logs = logs
        self._backoff_s = backoff_s
        self._quick_s = quick_s
        self._max_quick_deaths = max_quick_deaths
        self._children: dict[str, _Child] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, spec: ProcessSpec) -> None:
        """Start `spec` and keep it alive from now on."""
        if spec.name in self._children:
            raise ValueError(f"process {spec.name!r} is already supervised")
        self._children[spec.name] = _Child(spec, self._spawn(spec), time.monotonic())

    def poll(self) -> list[str]:
        """Restart what has died and is due; returns the names of those that died since the last call.

        Raises:
            UnavailableError: a process keeps dying at once; the end of its log is quoted.
        """
        died = []
        now = time.monotonic()
        for child in self._children.values():
            if child.finished:
                continue
            if child.due is not None:
                if now >= child.due:
                    child.due = None
                    child.process, child.started = self._spawn(child.spec), now
                    child.restarts += 1
                continue
            code = child.process.poll()
            if code is None:
                continue
            if code == 0:
                child.finished = True
                continue
            died.append(child.spec.name)
            child.quick_deaths = child.quick_deaths + 1 if now - child.started < self._quick_s else 1
            if child.quick_deaths > self._max_quick_deaths:
                raise UnavailableError(
                    f"process {child.spec.name!r} died {child.quick_deaths} times in a row, last with exit code {code}:"
                    f"\n{self.tail(child.spec.name)}",
                    f"mend the cause, then run the same command again; whole log: {self._log(child.spec.name)}",
                )
            child.due = now + self._backoff_s * 2 ** (child.quick_deaths - 1)
        return died

    def pid(self, name: str) -> int:
        """Process id of the running child `name`."""
        return self._children[name].process.pid

    def finished(self, name: str) -> bool:
        """Whether the child has exited with 0."""
        return self._children[name].finished

    @property
    def restarts(self) -> dict[str, int]:
        """How often each process was started again."""
        return {name: child.restarts for name, child in self._children.items()}

    def tail(self, name: str, lines: int = 12) -> str:
        """The last lines of a child's log."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self._log(name).read_text(errors="replace").splitlines()[-lines:])
        return ""

    def stop(self, names: Sequence[str] | None = None, timeout_s: float = 30.0) -> list[str]:
        """SIGTERM, wait, and SIGKILL those that did not leave in time (their names are returned)."""
        chosen = [self._children[name] for name in (self._children if names is None else names)]
        for child in chosen:
            if child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        killed = []
        for child in chosen:
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
                killed.append(child.spec.name)
            child.finished, child.due = True, None
        return killed

    def _log(self, name: str) -> Path:
        return self._logs / f"{name}.log"

    def _spawn(self, spec: ProcessSpec) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches the supervisor alone, which then stops the children in order.
        with self._log(spec.name).open("ab") as out:
            return subprocess.Popen(
                list(spec.argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**os.environ, **spec.env},
                start_new_session=True,
            )
