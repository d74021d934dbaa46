"""Speeds of learner, fleet, reader and data plane: `python -m bench.speed [--short]` writes docs/results/speed.json.

Other work on the machine slows what is measured and the matrix products alike, so that products are timed in turns
with everything: beside each figure stands the `matmul_gflops` of its own minutes. `learner` and `plain_4x256` are of
one thread, the number to compare with others'; `by_threads` has the rest. The policy that acts has the state preset's
networks with random weights: it fails, so that its evaluation episodes take their whole time.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

AUTHORS_UPDATES_PER_S = 7.2
"""The authors' JAX code on one thread at 4 × 256, batch 256, 2 critics."""


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds of so many seconds, and sizes."""

    rounds: int = 7
    seconds: float = 1.0
    threads: tuple[int, ...] = (1, 2)
    robots: int = 4
    step_s: float = 5.0
    tasks: tuple[str, ...] = ("S1", "S2", "S3", "S4", "L1", "L2", "L3", "L4")
    eval_per_task: int = 8
    eval_rounds: int = 3
    workers: int = 2
    buffer_episodes: int = 200
    spooled_episodes: int = 200
    peak_size: int = 2048


SHORT = Effort(
    rounds=1, seconds=0.1, threads=(1,), robots=1, step_s=0.3, tasks=("S1",), eval_per_task=1, eval_rounds=1, workers=0,
    buffer_episodes=8, spooled_episodes=2, peak_size=512,
)  # fmt: skip
"""Enough to see that every part runs; its figures mean little."""


def run(effort: Effort, policy: Path | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Everything, one part after another, in the format of `results`.

    Args:
        policy: folder of the policy that the fleet runs; one of the state preset with random weights if None.
    """
    import torch

    from bench.speed_fleet import env_steps, evaluation, spool_to_snapshot
    from bench.speed_learner import matmul_peak, measure, plain_4x256, state_preset
    from bench.speed_reader import reader

    def peak() -> float:
        return matmul_peak(torch.float32, 1, 0.3 * min(effort.seconds, 1.0), effort.peak_size)

    results: dict[str, Any] = {}
    for name, config in (("learner", state_preset()), ("plain_4x256", plain_4x256())):
        by_threads = {}
        for threads in effort.threads:
            record = measure(config, threads, rounds=effort.rounds, seconds=effort.seconds, peak_size=effort.peak_size)
            by_threads[str(threads)] = record
            say(
                f"{name}, {threads} thread(s): {record['updates_per_s']} updates/s, "
                f"{record['share_of_matmul_peak']:.0%} of {record['matmul_gflops']} GFLOP/s"
            )
        results[name] = next(iter(by_threads.values())) | {"by_threads": by_threads}
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="lwd-speed-") as folder:
        bundle = policy or random_bundle(Path(folder) / "bundle")
        steps = env_steps(bundle, effort.robots, effort.rounds, effort.step_s, peak)
        say(f"fleet: {steps['env_steps_per_s']} environment steps/s of {effort.robots} robots")
        found = evaluation(bundle, list(effort.tasks), effort.eval_per_task, effort.workers, effort.eval_rounds, peak)
        say(f"evaluation: {found['eval_episodes_per_min']} episodes/min of {found['steps_per_episode']} steps")
        read = reader(Path(folder) / "buffer", effort.buffer_episodes, effort.rounds, effort.seconds, peak)
        say(f"reader: {read['reader_samples_per_s']} samples/s; shards at {read['reader_share_of_raw']:.0%} of raw tar")
        spool = spool_to_snapshot(Path(folder) / "home", effort.spooled_episodes, effort.robots, peak)
        say(f"spool to snapshot: p50 {spool['p50']} s, p99 {spool['p99']} s over {spool['episodes']} episodes")
    results["env_steps_per_s"] = steps.pop("env_steps_per_s")
    results["eval_episodes_per_min"] = found.pop("eval_episodes_per_min")
    results["reader_samples_per_s"] = read.pop("reader_samples_per_s")
    results["reader_share_of_raw"] = read.pop("reader_share_of_raw")
    results["spool_to_snapshot_s"] = spool
    results["details"] = {"env_steps": steps, "evaluation": found, "reader": read}
    results["policy"] = "state preset, random weights" if policy is None else str(policy)
    results["authors_updates_per_s"] = AUTHORS_UPDATES_PER_S
    return results


