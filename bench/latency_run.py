"""One run of the latency benchmark: so many robots, episodes of a size at a pace, policies published meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import sqlalchemy as sa

from bench import actors, followers
from bench.fleet import Fleet
from bench.oplog import operations
from bench.robots import robot_name
from infra.catalog.schema import episodes, loads, snapshot_episodes, snapshots
from infra.errors import UnavailableError
from infra.policy.channel import PolicyPublisher

STAGES = ("close", "upload_and_commit", "to_snapshot", "to_learner")
"""Of an episode's way: onto the robot's disk; to the store, verified, committed; announced, checked, in a snapshot;
fetched and held by the learner's end."""
WARM_S = 3.0  # first connections, first statements: not counted
_DRAIN_S = 120.0
_PUBLISH_S = 90.0
_BETWEEN_S = 3.0  # from one policy being active everywhere to the next
_HOSTS = 2
_FEW = 20  # episodes of a run that are all counted


@dataclass(frozen=True)
class Link:
    """What lies between robots and servers: added to each direction, and shared by all robots."""

    delay_ms: float
    mbit_s: float


@dataclass(frozen=True)
class Run:
    """One combination.

    Attributes:
        actors: robots; each records episodes and follows the policy channel.
        payload_mib: of an episode.
        episodes_per_s: that arrive from all robots together, as a Poisson process.
        seconds: for so long.
    """

    actors: int
    payload_mib: float
    link: Link | None
    episodes_per_s: float
    seconds: float

    @property
    def policy_poll_s(self) -> float:
        """How often a robot asks for announcements: the larger the fleet the less: it asks 50 times a second."""
        return max(0.2, self.actors / 50)


def measure(fleet: Fleet, publisher: PolicyPublisher, bundle: Path, run: Run) -> dict[str, Any]:
    """Do a run on a fleet at rest, and leave it at rest; its record for the results.

    Raises:
        UnavailableError: episodes or a policy did not arrive in time.
    """
    for path in [*(fleet.robots / actors.KIND).glob("*"), *(fleet.robots / followers.KIND).glob("*")]:
        path.unlink()
    tag = f"{run.actors}-{run.payload_mib:g}-{'direct' if run.link is None else 'link'}"
    follow = _start_followers(fleet, run, f"followers-{tag}")
    pace = ["--pace", str(run.actors / run.episodes_per_s), "--seconds", str(run.seconds), "--episodes", "1000000"]
    size = ["--payload", str(run.payload_mib), "--poll", "0.1", "--seed", str(run.actors)]
    try:
        _shape(fleet, run.link)
        began = time.time()
        record = fleet.start_robots(
            f"actors-{tag}", "bench.actors", run.actors, _HOSTS, [*pace, *size, "--route", fleet.route]
        )
        follow += record
        published = list(_publish(fleet, publisher, bundle, run, began))
        _wait(fleet, _DRAIN_S, "spools are not empty", lambda: all(map(fleet.supervisor.finished, record)))
        way = np.asarray(_way_of_episodes(fleet))
    finally:
        fleet.supervisor.stop(follow, timeout_s=15.0)
        _shape(fleet, None)
    return {
        "actors": run.actors,
        "payload_mib": run.payload_mib,
        "link": None if run.link is None else asdict(run.link),
        "episode_to_learner_s": _quantiles(way[:, -1] - way[:, 0]),
        "publish_to_staged_s": _quantiles([staged for staged, _ in published]),
        "publish_to_active_s": _quantiles([active for _, active in published]),
        "episodes_per_h": round(3600 * run.episodes_per_s),
        "episodes": len(way),
        "stages_p50_s": dict(zip(STAGES, np.round(np.median(np.diff(way), axis=0), 3).tolist(), strict=True)),
        "activations": len(published),
        "policy_poll_s": round(run.policy_poll_s, 2),
    }


