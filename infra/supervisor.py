"""Keeps a set of processes alive: what dies is started again, what finishes is left, what cannot live is isolated.

A part that keeps dying is named, started again after pauses that grow to minutes, and never given up; the others go on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.errors import escaped
from infra.files import write_durably

PARTS = "parts.json"  # in the home: what the supervisor knows of its processes
_TAIL_BYTES, _LINE_CHARACTERS = 16_384, 300
_LONG_LIFE_S = 600.0  # a life as long as this is none that ended at its start, however slow the machine
_TOLD_S = 30.0  # the file is written anew this often, also when nothing has changed
_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ProcessSpec:
    """One supervised process.

    Attributes:
        name: unique; its log is `<name>.log`.
        argv: the command.
        env: variables added to this process's own.
        progress: a number that grows with what the process gets done, over all its lives; where there is none, a long
            life counts as progress.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    progress: Callable[[], float] | None = None


@dataclass(frozen=True)
class Isolated:
    """A part that keeps dying.

    Attributes:
        deaths: in a row, without progress between them.
        since: when it was isolated, seconds since the epoch. next_try: when it is started again.
        cause: how it ended last, and the end of its log.
    """

    name: str
    deaths: int
    since: float
    next_try: float
    cause: str


@dataclass
class _Child:
    spec: ProcessSpec
    process: subprocess.Popen[bytes] | None = None
    started: float = 0.0
    restarts: int = 0
    deaths: int = 0  # in a row, without progress
    shortest: float = 0.0  # life since the last progress, seconds
    best: float = 0.0  # progress made so far
    cause: str = ""
    log_from: int = 0  # where this life's output begins in the log
    isolated_at: float | None = None  # epoch
    due: float | None = None  # when to start it again
    finished: bool = False


