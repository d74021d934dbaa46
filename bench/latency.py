"""Latency and load through real servers: `python -m bench.latency` writes docs/results/latency.json and its figure.

- episode-to-learner: from the call that closes an episode on its robot until the learner's end holds the snapshot that
  it is in;
- publish-to-staged, publish-to-active: from the call that publishes a policy until a robot between two episodes has
  verified it, and has loaded it and swapped;
- the cost of a commit, and of the snapshot that takes it, in a catalog of 10^4, 10^5 and 10^6 episodes.

Episodes arrive at a stated pace, which the machine bears: a saturated one shows its queue and nothing else. Policies
are published meanwhile. Robots reach service and store directly, or over a link of a stated delay and rate that they
share.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.envelope import RESULTS, Envelope
from bench.fleet import Fleet, sigterm_interrupts
from bench.latency_commit import commit_costs
from bench.latency_figure import PAPER, figure
from bench.latency_run import Link, Run, measure
from bench.speed import random_bundle
from infra.policy.channel import PolicyPublisher
from infra.policy.keys import create_keys
from infra.reconcile import GRACE_S, SWEEP_S

SHARED = Link(delay_ms=30.0, mbit_s=100.0)
RUNS = (
    Run(16, 0.1, None, 4.0, 15.0),
    Run(64, 0.1, None, 4.0, 15.0),
    Run(256, 0.1, None, 4.0, 20.0),
    Run(16, 4.0, None, 1.0, 80.0),
    Run(64, 4.0, None, 1.0, 25.0),
    Run(256, 4.0, None, 1.0, 20.0),
    Run(16, 40.0, None, 0.15, 50.0),
    Run(16, 0.1, SHARED, 4.0, 15.0),
    Run(64, 0.1, SHARED, 4.0, 20.0),
    Run(256, 0.1, SHARED, 4.0, 30.0),
    Run(16, 4.0, SHARED, 1.0, 30.0),
    Run(64, 4.0, SHARED, 1.0, 30.0),
    Run(256, 4.0, SHARED, 1.0, 30.0),
    Run(16, 40.0, SHARED, 0.1, 50.0),
)
LEFT_OUT = {
    "64 actors, 40 MiB": "at the 0.1 episodes/s that two cores bear, it is the run of 16 actors: most robots send none",
    "256 actors, 40 MiB": "the same",
}
QUICK = (Run(4, 0.1, None, 2.0, 5.0), Run(4, 0.1, SHARED, 2.0, 5.0))
SIZES, QUICK_SIZES = (10_000, 100_000, 1_000_000), (1_000, 10_000)


def latencies(folder: Path, runs: Sequence[Run], say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The runs, one after another on one fleet."""
    os.environ["OMP_NUM_THREADS"] = "1"
    fleet = Fleet(folder, all_links=False, micro_batch=64, cache_max_mib=1024, s3_timeout_s=30.0)
    found = []
    try:
        publisher = PolicyPublisher(fleet.catalog, fleet.objects, create_keys(fleet.settings.keys_dir))
        bundle = random_bundle(folder / "bundle")
        publisher.publish(bundle)
        fleet.start_processes(reconcile_s=60.0, grace_s=GRACE_S, sweep_s=SWEEP_S)
        fleet.enrol(max(run.actors for run in runs))
        for run in runs:
            found.append(measure(fleet, publisher, bundle, run))
            say(line(found[-1]))
    finally:
        fleet.close()
    return found


def line(run: Mapping[str, Any]) -> str:
    """One run in words."""
    link = "direct" if run["link"] is None else "{delay_ms:g} ms, {mbit_s:g} Mbit/s".format(**run["link"])
    figures = [
        f"{name.removesuffix('_s').replace('_', '-')} p50 {run[name]['p50']:.2f} s, p99 {run[name]['p99']:.2f} s"
        for name in ("episode_to_learner_s", "publish_to_staged_s", "publish_to_active_s")
    ]
    return f"{run['actors']} robots, {run['payload_mib']:g} MiB, {link}: " + "; ".join(figures)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two short runs and a small catalog: see that it works")
    parser.add_argument("--only", nargs="*", choices=("runs", "commits"), default=["runs", "commits"])
    parser.add_argument("--folder", type=Path, default=Path("runs/bench/latency"))
    parser.add_argument("--out", type=Path, help="JSON file; docs/results/latency.json if not given")
    options = parser.parse_args(words)
    sigterm_interrupts()
    if options.out is None and (options.quick or len(options.only) < 2):
        parser.error("a part is not kept as a result: give --out")
    out = options.out or RESULTS / "latency.json"
    given = sys.argv[1:] if words is None else list(words)
    envelope = Envelope(
        "latency", " ".join(["python -m bench.latency", *given]) if given else "make bench-latency", [0]
    )

    def say(text: str) -> None:
        print(text, flush=True)

    results: dict[str, Any] = {"runs": []}
    if "runs" in options.only:
        results["runs"] = latencies(options.folder, QUICK if options.quick else RUNS, say)
    if "commits" in options.only:
        results |= commit_costs(QUICK_SIZES if options.quick else SIZES)
        say(f"commit and snapshot of 10, ms by catalogue size: {results['commit_ms_by_catalogue_size']}")
    results |= {"left_out": LEFT_OUT, "paper": PAPER}
    envelope.write(out, results)
    say(f"{out}, {figure(results, out.with_suffix('.svg'))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
