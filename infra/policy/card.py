"""The model card of a promotion: what runs on the robots, on which data and evidence, and the way back."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from infra.files import write_durably


@dataclass(frozen=True)
class ModelCard:
    """One promotion.

    Attributes:
        version, artifact_sha256: the policy promoted; the digest is its manifest's, to which the approval binds.
        parent: version that it was trained on from.
        snapshot_version, snapshot_digest: the data it learned from; digest None where no snapshot was read.
        evidence: what the gate decided on; `evidence["per_task"]` maps a task to its figures, intervals as
            `{"mean", "low", "high"}`.
        known_failures: sentences.
        proposer, approver: who asked and who agreed; approver None where approval is not required.
        rollback_target: champion before this one; None for the first.
        promoted_at: seconds since the epoch.
    """

    version: int
    artifact_sha256: str
    parent: int | None
    snapshot_version: int
    snapshot_digest: str | None
    evidence: dict[str, Any]
    proposer: str
    approver: str | None
    rollback_target: int | None
    promoted_at: float
    known_failures: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self) | {"known_failures": list(self.known_failures)}

    def markdown(self) -> str:
        """For people."""
        at = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(self.promoted_at))
        snapshot = f"{self.snapshot_version}" + (f" (`{self.snapshot_digest[:16]}`)" if self.snapshot_digest else "")
        lines = [
            f"# Policy {self.version}",
            "",
            f"- promoted: {at}, proposed by {self.proposer}, approved by {self.approver or 'the gate alone'}",
            f"- artifact: `{self.artifact_sha256}`, trained on from {_or_none(self.parent)}",
            f"- data: snapshot {snapshot}",
            f"- rollback target: {_or_none(self.rollback_target)}",
            "",
            "## Evidence",
            "",
        ]
        for name, value in self.evidence.items():
            if name not in ("per_task", "known_failures") and not isinstance(value, Mapping | list):
                lines.append(f"- {name}: {value}")
        for reason in self.evidence.get("reasons", []):
            lines.append(f"- {reason}")
        if "pooled" in self.evidence:
            lines.append(f"- pooled: {_text(self.evidence['pooled'])}")
        lines += ["", *_per_task(self.evidence.get("per_task", {})), "", "## Known failures", ""]
        lines += [f"- {failure}" for failure in self.known_failures] or ["None recorded."]
        return "\n".join(lines) + "\n"

    def write(self, folder: Path) -> Path:
        """Write `policy-<version>.json` and `.md` below `folder`; returns the Markdown's path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"policy-{self.version:05d}"
        write_durably(path.with_suffix(".json"), json.dumps(self.as_dict(), indent=2, sort_keys=True).encode())
        write_durably(path.with_suffix(".md"), self.markdown().encode())
        return path.with_suffix(".md")


def _per_task(per_task: Mapping[str, Mapping[str, Any]]) -> list[str]:
    if not per_task:
        return ["No per-task evidence was given."]
    columns = list(dict.fromkeys(name for row in per_task.values() for name in row))
    lines = ["| task | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for task, row in per_task.items():
        lines.append(f"| {task} | " + " | ".join(_text(row.get(name, "")) for name in columns) + " |")
    return lines


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        if value.keys() >= {"mean", "low", "high"}:
            return f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
        return ", ".join(f"{name} {_text(inner)}" for name, inner in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _or_none(version: int | None) -> str:
    return "none" if version is None else f"policy {version}"
