"""The report's figures: each takes recorded data and returns an inline SVG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from flows.report.data import Curve, Diagnosis, Evaluation
from flows.report.style import BLUE, GREY, INK, METHOD_COLOURS, MUTED, ORANGE, RED, TEAL, VIOLET, inline_svg, styled

_OTHERS = (BLUE, VIOLET, RED)


def success_by_task(evaluations: Mapping[str, Evaluation], tasks: Iterable[str]) -> str:
    """Success of each method on each task and on average, with 95 % intervals (Fig. 5, left)."""
    groups = ["average", *tasks]
    with styled("success"):
        figure, axes = plt.subplots(figsize=(8.4, 3.1))
        share = 0.8 / max(1, len(evaluations))
        for i, (name, evaluation) in enumerate(evaluations.items()):
            rows = [_rate(evaluation, group) for group in groups]
            x = np.arange(len(groups)) - 0.4 + share * (i + 0.5)
            keep = [j for j, row in enumerate(rows) if row is not None]
            mean = np.array([rows[j]["mean"] for j in keep])  # type: ignore[index]
            errors = np.array([[rows[j]["mean"] - rows[j]["low"], rows[j]["high"] - rows[j]["mean"]] for j in keep]).T  # type: ignore[index]
            colour = METHOD_COLOURS.get(name, _OTHERS[i % len(_OTHERS)])
            axes.bar(x[keep], mean, share * 0.9, color=colour, label=evaluation.label)
            axes.errorbar(x[keep], mean, np.maximum(errors, 0), fmt="none", ecolor=INK, elinewidth=1, capsize=2.5)
        axes.axvline(0.5, color=MUTED, linewidth=0.8, linestyle=":")
        axes.set(ylim=(0, 1.05), xlim=(-0.5, len(groups) - 0.5), ylabel="success")
        axes.set_xticks(range(len(groups)), groups)
        axes.yaxis.grid(True)
        figure.legend(loc="outside upper left", ncols=6)
        return inline_svg(figure, "success", "Success of each method by task, with 95 % intervals")


def learning_curve(curve: Curve, evaluations: Mapping[str, Evaluation], window: int) -> str:
    """Success against episodes collected online, with redeployments and the takeover rate."""
    at, success, takeover = curve.rolling(window)
    total = len(curve.episodes)
    with styled("curve"):
        figure, (top, bottom) = plt.subplots(
            2, 1, figsize=(8.4, 4.4), sharex=True, height_ratios=(3, 1.2), gridspec_kw={"hspace": 0.06}
        )
        top.plot(at, [s.mean for s in success], color=ORANGE, label=f"autonomous, last {window} episodes")
        top.fill_between(at, [s.low for s in success], [s.high for s in success], color=ORANGE, alpha=0.18, lw=0)
        points = [dict(row) for row in curve.evaluations]
        for name, where in (("offline", 0), ("online", total)):
            if name in evaluations:
                points.append({"episodes": where, "success": evaluations[name].record["success"]})
        if points:
            mean = np.array([p["success"]["mean"] for p in points])
            low, high = (np.array([p["success"][side] for p in points]) for side in ("low", "high"))
            top.errorbar(
                [p["episodes"] for p in points], mean, np.maximum([mean - low, high - mean], 0), fmt="o", color=TEAL,
                ecolor=TEAL, markersize=6, elinewidth=1.4, capsize=3, label="evaluation on fixed seeds", clip_on=False,
            )  # fmt: skip
        if "sft" in evaluations:
            top.axhline(
                evaluations["sft"].record["success"]["mean"], color=GREY, linestyle="--", linewidth=1.2, label="SFT"
            )
        for axes in (top, bottom):
            for row in curve.redeployments:
                axes.axvline(row["episodes"], color=VIOLET, linewidth=0.9, alpha=0.45)
            axes.yaxis.grid(True)
        # Labels only where they do not overlap.
        last = -np.inf
        for row in curve.redeployments:
            if row["episodes"] - last >= 0.045 * max(1, total):
                last = row["episodes"]
                top.annotate(
                    f"v{row['version']}", (last, 1.0), xycoords=("data", "axes fraction"), xytext=(0, 3),
                    textcoords="offset points", ha="center", fontsize=8, color=VIOLET, annotation_clip=False,
                )  # fmt: skip
        bottom.plot(at, [t.mean for t in takeover], color=RED)
        bottom.fill_between(at, [t.low for t in takeover], [t.high for t in takeover], color=RED, alpha=0.15, lw=0)
        top.set(ylim=(0, 1.02), ylabel="success")
        bottom.set(ylim=(0, 1.02), ylabel="takeovers", xlabel="episodes collected online", xlim=(0, max(1, total)))
        handles, _ = top.get_legend_handles_labels()
        if curve.redeployments:
            handles.append(Line2D([], [], color=VIOLET, linewidth=0.9, alpha=0.6, label="redeployed"))
        figure.legend(handles=handles, loc="outside upper left", ncols=4)
        return inline_svg(figure, "curve", "Success over the online stage, with redeployments and takeover rate")


def value_over_time(success: Diagnosis | None, failure: Diagnosis | None) -> str:
    """Quantiles of the learned value along a success and a failure (Fig. 6)."""
    shown = [(d, t, c) for d, t, c in ((success, "success", TEAL), (failure, "failure", RED)) if d is not None]
    with styled("value"):
        figure, grid = plt.subplots(1, len(shown), figsize=(8.4, 3.0), sharey=True, squeeze=False)
        for axes, (diagnosis, title, colour) in zip(grid[0], shown, strict=True):
            t = diagnosis.seconds
            for low, high, alpha in ((0.1, 0.9, 0.15), (0.25, 0.75, 0.25)):
                axes.fill_between(
                    t, diagnosis.quantile(low), diagnosis.quantile(high), color=colour, alpha=alpha, lw=0,
                    label=f"{low:g}–{high:g} quantiles",
                )  # fmt: skip
            axes.plot(t, diagnosis.quantile(0.5), color=colour, label="median")
            axes.plot(t, diagnosis.mean, color=INK, linewidth=1, linestyle=":", label="mean")
            _mark_takeover(axes, diagnosis)
            axes.set_title(f"{title} · {diagnosis.task} {diagnosis.instruction}")
            axes.set(xlabel="seconds", xlim=(float(t[0]), float(t[-1])), ylim=(-0.1, 1.1))
            axes.yaxis.grid(True)
        grid[0][0].set_ylabel("value")
        handles, labels = grid[0][-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=6)
        return inline_svg(figure, "value", "Quantiles of the value over time in a success and a failure")


def value_distributions(success: Diagnosis | None, failure: Diagnosis | None) -> str:
    """The predicted value distribution, time along x and value along y (Fig. 9)."""
    shown = [(d, t) for d, t in ((success, "success"), (failure, "failure")) if d is not None]
    with styled("distribution"):
        figure, grid = plt.subplots(1, len(shown), figsize=(8.4, 3.0), sharey=True, squeeze=False)
        image = None
        for axes, (diagnosis, title) in zip(grid[0], shown, strict=True):
            # The square root lets the tails be seen; each column is scaled by its own mode.
            density = np.sqrt(diagnosis.distribution / np.maximum(diagnosis.distribution.max(1, keepdims=True), 1e-9))
            t, atoms = diagnosis.seconds, diagnosis.atoms
            extent = (float(t[0]), float(t[-1]), float(atoms[0]), float(atoms[-1]))
            image = axes.imshow(
                density.T, origin="lower", aspect="auto", extent=extent, cmap="magma", vmin=0, vmax=1,
                interpolation="bilinear",
            )  # fmt: skip
            axes.plot(t, atoms[diagnosis.distribution.argmax(1)], color="#000000", linewidth=1.1, alpha=0.8)
            axes.set_title(f"{title} · {diagnosis.task} {diagnosis.instruction}")
            axes.set(xlabel="seconds")
        grid[0][0].set_ylabel("value")
        assert image is not None
        bar = figure.colorbar(image, ax=list(grid[0]), shrink=0.9, pad=0.015)
        bar.set_label("√(probability / mode)")
        bar.outline.set_visible(False)
        return inline_svg(figure, "distribution", "Predicted value distributions in a success and a failure")


def tau_and_entropy(training: Mapping[str, Sequence[Mapping[str, float]]]) -> str | None:
    """The dynamic expectile level and the value's normalised entropy over training (Fig. 8); None without either."""
    found = [(stage, training[stage]) for stage in ("offline", "online") if _named(training.get(stage), "tau")]
    if not found:
        return None
    with styled("tau"):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, 2.9))
        begun = 0.0
        for stage, rows in found:
            colour = METHOD_COLOURS[stage]
            end = begun
            for axes, suffix in ((left, "tau"), (right, "entropy")):
                key = _named(rows, suffix)
                if key is None:
                    continue
                points = [(row["update"], row[key]) for row in rows if key in row]
                x = begun + np.array([p[0] for p in points])
                y = np.array([p[1] for p in points])
                axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.9)
                axes.plot(x, _smooth(y), color=colour, label=stage)
                end = max(end, float(x[-1]))
            begun = end
        for axes, title in ((left, "expectile level τ"), (right, "normalised entropy of the value")):
            axes.set_title(title)
            axes.set(xlabel="learner updates")
            axes.margins(x=0)
            axes.yaxis.grid(True)
        handles, labels = left.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower left", ncols=4)
        return inline_svg(figure, "tau", "Expectile level and entropy during offline and online training")


