"""One deployment, put together from its settings: catalog, objects, snapshots, keys, publisher and registry."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa

from infra.catalog import Catalog, schema
from infra.catalog.accounting import count_unaccounted
from infra.episode import Episode, decode
from infra.errors import UntrustedPolicyError
from infra.objects import ObjectStore
from infra.plane import open_catalog, open_objects
from infra.policy.artifact import file_marks
from infra.policy.channel import PolicyPublisher, fetch_bundle
from infra.policy.keys import SIGNING, Signer, create_keys, load_signer, load_trusted
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
        """A published policy's files, fetched from the store for evaluation and verified as a robot does."""
        folder = self.settings.home / "policies" / f"{version:06d}"
        return fetch_bundle(self.objects, self.catalog, load_trusted(self.settings.keys_dir), version, folder)

    @contextmanager
    def evaluating(self, version: int) -> Iterator[Path]:
        """`bundle`, and that its files stay those that were verified until this ends.

        Raises:
            UntrustedPolicyError: one was written to or replaced meanwhile, be it by the same bytes again.
        """
        folder, before = self.bundle(version), {}
        for _ in range(3):  # it was fetched now, or another process fetched it as well
            before, folder = file_marks(folder), self.bundle(version)
            if file_marks(folder) == before:
                break
        yield folder
        if file_marks(folder) != before:
            raise UntrustedPolicyError(
                f"the files of policy {version} in {folder} were changed while they were evaluated",
                "keep others out of that folder and ask again; those episodes were not counted",
            )

    def unaccounted(self) -> int:
        """Committed episodes that are neither in a snapshot nor in quarantine (invariant I1); 0 once all is settled."""
        with self.catalog.read() as connection:
            return count_unaccounted(connection)

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
        publish, promote = _signers(settings)
        validity = validity_of(settings)
        objects = open_objects(settings)
        yield Deployment(
            settings,
            catalog,
            objects,
            Snapshots(catalog),
            PolicyPublisher(catalog, objects, publish, validity),
            Registry(
                catalog,
                promote,
                approval=settings.approval,
                cards=settings.home / "cards",
                keys_dir=settings.keys_dir,
                validity=validity,
            ),
        )
    finally:
        catalog.close()


def _signers(settings: Settings) -> tuple[Signer, Signer | None]:
    """What signs published policies, and what signs promotions; the latter is missing on a machine that only learns."""
    keys = settings.keys_dir
    if not any(keys.glob("*")):
        create_keys(keys)
    only_learns = (keys / SIGNING["publish"]).exists() and not (keys / SIGNING["promote"]).exists()
    return load_signer(keys, "publish"), None if only_learns else load_signer(keys)


def read_json(path: Path) -> dict[str, object]:
    """A status file; empty while its writer has not been there, and where it is damaged: it is soon written again."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
