"""A whole command on a terminal of its own, as a person has it; and everything that descends from it, however."""

from __future__ import annotations

import contextlib
import os
import pty
import secrets
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

import psutil
from waiting import wait_until

ROOT = Path(__file__).parents[1]
_MARK = "TEST_OF_A_WHOLE_COMMAND"


class Command:
    """`lwd WORDS` in `folder`, leading the foreground of a pseudo-terminal.

    Args:
        program: what to start instead of `lwd`.
        environment: variables added to this process's own; None removes one.
    """

    def __init__(
        self,
        folder: Path,
        *words: str,
        program: Sequence[str] = (sys.executable, "-m", "flows.command"),
        environment: dict[str, str | None] | None = None,
    ) -> None:
        self.mark = secrets.token_hex(8)
        given: dict[str, str | None] = {
            **os.environ, "PREFECT_API_URL": None, "LWD_HOME": None, _MARK: self.mark,
            "PYTHONPATH": str(folder if (folder / "flows").is_dir() else ROOT), **(environment or {}),
        }  # fmt: skip
        self._terminal, theirs = pty.openpty()
        self._output = bytearray()
        self.process = subprocess.Popen(
            [*program, *words], cwd=folder, stdin=theirs, stdout=theirs, stderr=theirs,
            env={name: value for name, value in given.items() if value is not None},
            preexec_fn=_lead_the_terminal,
        )  # fmt: skip
        os.close(theirs)
        threading.Thread(target=self._read, daemon=True).start()

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in [*self.descendants(), psutil.Process(os.getpid())]:
            if process.pid != os.getpid():
                with contextlib.suppress(psutil.Error):
                    process.kill()
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    @property
    def output(self) -> str:
        """What it has written to the terminal."""
        return bytes(self._output).decode(errors="replace")

    def says(self, words: str) -> None:
        """Wait until it has."""
        wait_until(lambda: words in self.output or self.process.poll() is not None, seconds=240.0)
        assert words in self.output, self.output

    def press(self, key: bytes = b"\x03") -> None:
        """Press a key; Ctrl-C if none is named."""
        os.write(self._terminal, key)

    def ends(self, seconds: float = 60.0) -> int:
        """Wait for its exit code."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {seconds:.0f} s:\n{self.output}") from None

    def descendants(self, words: str = "") -> list[psutil.Process]:
        """All living processes that inherited its environment, whoever their parents are by now.

        Args:
            words: only those whose command line has them.
        """
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if (
                    process.pid not in (os.getpid(), self.process.pid)
                    and process.environ().get(_MARK) == self.mark
                    and process.status() != psutil.STATUS_ZOMBIE
                    and words in " ".join(process.cmdline())
                ):
                    found.append(process)
        return found

    def leaves_nothing(self, seconds: float = 10.0) -> None:
        """Assert that no descendant lives a few seconds later."""

        def left() -> str:
            return f"still running: {[' '.join(process.cmdline())[:120] for process in self.descendants()]}"

        wait_until(lambda: not self.descendants(), left, seconds)

    def _read(self) -> None:
        with contextlib.suppress(OSError):  # the other end is closed
            while True:
                select.select([self._terminal], [], [])
                self._output += os.read(self._terminal, 65536)


def _lead_the_terminal() -> None:
    """In the child: a session of its own whose terminal is stdin, and no signal ignored."""
    import fcntl
    import termios

    os.setsid()
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
