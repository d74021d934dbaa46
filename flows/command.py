"""The program `lwd`: signals are handled from its first line on, before the imports that take their time."""

from __future__ import annotations

import os
import sys

from infra import interrupts
from infra.errors import LwdError


def main() -> None:
    """Run the command line; never a traceback for a signal, at whatever moment."""
    interrupts.install()
    try:
        from flows.cli import main as command

        command()
    except LwdError as error:  # of the imports: the commands' defaults come of `.env`
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        os.write(2, f"\n{interrupts.MESSAGE}\n".encode())
        sys.exit(interrupts.exit_code())


if __name__ == "__main__":
    main()
