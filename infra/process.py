"""What every long-lived process shares: stopping cleanly, not outliving its parent, logging as JSON lines."""

from __future__ import annotations

import _thread
import argparse
import contextlib
import ctypes
import importlib
import io
import json
import logging
import os
import random
import re
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, cast

from infra.errors import ConfigError, UnavailableError, shown
from infra.loopback import ask_directly
from infra.surroundings import complete
from infra.unexpected import explained

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
_KINDS, _ERRORS = 1024, 0.05  # kinds of records that a FloodFilter tells apart; of errors fewer pass
_SAME_S = 1.0  # the kernel, for the parent's death, and whoever ends the parent's command tell a process at once
_SECRET = re.compile(
    r"(?i)((?:x-amz-(?:signature|credential|security-token)|password|secret|token)=)[^&\s'\"]+|(://[^:/@\s]+:)[^@\s]+(?=@)"
)


def stop_on_signal() -> threading.Event:
    """An event that SIGTERM and SIGINT set; another, a second later, ends the process at once. Main thread only."""
    stop, asked_at = threading.Event(), None

    def handle(number: int, _frame: object) -> None:
        nonlocal asked_at
        if asked_at is not None:
            if time.monotonic() - asked_at > _SAME_S:
                os._exit(128 + number)
            return
        asked_at = time.monotonic()
        # By another thread: this one may be within stop.wait(), whose lock set() needs, and would wait for itself.
        _thread.start_new_thread(stop.set, ())

    signal.signal(signal.SIGTERM, handle)
    signal.signal(signal.SIGINT, handle)
    return stop


def die_with_parent(parent: int, number: int = signal.SIGTERM) -> None:
    """Have the kernel send this process `number` when its parent dies (Linux; elsewhere nothing happens).

    Args:
        parent: its process id, from the command line: a parent that died while this process was being started can be
            told from one that lives only by knowing who it was.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, int(number), 0, 0, 0)
    if os.getppid() != parent:
        os.kill(os.getpid(), number)


def process_arguments(module: str, description: str) -> argparse.ArgumentParser:
    """A parser with what every long-lived process is told: its deployment, and whom not to outlive."""
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("--home", type=Path, required=True, help="the deployment")
    parser.add_argument("--parent", type=int, help="stop when this process, which started this one, ends")
    return parser


def run_process(options: argparse.Namespace, work: Callable[[threading.Event], object], *, label: str = "error") -> int:
    """Do a process's `work`, which is given the event that a signal sets; the exit code. Main thread only.

    Args:
        options: from a parser of `process_arguments`.
        work: until the event is set, or until it is done.
        label: what the line on stderr begins with where `work` raises.
    """
    if options.parent:
        die_with_parent(options.parent)
    stop = stop_on_signal()
    write_any_text()
    ask_directly()
    try:
        complete()
        work(stop)
    except Exception as error:
        known = explained(error)
        if known is not error:
            logging.getLogger(__name__).exception("ended by an unexpected error")
        print(f"{label}: {known}", file=sys.stderr)
        return known.exit_code
    return 0


def write_any_text() -> None:
    """Have this process's output take any character: what its encoding lacks is written as an escape."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def redact(text: str) -> str:
    """The text without the secrets of presigned URLs, passwords in URLs, and `token=`-like values."""
    return _SECRET.sub(lambda match: f"{match.group(1) or match.group(2)}***", text)


MAX_LOG_CHARS = 4096  # of one field of a log line, whoever wrote what it says


def _capped(value: Any) -> Any:
    """A field of a log line: itself where it is short, else its beginning and how much was cut."""
    if isinstance(value, int | float | None):
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if len(text) <= MAX_LOG_CHARS:
        return value
    return f"{text[:MAX_LOG_CHARS]}… ({len(text) - MAX_LOG_CHARS} more characters)"


class _Line(logging.Formatter):
    """A line for people: capped, and without what a terminal obeys."""

    def format(self, record: logging.LogRecord) -> str:
        return shown(redact(super().format(record)), MAX_LOG_CHARS)


