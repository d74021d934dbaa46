"""Latency and load through real servers: `python -m bench.latency` writes docs/results/latency.json and its figure.

- episode-to-learner: from the moment a robot's spool has closed the episode until the learner's end holds the snapshot
  that it is in;
- publish-to-staged, publish-to-active: from the call that publishes a policy until an idle robot has verified it, and runs
  it;
- the cost of a commit, and of the snapshot that takes it, in a catalog of 10^4, 10^5 and 10^6 episodes.

Episodes arrive at a stated pace: a saturated system shows its queue and nothing else.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import sqlalchemy as sa
from rich.console import Console

from bench.actors import STEPS
from bench.envelope import RESULTS, Envelope
from bench.fleet import Fleet
from bench.latency_commit import commit_costs
from infra.catalog.schema import episodes, loads, snapshot_episodes
from infra.edge.remote import RemoteServer
from infra.errors import LwdError
from infra.policy.channel import PolicyPublisher
from infra.policy.keys import create_keys, load_trusted
from infra.policy.subscriber import PolicySubscriber
from infra.service.auth import Tokens

matplotlib.use("svg")
console = Console(stderr=True)

PAPER = {"episode_to_learner_s": {"p50": 41.0, "p99": 148.0}, "publish_to_active_s": {"p50": 38.0, "p99": 55.0}}
"""Table VI of the paper: 1,604 episodes of 16 real robots over eight hours."""

# actors, payload in MiB, link, mean seconds between two episodes of a robot, seconds of the run
RUNS = (
    (16, 0.1, None, 2.0, 30.0),
    (16, 4.0, None, 8.0, 45.0),
    (16, 40.0, None, 120.0, 60.0),
    (64, 0.1, None, 8.0, 30.0),
    (64, 4.0, None, 32.0, 45.0),
    (256, 0.1, None, 32.0, 40.0),
    (16, 4.0, {"delay_ms": 30.0, "mbit_s": 100.0}, 40.0, 60.0),
)
QUICK = ((16, 0.1, None, 2.0, 12.0),)
_BYTES_PER_VALUE = 4
_POLICY_BYTES = 1_700_000  # of the state preset
_PUBLISHES = 12


def measure(folder: Path, run: tuple[Any, ...]) -> dict[str, Any]:
    """One combination of actors, payload and link, on a fleet of its own."""
    actors, mib, link, pace, seconds = run
    width = max(1, int(mib * 2**20 / _BYTES_PER_VALUE / (STEPS + 1)))
    fleet = Fleet(folder, check="bench.fleet:no_check", micro_batch=32, s3_timeout_s=30.0, cache_max_mib=4096)
    try:
        fleet.start_processes(reconcile_s=60.0, grace_s=3600.0)
        _until_it_works(fleet)
        if link is not None:
            for proxy in (fleet.store_link, fleet.service_link):
                proxy.set(delay_s=link["delay_ms"] / 1000, rate_bytes_s=link["mbit_s"] * 1e6 / 8)
        share = ["--episodes", "1000000", "--pace", str(pace), "--width", str(width), "--poll", "0.1"]
        names = fleet.start_actors(actors, min(actors, 4), share)
        published = _publish(fleet, seconds)
        fleet.supervisor.stop(names, timeout_s=30.0)
        found = _episode_to_learner(fleet)
    finally:
        fleet.close()
    result = {
        "actors": actors,
        "payload_mib": mib,
        "link": link,
        "pace_s": pace,
        "episodes": len(found),
        "episodes_per_h": round(len(found) / seconds * 3600),
        "episode_to_learner_s": _quantiles(found),
        **{name: _quantiles(values) for name, values in published.items()},
    }
    console.print(result, highlight=False)
    return result


def _until_it_works(fleet: Fleet) -> None:
    """Wait until the service serves and the reader looks."""
    tokens = Tokens(fleet.catalog)
    server = RemoteServer(fleet.url, tokens.enrol("probe", "learning", days=1, actor="benchmark"), robot_id="probe")
    end = time.monotonic() + 60.0
    while True:
        try:
            server.statuses([("0" * 32, "0" * 64)])
            break
        except LwdError:
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
    server.close()
    while not (fleet.home / "reader.jsonl").exists():
        time.sleep(0.1)


def _publish(fleet: Fleet, seconds: float) -> dict[str, list[float]]:
    """Publish policies over `seconds` to four idle robots that follow the service; how long each took."""
    keys = fleet.home / "keys"
    publisher = PolicyPublisher(fleet.catalog, fleet.objects, create_keys(keys))
    bundle = fleet.home / "bundle"
    bundle.mkdir()
    rng = np.random.default_rng(0)
    (bundle / "architecture.json").write_text("{}")
    began: dict[int, float] = {}
    found: dict[str, list[float]] = {"publish_to_staged_s": [], "publish_to_active_s": []}
    stop = threading.Event()
    tokens = Tokens(fleet.catalog)

    def follow(number: int) -> None:
        name = f"idle{number}"
        server = RemoteServer(fleet.url, tokens.enrol(name, "learning", days=1, actor="benchmark"), robot_id=name)
        subscriber = PolicySubscriber(fleet.robots / "policy" / name, "learning", server, load_trusted(keys))
        while not stop.wait(fleet.settings.poll_s):
            try:
                staged = subscriber.poll()
            except LwdError:
                continue
            if staged is not None:
                at = time.perf_counter()
                active = subscriber.activate_at_boundary()
                if active is not None and active.version in began:
                    found["publish_to_staged_s"].append(at - began[active.version])
                    found["publish_to_active_s"].append(time.perf_counter() - began[active.version])
        server.close()

    threads = [threading.Thread(target=follow, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    try:
        for version in range(1, _PUBLISHES + 1):
            fleet.supervisor.poll()
            time.sleep(seconds / _PUBLISHES)
            (bundle / "policy.safetensors").write_bytes(rng.bytes(_POLICY_BYTES))
            began[version] = time.perf_counter()
            publisher.publish(bundle)
        time.sleep(2.0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    return found


def _episode_to_learner(fleet: Fleet) -> list[float]:
    """Once what was closed has arrived, seconds of each episode; one clock, since all of it runs on this machine."""
    end = time.monotonic() + 60.0
    query = (
        sa.select(loads.c.loaded_at - episodes.c.produced_at)
        .select_from(snapshot_episodes)
        .join(episodes, episodes.c.episode_id == snapshot_episodes.c.episode_id)
        .join(loads, sa.and_(loads.c.version == snapshot_episodes.c.added, loads.c.reader == "learner"))
    )
    while True:
        with fleet.catalog.read() as connection:
            committed = connection.execute(sa.select(sa.func.count()).select_from(episodes)).scalar_one()
            found = [float(value) for value in connection.execute(query).scalars()]
        if len(found) == committed or time.monotonic() > end:
            return found
        time.sleep(0.2)


def _quantiles(values: list[float]) -> dict[str, float]:
    return {name: round(float(np.quantile(values, q)), 3) for name, q in (("p50", 0.5), ("p99", 0.99))}


def figure(target: Path, results: dict[str, Any]) -> None:
    """Both latencies of every run beside the paper's, and the cost of a commit over the catalog's size."""
    import matplotlib.pyplot as plt

    runs = results["runs"]
    names = [_name(run) for run in runs] + ["the paper: 16 robots, 8 h"]
    fig, axes = plt.subplots(1, 3, figsize=(12, 4.2), width_ratios=(3, 3, 2))
    for axis, key, title in (
        (axes[0], "episode_to_learner_s", "episode to learner, s"),
        (axes[1], "publish_to_active_s", "publish to active, s"),
    ):
        for place, quantiles in enumerate([run[key] for run in runs] + [PAPER[key]]):
            colour = "#8a97a6" if place == len(runs) else "#3b6fb6"
            axis.plot([quantiles["p50"], quantiles["p99"]], [place] * 2, "-", color=colour, lw=2)
            axis.plot(quantiles["p50"], place, "o", color=colour)
            axis.plot(quantiles["p99"], place, "|", color=colour, ms=12, mew=2)
        axis.set_xscale("log")
        axis.set_yticks(range(len(names)), names if axis is axes[0] else [""] * len(names), fontsize=8)
        axis.invert_yaxis()
        axis.set_title(f"{title} (dot P50, bar P99)", fontsize=10)
    costs = results["commit_ms_by_catalogue_size"]
    axes[2].plot([int(size) for size in costs], list(costs.values()), "o-", color="#e08a1e")
    axes[2].set_xscale("log")
    axes[2].set_ylim(0, None)
    axes[2].set_title("commit and snapshot of 10, ms", fontsize=10)
    axes[2].set_xlabel("episodes in the catalog")
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    fig.tight_layout()
    fig.savefig(target)
    plt.close(fig)


def _name(run: dict[str, Any]) -> str:
    link = run["link"]
    shaped = f", {link['delay_ms']:.0f} ms, {link['mbit_s']:.0f} Mbit/s" if link else ""
    return f"{run['actors']} robots, {run['payload_mib']:g} MiB{shaped}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short run and a small catalog")
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/latency"))
    parser.add_argument("--out", type=Path, default=RESULTS / "latency.json")
    options = parser.parse_args()
    envelope = Envelope("latency", "make bench-latency", [0])
    runs = [measure(options.folder, run) for run in (QUICK if options.quick else RUNS)]
    sizes = (1_000, 10_000) if options.quick else (10_000, 100_000, 1_000_000)
    costs = commit_costs(sizes)
    console.print(costs)
    results = {"runs": runs, "paper": PAPER, **costs}
    envelope.write(options.out, results)
    figure(options.out.with_suffix(".svg"), results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
