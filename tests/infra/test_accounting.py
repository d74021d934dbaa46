"""One predicate, by id and digest, for "neither in a snapshot nor in quarantine": all who ask get the same answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import Plane, digest, example_episode, open_plane

from infra.audit import audit
from infra.catalog.accounting import Standing, count_unaccounted, standings, unaccounted
from infra.catalog.schema import episodes, outbox, quarantine, snapshot_episodes
from infra.episode import encode
from infra.errors import ConflictError
from infra.reconcile import reconcile, settled_until
from infra.service.limits import Backpressure
from infra.telemetry.catalog_metrics import CatalogMetrics

LATER = 2.0e10


def other_copy(plane: Plane, number: int) -> str:
    """Other bytes under the id of an episode that is committed; their digest."""
    episode = example_episode(number, instruction="another")
    with pytest.raises(ConflictError):
        plane.submit(episode)
    return digest(encode(episode))


def test_a_conflicting_copy_does_not_account_for_the_episode(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    identifier, sha256 = f"{1:032x}", digest(encode(example_episode(1)))
    plane.submit(example_episode(1))
    copy = other_copy(plane, 1)

    def seen() -> tuple[int, int, bool]:
        collector = CatalogMetrics(plane.catalog, relayed=False)
        collector.collect()
        with plane.catalog.read() as connection:
            return count_unaccounted(connection), len(collector._open), settled_until(plane.catalog, 0.0, LATER) < LATER

    assert seen() == (1, 1, True)
    assert audit(plane.catalog, plane.objects, settle_s=0).unaccounted == 1
    with plane.catalog.read() as connection:
        found = standings(connection, [(identifier, sha256), (identifier, copy), (identifier, "0" * 64)])
    assert found[identifier, sha256] == Standing(committed=True, robot_id="r0")
    assert found[identifier, copy] == Standing(stage="conflict")
    assert found[identifier, "0" * 64] == Standing()
    assert [plane.ingest.status(identifier, name) for name in (sha256, copy)] == ["committed", "quarantined"]
    with plane.catalog.begin() as connection:
        connection.execute(outbox.delete())
    assert reconcile(plane.catalog, plane.objects, now=LATER).announced_again == 1
    plane.settle()
    assert seen() == (0, 0, False)
    assert [plane.ingest.status(identifier, name) for name in (sha256, copy)] == ["snapshot", "quarantined"]


def test_the_service_does_not_take_a_conflict_for_progress(tmp_path: Path) -> None:
    plane = open_plane(tmp_path)
    for number in range(4):
        plane.submit(example_episode(number))
        other_copy(plane, number)
    assert Backpressure(plane.catalog, limit=1)._is_behind()
    plane.settle()
    assert not Backpressure(plane.catalog, limit=1)._is_behind()


STEPS = st.lists(
    st.tuples(
        st.integers(0, 4), st.sampled_from(["submit", "copy", "settle", "refuse", "withdraw", "release", "lose"])
    ),
    max_size=14,
)


class Violation:
    rule, severity, message = "any", "block", "no"


@given(STEPS)
@settings(max_examples=40, deadline=None)
def test_all_forms_agree_with_the_definition(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[int, str]]
) -> None:
    plane = open_plane(tmp_path_factory.mktemp("accounting"))
    for number, step in steps:
        identifier, sha256 = f"{number:032x}", digest(encode(example_episode(number)))
        status = plane.ingest.status(identifier)
        if step == "submit":
            plane.submit(example_episode(number))
        elif step == "copy" and status != "unknown":
            other_copy(plane, number)
        elif step == "settle":
            plane.settle()
        elif step == "refuse":
            plane.settle(lambda episode: [Violation()])  # type: ignore[list-item]
        elif step == "withdraw":
            plane.snapshots.withdraw([identifier], reason="x", writer="t")
        elif step == "release" and status == "quarantined":
            with plane.catalog.read() as connection:
                mine = (quarantine.c.episode_id == identifier) & (quarantine.c.sha256 == sha256)
                held = connection.execute(sa.select(quarantine.c.version).where(mine)).first()
            if held is not None and held.version is None:
                plane.ingest.release(identifier, sha256)
        elif step == "lose":
            with plane.catalog.begin() as connection:
                connection.execute(outbox.delete().where(outbox.c.episode_id == identifier))
    with plane.catalog.read() as connection:
        committed = {(row.episode_id, row.sha256) for row in connection.execute(sa.select(episodes))}
        members = set(connection.execute(sa.select(snapshot_episodes.c.episode_id)).scalars())
        held_names = {(row.episode_id, row.sha256) for row in connection.execute(sa.select(quarantine))}
        open_names = {name for name in committed if name[0] not in members and name not in held_names}
        assert count_unaccounted(connection) == len(open_names)
        query = sa.select(outbox.c.episode_id, outbox.c.sha256).where(unaccounted(outbox))
        announced = {(row.episode_id, row.sha256) for row in connection.execute(sa.select(outbox))}
        assert {tuple(row) for row in connection.execute(query)} == open_names & announced
        found = standings(connection, committed | held_names)
    assert {name for name, standing in found.items() if standing.committed and not standing.accounted} == open_names
    for (identifier, sha256), standing in found.items():
        assert standing.member == ((identifier, sha256) in committed and identifier in members)
