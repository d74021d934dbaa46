"""One deployment, put together from its settings: catalog, objects, snapshots, keys, publisher and registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from infra.catalog import Catalog, schema
from infra.episode import Episode, decode
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_objects
from infra.policy.channel import PolicyPublisher, fetch_bundle
from infra.policy.keys import Signer, create_keys, load_signer
from infra.policy.registry import Registry
from infra.policy.renew import validity_of
from infra.settings import Settings, load_settings
from infra.snapshots import Snapshots


@dataclass(frozen=True)
class Deployment:
    """Handles on everything below one home."""

    settings: Settings
    catalog: Catalog
    objects: ObjectStore
    snapshots: Snapshots
    publisher: PolicyPublisher
    registry: Registry

    def bundle(self, version: int) -> Path:
        """A published policy's files, fetched from the store for evaluation."""
        return fetch_bundle(self.objects, self.catalog, version, self.settings.home / "policies" / f"{version:06d}")

    def unaccounted(self) -> int:
        """Committed episodes that are neither in a snapshot nor in quarantine (invariant I1); 0 once all is settled."""
        episodes, members, held = schema.episodes, schema.snapshot_episodes, schema.quarantine
        query = (
            sa.select(sa.func.count())
            .select_from(episodes)
            .where(
                ~sa.exists().where(members.c.episode_id == episodes.c.episode_id),
                ~sa.exists().where(held.c.episode_id == episodes.c.episode_id),
            )
        )
        with self.catalog.read() as connection:
            return int(connection.execute(query).scalar_one())

    def members(self) -> list[Episode]:
        """The episodes of the current snapshot, decoded."""
        current = self.snapshots.episodes(self.snapshots.latest().version)
        return [decode(self.objects.get(member.key), name=member.key) for member in current]

    def quarantined(self) -> list[dict[str, object]]:
        """Refused episodes with their reasons, as the review page and the report take them."""
        table = schema.quarantine
        with self.catalog.read() as connection:
            rows = connection.execute(sa.select(table).order_by(table.c.id)).all()
        return [
            {
                "episode_id": row.episode_id,
                "robot_id": row.robot_id,
                "at": row.created_at,
                "stage": row.stage,
                "reasons": row.reasons,
            }
            for row in rows
        ]


@contextmanager
def deployment(home: Path) -> Iterator[Deployment]:
    """Open a deployment, creating its tables and keys where it is new.

    Raises:
        ConfigError: a setting is wrong, or the catalog is of a newer version.
    """
    settings = load_settings(home=home)
    settings.home.mkdir(parents=True, exist_ok=True)
    catalog = open_catalog(settings, migrate=True)
    try:
        signer, validity = _signer(settings), validity_of(settings)
        objects = open_objects(settings)
        yield Deployment(
            settings,
            catalog,
            objects,
            Snapshots(catalog),
            PolicyPublisher(catalog, objects, signer, validity),
            Registry(catalog, signer, approval=settings.approval, cards=settings.home / "cards", validity=validity),
        )
    finally:
        catalog.close()


def _signer(settings: Settings) -> Signer:
    if any(settings.keys_dir.glob("*")):
        return load_signer(settings.keys_dir)
    return create_keys(settings.keys_dir)


def read_json(path: Path) -> dict[str, object]:
    """A status file; empty while its writer has not been there."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}
