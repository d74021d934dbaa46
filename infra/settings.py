"""Typed settings: one place for every default, validated at start.

What is given in code wins over `LWD_…` variables, these over `.env`, and that over `<home>/settings.yaml`, which holds
what is of one deployment: profile, servers, their credentials (mode 0600). What protects a deployment (`PROTECTED`) its
file decides alone: a variable that says otherwise is refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from urllib.parse import quote

from pydantic import Field, SecretStr, TypeAdapter, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from infra.errors import ConfigError
from infra.variables import PREFIX, dotenv_variables, require_known, variable
from infra.yaml_file import read_yaml

MIB = 2**20
SETTINGS_FILE = "settings.yaml"  # in the home
PROTECTED = (
    "approval",
    "influence_max",
    "influence_robots",
    "permit_canary_s",
    "permit_learning_s",
    "permit_champion_s",
)
"""Settings that only the home's file may give another value than the file's own."""


def refuse_switch(value: Any, annotation: Any) -> Any:
    """A value as it was given; ValueError for `true`, which YAML makes of `yes` and `on`, where a number belongs."""
    kinds = {annotation, *get_args(annotation)}
    if isinstance(value, bool) and kinds & {int, float} and bool not in kinds:
        raise ValueError("Input should be a number, not a switch (true, false, yes, no, on, off)")
    return value


class Settings(BaseSettings):
    """Where things are and how much of each is allowed.

    Everything of one deployment lies below `home`; two homes on one machine never meet.
    """

    model_config = SettingsConfigDict(
        env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True, allow_inf_nan=False
    )

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
    robot_incoming_mib: float = Field(4096.0, gt=0, description="what one robot may have uploaded and not committed")
    ingest_connections: int = Field(1024, gt=0, description="that the service holds at once")
    ingest_connections_per_address: int = Field(
        256, gt=0, description="of one address, that have shown no valid token: behind a proxy all robots have one"
    )
    influence_max: float = Field(0.5, gt=0, le=1, description="largest share of a snapshot that one robot may make up")
    influence_robots: int = Field(5, gt=0, description="robots in a snapshot from which on `influence_max` counts")
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
    examine_s: float = Field(30.0, gt=0, description="that the examination of one episode may take, seconds")
    examine_mib: int = Field(2048, ge=64, description="memory that the examination of one episode may take")
    permit_canary_s: float = Field(900.0, gt=0, description="how long canary robots run a candidate without a renewal")
    permit_learning_s: float = Field(3600.0, gt=0, description="the same of the learning cohort's policy")
    permit_champion_s: float = Field(604800.0, gt=0, description="the same of the champion, on every robot")
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
        file = settings_of(Path(init_settings().get("home") or default_home()))
        protected = {name: value for name, value in file.items() if name in PROTECTED}
        return (
            InitSettingsSource(settings_cls, protected), init_settings, _Environment(settings_cls),
            _Dotenv(settings_cls), InitSettingsSource(settings_cls, file),
        )  # fmt: skip

    @field_validator("*", mode="before")
    @classmethod
    def _is_no_switch(cls, value: Any, info: ValidationInfo) -> Any:
        return refuse_switch(value, cls.model_fields[str(info.field_name)].annotation)

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
        if self.catalog is not None:
            return self.catalog
        return f"sqlite:///{quote(str((self.home / 'catalog.db').resolve()))}"  # a path may hold `?`, `#` or `%`

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


class _Environment(EnvSettingsSource):
    """`LWD_…` variables of the environment; a value in JSON must not give a key twice."""

    def decode_complex_value(self, field_name: str, field: FieldInfo, value: Any) -> Any:
        return json.loads(value, object_pairs_hook=_unique)


class _Dotenv(_Environment):
    """The same, of `.env`."""

    def _load_env_vars(self) -> dict[str, str | None]:
        return {name.lower(): value for name, value in dotenv_variables().items() if value}


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice")
    return found


def default_home() -> Path:
    """The home that `LWD_HOME` names, as a variable or in `.env`; `runs/local` otherwise."""
    return Path(variable(f"{PREFIX}HOME") or Settings.model_fields["home"].default)


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, `.env`, the home's file and `overrides` (which win).

    Raises:
        ConfigError: a field is unknown or out of range, or a variable contradicts what the home's file protects; the
            message names it.
    """
    require_known(Settings.model_fields)
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "profile"
        raise ConfigError(
            f"setting {where!r}: {first['msg']}{_got(first['loc'], first.get('input'))}",
            f"correct {PREFIX}{where.upper()}, or its line in .env or in the home's {SETTINGS_FILE}; "
            f"known settings: {', '.join(Settings.model_fields)}",
        ) from error
    except ValueError as error:  # of a source: a value that should be JSON
        raise ConfigError(f"a setting cannot be read: {error}", f"correct it; {PREFIX}KAFKA_OPTIONS is JSON") from error
    _require_protected(settings)
    return settings


def settings_of(home: Path) -> dict[str, Any]:
    """What the home's file says, unchecked; nothing where there is none.

    Raises:
        ConfigError: it is no YAML mapping of names, or gives one twice.
    """
    path = home / SETTINGS_FILE
    if not path.exists():
        return {}
    found = read_yaml(path, "settings", "write it, or name another home")
    if not isinstance(found, dict | None) or not all(isinstance(name, str) for name in found or ()):
        raise ConfigError(f"{path} holds no settings", "write them as `name: value`, a line each")
    if "home" in (found or ()):
        raise ConfigError(
            f"{path}: a home does not say where it is", f"remove `home`; set {PREFIX}HOME, or give --home"
        )
    return found or {}


def _require_protected(settings: Settings) -> None:
    said = settings_of(settings.home)
    for name in PROTECTED:
        given = variable(PREFIX + name.upper())
        if name not in said or given is None:
            continue
        kind: TypeAdapter[object] = TypeAdapter(Settings.model_fields[name].annotation)  # type: ignore[arg-type]
        try:
            agrees = kind.validate_python(given) == getattr(settings, name)
        except ValidationError:
            agrees = False
        if not agrees:
            raise ConfigError(
                f"{PREFIX}{name.upper()} contradicts {settings.home / SETTINGS_FILE}, which decides this for everybody",
                f"unset {PREFIX}{name.upper()}; who may change the deployment changes its file",
            )


def _got(place: tuple[int | str, ...], value: object) -> str:
    """The value that was given, where it can be no secret: of a number, a switch or a choice."""
    field = Settings.model_fields.get(str(place[0])) if place else None
    kind = field.annotation if field is not None else None
    harmless = kind in (int, float, bool, int | None) or get_origin(kind) is Literal
    return f" (got {value!r})" if harmless and isinstance(value, str | int | float) and len(str(value)) <= 40 else ""
