"""Files are the old or the new one, and their folder may be deleted meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from infra.files import write_durably


def test_a_folder_that_was_deleted_is_made_again(tmp_path: Path) -> None:
    target = tmp_path / "learner" / "status.json"
    write_durably(target, b"1")
    shutil.rmtree(target.parent)
    write_durably(target, b"2")
    assert target.read_bytes() == b"2" and [path.name for path in target.parent.iterdir()] == ["status.json"]


def test_a_file_in_place_of_the_folder_is_an_error_and_stays(tmp_path: Path) -> None:
    (tmp_path / "learner").write_text("mine")
    with pytest.raises(OSError, match="learner"):
        write_durably(tmp_path / "learner" / "status.json", b"1")
    assert (tmp_path / "learner").read_text() == "mine"
