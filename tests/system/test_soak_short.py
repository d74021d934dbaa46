"""The soak and the latency benchmark in their short forms: real servers of their own, faults, the history checker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import latency, soak
from infra.errors import LwdError
from infra.servers import Servers


@pytest.fixture(autouse=True)
def programs() -> None:
    """The benchmarks start servers of their own; what is not prepared would be built."""
    for server in Servers().all(("postgres", "garage", "kafka")):
        try:
            prepared = server.prepared
        except LwdError:
            prepared = False
        if not prepared:
            pytest.skip(f"{server.name} is not prepared: `make servers` gets it")


def test_a_short_soak_loses_and_doubles_nothing(tmp_path: Path) -> None:
    out = tmp_path / "soak.json"
    words = ["--episodes", "300", "--actors", "8", "--hosts", "2", "--pace", "0.7", "--every", "2", "--breach", "0.05"]
    code = soak.main([*words, "--folder", str(tmp_path / "soak"), "--out", str(out)])
    results = json.loads(out.read_text())["results"]
    assert code == 0, results["broken"]
    assert results["episodes"] >= 300
    assert results["in_snapshot"] + results["quarantined"] == results["episodes"]
    assert (results["unaccounted"], results["duplicates_in_snapshot"]) == (0, 0)
    assert results["quarantined_by_stage"]["contract"] > 0
    assert len(results["faults_injected"]) >= 10, results["faults_skipped"]
    assert results["restarts"] > 0
    assert out.with_suffix(".svg").exists()


@pytest.mark.slow
def test_a_quick_latency_benchmark_measures_every_part(tmp_path: Path) -> None:
    out = tmp_path / "latency.json"
    assert latency.main(["--quick", "--folder", str(tmp_path / "latency"), "--out", str(out)]) == 0
    results = json.loads(out.read_text())["results"]
    direct, linked = results["runs"]
    assert direct["link"] is None and linked["link"] == {"delay_ms": 30.0, "mbit_s": 100.0}
    for run in (direct, linked):
        assert run["episodes"] > 0 and run["activations"] >= run["actors"]
        for name in ("episode_to_learner_s", "publish_to_staged_s", "publish_to_active_s"):
            assert 0 < run[name]["p50"] <= run[name]["p99"]
    assert linked["publish_to_active_s"]["p50"] > 4 * 0.03, "two requests and their answers, at least"
    assert results["commit_ms_by_catalogue_size"].keys() == {"1000", "10000"}
