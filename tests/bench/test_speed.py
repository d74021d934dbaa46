"""The speed benchmark runs in all its parts and writes what the format asks for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import speed


@pytest.fixture(autouse=True)
def threads():
    """The benchmark sets torch's threads; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    torch.set_flush_denormal(False)


@pytest.mark.timeout(180)
def test_every_part_is_measured_and_written(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    speed.main(["--short", "--out", str(out)])
    document = json.loads(out.read_text())
    assert document["name"] == "speed" and document["machine"]["matmul_gflops"] > 0
    results = document["results"]
    for name in ("learner", "plain_4x256"):
        record = results[name]
        assert record["updates_per_s"] > 0 and record["share_of_matmul_peak"] > 0 and record["matmul_gflops"] > 0
        assert record["threads"] == 1 and record["batch"] == 256 and record["by_threads"].keys() == {"1"}
    assert results["learner"]["network"] != results["plain_4x256"]["network"]
    assert results["env_steps_per_s"] > 0 and results["eval_episodes_per_min"] > 0
    assert results["reader_samples_per_s"] > 0 and results["reader_share_of_raw"] > 0
    spool = results["spool_to_snapshot_s"]
    assert 0 < spool["p50"] <= spool["p99"] and spool["episodes"] == 2
    assert results["details"]["evaluation"]["steps_per_episode"] == 80  # random weights fail within S1's whole limit
    assert (tmp_path / "speed.svg").read_text().startswith("<?xml")


def test_a_short_run_is_not_kept_as_a_result(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        speed.main(["--short"])
    assert "--out" in capsys.readouterr().err
