"""Whoever ends a command ends all that it started, by SIGKILL too.

A command marks its environment, which every process below it inherits through shells, sessions and changes of parent,
and starts one small watcher outside its session. The watcher holds the other end of a pipe; when the command is gone,
in whichever way, it ends what bears the mark. Until then it also holds the command's locks, so that the next command
does not begin beside what is left of this one.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence

import psutil

from infra.errors import UnavailableError

MARK = "LWD_COMMAND_ID"
_PATIENCE_S = 4.0  # between SIGTERM and SIGKILL
_GIVE_UP_S = 60.0  # a process in an uninterruptible state cannot be ended by anyone


@contextlib.contextmanager
def lifeline(locks: Sequence[int] = ()) -> Iterator[str]:
    """Mark this process's environment and watch over it; at the end of the block nothing that it started lives.

    Args:
        locks: open files whose locks are kept until the last process has ended.

    Yields:
        the mark.

    Raises:
        UnavailableError: the watcher could not be started.
    """
    before, mark = os.environ.get(MARK), f"{os.getpid()}-{secrets.token_hex(8)}"
    theirs, ours = os.pipe()
    environment = {name: value for name, value in os.environ.items() if name != MARK}
    try:
        watcher = subprocess.Popen(
            [sys.executable, "-m", "infra.lifeline", mark, str(theirs)],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
            pass_fds=(theirs, *locks), start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        os.close(theirs)
        os.close(ours)
        raise UnavailableError(f"no process can be started: {error}", "free memory or processes, then again") from error
    os.close(theirs)
    os.environ[MARK] = mark
    try:
        yield mark
    finally:
        end_all(mark, spare=(watcher.pid,))
        os.close(ours)
        watcher.returncode = 0  # it ends by itself; nobody waits for it
        if before is None:
            os.environ.pop(MARK, None)
        else:
            os.environ[MARK] = before


def bearing(mark: str, chosen: Callable[[dict[str, str]], bool] = lambda _: True) -> list[psutil.Process]:
    """Living processes other than this one whose environment bears the mark and is `chosen`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):  # ended meanwhile, or another user's
            if process.pid == os.getpid() or process.status() == psutil.STATUS_ZOMBIE:
                continue
            environment = process.environ()
            if environment.get(MARK) == mark and chosen(environment):
                found.append(process)
    return found


def end_all(
    mark: str | None = None,
    *,
    chosen: Callable[[dict[str, str]], bool] = lambda _: True,
    spare: Sequence[int] = (),
    patience_s: float = _PATIENCE_S,
) -> None:
    """SIGTERM to all that bear the mark (this process's own by default), SIGKILL to what is left after `patience_s`."""
    mark = mark or os.environ.get(MARK)
    if mark is None:
        return
    told: set[tuple[int, float]] = set()
    started = time.monotonic()
    while time.monotonic() - started < _GIVE_UP_S:
        left = [process for process in bearing(mark, chosen) if process.pid not in spare]
        if not left:
            return
        late = time.monotonic() - started >= patience_s
        for process in left:
            with contextlib.suppress(psutil.Error):
                who = (process.pid, process.create_time())
                if late:
                    process.kill()
                elif who not in told:
                    told.add(who)
                    process.terminate()
                    process.send_signal(signal.SIGCONT)  # a stopped one would not hear
        time.sleep(0.05)


def kill_all() -> None:
    """SIGKILL to all that bear this process's mark."""
    end_all(patience_s=0.0)


def end_with_ancestors(seconds: float = 0.5) -> None:
    """End this process when the one that it works for ends, also where a shell stands between the two.

    PR_SET_PDEATHSIG knows the parent alone, and a shell that waits for its command outlives whoever started it.
    """
    ancestors = []
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process().parents():
            if process.pid == 1:
                break
            ancestors.append(process)
            if not _is_shell(process):
                break
    if not ancestors:
        return

    def watch() -> None:
        while all(_lives(process) for process in ancestors):
            time.sleep(seconds)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_PATIENCE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, name="lifeline", daemon=True).start()


def _is_shell(process: psutil.Process) -> bool:
    return process.name() in {"sh", "bash", "dash", "zsh", "fish", "ksh", "tcsh", "csh", "ash", "busybox"}


def _lives(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.Error):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def _watch(mark: str, pipe: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.chdir("/")
    while os.read(pipe, 64):
        pass
    end_all(mark)


if __name__ == "__main__":
    _watch(sys.argv[1], int(sys.argv[2]))
