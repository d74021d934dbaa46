"""The process that examines: it reads what robots made and runs the contract, within a budget of time and memory.

A regular expression, a parser or an allocation may take for ever on crafted bytes, and no exception ends it. So the
coordinator has this done by a process that it can kill. The process stays from one episode to the next. An episode that
ends it twice, or twice is not done in time, is refused, and the next is read by a fresh process; so is one for which
there is no memory, since those before it may have left some in use. Its answers are JSON
and no pickle: nothing that it sends is run by the coordinator.

    python -m infra.examination --socket 7 --check data_contracts.checks:default_check --parent 4711
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from infra.errors import ConfigError, LwdError, UnavailableError, shown
from infra.judge import (
    OUT_OF_MEMORY,
    Announced,
    BatchCheck,
    Check,
    Judgement,
    Reason,
    judge,
    judge_together,
    reason,
    refused,
)
from infra.process import console_of, die_with_parent, load_callable

log = logging.getLogger(__name__)
TRIES = 2  # of an episode, each by a fresh process after the first failed
START_S = 120.0  # to import the contract's check
_LENGTH = struct.Struct("<Q")
_MAX_ANSWER = 2**22


class Examination(Protocol):
    """Who judges the bytes."""

    together: bool  # whether there is a check for several

    def judge(self, event: Announced, data: bytes) -> Judgement:
        """The judgement of one object."""

    def judge_together(self, objects: Mapping[str, bytes]) -> dict[str, list[Reason]]:
        """What the check for several says of each accepted episode; their bytes by id."""

    def close(self) -> None: ...


class InProcess:
    """Examines within this process: for tests, and for tools that trust what they read."""

    def __init__(self, check: Check, batch_check: BatchCheck | None = None) -> None:
        self._check = check
        self._batch_check = batch_check
        self.together = batch_check is not None

    def judge(self, event: Announced, data: bytes) -> Judgement:
        return judge(data, event, self._check)

    def judge_together(self, objects: Mapping[str, bytes]) -> dict[str, list[Reason]]:
        assert self._batch_check is not None
        return judge_together(objects, self._batch_check)

    def close(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class _Lost:
    """The process did not answer: why, and at which stage it was."""

    rule: str
    message: str
    stage: str


class OwnProcess:
    """Examines in a process of its own, which is started when it is first needed. For one thread.

    Args:
        check: `module:function`, the data contract for one episode.
        batch_check: the same for several.
        seconds: that one episode may take.
        memory_mib: that one may take beyond what the process has at rest.
    """

    def __init__(
        self, check: str, batch_check: str | None = None, *, seconds: float = 30.0, memory_mib: int = 2048
    ) -> None:
        self._arguments = ["--check", check, *(["--batch-check", batch_check] if batch_check else [])]
        self.together = batch_check is not None
        self._seconds = seconds
        self._memory_mib = memory_mib
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None

    def start(self) -> None:
        """Start the process now, so that a check which cannot be loaded is known.

        Raises:
            ConfigError, UnavailableError: as `judge`.
        """
        self._started()

    def judge(self, event: Announced, data: bytes) -> Judgement:
        """The judgement of one object.

        Raises:
            ConfigError: the check cannot be loaded.
            UnavailableError: the process cannot be started: that is no episode's fault.
        """
        names = ("episode_id", "robot_id", "schema_version", "key")
        found = self._ask({"event": {name: getattr(event, name) for name in names}}, [data], self._seconds)
        if isinstance(found, _Lost):
            return refused(found.stage, found.rule, found.message)
        return Judgement(found["stage"], found["reasons"], found["told"])

    def judge_together(self, objects: Mapping[str, bytes]) -> dict[str, list[Reason]]:
        """What the batch check says of each episode; where it does not end for all of them, each is asked for alone.

        Raises:
            ConfigError, UnavailableError: as `judge`.
        """
        # The first time it may import much; each episode has its own share of time.
        seconds = START_S + self._seconds * len(objects)
        found = self._ask({"event": None, "names": list(objects)}, list(objects.values()), seconds)
        if not isinstance(found, _Lost):
            return dict(found["by_episode"])
        if len(objects) > 1:
            return {name: self.judge_together({name: data})[name] for name, data in objects.items()}
        return {name: [reason(found.rule, "block", found.message)] for name in objects}

    def close(self) -> None:
        """End the process; it is started again when it is needed."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _ask(self, request: dict[str, Any], objects: Sequence[bytes], seconds: float) -> Any:
        answer: Any = None
        for _ in range(TRIES):
            is_fresh = self._socket is None
            answer = self._exchange(self._started(), request, objects, seconds)
            if isinstance(answer, _Lost):
                log.warning("the examination is started again: %s", answer.message)
            elif is_fresh or not _is_out_of_memory(answer):
                return answer
            self.close()
        return answer

    def _exchange(
        self, connection: socket.socket, request: dict[str, Any], objects: Sequence[bytes], seconds: float
    ) -> Any:
        stage, deadline = "decode", time.monotonic() + seconds
        try:
            connection.settimeout(seconds)
            header = json.dumps({**request, "sizes": [len(data) for data in objects]}).encode()
            connection.sendall(_LENGTH.pack(len(header)) + header)
            for data in objects:
                connection.settimeout(max(0.001, deadline - time.monotonic()))
                connection.sendall(data)
            while "at" in (answer := _receive(connection, deadline)):
                stage = str(answer["at"])
            return answer
        except TimeoutError:
            return _Lost("time budget", f"not examined within {seconds:g} s, {TRIES} times", stage)
        except (OSError, EOFError, ValueError) as error:
            # Its own death, by a signal of the kernel's or of a library: that is all that is known of it.
            return _Lost("process", f"the process that examined it ended ({_end(self._process, error)})", stage)

    def _started(self) -> socket.socket:
        """The connection to a process that is ready."""
        if self._socket is not None:
            return self._socket
        ours, theirs = socket.socketpair()
        command = [sys.executable, "-m", "infra.examination", "--socket", str(theirs.fileno()), *self._arguments]
        command += ["--parent", str(os.getpid()), "--memory-mib", str(self._memory_mib)]
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"},
            )
            theirs.close()
            self._socket = ours
            answer = _receive(ours, time.monotonic() + START_S)
        except (OSError, EOFError, ValueError) as error:
            theirs.close()
            ours.close()
            how = _end(self._process, error)
            self.close()
            raise UnavailableError(
                f"the process that examines episodes does not start ({how})",
                "see the coordinator's log, and that the machine has memory and processes left",
            ) from error
        if "problem" in answer:
            self.close()
            raise ConfigError(str(answer["problem"]), str(answer["fix"]))
        return ours


