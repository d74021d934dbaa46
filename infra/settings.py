"""Typed settings: one place for every default, validated at start.

What is given in code wins over `LWD_…` variables, these over `.env`, and that over `<home>/settings.yaml`, which holds
what is of one deployment: profile, servers, their credentials (mode 0600).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import yaml
from dotenv import dotenv_values
from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict, YamlConfigSettingsSource

from infra.errors import ConfigError

MIB = 2**20
SETTINGS_FILE = "settings.yaml"  # in the home


class Settings(BaseSettings):
    """Where things are and how much of each is allowed.

    Everything of one deployment lies below `home`; two homes on one machine never meet.
    """

    model_config = SettingsConfigDict(env_prefix="LWD_", env_file=".env", extra="forbid", frozen=True)

    profile: Literal["local", "fleet"] = "local"
    home: Path = Path("runs/local")

    catalog: str | None = Field(None, description="SQLAlchemy URL; SQLite below `home` when unset")
    s3_endpoint: str | None = Field(None, description="URL of the S3 server, as this machine and the robots reach it")
    s3_region: str = "us-east-1"
    s3_bucket: str = "lwd"
    s3_access_key: str | None = None
    s3_secret_key: SecretStr | None = None
    s3_timeout_s: float = Field(10.0, gt=0, description="to connect, and without a byte, seconds")
    s3_pool: int = Field(16, gt=0, description="open connections of one process")
    kafka_bootstrap: str | None = Field(None, description="host:port, comma-separated")
    kafka_topic: str = "lwd.episodes"
    kafka_options: dict[str, Any] = Field(default_factory=dict, description="of kafka-python: TLS, SASL, time-outs")

    ingest_host: str = Field("127.0.0.1", description="where the ingest service listens")
    ingest_port: int = Field(8787, ge=0, le=65535)
    ingest_cert: Path | None = Field(None, description="PEM chain; with `ingest_key` the service speaks TLS")
    ingest_key: Path | None = None
    ingest_insecure: bool = Field(False, description="speak in the clear beyond this machine: something else has TLS")
    ingest_url: str | None = Field(None, description="how robots reach the service; set, robots need nothing else")
    ingest_ca: Path | None = Field(None, description="PEM bundle that robots believe, besides the system's")
    robot_token: SecretStr | None = Field(None, description="a robot's credential, from `lwd robots enrol`")
    robot_episodes_per_min: float = Field(60.0, gt=0, description="what one robot may commit, sustained")
    robot_mib_per_min: float = Field(2048.0, gt=0)
    influence_max: float = Field(1.0, gt=0, le=1, description="largest share of a snapshot that one robot may make up")
    metrics_port: int | None = Field(
        None, description="first port for Prometheus; each process takes the next free one"
    )

    spool_max_mib: int = Field(256, gt=0, description="a robot's local spool; when full, collection stops safely")
    cache_max_mib: int = Field(2048, gt=0, description="disk budget of a reader's prefetcher")
    micro_batch: int = Field(8, gt=0, description="episodes that the coordinator commits in one snapshot")
    patience_s: float = Field(
        1800.0,
        ge=0,
        description="how long the stage goes on while its learner or coordinator keeps dying, seconds",
    )
    lease_s: float = Field(10.0, gt=0, description="coordinator's lease, seconds")
    poll_s: float = Field(0.2, gt=0, description="pause between polls of an idle process, seconds")
    fetch_retries: int = Field(5, ge=1, description="tries per object before it is quarantined")
    approval: bool = Field(False, description="promotion needs an approver other than the proposer")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """In order of precedence; the file is that of the home which the others name."""
        file = Path(init_settings().get("home") or default_home()) / SETTINGS_FILE
        return init_settings, env_settings, dotenv_settings, YamlConfigSettingsSource(settings_cls, yaml_file=file)

    @model_validator(mode="after")
    def _fleet_is_whole(self) -> Settings:
        needed = {"catalog": self.catalog, "s3_endpoint": self.s3_endpoint, "kafka_bootstrap": self.kafka_bootstrap}
        if self.profile == "fleet" and self.ingest_url is None:
            for name, value in needed.items():
                if value is None:
                    raise ValueError(
                        f"the fleet profile needs {name}; `lwd servers up` writes it for servers of its own"
                    )
        return self

    @property
    def catalog_url(self) -> str:
        return self.catalog or f"sqlite:///{(self.home / 'catalog.db').resolve()}"

    @property
    def objects_dir(self) -> Path:
        return self.home / "objects"

    @property
    def spool_dir(self) -> Path:
        """Spools of the robots that run on this machine, one folder each."""
        return self.home / "spool"

    @property
    def cache_dir(self) -> Path:
        return self.home / "cache"

    @property
    def robots_dir(self) -> Path:
        """Retained state of the robots on this machine: active and last-known-good policy."""
        return self.home / "robots"

    @property
    def keys_dir(self) -> Path:
        return self.home / "keys"

    @property
    def logs_dir(self) -> Path:
        return self.home / "logs"


def default_home() -> Path:
    """The home that `LWD_HOME` names, as a variable or in `.env`; `runs/local` otherwise."""
    named = os.environ.get("LWD_HOME") or dotenv_values(".env").get("LWD_HOME")
    return Path(named or Settings.model_fields["home"].default)


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, `.env` and `overrides` (which win).

    Raises:
        ConfigError: a field is unknown or out of range; the message names it.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except yaml.YAMLError as error:
        raise ConfigError(f"{SETTINGS_FILE} of the home is not YAML: {error}", "correct the line named") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "profile"
        got = f" (got {first.get('input')!r})" if first["loc"] and "secret" not in where else ""
        raise ConfigError(
            f"setting {where!r}: {first['msg']}{got}",
            f"correct LWD_{where.upper()}, or its line in .env or in the home's {SETTINGS_FILE}; "
            f"known settings: {', '.join(Settings.model_fields)}",
        ) from error
