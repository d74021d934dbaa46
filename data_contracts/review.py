"""The page that a data steward reads: what is demanded, what was found, what was refused and why. One offline file."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from data_contracts.contract import Contract
from data_contracts.rules import Rule
from data_contracts.suites import BatchReport
from infra.errors import shown

SHOWN = 500  # quarantined episodes on the page; the rest are counted
SHOWN_REASONS = 20  # of one episode, and rules in the table of reasons
SHOWN_CHARS = 300  # of one text that came with an episode
_SIGNS = {"min": "≥", "max": "≤"}


def write_review(
    path: Path | str,
    contracts: Sequence[Contract],
    reports: Sequence[BatchReport],
    quarantined: Sequence[Mapping[str, Any]],
    *,
    now: float | None = None,
) -> Path:
    """Write the review page, whole or not at all.

    Args:
        path: the HTML file; its folder is made.
        contracts: the contracts in force, with all their rules.
        reports: results over batches, matched to the contracts by name.
        quarantined: per episode `episode_id`, `task`, `source`, `robot_id`, `at` (seconds since the epoch) and
            `reasons`, each with `rule`, `severity`, `message` and optionally `owner`.
        now: seconds since the epoch to print as the page's date; the clock if None.

    Returns:
        The path. The page needs no network, no scripts and no other file.
    """
    path = Path(path)
    rows = sorted(quarantined, key=lambda row: -_seconds(row.get("at")))
    owners = {rule.id: rule.owner for contract in contracts for rule in contract.rules}
    reasons = Counter(_text(reason["rule"]) for row in rows for reason in row["reasons"])
    most = max(reasons.values(), default=1)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("review.html").render(
        written=_when(time.time() if now is None else now),
        contracts=[_contract(contract, reports) for contract in contracts],
        checked=max((report.n for report in reports), default=0),
        blocking=sum(v.severity == "block" for report in reports for v in report.violations),
        warnings=sum(v.severity == "warn" for report in reports for v in report.violations),
        reasons=[(rule, owners.get(rule, ""), n, 100 * n / most) for rule, n in reasons.most_common(SHOWN_REASONS)],
        other_reasons=max(0, len(reasons) - SHOWN_REASONS),
        quarantined=[_episode(row, owners) for row in rows[:SHOWN]],
        refused=len(rows),
        hidden=max(0, len(rows) - SHOWN),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".part")
    aside.write_text(page, encoding="utf-8")
    os.replace(aside, path)
    return path


def _text(value: object) -> str:
    return shown(str(value), SHOWN_CHARS)


def _seconds(value: object) -> float:
    """A time that a calendar has; 0 for any other."""
    return float(value) if isinstance(value, int | float) and 0 < value < 1e11 else 0.0


def _when(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def _bound(rule: Rule) -> str:
    """The rule's parameters in a steward's words."""
    parts = []
    for key, value in rule.parameters.items():
        if isinstance(value, Mapping):
            shown = "; ".join(f"{one}: {', '.join(map(str, other))}" for one, other in value.items())
        elif isinstance(value, list):
            shown = ", ".join(map(str, value))
        else:
            shown = f"{value:g}" if isinstance(value, float) else str(value)
        sign = _SIGNS.get(key)
        parts.append(f"{sign} {shown}" if sign else f"{key} {shown}")
    return ", ".join(parts)


def _contract(contract: Contract, reports: Sequence[BatchReport]) -> dict[str, Any]:
    mine = [report for report in reports if report.contract == contract.name]
    results = {result.rule: result for report in mine for result in report.results if not result.success}
    ran = {result.rule for report in mine for result in report.results}
    units = {field.name: field.unit for field in contract.fields}
    rules = []
    for rule in contract.rules:
        broken = results.get(rule.id)
        state = "not run" if rule.id not in ran else "passed"
        if broken:
            state = "broken" if rule.severity == "block" else "warning"
        rules.append(
            {
                "id": rule.id,
                "description": rule.description,
                "field": rule.field or "",
                "unit": units.get(rule.field or "", ""),
                "bound": _bound(rule),
                "severity": rule.severity,
                "owner": rule.owner,
                "state": state,
                "message": _text(broken.message) if broken else "",
            }
        )
    # what needs attention stands first; otherwise the contract's order
    rank = {"broken": 0, "warning": 1}
    rules.sort(key=lambda rule: rank.get(str(rule["state"]), 2))
    return {
        "name": contract.name.replace("_", " "),
        "version": contract.version,
        "owner": contract.owner,
        "file": contract.path.name,
        "purpose": contract.purpose,
        "checked": sum(report.n for report in mine) if mine else None,
        "broken": sum(rule["state"] == "broken" for rule in rules),
        "warned": sum(rule["state"] == "warning" for rule in rules),
        "rules": rules,
        "tasks": list(contract.tasks.values()),
        "notes": contract.notes,
    }


def _episode(row: Mapping[str, Any], owners: Mapping[str, str]) -> dict[str, Any]:
    return {
        **{key: _text(row.get(key) or "–") for key in ("episode_id", "task", "source", "robot_id")},
        "at": _when(at) if (at := _seconds(row.get("at"))) else "–",
        "reasons": [
            {
                "rule": _text(reason["rule"]),
                "severity": _text(reason.get("severity", "block")),
                "message": _text(reason["message"]),
                "owner": _text(reason.get("owner") or owners.get(str(reason["rule"]), "")),
            }
            for reason in row["reasons"][:SHOWN_REASONS]
        ],
        "more": max(0, len(row["reasons"]) - SHOWN_REASONS),
    }
