"""A benchmark's envelope: `Envelope(name, command, seeds)` before the work, `.write(path, results)` after.

It is the same as the demo report's, which lives with the report because the installed `lwd` has no `bench`.
"""

from __future__ import annotations

from pathlib import Path

from flows.report.envelope import ROOT, Envelope, commit, machine, matmul_gflops, utc_now, write_json

RESULTS: Path = ROOT / "docs" / "results"
"""Where committed results lie."""

__all__ = ["RESULTS", "ROOT", "Envelope", "commit", "machine", "matmul_gflops", "utc_now", "write_json"]