def _start_followers(fleet: Fleet, run: Run, name: str) -> list[str]:
    """Robots that have the policy which was announced last; the names of their processes."""
    options = ["--keys", str(fleet.settings.keys_dir), "--pause", str(run.policy_poll_s), "--route", fleet.route]
    names = fleet.start_robots(name, "bench.followers", run.actors, _HOSTS, options)

    def ready() -> bool:
        return {line["robot"] for line in _lines(fleet) if line["op"] == "ready"} == _robots(run)

    _wait(fleet, _DRAIN_S, "robots have no policy yet", ready)
    return names


def _publish(
    fleet: Fleet, publisher: PolicyPublisher, bundle: Path, run: Run, began: float
) -> Iterator[tuple[float, float]]:
    """One policy after another while the run lasts, at least one; of each robot, seconds from the call to staged and
    to active."""
    _wait(fleet, WARM_S)
    while True:
        called = time.time()
        version = publisher.publish(bundle)
        everywhere = partial(_is_active, fleet, run, version)
        _wait(fleet, _PUBLISH_S, f"policy {version} is not active everywhere", everywhere)
        for line in _lines(fleet):
            if line.get("version") == version:
                yield line["staged"] - called, line["active"] - called
        _wait(fleet, _BETWEEN_S)
        if time.time() > began + run.seconds:
            return


def _is_active(fleet: Fleet, run: Run, version: int) -> bool:
    return {line["robot"] for line in _lines(fleet) if line.get("version") == version} == _robots(run)


def _way_of_episodes(fleet: Fleet) -> list[list[float]]:
    """Of each episode, when it was: being closed on its robot, closed, committed, in a snapshot, held by the learner's
    end; seconds since the epoch. One machine, one clock."""
    closed = {line["id"]: line for line in operations(fleet.robots / actors.KIND) if line["op"] == "closed"}
    warm = min(line["began"] for line in closed.values()) + WARM_S
    query = (
        sa.select(episodes.c.episode_id, episodes.c.committed_at, snapshots.c.created_at, loads.c.loaded_at)
        .join(snapshot_episodes, snapshot_episodes.c.episode_id == episodes.c.episode_id)
        .join(snapshots, snapshots.c.version == snapshot_episodes.c.added)
        .join(loads, sa.and_(loads.c.version == snapshot_episodes.c.added, loads.c.reader == "learner"))
        .where(episodes.c.episode_id.in_(list(closed)))
    )
    later: dict[str, list[float]] = {}

    def there() -> bool:
        with fleet.catalog.read() as connection:
            later.update({row[0]: [float(at) for at in row[1:]] for row in connection.execute(query)})
        return len(later) == len(closed)

    _wait(fleet, _DRAIN_S, "the learner's end does not have all episodes", there)
    return [
        [line["began"], line["at"], *later[name]]
        for name, line in closed.items()
        if line["began"] >= warm or len(closed) < _FEW
    ]


def _shape(fleet: Fleet, link: Link | None) -> None:
    for proxy in (fleet.store_link, fleet.service_link):
        proxy.clear()
        if link is not None:
            proxy.set(delay_s=link.delay_ms / 1000, rate_bytes_s=link.mbit_s * 1e6 / 8)


def _robots(run: Run) -> set[str]:
    return {robot_name(number) for number in range(run.actors)}


def _lines(fleet: Fleet) -> Iterator[dict[str, Any]]:
    return operations(fleet.robots / followers.KIND)


def _wait(fleet: Fleet, seconds: float, problem: str = "", until: Callable[[], bool] = lambda: False) -> None:
    """Keep the processes alive for so long, or until what is waited for; UnavailableError if that must come."""
    end = time.monotonic() + seconds
    while not until():
        fleet.supervisor.poll()
        if time.monotonic() > end:
            if problem:
                raise UnavailableError(f"after {seconds:.0f} s, {problem}", f"read {fleet.home / 'logs'}")
            return
        time.sleep(0.05)


def _quantiles(seconds: Sequence[float] | npt.NDArray[np.float64]) -> dict[str, float]:
    return {name: round(float(np.quantile(seconds, q)), 3) for name, q in (("p50", 0.5), ("p99", 0.99))}
