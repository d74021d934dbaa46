"""`python -m flows.stages NAME`: run one stage in the current folder. DVC calls this; so may a person."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys

from infra import interrupts, loopback, surroundings

NAMES = (
    "contracts", "demonstrations", "sft", "rollouts", "play", "validate", "buffer", "offline", "evaluate", "report",
)  # fmt: skip


def main(argv: list[str]) -> int:
    """The stage's exit code; never a traceback for a signal, at whatever moment."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, f"stage {' '.join(argv)}: stopped; the same command runs it again\n".encode())
        return interrupts.exit_code()


def _run(argv: list[str]) -> int:
    # Within: these take their time, and a signal may come meanwhile.
    from flows.console import console
    from flows.params import load_params
    from flows.pipeline import alone
    from infra.lifeline import end_with_ancestors
    from infra.process import die_with_parent, write_any_text
    from infra.unexpected import explained

    write_any_text()
    if len(argv) != 1 or argv[0] not in NAMES:
        console.print(f"usage: python -m flows.stages {{{','.join(NAMES)}}}")
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
    except Exception as error:
        known = explained(error)
        console.print(f"stage {argv[0]}: {known}", soft_wrap=True)
        return known.exit_code
    return 0


if __name__ == "__main__":
    interrupts.install()
    sys.exit(main(sys.argv[1:]))
