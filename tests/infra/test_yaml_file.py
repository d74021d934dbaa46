"""YAML files that people write: what the parser would drop without a word is refused, with file and line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from infra.errors import ConfigError
from infra.yaml_file import parse_yaml, read_yaml


def parse(text: str) -> object:
    return parse_yaml(Path("f.yaml"), text, "gate")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: 1\nb: 2\na: 3\n", 3),
        ("x:\n  - {b: 1, c: 2}\n  - {b: 1, b: 2}\n", 3),
        ("{a: 1, 'a': 2}", 1),
        ("1: a\n0x1: b\n", 2),
        ("true: a\nyes: b\n", 2),
        ("1: a\n1.0: b\n", 2),
        ("? a\n: 1\n? a\n: 2\n", 3),
        ("base: &x {a: 1}\nother: {<<: *x, <<: *x}\n", 2),
    ],
)
def test_a_key_twice_is_refused(text: str, line: int) -> None:
    with pytest.raises(ConfigError, match=f"f.yaml:{line}: the key .* stands twice"):
        parse(text)


def test_a_merge_may_be_overridden_and_an_alias_used_twice() -> None:
    assert parse("base: &x {a: 1, b: 2}\nother: {<<: *x, a: 3}\nsame: *x\n") == {
        "base": {"a": 1, "b": 2}, "other": {"a": 3, "b": 2}, "same": {"a": 1, "b": 2},
    }  # fmt: skip


@pytest.mark.parametrize("text", ["a: [", "a: 1\n--- \nb: 2\n", "!!python/object:os.system {}", "\x00", "[" * 3000])
def test_what_is_no_single_plain_document_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"gate f\.yaml"):
        parse(text)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("-1E5", -1e5), ("1.5e3", 1500.0), (".5", 0.5), ("3.", 3.0), ("0", 0), ("-7", -7),
        ("1_000", 1000), ("0x1f", 31), (".inf", float("inf")), ("010", "010"), ("1:30", "1:30"), ("1:30.5", "1:30.5"),
        ("2026-01-05", "2026-01-05"), ("1e", "1e"), ("v1", "v1"), ("true", True),
    ],
)  # fmt: skip
def test_numbers_are_those_that_every_reader_sees(text: str, value: object) -> None:
    found = parse(f"a: {text}")
    assert found == {"a": value} and type(found["a"]) is type(value)  # type: ignore[index]


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "f.yaml").write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(tmp_path / "f.yaml", "gate", "copy it")
    with pytest.raises(ConfigError, match="not found"):
        read_yaml(tmp_path / "g.yaml", "gate", "copy it")
    (tmp_path / "f.yaml").write_text("")
    assert read_yaml(tmp_path / "f.yaml", "gate", "copy it") is None


_scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


@given(st.recursive(_scalars, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=20))
def test_what_was_written_is_read(document: object) -> None:
    assert parse(yaml.safe_dump(document)) == document
