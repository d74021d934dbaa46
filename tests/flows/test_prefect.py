"""The named deployments, against a real Prefect server."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import socket
import stat
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml
from websockets.asyncio.client import connect
from websockets.exceptions import WebSocketException
from whole_command import Command

from flows.prefect_server import prefect_server
from infra.errors import UnavailableError
from infra.servers.prefect import CREDENTIAL
from infra.servers.toolchain import HOST, free_port

ROOT = Path(__file__).parents[2]


def prefect(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words],
        cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def basic(credential: str) -> str:
    return f"Basic {base64.b64encode(credential.encode()).decode()}"


def ask(url: str, body: bytes | None = None, **headers: str) -> tuple[int, str | None]:
    """Status, and the origins that may read the answer."""
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    request = urllib.request.Request(url, body, named)
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status, answer.headers.get("Access-Control-Allow-Origin")
    except urllib.error.HTTPError as error:
        return error.code, error.headers.get("Access-Control-Allow-Origin")


async def talks(url: str, path: str, protocols: list[str], hello: dict[str, str] | None) -> bool:
    """Whether a websocket is let in."""
    try:
        async with connect(f"ws{url.removeprefix('http')}{path}", subprotocols=protocols, proxy=None) as socket:
            if hello is not None:
                await socket.send(json.dumps(hello))
            answer = await asyncio.wait_for(socket.recv(), 10)
            return json.loads(answer).get("type") == "auth_success"
    except (WebSocketException, OSError, TimeoutError):
        return False


@pytest.mark.timeout(300)
def test_the_server_takes_nothing_without_its_credential(tmp_path, monkeypatch):
    """What a web page, or another user of the machine, can send."""
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # loopback is asked directly all the same
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    pool = json.dumps({"name": "page", "type": "process"}).encode()
    evil = "http://evil.example"
    with prefect_server(tmp_path / "prefect") as url:
        key = (tmp_path / "prefect" / CREDENTIAL).read_text()
        assert stat.S_IMODE((tmp_path / "prefect" / CREDENTIAL).stat().st_mode) == 0o600
        assert os.environ["PREFECT_API_AUTH_STRING"] == key
        simple = {"Content_Type": "text/plain", "Origin": evil}  # sent by a page without asking first
        for headers in (
            simple,
            {"Content_Type": "application/json", "Origin": "null"},
            {"Content_Type": "application/json", "Host": f"evil.example:{url.split(':')[2].split('/')[0]}"},
            {"Content_Type": "application/json", "Authorization": basic("lwd:guess")},
            {"Content_Type": "application/json", "Authorization": f"Bearer {key}"},
        ):
            assert ask(f"{url}/work_pools/", pool, **headers)[0] == 401, headers
            assert ask(f"{url}/flow_runs/filter", b"{}", **headers)[0] == 401, headers
        own = url.removesuffix("/api")
        allowed = {"Content_Type": "application/json", "Authorization": basic(key)}
        assert ask(f"{url}/work_pools/filter", b"{}", Origin=evil, **allowed) == (200, None)
        assert ask(f"{url}/work_pools/filter", b"{}", Origin=own, **allowed) == (200, own)
        assert ask(f"{url}/work_pools/filter", b'{"offset": 0}', **allowed)[0] == 200
        assert "page" not in (tmp_path / "prefect" / "server.log").read_text()
        hello = {"type": "auth", "token": key}
        for path in ("/events/in", "/events/out", "/logs/out"):
            assert not asyncio.run(talks(url, path, [], None)), path
            assert not asyncio.run(talks(url, path, ["prefect"], {"type": "auth", "token": "lwd:guess"})), path
            assert asyncio.run(talks(url, path, ["prefect"], hello)), path
    assert "PREFECT_API_AUTH_STRING" not in os.environ
    assert key not in (tmp_path / "prefect" / "server.log").read_text()


@pytest.mark.timeout(300)
def test_every_named_deployment_is_accepted(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with prefect_server(tmp_path / "prefect") as url:
        prefect("work-pool", "create", "lwd", "--type", "process")
        prefect("deploy", "--all")
        headers = {"Content-Type": "application/json", "Authorization": basic(os.environ["PREFECT_API_AUTH_STRING"])}
        request = urllib.request.Request(f"{url}/deployments/filter", b"{}", headers)
        with urllib.request.urlopen(request) as answer:
            found = {row["name"]: row for row in json.load(answer)}
    wanted = {row["name"]: row for row in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    assert found.keys() == wanted.keys()
    assert {name for name, row in found.items() if row["schedules"]} == {"offline", "evaluate"}
    assert all(found[name]["entrypoint"] == row["entrypoint"] for name, row in wanted.items())
    assert all(row["work_pool_name"] == "lwd" for row in found.values())


def test_variables_of_another_server_do_not_reach_ours(tmp_path, monkeypatch):
    theirs = tmp_path / "theirs.db"
    foreign = {
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{theirs}",
        "PREFECT_SERVER_API_BASE_PATH": "/elsewhere",
        "PREFECT_API_SSL_CERT_FILE": str(tmp_path / "none.pem"),
    }
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    Path(".env").write_text("".join(f"{name}={value}\n" for name, value in foreign.items()))
    for name, value in foreign.items():
        monkeypatch.setenv(name, value)
    with prefect_server(tmp_path / "server"):
        assert not foreign.keys() & os.environ.keys()
    assert {name: os.environ[name] for name in foreign} == foreign
    assert not theirs.exists() and (tmp_path / "server" / "prefect.db").exists()


def test_a_port_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UnavailableError, match=f"port {port} .* listens there"),
            prefect_server(tmp_path, port=port),
        ):
            pass


@pytest.mark.timeout(300)
def test_a_server_for_workers_runs_until_ctrl_c_and_keeps_its_credential(tmp_path):
    port = free_port()
    with Command(tmp_path, "servers", "prefect", "--port", str(port), "--home", "a home") as command:
        command.says("export PREFECT_API_AUTH_STRING=")
        key = (tmp_path / "a home" / "prefect" / CREDENTIAL).read_text()
        assert key not in command.output
        url = f"http://{HOST}:{port}/api/work_pools/filter"
        assert ask(url, b"{}", Content_Type="application/json")[0] == 401
        assert ask(url, b"{}", Content_Type="application/json", Authorization=basic(key))[0] == 200
        with Command(tmp_path, "servers", "prefect", "--port", str(port), "--home", "a home") as second:
            assert second.ends() == 6 and f"process {command.process.pid}" in second.output
        command.press()
        assert command.ends() == 130
        command.leaves_nothing()
    assert (tmp_path / "a home" / "prefect" / CREDENTIAL).read_text() == key
