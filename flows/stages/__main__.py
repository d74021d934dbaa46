"""`python -m flows.stages NAME`: run one stage in the current folder. DVC calls this; so may a person."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from infra import interrupts, loopback, surroundings

if __name__ == "__main__":  # before the imports that take their time
    interrupts.install()

from flows.console import console
from flows.params import load_params
from flows.pipeline import alone
from infra.errors import LwdError
from infra.lifeline import end_with_ancestors
from infra.process import die_with_parent

NAMES = ("demonstrations", "sft", "rollouts", "play", "validate", "buffer", "offline", "evaluate", "report")


def main(argv: list[str]) -> int:
    if len(argv) != 1 or argv[0] not in NAMES:
        console.print(f"usage: python -m flows.stages {{{','.join(NAMES)}}}", markup=False)
        return 2
    if "DVC_STAGE" in os.environ:
        die_with_parent(os.getppid())
        end_with_ancestors()
    loopback.ask_directly()
    try:
        surroundings.complete()
        with alone(argv[0]):
            importlib.import_module(f"flows.stages.{argv[0]}").run(load_params())
            interrupts.check()
    except LwdError as error:
        console.print(f"stage {argv[0]}: {error}", markup=False, soft_wrap=True)
        return error.exit_code
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            console.print(f"stage {argv[0]}: stopped; the same command runs it again", markup=False)
        return interrupts.exit_code()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
