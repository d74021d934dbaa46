"""Ctrl-C, SIGTERM and a closed terminal, for a whole command: the first unwinds it, a second one ends it at once.

The signal becomes `Stopped`, which is no `Exception`: what retries, wraps or records failures lets it pass. Layers that
swallow it all the same are covered by `asked`: nothing is begun after it, and the exit code follows it.
"""

from __future__ import annotations

import _thread
import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

SAME_S = 0.25  # signals this close together are one: `timeout` sends its own twice, to the process and to its group
OTHER_S = 5.0  # so is another signal this soon: Ctrl-C reaches a child, whose parent then tells it by SIGTERM
GRACE_S = 60.0  # how long a command may take to stop
MESSAGE = "stopped; the same command goes on from here"


class Stopped(KeyboardInterrupt):
    """A person, or the system, asked this command to stop.

    Args:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


class _State:
    def __init__(self) -> None:
        self.process: int | None = None  # whose handlers these are; a forked child has the parent's state
        self.number: int | None = None
        self.at = 0.0
        # Deliveries of our own of what came at a moment that swallows exceptions: sent, and seen by each reader.
        self.sent = self.handled = self.heard = 0
        self.on_end: Callable[[], object] = lambda: None


_state = _State()


def install(on_end: Callable[[], object] | None = None) -> None:
    """Take SIGINT, SIGTERM and SIGHUP over; those that the caller had this process ignore stay ignored. Main thread.

    Args:
        on_end: what `end_at_once` does before the process ends, for example ending what it has started.
    """
    if on_end is not None:
        _state.on_end = on_end
    if _state.process == os.getpid() or threading.current_thread() is not threading.main_thread():
        return
    _state.process, _state.number = os.getpid(), None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, handle)
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
    _thread.start_new_thread(_listen, (ours,))


def installed() -> bool:
    """Whether this process has the handlers."""
    return _state.process == os.getpid()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. Processes started in it are never interrupted by the terminal: one whose
    interpreter is still starting would print a traceback."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def asked() -> int | None:
    """The signal that asked this command to stop; None while none has."""
    return _state.number


def check() -> None:
    """Raise `Stopped` if a signal came before, wherever its exception went."""
    if _state.number is not None:
        raise Stopped(_state.number)


def exit_code() -> int:
    """Of a stopped command: 128 and the signal's number, as shells count."""
    return 128 + (_state.number or signal.SIGINT)


def end_at_once() -> None:
    """End this process and what it has started, without unwinding."""
    try:
        if sys.stderr.isatty():
            os.write(2, b"\x1b[?25h")  # a live bar hides the cursor
        os.write(2, f"\n{MESSAGE}\n".encode())
    except (OSError, ValueError, AttributeError):
        pass  # the terminal is gone
    try:
        _state.on_end()
    finally:
        os._exit(exit_code())


def handle(number: int, frame: FrameType | None) -> None:
    """The handler: raises `Stopped` in the main thread, once."""
    if _state.process != os.getpid():  # a forked child: it ends as one without a handler would
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
        return
    if _state.handled < _state.sent:
        _state.handled += 1
    elif _state.number is not None:
        if _is_second(number, _state.number, _state.at):
            end_at_once()
        return
    else:
        _state.number, _state.at = number, time.monotonic()
        _thread.start_new_thread(_deadline, ())
    if _swallows(frame):
        _thread.start_new_thread(_deliver_again, (number,))
        return
    raise Stopped(number)


def _listen(ours: int) -> None:
    """Read what the C level was sent, also while the main thread is busy in C: the second signal ends all here."""
    first: tuple[int, float] | None = None
    while True:
        for number in os.read(ours, 64):
            if number not in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                continue
            if _state.heard < _state.sent:
                _state.heard += 1
            elif first is None:
                first = (number, time.monotonic())
            elif _is_second(number, *first):
                end_at_once()


def _is_second(number: int, first: int, at: float) -> bool:
    """Whether a signal is a second wish, rather than the first one in other words."""
    return time.monotonic() - at > (SAME_S if number == first else OTHER_S)


def _deadline() -> None:
    time.sleep(GRACE_S)
    end_at_once()


def _deliver_again(number: int) -> None:
    time.sleep(0.05)
    _state.sent += 1
    signal.pthread_kill(threading.main_thread().ident or 0, number)


def _swallows(frame: FrameType | None) -> bool:
    """Whether an exception raised here would only be printed: in a finaliser, or in the import system's callback."""
    while frame is not None:
        code = frame.f_code
        if code.co_name == "__del__" or (code.co_name == "cb" and "importlib" in code.co_filename):
            return True
        frame = frame.f_back
    return False
