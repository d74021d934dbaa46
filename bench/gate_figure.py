"""The gate benchmark's picture: promoted by luck before and after, power along the stream, the canary."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

_BEFORE, _AFTER, _ALPHA = "#c9ced4", "#3b6fb6", "#b3261e"
_NAMES = {
    "equal": "one candidate, equal",
    "mixed": "one, better and worse by task",
    "best_of_10": "best of 10 equal ones",
    "best_of_32": "best of 32 equal ones",
    "environment_easier_by_0.05": "equal, environment easier by 0.05",
    "environment_easier_by_0.1": "equal, environment easier by 0.1",
    "one_task_ruined": "one, a task ruined",
    "worse_by_0.02_50_in_sequence": "50 in sequence, worse by 0.02",
    "equal_50_in_sequence": "50 in sequence, equal",
    "equal_nightly_for_a_year": "365 in sequence, equal: a year",
}


def figure(results: Mapping[str, Any], target: Path) -> Path:
    """Left: P(at least one is promoted) by null; middle: promoted by episodes; right: the canary. SVG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context({"svg.hashsalt": "gate", "font.size": 10, "svg.fonttype": "none"}):
        fig, (false, power, work) = plt.subplots(
            1, 3, figsize=(13, 4.2), width_ratios=(4, 4, 2.6), layout="constrained"
        )
        _false(false, results)
        _power(power, results)
        _canary(work, results)
        for axes in (false, power, work):
            axes.spines[["top", "right"]].set_visible(False)
        target.parent.mkdir(parents=True, exist_ok=True)
        fig.savefig(target, metadata={"Date": None} if target.suffix == ".svg" else None)
        plt.close(fig)
    return target


def _false(axes: Any, results: Mapping[str, Any]) -> None:
    rows = [name for name in _NAMES if name in results["stream"]]
    for row, name in enumerate(rows):
        entry = results["stream"][name]
        for offset, rate, colour in ((-0.2, entry["before"], _BEFORE), (0.2, entry["false_promotion_rate"], _AFTER)):
            axes.barh(row + offset, rate["mean"], 0.38, color=colour)
            axes.text(rate["mean"] + 0.012, row + offset, f"{rate['mean']:.3f}", va="center", fontsize=8)
    axes.axvline(results["alpha"], color=_ALPHA, linewidth=1)
    axes.set_yticks(range(len(rows)), [_NAMES[name] for name in rows])
    axes.invert_yaxis()
    axes.set(xlim=(0, 1.1), xlabel="probability that at least one is promoted", title="No better, and promoted")
    axes.plot([], [], color=_BEFORE, linewidth=7, label="before")
    axes.plot([], [], color=_AFTER, linewidth=7, label="after")
    axes.plot([], [], color=_ALPHA, label=f"alpha {results['alpha']:g}")
    axes.legend(frameon=False, loc="upper right")


def _power(axes: Any, results: Mapping[str, Any]) -> None:
    import matplotlib.pyplot as plt

    positions = results["power_by_position"]
    shades = plt.get_cmap("viridis")([0.8, 0.55, 0.3, 0.05])
    for (position, entry), shade in zip(positions.items(), shades, strict=True):
        for effect, style in (("+0.10", "-"), ("+0.05", ":")):
            curve = [0.0, *entry[effect]["curve"]]
            label = f"trial {position}" if style == "-" else None
            axes.plot(range(0, 10 * len(curve), 10), curve, style, color=shade, label=label)
    axes.plot([], [], "-", color="black", label="better by 0.1")
    axes.plot([], [], ":", color="black", label="better by 0.05")
    axes.axhline(0.9, color="#888888", linewidth=0.8, linestyle="--")
    axes.set(xlabel="episodes a task, each policy", ylabel="probability of promotion by then", ylim=(0, 1.02))
    axes.set(xlim=(0, None), title="Better, and promoted")
    axes.legend(frameon=False, loc="upper right", bbox_to_anchor=(1.0, 0.87), fontsize=9)


def _canary(axes: Any, results: Mapping[str, Any]) -> None:
    (chain,) = results["canary_chain"].values()
    bars = (("start", "success_at_start", "#7a8794"), ("before", "success_before", _BEFORE),
            ("after", "success_after", _AFTER))  # fmt: skip
    for column, (_, key, colour) in enumerate(bars):
        axes.bar(column, chain[key], 0.7, color=colour)
        axes.text(column, chain[key] + 0.012, f"{chain[key]:.3f}", ha="center", fontsize=9)
    axes.set_xticks(range(len(bars)), [name for name, _, _ in bars])
    axes.set(
        ylim=(0, 1),
        ylabel="the champion's success",
        title=f"Automatic canary:\n{chain['candidates']} each worse by 0.02",
    )
