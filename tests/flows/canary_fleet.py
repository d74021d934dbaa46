"""A deployment and its robots at work, for tests of the canary."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "infra"))
sys.path.insert(0, str(Path(__file__).parents[1] / "infra" / "policy"))
from invariants import digest, example_episode
from policies import make_bundle

from flows.deployment import Deployment
from infra.catalog import dialect, schema
from infra.coordinator import Coordinator
from infra.episode import encode
from infra.events.outbox import OutboxLog
from infra.ingest import Ingest
from infra.policy.channel import CatalogPolicySource
from infra.policy.keys import load_trusted
from infra.policy.subscriber import PolicySubscriber

TASKS = ("S1", "S2", "S3", "S4")
QUICK = {"episodes": {"min": 10, "planned": 20, "max": 40}, "harm": {"margin": 0.05}}


class Fleet:
    """A deployment and its robots: real episodes, really committed, and real ends of the policy channel."""

    def __init__(self, plane: Deployment) -> None:
        self.plane = plane
        self.ingest = Ingest(plane.catalog, plane.objects)
        self.coordinator = Coordinator(
            plane.catalog, plane.objects, OutboxLog(plane.catalog), self.check, micro_batch=64, lease_s=60
        )
        self.subscribers: dict[str, PolicySubscriber] = {}
        self.history: dict[str, list[int]] = {}
        self.number = 0

    @staticmethod
    def check(episode: object) -> list[object]:
        """The contract of these tests: an episode of half a second is too short."""

        class Refusal:
            rule, severity, message = "short", "block", "too short"

        return [Refusal()] if episode.steps < 4 else []  # type: ignore[attr-defined]

    def robot(self, name: str, cohort: str) -> None:
        source = CatalogPolicySource(self.plane.catalog, self.plane.objects)
        self.subscribers[name] = PolicySubscriber(
            self.plane.settings.robots_dir / name, cohort, source, load_trusted(self.plane.settings.keys_dir)
        )
        self.history[name] = []
        with self.plane.catalog.begin() as connection:
            row = {"robot_id": name, "cohort": cohort, "last_seen": dialect.now(connection)}
            dialect.upsert(connection, schema.robots, row)

    def boundary(self, name: str) -> int:
        """A robot between two episodes: the version that it runs."""
        subscriber = self.subscribers[name]
        subscriber.poll()
        active = subscriber.activate_at_boundary()
        assert active is not None
        if self.history[name][-1:] != [active.version]:
            self.history[name].append(active.version)
        return active.version

    def run(self, name: str, successes: list[bool], **changes: object) -> None:
        """Episodes of one robot, under the policy that it has, to the snapshot."""
        for success in successes:
            self._submit(name, success, TASKS[self.number % 4], changes)
        self._settle()

    def together(self, new: list[bool], old: list[bool], **changes: object) -> None:
        """Episodes of the canary robot c0, and as many of the production robot p0 of the same tasks, in turn.

        Args:
            new, old: outcomes of c0 and p0.
            changes: to the canary robot's episodes.
        """
        for number, (ours, theirs) in enumerate(zip(new, old, strict=True)):
            self._submit("c0", ours, TASKS[number % 4], changes)
            self._submit("p0", theirs, TASKS[number % 4], {})
        self._settle()

    def _submit(self, name: str, success: bool, task: str, changes: dict[str, object]) -> None:
        said = {"policy_version": self.boundary(name), "outcome": "success" if success else "failure", "task": task}
        episode = example_episode(self.number, robot=name, **said | changes)
        data = encode(episode)
        self.ingest.submit(name, episode.episode_id, data, digest(data), len(data))
        self.number += 1

    def _settle(self) -> None:
        while self.coordinator.step():
            pass

    def publish(self) -> int:
        bundle = make_bundle(self.plane.settings.home / "export", seed=self.number)
        return self.plane.publisher.publish(bundle, cohort=None)


def at_work(plane: Deployment) -> Fleet:
    """Two production robots and one canary; the champion with 60 episodes, 54 of them good, and a candidate."""
    fleet = Fleet(plane)
    plane.registry.promote(fleet.publish(), {})
    for name, cohort in (("p0", "production"), ("p1", "production"), ("c0", "canary"), ("l0", "learning")):
        fleet.robot(name, cohort)
    for name in ("p0", "p1"):
        fleet.run(name, [number % 10 != 3 for number in range(30)])
    fleet.boundary("c0")
    fleet.publish()
    return fleet
