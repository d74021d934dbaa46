"""A TCP proxy that does to a connection what networks and servers do: delay, limit, cut, reset, refuse, be silent.

    with FaultProxy("127.0.0.1", 9000) as proxy:
        client = connect("127.0.0.1", proxy.port)
        proxy.delay_s = 0.05                    # both ways, from now on
        proxy.set(cut_after_bytes=1000, cut_times=1)
        ...
        proxy.clear()
        assert proxy.counts()["cut"] == 1       # the fault did happen

It runs in a process of its own (`proxy_process.py`): it takes no time from the test's, and children forked there do not
hold its connections open. A fault is in force when its assignment returns. Without faults it carries some 400 MB/s on
loopback. It ends with `close`, or with the process that started it.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Faults:
    """What is done to the traffic; the defaults do nothing.

    Attributes:
        delay_s: added to each direction, seconds. At most 64 MiB (4 MiB with a limit) per connection are on their way.
        rate_bytes_s: of the link, in each direction, shared by all connections; None for no limit.
        cut_after_bytes: of the answers on a connection, counted from when this was set (or it opened): the next byte
            cuts it. With 0 the whole request reaches the server and nothing of its answer comes back.
        cut_times: so many connections are cut, then no more; None for all.
        cut_gently: the cut is an orderly end of the stream (FIN), not a reset (RST).
        refuse: new connections are accepted and closed at once; open ones are left (see `reset`).
        blackhole: what either side sends is swallowed, on open connections and new ones; those it was done to stay so.
        status: the HTTP status with which requests are answered here, and not by the server:
        status_requests: the next so many. Each is read to its end; its connection is closed after the answer. For
            HTTP/1.1 without TLS and pipelining.
    """

    delay_s: float = 0.0
    rate_bytes_s: float | None = None
    cut_after_bytes: int | None = None
    cut_times: int | None = None
    cut_gently: bool = False
    refuse: bool = False
    blackhole: bool = False
    status: int = 503
    status_requests: int = 0


class _Fault:
    """A fault as an attribute of the handle, kept by the proxy's process, which counts some down."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, proxy: FaultProxy, owner: type) -> Any:
        return proxy.faults()[self._name]

    def __set__(self, proxy: FaultProxy, value: object) -> None:
        proxy.set(**{self._name: value})


class FaultProxy:
    """Handle of a running proxy; threads may share it. It has the attributes of `Faults`.

    Args:
        target_host, target_port: where connections go; nothing need listen there yet.
        port: to listen on, on loopback; any free one by default.

    Attributes:
        port: where it listens.
    """

    delay_s, rate_bytes_s, refuse, blackhole = _Fault(), _Fault(), _Fault(), _Fault()
    cut_after_bytes, cut_times, cut_gently = _Fault(), _Fault(), _Fault()
    status, status_requests = _Fault(), _Fault()

    def __init__(self, target_host: str, target_port: int, port: int = 0) -> None:
        self._lock = threading.Lock()
        argv = [sys.executable, "-m", "infra.servers.proxy_process", target_host, str(target_port), str(port)]
        self._process = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.port: int = self._answer()["port"]

    def set(self, **faults: object) -> None:
        """Set several faults at once; the others stay."""
        if unknown := faults.keys() - asdict(Faults()).keys():
            raise TypeError(f"no such fault: {sorted(unknown)[0]}")
        self._ask({"set": faults})

    def faults(self) -> dict[str, Any]:
        """The faults in force, with what is left of those that are counted."""
        return dict(self._ask({"faults": True})["faults"])

    def clear(self) -> None:
        """No fault any more. Connections that were swallowed from stay silent: they have lost bytes."""
        self.set(**asdict(Faults()))

    def reset(self) -> int:
        """Reset (RST) all open connections, on both sides; how many they were."""
        return int(self._ask({"reset": True})["reset"])

    def counts(self) -> dict[str, int]:
        """Connections `open` now; since the start, those `accepted`, `refused`, `cut`, `reset`, the requests `answered`
        here, and the bytes that went `up` to the target and came `down` from it.
        """
        return dict(self._ask({"counts": True})["counts"])

    def close(self) -> None:
        """End it, and its connections."""
        self._process.kill()
        self._process.communicate()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: dict[str, object]) -> dict[str, Any]:
        with self._lock:
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the fault proxy has ended; its message is above")
        return dict(json.loads(line))
