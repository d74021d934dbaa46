"""Starting over forgets a run, and keeps the lock that the command holds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flows.run import run_flow, start_over
from infra.errors import LeaseLostError
from infra.exclusive import exclusive

ROOT = Path(__file__).parents[2]


def test_starting_over_forgets_everything_but_the_lock(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "catalog.db").touch()
    (tmp_path / "started.json").touch()
    (tmp_path / "demo.lock").touch()
    start_over(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["demo.lock"]
    start_over(tmp_path / "none")


def test_a_run_that_is_at_work_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "report.json").touch()
    code = "import sys, time; from pathlib import Path; from infra.exclusive import exclusive\n"
    code += "with exclusive(Path(sys.argv[1]), 'it'): print(1, flush=True); time.sleep(60)"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "report.lock")], stdout=subprocess.PIPE, text=True
    )
    assert other.stdout is not None and other.stdout.readline()
    with pytest.raises(LeaseLostError, match=str(other.pid)):
        run_flow("report", tmp_path, None, before=lambda: start_over(tmp_path))
    assert (tmp_path / "report.json").exists()
    other.kill()
    other.wait()
    with exclusive(tmp_path / "report.lock", "it"):
        pass
