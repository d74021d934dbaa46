"""The learner's end in a benchmark: `python -m bench.fleet_reader --home H` reads every snapshot as it comes.

Bytes are verified by the reader; each increment becomes a line of `<home>/reader.jsonl`. Killed, it goes on from its
last line.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path

from infra.errors import UnavailableError
from infra.process import log_to, process_arguments, run_process
from infra.reader import SnapshotReader
from infra.settings import load_settings


def _read(home: Path, stop: threading.Event) -> None:
    settings = load_settings(home=home)
    log_to(settings.logs_dir, "reader")
    path = home / "reader.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if lines and not _whole(lines[-1]):
        lines.pop()
        path.write_text("".join(f"{line}\n" for line in lines))
    after = json.loads(lines[-1])["version"] if lines else 0
    with SnapshotReader(settings, name="learner", after=after) as reader, path.open("a") as log:
        while not stop.is_set():
            try:
                increment = reader.wait(1.0)
            except UnavailableError:
                stop.wait(0.5)
                continue
            if increment is not None:
                line = {"after": increment.after, "version": increment.version, "digest": increment.digest,
                        "added": len(increment.added), "removed": len(increment.removed)}  # fmt: skip
                log.write(json.dumps(line) + "\n")
                log.flush()


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def main() -> int:
    options = process_arguments("bench.fleet_reader", "Read every snapshot, and note each.").parse_args()
    return run_process(options, lambda stop: _read(options.home, stop), label="reader")


if __name__ == "__main__":
    sys.exit(main())
