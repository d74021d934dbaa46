"""The learning benchmark: SFT, offline and online on the full suite, seed after seed → docs/results/learning.json.

    make bench-learning                 # one seed of the eight tasks
    make bench-learning SEEDS=3
    python -m bench.learning --suite demo --seeds 3    # the demo's four tasks and budget → docs/results/demo.json

Each seed runs in a frozen workspace below runs/bench; stopped, the same command goes on. Intervals: 95 %, bootstrap
over seeds and episodes (lwd_model.statistics).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import yaml

from bench.envelope import RESULTS, Envelope
from bench.workspace import ROOT, freeze, merged
from infra.lifeline import MARK, lifeline
from lwd_model.evaluation import EpisodeResult, method_record

matplotlib.use("Agg")
import matplotlib.pyplot as plt

METHODS = ("sft", "offline", "online")
LABELS = {"sft": "SFT", "offline": "LWD offline", "online": "LWD online"}
COLORS = {"sft": "#8a97a6", "offline": "#4a90d9", "online": "#e08a2e"}
SUITES = {"full": ("learning", ROOT / "bench/learning.yaml"), "demo": ("demo", ROOT / "bench/demo.yaml")}


def run_seed(suite: str, seed: int) -> dict[str, Any]:
    """The result of one seed, from its workspace if it is complete there."""
    overrides = SUITES[suite][1]
    params = merged(yaml.safe_load(overrides.read_text()), {"seed": seed})
    folder = freeze(ROOT / "runs" / "bench" / suite / f"seed-{seed}", params)
    result = folder / "result.json"
    if not result.exists():
        # The workspace's own copy of the code comes first; this environment's installation of it is never imported.
        environment = os.environ | {"PYTHONPATH": str(folder)}
        command = [sys.executable, "-m", "bench.learning_seed"]
        with lifeline() as mark:
            subprocess.run(command, cwd=folder, check=True, env=environment | {MARK: mark})
    return dict(json.loads(result.read_text()))


def methods(seeds: list[dict[str, Any]]) -> dict[str, Any]:
    """RESULTS-format record of each method over the seeds."""
    records = {}
    for name in METHODS:
        runs = [[EpisodeResult.from_dict(raw) for raw in seed["episodes"][name]] for seed in seeds]
        updates, steps = seeds[0]["updates"][name], [seed["env_steps"].get(name) for seed in seeds]
        total = None if None in steps else sum(steps)
        records[name] = method_record(runs, updates=updates, env_steps=total)
    return records


def draw(records: dict[str, Any], seeds: list[dict[str, Any]], path: Path) -> None:
    """Success per task with Wilson intervals, the averages, and the online learning curve."""
    tasks = list(records["sft"]["per_task"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(11, 4.2), gridspec_kw={"width_ratios": [2.2, 1]}, layout="constrained"
    )
    for offset, name in enumerate(METHODS):
        record = records[name]
        rows = [record["per_task"][task]["success"] for task in tasks] + [record["success"]]
        at = [i + (i == len(tasks)) * 0.5 + (offset - 1) * 0.26 for i in range(len(rows))]
        mean = [row["mean"] for row in rows]
        error = [[row["mean"] - row["low"] for row in rows], [row["high"] - row["mean"] for row in rows]]
        left.bar(at, mean, 0.24, color=COLORS[name], label=LABELS[name])
        left.errorbar(at, mean, [[max(0.0, e) for e in side] for side in error], fmt="none", ecolor="#333", lw=1)
    left.set_xticks([*range(len(tasks)), len(tasks) + 0.5], [*tasks, "all"])
    left.set(ylim=(0, 1.02), ylabel="success", title=f"success per task, {len(seeds)} seed(s), 95 % intervals")
    left.legend(frameon=False, ncols=3, loc="lower center", bbox_to_anchor=(0.5, -0.25))
    for seed in seeds:
        points = [(p["episodes"], p["success"]["mean"]) for p in seed["curve"]]
        ends = [method_record([[EpisodeResult.from_dict(r) for r in seed["episodes"][m]]])["success"]["mean"]
                for m in ("offline", "online")]  # fmt: skip
        points = [(0, ends[0]), *points, (seed["loop"]["episodes"], ends[1])]
        right.plot(*zip(*points, strict=True), marker="o", ms=4, color=COLORS["online"], alpha=0.8)
        for p in seed["curve"]:
            right.plot([p["episodes"]] * 2, [p["success"]["low"], p["success"]["high"]], color=COLORS["online"], lw=1)
    sft = records["sft"]["success"]["mean"]
    right.axhline(sft, color=COLORS["sft"], ls="--", lw=1)
    right.text(0, sft + 0.01, "SFT", color=COLORS["sft"])
    right.set(
        ylim=(0, 1.02),
        xlabel="online episodes",
        ylabel="success",
        title="while deployed",
    )
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    plt.close(figure)


def main() -> None:
    """Run, aggregate, write JSON and figure."""
    parser = argparse.ArgumentParser(prog="python -m bench.learning", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--suite", choices=SUITES, default="full")
    options = parser.parse_args()
    name, _ = SUITES[options.suite]
    command = (
        f"make bench-learning SEEDS={options.seeds}"
        if options.suite == "full"
        else f"python -m bench.learning --suite {options.suite} --seeds {options.seeds}"
    )
    envelope = Envelope(name, command, list(range(options.seeds)))
    seeds = []
    for seed in range(options.seeds):
        seeds.append(run_seed(options.suite, seed))
        records = methods(seeds)
        per_task = len(seeds[0]["episodes"]["sft"]) // len(records["sft"]["per_task"])
        envelope.seeds = [done["seed"] for done in seeds]
        results = {
            "suite": "scene-8" if options.suite == "full" else "scene-4",
            "episodes_per_task": per_task,
            "methods": records,
            "loops": [done["loop"] for done in seeds],
        }
        path = envelope.write(RESULTS / f"{name}.json", results)
        draw(records, seeds, RESULTS / f"{name}.svg")
        print(f"{path}: " + ", ".join(f"{m} {records[m]['success']['mean']:.3f}" for m in METHODS))


if __name__ == "__main__":
    main()
