"""Assembles the page and the JSON file of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from flows.report import figures, media
from flows.report.data import LABELS, Frames, ReportData, percentiles
from flows.report.envelope import Envelope, commit, write_json


def build_report(run_dir: Path) -> Path:
    """Write `report.html` and `report.json` into the run's folder from what has been recorded so far.

    Returns:
        Path of the page. Missing parts are named on it.

    Raises:
        ConfigError: nothing has been recorded in `run_dir`.
        CorruptDataError: a recorded file cannot be read.
    """
    data = ReportData.load(run_dir)
    document = _document(data)
    write_json(run_dir / "report.json", document)
    environment = Environment(
        loader=PackageLoader("flows.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"pm": _pm, "rate": _rate, "seconds": _seconds, "minutes": _minutes, "words": _words}
    html = environment.get_template("report.html").render(
        data=data,
        document=document,
        figures=_figures(data),
        clips=[_clip(name, clip) for name, clip in (("before", data.before), ("after", data.after)) if clip],
        latencies={
            figures.LATENCIES.get(name, name): {"n": len(values)} | (percentiles(values) or {})
            for name, values in data.latency.items()
            if values
        },
        best=_best(data),
        labels=LABELS,
    )
    path = run_dir / "report.html"
    aside = path.with_name(".report.html.tmp")
    aside.write_text(html, encoding="utf-8")
    aside.replace(path)
    return path


def _document(data: ReportData) -> dict[str, Any]:
    if data.run is None:
        # A stage was run by itself: there is no command or machine of the whole to tell.
        return {
            "name": "demo", "command": None, "commit": commit(), "machine": None, "seeds": [], "started": None,
            "wall_s": None, "results": data.results(),
        }  # fmt: skip
    envelope = Envelope("demo", data.run["command"], data.run["seeds"], data.run["started"], data.run["machine"])
    return envelope.document(data.results(), wall_s=data.wall_s)


def _figures(data: ReportData) -> dict[str, str | None]:
    diagnosed = data.success is not None or data.failure is not None
    window = max(12, min(60, len(data.curve.episodes) // 4)) if data.curve else 0
    draw: Mapping[str, tuple[bool, Callable[[], str | None]]] = {
        "success": (bool(data.evaluations), lambda: figures.success_by_task(data.evaluations, data.tasks)),
        "curve": (
            data.curve is not None and bool(data.curve.episodes),
            lambda: figures.learning_curve(data.curve, data.evaluations, window),  # type: ignore[arg-type]
        ),
        "value": (diagnosed, lambda: figures.value_over_time(data.success, data.failure)),
        "distribution": (diagnosed, lambda: figures.value_distributions(data.success, data.failure)),
        "tau": (bool(data.training), lambda: figures.tau_and_entropy(data.training)),
        "composition": (bool(data.composition), lambda: figures.composition(data.composition or [], data.tasks)),
        "latency": (any(data.latency.values()), lambda: figures.latencies(data.latency)),
    }
    return {name: function() if there else None for name, (there, function) in draw.items()}


def _clip(name: str, clip: Frames) -> dict[str, str]:
    return {
        "name": name,
        "caption": clip.caption,
        "strip": media.filmstrip(clip),
        "animation": media.animation(clip),
        "still": media.still(clip),
    }


def _best(data: ReportData) -> dict[str, float]:
    """{column: best mean} of the methods table, to set the best in bold as Table I does."""
    records = [evaluation.record for evaluation in data.evaluations.values()]
    if len(records) < 2:
        return {}
    best = {"success": max(r["success"]["mean"] for r in records), "score": max(r["score"]["mean"] for r in records)}
    best["cycle_time_s"] = min(r["cycle_time_s"]["mean"] for r in records)
    for task in data.tasks:
        rates = [_per_task(r, task) for r in records if task in r["per_task"]]
        best |= {task: max(rates)} if rates else {}
    return best


def _per_task(record: Mapping[str, Any], task: str) -> float:
    entry = record["per_task"][task]
    return entry["k"] / entry["n"]


def _pm(interval: Mapping[str, float], digits: int = 2) -> str:
    return f"{interval['low']:.{digits}f} – {interval['high']:.{digits}f}"


def _rate(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


def _seconds(value: float) -> str:
    return f"{1000 * value:.0f} ms" if value < 1 else f"{value:.1f} s"


def _minutes(value: float) -> str:
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.1f} min"


def _words(name: str) -> str:
    return name.replace("_", " ")
