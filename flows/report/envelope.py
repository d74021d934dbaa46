"""The one envelope of every machine-readable result: what was run, on which commit and machine, for how long."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil
import torch

ROOT = Path(__file__).resolve().parents[2]


def utc_now() -> str:
    """Now, as ISO 8601 to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def matmul_gflops(size: int = 1024, seconds: float = 0.4) -> float:
    """Best rate of fp32 matrix products with the threads that torch is set to use; speeds are shares of it.

    Args:
        size: side of the square matrices.
        seconds: time to try for; the best single product counts, so that a busy neighbour disturbs less.
    """
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator) for _ in range(2))
    torch.mm(a, b)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        begun = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begun)
    return 2 * size**3 / best / 1e9


def machine(*, measure: bool = True) -> dict[str, Any]:
    """Processor, cores that may be used, memory, GPU and the measured matmul rate (None when not measured)."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpu": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
        "matmul_gflops": round(matmul_gflops(), 1) if measure else None,
        "threads": torch.get_num_threads(),
    }


def commit(root: Path = ROOT) -> str:
    """The git commit of the code, or "unknown" outside a repository."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"], cwd=root, capture_output=True, text=True, check=True, timeout=10
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return done.stdout.strip()


@dataclass
class Envelope:
    """Open one before the work, write it after.

    Attributes:
        name: of the result; the file is `<name>.json`.
        command: that makes the result again.
        seeds: used.
    """

    name: str
    command: str
    seeds: Sequence[int]
    started: str = field(default_factory=utc_now)
    machine: Mapping[str, Any] = field(default_factory=machine)
    _begun: float = field(default_factory=time.monotonic, repr=False)

    def document(self, results: Mapping[str, Any], wall_s: float | None = None) -> dict[str, Any]:
        """The envelope around `results`; `wall_s` is the time since it was opened unless given."""
        return {
            "name": self.name,
            "command": self.command,
            "commit": commit(),
            "machine": dict(self.machine),
            "seeds": list(self.seeds),
            "started": self.started,
            "wall_s": round(time.monotonic() - self._begun if wall_s is None else wall_s, 1),
            "results": dict(results),
        }

    def write(self, path: Path, results: Mapping[str, Any], wall_s: float | None = None) -> Path:
        """Write the document, whole or not at all.

        Raises:
            ValueError: a result is NaN or infinite: JSON has no such numbers, and a reader should not have to guess.
        """
        write_json(path, self.document(results, wall_s))
        return path


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside and rename: a reader never sees half a file."""
    text = json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
