"""Operation logs: what a benchmark's robots did and were told, in lines that survive a kill."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class OperationLog:
    """Appended lines that survive a kill: `{"op": "closed" | "sent" | "confirmed" | "trouble", …}` with the time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torn = path.exists() and not path.read_bytes().endswith(b"\n")
        self._handle = path.open("a")
        self._lock = threading.Lock()
        if torn:
            self._handle.write("\n")

    def write(self, op: str, *, durable: bool = False, **fields: Any) -> None:
        with self._lock:
            self._handle.write(json.dumps({"op": op, "at": time.time(), **fields}) + "\n")
            self._handle.flush()
            if durable:
                os.fsync(self._handle.fileno())


def operations(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines of all logs in a folder; one that a kill tore is left out."""
    for path in sorted(folder.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            with contextlib.suppress(ValueError):
                yield json.loads(text)
