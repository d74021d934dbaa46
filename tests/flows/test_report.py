"""The report from a synthetic run: complete, partial, self-contained, and the JSON beside it."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from flows import report
from flows.gate import decide, load_gate
from flows.report.figures import tau_and_entropy
from infra.episode import Episode, new_episode_id
from infra.errors import ConfigError, CorruptDataError
from lwd_model.evaluation import EpisodeResult

TASKS = {
    "S1": "open the drawer",
    "S2": "close the window",
    "S3": "put the cube on the mark",
    "S4": "unlock and open the window",
}
RATES = {"sft": (0.5, 0.7, 0.75, 0.6), "offline": (0.62, 0.84, 0.86, 0.7), "online": (0.8, 0.92, 0.94, 0.84)}


def results(name: str, n: int = 50) -> list[EpisodeResult]:
    rng = np.random.default_rng(sum(map(ord, name)))
    out = []
    for task, rate in zip(TASKS, RATES[name], strict=True):
        for seed in range(n):
            success = bool(rng.random() < rate)
            seconds = float(rng.gamma(9, 0.3)) if success else 5.0
            score = 1.0 if success else 0.5 * rng.integers(2)
            out.append(EpisodeResult(task, seed, success, float(score), min(seconds, 5.0), int(20 * seconds)))
    return out


def diagnosis(rises: bool, seed: int) -> dict[str, object]:
    rng = np.random.default_rng(seed)
    seconds, atoms = np.arange(0, 4.0 if rises else 5.0, 0.05), np.linspace(-0.1, 1.1, 201)
    progress = seconds / seconds[-1]
    centre = 0.4 + 0.55 * progress**1.5 if rises else 0.5 + 0.1 * np.tanh(4 * progress) - 0.25 * progress
    centre = centre + np.convolve(rng.normal(0, 0.06, len(seconds)), np.ones(6) / 6, "same")
    width = (0.16 - 0.11 * progress if rises else 0.15 + 0 * progress)[:, None]
    logits = -0.5 * ((atoms - centre[:, None]) / width) ** 2
    p = np.exp(logits)
    return {"seconds": seconds, "atoms": atoms, "distribution": p / p.sum(1, keepdims=True)}


def picture(closed: bool) -> np.ndarray:
    frames = np.full((40, 96, 96, 3), (196, 190, 180), np.uint8)
    frames[:, 60:] = (120, 96, 74)
    for i, frame in enumerate(frames):
        x = 10 + round((i if closed else min(i, 18)) * 1.6)
        frame[44:62, 70:90] = (70, 110, 160)
        frame[30:50, x : x + 10] = (40, 44, 52)
    return frames


def write_run(run: Path, tasks: dict[str, str] = TASKS) -> None:
    """A run as the flows would record it; synthetic, for looking and testing only."""
    rng = np.random.default_rng(0)
    report.record_run(run, command="make demo", seeds=[0], tasks=tasks, wall_s=774.0, started="2026-01-02T03:04:05Z")
    found = {
        name: report.record_evaluation(run, name, results(name), updates=u, policy_version=v, env_steps=s)
        for name, u, v, s in (("sft", 3000, 1, 0), ("offline", 1200, 2, 0), ("online", 2400, 14, 21500))
    }
    for stage, begin, base in (("offline", 0.78, 0.6), ("online", 0.5, 0.9)):
        update = np.arange(0, 1200, 10)
        entropy = begin - 0.25 * (1 - np.exp(-update / 400)) + rng.normal(0, 0.015, len(update))
        report.record_training(
            run,
            stage,
            [
                {"update": int(u), "value/tau": float(base + 0.3 * (0.5 - e)), "value/entropy": float(e)}
                for u, e in zip(update, entropy, strict=True)
            ],
        )
    episodes = [
        {
            "task": list(tasks)[i % 4],
            "success": bool(rng.random() < 0.72 + 0.2 * i / 260),
            "takeover": bool(rng.random() < 0.35 - 0.25 * i / 260),
            "policy_version": 2 + i // 22,
        }
        for i in range(260)
    ]
    report.record_learning_curve(
        run, episodes, redeployments=[{"episodes": 22 * k, "version": 2 + k} for k in range(1, 12)]
    )
    rows = []
    for task in tasks:
        for source, outcome, n in (
            ("demo", "success", 20), ("rollout", "success", 33), ("rollout", "failure", 27), ("play", "success", 12),
            ("play", "failure", 18), ("online", "success", 52), ("online", "failure", 13),
        ):  # fmt: skip
            rows.append(
                {"task": task, "source": source, "outcome": outcome, "episodes": n + len(rows) % 3, "steps": 70 * n}
            )
    report.record_composition(run, rows)
    report.record_latency(
        run, {"episode_to_learner_s": rng.gamma(4, 0.2, 260), "publish_to_active_s": rng.gamma(3, 0.9, 44)}
    )
    report.record_diagnosis(run, "success", task="S4", instruction=TASKS["S4"], **diagnosis(True, 1))
    failed = diagnosis(False, 2)
    helped = np.asarray(failed["seconds"]) > 4.2
    report.record_diagnosis(run, "failure", task="S1", instruction=TASKS["S1"], intervention=helped, **failed)
    report.record_frames(run, "before", picture(False), "SFT dithers beside the handle until the time limit.")
    report.record_frames(run, "after", picture(True), "The online policy opens the drawer in 3.1 s.")
    report.record_loop(run, redeployments=11, interventions=61, episodes_online=260)
    report.record_quarantine(
        run,
        [
            {
                "episode_id": new_episode_id(), "rule": "actions.finite", "message": "NaN in the action of step 17",
                "task": "S2", "source": "rollout", "owner": "data stewards", "severity": "block",
            }
        ],
    )  # fmt: skip
    spec = load_gate()
    for candidate, champion in (("offline", "sft"), ("online", "sft")):
        decision = decide(spec, found[candidate], found[champion])
        report.record_gate(run, decision.as_dict(), candidate=candidate, champion=champion)
    report.record_model_card(
        run, {"version": 14, "data": {"snapshot": 33, "digest": "ab" * 32}, "approver": None, "known_failures": ["S1"]}
    )


@pytest.fixture(scope="module")
def complete(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("demo")
    write_run(run)
    report.build_report(run)
    return run


class _Links(HTMLParser):
    """Everything that a browser would fetch, and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        for name, value in attrs:
            if name in ("src", "srcset", "href", "xlink:href", "data", "poster") and value:
                self.fetched.append(value)
            if name == "id" and value:
                self.ids.append(value)


