"""The review page is one file that needs nothing else, and says what was refused, why, and who to ask."""

from __future__ import annotations

import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

from data_contracts.checks import check_episode
from data_contracts.contract import load_contract
from data_contracts.review import SHOWN, write_review
from data_contracts.suites import validate_batch
from infra.episode import Episode


def quarantined(number: int, message: str = "actions[0, 0] = 2") -> dict[str, Any]:
    reason = {"rule": "action-limits", "severity": "block", "message": message, "owner": "fleet-operations"}
    common = {"task": "S1", "source": "online", "robot_id": "r0", "reasons": [reason]}
    return {"episode_id": f"{number:032x}", "at": 1.7e9 + number, **common}


def test_page_tells_the_whole_story(tmp_path: Path, make_episode: Callable[..., Episode]) -> None:
    contracts = [load_contract("episode"), load_contract("offline_buffer")]
    bad = make_episode(1, robot_id="<script>alert(1)</script>")
    found = check_episode(contracts[0], bad)
    reasons = [{"rule": v.rule, "severity": v.severity, "message": v.message, "owner": v.owner} for v in found]
    row = {"episode_id": bad.episode_id, "task": "S1", "source": "online", "robot_id": bad.robot_id, "at": 1.7e9}
    report = validate_batch(contracts[0], [make_episode(2), bad])
    path = write_review(tmp_path / "new" / "review.html", contracts, [report], [{**row, "reasons": reasons}], now=1.7e9)
    page = path.read_text(encoding="utf-8")
    text = unescape(page)
    for contract in contracts:
        for rule in contract.rules:
            assert rule.id in text and rule.description in text and rule.owner in text
    assert bad.episode_id in page and found[0].message in text and report.violations[0].message in text
    assert f"1 of {len(contracts[0].rules)} rules broken" in text
    assert "not checked together" in text and "2023-11-14 22:13 UTC" in text
    assert "<script" not in page  # nothing runs, and names are escaped
    assert not re.search(r"https?://|src=|@import|url\(|<link", page)
    assert not list(path.parent.glob("*.part"))


def test_empty_and_full_quarantine(tmp_path: Path) -> None:
    contracts = [load_contract("episode")]
    page = write_review(tmp_path / "r.html", contracts, [], []).read_text()
    assert "No episode is in quarantine" in page
    page = write_review(tmp_path / "r.html", contracts, [], [quarantined(i) for i in range(SHOWN + 3)]).read_text()
    assert "And 3 older ones" in page
    assert f"{SHOWN + 2:032x}" in page and f"{2:032x}" not in page  # the newest are kept
    assert page.index(f"{SHOWN + 2:032x}") < page.index(f"{SHOWN + 1:032x}")


def test_the_page_is_bounded_whatever_robots_wrote(tmp_path: Path) -> None:
    reasons = [{"rule": f"rule-{n}", "severity": "block", "message": "\ud800\x00" + "m" * 10**4} for n in range(60)]
    long = {"task": "t" * 10**4, "source": None, "robot_id": "r" * 10**4, "reasons": reasons}
    rows = [
        {"episode_id": f"{n:032x}", "at": at, **long}
        for n, at in enumerate([1e300, float("nan"), -1, None, "now", 1.7e9] * 100)
    ]
    page = write_review(tmp_path / "review.html", [load_contract("episode")], [], rows, now=1.7e9).read_text("utf-8")
    assert len(page) < 12 * 2**20
    assert "and 40 more" in page and "And 40 more rules" in page and "And 100 older ones" in page
