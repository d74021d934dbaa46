"""The servers' own bookkeeping, with a small server of ours; the real ones are in tests/system."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from infra.errors import ConfigError, UnavailableError
from infra.servers import toolchain
from infra.servers.server import Server
from infra.servers.toolchain import HOST, free_port, http_status, locked, refusal


class Web(Server):
    """Python's own web server."""

    name, wanted, start_timeout_s = "web", "1", 60.0
    further_ports = ("second_port",)
    obtained = 0

    @property
    def prepared(self) -> bool:
        return (self.programs / "web").exists()

    def obtain(self) -> None:
        (self.programs / "web").touch()
        self.obtained += 1

    def command(self):
        return [sys.executable, "-m", "http.server", "--bind", HOST, str(self.port)], {}


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    server = Web(tmp_path / "programs", tmp_path / "data")
    yield server
    server.kill()


def test_it_serves_until_it_is_stopped_and_keeps_its_port(web: Web) -> None:
    assert not web.ready() and web.pid is None
    web.start()
    port, pid = web.port, web.pid
    assert web.ready() and pid
    web.start()  # a second start finds it
    assert web.pid == pid
    web.stop()
    assert (web.pid, web.crashed, refusal(port)) == (None, False, None)
    web.start()
    assert web.port == port
    assert web.obtained == 1, "the program is made once"


def test_a_killed_one_is_seen_and_started_again(web: Web) -> None:
    web.start()
    number = web.pid
    web.kill()
    assert web.crashed and not web.ready()
    assert number is not None and not psutil.pid_exists(number), "its number is free again"
    web.start()
    assert web.ready() and not web.crashed


def test_another_object_or_process_knows_it_too(web: Web) -> None:
    web.start()
    other = Web(web.programs, web.data)
    assert (other.pid, other.port, other.ready()) == (web.pid, web.port, True)
    other.stop()
    assert (web.pid, web.crashed) == (None, False)


def test_two_that_start_it_at_once_start_one(web: Web) -> None:
    pids: list[int | None] = []

    def start() -> None:
        mine = Web(web.programs, web.data)
        mine.start()
        pids.append(mine.pid)

    threads = [threading.Thread(target=start) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pids == [web.pid] * 3


def test_another_process_with_its_number_is_not_taken_for_it(web: Web) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        web.folder()
        for record in (f"{other.pid} 1.0", f"{other.pid} 1.0\nweb\0serve", "rubbish", ""):
            (web.data / "pid").write_text(record)
            assert web.pid is None and web.crashed
        assert other.poll() is None
        other.stdin.close()


def test_it_is_known_by_its_command_when_the_clock_was_set(web: Web) -> None:
    web.start()
    line, _, command = (web.data / "pid").read_text().partition("\n")
    (web.data / "pid").write_text(f"{line.split()[0]} {psutil.boot_time() - 3600.0}\n{command}")
    assert web.pid == int(line.split()[0])


def test_the_exit_status_of_other_children_is_left_to_their_owner(web: Web) -> None:
    with subprocess.Popen([sys.executable, "-c", "raise SystemExit(3)"]) as other:
        web.start()
        web.kill()
        assert other.wait() == 3


def test_one_whose_first_thread_has_ended_still_runs(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a killed server's does for a moment on a busy machine, while the others still hold its port."""
    ends = "import ctypes, os, sys, threading, http.server as h; "
    ends += f"s = h.HTTPServer(({HOST!r}, {web.port}), h.SimpleHTTPRequestHandler); "
    ends += "threading.Thread(target=s.serve_forever).start(); "
    ends += (
        "ctypes.CDLL(None).syscall({'x86_64': 60, 'aarch64': 93}[os.uname().machine], 0)  # exit of this thread alone"
    )
    monkeypatch.setattr(web, "command", lambda: ([sys.executable, "-c", ends], {}))
    web.start()
    process = psutil.Process(web.pid)
    while process.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.01)
    assert web.ready() and not web.crashed
    web.kill()
    assert web.crashed and refusal(web.port) is None


def test_a_port_in_use_is_named_with_who_has_it(web: Web) -> None:
    for name in ("port", "second_port"):
        with socket.socket() as other:
            other.bind((HOST, web.named_port(name)))
            other.listen()
            with pytest.raises(ConfigError, match=rf"web cannot have port {web.named_port(name)} on .*\(process \d+\)"):
                web.start()


def test_a_port_that_is_given_is_kept(web: Web) -> None:
    port = free_port()
    assert Web(web.programs, web.data, port).port == port
    assert web.port == port
    assert Web(web.programs, web.data, port + 1).port == port + 1


def test_chosen_ports_are_none_that_the_kernel_gives_to_clients(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "range").write_text("32768\t60999\n")
    monkeypatch.setattr(toolchain, "_EPHEMERAL", tmp_path / "range")
    assert all(20_000 <= free_port() < 32_768 for _ in range(20))
    assert len({free_port() for _ in range(50)}) == 50, "none is given twice"
    (tmp_path / "range").write_text("1024\t65535\n")  # no room below
    assert 10_000 <= free_port() < 65_536


def test_one_that_ends_at_once_tells_its_last_words(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [sys.executable, "-c", "raise SystemExit('no disk')"]
    monkeypatch.setattr(web, "command", lambda: (words, {}))
    with pytest.raises(UnavailableError, match="no disk"):
        web.start()


def test_one_that_never_serves_is_given_up(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "command", lambda: ([sys.executable, "-c", "import time; time.sleep(60)"], {}))
    web.start_timeout_s = 0.3
    with pytest.raises(UnavailableError, match="web does not serve after 0 s"):
        web.start()
    assert web.pid is not None and not web.ready()


def test_one_that_does_not_heed_the_signal_is_killed(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    deaf = "import signal, http.server as h; signal.signal(15, signal.SIG_IGN); "
    deaf += f"h.HTTPServer(({HOST!r}, {web.port}), h.SimpleHTTPRequestHandler).serve_forever()"
    monkeypatch.setattr(web, "command", lambda: ([sys.executable, "-c", deaf], {}))
    web.start()
    web.stop(timeout_s=0.2)
    assert web.pid is None and not web.crashed


def test_a_lock_is_held_by_one(tmp_path: Path) -> None:
    order, entered = [], threading.Event()

    def second() -> None:
        entered.set()
        with locked(tmp_path / "lock"):
            order.append("second")

    with locked(tmp_path / "lock"):
        thread = threading.Thread(target=second)
        thread.start()
        entered.wait()
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


@pytest.mark.parametrize("words", [b"SSH-2.0-x\r\n", b"HTTP/1.1 abc\r\n\r\n", b""])
def test_what_does_not_speak_http_has_no_status(words: bytes) -> None:
    with socket.create_server((HOST, 0)) as listener:

        def answer() -> None:
            caller, _ = listener.accept()
            with caller:
                caller.recv(1000)
                caller.sendall(words)

        thread = threading.Thread(target=answer)
        thread.start()
        assert http_status(f"http://{HOST}:{listener.getsockname()[1]}/") is None
        thread.join()