class Supervisor:
    """Start, watch, restart and stop processes.

    A child that exits with 0 is finished. One that dies otherwise is started again after a pause that doubles with each
    death in a row, up to `longest_pause_s`. Deaths are in a row if no progress lies between them: by the spec's own
    measure, or else by a life longer than `quick_s` and than twice the shortest one, so that a process which takes a
    minute to start on a busy machine and then dies is counted all the same. With more than `max_deaths` in a row it is
    isolated, until it makes progress.

    Nothing that goes wrong in watching ends the watching: neither a folder that was deleted, nor a full disk, nor a
    system that starts no process.

    Args:
        logs: folder for the children's output, one file each, appended to.
        state: file that says how each part fares, for other commands.
    """

    def __init__(
        self,
        logs: Path,
        *,
        state: Path | None = None,
        backoff_s: float = 0.2,
        longest_pause_s: float = 300.0,
        quick_s: float = 20.0,
        max_deaths: int = 5,
    ) -> None:
        self._logs = logs
        self._state = state
        self._backoff_s = backoff_s
        self._longest_pause_s = longest_pause_s
        self._quick_s = quick_s
        self._max_deaths = max_deaths
        self._children: dict[str, _Child] = {}
        self._told: tuple[float, object] = (0.0, None)
        logs.mkdir(parents=True, exist_ok=True)

    def start(self, spec: ProcessSpec) -> None:
        """Start `spec` and keep it alive from now on."""
        if spec.name in self._children:
            raise ValueError(f"process {spec.name!r} is already supervised")
        child = self._children[spec.name] = _Child(spec)
        child.best = self._progress(child)
        self._try(child)
        self._tell()

    def poll(self) -> list[str]:
        """Restart what has died and is due; returns the names of those that died since the last call."""
        died = [child.spec.name for child in self._children.values() if self._look(child)]
        self._tell()
        return died

    def pid(self, name: str) -> int:
        """Process id of the child `name`; 0 if it could not be started."""
        process = self._children[name].process
        return process.pid if process is not None else 0

    def finished(self, name: str) -> bool:
        """Whether the child has exited with 0."""
        return self._children[name].finished

    @property
    def restarts(self) -> dict[str, int]:
        """How often each process was started again."""
        return {name: child.restarts for name, child in self._children.items()}

    @property
    def isolated(self) -> dict[str, Isolated]:
        """The parts that keep dying, by name."""
        now = time.monotonic()
        return {
            name: Isolated(
                name, child.deaths, child.isolated_at, time.time() + max(0.0, (child.due or now) - now), child.cause
            )
            for name, child in self._children.items()
            if child.isolated_at is not None
        }

    def cause(self, name: str) -> str:
        """How the child ended last, and the end of its log; empty before it has."""
        return self._children[name].cause

    def tail(self, name: str, lines: int = 12) -> str:
        """The end of a child's log in its present or last life; lines are cut, and have no control characters."""
        with contextlib.suppress(OSError), self.log(name).open("rb") as file:
            file.seek(max(self._children[name].log_from, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            found = file.read().decode(errors="replace").splitlines()[-lines:]
            return "\n".join(escaped(line[:_LINE_CHARACTERS]) for line in found)
        return ""

    def stop(self, names: Sequence[str] | None = None, timeout_s: float = 30.0) -> list[str]:
        """SIGTERM, wait, and SIGKILL those that did not leave in time (their names are returned)."""
        chosen = [self._children[name] for name in (self._children if names is None else names)]
        for child in chosen:
            child.finished, child.due = True, None
            if child.process is not None and child.process.poll() is None:
                child.process.send_signal(signal.SIGTERM)
        deadline = time.monotonic() + timeout_s
        killed = []
        for child in chosen:
            if child.process is None:
                continue
            try:
                child.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.process.kill()
                child.process.wait()
                killed.append(child.spec.name)
        self._tell()
        return killed

    def _look(self, child: _Child) -> bool:
        """Look at one child; whether it was found dead."""
        if child.finished:
            return False
        now = time.monotonic()
        if child.due is not None:
            if now < child.due:
                return False
            child.due = None
            child.restarts += 1
            return self._try(child)
        assert child.process is not None
        code = child.process.poll()
        life = now - child.started
        if self._advanced(child, life):
            child.deaths, child.shortest, child.isolated_at = 0, 0.0, None
        if code is None:
            return False
        if code == 0:
            child.finished, child.isolated_at = True, None
            return False
        child.shortest = min(child.shortest or life, life)
        self._died(child, f"{_ending(code)}:\n{self.tail(child.spec.name)}")
        return True

    def _died(self, child: _Child, cause: str) -> None:
        child.deaths, child.cause = child.deaths + 1, cause
        if child.deaths > self._max_deaths and child.isolated_at is None:
            child.isolated_at = time.time()
        pause = min(self._longest_pause_s, self._backoff_s * 2.0 ** min(child.deaths - 1, 30))
        child.due = time.monotonic() + pause

    def _try(self, child: _Child) -> bool:
        """Start a child; whether that failed, which counts as a death."""
        child.log_from = self._size(child.spec.name)
        try:
            child.process, child.started = self._spawn(child.spec), time.monotonic()
        except OSError as error:  # no memory, no process number, no such program
            self._died(child, f"could not be started: {error}")
            return True
        return False

    def _advanced(self, child: _Child, life: float) -> bool:
        if life > _LONG_LIFE_S:
            return True
        if child.spec.progress is None:
            return life > max(self._quick_s, 2 * child.shortest)
        now = self._progress(child)
        if now <= child.best:
            return False
        child.best = now
        return True

    def _progress(self, child: _Child) -> float:
        try:
            return float(child.spec.progress()) if child.spec.progress is not None else 0.0
        except Exception as error:  # whatever a damaged file holds: no progress is seen then
            _logger.warning("progress of %s cannot be read: %s", child.spec.name, error)
            return child.best

    def log(self, name: str) -> Path:
        """File with what the child printed."""
        return self._logs / f"{name}.log"

    def _tell(self) -> None:
        """Write what is known of each part, where that has changed; a disk that takes no file is borne."""
        if self._state is None:
            return
        parts = [_as_dict(child) for child in self._children.values()]
        told_at, told = self._told
        if parts == told and time.monotonic() - told_at < _TOLD_S:
            return
        self._told = (time.monotonic(), parts)
        document = {"at": time.time(), "supervisor": os.getpid(), "parts": parts}
        with contextlib.suppress(OSError):
            write_durably(self._state, json.dumps(document).encode())

    def _spawn(self, spec: ProcessSpec) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C reaches the supervisor alone, which then stops the children in order.
        # The orchestrator's variables, its credential among them, are not for the processes.
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        with self._output(spec.name) as out:
            return subprocess.Popen(
                list(spec.argv),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**inherited, **spec.env},
                start_new_session=True,
            )

    def _size(self, name: str) -> int:
        with contextlib.suppress(OSError):
            return self.log(name).stat().st_size
        return 0

    def _output(self, name: str) -> Any:
        """The child's log; nowhere, if the disk has no room for the file or the folder."""
        try:
            self._logs.mkdir(parents=True, exist_ok=True)
            return self.log(name).open("ab")
        except OSError as error:
            _logger.warning("%s has no log: %s", name, error)
            return Path(os.devnull).open("ab")


def read_parts(state: Path) -> dict[str, Any]:
    """What a supervisor wrote last; empty if there is none, or nothing that can be read."""
    with contextlib.suppress(OSError, ValueError):
        document = json.loads(state.read_text())
        if isinstance(document, dict) and isinstance(document.get("parts"), list):
            return document
    return {}


def isolated_parts(home: Path) -> list[str]:
    """A line for each part of this home's stage that keeps dying, by its supervisor's last word."""
    document = read_parts(home / PARTS)
    lines = []
    for part in document.get("parts", []):
        if isinstance(part, dict) and part.get("state") == "isolated":
            lines.append(
                f"isolated: {part.get('name')}: died {part.get('deaths')} times in a row, "
                f"{time.time() - float(document.get('at') or 0):.0f} s ago by its supervisor "
                f"(process {document.get('supervisor')}); it {part.get('cause')}"
            )
    return lines


def _as_dict(child: _Child) -> dict[str, Any]:
    if child.finished:
        state = "finished"
    elif child.isolated_at is not None:
        state = "isolated"
    else:
        state = "running" if child.due is None else "waiting"
    return {
        "name": child.spec.name, "state": state, "pid": child.process.pid if child.process is not None else None,
        "restarts": child.restarts, "deaths": child.deaths, "isolated_at": child.isolated_at, "cause": child.cause,
    }  # fmt: skip


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"ended by {signal.Signals(-code).name}"
    return f"ended with exit code {code}"
