"""The named deployments, against a real Prefect server."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import yaml

from flows.prefect_server import prefect_server
from infra.errors import UnavailableError
from infra.servers.toolchain import HOST

ROOT = Path(__file__).parents[2]


def prefect(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "prefect", "--no-prompt", *words],
        cwd=ROOT, env=os.environ.copy(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.timeout(300)
def test_every_named_deployment_is_accepted(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with prefect_server(tmp_path / "prefect") as url:
        prefect("work-pool", "create", "lwd", "--type", "process")
        prefect("deploy", "--all")
        request = urllib.request.Request(f"{url}/deployments/filter", b"{}", {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            found = {row["name"]: row for row in json.load(answer)}
    wanted = {row["name"]: row for row in yaml.safe_load((ROOT / "prefect.yaml").read_text())["deployments"]}
    assert found.keys() == wanted.keys()
    assert {name for name, row in found.items() if row["schedules"]} == {"offline", "evaluate"}
    assert all(found[name]["entrypoint"] == row["entrypoint"] for name, row in wanted.items())
    assert all(row["work_pool_name"] == "lwd" for row in found.values())


def test_a_port_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    with socket.create_server((HOST, 0)) as taken:
        port = taken.getsockname()[1]
        with (
            pytest.raises(UnavailableError, match=f"port {port} .* listens there"),
            prefect_server(tmp_path, port=port),
        ):
            pass