def _is_out_of_memory(answer: dict[str, Any]) -> bool:
    return any(one["rule"] == OUT_OF_MEMORY for one in answer.get("reasons", ()))


def _end(process: subprocess.Popen[bytes] | None, error: Exception) -> str:
    """How it ended: a signal's name, an exit code, or the error that was seen of it."""
    code = None
    if process is not None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = process.wait(1.0)
    if code is None:
        return shown(f"{type(error).__name__}: {error}")
    with contextlib.suppress(ValueError):
        return signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return f"signal {-code}"


def _receive(connection: socket.socket, deadline: float) -> Any:
    """One message; TimeoutError past the deadline, EOFError when the other side is gone."""
    (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size, deadline))
    if size > _MAX_ANSWER:
        raise ValueError(f"an answer of {size} bytes")
    answer = json.loads(_exactly(connection, size, deadline))
    if not isinstance(answer, dict):
        raise ValueError("no answer")
    return answer


def _exactly(connection: socket.socket, size: int, deadline: float | None = None) -> bytearray:
    data = bytearray(size)
    view, at = memoryview(data), 0
    while at < size:
        if deadline is not None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
        if not (count := connection.recv_into(view[at:])):
            raise EOFError("the other side closed")
        at += count
    return data


# --- the process itself -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Event:
    """An announcement, as it comes to this process."""

    episode_id: str
    robot_id: str
    schema_version: int
    key: str


def _send(connection: socket.socket, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    connection.sendall(_LENGTH.pack(len(body)) + body)


def _limit_memory(mib: int) -> None:
    """The address space may grow by so much from here; an allocation beyond it is a MemoryError."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
    except OSError:  # no Linux: only the time is limited
        return
    most = pages * resource.getpagesize() + mib * 2**20
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _requests(connection: socket.socket) -> Iterator[tuple[dict[str, Any], list[bytes]]]:
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            (size,) = _LENGTH.unpack(_exactly(connection, _LENGTH.size))
            request = json.loads(_exactly(connection, size))
            yield request, [bytes(_exactly(connection, one)) for one in request["sizes"]]


def _work(connection: socket.socket, check: Check, batch_check: BatchCheck | None) -> None:
    def decoded() -> None:
        _send(connection, {"at": "contract"})

    for request, objects in _requests(connection):
        if request["event"] is None:
            assert batch_check is not None
            by_name = dict(zip(request["names"], objects, strict=True))
            _send(connection, {"by_episode": judge_together(by_name, batch_check)})
            continue
        found = judge(objects[0], _Event(**request["event"]), check, decoded=decoded)
        answer = {"stage": found.stage, "reasons": found.reasons, "told": found.told}
        del objects, found
        try:
            _send(connection, answer)
        except (TypeError, ValueError, RecursionError) as error:  # what the check let pass is not even JSON
            lost = refused("contract", "row", f"the catalog cannot keep what it says: {error}")
            _send(connection, {"stage": lost.stage, "reasons": lost.reasons, "told": {}})


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infra.examination`: answer until the other end of the socket is closed."""
    parser = argparse.ArgumentParser(prog="python -m infra.examination", description="Examine episodes.")
    parser.add_argument("--socket", type=int, required=True, help="an open descriptor, to the coordinator")
    parser.add_argument("--check", required=True, help="module:function, the data contract for one episode")
    parser.add_argument("--batch-check", help="module:function, for several")
    parser.add_argument("--parent", type=int, required=True, help="end when this process ends")
    parser.add_argument("--memory-mib", type=int, required=True, help="that an episode may take")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):  # its end is the coordinator's to say
        signal.signal(number, signal.SIG_IGN)
    die_with_parent(options.parent, signal.SIGKILL)
    logging.getLogger().addHandler(console_of("examination"))
    connection = socket.socket(fileno=options.socket)
    loaded: list[Callable[..., Any] | None] = []
    try:
        loaded += [load_callable(spec) if spec else None for spec in (options.check, options.batch_check)]
    except LwdError as error:
        _send(connection, {"problem": error.problem, "fix": error.fix})
        return error.exit_code
    _limit_memory(options.memory_mib)
    _send(connection, {"ready": True})
    check, batch_check = loaded
    assert check is not None
    _work(connection, check, batch_check)
    return 0


if __name__ == "__main__":
    sys.exit(main())
