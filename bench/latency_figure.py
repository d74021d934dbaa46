"""The latency benchmark's picture: both latencies of every run beside the paper's, and the cost of a commit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PAPER = {"episode_to_learner_s": {"p50": 41.0, "p99": 148.0}, "publish_to_active_s": {"p50": 38.0, "p99": 55.0}}
"""Table VI of the paper: 1,604 episodes of 16 real robots over eight hours, on links of their own."""

_BLUE, _ORANGE, _GREY = "#3b6fb6", "#e08a1e", "#7a8794"


def figure(results: Mapping[str, Any], target: Path) -> Path:
    """Left and middle: a dot at P50, a bar to P99, by run; right: milliseconds by catalogue size. SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    runs = results["runs"]
    names = [_name(run) for run in runs] + ["the paper's Table VI"]
    with plt.rc_context({"svg.hashsalt": "latency", "font.size": 9.5, "svg.fonttype": "none"}):
        fig, (learner, active, cost) = plt.subplots(
            1, 3, figsize=(12, 1.6 + 0.25 * len(names)), width_ratios=(3, 3, 2), layout="constrained"
        )
        for axes, key, title in (
            (learner, "episode_to_learner_s", "episode to learner, s"),
            (active, "publish_to_active_s", "publish to active, s"),
        ):
            for row, found in enumerate([*(run[key] for run in runs), PAPER[key]]):
                colour = _GREY if row == len(runs) else _BLUE if runs[row]["link"] is None else _ORANGE
                axes.plot([found["p50"], found["p99"]], [row, row], color=colour, linewidth=2)
                axes.plot(found["p50"], row, "o", color=colour, markersize=5)
                axes.plot(found["p99"], row, "|", color=colour, markersize=10, markeredgewidth=2)
            axes.set(xscale="log", title=f"{title}: dot P50, bar P99")
            axes.set_yticks(range(len(names)), names if axes is learner else [""] * len(names))
            axes.invert_yaxis()
            axes.grid(axis="x", color="#dddddd", linewidth=0.6)
            axes.set_axisbelow(True)
        _cost(cost, results.get("commit_ms_by_catalogue_size", {}), results.get("catalogue_ms_by_size", {}))
        for axes in (learner, active, cost):
            axes.spines[["top", "right"]].set_visible(False)
        target.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(target, metadata={"Date": None})
        plt.close(fig)
    return target


def _cost(axes: Any, both: Mapping[str, float], parts: Mapping[str, Mapping[str, float]]) -> None:
    axes.plot([int(size) for size in both], list(both.values()), "o-", color="black", label="both")
    for name, colour in (("ingest", _BLUE), ("coordinator", _ORANGE)):
        by_size = parts.get(name, {})
        axes.plot([int(size) for size in by_size], list(by_size.values()), "o-", color=colour, markersize=4, label=name)
    axes.set(xscale="log", ylim=(0, None), xlabel="episodes in the catalog", title="commit of 10 episodes, ms")
    axes.legend(frameon=False)


def _name(run: Mapping[str, Any]) -> str:
    link = run["link"]
    shaped = f", {link['delay_ms']:g} ms, {link['mbit_s']:g} Mbit/s" if link else ""
    return f"{run['actors']} robots, {run['payload_mib']:g} MiB{shaped}"
