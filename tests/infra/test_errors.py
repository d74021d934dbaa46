"""Text of other machines in messages: one bounded line that no terminal obeys and every database takes."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import escaped, named, shown, summary


@given(st.text(st.characters(), max_size=300), st.integers(1, 200))
def test_what_is_shown_is_one_bounded_line_of_plain_characters(text: str, limit: int) -> None:
    line = shown(text, limit)
    assert len(line) <= limit and len(line.splitlines()) <= 1
    assert not any(unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp") for char in line)
    line.encode()


@given(st.text(st.characters(exclude_categories=("C", "Zl", "Zp")), max_size=100))
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert escaped(text) == shown(text) == text


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n  fix: run this", "a\\n  fix: run this"), ("\x1b[2J", "\\x1b[2J"), ("a\u202eb", "a\\u202eb"),
        ("\ud800", "\\ud800"), ("a\u2028b", "a\\u2028b"), ("zero\u200bwidth", "zero\\u200bwidth"),
        ("ü 漢 🤖", "ü 漢 🤖"),
    ],
)  # fmt: skip
def test_what_steers_hides_or_breaks_is_written_as_an_escape(text: str, line: str) -> None:
    assert shown(text) == line


def test_what_may_stay_is_said() -> None:
    assert escaped("a\n\tb\r", keep="\n\t") == "a\n\tb\\r"


def test_a_value_whose_text_breaks_is_named_by_its_type() -> None:
    class Odd:
        def __repr__(self) -> str:
            raise RuntimeError

    assert named(Odd()) == "<Odd>"
    assert summary(ValueError("two\nlines")) == "ValueError: two\\nlines"
