"""The learner's end in a benchmark: `python -m bench.fleet_reader --home H` reads every snapshot as it comes.

Bytes are verified by the reader; each increment becomes a line of `<home>/reader.jsonl`. Killed, it goes on from its
last line.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from infra.errors import LwdError, UnavailableError
from infra.process import die_with_parent, log_to, stop_on_signal
from infra.reader import SnapshotReader
from infra.settings import load_settings


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--parent", type=int)
    options = parser.parse_args()
    if options.parent:
        die_with_parent(options.parent)
    stop = stop_on_signal()
    settings = load_settings(home=options.home)
    log_to(settings.logs_dir, "reader")
    path = options.home / "reader.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    if lines and not _whole(lines[-1]):
        lines.pop()
        path.write_text("".join(f"{line}\n" for line in lines))
    after = json.loads(lines[-1])["version"] if lines else 0
    try:
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
    except LwdError as error:
        print(f"reader: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _whole(line: str) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    sys.exit(main())