def test_page_is_self_contained(complete: Path) -> None:
    html = (complete / "report.html").read_text()
    page = _Links()
    page.feed(html)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    outside = [link for link in page.fetched if not link.startswith(("data:", "#"))]
    assert outside == ["report.json"]
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert len(page.ids) == len(set(page.ids))
    # Every reference inside the figures points at something.
    assert {link[1:] for link in page.fetched if link.startswith("#")} <= set(page.ids)
    assert set(re.findall(r"url\(#([^)]+)\)", html)) <= set(page.ids)


def test_page_shows_every_part(complete: Path) -> None:
    html = (complete / "report.html").read_text()
    assert "Not recorded yet" not in html
    assert html.count("<svg") == 7
    assert html.count("data:image/webp") == 6
    for text in (*TASKS.values(), "NaN in the action of step 17", "LWD online", "v13", "prefers-color-scheme:dark"):
        assert text in html
    # Colours follow the theme: no sentinel is left.
    assert not re.search(r"#0[1-9a]0[1-9a]0[1-9a]", html)


def test_json_is_the_envelope(complete: Path) -> None:
    document = json.loads((complete / "report.json").read_text())
    assert set(document) == {"name", "command", "commit", "machine", "seeds", "started", "wall_s", "results"}
    assert document["machine"]["matmul_gflops"] > 0
    found = document["results"]
    assert list(found["methods"]) == ["sft", "offline", "online"]
    assert found["episodes_per_task"] == 50
    online = found["methods"]["online"]
    expected = sum(r.success for r in results("online")) / 200
    assert online["success"]["mean"] == pytest.approx(expected)
    assert online["success"]["low"] < expected < online["success"]["high"]
    assert online["long"] is None
    assert sum(task["k"] for task in online["per_task"].values()) == round(expected * 200)
    loop = found["loop"]
    assert (loop["redeployments"], loop["interventions"], loop["episodes_online"], loop["quarantined"]) == (
        11, 61, 260, 1,
    )  # fmt: skip
    assert 0 < loop["episode_to_learner_s"]["p50"] < loop["episode_to_learner_s"]["p99"]
    assert loop["gate"] == "PASS"


@pytest.mark.parametrize("kept", [[], ["run.json"], ["evaluations"], ["curve.json"], ["value_failure.npz"]])
def test_partial_run_says_what_is_missing(kept: list[str], complete: Path, tmp_path: Path) -> None:
    record = tmp_path / "record"
    record.mkdir()
    for name in kept:
        (record / name).symlink_to(complete / "record" / name)
    html = report.build_report(tmp_path).read_text()
    missing = report.ReportData.load(tmp_path).missing
    assert len(missing) >= 10
    for name in missing:
        assert name in html
    assert "Not recorded yet" in html


