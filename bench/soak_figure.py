"""The soak's picture: throughput over time, and when which fault was injected."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WINDOW_S = 20.0
_BLUE, _ORANGE, _RED = "#3b6fb6", "#e08a1e", "#b3261e"


def rates(progress: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    """Minutes, and episodes/s over the `_WINDOW_S` before each of them."""
    at, rate, first = [], [], 0
    for number, point in enumerate(progress):
        while point["at"] - progress[first]["at"] > _WINDOW_S:
            first += 1
        if number > first:
            at.append(point["at"] / 60)
            rate.append((point[name] - progress[first][name]) / (point["at"] - progress[first]["at"]))
    return at, rate


def figure(target: Path, found: Mapping[str, Any]) -> Path:
    """Throughput above, a row of marks for each kind of fault below; SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    kinds = sorted(found["faults_injected"], reverse=True)
    with plt.rc_context({"svg.hashsalt": "soak", "font.size": 10, "svg.fonttype": "none"}):
        height = 2.6 + 0.19 * len(kinds)
        fig, (top, bottom) = plt.subplots(
            2, 1, figsize=(9.6, height), sharex=True, height_ratios=(2.2, 0.19 * len(kinds) + 0.1), layout="constrained"
        )
        for name, colour, label in (
            ("committed", _BLUE, "committed"),
            ("settled", _ORANGE, "in a snapshot or in quarantine"),
        ):
            top.plot(*rates(found["progress"], name), color=colour, linewidth=1.3, label=label)
        top.set(ylabel=f"episodes/s over {_WINDOW_S:.0f} s", ylim=(0, None))
        top.legend(frameon=False, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 0.98), ncols=2)
        for fault in found["faults"]:
            row = kinds.index(fault["kind"])
            bottom.plot([fault["at"] / 60, fault["until"] / 60], [row, row], color=_RED, linewidth=3)
            bottom.plot(fault["at"] / 60, row, "|", color=_RED, markersize=7)
        bottom.set_yticks(range(len(kinds)), [kind.replace("_", " ") for kind in kinds], fontsize=8)
        bottom.set(xlabel="minutes", ylim=(-0.7, len(kinds) - 0.3))
        for axes in (top, bottom):
            axes.spines[["top", "right"]].set_visible(False)
        fig.suptitle(
            f"{found['episodes']:,} episodes, {len(found['faults'])} faults: {found['unaccounted']} unaccounted, "
            f"{found['duplicates_in_snapshot']} duplicates", fontsize=11,
        )  # fmt: skip
        target.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(target, metadata={"Date": None})
        plt.close(fig)
    return target
