"""A user without an entry, a home or a cache, and proxies that must not be asked for loopback: real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from infra.loopback import ask_directly

NAMES = ("HOME", "USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME", "MPLCONFIGDIR")
ASK = """
import getpass, os, pathlib
from infra.surroundings import complete
complete()
print(getpass.getuser(), pathlib.Path.home(), pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser())
"""


def as_nobody(*words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user of number 12345, who has no entry."""
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    inside = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*inside, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this machine lets no user have a name space")
    return subprocess.run(
        [*inside, sys.executable, *words],
        env=kept | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_a_user_without_an_entry_or_a_home_has_a_name_and_a_private_folder(tmp_path: Path) -> None:
    done = as_nobody("-c", ASK, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["uid-12345", str(tmp_path / "lwd-12345"), str(tmp_path / "lwd-12345" / ".cache")]
    assert (tmp_path / "lwd-12345").stat().st_mode & 0o777 == 0o700


def test_what_is_there_stays_as_it_is(tmp_path: Path) -> None:
    done = as_nobody("-c", ASK, TMPDIR=str(tmp_path), HOME=str(tmp_path), USER="ada")
    assert done.stdout.split() == ["ada", str(tmp_path), str(tmp_path / ".cache")]


def test_a_folder_of_somebody_else_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    (tmp_path / "lwd-12345").symlink_to(tmp_path / "elsewhere")
    done = as_nobody("-m", "flows.command", "policies", "--home", str(tmp_path / "home"), TMPDIR=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "lwd-12345" in done.stderr and "fix:" in done.stderr


def test_such_a_user_can_use_a_home(tmp_path: Path) -> None:
    home = str(tmp_path / "home")
    done = as_nobody("-m", "flows.command", "robots", "enrol", "r1", "--home", home, TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr


def test_without_shared_memory_scenes_run_in_the_process_itself(tmp_path: Path) -> None:
    code = (
        "from infra.fleet.sources import demonstrations\n"
        "print(len(list(demonstrations(['S1'], 2, 0, noise=0.15, workers=2))))\n"
    )
    (tmp_path / "code.py").write_text(code)
    script = f"mount -t tmpfs -o ro none /dev/shm && exec {sys.executable} {tmp_path / 'code.py'}"
    if (
        shutil.which("unshare") is None
        or subprocess.run(
            ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o ro none /dev/shm"], capture_output=True, check=False
        ).returncode
    ):
        pytest.skip("this user may not mount")
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", script], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.stdout.strip() == "2", done.stderr
    assert "no worker processes" in done.stderr


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"no_proxy": "corp.example"}, "corp.example,127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a,localhost", "no_proxy": "b"}, "b,a,localhost,127.0.0.1,::1"),
        ({"NO_PROXY": "*"}, "*"),
    ],
)
def test_loopback_is_added_to_what_is_asked_directly(
    before: dict[str, str], after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    ask_directly()
    ask_directly()  # twice is once
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == after


CLIENTS = """
import http.server, threading, urllib.request, urllib3, httpx, requests
from infra.loopback import ask_directly
from infra.servers.toolchain import http_status
ask_directly()
class Here(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(204); self.end_headers()
    def log_message(self, *words): pass
server = http.server.HTTPServer(("127.0.0.1", 0), Here)
threading.Thread(target=server.serve_forever, daemon=True).start()
for host in ("127.0.0.1", "localhost"):
    url = f"http://{host}:{server.server_port}/"
    print(http_status(url), urllib.request.urlopen(url, timeout=5).status, httpx.get(url).status_code,
          requests.get(url, timeout=5).status_code, urllib3.PoolManager().request("GET", url).status)
"""


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("proxy", ["http://127.0.0.1:9", "127.0.0.1:9", "socks5://127.0.0.1:9", "socks4://127.0.0.1:9"])
def test_every_client_reaches_loopback_behind_a_proxy(name: str, proxy: str) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [sys.executable, "-c", CLIENTS]
    done = subprocess.run(command, env=kept | {name: proxy}, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.split() == ["204"] * 10, done.stderr[-600:]
