"""Settings come from LWD_ variables and name what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from infra.errors import ConfigError
from infra.settings import default_home, load_settings


def test_everything_of_a_deployment_lies_below_its_home(tmp_path, monkeypatch):
    monkeypatch.setenv("LWD_HOME", str(tmp_path))
    settings = load_settings()
    assert settings.catalog_url == f"sqlite:///{tmp_path}/catalog.db"
    assert all(path.is_relative_to(tmp_path) for path in (settings.objects_dir, settings.spool_dir, settings.keys_dir))


def test_a_value_out_of_range_is_named(monkeypatch):
    monkeypatch.setenv("LWD_LEASE_S", "-3")
    with pytest.raises(ConfigError, match=r"'lease_s'.*got '-3'") as error:
        load_settings()
    assert "LWD_LEASE_S" in error.value.fix


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigError, match="leese_s"):
        load_settings(leese_s=1)


FLEET = """
profile: fleet
catalog: postgresql+psycopg://lwd:secret@127.0.0.1/lwd
s3_endpoint: http://127.0.0.1:3900
s3_access_key: GK1
s3_secret_key: hidden
kafka_bootstrap: 127.0.0.1:9092
kafka_options: {security_protocol: PLAINTEXT}
"""


def test_the_home_s_own_file_is_read_and_the_environment_wins(tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text(FLEET)
    monkeypatch.setenv("LWD_S3_BUCKET", "other")
    settings = load_settings(home=tmp_path)
    assert (settings.profile, settings.s3_bucket, settings.s3_access_key) == ("fleet", "other", "GK1")
    assert settings.kafka_options == {"security_protocol": "PLAINTEXT"}
    monkeypatch.setenv("LWD_PROFILE", "local")
    assert load_settings(home=tmp_path).profile == "local"
    assert load_settings(home=tmp_path / "another").profile == "local"


def test_secrets_are_not_shown(tmp_path):
    (tmp_path / "settings.yaml").write_text(FLEET)
    assert "hidden" not in repr(load_settings(home=tmp_path))
    (tmp_path / "settings.yaml").write_text(FLEET.replace("hidden", "[hidden]"))
    with pytest.raises(ConfigError, match="s3_secret_key") as error:
        load_settings(home=tmp_path)
    assert "hidden" not in str(error.value)


def test_a_fleet_without_its_servers_is_named(tmp_path, monkeypatch):
    (tmp_path / "settings.yaml").write_text("profile: fleet\n")
    with pytest.raises(ConfigError, match="fleet profile needs catalog"):
        load_settings(home=tmp_path)
    monkeypatch.setenv("LWD_INGEST_URL", "http://127.0.0.1:1")  # a robot needs none of them
    assert load_settings(home=tmp_path).catalog is None


@pytest.mark.parametrize("text", ["profile: fleet: x", "profle: fleet"])
def test_a_file_with_a_typo_is_refused(tmp_path, text):
    (tmp_path / "settings.yaml").write_text(text)
    with pytest.raises(ConfigError):
        load_settings(home=tmp_path)


def test_the_home_is_named_in_the_environment_or_in_dot_env(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LWD_HOME", raising=False)
    assert default_home() == Path("runs/local")
    (tmp_path / ".env").write_text("LWD_HOME=runs/arm\n")
    assert default_home() == load_settings().home == Path("runs/arm")
    monkeypatch.setenv("LWD_HOME", "runs/other")
    assert default_home() == Path("runs/other")


@pytest.mark.parametrize("name", ["LWD_CATALOG", "LWD_METRICS_PORT", "LWD_KAFKA_OPTIONS", "LWD_APPROVAL"])
@pytest.mark.parametrize("place", ["environment", ".env"])
def test_an_empty_variable_is_none(tmp_path, monkeypatch, name, place):
    monkeypatch.chdir(tmp_path)
    if place == ".env":
        Path(".env").write_text(f"{name}=\n")
    else:
        monkeypatch.setenv(name, "")
    assert load_settings(home=tmp_path) == load_settings(home=tmp_path, approval=False)
    assert load_settings(home=tmp_path).catalog_url.startswith("sqlite:")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("ingest_port: yes", "ingest_port.*switch"),
        ("micro_batch: on", "micro_batch.*switch"),
        ("poll_s: .inf", "poll_s.*finite"),
        ("home: elsewhere", "does not say where it is"),
    ],
)
def test_a_line_of_the_home_s_file_that_means_nothing_is_refused(tmp_path, line, message):
    (tmp_path / "settings.yaml").write_text(line + "\n")
    with pytest.raises(ConfigError, match=message):
        load_settings(home=tmp_path)
