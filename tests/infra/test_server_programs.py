"""Where the servers' programs come from, the settings that name the servers, and the same set as containers."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from infra.errors import ConfigError
from infra.servers import NAMES, Servers, kafka, postgres, servers_folder, write_settings
from infra.servers.garage import Garage
from infra.servers.kafka import PARTITIONS, TOPIC, Kafka
from infra.settings import load_settings

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "infra" / "compose.yaml"


def test_a_missing_tool_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(postgres, "_PACKAGED", ())
    monkeypatch.setattr(postgres.os, "geteuid", lambda: 1000)
    servers = Servers(tmp_path / "data", tmp_path / "programs")
    for server, problem in (
        (servers.kafka, "no java on the PATH"),
        (servers.garage, "no cargo on the PATH"),
        (servers.postgres, "PostgreSQL 15 or newer is neither on the PATH"),
    ):
        with pytest.raises(ConfigError, match=problem) as error:
            server.prepare()
        assert re.search("LWD_(CATALOG|S3_ENDPOINT|KAFKA_BOOTSTRAP)", error.value.fix), "one's own server will do"
    script(tmp_path / "java", "echo openjdk 17.0.1 2021-10-19")
    with pytest.raises(ConfigError, match="no mvn on the PATH"):
        servers.kafka.prepare()


def test_an_old_java_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    script(tmp_path / "java", "echo openjdk 11.0.2 2019-01-15")
    with pytest.raises(ConfigError, match=r"Java 17 or newer; .* is 'openjdk 11.0.2"):
        kafka.Kafka(tmp_path, tmp_path / "data").prepare()
    script(tmp_path / "java", "echo Unrecognized option: --version >&2; exit 1")  # as Java 8 answers
    with pytest.raises(ConfigError, match="finding a Java 17 or newer failed"):
        kafka.Kafka(tmp_path, tmp_path / "data").prepare()


def test_a_build_that_fails_leaves_nothing_that_looks_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    script(tmp_path / "java", "echo openjdk 21 2023-09-19")
    script(tmp_path / "mvn", 'for last; do :; done; mkdir -p "${last#*=}"; echo no such artifact; exit 1')
    script(tmp_path / "cargo", "exit 101")
    servers = Servers(tmp_path / "data", tmp_path / "programs")
    for server, words in ((servers.kafka, "no such artifact"), (servers.garage, "cargo ended with 101")):
        with pytest.raises(ConfigError, match=words):
            server.prepare()
        assert not server.prepared
    script(tmp_path / "mvn", 'for last; do :; done; mkdir -p "${last#*=}"; touch "${last#*=}/kafka.jar"')
    servers.kafka.prepare()
    assert servers.kafka.prepared


def test_postgres_is_of_the_release_that_made_the_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    for release in ("9.6", "15.3", "16.1"):
        folder = tmp_path / release
        folder.mkdir()
        script(folder / "postgres", f"echo 'postgres (PostgreSQL) {release} (Debian)'")
        script(folder / "initdb", "exit 1")
    known = [tmp_path / "16.1", tmp_path / "15.3"]
    monkeypatch.setattr(postgres.shutil, "which", lambda name: str(tmp_path / "9.6" / name))
    monkeypatch.setattr(postgres, "_packaged", lambda: known)
    assert postgres.installations() == known, "too old is none"
    server = postgres.Postgres(tmp_path, tmp_path / "data")
    assert server.version == "16.1"
    (server.folder() / "cluster").mkdir()
    (server.data / "cluster" / "PG_VERSION").write_text("15\n")
    assert server.version == "15.3"
    (server.data / "cluster" / "PG_VERSION").write_text("14\n")
    with pytest.raises(ConfigError, match="made by PostgreSQL 14"):
        server.start()


def test_kafkas_log_is_not_wiped_under_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Kafka(tmp_path, tmp_path / "data")
    (server.folder() / "log").mkdir()
    monkeypatch.setattr(Kafka, "pid", 1)
    with pytest.raises(ConfigError, match="Kafka runs"):
        server.wipe()
    monkeypatch.setattr(Kafka, "pid", None)
    server.wipe()
    assert not (server.data / "log").exists()


def test_secrets_are_made_once_and_lie_where_nobody_else_reads(tmp_path: Path) -> None:
    server = Garage(tmp_path, tmp_path / "data", objects=tmp_path / "other disk")
    argv, env = server.command()
    assert server.command() == (argv, env)
    assert env["GARAGE_DEFAULT_SECRET_KEY"] == server.secret_key and re.fullmatch("[0-9a-f]{64}", server.secret_key)
    assert not any(server.secret_key in word for word in argv), "a command line can be read by everybody"
    config = server.data / "garage.toml"
    assert f'data_dir = "{tmp_path}/other disk"' in config.read_text()
    assert "metadata_fsync = true\ndata_fsync = true" in config.read_text()
    assert server.data.stat().st_mode & 0o777 == 0o700
    assert all((server.data / name).stat().st_mode & 0o077 == 0 for name in ("garage.toml", "secret_key", "rpc_secret"))


def test_a_server_of_no_such_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="redis"):
        Servers(tmp_path).all(("redis",))
    with pytest.raises(ConfigError, match="redis"):
        Servers(tmp_path, ports={"redis": 6379})


def test_the_settings_that_are_written_are_those_that_are_read(tmp_path: Path) -> None:
    servers = Servers(tmp_path / "data", tmp_path / "programs", {"kafka": 29_092})
    path = write_settings(tmp_path / "home", {"lease_s": 3.0})
    write_settings(tmp_path / "home", servers.settings())
    assert path.stat().st_mode & 0o777 == 0o600
    settings = load_settings(home=tmp_path / "home")
    assert (settings.profile, settings.kafka_topic, settings.lease_s) == ("fleet", TOPIC, 3.0)
    assert settings.kafka_bootstrap == "127.0.0.1:29092"
    assert str(servers.postgres.port) in settings.catalog_url
    assert settings.s3_secret_key is not None
    assert settings.s3_secret_key.get_secret_value() == servers.garage.secret_key


def test_servers_of_ones_own_stay_in_the_settings(tmp_path: Path) -> None:
    servers = Servers(tmp_path / "data", tmp_path / "programs")
    write_settings(tmp_path / "home", {"catalog": "postgresql+psycopg://me@db.example/lwd"})
    write_settings(tmp_path / "home", servers.settings(("kafka", "garage")))
    assert load_settings(home=tmp_path / "home").catalog_url.endswith("@db.example/lwd")
    assert not (tmp_path / "data" / "postgres").exists()


def test_a_broken_settings_file_is_not_overwritten(tmp_path: Path) -> None:
    for text in ("profile: [", "- profile\n"):
        (tmp_path / "settings.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"settings\.yaml"):
            write_settings(tmp_path, {"profile": "fleet"})
        assert (tmp_path / "settings.yaml").read_text() == text


def test_the_folder_is_outside_the_clone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("LWD_SERVERS_DIR", raising=False)
    assert not servers_folder().is_relative_to(ROOT)
    monkeypatch.setenv("LWD_SERVERS_DIR", str(tmp_path))
    assert servers_folder() == tmp_path


def test_the_pom_names_the_broker_of_this_version() -> None:
    space = {"m": "http://maven.apache.org/POM/4.0.0"}
    listed = ElementTree.parse(ROOT / "infra" / "servers" / "pom.xml").findall(".//m:dependency", space)
    versions = {entry.findtext("m:artifactId", "", space): entry.findtext("m:version", "", space) for entry in listed}
    assert versions["kafka_2.13"] == versions["kafka-tools"] == Kafka.wanted


def test_compose_describes_the_same_set() -> None:
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    assert set(NAMES) <= services.keys()
    assert services["kafka"]["image"].endswith(f":{Kafka.wanted}")
    assert services["garage"]["image"].endswith(f":v{Garage.wanted}")
    assert {f"--topic={TOPIC}", f"--partitions={PARTITIONS}"} <= set(services["kafka-topic"]["command"])
    for service in services.values():
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", []))
    assert not re.search(r"(?i)(password|secret)\w*: *[\"']?\w", COMPOSE.read_text().partition("\nservices:")[2])


def test_composes_image_is_of_this_version_and_of_all_that_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ingest = yaml.safe_load(COMPOSE.read_text())["services"]["ingest"]
    assert ingest["image"] == f"lwd:{project['version']}"
    recipe = ROOT / "infra" / ingest["build"]["context"] / ingest["build"]["dockerfile"]
    copied = {word for line in re.findall(r"^COPY (.*)", recipe.read_text(), re.M) for word in line.split()[:-1]}
    assert {"constraints.txt", "pyproject.toml", project["readme"], *project["license-files"]} < copied
    assert all((ROOT / name).exists() for name in copied)
    seen = re.findall(r"^!(.*)", (recipe.parent / "Dockerfile.dockerignore").read_text(), re.M)
    assert set(seen) == copied, "what the recipe copies is what the builder may see"


def script(path: Path, text: str) -> None:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
