"""Typed settings: one place for every default, read from `LWD_…` variables, `.env`, or code, validated at start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict

from infra.errors import ConfigError

MIB = 2**20


class Settings(BaseSettings):
    """Where things are and how much of each is allowed.

    Everything of one deployment lies below `home`; two homes on one machine never meet.
    """

    model_config = SettingsConfigDict(env_prefix="LWD_", env_file=".env", extra="forbid", frozen=True)

    profile: Literal["local", "fleet"] = "local"
    home: Path = Path("runs/local")

    catalog: str | None = Field(None, description="SQLAlchemy URL; SQLite below `home` when unset")

    spool_max_mib: int = Field(256, gt=0, description="a robot's local spool; when full, collection stops safely")
    cache_max_mib: int = Field(2048, gt=0, description="disk budget of a reader's prefetcher")
    micro_batch: int = Field(8, gt=0, description="episodes that the coordinator commits in one snapshot")
    lease_s: float = Field(10.0, gt=0, description="coordinator's lease, seconds")
    poll_s: float = Field(0.2, gt=0, description="pause between polls of an idle process, seconds")
    fetch_retries: int = Field(5, ge=1, description="tries per object before it is quarantined")
    approval: bool = Field(False, description="promotion needs an approver other than the proposer")

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


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment, `.env` and `overrides` (which win).

    Raises:
        ConfigError: a field is unknown or out of range; the message names it.
    """
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ConfigError(
            f"setting {where!r}: {first['msg']} (got {first.get('input')!r})",
            f"correct LWD_{where.upper()} or its line in .env; known settings: {', '.join(Settings.model_fields)}",
        ) from error