def composition(rows: Sequence[Mapping[str, Any]], tasks: Iterable[str]) -> str:
    """Episodes of the replay by task and by source, split by outcome (Fig. 7)."""
    order = [*dict.fromkeys([*tasks, *sorted({row["task"] for row in rows})])]
    order = [task for task in order if any(row["task"] == task for row in rows)]
    sources = [s for s in ("demo", "rollout", "play", "online") if any(row["source"] == s for row in rows)]
    height = 0.9 + 0.33 * max(len(order), len(sources))
    with styled("composition"):
        figure, (left, right) = plt.subplots(1, 2, figsize=(8.4, height))
        for axes, key, names, title in (
            (left, "task", order, "by task"),
            (right, "source", sources, "by source"),
        ):
            begun = np.zeros(len(names))
            for outcome, colour in (("success", TEAL), ("failure", RED)):
                counts = np.array(
                    [sum(r["episodes"] for r in rows if r[key] == name and r["outcome"] == outcome) for name in names]
                )
                axes.barh(range(len(names)), counts, left=begun, color=colour, height=0.68, label=outcome)
                begun = begun + counts
            for y, total in enumerate(begun):
                axes.annotate(
                    f"{total:.0f}", (total, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=9
                )
            axes.set_yticks(range(len(names)), names)
            axes.invert_yaxis()
            axes.set_title(title)
            axes.set(xlabel="episodes", xlim=(0, max(1.0, float(begun.max())) * 1.13))
            axes.xaxis.grid(True)
        figure.legend(
            handles=[Patch(color=TEAL, label="success"), Patch(color=RED, label="failure")],
            loc="outside lower left", ncols=2,
        )  # fmt: skip
        return inline_svg(figure, "composition", "Episodes in the replay by task, source and outcome")


def latencies(samples: Mapping[str, Sequence[float]]) -> str:
    """Share of events done within a time: one panel a latency."""
    shown = {name: np.sort(np.asarray(values)) for name, values in samples.items() if len(values)}
    with styled("latency"):
        figure, grid = plt.subplots(1, len(shown), figsize=(8.4, 2.5), squeeze=False, sharey=True)
        for axes, (name, values) in zip(grid[0], shown.items(), strict=True):
            axes.step(
                np.concatenate([[0.0], values]), np.concatenate([[0.0], np.arange(1, len(values) + 1) / len(values)]),
                where="post", color=BLUE,
            )  # fmt: skip
            for q in (0.5, 0.99):
                x = float(np.quantile(values, q))
                axes.axvline(x, color=MUTED, linewidth=0.8, linestyle=":")
                axes.annotate(
                    f"P{100 * q:.0f} {x:.2f} s", (x, 0.04), xytext=(3, 0), textcoords="offset points", fontsize=8.5,
                    rotation=90, va="bottom", color=MUTED,
                )  # fmt: skip
            axes.set_title(f"{LATENCIES.get(name, name)} (n = {len(values)})")
            axes.set(xlabel="seconds", ylim=(0, 1.03), xlim=(0, float(values[-1]) * 1.1 + 1e-3))
            axes.yaxis.grid(True)
        grid[0][0].set_ylabel("share of events")
        return inline_svg(figure, "latency", "Distribution of the loop's latencies")


LATENCIES = {"episode_to_learner_s": "episode end → learner", "publish_to_active_s": "publish → active on a robot"}


def _rate(evaluation: Evaluation, group: str) -> dict[str, float] | None:
    if group == "average":
        return evaluation.record["success"]
    entry = evaluation.record["per_task"].get(group)
    return entry["success"] if entry else None


def _named(rows: Sequence[Mapping[str, float]] | None, suffix: str) -> str | None:
    """The metric whose name is, or ends after `/` or `_` in, `suffix`."""
    names = sorted({key for row in rows or () for key in row}, key=lambda key: (len(key), key))
    return next((k for k in names if k == suffix or k.endswith((f"/{suffix}", f"_{suffix}"))), None)


def _smooth(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centred moving average over a tenth of the points; shorter at the ends, so that it needs no padding."""
    half = max(1, len(values) // 20)
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _mark_takeover(axes: Axes, diagnosis: Diagnosis) -> None:
    if diagnosis.intervention.any():
        axes.fill_between(
            diagnosis.seconds, -0.1, 1.1, where=diagnosis.intervention, color=VIOLET, alpha=0.12, lw=0, step="mid",
            label="operator",
        )  # fmt: skip