class JsonLines(logging.Formatter):
    """One JSON object a line; fields given as `extra={"fields": {...}}` are merged in. Secrets are redacted, and each
    field is cut at `MAX_LOG_CHARS`; of a traceback the end is kept."""

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, Any] = {
            "at": round(record.created, 3),
            "level": record.levelname.lower(),
            "process": record.processName if record.processName != "MainProcess" else os.getpid(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["error"] = self.formatException(record.exc_info)[-MAX_LOG_CHARS:]
        return redact(json.dumps({name: _capped(value) for name, value in entry.items()}, default=str))


class FloodFilter(logging.Filter):
    """Lets so many records of one kind pass, and tells with the next one that passes how many it has left out.

    A kind is a logger, a level and the beginning of the message before its arguments are filled in.

    Args:
        burst: records of one kind that pass at once; of errors, which may hold a traceback, a twentieth of it.
        per_s: that pass in the long run; likewise.
        clock: replaced in tests.
    """

    def __init__(self, burst: float, per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._burst, self._per_s, self._clock = burst, per_s, clock
        self._kinds: dict[tuple[str, int, str], tuple[float, float, int]] = {}  # level, when, and how many left out
        self._lock = threading.Lock()

    def filter(self, record: logging.LogRecord) -> bool:
        if not hasattr(record, "passes"):  # each handler asks, of the same record
            record.__dict__["passes"] = self._judge(record)
        return bool(getattr(record, "passes", True))

    def _judge(self, record: logging.LogRecord) -> bool:
        kind = (record.name, record.levelno, str(record.msg)[:32])
        with self._lock:
            if len(self._kinds) >= _KINDS and kind not in self._kinds:
                self._kinds.clear()
            now = self._clock()
            share = _ERRORS if record.levelno >= logging.ERROR else 1.0
            level, at, left_out = self._kinds.get(kind, (self._burst * share, now, 0))
            level = min(self._burst * share, level + (now - at) * self._per_s * share)
            if level < 1:
                self._kinds[kind] = (level, now, left_out + 1)
                return False
            self._kinds[kind] = (level - 1, now, 0)
        if left_out:
            record.fields = {**getattr(record, "fields", {}), "left_out": left_out}
        return True


class _LogFile(logging.FileHandler):
    """A log that goes on when its disk is full or gone; what could not be written is counted, not told of each time."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._failed = 0

    def handleError(self, record: logging.LogRecord) -> None:
        self._failed += 1
        if self._failed & (self._failed - 1) == 0:  # the 1st, 2nd, 4th, 8th, …
            with contextlib.suppress(OSError, ValueError):
                print(f"{self.baseFilename}: {self._failed} log lines could not be written", file=sys.stderr)


def console_of(name: str) -> logging.Handler:
    """Shows warnings on stderr, each capped."""
    console = logging.StreamHandler()
    console.setFormatter(_Line(f"{name}: %(levelname)s %(message)s"))
    console.setLevel(logging.WARNING)
    return console


def log_to(folder: Path, name: str, level: int = logging.INFO, *, flood: FloodFilter | None = None) -> Path:
    """Send this process's log to `<folder>/<name>.jsonl`, warnings to stderr too; returns the file.

    Args:
        flood: what is left out where others can make this process log.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    file, console = _LogFile(path), console_of(name)
    for handler in (file, console) if flood is not None else ():
        handler.addFilter(cast(logging.Filter, flood))
    file.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [file, console]
    root.setLevel(level)
    logging.getLogger("alembic").setLevel(logging.WARNING)
    return path


def backoff(attempt: int, base_s: float = 0.1, cap_s: float = 10.0) -> float:
    """Full-jitter exponential pause before try `attempt` + 1 (attempt counts from 0), seconds."""
    return random.uniform(0, min(cap_s, base_s * 2.0**attempt))


def patiently(work: Callable[[], T], stop: threading.Event) -> T:
    """`work()`, asked again for as long as a server that it needs is away: a long-lived process outlasts them.

    Raises:
        UnavailableError: still away when `stop` was set.
        LwdError: whatever else `work` raises.
    """
    attempt = 0
    while True:
        try:
            return work()
        except UnavailableError as error:
            logging.getLogger(__name__).warning("waiting: %s", error.problem)
            if stop.wait(backoff(attempt)):
                raise
            attempt += 1


def load_callable(spec: str) -> Callable[..., Any]:
    """The function named `module:function`.

    Raises:
        ConfigError: no such module or function.
    """
    module, _, name = spec.partition(":")
    try:
        target = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"cannot load {spec!r}: {error}", "name it as package.module:function") from error
    if not callable(target):
        raise ConfigError(f"{spec!r} is not callable", "name a function")
    return target
