"""What every long-lived process shares: stopping cleanly, not outliving its parent, logging as JSON lines."""

from __future__ import annotations

import _thread
import argparse
import ctypes
import importlib
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
from typing import Any, TypeVar

from infra.errors import ConfigError, LwdError, UnavailableError
from infra.loopback import ask_directly
from infra.surroundings import complete

T = TypeVar("T")

_PR_SET_PDEATHSIG = 1
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
        label: what the line on stderr begins with where `work` raises an LwdError.
    """
    if options.parent:
        die_with_parent(options.parent)
    stop = stop_on_signal()
    ask_directly()
    try:
        complete()
        work(stop)
    except LwdError as error:
        print(f"{label}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def redact(text: str) -> str:
    """The text without the secrets of presigned URLs, passwords in URLs, and `token=`-like values."""
    return _SECRET.sub(lambda match: f"{match.group(1) or match.group(2)}***", text)


class JsonLines(logging.Formatter):
    """One JSON object a line; fields given as `extra={"fields": {...}}` are merged in. Secrets are redacted."""

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
            entry["error"] = self.formatException(record.exc_info)
        return redact(json.dumps(entry, default=str))


def log_to(folder: Path, name: str, level: int = logging.INFO) -> Path:
    """Send this process's log to `<folder>/<name>.jsonl`, warnings to stderr too; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    file, console = logging.FileHandler(path), logging.StreamHandler()
    file.setFormatter(JsonLines())
    console.setFormatter(logging.Formatter(f"{name}: %(levelname)s %(message)s"))
    console.setLevel(logging.WARNING)
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
