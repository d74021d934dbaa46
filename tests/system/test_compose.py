"""The ingest service as compose.yaml runs it, short of the container: its command, settings, TLS, health check."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from invariants import assert_i7_kept, digest, open_plane
from serving import Served
from waiting import wait_until

from infra.edge.server import Upload
from infra.errors import UnavailableError
from infra.servers.toolchain import free_port
from infra.settings import load_settings

COMPOSE = Path(__file__).parents[2] / "infra" / "compose.yaml"
PORT = "8443"


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Folder of what the command at the file's head makes."""
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    head = COMPOSE.read_text().partition("\nname:")[0]
    found = re.search(r"mkdir -p infra/tls(.|\n)*?cert\.pem", head)
    assert found, "the head says how a certificate is made"
    subprocess.run(["bash", "-ec", found[0].replace("\n#", "\n")], cwd=tmp_path, check=True, capture_output=True)
    return tmp_path / "infra" / "tls"


@pytest.fixture
def ingest(fleet_home: Path, certificate: Path, tmp_path: Path) -> Iterator[tuple[dict[str, Any], Path, str]]:
    """The service's description, its home and its URL; it uses this test's servers, and a port that is free."""
    described, port = yaml.safe_load(COMPOSE.read_text())["services"]["ingest"], str(free_port())
    settings, home = load_settings(home=fleet_home), tmp_path / "container"
    assert settings.s3_secret_key is not None
    own = {
        "LWD_CATALOG": settings.catalog_url,
        "LWD_S3_ENDPOINT": settings.s3_endpoint,
        "LWD_S3_BUCKET": settings.s3_bucket,
        "LWD_S3_ACCESS_KEY": settings.s3_access_key,
        "LWD_S3_SECRET_KEY": settings.s3_secret_key.get_secret_value(),
        "LWD_KAFKA_BOOTSTRAP": settings.kafka_bootstrap,
        "LWD_KAFKA_TOPIC": settings.kafka_topic,
        "LWD_INGEST_PORT": port,
    }
    assert own.keys() < described["environment"].keys() and described["environment"]["LWD_INGEST_PORT"] == PORT
    environment = described["environment"] | own
    environment = {name: str(value).replace("/tls/", f"{certificate}/") for name, value in environment.items()}
    program, *words = described["command"]
    assert program == "python" and words[-2:] == ["--home", "home"]
    process = subprocess.Popen([sys.executable, *words[:-1], str(home)], env=os.environ | environment)
    yield described, home, f"https://127.0.0.1:{port}"
    process.terminate()
    assert process.wait(60) == 0


def test_it_takes_an_episode_in_over_tls_and_says_that_it_is_well(
    ingest: tuple[dict[str, Any], Path, str], fleet_home: Path, certificate: Path, tmp_path: Path
) -> None:
    described, _, url = ingest
    _, program, *words = described["healthcheck"]["test"]
    assert program == "python" and f":{PORT}/" in words[-1]
    healthy = [sys.executable, *words[:-1], words[-1].replace(f"https://127.0.0.1:{PORT}", url)]
    wait_until(lambda: subprocess.run(healthy, capture_output=True, check=False).returncode == 0)
    served = Served(open_plane(fleet_home), url)
    path = tmp_path / "episode.tar"
    path.write_bytes(b"episode" * 1000)
    upload = Upload("a" * 32, digest(path.read_bytes()), path.stat().st_size, path)
    with pytest.raises(UnavailableError, match="is not believed"):
        served.robot().submit(upload)
    assert served.robot(ca=certificate / "cert.pem").submit(upload) == "committed"
    assert_i7_kept(fleet_home, [(upload.episode_id, upload.sha256)])
