"""The envelope of results, and the gate's simulation that is written in it."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

from bench.envelope import Envelope, commit, machine, matmul_gflops
from bench.gate import main


def test_document_has_the_fields_of_the_format(tmp_path: Path) -> None:
    envelope = Envelope("speed", "make bench-speed", [0, 1], machine=machine(measure=False))
    document = json.loads(envelope.write(tmp_path / "sub" / "speed.json", {"x": 1.5}).read_text())
    assert list(document) == ["name", "command", "commit", "machine", "seeds", "started", "wall_s", "results"]
    assert document["results"] == {"x": 1.5} and document["seeds"] == [0, 1]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", document["started"])
    assert document["wall_s"] >= 0
    assert {"cpu", "cores", "memory_gib", "gpu", "matmul_gflops"} <= set(document["machine"])
    assert document["machine"]["cores"] >= 1 and document["machine"]["memory_gib"] > 0


def test_a_result_that_is_not_a_number_is_refused_and_nothing_written(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    path.write_text("before")
    with pytest.raises(ValueError, match="JSON"):
        Envelope("speed", "", [], machine={}).write(path, {"x": float("nan")})
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_matmul_rate_is_measured() -> None:
    assert 0.1 < matmul_gflops(size=128, seconds=0.02) < 1e6


def test_commit_of_a_repository_and_of_none(tmp_path: Path) -> None:
    assert commit(tmp_path) == "unknown"
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q", str(tmp_path)], check=True)
    assert commit(tmp_path) == "unknown"  # no commit yet
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], cwd=tmp_path, check=True)
    assert re.fullmatch(r"[0-9a-f]{40}", commit(tmp_path))


def test_gate_benchmark_writes_json_and_figure(tmp_path: Path) -> None:
    out = tmp_path / "gate.json"
    main(["--simulations", "40", "--year", "5", "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert {"alpha", "simulations", "false_promotion_rate", "power", "median_episodes_to_decision"} <= set(results)
    assert results["power"]["+0.20"] >= results["power"]["+0.05"]
    assert out.with_suffix(".svg").read_text().rstrip().endswith("</svg>")
