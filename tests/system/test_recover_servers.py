"""Audit, recovery and sweeps on real servers: PostgreSQL and an S3 server."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import sqlalchemy as sa
from invariants import assert_invariants, digest, example_episode, open_plane

from infra.audit import audit
from infra.catalog.schema import episodes, outbox
from infra.episode import encode
from infra.errors import CorruptDataError
from infra.objects.s3 import S3Store
from infra.reconcile import reconcile
from infra.recover import recover

pytestmark = pytest.mark.system
LATER = 2.0e10


def test_what_the_database_lost_comes_back_from_the_bucket(fleet_home: Path) -> None:
    plane = open_plane(fleet_home)
    spooled = {f"{n:032x}": digest(encode(example_episode(n))) for n in range(12)}
    for number in range(12):
        plane.submit(example_episode(number))
        if number == 5:
            plane.settle()
    lost = [f"{number:032x}" for number in range(6, 12)]
    with plane.catalog.begin() as connection:  # as a database that was restored from before
        connection.execute(outbox.delete().where(outbox.c.episode_id.in_(lost)))
        connection.execute(episodes.delete().where(episodes.c.episode_id.in_(lost)))
    with pytest.raises(CorruptDataError, match="6 stored objects have no row"):
        audit(plane.catalog, plane.objects).check()
    assert reconcile(plane.catalog, plane.objects, grace_s=0, now=LATER).orphans == 6
    assert recover(plane.catalog, plane.objects).episodes == 6
    assert recover(plane.catalog, plane.objects).episodes == 0
    plane.settle()
    audit(plane.catalog, plane.objects, read=True).check()
    assert_invariants(fleet_home, spooled)
    member = plane.snapshots.episodes(1)[0]
    plane.objects.put(member.key, bytes(member.size))
    with pytest.raises(CorruptDataError, match="1 objects of committed episodes are damaged"):
        audit(plane.catalog, plane.objects, read=True).check()


def test_the_reconciler_ends_uploads_in_parts_that_nobody_ends(fleet_home: Path) -> None:
    plane = open_plane(fleet_home)
    store = plane.objects
    assert isinstance(store, S3Store)
    client, bucket = store._bucket.client, store._bucket.name
    for key in ("incoming/r0/a", "incoming/r1/b", "policies/x/weights"):
        client._upload_part(bucket, key, bytes(1000), None, client._create_multipart_upload(bucket, key, {}), 1)
    plane.submit(example_episode(1))
    store.put("incoming/r0/left", b"x")
    assert reconcile(plane.catalog, store).unfinished_deleted == 0, "they may be under way"
    time.sleep(1.1)  # S3 tells seconds
    with plane.catalog.read() as connection:
        assert connection.execute(sa.select(sa.func.count()).select_from(episodes)).scalar_one() == 1
    found = reconcile(plane.catalog, store, grace_s=0.0, unfinished_s=0.0)
    assert (found.unfinished_deleted, found.incoming_deleted, found.orphans) == (3, 1, 0)
    assert not store._bucket.uploads(None).uploads
    assert len(list(store.list("episodes"))) == 1
