"""`python -m flows.stages NAME`: run one stage in the current folder. DVC calls this; so may a person."""

from __future__ import annotations

import importlib
import sys

from flows.console import console
from flows.params import load_params
from infra.errors import LwdError

NAMES = ("demonstrations", "sft", "rollouts", "play", "validate", "buffer", "offline", "evaluate", "report")


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] not in NAMES:
        console.print(f"usage: python -m flows.stages {{{','.join(NAMES)}}}", markup=False)
        return 2
    try:
        importlib.import_module(f"flows.stages.{argv[0]}").run(load_params())
    except LwdError as error:
        console.print(f"stage {argv[0]}: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        console.print(f"stage {argv[0]}: stopped; the same command runs it again", markup=False)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
