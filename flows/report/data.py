"""The typed layout of a run's record: what `build_report` reads. Every part may be missing; `missing` names them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from infra.errors import ConfigError, CorruptDataError
from lwd_model.evaluation import EpisodeResult, method_record
from lwd_model.statistics import Interval, wilson

RECORD = "record"
"""Folder below the run's, where stages write."""

LABELS = {
    "sft": "SFT",
    "offline": "LWD offline",
    "online": "LWD online",
    "recap": "RECAP",
    "hg_dagger": "HG-DAgger",
}
ORDER = ("sft", "recap", "hg_dagger", "offline", "online")


@dataclass(frozen=True)
class Evaluation:
    """One method's evaluation; `record` is its entry under `methods` in the results format."""

    name: str
    label: str
    episodes: list[EpisodeResult]
    record: dict[str, Any]
    policy_version: int | None


@dataclass(frozen=True)
class Curve:
    """The online stage, episode by episode; see `record_learning_curve`."""

    episodes: list[dict[str, Any]]
    redeployments: list[dict[str, int]]
    evaluations: list[dict[str, Any]]

    def rolling(self, window: int) -> tuple[list[int], list[Interval], list[Interval]]:
        """Autonomous success and takeover rate over the last `window` episodes, with Wilson intervals.

        An episode in which an operator took over is no autonomous success. Points start once half a window is there.
        """
        alone = np.array([e["success"] and not e["takeover"] for e in self.episodes], dtype=int)
        helped = np.array([e["takeover"] for e in self.episodes], dtype=int)
        at = list(range(max(1, min(window // 2, len(alone))), len(alone) + 1))
        lows = [max(0, n - window) for n in at]
        success = [wilson(int(alone[a:n].sum()), n - a) for a, n in zip(lows, at, strict=True)]
        takeover = [wilson(int(helped[a:n].sum()), n - a) for a, n in zip(lows, at, strict=True)]
        return at, success, takeover


@dataclass(frozen=True)
class Diagnosis:
    """Value distribution along one episode: T states, K atoms; see `record_diagnosis`."""

    task: str
    instruction: str
    caption: str
    seconds: npt.NDArray[np.float32]
    atoms: npt.NDArray[np.float32]
    distribution: npt.NDArray[np.float32]
    intervention: npt.NDArray[np.bool_]

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """(T,)"""
        return self.distribution @ self.atoms

    def quantile(self, tau: float) -> npt.NDArray[np.float64]:
        """(T,) tau-quantile of the value, linear between atoms."""
        cumulative = np.cumsum(self.distribution.astype(np.float64), axis=1)
        return np.array([np.interp(tau * row[-1], row, self.atoms) for row in cumulative])


@dataclass(frozen=True)
class Frames:
    """(n, h, w, 3) uint8 camera frames of one robot."""

    frames: npt.NDArray[np.uint8]
    caption: str
    fps: float


@dataclass(frozen=True)
class ReportData:
    """Everything recorded about a run; None or empty where a stage has not been there yet."""

    run_dir: Path
    run: dict[str, Any] | None
    wall_s: float
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    training: dict[str, list[dict[str, float]]] = field(default_factory=dict)
    curve: Curve | None = None
    composition: list[dict[str, Any]] | None = None
    latency: dict[str, list[float]] = field(default_factory=dict)
    success: Diagnosis | None = None
    failure: Diagnosis | None = None
    before: Frames | None = None
    after: Frames | None = None
    counts: dict[str, int] | None = None
    quarantine: list[dict[str, Any]] | None = None
    gates: list[dict[str, Any]] = field(default_factory=list)
    model_card: dict[str, Any] | None = None

    @classmethod
    def load(cls, run_dir: Path) -> ReportData:
        """Read what is there.

        Raises:
            ConfigError: `run_dir` has no record at all.
            CorruptDataError: a file cannot be read; names it.
        """
        root = run_dir / RECORD
        if not root.is_dir():
            raise ConfigError(f"{run_dir} holds no record of a run", "run `lwd demo` first, or name another folder")
        run = _optional(root / "run.json", read_json)
        curve = _optional(root / "curve.json", read_json)
        found = {path.stem: _evaluation(path) for path in sorted((root / "evaluations").glob("*.json"))}
        ranked = sorted(found, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))
        stages = {path.stem: read_json(path) for path in (root / "training").glob("*.json")}
        return cls(
            run_dir=run_dir,
            run=run,
            wall_s=_wall_s(root, run),
            evaluations={name: found[name] for name in ranked},
            training={name: stages[name] for name in ("sft", "offline", "online") if name in stages},
            curve=Curve(**curve) if curve else None,
            composition=_optional(root / "composition.json", read_json),
            latency=_optional(root / "latency.json", read_json) or {},
            success=_optional(root / "value_success.npz", _diagnosis),
            failure=_optional(root / "value_failure.npz", _diagnosis),
            before=_optional(root / "frames_before.npz", _frames),
            after=_optional(root / "frames_after.npz", _frames),
            counts=_optional(root / "loop.json", read_json),
            quarantine=_optional(root / "quarantine.json", read_json),
            gates=sorted(
                (read_json(path) for path in (root / "gates").glob("*.json")),
                key=lambda gate: ORDER.index(gate["candidate"]) if gate["candidate"] in ORDER else len(ORDER),
            ),
            model_card=_optional(root / "model_card.json", read_json),
        )

    @property
    def tasks(self) -> dict[str, str]:
        """{task key: instruction} of every task that was evaluated, instruction "" where unknown."""
        named = dict(self.run["tasks"]) if self.run else {}
        for evaluation in self.evaluations.values():
            for task in evaluation.record["per_task"]:
                named.setdefault(task, "")
        return named

    @property
    def missing(self) -> list[str]:
        """Names of the parts that have not been recorded."""
        parts: Mapping[str, object] = {
            "run": self.run,
            **{f"evaluation of {LABELS[name]}": name in self.evaluations for name in ("sft", "offline", "online")},
            **{f"training metrics ({name})": name in self.training for name in ("offline", "online")},
            "learning curve": self.curve,
            "buffer composition": self.composition,
            "latencies": self.latency,
            "value over a success": self.success,
            "value over a failure": self.failure,
            "frames before": self.before,
            "frames after": self.after,
            "loop counts": self.counts,
            "contract violations": self.quarantine is not None,
            "gate decision": self.gates,
            "model card": self.model_card,
        }
        return [name for name, part in parts.items() if not part]

    def results(self) -> dict[str, Any]:
        """The `results` of report.json: the learning format, and `loop`."""
        per_task = [task["n"] for e in self.evaluations.values() for task in e.record["per_task"].values()]
        counts = self.counts or {}
        return {
            "suite": self.run["suite"] if self.run else None,
            "episodes_per_task": min(per_task, default=None),
            "methods": {name: evaluation.record for name, evaluation in self.evaluations.items()},
            "loop": {
                "redeployments": counts.get("redeployments"),
                "interventions": counts.get("interventions"),
                "episodes_online": counts.get("episodes_online"),
                "quarantined": None if self.quarantine is None else len({q["episode_id"] for q in self.quarantine}),
                "episode_to_learner_s": percentiles(self.latency.get("episode_to_learner_s", [])),
                "publish_to_active_s": percentiles(self.latency.get("publish_to_active_s", [])),
                "gate": self.gates[-1]["verdict"] if self.gates else None,
            },
        }


def percentiles(samples: list[float]) -> dict[str, float] | None:
    """{"p50", "p99"} of the samples; None without any."""
    if not samples:
        return None
    p50, p99 = np.quantile(samples, [0.5, 0.99])
    return {"p50": float(p50), "p99": float(p99)}


def read_json(path: Path) -> Any:
    """Raises: CorruptDataError naming the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptDataError(f"{path} cannot be read: {error}", "run the stage that records it again") from error


def _optional(path: Path, read: Callable[[Path], Any]) -> Any:
    return read(path) if path.exists() else None


def _evaluation(path: Path) -> Evaluation:
    raw = read_json(path)
    try:
        episodes = [EpisodeResult.from_dict(row) for row in raw["episodes"]]
        return Evaluation(
            name=raw["name"],
            label=raw["label"] or LABELS.get(raw["name"], raw["name"]),
            episodes=episodes,
            record=method_record([episodes], updates=raw["updates"], env_steps=raw["env_steps"]),
            policy_version=raw["policy_version"],
        )
    except (KeyError, TypeError) as error:
        raise CorruptDataError(f"{path} lacks {error}", "evaluate this policy again") from error


def _npz(path: Path) -> dict[str, Any]:
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except (ValueError, OSError, EOFError, KeyError) as error:
        raise CorruptDataError(f"{path} cannot be read: {error}", "run the stage that records it again") from error


def _diagnosis(path: Path) -> Diagnosis:
    raw = _npz(path)
    words: dict[str, Any] = {name: str(raw.pop(name)) for name in ("task", "instruction", "caption")}
    return Diagnosis(**words, **raw)


def _frames(path: Path) -> Frames:
    raw = _npz(path)
    return Frames(raw["frames"], str(raw["caption"]), float(raw["fps"]))


def _wall_s(root: Path, run: dict[str, Any] | None) -> float:
    if run is None:
        return 0.0
    if run["wall_s"] is not None:
        return float(run["wall_s"])
    started = datetime.strptime(run["started"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC).timestamp()
    last = max(path.stat().st_mtime for path in root.rglob("*") if path.is_file())
    return max(0.0, last - started)