def test_text_is_escaped(tmp_path: Path) -> None:
    bad = "<script>alert(1)</script>"
    report.record_quarantine(tmp_path, [{"episode_id": "0" * 32, "rule": "r", "message": bad}])
    report.record_model_card(tmp_path, {"note": bad})
    shape = {"seconds": [0.0, 1.0], "atoms": [0.0, 1.0], "distribution": [[0.5, 0.5], [0.2, 0.8]]}
    report.record_diagnosis(tmp_path, "success", task="S1", instruction=bad, **shape)
    assert "<script" not in report.build_report(tmp_path).read_text()


def test_second_run_record_keeps_start_and_machine(tmp_path: Path) -> None:
    report.record_run(tmp_path, command="lwd demo", seeds=[3], started="2026-01-02T03:04:05Z", tasks=TASKS)
    before = json.loads((tmp_path / "record" / "run.json").read_text())
    report.record_run(tmp_path, command="lwd demo", seeds=[3], wall_s=12.5)
    report.build_report(tmp_path)
    document = json.loads((tmp_path / "report.json").read_text())
    assert document["started"] == "2026-01-02T03:04:05Z"
    assert document["wall_s"] == 12.5
    assert document["machine"] == before["machine"]


def test_takeover_is_no_autonomous_success() -> None:
    rows = [{"success": True, "takeover": i < 10, "task": "S1"} for i in range(20)]
    at, success, takeover = report.data.Curve(rows, [], []).rolling(10)
    assert at[0] == 5 and at[-1] == 20
    assert success[at.index(10)].mean == 0 and takeover[at.index(10)].mean == 1
    assert success[-1].mean == 1 and takeover[-1].mean == 0


def test_quantiles_of_a_known_distribution() -> None:
    uniform = report.data.Diagnosis(
        "S1", "", "", np.array([0.0], np.float32), np.linspace(0, 1, 101, dtype=np.float32),
        np.full((1, 101), 1 / 101, np.float32), np.zeros(1, bool),
    )  # fmt: skip
    assert uniform.mean[0] == pytest.approx(0.5, abs=1e-5)
    assert uniform.quantile(0.25)[0] == pytest.approx(0.25, abs=0.02)


def test_composition_counts_episodes_and_steps() -> None:
    def episode(outcome: str, steps: int) -> Episode:
        zeros = np.zeros((steps, 5), np.float32)
        return Episode(
            new_episode_id(), "r0", "S1", "open the drawer", "rollout", outcome, 1,
            np.zeros((steps + 1, 3), np.float32), zeros, zeros[:, 0], zeros[:, 0] > 0, np.arange(steps + 1.0),
            (0.0,), 0.0,
        )  # type: ignore[arg-type]  # fmt: skip

    rows = report.composition_of([episode("success", 4), episode("failure", 7), episode("time_limit", 9)])
    assert rows == [
        {"task": "S1", "source": "rollout", "outcome": "failure", "episodes": 2, "steps": 16},
        {"task": "S1", "source": "rollout", "outcome": "success", "episodes": 1, "steps": 4},
    ]


def test_no_tau_no_figure() -> None:
    assert tau_and_entropy({"offline": [{"update": 1.0, "critic/loss": 0.5}]}) is None


def test_bad_input_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no record"):
        report.build_report(tmp_path)
    with pytest.raises(ConfigError, match="lack 'update'"):
        report.record_training(tmp_path, "sft", [{"loss": 1.0}])
    with pytest.raises(ConfigError, match=r"\(n, h, w, 3\)"):
        report.record_frames(tmp_path, "before", np.zeros((4, 8, 8), np.uint8), "")
    with pytest.raises(ConfigError, match=r"2 states, 3 atoms"):
        report.record_diagnosis(
            tmp_path,
            "failure",
            seconds=[0, 1],
            atoms=[0, 1, 2],
            distribution=np.ones((2, 2)),
            task="S1",
            instruction="",
        )
    with pytest.raises(ConfigError, match="no episode"):
        report.record_evaluation(tmp_path, "sft", [])
    report.record_loop(tmp_path, redeployments=1, interventions=0, episodes_online=3)
    (tmp_path / "record" / "loop.json").write_text('{"redeployments": 1')
    with pytest.raises(CorruptDataError, match=r"loop\.json"):
        report.build_report(tmp_path)