def random_bundle(folder: Path) -> Path:
    """A policy of the deployed size for the scene."""
    import numpy as np
    import torch

    from bench.speed_learner import state_preset
    from infra.fleet.features import FEATURES
    from infra.fleet.tasks import TASKS
    from lwd_model.agent import LWDAgent
    from lwd_model.bundle import export_bundle
    from lwd_model.config import preset
    from lwd_model.normaliser import Normaliser

    instructions = tuple(task.instruction for task in TASKS.values())
    action_dim = state_preset().policy.action_dim
    config = preset("state", {"obs_dim": len(FEATURES), "action_dim": action_dim, "instructions": instructions})
    stats = Normaliser(np.zeros(len(FEATURES), np.float32), np.ones(len(FEATURES), np.float32))
    torch.manual_seed(0)
    return export_bundle(LWDAgent(config, stats).deployed, stats, config.policy, folder)


def figure(results: Mapping[str, Any], path: Path) -> Path:
    """Updates/s beside their share of the peak, and how many episodes are in a snapshot after a time; SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    import numpy as np

    rows = [
        (f"{label}, {threads} thread{'s' if threads != '1' else ''}", record)
        for name, label in (("learner", "state preset"), ("plain_4x256", "plain 4×256"))
        for threads, record in results[name]["by_threads"].items()
    ][::-1]
    with plt.rc_context({"svg.hashsalt": "speed", "font.size": 10, "svg.fonttype": "none"}):
        fig, (left, right) = plt.subplots(1, 2, figsize=(9.6, 2.8), layout="constrained", width_ratios=(3, 2))
        bars = left.barh(
            [label for label, _ in rows],
            [record["updates_per_s"] for _, record in rows],
            color=["#3b6fb6" if "state" in label else "#8aa9d6" for label, _ in rows],
            height=0.6,
        )
        shares = [f"{r['updates_per_s']:.1f}, {r['share_of_matmul_peak']:.0%} of peak" for _, r in rows]
        left.bar_label(bars, shares, padding=4, fontsize=9, bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})
        left.axvline(results["authors_updates_per_s"], color="#b3261e", linewidth=1, linestyle="--")
        left.margins(x=0.45)
        left.set(xlabel=f"learner updates per second (dashed: authors' code, {AUTHORS_UPDATES_PER_S})")
        spool = results["spool_to_snapshot_s"]
        shares_in = np.linspace(0, 100, len(spool["quantiles"]))
        right.plot(spool["quantiles"], shares_in, color="#3b6fb6", linewidth=1.8)
        for name, height in (("p50", 50), ("p99", 99)):
            right.plot(spool[name], height, "o", color="#3b6fb6", markersize=5)
            right.annotate(
                f"{name} {spool[name]:.2f} s", (spool[name], height), (6, -12), textcoords="offset points", fontsize=9
            )
        right.set(
            xlabel="seconds from spool to snapshot",
            ylabel="% of episodes",
            ylim=(0, 106),
            xlim=(0, 1.3 * spool["quantiles"][-1]),
        )
        for ax in (left, right):
            ax.spines[["top", "right"]].set_visible(False)
        path.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(path, metadata={"Date": None})
        plt.close(fig)
    return path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--short", action="store_true", help="a quick check that every part runs")
    parser.add_argument("--policy", type=Path, help="the policy that the fleet runs, for example models/offline/bundle")
    parser.add_argument("--out", type=Path, help="JSON file; docs/results/speed.json if not given")
    arguments = parser.parse_args(argv)
    from bench.envelope import RESULTS, Envelope

    if arguments.short and arguments.out is None:
        parser.error("--short measures too little to be kept as a result: give --out")
    out = arguments.out or RESULTS / "speed.json"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    effort = SHORT if arguments.short else Effort(threads=(1, 2) if cores > 1 else (1,), workers=cores)
    words = sys.argv[1:] if argv is None else list(argv)
    command = " ".join(["python -m bench.speed", *words]) if words else "make bench-speed"
    envelope = Envelope("speed", command, [0])
    results = run(effort, arguments.policy, lambda line: print(line, flush=True))
    envelope.write(out, results)
    print(f"{out}, {figure(results, out.with_suffix('.svg'))}")


if __name__ == "__main__":
    main()
