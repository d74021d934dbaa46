"""The documentation names files that are there."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FOLDERS = ("flows", "lwd_model", "data_contracts", "infra", "tests", "bench", "docs")


def links(text: str) -> Iterator[str]:
    """Targets within the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in target and not target.startswith("#"):
            yield target.partition("#")[0]


def code_paths(text: str) -> Iterator[str]:
    """Paths in backticks, from the repository's root."""
    yield from re.findall(rf"`((?:{'|'.join(FOLDERS)})/[\w./-]*)`", text)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_a_page_names_files_that_exist(page: Path) -> None:
    text = page.read_text()
    gone = [target for target in links(text) if not (page.parent / target).exists()]
    gone += [path for path in code_paths(text) if not (ROOT / path).exists()]
    assert gone == []
