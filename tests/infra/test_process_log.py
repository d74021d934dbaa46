"""A log that others can make grow: floods are thinned out and counted, and a full disk does not end it."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from infra.process import FloodFilter, log_to


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def root() -> Iterator[None]:
    before = logging.getLogger().handlers[:], logging.getLogger().level
    yield
    logging.getLogger().handlers[:], level = before
    logging.getLogger().setLevel(level)


def test_a_flood_is_thinned_out_and_counted(tmp_path: Path) -> None:
    clock = Clock()
    path, log = log_to(tmp_path, "p", flood=FloodFilter(20, 2, clock)), logging.getLogger("flooded")
    for number in range(1000):
        log.warning("refused: %s", "x" * number)
        log.error("failed %d", number)
    log.warning("another kind")
    clock.now = 10.0
    log.warning("refused: %s", "again", extra={"fields": {"client": "c"}})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [line["message"].split()[0] for line in lines]
    assert (kinds.count("refused:"), kinds.count("failed"), kinds.count("another")) == (21, 1, 1)
    assert lines[-1]["left_out"] == 980 and lines[-1]["client"] == "c"


def test_messages_made_up_by_others_fill_no_table() -> None:
    flood = FloodFilter(1, 1)
    for number in range(5000):
        flood.filter(logging.LogRecord("n", logging.INFO, "f", 1, f"{number} made up", (), None))
    assert len(flood._kinds) <= 1024


def test_a_full_disk_ends_neither_the_log_nor_the_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this machine has no /dev/full")
    (tmp_path / "p.jsonl").symlink_to("/dev/full")
    log_to(tmp_path, "p")
    for number in range(1000):
        logging.getLogger("full").info("line %d", number)
    said = capsys.readouterr().err
    assert "log lines could not be written" in said and len(said) < 3000 and "Traceback" not in said
    logging.getLogger().handlers[0].stream = (tmp_path / "room").open("w")  # type: ignore[attr-defined]
    logging.getLogger("full").info("there is room again")
    assert "room again" in (tmp_path / "room").read_text()
