"""`python -m flows.stages NAME`: run one stage in the current folder. DVC calls this; so may a person."""

from __future__ import annotations

import importlib
import sys

from flows.console import console
from flows.params import load_params
from infra.process import write_any_text
from infra.unexpected import explained

NAMES = ("demonstrations", "sft", "rollouts", "play", "validate", "buffer", "offline", "evaluate", "report")


def main(argv: list[str]) -> int:
    write_any_text()
    if len(argv) != 1 or argv[0] not in NAMES:
        console.print(f"usage: python -m flows.stages {{{','.join(NAMES)}}}")
        return 2
    try:
        importlib.import_module(f"flows.stages.{argv[0]}").run(load_params())
    except KeyboardInterrupt:
        console.print(f"stage {argv[0]}: stopped; the same command runs it again")
        return 130
    except Exception as error:
        known = explained(error)
        console.print(f"stage {argv[0]}: {known}", soft_wrap=True)
        return known.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
