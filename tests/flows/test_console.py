"""Whatever a text holds, it is shown as text: no markup, no command to the terminal, no folding in a pipe."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.table import Table

from flows.console import PlainConsole, bold, visible

ODD = ["[/red]", "[bold]x", "[link=https://evil.example]here[/link]", ":skull:", "\x1b[2J\x1b]8;;https://e\x07x",
       "a\rb", "\x9b31m", "\u202egpj.exe", "\ud800", "\u200b", "a\u2028b", "a\u2029b", "\x00", "a" * 300]  # fmt: skip


def shown(*parts: object) -> str:
    file = io.StringIO()
    PlainConsole(file=file).print(*parts, sep="")
    return file.getvalue()


@pytest.mark.parametrize("text", ODD)
def test_a_text_is_shown_as_it_is(text: str) -> None:
    assert shown(text) == f"{visible(text)}\n"
    table = Table(text)
    table.add_row(text)
    assert shown(table).count(visible(text)) == 2
    assert bold(text).plain == visible(text)


@given(st.text(st.characters(exclude_categories=())))
def test_no_character_commands_a_terminal(text: str) -> None:
    seen = visible(text)
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", seen)
    assert visible(seen) == seen


def test_a_reader_of_latin_1_gets_escapes() -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, "latin-1", errors="backslashreplace", write_through=True)
    PlainConsole(file=stream).print("τ … ü")
    assert raw.getvalue() == b"\\u03c4 \\u2026 \xfc\n"


def test_no_line_of_the_product_is_written_in_markup() -> None:
    folder = Path(__file__).parents[2] / "flows"
    tags = re.compile(r"\[/?(bold|red|green|yellow|dim|italic|link)[^\]]*\]")
    assert [str(path) for path in folder.rglob("*.py") if tags.search(path.read_text())] == []
