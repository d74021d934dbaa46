"""Every row of the fault matrix has a test of its name, and no test names a row that is not there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]


def rows() -> set[int]:
    text = (ROOT / "docs" / "faults.md").read_text()
    return {int(number) for number in re.findall(r"^\| (\d+) \|", text, re.MULTILINE)}


def rows_with_a_test() -> set[int]:
    found = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        found |= {int(number) for number in re.findall(r"^def test_row_(\d\d)_", path.read_text(), re.MULTILINE)}
    return found


def test_the_matrix_has_38_rows_and_each_has_a_test() -> None:
    assert rows() == set(range(1, 39))
    assert rows_with_a_test() == rows(), (
        f"without a test: {sorted(rows() - rows_with_a_test())}, unknown: {sorted(rows_with_a_test() - rows())}"
    )
